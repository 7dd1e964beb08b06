"""One trial: suggest -> train -> report / prune -> value. All that it tells the database is told here."""

import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event
from typing import Any

import optuna
from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import TrialState

from search.display import Watcher
from search.records import Epoch, Trained
from search.trainer import STOP_SECONDS, Failed, Job, Trainer, TrainerDied
from storage import artifacts, claims
from storage.claims import Beating, Claim
from storage.errors import ClaimLost
from storage.settings import Settings
from studies import sampling
from studies.definition import Definition
from studies.space import Point, suggest

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2  # how soon a stop or a lost claim is noticed between epochs


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study as a worker holds it."""

    name: str
    study_id: int
    definition: Definition
    storage: RDBStorage
    cached: BaseStorage  # the same with Optuna's cache of finished trials, for samplers and pruners

    def opened(self, number: int) -> optuna.Study:
        """Optuna's object for trial `number`. One a trial: it keeps what it has read of the others."""
        study = optuna.load_study(
            study_name=self.name,
            storage=self.cached,
            sampler=sampling.sampler(self.definition, number),
            pruner=sampling.pruner(self.definition),
        )
        # The cache must have seen a trial before its parameters are set.
        study.get_trials(deepcopy=False)
        return study


@dataclass(frozen=True, kw_only=True)
class _End:
    """How the trainer's job ended, if not in an error."""

    trained: Trained | None  # None if it had to be killed
    pruned: bool
    last_value: float | None  # validation accuracy of the last reported epoch


def run(study: Study, claim: Claim, trainer: Trainer, settings: Settings, watcher: Watcher, interrupted: Event) -> None:
    """Runs the claimed trial to its end, whatever that is, and writes it down.

    The trial ends complete, pruned or failed; or goes back to the queue when `interrupted` is set, or its trainer
    dies. Where the claim is lost meanwhile, nothing more is written.
    """
    storage = study.storage
    try:
        with Beating(storage, claim, settings.beat_seconds) as beating:
            end = _train(study, claim, trainer, settings, watcher, beating, interrupted)
        if isinstance(end, Failed):
            claims.finish(storage, claim, TrialState.FAIL, None, {"failure": asdict(end)})
        elif end.pruned:
            claims.finish(
                storage, claim, TrialState.PRUNED, end.last_value, _attributes(study, claim, trainer, end.trained)
            )
        elif end.trained is not None and not end.trained.stopped:
            attributes = _attributes(study, claim, trainer, end.trained)
            claims.finish(storage, claim, TrialState.COMPLETE, end.trained.value, attributes)
        else:
            claims.requeue(storage, claim, "interrupted", "the worker was told to stop")
    except TrainerDied as died:
        log.warning("study %s: trial %d: %s", claim.study, claim.number, died)
        claims.requeue(storage, claim, "crashed", str(died))
    except ClaimLost as lost:
        log.warning("%s", lost)
        trainer.kill()  # somebody else trains this trial now
    watcher.ended(claim, storage.get_trial(claim.trial_id))


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
    trainer.submit(
        Job(
            definition=definition,
            hyperparameters={**definition.fixed, **point},
            seed=_seed(study, claim),
            device=trainer.device,
            data_folders=settings.data_folders,
            folder=artifacts.folder(settings.artifact_folder, claim.study, claim.number),
        )
    )
    return _follow(study, opened, claim, trainer, watcher, beating, interrupted)


def _follow(
    study: Study,
    opened: optuna.Study,
    claim: Claim,
    trainer: Trainer,
    watcher: Watcher,
    beating: Beating,
    interrupted: Event,
) -> _End | Failed:
    """Takes the trainer's records as they come, until its job ends. Raises TrainerDied and ClaimLost."""
    budget = study.definition.budget
    kill_at = time.monotonic() + budget.trial_minutes * 60 if budget.trial_minutes else float("inf")
    stop_by = float("inf")  # when a trainer that was told to stop is killed
    pruned, last = False, None
    while True:
        message = trainer.receive(POLL_SECONDS)
        if beating.lost:
            raise ClaimLost(f"study {claim.study}: trial {claim.number} was lost while it trained")
        if isinstance(message, Failed):
            return message
        if isinstance(message, Trained):
            return _End(trained=message, pruned=pruned, last_value=last)
        if isinstance(message, Epoch):
            claims.report(study.storage, claim, message.epoch, message.val_accuracy)
            last = message.val_accuracy
            watcher.epoch(claim, message)
            # After its last epoch a trial is complete, and a pruner has nothing to save.
            if not pruned and message.epoch < budget.epochs and _hopeless(study, opened, claim, message.epoch):
                pruned, stop_by = True, time.monotonic() + STOP_SECONDS
                trainer.stop()
        now = time.monotonic()
        if interrupted.is_set() and stop_by == float("inf"):
            stop_by = now + STOP_SECONDS
            trainer.stop()
        if now > kill_at:
            trainer.kill()
            return Failed(kind="timeout", message=f"it ran longer than budget.trial_minutes = {budget.trial_minutes:g}")
        if now > stop_by:
            log.warning("the trainer did not stop within %.0f s and was killed", STOP_SECONDS)
            trainer.kill()
            return _End(trained=None, pruned=pruned, last_value=last)


def _hopeless(study: Study, opened: optuna.Study, claim: Claim, epoch: int) -> bool:
    trial = study.storage.get_trial(claim.trial_id)
    # A trial that runs again from its first epoch still has later values of its last attempt.
    trial.intermediate_values = {step: value for step, value in trial.intermediate_values.items() if step <= epoch}
    return opened.pruner.prune(opened, trial)


def _seed(study: Study, claim: Claim) -> int:
    return sampling.seed_of(study.definition, claim.number, purpose=1)


def _attributes(study: Study, claim: Claim, trainer: Trainer, trained: Trained | None) -> dict[str, Any]:
    """What is recorded with a trial beside its value; paths are below the artifact folder."""
    if trained is None:
        return {}
    files = artifacts.folder(Path(), claim.study, claim.number)
    return {
        "parameters": trained.parameters,
        "epochs": trained.epochs,
        "best_epoch": trained.best_epoch,
        "seconds": round(trained.seconds, 3),
        "images_per_second": round(trained.images_per_second, 1),
        "device": trainer.device.name,
        "precision": trained.precision,
        "precision_reason": trained.precision_reason,
        "versions": trained.versions,
        "data_fingerprint": trained.data_fingerprint,
        "protocol": "test" if study.definition.data.validation == "test" else "validation",
        "seed": _seed(study, claim),
        "history": str(files / artifacts.HISTORY),
        **({} if trained.stopped else {"model": str(files / artifacts.MODEL)}),
    }
