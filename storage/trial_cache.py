"""Optuna's cache of finished trials, for samplers and pruners, without the trials that wait.

Optuna reads every unfinished trial again at each look, which is once an epoch where there is a pruner. Those of a grid
wait as rows: with 10,000 of them a look took five seconds. No sampler or pruner of ours asks for waiting trials.
"""

from optuna.trial import TrialState
from sqlalchemy import select

from storage.tables import CachedStorage, StudyInfo, TrialModel
from storage.transactions import read

NOT_WAITING = tuple(state for state in TrialState if state != TrialState.WAITING)


class TrialCache(CachedStorage):
    """As Optuna's own. A trial that waits is not among the trials; `get_trial` gives it."""

    def _read_trials_from_remote_storage(self, study_id: int) -> None:
        with self._lock:
            study = self._studies.setdefault(study_id, StudyInfo())
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
