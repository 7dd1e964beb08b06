"""Intervals and tests have the known answers."""

import itertools
import math
import sys

import numpy as np
import pytest

from storage.hits import Hits
from studies import statistics
from studies.errors import PackageError
from studies.statistics import Interval


@pytest.mark.parametrize(
    ("right", "images", "low", "high"),
    # statsmodels 0.15: proportion_confint(method="wilson")
    [
        (9938, 10000, 0.9920605480, 0.9951602152),
        (9950, 10000, 0.9934147427, 0.9962050989),
        (355, 359, 0.9717058731, 0.9956587746),
        (0, 20, 0.0, 0.1611251581),
        (20, 20, 0.8388748419, 1.0),
    ],
)
def test_the_sampling_error_of_one_model(right: int, images: int, low: float, high: float) -> None:
    found = statistics.wilson(right, images)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-9)


ACCURACIES = (0.9931, 0.9938, 0.9926, 0.9941, 0.9935, 0.9929, 0.9944, 0.9933)


def test_the_mean_and_a_new_seed() -> None:
    # statsmodels 0.15: DescrStatsW.tconfint_mean, and OLS on a constant with get_prediction (obs_ci).
    assert statistics.of_mean(ACCURACIES) == Interval(low=pytest.approx(0.9929511537), high=pytest.approx(0.9939738463))
    assert statistics.of_new_seed(ACCURACIES) == Interval(
        low=pytest.approx(0.991928, abs=1e-6), high=pytest.approx(0.994997, abs=1e-6)
    )
    assert statistics.of_mean([0.99]) is None
    assert statistics.of_new_seed([]) is None


def test_holm_s_correction() -> None:
    # statsmodels 0.15: multipletests(method="holm")
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.6, 0.7]) == [1.0, 1.0]
    assert statistics.holm([]) == []


def test_the_sign_flip_test_is_exact_and_needs_six_seeds() -> None:
    differences = np.array([0.003, -0.001, 0.002, 0.004, -0.002, 0.001, 0.0035])
    flipped = [abs(np.dot(signs, differences)) for signs in itertools.product((1, -1), repeat=7)]
    expected = np.mean(np.array(flipped) >= abs(differences.sum()) - 1e-12)
    assert statistics.sign_flip_p(differences, np.zeros(7)) == pytest.approx(expected)
    assert statistics.sign_flip_p([1.0] * 6, [0.0] * 6) == 2 / 2**6
    assert statistics.sign_flip_p([1.0] * 8, [0.0] * 8) == 2 / 2**8
    assert statistics.sign_flip_p([1.0] * 5, [0.0] * 5) is None
    assert statistics.sign_flip_p([0.5] * 6, [0.5] * 6) == 1.0


def test_how_often_one_is_better() -> None:
    assert statistics.probability_better([0.9, 0.8, 0.7, 0.6], [0.8, 0.8, 0.9, 0.5]) == 2.5 / 4


def test_hits_are_kept_as_bits() -> None:
    right = np.random.default_rng(0).random(359) < 0.9
    hits = Hits.of(right, "test", "f")
    assert len(hits.bits) == math.ceil(359 / 8)
    assert (hits.array() == right).all()


@pytest.mark.parametrize(
    ("first", "second", "images", "low", "high"),
    # statsmodels 0.15: confint_proportions_2indep(method="newcomb", compare="diff")
    [
        (9938, 9928, 10000, -0.0012827795, 0.0033016947),
        (355, 340, 359, 0.0163457421, 0.0708405200),
    ],
)
def test_the_difference_of_two_accuracies(first: int, second: int, images: int, low: float, high: float) -> None:
    found = statistics.difference_of_two(first / images, second / images, images, images)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-9)


def test_how_many_seeds_a_winner_needs() -> None:
    needed = [statistics.seeds_needed(candidates) for candidates in (1, 2, 3, 4, 8)]
    assert needed == [6, 6, 7, 7, 9]
    for candidates, seeds in zip((2, 3, 4, 8), needed[1:], strict=True):
        assert (candidates - 1) * 2 / 2**seeds < 0.05 <= (candidates - 1) * 2 / 2 ** (seeds - 1) or seeds == 6


def test_the_difference_of_two_models_on_the_same_images() -> None:
    first = np.array([True] * 925 + [False] * 75)
    second = np.array([True] * 900 + [False] * 25 + [True] * 12 + [False] * 63)
    found = statistics.difference_of_models(first, second)
    # Agresti and Min: (25 - 12) / 1002, and the square root of 38 - 13^2 / 1002 over 1002.
    half = 1.96 * math.sqrt(38 - 13**2 / 1002) / 1002
    assert (found.low, found.high) == pytest.approx((13 / 1002 - half, 13 / 1002 + half))


def test_mcnemar_s_test() -> None:
    # statsmodels 0.15: mcnemar([[900, 25], [12, 63]], exact=True)
    first = np.array([True] * 900 + [True] * 25 + [False] * 12 + [False] * 63)
    second = np.array([True] * 900 + [False] * 25 + [True] * 12 + [False] * 63)
    assert statistics.mcnemar_p(first, second) == pytest.approx(0.0470310274)
    assert statistics.mcnemar_p(first, first) == 1.0


def test_a_broken_scipy_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(PackageError, match=r"^scipy cannot be imported \(ModuleNotFoundError: .*\): install it again$"):
        statistics.wilson(90, 100)
