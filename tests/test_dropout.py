"""Dropout costs no depth more than a little: it once stood where it spoiled the batch normalisation behind it.

At half the width, which takes less time.
"""

import tempfile
from functools import cache
from pathlib import Path

import pytest

from search import data
from search.training_loop import train
from studies.definition import Data
from studies.model_rules import DEPTHS

pytestmark = pytest.mark.long

EPOCHS = 12


@cache
def _value(depth: int, rate: float) -> float:
    with tempfile.TemporaryDirectory() as folder:
        return train(
            model="convnet",
            hyperparameters={"depth": depth, "dropout": rate, "width": 0.5},
            dataset=data.load("digits", Data(validation=0.2), []),
            epochs=EPOCHS,
            seed=1,
            precision=("float32", "the test asks for it"),
            folder=Path(folder),
            on_epoch=lambda record: None,
            stopping=lambda: None,
        ).value


@pytest.mark.timeout(900)
@pytest.mark.parametrize("depth", DEPTHS)
def test_no_depth_loses_more_than_three_points_by_dropout_on_the_digits(depth: int) -> None:
    without = _value(depth, 0.0)
    assert without > 0.9
    assert _value(depth, 0.25) > without - 0.03


def test_at_depth_five_much_dropout_slows_the_training_and_does_not_spoil_it() -> None:
    """Behind the pool it cost 8 points in so few epochs, before the pool 26."""
    assert _value(5, 0.5) > _value(5, 0.0) - 0.15
