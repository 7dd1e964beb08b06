"""Intervals cover the truth as often as they say, and equal candidates have no winner: simulated confirmations."""

import math

import numpy as np
import optuna
import pytest
from numpy.typing import NDArray
from scipy import stats

from storage.hits import Hits
from studies import confirmation, importance, statistics
from studies.confirmation import Run
from studies.statistics import Interval

pytestmark = pytest.mark.long

SIMULATED = 2000  # confirmations
SEED, REST = 0.15, 0.7  # what a training varies by as a whole, and on one image
OF_ALL, OF_ONE = 1.5, 0.5  # how images differ in difficulty: for all candidates, and for one of them


class _World:
    """Candidates that differ in skill, seeds that differ in luck, and images that differ in difficulty.

    A training gets an image right if skill + luck + ease + noise > 0, all of them normal.
    """

    def __init__(self, generator: np.random.Generator, images: int, skills: tuple[float, ...]) -> None:
        self._generator = generator
        shared = generator.normal(0.0, OF_ALL, images)
        self._ease = [skill + shared + generator.normal(0.0, OF_ONE, images) for skill in skills]

    def trained(self, candidate: int, seeds: int) -> NDArray[np.bool_]:
        """The hits of so many trainings: (seeds, images)."""
        ease, generator = self._ease[candidate], self._generator
        luck = generator.normal(0.0, SEED, (seeds, 1))
        found: NDArray[np.bool_] = ease + luck + generator.normal(0.0, REST, (seeds, len(ease))) > 0
        return found

    def on_these_images(self, candidate: int) -> float:
        """The expected accuracy over all seeds."""
        return float(stats.norm.cdf(self._ease[candidate] / math.hypot(SEED, REST)).mean())


def _expected(skill: float) -> float:
    """The expected accuracy over all seeds and images."""
    return float(stats.norm.cdf(skill / math.sqrt(SEED**2 + REST**2 + OF_ALL**2 + OF_ONE**2)))


def _run(row: NDArray[np.bool_]) -> Run:
    return Run(accuracy=float(row.mean()), hits=Hits.of(row, "test", "f"))


def _covers(interval: Interval | None, truth: float) -> bool:
    assert interval is not None
    return interval.low <= truth <= interval.high


def test_each_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(20)
    covered = {"the mean": 0, "a new seed": 0, "a difference": 0, "one model": 0}
    for _ in range(SIMULATED):
        world = _World(generator, 2000, (4.2, 4.0))
        first, second = (world.trained(candidate, 9) for candidate in (0, 1))
        *accuracies, next_one = first.mean(axis=1)
        covered["the mean"] += _covers(statistics.of_mean(accuracies), world.on_these_images(0))
        covered["a new seed"] += _covers(statistics.of_new_seed(accuracies), next_one)
        difference = statistics.difference(first[:8], second[:8])
        covered["a difference"] += _covers(difference, _expected(4.2) - _expected(4.0))
        right = generator.random(2000) < 0.98
        covered["one model"] += _covers(statistics.wilson(int(right.sum()), 2000), 0.98)
    shares = {name: count / SIMULATED for name, count in covered.items()}
    assert all(0.94 <= share <= 0.96 for share in shares.values()), shares


@pytest.mark.parametrize("candidates", [2, 3])
def test_equal_candidates_have_a_winner_in_at_most_one_of_twenty_confirmations(candidates: int) -> None:
    generator = np.random.default_rng(21)
    winners = 0
    for _ in range(SIMULATED):
        world = _World(generator, 500, (4.0,) * candidates)
        hits = [world.trained(candidate, 8) for candidate in range(candidates)]
        runs = {candidate: {seed: _run(row) for seed, row in enumerate(rows)} for candidate, rows in enumerate(hits)}
        order = sorted(range(candidates), key=lambda candidate: -float(hits[candidate].mean()))
        winner, tied = confirmation.verdict(order, confirmation.comparisons(order, runs))
        assert (winner is None) == (len(tied) > 1)
        winners += winner is not None
    assert winners / SIMULATED <= 0.05


def test_a_candidate_that_is_better_wins() -> None:
    world = _World(np.random.default_rng(22), 5000, (6.0, 4.0, 3.5))
    hits = [world.trained(candidate, 8) for candidate in range(3)]
    runs = {
        candidate: {
            seed: Run(accuracy=float(row.mean()), hits=Hits.of(row, "test", "f")) for seed, row in enumerate(rows)
        }
        for candidate, rows in enumerate(hits)
    }
    found = confirmation.comparisons([0, 1, 2], runs)
    assert [comparison.is_significant for comparison in found] == [True, True]
    assert confirmation.verdict([0, 1, 2], found) == (0, ())
    # With fewer seeds there is no test, and so no winner.
    few = {candidate: {seed: own[seed] for seed in range(5)} for candidate, own in runs.items()}
    assert confirmation.verdict([0, 1, 2], confirmation.comparisons([0, 1, 2], few)) == (None, (0, 1, 2))


def test_an_influence_is_found_in_at_most_one_of_twenty_studies_that_have_none() -> None:
    """Under a sampler that learns, whose trials are not exchangeable."""
    space = {
        "depth": optuna.distributions.CategoricalDistribution((3, 5, 7)),
        "dropout": optuna.distributions.FloatDistribution(0.0, 0.7),
        "rate": optuna.distributions.FloatDistribution(1e-4, 1e-1, log=True),
    }
    studies, found = 300, 0
    for number in range(studies):
        luck = np.random.default_rng(number)
        study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=number))
        for _ in range(20):
            study.tell(study.ask(space), float(luck.normal(0.9, 0.01)))
        found += importance.is_significant(study.trials)
    assert found / studies <= importance.LEVEL
