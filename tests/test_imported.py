"""Results from elsewhere, as tables have them."""

import math
from pathlib import Path

import numpy as np
import pandas
import pytest

import studies
from storage.transactions import PatientStorage
from studies import registry
from studies.definition import Definition, parse
from studies.errors import StudyError

DATA = {"fingerprint": "0" * 16}
WIDE = """
name = "wide"
dataset = "digits"
model = "convnet"
[budget]
trials = 2
[space]
depth = { choices = [3, 5] }
batch_size = { low = 8, high = 64 }
dropout = { low = 0.0, high = 0.5, when = { depth = 5 } }
"""


@pytest.fixture
def wide(storage: PatientStorage) -> Definition:
    """A study with a conditional hyperparameter and a whole number."""
    definition = parse(WIDE)
    registry.create(definition, storage, DATA)
    return definition


def test_rows_of_pandas_have_nan_in_empty_cells_and_floats_for_whole_numbers(
    storage: PatientStorage, wide: Definition
) -> None:
    rows = [
        {"depth": 3, "batch_size": 16.0, "dropout": math.nan, "accuracy": 0.9, "label": pandas.NA, "seconds": np.nan},
        {"depth": 5, "batch_size": np.float64(32.0), "dropout": 0.25, "accuracy": 0.8, "label": "b", "parameters": 9.0},
    ]
    assert studies.import_trials("wide", rows, storage) == 2
    first, second = registry.open("wide", storage).trials
    assert first.params == {"depth": 3, "batch_size": 16}
    assert first.user_attrs.keys() & {"label", "seconds"} == set()
    assert (second.params["batch_size"], second.user_attrs["parameters"]) == (32, 9)
    with pytest.raises(StudyError, match=r"row 1: batch_size = 16\.5"):
        studies.import_trials("wide", [rows[0] | {"batch_size": 16.5}], storage)
    with pytest.raises(StudyError, match="row 1 has no accuracy"):
        studies.import_trials("wide", [rows[0] | {"accuracy": math.nan}], storage)


def test_a_table_with_another_separator_is_named_so(storage: PatientStorage, wide: Definition, tmp_path: Path) -> None:
    file = tmp_path / "results.csv"
    for separator in ";\t":
        file.write_text(f"depth{separator}accuracy\n3{separator}0.9\n", encoding="utf-8")
        with pytest.raises(StudyError, match=r"only the column .*: separate the columns by commas"):
            studies.import_trials("wide", file, storage)
