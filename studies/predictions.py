"""What a trial's model answered to the images that judged it: counts, the most certain mistakes, sample images.

The trainer writes it into a small file next to the model (`storage.artifacts.PREDICTIONS`). Figures are drawn from it.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray
from optuna.trial import FrozenTrial

from storage import artifact_store
from storage.artifact_store import ArtifactStore
from storage.artifacts import stored

log = logging.getLogger(__name__)

MISTAKES = 25  # images that are kept
SAMPLES = 24  # images that are kept, of all classes
LARGEST = 64  # pixels: a larger image is kept with every second, third ... pixel only
CLASSES = 1000  # with more, the counts would need tens of megabytes


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """The answers of one model. Classes are numbered from 0.

    `images` are uint8 arrays of (n, height, width, channels) with one channel (grey) or three (RGB), at most LARGEST
    pixels high and wide.
    """

    judged_on: Literal["validation", "test"]
    counts: NDArray[np.int64]  # (classes, classes): images of class [row] that were taken for class [column]
    mistakes: NDArray[np.uint8]  # images, the most certain first
    index: NDArray[np.int64]  # (n,): the place of each among the images that judge
    true: NDArray[np.int64]  # (n,): its class
    predicted: NDArray[np.int64]  # (n,): the class that the model gave
    probability: NDArray[np.float32]  # (n,): with which probability
    samples: NDArray[np.uint8]  # images of the data, a few of each class
    sample_classes: NDArray[np.int64]  # (n,)

    @classmethod
    def of(
        cls,
        *,
        judged_on: Literal["validation", "test"],
        images: NDArray[Any],
        labels: NDArray[np.int64],
        predicted: NDArray[np.int64],
        probability: NDArray[np.float32],
        classes: int,
    ) -> Self:
        """From all `images` that judge (n, height, width, channels, from 0 to 255) and an answer to each."""
        counts = np.zeros((classes, classes), np.int64)
        np.add.at(counts, (labels, predicted), 1)
        wrong = np.flatnonzero(labels != predicted)
        # Stable, so that of equally certain ones the first come first.
        worst = wrong[np.argsort(-probability[wrong], kind="stable")][:MISTAKES]
        samples = _samples(labels, classes)
        return cls(
            judged_on=judged_on,
            counts=counts,
            mistakes=_small(images[worst]),
            index=worst.astype(np.int64),
            true=labels[worst].astype(np.int64),
            predicted=predicted[worst].astype(np.int64),
            probability=probability[worst].astype(np.float32),
            samples=_small(images[samples]),
            sample_classes=labels[samples].astype(np.int64),
        )

    @property
    def accuracy_by_class(self) -> list[float | None]:
        """The share of each class's images that the model got right; None for a class without images."""
        totals = self.counts.sum(axis=1)
        return [
            float(right / total) if total else None for right, total in zip(self.counts.diagonal(), totals, strict=True)
        ]

    def write(self, path: Path) -> None:
        """Writes the file, completely or not at all. Raises DiskError."""
        with stored(path) as temporary:
            arrays: dict[str, Any] = vars(self)
            np.savez_compressed(temporary, **arrays)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Reads the file. Raises OSError, ValueError, KeyError or BadZipFile if it is not there, or damaged."""
        with np.load(path, allow_pickle=False) as arrays:
            values: dict[str, Any] = {name: arrays[name] for name in cls.__dataclass_fields__}
        return cls(**values | {"judged_on": str(values["judged_on"])})


def of_trial(trial: FrozenTrial, artifacts: ArtifactStore | Path) -> Predictions | None:
    """The answers of a trial's model; None if this machine does not have its file: most trials keep none."""
    path = artifact_store.of(artifacts).fetch(trial.user_attrs.get("predictions"))
    if path is None:
        return None
    try:
        return Predictions.read(path)
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        log.debug("trial %d has no predictions on this machine: %s", trial.number, error)
        return None


@dataclass(frozen=True, kw_only=True)
class Answered:
    """A trial with the answers of its model."""

    trial: int
    predictions: Predictions
    class_names: Sequence[str] = ()  # none if the data have only numbers


def class_names(data: Mapping[str, Any]) -> list[str]:
    """The names of the classes in a study's record of its data; empty if it has none."""
    names = data.get("class_names")
    return [str(name) for name in names] if isinstance(names, list) else []


def class_name(number: int, names: Sequence[str]) -> str:
    """The name of a class; its number if the data have no names."""
    return names[number] if number < len(names) else str(number)


def _samples(labels: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    """The places of some images of each class, class after class."""
    each = max(1, SAMPLES // classes)
    places = [np.flatnonzero(labels == number)[:each] for number in range(min(classes, SAMPLES))]
    return np.concatenate(places)


def _small(images: NDArray[Any]) -> NDArray[np.uint8]:
    step = math.ceil(max(images.shape[1:3]) / LARGEST)
    colours = 3 if images.shape[3] >= 3 else 1
    small: NDArray[np.uint8] = np.clip(images[:, ::step, ::step, :colours], 0, 255).astype(np.uint8)
    return small
