"""What samplers are shown of trials whose hyperparameters made them fail: without it they propose the like again. And
what pruners are shown.

Optuna's samplers leave failed trials out. In the database these trials stay failed, with their reason, so that people,
rankings and reports see them as what they are.
"""

import copy
from collections.abc import Container
from typing import Any

from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from storage import attributes, faults
from storage.queue import RETRY_OF
from storage.ranking import is_scored
from studies.definition import SamplerKind

NOT_FAILED = (TrialState.COMPLETE, TrialState.PRUNED)


class WithLessons:
    """A storage for a sampler of this kind, in which trials that failed by their hyperparameters are bad ones.

    For TPE they are pruned without a score, which it ranks below all others. Other samplers also leave pruned trials
    out: for them such a trial is complete, with the lowest score that any trial has, or 0.

    Everything else is passed on to the real storage.
    """

    def __init__(self, storage: BaseStorage, kind: SamplerKind) -> None:
        self._storage, self._shown_as = storage, TrialState.PRUNED if kind == "tpe" else TrialState.COMPLETE

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        """As Optuna's storages; `states` are those that are shown."""
        trials = self._storage.get_all_trials(study_id, deepcopy=deepcopy)
        if any(_is_lesson(trial) for trial in trials):
            # It failed for another reason, if the same hyperparameters have done well since.
            well = {trial.user_attrs.get(RETRY_OF) for trial in trials if trial.state in NOT_FAILED}
            trials = [trial for trial in trials if not (trial.number in well and _is_lesson(trial))]
            scores = [trial.values[0] for trial in trials if is_scored(trial)]
            lowest = min(scores, default=0.0)
            trials = [self._shown(trial, lowest) if _is_lesson(trial) else trial for trial in trials]
        return [trial for trial in trials if states is None or trial.state in states]

    def _shown(self, trial: FrozenTrial, lowest: float) -> FrozenTrial:
        shown = copy.copy(trial)  # the real one is in a cache
        shown.state, shown.intermediate_values = self._shown_as, {}
        shown.values = [lowest] if self._shown_as == TrialState.COMPLETE else None
        return shown

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)


def _is_lesson(trial: FrozenTrial) -> bool:
    if trial.state != TrialState.FAIL or not trial.params:
        return False
    kind = attributes.failure(trial.user_attrs.get("failure"))["kind"]
    return faults.of(kind).whose == "hyperparameters"


class WithEpochs:
    """A storage for a pruner, without complete trials that have no epochs, such as imported ones.

    Optuna's pruners would count them among those with which a trial is compared, or compare it with nothing at all.
    """

    def __init__(self, storage: BaseStorage) -> None:
        self._storage = storage

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        """As Optuna's storages."""
        trials = self._storage.get_all_trials(study_id, deepcopy=deepcopy, states=states)
        return [trial for trial in trials if trial.state != TrialState.COMPLETE or trial.intermediate_values]

    def get_best_trial(self, study_id: int) -> FrozenTrial:
        """The complete trial with the highest value. Raises ValueError if there is none, as Optuna's storages do."""
        trials = self.get_all_trials(study_id, deepcopy=False, states=(TrialState.COMPLETE,))
        return max(filter(is_scored, trials), key=lambda trial: trial.values[0])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)
