"""A worker machine: for each slot, claim -> objective -> finish, until the studies are done or a signal comes."""

import logging
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

import optuna
from optuna.storages import BaseStorage, RDBStorage

from search import objective
from search.devices import Device
from search.display import Watcher
from search.objective import Study
from search.trainer import Trainer
from storage import claims
from storage.settings import Settings
from studies import registry

log = logging.getLogger(__name__)

IDLE_SECONDS = 1.0  # between looks for work while other workers hold what is left
TICK_SECONDS = 0.2


def work(
    names: Sequence[str],
    storage: RDBStorage,
    settings: Settings,
    devices: Sequence[Device],
    watcher: Watcher,
) -> bool:
    """Fills a slot on each of `devices` with trials of the studies `names`, the first study first.

    Returns True when all of them have ended, False when a signal ended the work: the first SIGINT or SIGTERM puts the
    running trials back into the queue, a second one leaves at once.
    """
    interrupted = threading.Event()
    errors: list[BaseException] = []

    def fill(device: Device) -> None:
        try:
            _fill(studies, settings, device, watcher, interrupted)
        except BaseException as error:  # noqa: BLE001 - carried to the main thread, which raises it
            errors.append(error)
            interrupted.set()

    cached = optuna.storages.get_storage(storage)
    studies = [_open(name, storage, cached) for name in names]
    threads = [threading.Thread(target=fill, args=(device,), name=device.slot) for device in devices]
    with _signals(interrupted), watcher:
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            watcher.tick()
            threads[0].join(TICK_SECONDS)
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]
    return not interrupted.is_set()


def _fill(
    studies: Sequence[Study],
    settings: Settings,
    device: Device,
    watcher: Watcher,
    interrupted: threading.Event,
) -> None:
    """One slot's loop."""
    me = claims.worker(device.slot)
    log_file = settings.log_folder / f"trainer-{device.slot.replace(':', '-')}-{os.getpid()}.log"
    with Trainer(device, log_file) as trainer:
        while not interrupted.is_set():
            for study in studies:
                claim = claims.claim(study.storage, study.name, me, settings.grace_seconds)
                if claim is not None:
                    objective.run(study, claim, trainer, settings, watcher, interrupted)
                    break
            else:
                if all(claims.ended(study.storage, study.study_id) for study in studies):
                    return
                # Others run what is left. They may die, and then it is ours.
                interrupted.wait(IDLE_SECONDS)


def _open(name: str, storage: RDBStorage, cached: BaseStorage) -> Study:
    return Study(
        name=name,
        study_id=registry.study_id(name, storage),
        definition=registry.definition_of(name, storage),
        storage=storage,
        cached=cached,
    )


@contextmanager
def _signals(interrupted: threading.Event) -> Iterator[None]:
    """Turns the first SIGINT or SIGTERM into `interrupted`, and leaves at the second."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python gives signals to the main thread alone: somebody else handles them
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if interrupted.is_set():
            os._exit(130)  # the trainers notice and end; the next claim takes the trials back
        log.warning("%s: ending the running batch; once more to leave at once", signal.Signals(number).name)
        interrupted.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
