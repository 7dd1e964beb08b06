"""One attempt at one trial: suggest -> train -> record or prune -> outcome.

All that a trial writes to the database is written here, through `storage.claims`.
"""

import copy
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from statistics import stdev
from threading import Event
from typing import Any, Literal

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState

from search.deadlines import Deadlines
from search.errors import AcceleratorError, DeviceError, MachineError
from search.heartbeat import Pulse
from search.messages import Batches, Epoch, Failed, Job, Message, Repeated, Resumed, Trained
from search.progress import Listener
from search.proposal import SamplerFailed, SpaceExhausted, hyperparameters_of, is_of_the_database
from search.stall import Stall
from search.trainer import Trainer, TrainerDied
from storage import artifacts, attempt_files, claims, faults, ledger, ranking, retention
from storage.claims import Claim
from storage.errors import ClaimLost, DiskError, ObjectStoreAway, ObjectStoreError, StudyGone
from storage.faults import Fault
from storage.settings import Settings
from storage.transactions import PatientStorage
from storage.trial_cache import TrialCache
from studies import pictures, recipe, sampling
from studies.definition import Definition
from studies.lessons import WithEpochs, WithLessons
from studies.predictions import class_names

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2  # how soon a stop or a lost claim is noticed between epochs


@dataclass(frozen=True, kw_only=True)
class StudyHandle:
    """A study as a worker uses it."""

    study: ledger.Study
    definition: Definition
    storage: PatientStorage
    cached: TrialCache  # of the same storage, for samplers and pruners
    sources: Mapping[str, str] = field(default_factory=dict)  # see `studies.registry.sources`
    precision: str | None = None  # Keras's dtype policy that the study began with

    def opened(self, claim: Claim) -> optuna.Study:
        """Optuna's study for a claimed trial. One for each trial, because it caches what it has read of others."""
        study = optuna.load_study(
            study_name=self.study.name,
            storage=WithLessons(self.cached, self.definition.sampler.kind),  # type: ignore[arg-type]
            sampler=sampling.sampler(self.definition, claim.number),
            pruner=sampling.pruner(self.definition),
        )
        self.cached.has_begun(claim.study_id, claim.trial_id)
        return study


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How an attempt ended. The first three kinds end the trial for good; after the others it waits again."""

    kind: Literal["complete", "pruned", "failed", "interrupted", "crashed"]
    trained: Trained | None = None  # None if the trainer failed, died or was killed
    value: float | None = None  # validation accuracy: of the best epoch; of the last one if it was pruned
    failure: Failed | None = None  # what went wrong, if anything did
    reason: str = ""  # why it was interrupted, or crashed

    @property
    def fault(self) -> Fault | None:
        """Whose fault it was, and what follows; None if nothing went wrong."""
        return None if self.failure is None else faults.of(self.failure.kind)


class Attempt:
    """One attempt at one trial, from its claim to its recorded end."""

    def __init__(
        self,
        handle: StudyHandle,
        claim: Claim,
        trainer: Trainer,
        settings: Settings,
        *,
        pulse: Pulse,
        listeners: Sequence[Listener],
        interrupted: Event,
    ) -> None:
        self.handle, self.claim, self.trainer, self.settings = handle, claim, trainer, settings
        self._pulse, self._listeners, self._interrupted = pulse, listeners, interrupted
        self._files = attempt_files.of_attempt(settings.artifact_store, claim, settings.patience_seconds)
        self._leave_by = float("inf")  # set when the worker is asked to stop
        self._is_pruned = False  # the pruner has decided, which it does once, and the training is asked to stop
        self._last: float | None = None  # the value of the last step
        self._epoch: Epoch | None = None  # the last one
        self._whole: list[float] = []  # the values of the repeats that have ended
        self._listed: list[str] = []  # the files that the database has

    def run(self) -> None:
        """Runs the claimed trial to its end and records it.

        The trial ends complete, pruned or failed; or goes back to the queue when `interrupted` is set, the study is
        paused or stopped, or its trainer dies. If the claim is lost meanwhile, or the study deleted, nothing more is
        written. Raises DiskError or DeviceError if this slot can train nothing now, and MachineError if this machine
        cannot train this study; the trial is back in the queue then.
        """
        failure: Failed | None = None
        try:
            self._opened = self.handle.opened(self.claim)
            with self._files:
                outcome = self._record(self._train())
            failure = outcome.failure
            if outcome.fault is not None and outcome.fault.process != "kept":
                self.trainer.kill()
        except ClaimLost as lost:
            log.warning("%s", lost)
            self.trainer.kill()  # somebody else trains this trial now
        except (KeyError, StudyGone) as error:  # Optuna raises KeyError for a missing row
            if claims.trial_exists(self.handle.storage, self.claim):
                raise
            log.debug("the study was deleted", exc_info=error)
            self.trainer.kill()
        self._notify_end()
        if failure is not None:
            _raise_for_machine(failure)

    # --- train ------------------------------------------------------------------------------------------------

    def _train(self) -> Outcome:
        definition = self.handle.definition
        try:
            point = hyperparameters_of(definition, self.handle.storage, self._opened, self.claim)
        except SpaceExhausted as exhausted:
            others = ledger.counts(self.handle.storage, self.claim.study_id)
            if others.running <= 1 and others.waiting == 0:  # stopping would take other slots' trials from them
                ledger.set_state(self.handle.storage, self.handle.study, "stopped")
            return _failed(Failed(kind="exhausted", message=str(exhausted)))
        except SamplerFailed as failed:
            # A package that this machine cannot import says nothing of the trial.
            kind = "import" if isinstance(failed.__cause__, ImportError) else "sampler"
            return _failed(Failed(kind=kind, message=str(failed)))
        # Samplers keep away from the points of trials that run: now this one has its own.
        self.handle.cached.has_begun(self.claim.study_id, self.claim.trial_id)
        self._recipe = recipe.of_trial(definition, self.claim.number, point)
        for listener in self._listeners:
            listener.began(self.claim, point, self._recipe.epochs * self._recipe.repeats)
        try:
            checkpoints = self._files.checkpoints(self._look_before_training)
        except (ObjectStoreError, DiskError) as error:
            return self._without_files(error)
        job = Job(
            definition=definition,
            recipe=self._recipe,
            slot=self.trainer.slot,
            data_folders=self.settings.data_folders,
            folder=self._files.folder,
            checkpoints=checkpoints,
            study=self.claim.incarnation,
            trial=f"{self.claim.study} trial {self.claim.number} attempt {self.claim.attempt}",
            checkpoint_seconds=self.settings.checkpoint_seconds,
            sources=self.handle.sources,
            precision=self.handle.precision,
            data_fingerprint=self.handle.study.data.get("fingerprint"),
        )
        outcome = self._run_job(job)
        if not self._may_be_left_over(outcome):
            return outcome
        log.info("%s starts once more in a new process: %s", job.trial, outcome.reason)
        self.trainer.kill()
        own = self._files.folder / artifacts.CHECKPOINT
        return self._run_job(replace(job, checkpoints=(own, *job.checkpoints)))

    def _without_files(self, error: ObjectStoreError | DiskError) -> Outcome:
        """The end of an attempt whose files could not be copied."""
        if self._interrupted.is_set():
            return Outcome(kind="interrupted", reason="the worker was asked to stop while files were being copied")
        return _failed(Failed(kind="disk" if isinstance(error, DiskError) else "store", message=str(error)))

    def _look_up(self) -> None:
        """While files are copied: raises ClaimLost, and ObjectStoreAway if a worker that ends has waited enough."""
        if self._pulse.lost:
            raise claims.lost(self.claim)
        now = time.monotonic()
        if self._interrupted.is_set():
            self._leave_by = min(self._leave_by, now + self.settings.stop_seconds)
        if now > self._leave_by:
            raise ObjectStoreAway(f"{self.settings.artifacts} took too long, and the worker was asked to stop")

    def _look_before_training(self) -> None:
        if self._interrupted.is_set():
            raise ObjectStoreAway("the worker was asked to stop before anything was trained")
        self._look_up()

    def _run_job(self, job: Job) -> Outcome:
        try:
            self.trainer.submit(job)
            outcome = self._follow()
        except TrainerDied as died:
            outcome = self._outcome_of_death(died)
        except DiskError as error:  # of the trainer's log
            outcome = _failed(Failed(kind="disk", message=str(error)))
        if self._is_pruned and outcome.failure is not None:
            # Whatever happened to a training that was asked to stop: it must not go on later, past the pruner.
            log.warning("study %s: trial %d was pruned, and then: %s", *self._named, outcome.reason)
            self.trainer.kill()
            return Outcome(kind="pruned", value=self._last)
        return outcome

    @property
    def _named(self) -> tuple[str, int]:
        return self.claim.study, self.claim.number

    def _may_be_left_over(self, outcome: Outcome) -> bool:
        """Whether it failed in a process in which an earlier job, or a start that failed, may be the cause."""
        if outcome.failure is None or outcome.fault is None or outcome.fault.process != "fresh":
            return False
        return self.trainer.is_used or outcome.failure.kind == "start"

    def _follow(self) -> Outcome:
        """Handles the trainer's messages until its job ends. Raises TrainerDied and ClaimLost."""
        trainer, trial_minutes = self.trainer, self.handle.definition.budget.trial_minutes
        deadlines, stall = Deadlines(trial_minutes, self.settings.stop_seconds), Stall(self.settings.stall_seconds)
        reason = ""
        self._last, self._epoch, self._whole, self._listed = None, None, [], []  # this may be the second job
        while True:
            began = time.monotonic()
            message = trainer.receive(POLL_SECONDS)
            received = time.monotonic()
            stall.looked(received - began, message)
            if self._pulse.lost:
                raise claims.lost(self.claim)
            if isinstance(message, Failed):
                return _failed(message)
            if isinstance(message, Trained):
                return self._ended(message, reason)
            state, step = self._record_progress(message)
            if step is not None and not self._is_pruned and self._should_prune(step):
                self._is_pruned = True
                deadlines.stop()
                trainer.stop("drop")
            deadlines.looked(waited=received - began, handled=time.monotonic() - received)
            if trainer.ready:
                deadlines.trains()
            elif deadlines.start_is_over:
                raise trainer.hung_at_start()
            if stall.is_over:
                raise trainer.hung(f"was silent for {stall.limit:.0f} s in a training", ready=True)
            if not deadlines.is_stopping and (self._interrupted.is_set() or state != "open"):
                reason = "the worker was asked to stop" if self._interrupted.is_set() else f"the study was {state}"
                deadlines.stop()
                self._leave_by = deadlines.stop_by if self._interrupted.is_set() else self._leave_by
                trainer.stop("keep")
            if deadlines.training_is_over:
                trainer.kill()
                limit = f"budget.trial_minutes = {trial_minutes:g}"
                return _failed(Failed(kind="timeout", message=f"it ran longer than {limit}"))
            if deadlines.stop_is_over:
                log.warning("the trainer did not stop within %.0f s and was killed", self.settings.stop_seconds)
                trainer.kill()
                return self._ended(None, reason)

    def _record_progress(self, message: Message | None) -> tuple[ledger.State, int | None]:
        """Records what a running training says.

        Returns the study's state; and the step that has ended, an epoch or a repeat, if the pruner is to be asked:
        after its last step a trial is complete, and pruning would save nothing.
        """
        state, step = self._pulse.state, None
        has_repeats = self._recipe.repeats > 1
        if isinstance(message, Batches):
            self._notify_batches(message)
        if isinstance(message, Resumed):
            self._epoch = message.history[-1]
            values = {} if has_repeats else {epoch.epoch: epoch.val_accuracy for epoch in message.history}
            state = self._record_epochs(values, resumed_after=self._epoch.epoch)
            self._last = self._epoch.val_accuracy if values else self._last
            self._notify_epoch(self._epoch)
        if isinstance(message, Epoch):
            self._epoch = message
            # The trainer writes a checkpoint after it has sent an epoch, so the next epoch lists it.
            files = self._files.names()
            values = {} if has_repeats else {message.epoch: message.val_accuracy}
            state = self._record_epochs(values, files=None if files == self._listed else files)
            self._listed = files
            self._notify_epoch(message)
            if values:
                step, self._last = message.epoch, message.val_accuracy
        if isinstance(message, Repeated):
            self._whole.append(message.value)
            step, self._last = message.repeat, sum(self._whole) / len(self._whole)
            state = self._record_epochs({step: message.value})
        steps = self._recipe.repeats if has_repeats else self._recipe.epochs
        return state, step if step is not None and step < steps else None

    def _ended(self, trained: Trained | None, reason: str) -> Outcome:
        """The end of a job without an error; `trained` is None if it had to be killed."""
        if trained is not None and not trained.stopped:  # it may have ended before a stop arrived
            return Outcome(kind="complete", trained=trained, value=trained.value)
        if self._is_pruned:
            return Outcome(kind="pruned", trained=trained, value=self._last)
        return Outcome(kind="interrupted", trained=trained, reason=reason)

    def _record_epochs(self, values: dict[int, float], **more: Any) -> ledger.State:
        assert self._epoch is not None
        return claims.record_epochs(self.handle.storage, self.claim, values, epoch=self._epoch.epoch, **more)

    def _should_prune(self, step: int) -> bool:
        trial = self.handle.storage.get_trial(self.claim.trial_id)
        # What failed trials teach is for samplers: a pruner would count them among the complete ones.
        study = copy.copy(self._opened)
        study._storage = WithEpochs(self.handle.cached)  # type: ignore[assignment]
        try:
            return study.pruner.prune(study, trial)
        except UpdateFinishedTrialError as error:  # some pruners store state in the trial
            raise claims.ended_elsewhere(self.claim) from error
        except Exception as error:
            if is_of_the_database(error, self.handle.storage, self.claim):
                raise
            log.warning(
                "the pruner failed at %s trial %d after step %d, which goes on",
                *(*self._named, step),
                exc_info=error,
            )
            return False

    def _outcome_of_death(self, died: TrainerDied) -> Outcome:
        if not died.ready:
            return _failed(Failed(kind="start", message=f"{died}: repair Keras, its backend or the device"))
        log.warning("study %s: trial %d: %s", *self._named, died)
        return _failed(Failed(kind="memory" if died.out_of_memory else "crashed", message=str(died)))

    # --- record -----------------------------------------------------------------------------------------------

    def _record(self, outcome: Outcome) -> Outcome:
        """Records the end, and returns it: a trial whose files cannot be kept goes back. Raises ClaimLost."""
        storage, claim = self.handle.storage, self.claim
        trained, files = outcome.trained, list[str]()
        if outcome.kind not in ("interrupted", "crashed"):
            files = [*_files_left(trained), *self._draw(trained)]
            try:
                if files:
                    self._files.keep_all(self._look_up)
                else:
                    self._files.stop_copying(self._look_up)  # it would appear after its attempt was removed
            except (ObjectStoreError, DiskError) as error:
                if outcome.kind == "pruned":
                    log.warning("study %s: pruned trial %d has no files: %s", *self._named, error)
                    outcome, files = replace(outcome, trained=None), []
                else:
                    outcome = self._without_files(error)
        if outcome.kind in ("interrupted", "crashed"):
            kind: Literal["interrupted", "crashed"] = "crashed" if outcome.kind == "crashed" else "interrupted"
            kept = self._files.keep_checkpoint(self._look_up)
            claims.requeue(storage, claim, kind, outcome.reason, kept or None)
            return outcome
        state = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}[outcome.kind]
        hits = trained.hits if trained is not None and outcome.kind == "complete" else None
        claims.finish(storage, claim, state, outcome.value, self._attributes(outcome), files, hits)
        with _ignore_leftover_file(claim):
            # Only now: if the database had stayed away, the trial would have resumed from its checkpoint.
            self._files.ended()
            retention.remove_attempts(claim, self.settings.artifact_store)
            if outcome.kind == "complete":
                retention.trim(storage, claim, self.settings.artifact_store, self.settings.keep_models)
        return outcome

    def _attributes(self, outcome: Outcome) -> dict[str, Any]:
        """The user attributes of a finished trial; paths are relative to the artifacts folder."""
        if outcome.failure is not None:
            return {"failure": asdict(outcome.failure)}
        trained = outcome.trained
        if trained is None:
            return {}
        slot = self.trainer.slot
        return {
            "parameters": trained.parameters,
            "epochs": trained.epochs,
            "best_epoch": trained.best_epoch,
            **(_spread(trained.repeats) if self._recipe.repeats > 1 else {}),
            ranking.LOSS: trained.val_loss,
            "train_accuracy": round(trained.train_accuracy, 6),
            "seconds": round(trained.seconds, 3),
            "images_per_second": round(trained.images_per_second, 1),
            "device": slot.device.name,
            "slot": slot.name,
            "threads": slot.threads,
            "precision": trained.precision,
            "precision_reason": trained.precision_reason,
            "versions": trained.versions,
            "data_fingerprint": trained.data_fingerprint,
            "protocol": self.handle.definition.protocol,
            "seed": self._recipe.seed,
            "history": str(self.claim.folder / artifacts.HISTORY),
            **self._model_attributes(trained),
        }

    def _model_attributes(self, trained: Trained) -> dict[str, str]:
        if trained.stopped:
            return {}
        predictions = str(self.claim.folder / artifacts.PREDICTIONS)
        seen = {"predictions": predictions} if trained.has_predictions else {}
        if trained.unsaved is not None:
            return seen | {"model_unsaved": trained.unsaved}
        return seen | {"model": str(self.claim.folder / artifacts.MODEL)}

    def _draw(self, trained: Trained | None) -> list[str]:
        """Draws the pictures of the trial's page; returns their names."""
        if trained is None:
            return []
        try:
            return pictures.write(self._files.folder, class_names(self.handle.study.data))
        except Exception as error:
            # Whatever it is: a trial without pictures is still a result.
            log.warning("study %s: trial %d has no pictures", *self._named, exc_info=error)
            return []

    def _notify_batches(self, batches: Batches) -> None:
        for listener in self._listeners:
            listener.batches(self.claim, batches)

    def _notify_epoch(self, record: Epoch) -> None:
        for listener in self._listeners:
            listener.epoch(self.claim, record)

    def _notify_end(self) -> None:
        try:
            trial = self.handle.storage.get_trial(self.claim.trial_id)
        except KeyError:
            trial = None
        for listener in self._listeners:
            if trial is None:
                listener.deleted(self.claim)
            else:
                listener.ended(self.claim, trial)


def _spread(repeats: Sequence[float]) -> dict[str, Any]:
    """The value of each repeat, and their sample standard deviation."""
    return {"repeats": list(repeats)} | ({"deviation": round(stdev(repeats), 6)} if len(repeats) > 1 else {})


def _failed(failed: Failed) -> Outcome:
    fault = faults.of(failed.kind)
    if not fault.waits:
        return Outcome(kind="failed", failure=failed, reason=failed.message)
    kind: Literal["interrupted", "crashed"] = "interrupted" if fault.retries is None else "crashed"
    return Outcome(kind=kind, failure=failed, reason=failed.message)


def _raise_for_machine(failure: Failed) -> None:
    """Raises MachineError if this machine is to blame, and DiskError or DeviceError if it is one slot of it."""
    whose = faults.of(failure.kind).whose
    if whose == "machine":
        raise MachineError(failure.message)
    if whose == "slot":
        error_types: dict[str, type[DiskError | DeviceError]] = {"disk": DiskError, "accelerator": AcceleratorError}
        raise error_types.get(failure.kind, DeviceError)(failure.message)


def _files_left(trained: Trained | None) -> list[str]:
    """The names of the files that a finished trial keeps."""
    if trained is None:
        return []
    return [artifacts.HISTORY] if trained.stopped else [artifacts.MODEL, artifacts.HISTORY]


@contextmanager
def _ignore_leftover_file(claim: Claim) -> Iterator[None]:
    """A file that cannot be removed only takes disk space until `storage prune` removes it: no reason to stop."""
    try:
        yield
    except (OSError, ObjectStoreError) as error:
        log.warning("study %s: a file of trial %d stays: %s", claim.study, claim.number, error)
