"""Trains one model, epoch after epoch. Does not know Optuna, and uses only ``keras.*``."""

import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import keras
import numpy as np

from search import averages, checkpoint
from search.answers import Answers
from search.batches import batches
from search.data import Dataset
from search.device_errors import is_of_the_disk
from search.errors import DataError, MetricError, ModelError
from search.images import Array
from search.messages import Batches, Epoch, Repeated, StopMode, Trained, best_epoch, versions
from search.model import BATCH_SIZE, Hyperparameters, accuracy_of, build, summary, targets
from search.own_model import IMAGES, check_file
from storage.artifacts import CHECKPOINT, HISTORY, MODEL, PREDICTIONS, SUMMARY, stored
from storage.errors import StorageError, named_error

log = logging.getLogger(__name__)

BATCHES_SECONDS = 1.0  # the shortest time between two messages about batches


class NotANumber(Exception):  # noqa: N818 - named like the `failure.kind`
    """The loss was NaN or infinite, or no epoch had a finite score: the training has no result."""


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
    stopping: Callable[[], StopMode | None],
    checkpoints: Sequence[Path] = (),
    identity: Mapping[str, Any] | None = None,
    schedule_epochs: int | None = None,
    more_seeds: Sequence[int] = (),
    on_resume: Callable[[list[Epoch]], None] = lambda history: None,
    on_repeat: Callable[[Repeated], None] = lambda repeated: None,
    on_batches: Callable[[Batches], None] = lambda batches: None,
    checkpoint_seconds: float = 30.0,
) -> Trained:
    """Builds `model` and trains it; writes to `folder` its history, its summary and the model of the best epoch.

    Also what that model answers to the images that judge it (`studies.predictions`).

    With test images in the `dataset` it is a confirmation: the number of epochs was chosen before, so the model of the
    last epoch is kept, and judged by these images once.

    It continues from the longest of the `checkpoints` (paths that may not exist) that is of this very training, and
    tells `on_resume` of the epochs that it has already. `identity` is what makes it this training, besides the other
    arguments; it must be JSON. It writes a checkpoint to `folder` at the end of an epoch, at most every
    `checkpoint_seconds`.

    `schedule_epochs` is how many epochs the learning rate's schedule is for, if not for `epochs`. With the
    hyperparameter `patience_epochs` the training ends after so many epochs without a better one.

    With `more_seeds` it trains once from each seed, for `epochs` each, and `on_repeat` gets the value of each repeat at
    its end. Epochs are numbered through all repeats. Their mean is the result, and the model of the best epoch of all
    is kept.

    `precision` is Keras's dtype policy and the reason for it. `on_epoch` gets each epoch at its end, and
    `on_batches` how far the running one is, at most every BATCHES_SECONDS. When `stopping` returns a mode, the training
    ends after the running batch and writes no model: "keep" writes a checkpoint of the last complete epoch, "drop" does
    not. The same arguments give the same numbers on the same kind of processor with
    the same software, interrupted or not. An epoch whose validation accuracy is not finite stays in the history, but is
    never the best.

    Raises NotANumber, DataError (a batch is larger than the data), ModelError, also as MetricError, and
    DiskError if a file cannot be written.
    """
    training = _Training(
        model=model,
        hyperparameters=hyperparameters,
        dataset=dataset,
        epochs=epochs,
        seeds=(seed, *more_seeds),
        precision=precision[0],
        schedule_epochs=schedule_epochs or epochs,
        stop=_StopAtBatch(stopping),
        on_batches=on_batches,
    )
    whole_identity = {**training.identity(), **(identity or {})}
    history, kept_weights = _resumed(training.net, checkpoints, whole_identity)
    if history:
        on_resume(history)
    # How long a confirmation trains was chosen before.
    patience = None if training.confirms else hyperparameters.get("patience_epochs")
    repeats = _Repeats(epochs, patience, on_repeat if more_seeds else lambda repeated: None)
    repeats.notify(history)
    unwritten: checkpoint.Checkpoint | None = None
    written_at, last = time.monotonic(), epochs * len(training.seeds)
    for number in range(history[-1].epoch + 1 if history else 1, last + 1):
        repeat, epoch = repeats.place(number)
        if epoch == 1 and repeat > 1:
            training.start(repeat)
        if repeats.is_exhausted(history, repeat):
            continue
        trained = training.train_epoch(number, repeat, epoch)
        if trained is None:
            break
        record, judged_weights = trained
        history.append(record)
        if training.confirms or best_epoch(history) is record:
            kept_weights = judged_weights
        on_epoch(record)
        repeats.notify(history)
        if number < last:
            unwritten = checkpoint.take(training.net, history, kept_weights)
            if time.monotonic() - written_at >= checkpoint_seconds:
                checkpoint.write(folder / CHECKPOINT, unwritten, whole_identity)
                unwritten, written_at = None, time.monotonic()
    if training.is_stopped and unwritten is not None and stopping() == "keep":
        checkpoint.write(folder / CHECKPOINT, unwritten, whole_identity)
    _write_history(folder / HISTORY, history)
    with stored(folder / SUMMARY) as temporary:
        temporary.write_text(summary(training.net), encoding="utf-8")
    unsaved = answers = None
    if not training.is_stopped:
        kept = _kept(training.net, kept_weights, model, hyperparameters, dataset)
        unsaved = _save(kept, folder / MODEL, model, dataset)
        answers = None if more_seeds else Answers.of(kept, dataset, _evaluation_batch(training.batch_size))
    predictions = answers.predictions if answers is not None else None
    if predictions is not None:
        predictions.write(folder / PREDICTIONS)
    result = _result(training, history, repeats, answers, precision[1])
    return replace(result, has_predictions=predictions is not None, unsaved=unsaved)


class _Training:
    """What stays the same over the epochs of one training, and the model that it trains at the moment."""

    def __init__(
        self,
        *,
        model: str,
        hyperparameters: Hyperparameters,
        dataset: Dataset,
        epochs: int,  # of each repeat
        seeds: Sequence[int],  # one for each repeat
        precision: str,  # Keras's dtype policy
        schedule_epochs: int,
        stop: "_StopAtBatch",
        on_batches: Callable[[Batches], None],
    ) -> None:
        self.model, self.hyperparameters, self.dataset = model, hyperparameters, dataset
        self.epochs, self.seeds, self.precision, self.schedule_epochs = epochs, seeds, precision, schedule_epochs
        self.confirms = dataset.x_test is not None
        self.batch_size = _batch_size(hyperparameters, dataset)
        self._batches_per_epoch = math.ceil(len(dataset.y_train) / self.batch_size)
        self._stop, self._watch = stop, _WatchBatches(on_batches, self._batches_per_epoch)
        self.net = self._untrained(1)
        self._y_train, self._y_validation = (
            targets(self.net, y, dataset.classes) for y in (dataset.y_train, dataset.y_validation)
        )
        self._averages = self._moving_averages()

    @property
    def is_stopped(self) -> bool:
        """Whether it was asked to stop, and did, before its last epoch had ended."""
        return self._stop.stopped

    def start(self, repeat: int) -> None:
        """From now on trains a new model, from the seed of this repeat (from 1)."""
        self.net = self._untrained(repeat)
        self._averages = self._moving_averages()

    def identity(self) -> dict[str, Any]:
        """What makes it this very training and no other, as JSON: a checkpoint of another one is not used."""
        # How a model is judged is not one of its hyperparameters, and models without moving averages are judged alike.
        judged = {"batch_norm_averages": "last batches"} if self._averages else {}
        scheduled = {"schedule_epochs": self.schedule_epochs} if self.schedule_epochs != self.epochs else {}
        repeated = {"more_seeds": list(self.seeds[1:])} if len(self.seeds) > 1 else {}
        hyperparameters = {name: value for name, value in self.hyperparameters.items() if name != "batch_norm_averages"}
        return {
            "model": self.model,
            "hyperparameters": hyperparameters,
            "seed": self.seeds[0],
            "data": self.dataset.fingerprint,
            "images": [len(self._y_train), len(self._y_validation)],
            "epochs": self.epochs,
            "precision": self.precision,
            "keras": ".".join(version("keras").split(".")[:2]),
            **judged,
            **scheduled,
            **repeated,
        }

    def train_epoch(self, number: int, repeat: int, epoch: int) -> tuple[Epoch, list[Array]] | None:
        """Trains and judges the epoch `number` of the whole training, which is `epoch` of its `repeat`, all from 1.

        Returns its record and the weights that were judged; None if it was asked to stop. Raises NotANumber.
        """
        images = len(self._y_train)
        # The order depends only on the seed and the epoch, so it is the same in a resumed training.
        order = np.random.default_rng([self.seeds[repeat - 1], epoch]).permutation(images)
        began = time.perf_counter()
        prepared = batches(self.dataset.x_train, self._y_train, self.batch_size, order)
        last_batches = averages.LastBatches(
            self._averages,
            images=images,
            batch_size=self.batch_size,
            trained=(epoch - 1) * self._batches_per_epoch,
        )
        self._watch.epoch = number
        callbacks = [self._stop, last_batches, self._watch]
        fitted = self.net.fit(**prepared, shuffle=False, verbose=0, callbacks=callbacks).history
        seconds = time.perf_counter() - began
        if self.is_stopped:
            return None
        loss, accuracy = fitted["loss"][0], accuracy_of(fitted, self.model)[0]
        prepared = batches(self.dataset.x_validation, self._y_validation, _evaluation_batch(self.batch_size))
        with last_batches.applied():
            evaluation = self.net.evaluate(**prepared, verbose=0, return_dict=True)
            judged_weights = self.net.get_weights()
        val_loss, val_accuracy = evaluation["loss"], accuracy_of(evaluation, self.model)
        for kind, value in (("training", loss), ("validation", val_loss)):
            if not math.isfinite(value):
                raise NotANumber(f"the {kind} loss became {value} in epoch {number}")
        record = Epoch(
            epoch=number,
            loss=float(loss),
            accuracy=float(accuracy),
            val_loss=float(val_loss),
            val_accuracy=float(val_accuracy),
            seconds=seconds,
            images_per_second=images / seconds,
        )
        return record, judged_weights

    def _untrained(self, repeat: int) -> keras.Model:
        keras.backend.clear_session()
        keras.utils.set_random_seed(self.seeds[repeat - 1])
        keras.config.set_dtype_policy(self.precision)
        dataset, steps = self.dataset, (self._batches_per_epoch, self.schedule_epochs)
        return build(self.model, self.hyperparameters, dataset.image_shape, dataset.classes, steps=steps)

    def _moving_averages(self) -> averages.MovingAverages:
        return _moving_averages(
            self.net, self.model, self.hyperparameters, self.dataset, self._y_train, self.batch_size
        )


def _batch_size(hyperparameters: Hyperparameters, dataset: Dataset) -> int:
    batch_size = int(hyperparameters.get("batch_size", BATCH_SIZE))
    if batch_size > len(dataset.y_train):
        raise DataError(
            f"batch_size = {batch_size} is larger than the {len(dataset.y_train)} training images: choose a smaller one"
        )
    return batch_size


def _result(
    training: _Training,
    history: Sequence[Epoch],
    repeats: "_Repeats",
    answers: Answers | None,
    precision_reason: str,
) -> Trained:
    """What the training gave, but for its files.

    Raises MetricError if a confirmation's model gives no answers that can be counted.
    """
    best, bests = best_epoch(history), repeats.bests(history)
    values = [epoch.val_accuracy for epoch in bests]
    value = float(np.mean(values)) if values else best.val_accuracy if best else 0.0
    kept_epoch = history[-1] if training.confirms and history else best
    of_kept = [kept_epoch] if training.confirms or not bests else bests
    losses = [epoch.val_loss for epoch in of_kept if epoch is not None]
    if training.confirms and not training.is_stopped:
        if answers is None:
            raise MetricError(
                f"{training.model} gives something else than one number for each of the {training.dataset.classes} "
                "classes, so its answers to the test images cannot be counted: return one output of (n, classes)"
            )
        value = float(answers.hits.array().mean())
    speeds = [record.images_per_second for record in history[1:] or history]
    return Trained(
        value=value,
        repeats=tuple(values),
        best_epoch=repeats.place(kept_epoch.epoch)[1] if kept_epoch else 0,
        val_loss=float(np.mean(losses)) if losses else None,
        train_accuracy=kept_epoch.accuracy if kept_epoch else 0.0,
        epochs=len(history),
        stopped=training.is_stopped,
        parameters=training.net.count_params(),
        seconds=sum(record.seconds for record in history),
        images_per_second=float(np.median(speeds)) if speeds else 0.0,
        precision=training.precision,
        precision_reason=precision_reason,
        data_fingerprint=training.dataset.fingerprint,
        versions=versions(keras.backend.backend()),
        hits=answers.hits if answers is not None else None,
    )


def _moving_averages(
    net: keras.Model, model: str, h: Hyperparameters, dataset: Dataset, y_train: Array, batch_size: int
) -> averages.MovingAverages:
    """Creates the state of `net` that Keras would create at the first batch; returns its moving averages.

    If the hyperparameter `batch_norm_averages` is "keras", they are not corrected, as in the notebook.
    """
    corrected = h.get("batch_norm_averages", "corrected") == "corrected"
    if ":" not in model:
        _make_state(net, y_train[:1])
        return averages.of_builtin(net) if corrected else averages.MovingAverages()
    if not net.built:  # a subclass of keras.Model: a checkpoint can be restored only after its variables exist
        net(dataset.x_train[:1])

    def train_one_batch() -> None:
        net.fit(**batches(dataset.x_train[:batch_size], y_train[:batch_size], batch_size), shuffle=False, verbose=0)

    return averages.of_own(net, train_one_batch) if corrected else averages.MovingAverages()


def _make_state(net: keras.Model, y: Array) -> None:
    """Creates the variables of the optimizer and the metrics, which Keras would create at the first batch.

    TensorFlow traces a function that creates variables twice. At depth 5 that costs a second or more per trial.
    """
    net.optimizer.build(net.trainable_variables)
    net.compute_metrics(None, y, keras.ops.convert_to_tensor(y))
    net.reset_metrics()


class _Repeats:
    """The repeats of a training, of `epochs` each; with `patience`, one ends after so many epochs without a better one.

    Repeats and their epochs are counted from 1.
    """

    def __init__(self, epochs: int, patience: int | None, on_repeat: Callable[[Repeated], None]) -> None:
        self._epochs, self._patience, self._on_repeat = epochs, patience, on_repeat
        self._notified = 0

    def place(self, number: int) -> tuple[int, int]:
        """The repeat, and the epoch in it, of the epoch with this number in the whole training."""
        repeat, epoch = divmod(number - 1, self._epochs)
        return repeat + 1, epoch + 1

    def is_exhausted(self, history: Sequence[Epoch], repeat: int) -> bool:
        """Whether no epoch of this repeat was better than those before for so long that it ends."""
        own = self._of(history, repeat)
        best = best_epoch(own)
        return self._patience is not None and len(own) - (own.index(best) + 1 if best else 0) >= self._patience

    def bests(self, history: Sequence[Epoch]) -> list[Epoch]:
        """The best epoch of each whole repeat. Raises NotANumber if no epoch of one has a finite one."""
        found = []
        for repeat in range(1, self.place(history[-1].epoch)[0] + 1 if history else 1):
            own = self._of(history, repeat)
            if own[-1].epoch < repeat * self._epochs and not self.is_exhausted(history, repeat):
                break  # it has not ended
            best = best_epoch(own)
            if best is None:
                last = own[-1]
                raise NotANumber(
                    f"the validation accuracy was {last.val_accuracy} in epoch {last.epoch}, and finite in no epoch"
                )
            found.append(best)
        return found

    def notify(self, history: Sequence[Epoch]) -> None:
        """Tells of each repeat that has ended since the last call."""
        bests = self.bests(history)
        for index in range(self._notified, len(bests)):
            self._on_repeat(Repeated(repeat=index + 1, value=bests[index].val_accuracy))
        self._notified = len(bests)

    def _of(self, history: Sequence[Epoch], repeat: int) -> list[Epoch]:
        return [record for record in history if self.place(record.epoch)[0] == repeat]


def _resumed(net: keras.Model, paths: Sequence[Path], identity: dict[str, Any]) -> tuple[list[Epoch], list[Array]]:
    """The epochs and the best weights that `net` now has from the longest checkpoint; none without one."""
    for found in checkpoint.of_training(paths, identity):
        try:
            checkpoint.restore(net, found)
        except ValueError as error:  # one's own model has changed since
            log.warning("a checkpoint after epoch %d is not used: %s", found.history[-1].epoch, error)
        else:
            return found.history, found.best_weights
    return [], []


def _evaluation_batch(batch_size: int) -> int:
    # Evaluation keeps no gradients, so more images fit into memory. Larger batches than this were not faster.
    return max(batch_size, 256)


def _write_history(path: Path, history: list[Epoch]) -> None:
    with stored(path) as temporary:
        temporary.write_text(json.dumps([epoch.to_json() for epoch in history], indent=1), encoding="utf-8")


def _save(net: keras.Model, path: Path, model: str, dataset: Dataset) -> str | None:
    """Saves the model; returns why it cannot be saved. What was measured must not be lost for that.

    A user's own `model` is loaded again: where it was checked, it had other hyperparameters.
    """
    try:
        with stored(path) as temporary:
            net.save(temporary)
            if ":" in model:
                check_file(temporary, net, model, dataset.x_train[:IMAGES])
    except StorageError:
        raise
    except ModelError as error:
        log.warning("%s", error)
        return str(error)[:500]
    except Exception as error:  # a user's own layers may raise anything
        if is_of_the_disk(error):
            raise
        log.exception("the model cannot be saved")
        return named_error(error, 500)
    return None


def _kept(net: keras.Model, weights: list[Array], model: str, h: Hyperparameters, dataset: Dataset) -> keras.Model:
    """The model that is saved: with Keras's own layers, so that it loads without Trialyard."""
    if ":" not in model:
        net = build(model, h, dataset.image_shape, dataset.classes, plain=True)
    net.set_weights(weights)
    return net


class _StopAtBatch(keras.callbacks.Callback):  # type: ignore[misc]
    """Ends a fit after the running batch when `stopping` returns a mode."""

    def __init__(self, stopping: Callable[[], StopMode | None]) -> None:
        super().__init__()
        self._stopping = stopping
        self.stopped = False

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        if self._stopping() is not None:
            self.stopped = True
            self.model.stop_training = True


class _WatchBatches(keras.callbacks.Callback):  # type: ignore[misc]
    """Tells `on_batches` how far an epoch is. `epoch` is its number."""

    def __init__(self, on_batches: Callable[[Batches], None], total: int) -> None:
        super().__init__()
        self._on_batches, self._total = on_batches, total
        self._next = 0.0  # when the next message may be sent
        self.epoch = 0

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        now = time.monotonic()
        if now >= self._next:
            self._next = now + BATCHES_SECONDS
            self._on_batches(Batches(epoch=self.epoch, done=batch + 1, total=self._total))
