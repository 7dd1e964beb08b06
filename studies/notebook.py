"""The notebook's measured results, as data: to compare studies with, and to import as a study.

The dropout rates are those that the notebook ran with. The labels of its sweeps say ten times as much (0.7 for 0.07).
All accuracies are those of one run of 20 epochs on the 10,000 test images of MNIST, by which the notebook also chose.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from storage import ledger
from storage.ranking import is_scored
from studies import definition as definitions
from studies import imported, registry
from studies.definition import Definition
from studies.errors import StudyError

NAME = "notebook"


@dataclass(frozen=True, kw_only=True)
class Result:
    """One row of the notebook's tables."""

    source: str  # the table
    label: str  # as the notebook printed it
    depth: int
    conv_dropout: float | None  # rate of the layers after convolutions; None without such a layer
    dense_dropout: float | None  # rate of the layer after Dense 128
    accuracy: float  # on the test images
    loss: float | None = None
    train_accuracy: float | None = None
    measured: str  # at which epoch


def _conclusion(
    label: str, depth: int, dropout: float | None, accuracy: float, loss: float, train: float | None
) -> Result:
    return Result(
        source="conclusion",
        label=label,
        depth=depth,
        conv_dropout=dropout,
        dense_dropout=dropout if depth == 3 else None,
        accuracy=accuracy,
        loss=loss,
        train_accuracy=train,
        measured="after epoch 20",
    )


def _sweep(depth: int, train: tuple[float, ...], test: tuple[float, ...]) -> list[Result]:
    return [
        Result(
            source=f"sweep of depth {depth}",
            label=f"Dropout={step / 10:.1f}",
            depth=depth,
            conv_dropout=None if depth == 3 else step / 100,
            dense_dropout=step / 100 if depth == 3 else None,
            accuracy=accuracy,
            train_accuracy=train_accuracy,
            measured="best of 20 epochs",
        )
        for step, (train_accuracy, accuracy) in enumerate(zip(train, test, strict=True))
    ]


CONCLUSION = (
    _conclusion("3 layers, no dropout", 3, None, 0.9938, 0.02887, 0.9983),
    _conclusion("3 layers, dropout 0.0", 3, 0.0, 0.9928, 0.03003, 0.9982),
    _conclusion("5 layers, no dropout", 5, None, 0.9934, 0.02942, 0.9986),
    _conclusion("7 layers, dropout 0.0", 7, 0.0, 0.9810, 0.08438, None),
    _conclusion("7 layers, dropout 0.2", 7, 0.2, 0.9919, 0.05175, 0.9981),
)
SWEEP_3 = tuple(
    _sweep(
        3,
        train=(0.99913, 0.99910, 0.99882, 0.99883, 0.99878, 0.99910, 0.99915, 0.99865),
        test=(0.99410, 0.99360, 0.99400, 0.99290, 0.99330, 0.99320, 0.99340, 0.99340),
    )
)
SWEEP_7 = tuple(
    _sweep(
        7,
        train=(0.99800, 0.99852, 0.99865, 0.99782, 0.99820, 0.99792, 0.99817, 0.99783),
        test=(0.99200, 0.99160, 0.99290, 0.99240, 0.99130, 0.99090, 0.99080, 0.99270),
    )
)
RESULTS = (*CONCLUSION, *SWEEP_3, *SWEEP_7)

# In the sweep of depth 3 only Dense 128 is followed by dropout. Its conv_dropout is 0 here, which has the same effect.
_DEFINITION = f"""
name = "{NAME}"
description = "What the notebook measured: five conclusions, two sweeps of eight, at the rates that it ran with"
dataset = "mnist"
model = "convnet"

[data]
validation = "test"

[budget]
trials = {len(RESULTS)}
epochs = 20

[space]
depth = {{ choices = [3, 5, 7] }}
dropout_layers = {{ choices = [false, true] }}
conv_dropout = {{ low = 0.0, high = 0.7, when = {{ dropout_layers = true }} }}
dense_dropout = {{ low = 0.0, high = 0.7, when = {{ dropout_layers = true, depth = 3 }} }}

[fixed]
batch_size = 128
optimizer = "adam"
learning_rate = 1e-3
"""

# The images themselves are not part of the results, so there is no fingerprint.
DATA = {"fingerprint": "unknown", "train": 60_000, "test": 10_000, "image_shape": [28, 28, 1], "classes": 10}


def definition() -> Definition:
    """The definition of the study that holds the notebook's results."""
    return definitions.parse(_DEFINITION, source=NAME)


def create(storage: RDBStorage) -> bool:
    """Creates the study ``notebook`` with its 21 results and nothing left to run; returns False if it exists.

    Raises StudyError if another study has that name.
    """
    own_definition = definition()
    if NAME in registry.names(storage):
        different = definitions.differences(registry.definition_of(NAME, storage), own_definition)
        if different:
            raise StudyError(
                f"another study is named {NAME!r} already, with a different definition ({'; '.join(different)}): "
                "import them into another database with --storage"
            )
    rows = [imported.trial_of(_row(result), own_definition, result.label) for result in RESULTS]
    return registry.create(own_definition, storage, DATA, rows).changed


def _row(result: Result) -> dict[str, Any]:
    layers = result.conv_dropout is not None or result.dense_dropout is not None
    return {
        "depth": result.depth,
        "dropout_layers": layers,
        "conv_dropout": result.conv_dropout or 0.0 if layers else None,
        "dense_dropout": result.dense_dropout if result.depth == 3 else None,
        "accuracy": result.accuracy,
        "loss": result.loss,
        "train_accuracy": result.train_accuracy,
        "label": result.label,
        "source": f"the notebook, {result.source}, {result.measured}",
    }


def reference_results(study: Definition) -> list[tuple[Mapping[str, Any], Result]]:
    """The notebook's results that `study` repeats, each with its hyperparameters in this study.

    Empty, unless the study searches the same as one of the notebook's definitions in the catalog. In a labelled sweep
    the rates are those of the labels, ten times those that the notebook ran with.
    """
    ready_definitions = definitions.catalog()
    for name, results in _RESULTS_BY_STUDY.items():
        if _comparable(study, ready_definitions[name]):
            return [(_point(name, result), result) for result in results]
    return []


@dataclass(frozen=True, kw_only=True)
class Replay:
    """A study that repeats results of the notebook, at the rates that the notebook ran with."""

    definition: Definition
    trials: tuple[tuple[Result, FrozenTrial], ...]  # complete trials, each with the result that it repeats


def replays(study: Definition, storage: RDBStorage) -> list[Replay]:
    """The studies in the database that repeat the notebook's results; empty unless `study` holds those results."""
    replaying: list[Replay] = []
    for other in ledger.studies(storage) if is_own(study) else ():
        definition = definitions.from_json(other.definition)
        rows = reference_results(definition)
        if rows and not _labelled(rows):
            complete = storage.get_all_trials(other.id, deepcopy=False, states=(TrialState.COMPLETE,))
            scored = [trial for trial in complete if is_scored(trial)]
            pairs = [(result, trial) for trial in scored for point, result in rows if trial.params == point]
            replaying += [Replay(definition=definition, trials=tuple(pairs))] if pairs else []
    return replaying


def is_own(study: Definition) -> bool:
    """Whether `study` has the notebook's own results."""
    return study.name == NAME and _comparable(study, definition())


def _labelled(rows: list[tuple[Mapping[str, Any], Result]]) -> bool:
    """Whether the rows have the rates of the labels, not those that the notebook ran with."""
    point, result = rows[-1]
    return result.source != "conclusion" and max(point.values()) > 0.5


def caution(study: Definition) -> list[str]:
    """What a reader must know about the notebook's labels and epochs, if the study repeats or has its results."""
    mislabelled = "The notebook labelled its sweeps 0.0 to 0.7, but ran them with a tenth of that, 0.00 to 0.07"
    if is_own(study):
        runs = ", ".join(f"`trialyard run {name}`" for name in _RESULTS_BY_STUDY if not name.endswith("-labelled"))
        return [
            f"{mislabelled}: this study has the rates that they ran with.",
            f"Each result was measured once, by the notebook. {runs} repeat them; then a figure here shows both.",
            "The conclusions are accuracies after the last epoch, the sweeps those of the best of 20 epochs: do not "
            "compare them with each other.",
        ]
    rows = reference_results(study)
    if not rows:
        return []
    if rows[0][1].source == "conclusion":
        return [
            "The notebook's conclusions are accuracies after the last epoch. This study's are those of the best epoch, "
            "which are higher: the notebook's depth 7 at rate 0.0 has 0.9810 in the former and 0.9920 in its sweep."
        ]
    if _labelled(rows):
        return [f"{mislabelled}: this study searches the labelled rates, which the notebook never ran."]
    return [f"{mislabelled}: this study repeats the sweep as it ran."]


_RESULTS_BY_STUDY: Mapping[str, tuple[Result, ...]] = {
    "notebook-conclusion": CONCLUSION,
    "notebook-dropout-3": SWEEP_3,
    "notebook-dropout-3-labelled": SWEEP_3,
    "notebook-dropout-7": SWEEP_7,
    "notebook-dropout-7-labelled": SWEEP_7,
}


def _comparable(first: Definition, second: Definition) -> bool:
    # Epochs and number of images may differ: the figure's title says so.
    def question(definition: Definition) -> Any:
        stored = definition.to_json()
        return [stored["dataset"], stored["model"], stored["data"]["validation"], stored["space"], stored["fixed"]]

    return bool(question(first) == question(second))


def _point(name: str, result: Result) -> dict[str, Any]:
    if name == "notebook-conclusion":
        layers = result.conv_dropout is not None
        dropout = {"dropout": result.conv_dropout} if layers else {}
        return {"depth": result.depth, "dropout_layers": layers, **dropout}
    key = "dense_dropout" if result.depth == 3 else "conv_dropout"
    rate = result.dense_dropout if result.depth == 3 else result.conv_dropout
    assert rate is not None
    return {key: round(rate * 10, 1) if name.endswith("-labelled") else rate}
