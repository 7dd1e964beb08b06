"""What a model answers to the images that judge it: one pass, from which come its hits and its predictions."""

from dataclasses import dataclass
from typing import Self

import keras
import numpy as np
from numpy.typing import NDArray

from search.data import Dataset
from storage.hits import Hits
from studies.predictions import CLASSES, Predictions

ROUNDING = 0.02  # of a probability in bfloat16


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
        predicted, probability = np.empty(len(y), np.int64), np.empty(len(y), np.float32)
        for start in range(0, len(y), batch_size):
            part = slice(start, start + batch_size)
            # Without `predict`, which compiles for a second or more.
            outputs = net(x[part], training=False)
            if not hasattr(outputs, "shape") or tuple(outputs.shape) != (len(y[part]), dataset.classes):
                return None
            # Not all scores at once: with a thousand classes they would be larger than the images.
            scores = keras.ops.convert_to_numpy(outputs).astype(np.float32)
            predicted[part], probability[part] = scores.argmax(axis=1), _highest(scores)
        return cls(dataset=dataset, predicted=predicted, probability=probability)

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
    """The probability of the answer to each image, from scores of (n, classes): logits, or probabilities.

    Those of a sigmoid for each class do not sum to 1, and are taken as they are.
    """
    if scores.min() < 0.0 or scores.max() > 1.0 + ROUNDING:
        exponents = np.exp(scores - scores.max(axis=1, keepdims=True))
        scores = exponents / exponents.sum(axis=1, keepdims=True)
    highest: NDArray[np.float32] = scores.max(axis=1)
    return highest
