"""Fair scores: a model is judged with the batch normalisation statistics of the last batches that it trained on.

Keras's moving averages start at mean 0 and variance 1, and add each batch with the weight 1 - m, where m is the
momentum (0.99). So they lag by about a hundred batches. After 192 batches the start values still have the weight 0.14,
and batches from before the model had learned much have most of the rest: a model that trained to 98.6 % got a score of
9.2 %.

The average over the last k batches alone follows from the averages before and after them. It is the bias correction of
Adam's moments (Kingma and Ba, 2015, section 3), with the values before the k batches as the start values:

    (after - m^k * before) / (1 - m^k)

k is small while a model learns fast, and grows as it slows down (`window`). In long trainings this is Keras's own
average, because m^k is nearly 0.

The training does not change, because batch normalisation trains with the statistics of the batch. While a model trains,
and in its checkpoints, the averages are those of Keras. Others take their place only while the model is evaluated, and
in the saved model.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from search import checkpoint
from search.images import Array

# Far larger than any real mean: the share of it that is left after one step shows how often the average was updated.
PROBE = 1e6


# Fewer images would make the statistics noisy, more would make them older than the weights.
LEAST_IMAGES = 512
# The window grows with this share of the batches so far.
SHARE = 1 / 16


@dataclass(frozen=True, kw_only=True)
class _Averages:
    """A layer, and how often a training step updates its moving averages."""

    layer: keras.layers.BatchNormalization
    updates: int  # more than 1 where a model calls one layer several times

    @property
    def variables(self) -> tuple[Any, Any]:
        return self.layer.moving_mean, self.layer.moving_variance


class MovingAverages:
    """The moving averages of a model's batch normalisation."""

    def __init__(self, averages: Sequence[_Averages] = ()) -> None:
        self._averages = averages

    def __bool__(self) -> bool:
        return bool(self._averages)

    def now(self) -> list[Array]:
        """The mean and the variance of each layer, each of (channels,)."""
        return [_value(variable) for averages in self._averages for variable in averages.variables]

    @contextmanager
    def of_batches(self, before: Sequence[Array], after: Sequence[Array], batches: int) -> Iterator[None]:
        """Gives the model the averages over some batches alone, while the block runs.

        `before` and `after` is what `now` gave before and after these `batches`. At the end of the block the model has
        the same averages as at its begin, to the bit.
        """
        originals = self.now()
        values = iter(zip(before, after, strict=True))
        for averages in self._averages:
            weight = float(averages.layer.momentum ** (averages.updates * batches))
            for variable, least in zip(averages.variables, (-np.inf, 0.0), strict=True):  # rounding may go below 0
                earlier, later = next(values)
                alone = (later.astype(np.float64) - weight * earlier) / (1.0 - weight)
                variable.assign(np.maximum(alone, least).astype(np.float32))
        try:
            yield
        finally:
            originals_left = iter(originals)
            for averages in self._averages:
                for variable in averages.variables:
                    variable.assign(next(originals_left))


class LastBatches(keras.callbacks.Callback):  # type: ignore[misc]
    """Watches the `fit` of one epoch, and notes the averages before and after its last batches (see `window`).

    The epoch trains on `images` images in batches of `batch_size`, after `trained` batches in earlier epochs. A smaller
    batch at its end is left out: each of its images would count for more.
    """

    def __init__(self, averages: MovingAverages, *, images: int, batch_size: int, trained: int) -> None:
        super().__init__()
        self._averages = averages
        self._whole, self._all = images // batch_size, math.ceil(images / batch_size)
        self._batches = window(trained + self._whole, self._whole, batch_size)

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        # A model may be compiled to run several batches in one go, and is seen only after them.
        in_one_go = self.model.steps_per_execution
        self._begin = (self._whole - self._batches) // in_one_go * in_one_go
        self._end = self._whole // in_one_go * in_one_go
        if self._end <= self._begin:
            self._end = self._all
        self._before = self._after = self._averages.now()

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        if batch + 1 == self._begin:
            self._before = self._now()
        elif batch + 1 == self._end:
            self._after = self._now()

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        if self._end == self._all:
            self._after = self._averages.now()

    def applied(self) -> AbstractContextManager[None]:
        """While the block runs, the model has the averages over the epoch's last batches alone."""
        return self._averages.of_batches(self._before, self._after, self._end - self._begin)

    def _now(self) -> list[Array]:
        if keras.backend.backend() == "jax" and self._averages:
            self.model.jax_state_sync()  # during a fit the values are in JAX's own state
        return self._averages.now()


def window(trained: int, epoch: int, batch_size: int) -> int:
    """With how many batches a model is judged after `trained` batches, `epoch` of them in the last epoch."""
    return min(epoch, max(2, math.ceil(LEAST_IMAGES / batch_size), int(SHARE * trained)))


def of_builtin(net: keras.Model) -> MovingAverages:
    """The moving averages of a new built-in model: a step updates each layer once."""
    return MovingAverages([_Averages(layer=layer, updates=1) for layer in _layers(net)])


def of_own(net: keras.Model, train_one_batch: Callable[[], object]) -> MovingAverages:
    """The moving averages of a user's own model `net`, which is compiled, built and not trained.

    A layer may be shared or frozen, so it is not known how often a step updates it. `train_one_batch` is called to
    measure this; then its changes of variables, optimizer and random generators are undone.
    """
    layers = _layers(net)
    if not layers:
        return MovingAverages()
    net.optimizer.build(net.trainable_variables)
    before = checkpoint.take(net, [], [])
    averages = MovingAverages([_Averages(layer=layer, updates=0) for layer in layers])
    starts = averages.now()
    train_one_batch()
    # A frozen layer is never updated, but uses its averages: the probe would spoil the output of all later layers.
    changed = [not np.array_equal(one, other) for one, other in zip(starts, averages.now(), strict=True)]
    updated = [
        layer for layer, mean, variance in zip(layers, changed[::2], changed[1::2], strict=True) if mean or variance
    ]
    checkpoint.restore(net, before)
    for layer in updated:
        layer.moving_mean.assign(np.full(layer.moving_mean.shape, PROBE, np.float32))
    train_one_batch()
    measured = []
    for layer in updated:
        share_left = float(np.median(_value(layer.moving_mean))) / PROBE
        updates = round(float(np.log(share_left) / np.log(layer.momentum))) if 0.0 < share_left < 1.0 else 0
        if updates:
            measured.append(_Averages(layer=layer, updates=updates))
    checkpoint.restore(net, before)
    return MovingAverages(measured)


def _layers(net: keras.Model) -> list[keras.layers.BatchNormalization]:
    # `net.layers` does not have the layers inside other layers.
    return [
        layer
        for layer in net._flatten_layers(include_self=False)
        if isinstance(layer, keras.layers.BatchNormalization)
        and layer.built
        # Batch renormalisation trains with its averages: corrected averages would belong to another model.
        and not layer.renorm
        and 0.0 < layer.momentum < 1.0
    ]


def _value(variable: Any) -> Array:
    return np.array(keras.ops.convert_to_numpy(variable))
