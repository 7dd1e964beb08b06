"""Are short trainings scored as what they have learned?

    TRIALYARD_DATA=folder-with-mnist.npz python bench/scores.py [--depths 5 7] [--dropout 0.25] [--seeds 1 2]

Trains on 4,000 images of MNIST in batches of 128. After each epoch it judges the model on 2,000 others in four ways:

- keras: with Keras's moving averages of batch normalisation;
- scored: as Trialyard does, with the averages over the last batches alone (`search/averages.py`);
- again: with the averages over the same batches, which pass the model once more after the epoch, as in a training: with
  dropout, and with the weights that are judged;
- measured: with means and variances over all training images, without dropout, measured one layer after the other.
  That takes more than a pass over them for each layer.

It prints a line of JSON for each epoch.
"""

import argparse
import json
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np

from search import averages, data
from search.averages import LastBatches
from search.data import Dataset
from search.images import Array, Images
from search.model import build
from storage.settings import load
from studies.definition import Data

BATCH = 128
AGAIN = 4  # batches: 512 images


def accuracy(model: keras.Model, dataset: Dataset) -> float:
    """On the validation images."""
    predicted = model.predict(dataset.x_validation, batch_size=256, verbose=0).argmax(axis=1)
    return round(float((predicted == dataset.y_validation).mean()), 4)


def measure(model: keras.Model, images: Array | Images) -> None:
    """Gives each batch normalisation the mean and the variance of its inputs over all images, the first layer first."""
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            inputs = keras.Model(model.inputs, layer.input).predict(images[:], batch_size=256, verbose=0)
            layer.moving_mean.assign(inputs.mean(axis=(0, 1, 2), dtype=np.float64))
            layer.moving_variance.assign(inputs.var(axis=(0, 1, 2), dtype=np.float64))


def pass_again(
    model: keras.Model, moving: averages.MovingAverages, batches: Sequence[Array]
) -> AbstractContextManager[None]:
    """While the block runs, the model has the averages over these batches alone, with the weights that it has now."""
    before, variables = moving.now(), [np.array(keras.ops.convert_to_numpy(each)) for each in model.variables]
    for batch in batches:
        model(batch, training=True)
    after = moving.now()
    for variable, value in zip(model.variables, variables, strict=True):  # the random states of dropout, too
        variable.assign(value)
    return moving.of_batches(before, after, len(batches))


def run(depth: int, dropout: float, seed: int, epochs: int) -> None:
    """Trains one model, and prints its scores after each epoch."""
    dataset = data.load("mnist", Data(limit=4000, validation=2000 / 60000, seed=seed), load().data_folders)
    labels = keras.utils.to_categorical(dataset.y_train, dataset.classes)
    keras.backend.clear_session()
    keras.utils.set_random_seed(seed)
    hyperparameters = {"depth": depth, "dropout": dropout}
    net = build("convnet", hyperparameters, dataset.image_shape, dataset.classes)
    plain = build("convnet", hyperparameters, dataset.image_shape, dataset.classes, plain=True)
    moving, images = averages.of_builtin(net), len(labels)
    for epoch in range(1, epochs + 1):
        last = LastBatches(moving, images=images, batch_size=BATCH, trained=(epoch - 1) * -(-images // BATCH))
        order = np.random.default_rng([seed, epoch]).permutation(images)
        fitted = net.fit(
            *(dataset.x_train[order], labels[order]), batch_size=BATCH, shuffle=False, verbose=0, callbacks=[last]
        )
        plain.set_weights(net.get_weights())
        scores = {"keras": accuracy(plain, dataset)}
        with last.applied():
            plain.set_weights(net.get_weights())
        scores["scored"] = accuracy(plain, dataset)
        whole = images // BATCH
        parts = [order[at * BATCH : (at + 1) * BATCH] for at in range(max(0, whole - AGAIN), whole)]
        with pass_again(net, moving, [dataset.x_train[part] for part in parts]):
            plain.set_weights(net.get_weights())
        scores["again"] = accuracy(plain, dataset)
        measure(plain, dataset.x_train)
        scores["measured"] = accuracy(plain, dataset)
        train = round(float(fitted.history["accuracy"][0]), 4)
        about = {"depth": depth, "dropout": dropout, "seed": seed, "epoch": epoch, "training": train}
        print(json.dumps(about | scores), flush=True)


def main() -> None:
    """Reads the arguments and runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[5, 7])
    parser.add_argument("--dropout", type=float, default=0.25)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--epochs", type=int, default=6)
    given = parser.parse_args()
    for depth in given.depths:
        for seed in given.seeds:
            run(depth, given.dropout, seed, given.epochs)


if __name__ == "__main__":
    main()
