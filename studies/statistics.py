"""Intervals and tests for accuracies, each with its source. Knows no database and no study.

A training's *hits* say for each of the same images whether the model got it right. All intervals are of 95 %. What
needs scipy raises PackageError if it cannot be imported.
"""

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from studies.errors import PackageError
from studies.wording import one_line

CONFIDENCE = 0.95
MIN_SEEDS = 6  # with fewer, no sign-flip test can give p < 0.05: its smallest p is 2 / 2^n
RESAMPLES = 10_000
EXACT_FLIPS = 2**14  # up to so many sign flips are all tried; of more, so many are drawn

Hits = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """From `low` to `high`, both accuracies or differences of accuracies."""

    low: float
    high: float


def wilson(right: int, images: int) -> Interval:
    """The sampling error of one accuracy that was measured once: `right` of `images`.

    It says nothing of a winner that was chosen for its accuracy. Source: Wilson 1927, as scipy computes it. Raises
    ValueError unless 0 <= right <= images and images > 0.
    """
    found = _stats().binomtest(right, images).proportion_ci(CONFIDENCE, method="wilson")
    return Interval(low=float(found.low), high=float(found.high))


def sampling_error(accuracy: float, images: int) -> float:
    """Half the width of `wilson`'s interval, for an accuracy from 0 to 1 on so many `images`; without scipy."""
    z2 = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) ** 2
    return math.sqrt(z2 * (accuracy * (1 - accuracy) / images + z2 / (4 * images**2))) / (1 + z2 / images)


def of_mean(values: Sequence[float]) -> Interval | None:
    """Where the mean over all possible seeds is: Student's t interval of the mean. None for fewer than two values."""
    return _t_interval(values, lambda count: 1 / count)


def of_new_seed(values: Sequence[float]) -> Interval | None:
    """Where the accuracy of a training with a new seed will be: the prediction interval of a normal distribution.

    None for fewer than two values. Source: Hahn and Meeker, Statistical Intervals, 1991, section 4.7.
    """
    return _t_interval(values, lambda count: 1 + 1 / count)


def _t_interval(values: Sequence[float], share_of_variance: Any) -> Interval | None:
    count = len(values)
    if count < 2:
        return None
    mean, spread = float(np.mean(values)), float(np.std(values, ddof=1))
    half = float(_stats().t.ppf((1 + CONFIDENCE) / 2, count - 1)) * spread * math.sqrt(share_of_variance(count))
    # No accuracy is outside 0 to 1, so nothing is lost.
    return Interval(low=max(0.0, mean - half), high=min(1.0, mean + half))


def difference(first: Hits, second: Hits) -> Interval | None:
    """Where the difference of two configurations' mean accuracies is, over new seeds *and* new images.

    `first` and `second` are (seeds, images), paired: row s of both is of the same seed, column i of the same image.
    None for fewer than two seeds.

    A bootstrap in both directions. The images are drawn again with replacement. The seeds are too few for that: their
    part is drawn from Student's t distribution with the standard error that the seeds have beyond what the finite
    number of images explains. Resampling rows and columns alike would count that part twice (Owen, The pigeonhole
    bootstrap, 2007); the split into the two parts is that of Cameron, Gelbach and Miller, 2011. Its coverage is tested
    in tests/test_simulations.py. The same hits always give the same interval.
    """
    differences = first.astype(np.int8) - second.astype(np.int8)
    seeds, images = differences.shape
    if seeds < 2:
        return None
    mean = float(differences.mean())
    of_seed, of_image = differences.mean(axis=1), differences.mean(axis=0)
    rest = differences - of_seed[:, None] - of_image[None, :] + mean
    rest_variance = float((rest**2).sum()) / ((seeds - 1) * max(1, images - 1)) / (seeds * images)
    seed_error = math.sqrt(max(0.0, float(of_seed.var(ddof=1)) / seeds - rest_variance))
    generator = np.random.default_rng(0)
    # Equal columns are drawn together: there are at most 2 x seeds + 1 different means.
    means, counts = np.unique(of_image, return_counts=True)
    drawn = generator.multinomial(images, counts / images, size=RESAMPLES) @ means / images
    drawn = drawn + seed_error * generator.standard_t(seeds - 1, RESAMPLES)
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(low=float(low), high=float(high))


def probability_better(first: Sequence[float], second: Sequence[float]) -> float:
    """How often a training of the first is better than one of the second with the same seed; a tie counts half.

    Source: Bouthillier et al., Accounting for Variance in Machine Learning Benchmarks, MLSys 2021.
    """
    pairs = list(zip(first, second, strict=True))
    return sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs)


def sign_flip_p(first: Sequence[float], second: Sequence[float]) -> float | None:
    """The two-sided p of the sign-flip test over paired seeds: could the differences as well have the other sign?

    Exact up to 14 seeds. None below MIN_SEEDS, where no p could be below 0.05.
    """
    differences = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
    if len(differences) < MIN_SEEDS:
        return None
    found = _stats().permutation_test(
        (differences,),
        np.mean,
        permutation_type="samples",
        n_resamples=EXACT_FLIPS,
        rng=np.random.default_rng(0),
    )
    return float(found.pvalue)


def seeds_needed(candidates: int) -> int:
    """With how many seeds the best of so many candidates can win: Holm's correction of the smallest p is below 0.05."""
    comparisons = max(1, candidates - 1)
    return max(MIN_SEEDS, math.ceil(math.log2(2 * comparisons / 0.05)))


def holm(p_values: Sequence[float]) -> list[float]:
    """The p values, corrected for how many comparisons were made. Source: Holm 1979."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda at: p_values[at])):
        largest = max(largest, min(1.0, p_values[index] * (len(p_values) - rank)))
        corrected[index] = largest
    return corrected


def difference_of_two(first: float, second: float, first_images: int, second_images: int) -> Interval:
    """Where the difference of two accuracies is that were measured once each, on so many images, unpaired.

    Source: Newcombe 1998, method 10, from the two Wilson intervals.
    """
    ours, theirs = (
        wilson(round(first * first_images), first_images),
        wilson(round(second * second_images), second_images),
    )
    difference = first - second
    return Interval(
        low=difference - math.hypot(first - ours.low, theirs.high - second),
        high=difference + math.hypot(ours.high - first, second - theirs.low),
    )


def mcnemar_p(first: Hits, second: Hits) -> float:
    """The exact two-sided p of McNemar's test: do two fixed models get as many of the same images wrong?

    `first` and `second` are (images,). Source: McNemar 1947; Dietterich 1998 on what it is for.
    """
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    if only_first + only_second == 0:
        return 1.0
    return float(_stats().binomtest(only_first, only_first + only_second).pvalue)


def difference_of_models(first: Hits, second: Hits) -> Interval:
    """Where the difference of two fixed models' accuracies is, over new images.

    `first` and `second` are (images,), of the same images. Source: Agresti and Min, 2005: half an image is added to
    each of the four cells, so that it also holds where the models differ on few images.
    """
    only_first, only_second = float((first & ~second).sum()) + 0.5, float((second & ~first).sum()) + 0.5
    images = len(first) + 2.0
    difference = (only_first - only_second) / images
    error = math.sqrt(only_first + only_second - (only_first - only_second) ** 2 / images) / images
    return Interval(low=difference - 1.96 * error, high=difference + 1.96 * error)


def _stats() -> Any:
    """scipy.stats, which takes a second to import: most commands need no statistics. Raises PackageError."""
    try:
        return importlib.import_module("scipy.stats")
    except Exception as error:  # one that does not fit the installed NumPy raises anything
        raise PackageError(
            f"scipy cannot be imported ({type(error).__name__}: {one_line(error, 200)}): install it again"
        ) from error
