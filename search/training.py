"""Training one model, epoch after epoch. Knows nothing of Optuna, and uses only ``keras.*``."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import keras
import numpy as np

from search.data import Array, Dataset
from search.errors import DataError
from search.model import BATCH_SIZE, Hyperparameters, build
from search.records import Epoch, Trained
from storage.artifacts import HISTORY, MODEL, written_whole


class NotANumber(Exception):  # noqa: N818 - what happened, in the words of `failure.kind`
    """The loss was NaN or infinite: the model can learn no more."""


def train(
    *,
    model: str,
    hyperparameters: Hyperparameters,
    dataset: Dataset,
    epochs: int,
    seed: int,
    precision: tuple[str, str],
    folder: Path,
    on_epoch: Callable[[Epoch], None],
    stopping: Callable[[], bool],
) -> Trained:
    """Builds `model` and trains it; writes its history, and the best epoch's weights as a whole model, to `folder`.

    `precision` is Keras's dtype policy, and the reason for it. `on_epoch` is told of every epoch at its end; where
    `stopping` says so, the training ends after the running batch and no model is written. The same arguments give
    the same numbers on the same kind of processor with the same software.

    Raises NotANumber, DataError (a batch larger than the data) and ModelError.
    """
    batch_size = int(hyperparameters.get("batch_size", BATCH_SIZE))
    if batch_size > len(dataset.y_train):
        raise DataError(
            f"batch_size = {batch_size} is larger than the {len(dataset.y_train)} training images: choose a smaller one"
        )
    keras.backend.clear_session()
    keras.utils.set_random_seed(seed)
    keras.config.set_dtype_policy(precision[0])
    net = build(model, hyperparameters, dataset.image_shape, dataset.classes)
    y_train, y_validation = (
        keras.utils.to_categorical(y, dataset.classes) for y in (dataset.y_train, dataset.y_validation)
    )
    stop = _StopAtBatch(stopping)
    history: list[Epoch] = []
    best_weights: list[Array] = []
    for epoch in range(1, epochs + 1):
        # An order that only the seed and the epoch decide: a training that goes on at epoch n meets the same.
        order = np.random.default_rng([seed, epoch]).permutation(len(y_train))
        began = time.perf_counter()
        fitted = net.fit(
            dataset.x_train[order],
            y_train[order],
            batch_size=batch_size,
            shuffle=False,
            verbose=0,
            callbacks=[stop],
        )
        seconds = time.perf_counter() - began
        if stop.stopped:
            break
        loss, accuracy = fitted.history["loss"][0], fitted.history["accuracy"][0]
        val_loss, val_accuracy = net.evaluate(
            dataset.x_validation, y_validation, batch_size=_evaluation_batch(batch_size), verbose=0
        )[:2]
        if not math.isfinite(loss):
            raise NotANumber(f"the training loss became {loss} in epoch {epoch}")
        if not math.isfinite(val_loss):
            raise NotANumber(f"the validation loss became {val_loss} in epoch {epoch}")
        record = Epoch(
            epoch=epoch,
            loss=float(loss),
            accuracy=float(accuracy),
            val_loss=float(val_loss),
            val_accuracy=float(val_accuracy),
            seconds=seconds,
            images_per_second=len(y_train) / seconds,
        )
        if not history or record.val_accuracy > max(past.val_accuracy for past in history):
            best_weights = net.get_weights()
        history.append(record)
        on_epoch(record)
    best = max(history, key=lambda past: past.val_accuracy, default=None)  # the first of equals
    _write_history(folder / HISTORY, history)
    if not stop.stopped:
        _write_model(folder / MODEL, net, best_weights, model, hyperparameters, dataset)
    speeds = [past.images_per_second for past in history[1:] or history]
    return Trained(
        value=best.val_accuracy if best else 0.0,
        best_epoch=best.epoch if best else 0,
        epochs=len(history),
        stopped=stop.stopped,
        parameters=net.count_params(),
        seconds=sum(past.seconds for past in history),
        images_per_second=float(np.median(speeds)) if speeds else 0.0,
        precision=precision[0],
        precision_reason=precision[1],
        data_fingerprint=dataset.fingerprint,
        versions=versions(),
    )


def versions() -> dict[str, str]:
    """The software that numbers depend on."""
    backend = keras.backend.backend()
    packages = ("trialyard", "keras", backend, "optuna", "numpy")
    return {"backend": backend} | {package: version(package) for package in packages}


def _evaluation_batch(batch_size: int) -> int:
    # No gradients are kept, so more images fit; larger still was no faster.
    return max(batch_size, 256)


def _write_history(path: Path, history: list[Epoch]) -> None:
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps([asdict(epoch) for epoch in history], indent=1), encoding="utf-8")


def _write_model(
    path: Path, net: keras.Model, weights: list[Array], model: str, h: Hyperparameters, dataset: Dataset
) -> None:
    """Saves the best epoch's model in Keras's own layers, so that it loads without Trialyard."""
    if ":" not in model:
        net = build(model, h, dataset.image_shape, dataset.classes, plain=True)
    net.set_weights(weights)
    with written_whole(path) as temporary:
        net.save(temporary)


class _StopAtBatch(keras.callbacks.Callback):  # type: ignore[misc]
    """Ends a fit after the running batch once `stopping` says so."""

    def __init__(self, stopping: Callable[[], bool]) -> None:
        super().__init__()
        self._stopping = stopping
        self.stopped = False

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        if self._stopping():
            self.stopped = True
            self.model.stop_training = True
