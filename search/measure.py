"""How large the models of a search are, and how fast they train here. Runs in a trainer process."""

import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

import keras

from search.batches import batches
from search.data import Dataset
from search.errors import ModelError
from search.messages import Measured
from search.model import BATCH_SIZE, build, targets
from studies import model_rules, recipe
from studies.definition import Definition
from studies.space import Choice, Point, high_point, low_point

MODELS = 12  # that are built at most
SECONDS = 3.0  # of training a model, to see how fast it is
MAX_BATCHES = 20
EVALUATION_SHARE = 1 / 3  # of the time of a training batch: only the forward pass


def measure(definition: Definition, dataset: Dataset, policy: str) -> Measured:
    """Builds a few models of the space, and trains the smallest and the largest for a few batches.

    `policy` is Keras's dtype policy of the trials. Raises ModelError if none of the models can be built; the training
    may raise anything, such as an error about memory.
    """
    keras.config.set_dtype_policy(policy)
    sizes: list[tuple[int, Mapping[str, Any]]] = []
    for point in _corners(definition):
        hyperparameters = recipe.of_trial(definition, 0, point).hyperparameters
        try:
            sizes.append((_built(definition, hyperparameters, dataset).count_params(), hyperparameters))
        except ModelError as error:  # not every combination must be possible
            problem = error
    if not sizes:
        raise problem
    ends = [choose(sizes, key=lambda size: size[0]) for choose in (min, max)]
    times = [_times(definition, hyperparameters, dataset) for _, hyperparameters in ends]
    return Measured(
        parameters=(ends[0][0], ends[1][0]),
        start_seconds=sum(start for start, _ in times) / 2,
        epoch_seconds=sum(epoch for _, epoch in times) / 2,
    )


def _corners(definition: Definition) -> Iterator[Point]:
    """The points at the ends of the space, and each value at the end of one hyperparameter of the model."""
    space = definition.space
    points = [low_point(space), high_point(space)]
    for name, parameter in space.items():
        if name not in model_rules.TRAINING:
            values = parameter.choices if isinstance(parameter, Choice) else (parameter.high,)
            points += [low_point(space, {name: value}) for value in values]
    different = [point for index, point in enumerate(points) if point not in points[:index]]
    yield from different[:MODELS]


def _built(definition: Definition, hyperparameters: Mapping[str, Any], dataset: Dataset) -> keras.Model:
    keras.backend.clear_session()
    net = build(definition.model, hyperparameters, dataset.image_shape, dataset.classes)
    if not net.built:  # a subclass of keras.Model
        net(dataset.x_train[:1])
    return net


def _times(definition: Definition, hyperparameters: Mapping[str, Any], dataset: Dataset) -> tuple[float, float]:
    """The seconds until a training has made its first batch, and the seconds of an epoch with its evaluation."""
    images, judged = len(dataset.y_train), len(dataset.y_validation)
    batch_size = min(int(hyperparameters.get("batch_size", BATCH_SIZE)), images)
    began = time.perf_counter()
    net = _built(definition, hyperparameters, dataset)
    train = _Training(net, dataset, batch_size)
    train(1)
    start = time.perf_counter() - began
    one_batch = train(1)
    count = min(MAX_BATCHES, images // batch_size, max(1, int(SECONDS / one_batch)))
    batch = train(count) / count
    return start, batch * (math.ceil(images / batch_size) + EVALUATION_SHARE * math.ceil(judged / batch_size))


class _Training:
    def __init__(self, net: keras.Model, dataset: Dataset, batch_size: int) -> None:
        self._net, self._batch_size = net, batch_size
        used = MAX_BATCHES * batch_size
        self._x, self._y = dataset.x_train[:used], targets(net, dataset.y_train[:used], dataset.classes)

    def __call__(self, count: int) -> float:
        """Trains `count` batches; returns the seconds."""
        images = count * self._batch_size
        prepared = batches(self._x[:images], self._y[:images], self._batch_size)
        began = time.perf_counter()
        self._net.fit(**prepared, shuffle=False, verbose=0)
        return time.perf_counter() - began
