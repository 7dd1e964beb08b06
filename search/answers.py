"""What a model answers to the images that judge it: one pass, from which come its hits and its predictions."""

from dataclasses import dataclass
from typing import Self

import keras
import numpy as np
from numpy.typing import NDArray

from search.data import Dataset
from storage.hits import Hits
from studies.predictions import CLASSES, Predictions


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The class that a model gives to each image that judges it, (n,), and with which probability, (n,)."""

    dataset: Dataset
    predicted: NDArray[np.int64]
    probability: NDArray[np.float32]

    @classmethod
    def of(cls, net: keras.Model, dataset: Dataset, batch_size: int) -> Self | None:
        """Asks `net`. None if it does not give one number for each class and image."""
        _, x, y = dataset.judged
        parts = []
        for start in range(0, len(y), batch_size):
            # Without `predict`, which compiles for a second or more.
            scores = keras.ops.convert_to_numpy(net(x[start : start + batch_size], training=False))
            if scores.shape != (len(y[start : start + batch_size]), dataset.classes):
                return None
            parts.append(scores.astype(np.float32))
        all_scores = np.concatenate(parts)
        return cls(dataset=dataset, predicted=all_scores.argmax(axis=1), probability=_highest(all_scores))

    @property
    def hits(self) -> Hits:
        """Which of the images the model gets right."""
        judged_on, _, y = self.dataset.judged
        return Hits.of(self.predicted == y, judged_on, self.dataset.judged_fingerprint)

    @property
    def predictions(self) -> Predictions | None:
        """What is kept for people to look at; None with very many classes."""
        if self.dataset.classes > CLASSES:
            return None
        judged_on, x, y = self.dataset.judged
        return Predictions.of(
            judged_on=judged_on,
            images=x,
            labels=y,
            predicted=self.predicted,
            probability=self.probability,
            classes=self.dataset.classes,
        )


def _highest(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    """The probability of the answer to each image, from scores of (n, classes): probabilities, or a model's logits."""
    # Sums of probabilities in bfloat16 are off by some thousandths.
    if scores.min() < 0.0 or np.abs(scores.sum(axis=1) - 1.0).max() > 0.02:
        exponents = np.exp(scores - scores.max(axis=1, keepdims=True))
        scores = exponents / exponents.sum(axis=1, keepdims=True)
    highest: NDArray[np.float32] = scores.max(axis=1)
    return highest
