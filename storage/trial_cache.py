"""Optuna's cache of finished trials, for samplers and pruners, without the trials that wait.

Optuna reads every unfinished trial again at each look, which is once an epoch where there is a pruner. Those of a grid
wait as rows: with 10,000 of them a look took five seconds. No sampler or pruner of ours asks for waiting trials. And
where hundreds run, each of their workers would read all of them at each epoch of each of its own.
"""

from time import monotonic
from typing import Any

from optuna.storages import RDBStorage
from optuna.trial import TrialState
from sqlalchemy import select

from storage.tables import CachedStorage, StudyInfo, TrialModel
from storage.transactions import read

NOT_WAITING = tuple(state for state in TrialState if state != TrialState.WAITING)
FINISHED = tuple(state for state in TrialState if state.is_finished())
# Up to so many trials that run are read at each look. More are read again after so many seconds for each of them: to
# read one takes 0.2 to 0.5 ms, so a process does that for two hundredths of its time at most.
FEW = 30
SECONDS_EACH = 0.02


class TrialCache(CachedStorage):
    """As Optuna's own. A trial that waits is not among the trials; `get_trial` gives it.

    A trial that has ended is always seen as such. The values of trials that run, and which ones run, may be some
    seconds old where more than FEW do.
    """

    def __init__(self, backend: RDBStorage) -> None:
        super().__init__(backend)
        self._again: dict[int, float] = {}  # by study, when trials that run are to be read again

    def has_begun(self, study_id: int, trial_id: int) -> None:
        """This trial was claimed just now: the next look has it, as it is then. Raises KeyError if it is gone."""
        trial = self._backend.get_trial(trial_id)
        with self._lock:
            study = self._studies.setdefault(study_id, StudyInfo())
            self._add_trials_to_cache(study_id, [trial])
            study.unfinished_trial_ids.add(trial_id)

    def _read_trials_from_remote_storage(self, study_id: int) -> None:
        with self._lock:
            study = self._studies.setdefault(study_id, StudyInfo())
            if monotonic() < self._again.get(study_id, 0.0):
                self._read_finished(study_id, study)
            else:
                self._read_all(study_id, study)

    def _read_all(self, study_id: int, study: Any) -> None:
        stored = TrialModel
        ids = select(stored.trial_id).where(stored.study_id == study_id, stored.state == TrialState.WAITING)
        waiting = read(self._backend, lambda connection: set(connection.execute(ids).scalars()))
        trials = self._backend._get_trials(
            study_id,
            states=NOT_WAITING,
            included_trial_ids=study.unfinished_trial_ids - waiting,
            trial_id_greater_than=study.last_finished_trial_id,
        )
        self._add_trials_to_cache(study_id, trials)
        numbers = self._trial_id_to_study_id_and_number
        for trial_id in waiting & numbers.keys():  # they ran, and went back to the queue
            study.trials.pop(numbers[trial_id][1], None)
        finished = {trial._trial_id for trial in trials if trial.state.is_finished()}
        # A later look must find those that end now, though trials that began after them have finished already.
        study.unfinished_trial_ids |= waiting | {trial._trial_id for trial in trials}
        study.unfinished_trial_ids -= finished
        study.last_finished_trial_id = max({study.last_finished_trial_id} | finished)
        running = len(trials) - len(finished)
        self._again[study_id] = monotonic() + SECONDS_EACH * running if running > FEW else 0.0

    def _read_finished(self, study_id: int, study: Any) -> None:
        # The last finished one stays as it is: trials that began since, and before it, are not known yet.
        trials = self._backend._get_trials(
            study_id,
            states=FINISHED,
            included_trial_ids=study.unfinished_trial_ids,
            trial_id_greater_than=study.last_finished_trial_id,
        )
        self._add_trials_to_cache(study_id, trials)
        study.unfinished_trial_ids -= {trial._trial_id for trial in trials}
