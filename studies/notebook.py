"""The notebook's measured results, as data: to compare studies with, and to import as a study.

The dropout rates are those that the notebook ran with. The labels of its sweeps say ten times as much (0.7 for 0.07).
All accuracies are those of one run of 20 epochs on the 10,000 test images of MNIST, by which the notebook also chose.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from storage.ranking import is_scored
from studies import definition as definitions
from studies import imported, registry
from studies.definition import Definition
from studies.errors import StudyError

NAME = "notebook"


@dataclass(frozen=True, kw_only=True)
class Result:
    """One row of the notebook's tables."""

    source: str  # the table: "conclusion", "sweep of depth 3" or "sweep of depth 7"
    label: str  # as the notebook printed it
    depth: int
    conv_dropout: float | None  # rate of the layers after convolutions; None without such a layer
    dense_dropout: float | None  # rate of the layer after Dense 128
    accuracy: float  # on the test images


# In the sweep of depth 3 only Dense 128 is followed by dropout. Its conv_dropout is 0 here, which has the same effect.
_FOLDER = Path(__file__).parent / "reference"
_ROWS = imported.read_csv(_FOLDER / "notebook.csv")


def _result(row: Mapping[str, Any]) -> Result:
    def rate(name: str) -> float | None:
        return float(row[name]) if row[name] else None

    _, source, _ = row["source"].split(", ")
    return Result(
        source=source,
        label=row["label"],
        depth=int(row["depth"]),
        conv_dropout=rate("conv_dropout"),
        dense_dropout=rate("dense_dropout"),
        accuracy=float(row["accuracy"]),
    )


RESULTS = tuple(_result(row) for _, row in _ROWS)
CONCLUSION, SWEEP_3, SWEEP_7 = (
    tuple(result for result in RESULTS if result.source == source)
    for source in ("conclusion", "sweep of depth 3", "sweep of depth 7")
)

# The images themselves are not part of the results, so there is no fingerprint.
DATA = {"fingerprint": "unknown", "train": 60_000, "test": 10_000, "image_shape": [28, 28, 1], "classes": 10}


def definition() -> Definition:
    """The definition of the study that holds the notebook's results."""
    return definitions.load(str(_FOLDER / "notebook.toml"))


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
    rows = [imported.trial_of(row, own_definition, line) for line, row in _ROWS]
    return registry.create(own_definition, storage, DATA, rows).changed


def reference_results(study: Definition) -> list[tuple[Mapping[str, Any], Result]]:
    """The notebook's results that `study` repeats, each with its hyperparameters in this study.

    Empty, unless the study searches the same as one of the notebook's definitions in the catalog, and trains each
    configuration once, as the notebook did. In a labelled sweep the rates are those of the labels, ten times those that
    the notebook ran with.
    """
    if study.budget.repeats > 1:
        return []
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
    for other, definition in registry.with_definitions(storage) if is_own(study) else ():
        rows = reference_results(definition)
        if rows and not is_labelled(rows):
            complete = storage.get_all_trials(other.id, deepcopy=False, states=(TrialState.COMPLETE,))
            own = trained(complete)
            pairs = [(result, trial) for trial in own for point, result in rows if trial.params == point]
            replaying += [Replay(definition=definition, trials=tuple(pairs))] if pairs else []
    return replaying


def is_own(study: Definition) -> bool:
    """Whether `study` has the notebook's own results."""
    return study.name == NAME and _comparable(study, definition())


def trained(complete: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Those of the `complete` trials that were trained here: an imported one does not say at which epoch."""
    return [trial for trial in complete if is_scored(trial) and not trial.user_attrs.get("imported")]


def measured(result: Result, trial: FrozenTrial) -> float:
    """The accuracy of `trial` as the notebook measured `result`: its conclusions after the last epoch, its sweeps at
    the best one.
    """
    if result.source == "conclusion" and trial.intermediate_values:
        return float(trial.intermediate_values[max(trial.intermediate_values)])
    return float(trial.values[0])


def is_labelled(rows: list[tuple[Mapping[str, Any], Result]]) -> bool:
    """Whether the rows have the rates of the labels, not those that the notebook ran with."""
    point, result = rows[-1]
    return result.source != "conclusion" and max(point.values()) > 0.5


def caution(study: Definition) -> list[str]:
    """What a reader must know about the notebook's labels and epochs, if the study repeats or has its results."""
    mislabelled = "The notebook labelled its sweeps 0.0 to 0.7, but ran them with a tenth of that, 0.00 to 0.07"
    if is_own(study):
        runs = ", ".join(f"`trialyard run {name}`" for name in AS_RUN)
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
            "The notebook's conclusions are accuracies after the last epoch, and this study's trials have those of the "
            f"best epoch, which are higher. `trialyard compare {study.name}` compares both after the last epoch."
        ]
    if is_labelled(rows):
        return [f"{mislabelled}: this study searches the labelled rates, which the notebook never ran."]
    return [f"{mislabelled}: this study repeats the sweep as it ran."]


_RESULTS_BY_STUDY: Mapping[str, tuple[Result, ...]] = {
    "notebook-conclusion": CONCLUSION,
    "notebook-dropout-3": SWEEP_3,
    "notebook-dropout-3-labelled": SWEEP_3,
    "notebook-dropout-7": SWEEP_7,
    "notebook-dropout-7-labelled": SWEEP_7,
}


AS_RUN = tuple(name for name in _RESULTS_BY_STUDY if not name.endswith("-labelled"))


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
