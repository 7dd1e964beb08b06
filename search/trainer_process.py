"""The trainer process of one slot: imports Keras, and trains one job after another. Started by `search.trainer`.

It talks to the worker over one socket (`search.messages`): the slot, jobs and stops come in; one message an epoch, one
for the end of a job, and at most one a second about its batches go out. It never waits for the worker between epochs,
opens no database, and ends at once when the worker is gone. Keras and what needs it is imported in functions, after the
device is pinned.
"""

import contextlib
import ctypes
import gc
import hashlib
import logging
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from multiprocessing import popen_fork
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from search import device_errors, devices
from search.devices import Slot, precision_for
from search.interruption import STOPPING_SIGNALS
from search.messages import Batches, Checked, Epoch, Failed, Job, Measured, Ready, Resumed, StopMode, Trained
from storage.errors import DiskError, TrialyardError, error_text, named_error
from studies.definition import Definition
from studies.sources import is_function, weights_file
from studies.wording import SAME_SOURCE

if TYPE_CHECKING:
    from search.data import Dataset


def main(descriptor: int, temporary: Path) -> None:
    """Imports Keras for the slot that comes first, says so, and trains one job after another.

    Until the worker's end of the socket closes, or Keras cannot be imported. The worker deletes the folder of temporary
    files, `temporary`; if it is gone, this process does.
    """
    # Whoever ends a whole process group, or a service, means the worker, which then says what to do.
    for number in STOPPING_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    # What it starts ignores them, too: a pool that was ended by SIGTERM would be waited for without end.
    popen_fork.Popen.terminate = popen_fork.Popen.kill  # type: ignore[method-assign]
    logging.raiseExceptions = False  # what `logging` cannot print is left out, as `_log` does
    connection: Connection[Any, Any] = Connection(descriptor)
    try:
        slot: Slot = connection.recv()
    except (EOFError, OSError):  # the worker has ended already
        _remove_later(temporary)
        return
    jobs: queue.Queue[Job] = queue.Queue()
    stops: list[StopMode] = []

    def listen() -> None:
        # A thread, so that a stop is heard within a batch, and the worker's death at once: a trainer that went on
        # alone would train a trial that somebody else has claimed by then.
        while True:
            try:
                message = connection.recv()
            except (EOFError, OSError):
                _remove_later(temporary)
                _end_group()
            if isinstance(message, Job):
                stops.clear()
                jobs.put(message)
            else:
                stops.append(message.mode)

    threading.Thread(target=listen, name="listen", daemon=True).start()
    failed = _import_keras(slot)
    connection.send(failed or Ready())
    if failed is not None:
        return
    # What was imported stays. A garbage collection took 0.3 s to look through it, three times in each trial.
    gc.freeze()
    datasets: dict[Any, Dataset] = {}
    while True:
        end = _run(jobs.get(), connection, stops, datasets)
        _give_back_memory()
        connection.send(end)


def _remove_later(folder: Path) -> None:
    # By another process: a folder with much in it takes long, and this one must leave its device now.
    with contextlib.suppress(OSError):
        subprocess.Popen(["rm", "-rf", "--", str(folder)], stderr=subprocess.DEVNULL, start_new_session=True)


def _end_group() -> NoReturn:
    """Ends this process and all that it has started: a pool of a user's code would hold memory and GPUs for ever."""
    if os.getpgrp() == os.getpid():  # as `search.trainer` starts it
        os.killpg(0, signal.SIGKILL)
    os._exit(0)


def _import_keras(slot: Slot) -> Failed | None:
    """Imports all that a job needs, pinned to `slot`; returns why it cannot be."""
    from search import checks
    from search.errors import DeviceError

    try:
        devices.pin(slot)  # before the framework's first use
        import search.training_loop  # noqa: F401

        _configure_keras()
    except DeviceError as error:
        return Failed(kind="device", message=str(error))
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a broken installation may raise anything
        _log_traceback()
        if not isinstance(error, ImportError) and device_errors.is_of_the_accelerator(error):
            return Failed(kind="device", message=f"{slot.name} ({slot.device.name}) fails ({named_error(error)})")
        backend = checks.software()["backend"]
        return Failed(
            kind="import",
            message=f"Keras cannot be imported on this machine with the backend {backend} ({named_error(error)}): "
            "install what is missing, or set KERAS_BACKEND to a backend that is installed",
        )
    return None


def _configure_keras() -> None:
    """Undoes what another program may have left in the user's keras.json: images have their channels last."""
    import keras

    keras.config.set_image_data_format("channels_last")
    keras.config.set_floatx("float32")


def _give_back_memory() -> None:
    """What the last model held, as far as Python and the C library can be made to."""
    if "keras" in sys.modules:
        sys.modules["keras"].backend.clear_session()
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def _run(
    job: Job, connection: "Connection[Any, Any]", stops: "list[StopMode]", datasets: "dict[Any, Dataset]"
) -> Trained | Checked | Failed:
    from search.errors import DataError, MachineError

    try:
        dataset = _loaded(job, datasets)
    except MachineError as error:
        return Failed(kind="import", message=str(error))
    except DataError as error:
        return Failed(kind="load", message=str(error))
    except (Exception, SystemExit) as error:  # noqa: BLE001 - no job with these data could begin here
        _log_traceback()
        message = f"{job.definition.dataset} cannot be loaded on this machine ({named_error(error)})"
        return Failed(kind="load", message=message)
    try:
        return _trained(job, dataset, connection, stops)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - what a user's model raises ends its trial, not the study
        return _failed(error)


def _failed(error: BaseException) -> Failed:
    """What went wrong in a training."""
    from search.errors import DataError, MachineError, MetricError, ModelError

    kinds = {
        DiskError: "disk",
        MachineError: "import",
        DataError: "data",
        MetricError: "metric",
        ModelError: "model",
    }
    ours = next((kind for error_type, kind in kinds.items() if isinstance(error, error_type)), None)
    if ours is None:
        _log_traceback()
    if ours not in (None, "model"):
        return Failed(kind=ours, message=str(error))
    message = named_error(error) if ours is None else str(error)
    if type(error).__name__ == "NotANumber":
        return Failed(kind="nan", message=error_text(error))
    if device_errors.is_out_of_memory(error):
        return Failed(kind="memory", message=message)
    if device_errors.is_of_the_accelerator(error):
        return Failed(kind="accelerator", message=message)
    if device_errors.is_of_the_disk(error):
        return Failed(kind="disk", message=message)
    return Failed(kind=ours or "error", message=message)


def _loaded(job: Job, datasets: "dict[Any, Dataset]") -> "Dataset":
    from search import data

    wanted = job.definition
    images, test = job.recipe.data, job.recipe.confirms and job.folder is not None
    key = (wanted.dataset, images, job.data_folders, test)
    if key not in datasets:
        datasets.clear()  # one at a time: a machine may serve many studies
        datasets[key] = data.load(wanted.dataset, images, job.data_folders, test=test)
    return datasets[key]


def _trained(
    job: Job, dataset: "Dataset", connection: "Connection[Any, Any]", stops: "list[StopMode]"
) -> Trained | Checked:
    from search import checks, data, training_loop

    wanted = job.definition
    precision = precision_for(job.slot.device, wanted.precision, job.precision, own_model=wanted.has_own_model)
    sources = _sources(wanted)
    if job.folder is None:
        if job.recipe.confirms:
            data.require_test(wanted.dataset, wanted.data, job.data_folders)
        notes = [*dataset.notes, *checks.check_with_keras(wanted, dataset, precision[0])]
        measured = _measured(wanted, dataset, precision[0], notes) if job.measure else None
        return Checked(data=dataset.summary(), notes=tuple(notes), sources=sources, measured=measured)
    _require_same_sources(sources, job.sources)
    _require_same_data(job, dataset)
    trial = job.trial
    _log(f"{trial} begins in {precision[0]}: {precision[1]}")

    def on_epoch(record: Epoch) -> None:
        _log(f"{trial} epoch {record.epoch} loss {record.loss:.9g} validation {record.val_accuracy:.9g}")
        connection.send(record)

    def on_resume(history: list[Epoch]) -> None:
        _log(f"{trial} goes on after epoch {history[-1].epoch}")
        connection.send(Resumed(history=tuple(history)))

    return training_loop.train(
        model=wanted.model,
        hyperparameters=job.recipe.hyperparameters,
        dataset=dataset,
        epochs=job.recipe.epochs,
        schedule_epochs=job.recipe.schedule_epochs,
        seed=job.recipe.seed,
        more_seeds=job.recipe.more_seeds,
        precision=precision,
        folder=job.folder,
        checkpoints=job.checkpoints,
        identity={"study": job.study, "sources": sources},
        on_epoch=on_epoch,
        on_batches=lambda batches: send_if_read(connection, batches),
        on_resume=on_resume,
        on_repeat=connection.send,
        checkpoint_seconds=job.checkpoint_seconds,
        stopping=lambda: stops[0] if stops else None,
    )


def _require_same_data(job: Job, dataset: "Dataset") -> None:
    """Raises MachineError if the data are others than the study began with: a file may have changed meanwhile.

    The fingerprint is taken before the split, so it is the same for each seed of a confirmation.
    """
    from search.errors import MachineError

    wanted = job.data_fingerprint
    if wanted is not None and dataset.fingerprint != wanted:
        raise MachineError(
            f"{job.definition.dataset} has changed since the study began (its fingerprint was {wanted} and is "
            f"{dataset.fingerprint}): restore the images, or search them under another study name"
        )


def send_if_read(connection: "Connection[Any, Any]", batches: Batches) -> None:
    """Sends how far the epoch is, unless earlier messages are unread.

    A worker that waits for its database does not read. A training must not wait for it only to be watched.
    """
    if select.select([], [connection], [], 0)[1]:
        connection.send(batches)


def _measured(definition: Definition, dataset: "Dataset", policy: str, notes: list[str]) -> Measured | None:
    """How large and fast the models are. A failure is only a note: a trial that fails alike records it."""
    from search import measure

    try:
        return measure.measure(definition, dataset, policy)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a training may raise anything
        _log_traceback()
        notes.append(f"a model could not be trained for a few batches, so its time is unknown ({named_error(error)})")
        return None


def _sources(definition: Definition) -> dict[str, str]:
    """A digest of each file that decides a training: those of a user's own functions, and those of weights."""
    functions = {name: _digest(name) for name in (definition.model, definition.dataset) if is_function(name)}
    weights = definition.values_of("weights") or () if definition.model == "backbone" else ()
    files = [weights_file(each) for each in weights if each.endswith(".h5")]
    return functions | {
        f"weights:{file.name}": _digest_of_weights(file, file.stat().st_mtime_ns)
        for file in files
        if os.path.isfile(file)
    }


@cache  # they have up to 100 MB; a file that was written again has another time
def _digest_of_weights(file: Path, time_ns: int) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()[:16]


def _require_same_sources(sources: dict[str, str], expected: Mapping[str, str]) -> None:
    """Raises MachineError if a file was edited after the study began. This process may be the first to import it."""
    from search.errors import MachineError

    for name, digest in expected.items():
        if sources.get(name, digest) != digest:
            raise MachineError(f"the file of {name} was edited after the study began: {SAME_SOURCE}")


@cache  # this process keeps the module as it was when it was imported, whatever happens to the file
def _digest(function: str) -> str:
    from search.data import import_function

    import_function(function)
    file = sys.modules[function.partition(":")[0]].__file__
    return "" if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]


def _log(line: str) -> None:
    with _log_errors_ignored():
        print(f"{datetime.now(UTC).isoformat(timespec='milliseconds')} {line}", flush=True)


def _log_traceback() -> None:
    with _log_errors_ignored():
        traceback.print_exc()  # whole: a message has only its last line


def _log_errors_ignored() -> contextlib.suppress:
    """A log that cannot be written stops no training: the disk may be full, or a user's code has closed the file."""
    return contextlib.suppress(OSError, ValueError)


if __name__ == "__main__":
    with contextlib.suppress(TrialyardError, BrokenPipeError):
        main(int(sys.argv[1]), Path(sys.argv[2]))
