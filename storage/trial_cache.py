"""Optuna's cache of finished trials, for samplers and pruners, without the trials that wait.

Optuna reads every unfinished trial again at each look, which is once an epoch where there is a pruner. Those of a grid
wait as rows: with 10,000 of them a look took five seconds. No sampler or pruner of ours asks for waiting trials. And
where hundreds run, each of their workers read all epochs of all of them: 0.4 s beside 800, some eight times in a trial.
"""

import json
from collections import defaultdict
from collections.abc import Collection, Sequence
from functools import lru_cache
from time import monotonic
from typing import Any

from optuna.distributions import BaseDistribution, json_to_distribution
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import Connection, Row, select

from storage.tables import CachedStorage, StudyInfo, TrialModel, TrialParamModel, TrialSystemAttributeModel
from storage.transactions import read

NOT_WAITING = tuple(state for state in TrialState if state != TrialState.WAITING)
FINISHED = tuple(state for state in TrialState if state.is_finished())
# Up to FEW running trials are read whole at each look. More are read in brief, at most once in SECONDS_EACH times their
# number: one takes 0.02 ms, so this takes 1 % of the time for each study.
FEW = 30
SECONDS_EACH = 0.002


class TrialCache(CachedStorage):
    """As Optuna's own. A trial that waits is not among the trials; `get_trial` gives it.

    Where more than FEW run, they may be some seconds old, or missing if they began since. They have only what samplers
    and pruners ask for: number, hyperparameters and system attributes (in which successive halving keeps the scores of
    its rungs). A trial that has ended is always whole, and seen at the next look.
    """

    def __init__(self, backend: RDBStorage) -> None:
        super().__init__(backend)
        self._again: dict[int, float] = {}  # by study, when trials that run are to be read again
        self._waiting: dict[int, set[int]] = {}  # by study, the trials that waited at the last such look

    def has_begun(self, study_id: int, trial_id: int) -> None:
        """This worker runs this trial: the next look has it, at least as it is now. Raises KeyError if it is gone."""
        trial = self._backend.get_trial(trial_id)
        with self._lock:
            study = self._studies.setdefault(study_id, StudyInfo())
            self._add_trials_to_cache(study_id, [trial])
            study.unfinished_trial_ids.add(trial_id)
            self._waiting.get(study_id, set()).discard(trial_id)

    def _get_cached_trial(self, trial_id: int) -> FrozenTrial | None:
        place = self._trial_id_to_study_id_and_number.get(trial_id)
        # None: not there, because it went back to the queue.
        trial = None if place is None else self._studies[place[0]].trials.get(place[1])
        return trial if trial is not None and trial.state.is_finished() else None

    def _read_trials_from_remote_storage(self, study_id: int) -> None:
        with self._lock:
            study = self._studies.setdefault(study_id, StudyInfo())
            if monotonic() < self._again.get(study_id, 0.0):
                # The last finished id must not move here: a trial with a smaller id may run that is not known yet.
                self._read(study_id, study, FINISHED, without=self._waiting.get(study_id, set()))
                return
            last, unfinished = read(self._backend, lambda connection: _unfinished(connection, study_id))
            waiting = {row.trial_id for row in unfinished if row.state == TrialState.WAITING}
            running = [row for row in unfinished if row.trial_id not in waiting]
            if len(running) > FEW:
                brief = read(self._backend, lambda connection: _in_brief(connection, study_id, running))
                self._add_trials_to_cache(study_id, brief)
                seen = self._read(study_id, study, FINISHED, without=waiting)
                self._again[study_id] = monotonic() + SECONDS_EACH * len(running)
            else:
                seen = self._read(study_id, study, NOT_WAITING, without=waiting)
            numbers = self._trial_id_to_study_id_and_number
            # They ran, and went back to the queue. One that was claimed since is read already.
            for trial_id in (waiting - seen.keys()) & numbers.keys():
                study.trials.pop(numbers[trial_id][1], None)
            ended = {trial_id for trial_id, trial in seen.items() if trial.state.is_finished()}
            # A later look must find those that end now, though trials that began after them have finished already.
            study.unfinished_trial_ids |= {row.trial_id for row in unfinished}
            study.unfinished_trial_ids -= ended
            self._waiting[study_id] = waiting
            # Of those that began after `last` some may run, unknown.
            known = {trial_id for trial_id in ended if trial_id <= last}
            study.last_finished_trial_id = max({study.last_finished_trial_id} | known)

    def _read(
        self, study_id: int, study: Any, states: Sequence[TrialState], without: Collection[int]
    ) -> dict[int, FrozenTrial]:
        """Reads trials in these states that are not known to have finished; returns them by id."""
        trials = self._backend._get_trials(
            study_id,
            states=states,
            # Thousands of a grid may wait: to ask for each of them takes long.
            included_trial_ids=study.unfinished_trial_ids.difference(without),
            trial_id_greater_than=study.last_finished_trial_id,
        )
        self._add_trials_to_cache(study_id, trials)
        seen = {trial._trial_id: trial for trial in trials}
        study.unfinished_trial_ids |= seen.keys()
        study.unfinished_trial_ids -= {trial_id for trial_id, trial in seen.items() if trial.state.is_finished()}
        return seen


def _unfinished(connection: Connection, study_id: int) -> tuple[int, Sequence[Row[Any, Any, Any]]]:
    """The id of the study's last trial, and the rows of those that wait or run."""
    stored = TrialModel
    # By number, for which there is an index: ids rise with the numbers.
    ids = select(stored.trial_id).where(stored.study_id == study_id).order_by(stored.number.desc()).limit(1)
    last = connection.execute(ids).scalar()
    columns = select(stored.trial_id, stored.number, stored.state)
    states = (TrialState.WAITING, TrialState.RUNNING)
    rows = connection.execute(columns.where(stored.study_id == study_id, stored.state.in_(states)))
    return -1 if last is None else last, rows.all()


def _in_brief(connection: Connection, study_id: int, running: Sequence[Row[Any, Any, Any]]) -> list[FrozenTrial]:
    mine = (TrialModel.study_id == study_id, TrialModel.state == TrialState.RUNNING)
    params, attributes = defaultdict[int, dict[str, Any]](dict), defaultdict[int, dict[str, Any]](dict)
    distributions = defaultdict[int, dict[str, BaseDistribution]](dict)
    of = TrialParamModel
    rows = connection.execute(
        select(of.trial_id, of.param_name, of.param_value, of.distribution_json)
        .join(TrialModel, TrialModel.trial_id == of.trial_id)
        .where(*mine)
        .order_by(of.param_id)
    )
    for trial_id, name, value, distribution_json in rows:
        distribution = distributions[trial_id][name] = _distribution(distribution_json)
        params[trial_id][name] = distribution.to_external_repr(value)
    stored = TrialSystemAttributeModel
    others = connection.execute(
        select(stored.trial_id, stored.key, stored.value_json)
        .join(TrialModel, TrialModel.trial_id == stored.trial_id)
        .where(*mine)
    )
    for trial_id, key, value_json in others:
        attributes[trial_id][key] = json.loads(value_json)
    return [
        FrozenTrial(
            number=row.number,
            trial_id=row.trial_id,
            state=TrialState.RUNNING,
            value=None,
            datetime_start=None,
            datetime_complete=None,
            params=params[row.trial_id],
            distributions=distributions[row.trial_id],
            user_attrs={},
            system_attrs=attributes[row.trial_id],
            intermediate_values={},
        )
        for row in running
    ]


@lru_cache(maxsize=1000)
def _distribution(text: str) -> BaseDistribution:
    return json_to_distribution(text)
