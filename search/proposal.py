"""Which hyperparameters a claimed trial gets: those that it has, or new ones that no other trial of the study has."""

import logging
from collections.abc import Container
from functools import cache
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from storage import attributes, claims
from storage.claims import Claim
from storage.errors import TrialyardError, named_error
from storage.transactions import PatientStorage
from studies import sampling
from studies.definition import Definition
from studies.space import Point, Space, grid, is_whole, key_of, suggest

log = logging.getLogger(__name__)

REDRAWS = 20  # how often the sampler is asked again for a point that no trial has
_Params = dict[str, tuple[BaseDistribution, Any]]


def is_of_the_database(error: Exception, storage: PatientStorage, claim: Claim) -> bool:
    """Whether the database raised an error that came out of a sampler or a pruner, which read it; else it is theirs."""
    if isinstance(error, KeyError):  # Optuna's word for a row that is missing
        return not claims.trial_exists(storage, claim)
    return isinstance(error, (TrialyardError, StorageInternalError, SQLAlchemyError))


class SamplerFailed(Exception):  # noqa: N818 - it is an event
    """The sampler raised an error. The message says which."""


class SpaceExhausted(Exception):  # noqa: N818 - it is an event
    """Every point of the space has a trial already."""


def hyperparameters_of(definition: Definition, storage: PatientStorage, opened: optuna.Study, claim: Claim) -> Point:
    """The claimed trial's hyperparameters: those that it has, or new ones, which are recorded.

    In a space without continuous ranges a sampler proposes points again that it has tried: the same training would be
    paid for twice. So it is asked again, with other seeds, and at last any free point is taken. A trial that was added
    with some of its hyperparameters keeps these, even if no free point has them.

    Raises ClaimLost, SpaceExhausted and SamplerFailed.
    """
    point, params = _suggested(definition, storage, opened, claim, draw=0)
    given = _given(storage, opened, claim)
    if definition.size is None or is_whole(given, definition.space):
        claims.begin(storage, claim, params)
        return point
    taken, draw = _taken(storage, opened, claim), 0
    # Trial n has one point of the sequence, and each draw of a Gaussian process takes seconds.
    draws = 0 if definition.sampler.kind in ("qmc", "gp") else REDRAWS
    while True:
        while key_of(point) in taken and draw < draws:
            draw += 1
            point, params = _suggested(definition, storage, opened, claim, draw)
        if key_of(point) in taken:
            free = _free(definition, claim, taken, given)
            if free is None:  # somebody asked for what is given, whatever else has been tried with it
                claims.begin(storage, claim, params)
                return point
            point = free
            params = {name: (definition.space[name].distribution(), value) for name, value in point.items()}
        try:
            claims.begin(storage, claim, params, unique=True)
        except claims.PointTaken:
            taken.add(key_of(point))  # another slot was faster
        else:
            return point


def _suggested(
    definition: Definition, storage: PatientStorage, opened: optuna.Study, claim: Claim, draw: int
) -> tuple[Point, _Params]:
    try:
        if draw > 0:
            opened.sampler = sampling.sampler(definition, claim.number, draw)
        opened._storage = _OfThisSpace.around(opened._storage, definition, claim.study)  # the sampler reads from it
        trial = optuna.Trial(opened, claim.trial_id)  # it asks the sampler already
        draft = _Draft(trial.storage)
        trial.storage = draft  # type: ignore[assignment]
        return suggest(trial, definition.space), draft.params
    except UpdateFinishedTrialError as error:  # some samplers store state in the trial
        raise claims.ended_elsewhere(claim) from error
    except Exception as error:
        if is_of_the_database(error, storage, claim):
            raise
        log.warning("the sampler failed at %s trial %d", claim.study, claim.number, exc_info=error)
        raise SamplerFailed(named_error(error)) from error


def _given(storage: PatientStorage, opened: optuna.Study, claim: Claim) -> Point:
    """The hyperparameters that the trial has already, because it was listed or has begun before; maybe not all.

    Raises ClaimLost if it is not among the trials that run, and KeyError if the study was deleted.
    """
    for trial in _trials(opened):
        if trial._trial_id == claim.trial_id:
            return _point_of(trial)
    if claims.trial_exists(storage, claim):
        raise claims.lost(claim)  # it went back to the queue
    raise KeyError(claim.trial_id)  # as Optuna's storage says it


def _taken(storage: PatientStorage, opened: optuna.Study, claim: Claim) -> set[str]:
    """The points that other trials have or will have."""
    waiting = storage.get_all_trials(claim.study_id, deepcopy=False, states=(TrialState.WAITING,))
    others = (trial for trial in (*_trials(opened), *waiting) if trial._trial_id != claim.trial_id)
    return {key_of(_point_of(trial)) for trial in others}


def _point_of(trial: FrozenTrial) -> Point:
    return trial.params or attributes.listed_point(trial)


def _trials(opened: optuna.Study) -> list[FrozenTrial]:
    """The trials that do not wait: see `TrialCache`."""
    return opened.get_trials(deepcopy=False)


def _free(definition: Definition, claim: Claim, taken: set[str], given: Point) -> Point | None:
    """A point that no trial has, with the values that are `given`; None if there is none with these."""
    free = [point for point in grid(definition.space) if key_of(point) not in taken and _has(point, given)]
    if not free and given:
        return None
    if not free:
        raise SpaceExhausted(f"all {definition.size} combinations of the space have a trial: nothing is left to search")
    seed = sampling.seed_of(definition, claim.number, purpose=0)
    return free[int(np.random.default_rng(seed).integers(len(free)))]


def _has(point: Point, given: Point) -> bool:
    return all(key_of({name: point[name]}) == key_of({name: given[name]}) for name in point.keys() & given.keys())


def _is_of_this_space(trial: FrozenTrial, space: Space) -> bool:
    """Whether a sampler of `space` may learn from the trial: a finished one must have the same ranges."""
    if not trial.state.is_finished():
        return True
    if any(name in space and space[name].distribution() != of for name, of in trial.distributions.items()):
        return False
    return trial.state != TrialState.COMPLETE or all(name in trial.params for name in space if not space[name].when)


@cache  # once in a process
def _warn_of_others(study: str, number: int) -> None:
    log.warning(
        "study %s: samplers leave out trial %d, which another program added with other hyperparameters or ranges",
        *(study, number),
    )


class _OfThisSpace:
    """The storage for a sampler, without trials of other spaces: with one of them Optuna's samplers raise an error."""

    def __init__(self, storage: BaseStorage, space: Space, study: str) -> None:
        self._storage, self._space, self._study = storage, space, study

    @classmethod
    def around(cls, storage: Any, definition: Definition, study: str) -> Any:
        """`storage` itself, if it is one already."""
        return storage if isinstance(storage, cls) else cls(storage, definition.space, study)

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        """As Optuna's."""
        trials = self._storage.get_all_trials(study_id, deepcopy=deepcopy, states=states)
        others = [trial.number for trial in trials if not _is_of_this_space(trial, self._space)]
        for number in others:
            _warn_of_others(self._study, number)
        return [trial for trial in trials if trial.number not in others] if others else trials

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)


class _Draft:
    """A storage for one trial's suggestions: it keeps them, and passes everything else on to the real storage.

    Optuna writes each suggestion in a transaction of its own, and does not check who owns the trial.
    """

    def __init__(self, storage: BaseStorage) -> None:
        self._storage = storage
        self.params: _Params = {}

    def set_trial_param(
        self, trial_id: int, param_name: str, param_value_internal: float, distribution: BaseDistribution
    ) -> None:
        self.params[param_name] = (distribution, distribution.to_external_repr(param_value_internal))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)
