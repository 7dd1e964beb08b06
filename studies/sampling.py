"""The Optuna sampler and pruner of a definition.

The sampler of trial n is seeded from (study seed, n). If each worker started with the study's seed, two workers would
propose the same points, and a restarted study would repeat its first points.
"""

import importlib.util
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial

from studies.definition import Definition
from studies.errors import DefinitionError
from studies.space import Space

# Of successive halving: one of so many trials goes on. Optuna's default is 4. With it the best score of one of five
# searches (24 trials of 6 epochs, `bench/peers.py`) was 0.010 lower, and all five together took 0.96 of the time.
REDUCTION = 2


def seed_of(definition: Definition, number: int, purpose: int) -> int:
    """A 32-bit seed for trial `number`, different for other trials, purposes and study seeds.

    Purposes: 0 for the sampler, 1 for the training; 2 for the training and 3 for the split of a confirmation, where
    `number` is that of its seed; 4 for a repeat, where it is that of the repeat; 100 and more for further draws of a
    sampler.
    """
    entropy = [definition.sampler.seed, number, purpose]
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


def sampler(definition: Definition, number: int, draw: int = 0) -> BaseSampler:
    """The sampler of trial `number`; with another `draw` it proposes something else."""
    seed = seed_of(definition, number, purpose=0) if draw == 0 else seed_of(definition, number, purpose=100 + draw)
    conditional = any(parameter.when for parameter in definition.space.values())
    makers: dict[str, Callable[[], BaseSampler]] = {
        # `group` splits a conditional space into the parts that occur together, and models each.
        "tpe": lambda: optuna.samplers.TPESampler(
            seed=seed, group=conditional, n_startup_trials=_startup(definition.trials)
        ),
        "gp": lambda: optuna.samplers.GPSampler(seed=seed),
        "random": lambda: optuna.samplers.RandomSampler(seed=seed),
        "qmc": lambda: _NumberedQMC(definition, number, independent_seed=seed),
        "cmaes": lambda: optuna.samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False),
        "nsga2": lambda: optuna.samplers.NSGAIISampler(seed=seed, population_size=_population(definition.trials)),
        # Their points are in the queue, so the sampler has nothing to propose.
        "grid": lambda: optuna.samplers.RandomSampler(seed=seed),
        "points": lambda: optuna.samplers.RandomSampler(seed=seed),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # `group`
        return makers[definition.sampler.kind]()


def pruner(definition: Definition) -> BasePruner:
    """The pruner. Steps are epochs, or repeats where there are several; from 1, so a first step is one unit."""
    epochs = definition.budget.epochs
    first = min(definition.pruner.min_epochs, epochs)
    makers: dict[str, Callable[[], BasePruner]] = {
        "hyperband": lambda: optuna.pruners.HyperbandPruner(min_resource=first, max_resource=epochs),
        "asha": lambda: optuna.pruners.SuccessiveHalvingPruner(min_resource=first, reduction_factor=REDUCTION),
        "median": lambda: optuna.pruners.MedianPruner(n_warmup_steps=first),
        "wilcoxon": lambda: optuna.pruners.WilcoxonPruner(
            n_startup_steps=0 if definition.budget.repeats > 1 else first
        ),
        "none": lambda: optuna.pruners.NopPruner(),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # Wilcoxon
        return makers[definition.pruner.kind]()


def brackets(definition: Definition) -> int | None:
    """How many brackets Hyperband has: rules of pruning that share the trials. None for another pruner.

    With one it is successive halving: there is no bracket whose trials are left alone for longer.
    """
    if definition.pruner.kind != "hyperband":
        return None
    epochs = definition.budget.epochs
    first = min(definition.pruner.min_epochs, epochs)
    # As Optuna's HyperbandPruner counts them: the reduction factor is 3.
    return math.floor(math.log(epochs / first, 3)) + 1


def check_installed(definition: Definition) -> None:
    """Raises DefinitionError if the sampler needs a package that is not installed."""
    if definition.sampler.kind == "gp" and importlib.util.find_spec("torch") is None:
        raise DefinitionError(
            'sampler.kind = "gp" needs PyTorch, which is not installed: '
            "run `pip install 'trialyard[gp]'`, or choose tpe"
        )


def _startup(trials: int) -> int:
    # Optuna's default is 10, also for a study of 12 trials. In simulations 5 of 12 had a third less regret.
    return max(2, min(10, trials // 3 + 1))


def _population(trials: int) -> int:
    # With Optuna's default of 50 a study of 40 trials would be a random search.
    return max(4, min(50, trials // 4))


class _NumberedQMC(optuna.samplers.QMCSampler):
    """Quasi-Monte Carlo in which trial n takes point n of the sequence.

    Optuna's QMCSampler counts the points in a study attribute that it reads and writes without a lock, so two workers
    can propose the same point. It also samples the first trial independently, to learn the search space from it.
    """

    def __init__(self, definition: Definition, number: int, *, independent_seed: int) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            super().__init__(
                scramble=True,
                # One sequence for the whole study.
                seed=definition.sampler.seed,
                independent_sampler=optuna.samplers.RandomSampler(seed=independent_seed),
                warn_independent_sampling=False,
            )
        self._space: Space = definition.space
        self._number = number

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {
            name: distribution
            for name, parameter in self._space.items()
            if not (distribution := parameter.distribution()).single()
        }

    def _find_sample_id(self, study: optuna.Study, search_space: dict[str, Any]) -> int:
        return self._number
