"""Dropout costs no depth more than a little: it once stood where it spoiled the batch normalisation behind it.

At half the width, which takes less time.
"""

from pathlib import Path

import pytest

from search import data
from search.training_loop import train
from studies.definition import Data
from studies.model_rules import DEPTHS

pytestmark = pytest.mark.long

EPOCHS = 12


@pytest.mark.timeout(900)
@pytest.mark.parametrize("depth", DEPTHS)
def test_no_depth_loses_more_than_three_points_by_dropout_on_the_digits(depth: int, tmp_path: Path) -> None:
    dataset = data.load("digits", Data(validation=0.2), [])
    value = {
        rate: train(
            model="convnet",
            hyperparameters={"depth": depth, "dropout": rate, "width": 0.5},
            dataset=dataset,
            epochs=EPOCHS,
            seed=1,
            precision=("float32", "the test asks for it"),
            folder=tmp_path / str(rate),
            on_epoch=lambda record: None,
            stopping=lambda: None,
        ).value
        for rate in (0.0, 0.25)
    }
    assert value[0.0] > 0.8
    assert value[0.25] > value[0.0] - 0.03, value
