"""Trains a finished trial again from its record, and compares the two epoch by epoch. Nothing is written."""

import math
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from search import checks
from search.devices import Slot
from search.errors import DataError, MachineError, ModelError
from search.messages import Epoch, Failed, Job, Trained, versions
from search.stall import Stall
from search.trainer import START_SECONDS, Trainer, TrainerDied
from storage import attributes
from storage.attempt_table import of_trial
from storage.ledger import Study
from storage.settings import Settings
from storage.transactions import read
from studies import definition as definitions
from studies import recipe, registry, results, statistics
from studies.definition import Definition, Precision
from studies.errors import StudyError, require_whole

TOLERANCE = 0.01  # besides the sampling error of both accuracies, where numbers cannot be the same
POLL_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class ReplayedEpoch:
    """One epoch of both trainings: the validation accuracies, and the training losses if they are known."""

    epoch: int
    recorded: float | None
    replayed: float
    recorded_loss: float | None
    replayed_loss: float

    @property
    def is_equal(self) -> bool:
        """Whether both trainings have the same numbers, to the last bit."""
        losses = self.recorded_loss is None or _same(self.recorded_loss, self.replayed_loss)
        return self.recorded is not None and _same(self.recorded, self.replayed) and losses


def _same(one: float, other: float) -> bool:
    # A user's own model may have an accuracy of NaN in an epoch, which is not equal to itself.
    return one == other or (math.isnan(one) and math.isnan(other))


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """A trial and its replay."""

    study: str
    trial: int
    differences: tuple[str, ...]  # between the recorded circumstances and these: software, device, precision
    attempts: int  # that the recorded training took
    epochs: tuple[ReplayedEpoch, ...]
    recorded_value: float
    replayed_value: float
    recorded_repeats: tuple[float, ...] = ()  # the values of the repeats; none if the trial was trained once
    replayed_repeats: tuple[float, ...] = ()
    tolerance: float  # how far the values may be apart; 0 where the numbers must be the same

    @property
    def is_exact(self) -> bool:
        """Whether every recorded epoch, every repeat and the value have the same numbers.

        Without its files the epochs of a trial with repeats are not recorded here: the database has its repeats alone.
        """
        repeats_are_equal = self.recorded_repeats == self.replayed_repeats
        return self.first_different is None and repeats_are_equal and self.recorded_value == self.replayed_value

    @property
    def first_different(self) -> int | None:
        """The first epoch that is recorded with other numbers; None if there is none."""
        return next((each.epoch for each in self.epochs if each.recorded is not None and not each.is_equal), None)

    @property
    def holds(self) -> bool:
        """Whether the replay confirms the record: exactly, or within the tolerance under other circumstances."""
        if self.tolerance == 0.0:
            return self.is_exact
        return abs(self.recorded_value - self.replayed_value) <= self.tolerance


def replay(
    study: Study,
    number: int,
    storage: RDBStorage,
    here: Settings,
    slot: Slot,
    on_difference: Callable[[str], None],
    on_epoch: Callable[[ReplayedEpoch], None],
) -> Replayed:
    """Trains trial `number` again. `on_difference` learns first what is not as it was, then `on_epoch` of each epoch.

    The numbers must be the same on the same kind of processor in float32 with the same software. On a GPU, in
    bfloat16, or elsewhere the values may be apart by TOLERANCE and the 95 % sampling error of their difference.

    Raises StudyError if the trial is not complete or was imported, or its images or files are others now; and
    DataError, ModelError or MachineError if it cannot be trained here.
    """
    trial = _complete_trial(study, number, storage)
    definition = definitions.from_json(study.definition)
    recorded = trial.user_attrs
    checked = checks.check(definition, here)
    registry.check_data(study, checked.data)
    registry.check_sources(study, checked.sources)
    precision = _precision(recorded)
    wanted = definition.model_copy(update={"precision": precision or definition.precision})
    slot = replace(slot, threads=int(attributes.number(recorded.get("threads")) or slot.threads))
    differences = _differences(recorded, slot)
    for difference in differences:
        on_difference(difference)
    history = results.history_of(trial, here.artifact_store)
    # With repeats, the database has no value of an epoch.
    in_database = {} if "repeats" in recorded else trial.intermediate_values
    epochs: list[ReplayedEpoch] = []

    def compare(epoch: Epoch) -> None:
        accuracy, loss = in_database.get(epoch.epoch), None
        if len(epochs) < len(history):
            record = history[len(epochs)]
            accuracy, loss = float(record["val_accuracy"]), float(record["loss"])
        both = ReplayedEpoch(
            epoch=epoch.epoch,
            recorded=accuracy,
            replayed=epoch.val_accuracy,
            recorded_loss=loss,
            replayed_loss=epoch.loss,
        )
        epochs.append(both)
        on_epoch(both)

    trained = _train(wanted, recipe.of_trial(definition, number, trial.params), slot, here, compare)
    exact = not differences and slot.device.kind == "cpu" and trained.precision == "float32"
    value = float(trial.values[0])
    repeats = tuple(attributes.numbers(recorded.get("repeats")))
    images = trained.hits.images if trained.hits is not None else study.data.get(definition.judged_on)
    return Replayed(
        study=study.name,
        trial=number,
        differences=differences,
        attempts=len(read(storage, lambda connection: of_trial(connection, trial._trial_id))),
        epochs=tuple(epochs),
        recorded_value=value,
        replayed_value=trained.value,
        recorded_repeats=repeats,
        replayed_repeats=trained.repeats if repeats else (),
        tolerance=0.0 if exact else _tolerance(value, images),
    )


def _complete_trial(study: Study, number: int, storage: RDBStorage) -> FrozenTrial:
    require_whole("trial", number)
    if number >= study.size:
        raise StudyError(results.no_trial_text(study, number))
    try:
        trial = storage.get_trial(storage.get_trial_id_from_study_id_trial_number(study.id, number))
    except KeyError:
        raise StudyError(results.no_trial_text(study, number)) from None
    name = f"trial {number} of study {study.name!r}"
    if trial.user_attrs.get("imported"):
        raise StudyError(f"{name} was imported: Trialyard did not train it, and cannot train it again")
    if trial.state != TrialState.COMPLETE:
        state = "failed" if trial.state == TrialState.FAIL else trial.state.name.lower()
        raise StudyError(f"{name} is {state}: only a complete trial can be trained again")
    if "seed" not in trial.user_attrs:
        raise StudyError(f"{name} has no seed: another program ran it, and Trialyard cannot train it again")
    return trial


def _precision(recorded: Mapping[str, Any]) -> Precision | None:
    known: dict[str, Precision] = {"float32": "float32", "mixed_bfloat16": "mixed_bfloat16"}
    return known.get(str(recorded.get("precision")))


def _differences(recorded: Mapping[str, Any], slot: Slot) -> tuple[str, ...]:
    """What is not as it was when the trial was trained, a sentence each."""
    found = []
    if recorded.get("device") != slot.device.name:
        found.append(f"it was trained on {recorded.get('device')}, and this is {slot.device.name}")
    if slot.device.kind == "cpu" and "threads" not in recorded:
        found.append("it is not recorded with how many threads it was trained, which decides the last digits")
    stored = recorded.get("versions")
    here = versions(checks.backend())
    for package, version in (stored if isinstance(stored, dict) else {}).items():
        if here.get(package) != version:
            found.append(f"it was trained with {package} {version}, and here is {here.get(package, 'none')}")
    return tuple(found)


def _tolerance(value: float, images: object) -> float:
    """`images` is how many both accuracies were measured on, as the database has it."""
    if not isinstance(images, int) or images < 1:
        return TOLERANCE
    return TOLERANCE + math.sqrt(2) * statistics.sampling_error(value, images)  # that of the difference of two


def _train(
    definition: Definition, wanted: recipe.Recipe, slot: Slot, here: Settings, on_epoch: Callable[[Epoch], None]
) -> Trained:
    with tempfile.TemporaryDirectory() as folder, Trainer(slot, Path(folder) / "log") as trainer:
        trainer.submit(
            Job(
                definition=definition,
                recipe=wanted,
                slot=slot,
                data_folders=here.data_folders,
                folder=Path(folder) / "trial",
            )
        )
        start_by = time.monotonic() + START_SECONDS
        stall = Stall(here.stall_seconds)
        while True:
            began = time.monotonic()
            try:
                message = trainer.receive(POLL_SECONDS)
            except TrainerDied as died:
                raise MachineError(f"the training ended too early: {died.how}") from None
            stall.looked(time.monotonic() - began, message)
            if isinstance(message, Epoch):
                on_epoch(message)
            elif isinstance(message, Trained):
                return message
            elif isinstance(message, Failed):
                kinds = {"model": ModelError, "load": DataError, "data": DataError}
                raise kinds.get(message.kind, MachineError)(message.message)
            if time.monotonic() > start_by and not trainer.ready:
                raise MachineError(f"{trainer.hung_at_start().how}: repair Keras or its backend")
            if stall.is_over:
                hung = trainer.hung(f"was silent for {stall.limit:.0f} s in a training", ready=True)
                raise MachineError(f"{hung.how}: see what hangs, or allow more with TRIALYARD_STALL_SECONDS")
