"""Which hyperparameters made the difference, over all trials that were scored: pruned ones as well.

Importances say little by themselves: among hyperparameters without any influence one always seems to have some. So
none is shown unless a permutation test passes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState

from storage.ranking import is_feasible, is_scored

SAMPLE = 300  # trials that importances are computed from
THIRDS = 3
SHUFFLES = 999
# A sampler that learns gathers its trials where it has found good ones, so that they are not exchangeable, and a
# permutation test at 5 % finds an influence in too many studies that have none. At this p it errs in less than LEVEL
# under TPE (tests/test_simulations.py).
P_VALUE, LEVEL = 0.01, 0.05


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A trial with a number by which it can be compared with all others."""

    trial: FrozenTrial
    score: float  # the share of the other trials that it beats; 0 to 1


def scored(trials: Sequence[FrozenTrial]) -> list[Scored]:
    """At most SAMPLE of the complete and pruned trials with their scores, the best first.

    Two complete trials are compared by their values. A pruned trial is compared with each other one by what both had
    after the last epoch that both reached: the best accuracy so far, or the mean so far where the steps are repeats.
    Where one of the two has no accuracy at that epoch, such as an imported trial, each beats the other by half.
    """
    known = [trial for trial in trials if is_feasible(trial) and (is_scored(trial) or _is_pruned(trial))]
    if len(known) > SAMPLE:
        # At random: a grid repeats its values at a steady distance.
        chosen = np.random.default_rng(0).choice(len(known), SAMPLE, replace=False)
        known = [known[index] for index in sorted(chosen)]
    if len(known) < 2:
        return [Scored(trial=trial, score=1.0) for trial in known]
    # Only epochs that some trial reported: other programs may report at any step.
    steps = sorted({step for trial in known for step in trial.intermediate_values})
    # After the column of each step there is one for the end, which every complete trial reached: also an imported one,
    # which has no epochs, and one that ended early because it had stopped improving.
    reached = np.array([_reached(trial, steps) for trial in known])
    last = np.array(
        [len(steps) if is_scored(trial) else steps.index(max(trial.intermediate_values)) for trial in known]
    )
    rows = np.arange(len(known))
    wins = np.zeros(len(known))
    for row in range(len(known)):
        both = np.minimum(last[row], last)
        ours, theirs = reached[row, both], reached[rows, both]
        even = (ours == theirs) | np.isnan(ours) | np.isnan(theirs)
        wins[row] = (ours > theirs).sum() + even.sum() / 2 - 0.5  # not itself
    found = [Scored(trial=trial, score=float(win) / (len(known) - 1)) for trial, win in zip(known, wins, strict=True)]
    return sorted(found, key=lambda each: (-each.score, each.trial.number))


def _reached(trial: FrozenTrial, steps: Sequence[int]) -> list[float]:
    """The accuracy that the trial had after each of `steps`, and at its end; NaN where it is not known."""
    has_repeats = "repeats" in trial.user_attrs
    end = float(trial.values[0]) if is_scored(trial) else math.nan
    own_last = max(trial.intermediate_values, default=math.inf)
    best, total, count = -math.inf, 0.0, 0
    reached: list[float] = []
    for step in steps:
        value = trial.intermediate_values.get(step, math.nan)
        if math.isfinite(value):
            best, total, count = max(best, value), total + value, count + 1
        if step >= own_last and is_scored(trial):
            reached.append(end)
        elif count:
            reached.append(total / count if has_repeats else best)
        else:
            reached.append(math.nan)
    return [*reached, end]


def _is_pruned(trial: FrozenTrial) -> bool:
    return trial.state == TrialState.PRUNED and any(map(math.isfinite, trial.intermediate_values.values()))


def importances(trials: Sequence[FrozenTrial]) -> dict[str, float]:
    """How much of the ranking of the trials each hyperparameter explains by itself, from 0 to 1, largest first.

    This is the adjusted eta squared of the scores between groups of trials: a group for each choice, or for the lowest,
    the middle and the highest third of the numbers (Kruskal and Wallis, 1952; Tomczak and Tomczak, 2014). Empty if
    there are fewer than 4 trials, or all are equally good. See `is_significant` before showing them.
    """
    sample = scored(trials)
    groups = _groups([each.trial for each in sample])
    scores = np.array([[each.score for each in sample]])
    if len(sample) < 4 or not groups or np.ptp(scores) == 0.0:
        return {}
    explained = {name: float(_explained(scores, of_trial)[0]) for name, of_trial in groups.items()}
    return dict(sorted(explained.items(), key=lambda item: -item[1]))


def is_significant(trials: Sequence[FrozenTrial]) -> bool:
    """Whether the largest of `importances` is more than chance: a permutation test that errs in at most LEVEL.

    The scores are shuffled among the trials SHUFFLES times. The same trials always give the same answer.
    """
    largest = max(importances(trials).values(), default=0.0)
    if largest <= 0.0:
        return False
    sample = scored(trials)
    generator = np.random.default_rng(0)
    scores = generator.permuted(np.tile([each.score for each in sample], (SHUFFLES, 1)), axis=1)
    by_chance = np.max([_explained(scores, of) for of in _groups([each.trial for each in sample]).values()], axis=0)
    return float((1 + (by_chance >= largest).sum()) / (SHUFFLES + 1)) <= P_VALUE


def _groups(trials: Sequence[FrozenTrial]) -> dict[str, NDArray[np.intp]]:
    """For each hyperparameter with different values the number of each trial's group: (trials,)."""
    names = dict.fromkeys(name for trial in trials for name in trial.params)
    groups = {name: _groups_of(name, trials) for name in names}
    return {name: of_trial for name, of_trial in groups.items() if of_trial.max() > 0}


def _groups_of(name: str, trials: Sequence[FrozenTrial]) -> NDArray[np.intp]:
    values = [trial.params.get(name) for trial in trials]
    different = list(dict.fromkeys(map(repr, values)))
    numbers = [value for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)]
    distribution = next(trial.distributions[name] for trial in trials if name in trial.params)
    if isinstance(distribution, CategoricalDistribution) or len(different) <= THIRDS:
        return np.array([different.index(repr(value)) for value in values])
    borders = np.quantile(numbers, [part / THIRDS for part in range(1, THIRDS)])
    # Where a third has the highest value, it must not be in one group with all lower ones.
    side: Literal["left", "right"] = "right" if borders[-1] >= max(numbers) else "left"
    # Trials without it, because it is conditional, are a group of their own.
    return np.array([THIRDS if value is None else int(np.searchsorted(borders, value, side)) for value in values])


def _explained(scores: NDArray[np.float64], of_trial: NDArray[np.intp]) -> NDArray[np.float64]:
    """The adjusted eta squared of each row of `scores`, (rows, trials)."""
    members = np.eye(int(of_trial.max()) + 1)[of_trial]
    members = members[:, members.sum(axis=0) > 0]
    count, groups = members.shape
    if count <= groups:
        return np.zeros(len(scores))
    centred = scores - scores.mean(axis=1, keepdims=True)
    between = ((centred @ members) ** 2 / members.sum(axis=0)).sum(axis=1)
    eta_squared = between / (centred**2).sum(axis=1)
    adjusted: NDArray[np.float64] = 1.0 - (1.0 - eta_squared) * (count - 1) / (count - groups)
    return np.maximum(0.0, adjusted)
