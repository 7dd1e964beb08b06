"""Fair scores: the moving averages of batch normalisation, corrected for where they started.

Keras starts them at mean 0 and variance 1 and then takes each batch with the weight 1 - m, where m is the momentum
(0.99). After t steps the start still has the weight m^t: 0.14 after 192 steps. A short run is therefore judged by
statistics that are not those of its images: a model that trained to 98.6 % was scored 9.2 %. The bias correction of
Adam's moments (Kingma and Ba, 2015, section 3) removes it: without the start, each batch has the weight
(1 - m) / (1 - m^t), and the corrected average is

    (average - m^t * start) / (1 - m^t)

The training itself does not change: batch normalisation trains with the statistics of the batch. So the averages stay
as Keras has them while a model trains, in its checkpoints too, and are corrected only while it is judged and in what
is saved.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import keras
import numpy as np

from search import checkpoint
from search.data import Array

# Far from every mean that images lead to, so that what is left of it after one step tells how often it was updated.
PROBE = 1e6


@dataclass(frozen=True, kw_only=True)
class _Averages:
    """Those of one layer, and their values before its first update."""

    layer: keras.layers.BatchNormalization
    start_mean: Array  # (channels,)
    start_variance: Array  # (channels,)
    updates: int  # per training step: more than 1 where a model calls one layer several times

    def start_weight(self, steps: int) -> float:
        """The weight that the start still has after so many training steps."""
        return float(self.layer.momentum ** (self.updates * steps))


class MovingAverages:
    """The moving averages of a model's batch normalisation."""

    def __init__(self, averages: Sequence[_Averages] = ()) -> None:
        self._averages = averages

    def __bool__(self) -> bool:
        return bool(self._averages)

    @contextmanager
    def corrected(self, steps: int) -> Iterator[None]:
        """While the block runs, the model has corrected averages; `steps` is how many batches it has trained on.

        Afterwards it has its own again, to the bit.
        """
        changed: list[tuple[Any, Array]] = []
        for one in self._averages:
            weight = one.start_weight(steps)
            if not 0.0 < weight < 1.0:
                continue  # nothing of the start is left, or nothing else is there
            for variable, start, least in (
                (one.layer.moving_mean, one.start_mean, -np.inf),
                (one.layer.moving_variance, one.start_variance, 0.0),
            ):
                now = _value(variable)
                changed.append((variable, now))
                fair = (now.astype(np.float64) - weight * start) / (1.0 - weight)
                variable.assign(np.maximum(fair, least).astype(np.float32))  # rounding may go below 0
        try:
            yield
        finally:
            for variable, now in changed:
                variable.assign(now)


def of_builtin(net: keras.Model) -> MovingAverages:
    """The averages of one of our own models, `net`, which is new: each layer is updated once a step."""
    return MovingAverages([_start(layer, updates=1) for layer in _layers(net)])


def of_own(net: keras.Model, train_one_batch: Callable[[], object]) -> MovingAverages:
    """The averages of a user's model, `net`, which is compiled, built, and not trained yet.

    How often a step updates each layer is not known: a layer may be shared or frozen. So `train_one_batch` is
    called, and what it changes is undone: variables, optimizer and random generators.
    """
    layers = _layers(net)
    if not layers:
        return MovingAverages()
    net.optimizer.build(net.trainable_variables)
    before = checkpoint.take(net, [], [])
    starts = [_start(layer, updates=0) for layer in layers]
    train_one_batch()
    # A layer that is never updated may still be used, as in a frozen network: the probe would spoil what follows it.
    updated = [
        start
        for start in starts
        if not np.array_equal(_value(start.layer.moving_mean), start.start_mean)
        or not np.array_equal(_value(start.layer.moving_variance), start.start_variance)
    ]
    checkpoint.restore(net, before)
    for one in updated:
        one.layer.moving_mean.assign(np.full_like(one.start_mean, PROBE))
    train_one_batch()
    averages = []
    for one in updated:
        left = float(np.median(_value(one.layer.moving_mean))) / PROBE
        updates = round(float(np.log(left) / np.log(one.layer.momentum))) if 0.0 < left < 1.0 else 0
        if updates:
            averages.append(replace(one, updates=updates))
    checkpoint.restore(net, before)
    return MovingAverages(averages)


def _start(layer: keras.layers.BatchNormalization, updates: int) -> _Averages:
    return _Averages(
        layer=layer,
        start_mean=_value(layer.moving_mean),
        start_variance=_value(layer.moving_variance),
        updates=updates,
    )


def _layers(net: keras.Model) -> list[keras.layers.BatchNormalization]:
    # Also those inside other layers, which `net.layers` does not list.
    return [
        layer
        for layer in net._flatten_layers(include_self=False)
        if isinstance(layer, keras.layers.BatchNormalization)
        and layer.built
        # Batch renormalisation trains with its averages: a correction would judge another model than the one trained.
        and not layer.renorm
        and 0.0 < layer.momentum < 1.0
    ]


def _value(variable: Any) -> Array:
    return np.array(keras.ops.convert_to_numpy(variable))
