"""Trialyard's training against plain ``model.fit``, as the notebook calls it, on the same MNIST images.

    TRIALYARD_DATA=folder-with-mnist.npz python bench/training.py [--images 60000] [--epochs 4]

It trains depth 7 (dropout 0.2) and depth 5 with the notebook's hyperparameters: Adam, batch size 128, accuracy on the
10,000 test images after each epoch. The plain side is float32 with Keras's layers, on images that were divided by 255
before. The two take turns, epoch by epoch, so that a busy machine slows both. Prints a table with the ratio of images/s
of the training alone; the seconds of a whole epoch with its evaluation; and each side's best accuracy over the epochs,
as the notebook reports it. Speeds are medians without the first epoch, which compiles. With fewer images, the accuracy
of one training varies by a percentage point. It takes half an hour on two cores.
"""

import argparse
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
from rich.console import Console
from rich.table import Table

from search import data, devices
from search.data import Dataset
from search.messages import Epoch
from search.training_loop import train
from storage import settings
from studies.definition import Data

BATCH = 128
MODELS = ({"depth": 7, "dropout": 0.2}, {"depth": 5})


def plain_model(depth: int) -> keras.Model:
    """The notebook's model of this depth, with Keras's own layers."""
    conv, pool = keras.layers.Conv2D, keras.layers.MaxPooling2D
    batch_norm, dropout = keras.layers.BatchNormalization, keras.layers.Dropout
    body = {
        5: lambda: [
            *(conv(32, 3, activation="relu"), conv(32, 3, activation="relu"), pool()),
            *(conv(32, 5, activation="relu"), batch_norm(), conv(64, 3, activation="relu"), pool()),
            *(conv(128, 2, activation="relu"), batch_norm()),
        ],
        7: lambda: [
            *(conv(32, 3, activation="relu") for _ in range(3)),
            *(dropout(0.2), conv(64, 3, activation="relu"), conv(64, 3, activation="relu"), dropout(0.2)),
            *(batch_norm(), conv(64, 5, activation="relu"), conv(128, 2, activation="relu"), batch_norm()),
        ],
    }
    model = keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            *body[depth](),
            keras.layers.Flatten(),
            keras.layers.Dense(128, activation="relu"),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )
    model.compile(optimizer="adam", loss="categorical_crossentropy", metrics=["accuracy"])
    return model


class _Timed(keras.callbacks.Callback):  # type: ignore[misc]
    """Seconds of an epoch's batches, without its validation."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def on_epoch_begin(self, epoch: int, logs: object = None) -> None:
        self._began = time.perf_counter()

    def on_test_begin(self, logs: object = None) -> None:
        self.seconds.append(time.perf_counter() - self._began)


def compare(
    hyperparameters: Mapping[str, float], dataset: Dataset, epochs: int
) -> list[tuple[str, float, float, float]]:
    """(name, images/s, seconds of an epoch, accuracy), the plain training first."""
    x, y = dataset.x_train[:].astype("float32") / 255, keras.utils.to_categorical(dataset.y_train)
    x_test, y_test = dataset.x_validation.astype("float32") / 255, keras.utils.to_categorical(dataset.y_validation)
    precision = devices.precision_for(devices.slots()[0].device, "auto")
    plain: list[keras.Model] = []
    timed, plain_accuracies = _Timed(), list[float]()
    turns: list[float] = []  # when each turn started: ours, plain, ours, ...

    def plain_epoch(record: Epoch) -> None:
        turns.append(time.perf_counter())
        if not plain:
            keras.config.set_dtype_policy("float32")
            plain.append(plain_model(int(hyperparameters["depth"])))
        result = plain[0].fit(
            x, y, batch_size=BATCH, epochs=1, verbose=0, validation_data=(x_test, y_test), callbacks=[timed]
        )
        plain_accuracies.append(result.history["val_accuracy"][0])
        records.append(record)
        turns.append(time.perf_counter())

    records: list[Epoch] = []
    with tempfile.TemporaryDirectory() as folder:
        turns.append(time.perf_counter())
        train(
            model="convnet",
            hyperparameters={**hyperparameters} | {"batch_size": BATCH},
            dataset=dataset,
            epochs=epochs,
            seed=0,
            precision=precision,
            folder=Path(folder),
            on_epoch=plain_epoch,
            stopping=lambda: None,
        )
    ours = statistics.median(record.images_per_second for record in records[1:])
    plain_speed = len(y) / statistics.median(timed.seconds[1:])
    lengths = [end - begin for begin, end in itertools.pairwise(turns)]
    our_epoch, plain_epoch_seconds = statistics.median(lengths[2::2]), statistics.median(lengths[3::2])
    return [
        ("model.fit, float32", plain_speed, plain_epoch_seconds, max(plain_accuracies)),
        (f"Trialyard, {precision[0]}", ours, our_epoch, max(record.val_accuracy for record in records)),
    ]


def main() -> None:
    """Runs both depths and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=60_000)
    parser.add_argument("--epochs", type=int, default=4)
    arguments = parser.parse_args()
    dataset = data.load("mnist", Data(validation="test", limit=arguments.images), settings.load().data_folders)
    device = devices.slots()[0].device
    table = Table(
        title=f"MNIST, {arguments.images:,} images, {arguments.epochs} epochs, batch {BATCH}\n"
        f"{device.name}, {os.cpu_count()} cores: {devices.precision_for(device, 'auto')[1]}"
    )
    for title in ("depth", "", "images/s", "ratio", "seconds an epoch", "best test accuracy"):
        table.add_column(title, justify="right" if title else "left")
    for hyperparameters in MODELS:
        rows = compare(hyperparameters, dataset, arguments.epochs)
        for what, speed, seconds, accuracy in rows:
            ratio = speed / rows[0][1]
            figures = (f"{speed:,.0f}", f"{ratio:.2f}", f"{seconds:.1f}", f"{accuracy:.4f}")
            table.add_row(str(hyperparameters["depth"]), what, *figures)
    Console().print(table)


if __name__ == "__main__":
    main()
