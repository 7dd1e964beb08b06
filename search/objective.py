"""One trial: suggest -> train -> report / prune -> value. All that a trial writes to the database is written here."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import TrialState

from search.errors import DeviceError, MachineError
from search.messages import Epoch, Failed, Job, Resumed, Trained
from search.progress import Watcher
from search.trainer import START_SECONDS, Trainer, TrainerDied
from storage import artifacts, claims, retention
from storage.claims import Beating, Claim
from storage.errors import ClaimLost, StorageError, StudyGone, TrialyardError
from storage.ledger import State
from storage.settings import Settings
from studies import sampling
from studies.definition import Definition
from studies.space import Point, suggest

log = logging.getLogger(__name__)

# Faults of the machine: as failures of trials they would cost the study one trial after the other.
_MACHINE: dict[str, type[TrialyardError]] = {
    "disk": StorageError,
    "device": DeviceError,
    "import": MachineError,
    "load": MachineError,
}
POLL_SECONDS = 0.2  # how soon a stop or a lost claim is noticed between epochs


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study as a worker uses it."""

    name: str
    study_id: int
    incarnation: str | None = None  # differs from that of a later study with the same name and id
    definition: Definition
    storage: RDBStorage
    cached: BaseStorage  # the same storage with Optuna's cache of finished trials, for samplers and pruners

    def opened(self, number: int) -> optuna.Study:
        """Optuna's study for trial `number`. One for each trial, because it caches what it has read of others."""
        study = optuna.load_study(
            study_name=self.name,
            storage=self.cached,
            sampler=sampling.sampler(self.definition, number),
            pruner=sampling.pruner(self.definition),
        )
        # The cache must have read a trial before its parameters can be set.
        study.get_trials(deepcopy=False)
        return study


@dataclass(frozen=True, kw_only=True)
class _End:
    """How the trainer's job ended, without an error."""

    trained: Trained | None  # None if it had to be killed
    pruned: bool
    last_value: float | None  # validation accuracy of the last reported epoch
    why: str  # why it was stopped, if it was


def run(study: Study, claim: Claim, trainer: Trainer, settings: Settings, watcher: Watcher, interrupted: Event) -> None:
    """Runs the claimed trial to its end and records it.

    The trial ends complete, pruned or failed; or goes back to the queue when `interrupted` is set, the study is paused
    or stopped, or its trainer dies. Where the claim is lost meanwhile, or the study deleted, nothing more is written.
    Raises StorageError or DeviceError where this machine can train nothing, and MachineError where it cannot train this
    study; the trial is back in the queue then, and the attempt does not count as a crash.
    """
    try:
        try:
            with Beating(study.storage, claim, settings.beat_seconds) as beating:
                end = _train(study, claim, trainer, settings, watcher, beating, interrupted)
        except TrainerDied as died:
            _record_crash(study, claim, settings, died)
        else:
            _record_end(study, claim, trainer, settings, end)
    except ClaimLost as lost:
        log.warning("%s", lost)
        trainer.kill()  # somebody else trains this trial now
    except (KeyError, StudyGone) as error:  # Optuna raises KeyError for a missing row
        if claims.trial_exists(study.storage, claim):
            raise
        log.debug("the study was deleted", exc_info=error)
        trainer.kill()
    except MachineError:
        trainer.kill()  # only a new process sees a repaired installation: imported modules stay as they are
        _notify_end(study, claim, watcher)
        raise
    _notify_end(study, claim, watcher)


def _record_end(study: Study, claim: Claim, trainer: Trainer, settings: Settings, end: "_End | Failed") -> None:
    """The end of a job, however it ended. Raises ClaimLost; StorageError, DeviceError and MachineError as `run`."""
    storage = study.storage
    if isinstance(end, Failed) and end.kind in _MACHINE:
        claims.requeue(storage, claim, "interrupted", end.message, _files(settings, claim))
        raise _MACHINE[end.kind](end.message)
    if isinstance(end, Failed):
        claims.finish(storage, claim, TrialState.FAIL, None, {"failure": asdict(end)})
    elif end.pruned and (end.trained is None or end.trained.stopped):  # else it had ended before the stop arrived
        attributes = _attributes(study, claim, trainer, end.trained)
        claims.finish(storage, claim, TrialState.PRUNED, end.last_value, attributes, _files_left(end.trained))
    elif end.trained is not None and not end.trained.stopped:
        attributes = _attributes(study, claim, trainer, end.trained)
        claims.finish(storage, claim, TrialState.COMPLETE, end.trained.value, attributes, _files_left(end.trained))
        with _ignore_leftover_file(claim):
            retention.trim(storage, claim, settings.artifact_folder, settings.keep_models)
    else:
        claims.requeue(storage, claim, "interrupted", end.why, _files(settings, claim))
        return
    # Only now: if the database had stayed away, the trial would have resumed from it.
    _remove_checkpoint(settings, claim)


def _record_crash(study: Study, claim: Claim, settings: Settings, died: TrainerDied) -> None:
    """The end of a trainer in mid-job. Raises ClaimLost, and MachineError where it never began the job."""
    if not died.ready:
        claims.requeue(study.storage, claim, "interrupted", str(died), _files(settings, claim))
        raise MachineError(f"{died}: repair Keras or its backend")
    log.warning("study %s: trial %d: %s", claim.study, claim.number, died)
    if died.out_of_memory:  # it would happen again
        failure = {"kind": "memory", "message": str(died)}
        claims.finish(study.storage, claim, TrialState.FAIL, None, {"failure": failure})
        _remove_checkpoint(settings, claim)
    else:
        claims.requeue(study.storage, claim, "crashed", str(died), _files(settings, claim))


def _remove_checkpoint(settings: Settings, claim: Claim) -> None:
    with _ignore_leftover_file(claim):
        artifacts.remove(_folder(settings, claim) / artifacts.CHECKPOINT)


@contextmanager
def _ignore_leftover_file(claim: Claim) -> Iterator[None]:
    """A file that cannot be removed only takes disk space until `storage prune` removes it: no reason to stop."""
    try:
        yield
    except OSError as error:
        log.warning("study %s: a file of trial %d stays: %s", claim.study, claim.number, error)


def _notify_end(study: Study, claim: Claim, watcher: Watcher) -> None:
    try:
        trial = study.storage.get_trial(claim.trial_id)
    except KeyError:
        watcher.gone(claim)
    else:
        watcher.ended(claim, trial)


def _train(
    study: Study,
    claim: Claim,
    trainer: Trainer,
    settings: Settings,
    watcher: Watcher,
    beating: Beating,
    interrupted: Event,
) -> _End | Failed:
    definition = study.definition
    opened = study.opened(claim.number)
    try:
        point: Point = suggest(optuna.Trial(opened, claim.trial_id), definition.space)
    except (ValueError, RuntimeError, ArithmeticError) as error:
        return Failed(kind="sampler", message=f"{type(error).__name__}: {error}")
    watcher.began(claim, point, definition.budget.epochs)
    job = Job(
        definition=definition,
        hyperparameters={**definition.fixed, **point},
        seed=_seed(study, claim),
        slot=trainer.slot,
        data_folders=settings.data_folders,
        folder=_folder(settings, claim),
        checkpoint_seconds=settings.checkpoint_seconds,
        attempt=claim.attempt,
    )
    trainer.submit(job)
    try:
        return _follow(study, opened, claim, trainer, settings, watcher, beating, interrupted)
    except TrainerDied as died:
        if died.ready:
            raise
        log.info("study %s: trial %d begins once more in a new process: %s", claim.study, claim.number, died)
    trainer.submit(job)
    return _follow(study, opened, claim, trainer, settings, watcher, beating, interrupted)


def _folder(settings: Settings, claim: Claim) -> Path:
    return artifacts.folder(settings.artifact_folder, claim.study, claim.number)


def _files_left(trained: Trained | None) -> list[str]:
    """The names of the files that a finished trial keeps."""
    if trained is None:
        return []
    return [artifacts.HISTORY] if trained.stopped else [artifacts.MODEL, artifacts.HISTORY]


def _files(settings: Settings, claim: Claim) -> list[str]:
    """The names of the trial's existing files, of those that the dashboard offers."""
    folder = _folder(settings, claim)
    return [name for name in artifacts.DOWNLOADABLE if (folder / name).is_file()]


def _follow(
    study: Study,
    opened: optuna.Study,
    claim: Claim,
    trainer: Trainer,
    settings: Settings,
    watcher: Watcher,
    beating: Beating,
    interrupted: Event,
) -> _End | Failed:
    """Handles the trainer's messages until its job ends. Raises TrainerDied and ClaimLost."""
    budget = study.definition.budget
    start_by = time.monotonic() + START_SECONDS
    kill_at = float("inf")  # set when Keras is imported: how long that takes is not the trial's fault
    stop_by = float("inf")  # when a trainer that was asked to stop is killed
    pruned, why, last = False, "", None
    listed: list[str] = []
    while True:
        message = trainer.receive(POLL_SECONDS)
        if beating.lost:
            raise ClaimLost(f"study {claim.study}: trial {claim.number} was lost while it trained")
        wanted: State = beating.wanted
        if isinstance(message, Failed):
            return message
        if isinstance(message, Trained):
            return _End(trained=message, pruned=pruned, last_value=last, why=why)
        if isinstance(message, Resumed):
            values = {epoch.epoch: epoch.val_accuracy for epoch in message.history}
            listed = _files(settings, claim)
            wanted = claims.resume(study.storage, claim, values, max(values), listed)
            last = values[max(values)]
            watcher.epoch(claim, message.history[-1])
        if isinstance(message, Epoch):
            # The trainer writes a checkpoint after it has sent an epoch, so the next epoch lists it.
            there = _files(settings, claim)
            news, listed = (None if there == listed else there), there
            wanted = claims.report(study.storage, claim, message.epoch, message.val_accuracy, news)
            last = message.val_accuracy
            watcher.epoch(claim, message)
            # After its last epoch a trial is complete: pruning would save nothing.
            if not pruned and message.epoch < budget.epochs and _should_prune(study, opened, claim, message.epoch):
                pruned, stop_by = True, time.monotonic() + settings.stop_seconds
                trainer.stop("drop")
        now = time.monotonic()
        if budget.trial_minutes and kill_at == float("inf") and trainer.ready:
            kill_at = now + budget.trial_minutes * 60
        if now > start_by and not trainer.ready:
            raise trainer.hung()
        if stop_by == float("inf") and (interrupted.is_set() or wanted != "open"):
            why = "the worker was told to stop" if interrupted.is_set() else f"the study was {wanted}"
            stop_by = now + settings.stop_seconds
            trainer.stop("keep")
        if now > kill_at:
            trainer.kill()
            return Failed(kind="timeout", message=f"it ran longer than budget.trial_minutes = {budget.trial_minutes:g}")
        if now > stop_by:
            log.warning("the trainer did not stop within %.0f s and was killed", settings.stop_seconds)
            trainer.kill()
            return _End(trained=None, pruned=pruned, last_value=last, why=why)


def _should_prune(study: Study, opened: optuna.Study, claim: Claim, epoch: int) -> bool:
    trial = study.storage.get_trial(claim.trial_id)
    # A trial that starts over still has values of later epochs, from its last attempt.
    trial.intermediate_values = {step: value for step, value in trial.intermediate_values.items() if step <= epoch}
    try:
        return opened.pruner.prune(opened, trial)
    except UpdateFinishedTrialError as error:  # some pruners store state in the trial
        raise ClaimLost(f"study {claim.study}: trial {claim.number} was ended by somebody else meanwhile") from error


def _seed(study: Study, claim: Claim) -> int:
    return sampling.seed_of(study.definition, claim.number, purpose=1)


def _attributes(study: Study, claim: Claim, trainer: Trainer, trained: Trained | None) -> dict[str, Any]:
    """The user attributes of a finished trial; paths are relative to the artifacts folder."""
    if trained is None:
        return {}
    files = artifacts.folder(Path(), claim.study, claim.number)
    return {
        "parameters": trained.parameters,
        "epochs": trained.epochs,
        "best_epoch": trained.best_epoch,
        "seconds": round(trained.seconds, 3),
        "images_per_second": round(trained.images_per_second, 1),
        "device": trainer.slot.device.name,
        "slot": trainer.slot.name,
        "precision": trained.precision,
        "precision_reason": trained.precision_reason,
        "versions": trained.versions,
        "data_fingerprint": trained.data_fingerprint,
        "protocol": "test" if study.definition.data.validation == "test" else "validation",
        "seed": _seed(study, claim),
        "history": str(files / artifacts.HISTORY),
        **({} if trained.stopped else {"model": str(files / artifacts.MODEL)}),
    }
