"""Fair scores: corrects the moving averages of batch normalisation for their start values.

Keras starts them at mean 0 and variance 1, and adds each batch with the weight 1 - m, where m is the momentum (0.99).
After t steps the start values still have the weight m^t: 0.14 after 192 steps. So a short run is judged with statistics
that are not those of its images: a model that trained to 98.6 % got a score of 9.2 %. The bias correction of Adam's
moments (Kingma and Ba, 2015, section 3) removes the start values:

    (average - m^t * start) / (1 - m^t)

The training does not change, because batch normalisation trains with the statistics of the batch. While a model trains,
and in its checkpoints, the averages are those of Keras. They are corrected only while the model is evaluated, and in
the saved model.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np

from search import checkpoint
from search.data import Array

# Far larger than any real mean: the share of it that is left after one step shows how often the average was updated.
PROBE = 1e6


@dataclass(frozen=True, kw_only=True)
class _Averages:
    """A layer, and the start values of its moving averages."""

    layer: keras.layers.BatchNormalization
    start_mean: Array  # (channels,)
    start_variance: Array  # (channels,)
    updates: int  # per training step: more than 1 where a model calls one layer several times

    def start_weight(self, steps: int) -> float:
        """The weight of the start values after so many training steps."""
        return float(self.layer.momentum ** (self.updates * steps))


class MovingAverages:
    """The moving averages of a model's batch normalisation."""

    def __init__(self, averages: Sequence[_Averages] = ()) -> None:
        self._averages = averages

    def __bool__(self) -> bool:
        return bool(self._averages)

    @contextmanager
    def corrected(self, steps: int) -> Iterator[None]:
        """Corrects the model's averages while the block runs; `steps` is how many batches it has trained on.

        Afterwards the model has the same averages as before, to the bit.
        """
        originals: list[tuple[Any, Array]] = []
        for averages in self._averages:
            weight = averages.start_weight(steps)
            if not 0.0 < weight < 1.0:
                continue  # the start values have no weight, or all of it
            for variable, start, least in (
                (averages.layer.moving_mean, averages.start_mean, -np.inf),
                (averages.layer.moving_variance, averages.start_variance, 0.0),
            ):
                original = _value(variable)
                originals.append((variable, original))
                corrected = (original.astype(np.float64) - weight * start) / (1.0 - weight)
                variable.assign(np.maximum(corrected, least).astype(np.float32))  # rounding may go below 0
        try:
            yield
        finally:
            for variable, original in originals:
                variable.assign(original)


def of_builtin(net: keras.Model) -> MovingAverages:
    """The moving averages of a new built-in model: a step updates each layer once."""
    return MovingAverages([_start(layer, updates=1) for layer in _layers(net)])


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
    starts = [_start(layer, updates=0) for layer in layers]
    train_one_batch()
    # A frozen layer is never updated, but uses its averages: the probe would spoil the output of all later layers.
    updated = [
        start
        for start in starts
        if not np.array_equal(_value(start.layer.moving_mean), start.start_mean)
        or not np.array_equal(_value(start.layer.moving_variance), start.start_variance)
    ]
    checkpoint.restore(net, before)
    for start in updated:
        start.layer.moving_mean.assign(np.full_like(start.start_mean, PROBE))
    train_one_batch()
    measured = []
    for start in updated:
        share_left = float(np.median(_value(start.layer.moving_mean))) / PROBE
        updates = round(float(np.log(share_left) / np.log(start.layer.momentum))) if 0.0 < share_left < 1.0 else 0
        if updates:
            measured.append(replace(start, updates=updates))
    checkpoint.restore(net, before)
    return MovingAverages(measured)


def _start(layer: keras.layers.BatchNormalization, updates: int) -> _Averages:
    return _Averages(
        layer=layer,
        start_mean=_value(layer.moving_mean),
        start_variance=_value(layer.moving_variance),
        updates=updates,
    )


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
