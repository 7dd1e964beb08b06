"""How much memory does a trainer process need for large data?

    python bench/images.py [--megabytes 491] [--slots 2]

Writes grey images of 100x100 to an uncompressed .npz file, and begins to train a small model on them in each slot at
the same time, for some seconds. It prints a line of JSON for each slot, in megabytes: the most memory that its process
had of its own (`own`), with its share of what several processes have in common (`with_share`), and in all, as `top`
shows it (`resident`). The first line is of a process with 1/100 of the data: what the framework needs.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from search.devices import Slot, cpu
from search.messages import Failed, Job, Trained
from search.trainer import Trainer
from studies import recipe
from studies.definition import Definition, parse

SIDE = 100
SECONDS = 40.0  # with the time for loading the data
DEFINITION = """
name = "images"
dataset = "{file}"
model = "mnist_cnn"
[budget]
trials = 1
epochs = 1
[space]
learning_rate = {{ low = 1e-4, high = 1e-2 }}
[fixed]
width = 0.1
batch_size = 128
"""


def definition(folder: Path, images: int) -> Definition:
    """Of a study of so many images."""
    random = np.random.default_rng(0)
    x = random.integers(0, 256, size=(images, SIDE, SIDE), dtype=np.uint8)
    file = folder / f"{images}.npz"
    np.savez(file, x_train=x, y_train=np.arange(images) % 10)
    return parse(DEFINITION.format(file=file))


def measured(wanted: Definition, folder: Path, slots: int) -> list[dict[str, Any]]:
    """The most memory that each of so many trainers had at one time."""
    trainers = [Trainer(Slot(device=cpu(), index=index, threads=1), folder / f"{index}.log") for index in range(slots)]
    most: list[dict[str, Any]] = [{"own": 0, "with_share": 0, "resident": 0} for _ in trainers]
    for trainer in trainers:
        job = Job(
            definition=wanted,
            recipe=recipe.of_trial(wanted, 0, {"learning_rate": 1e-3}),
            slot=trainer.slot,
            data_folders=(),
            folder=folder / trainer.slot.name.replace(":", "-"),
        )
        trainer.submit(job)
    running, stop_at = list(range(slots)), float("inf")
    while running:
        if stop_at == float("inf") and all(trainer.ready for trainer in trainers):
            stop_at = time.monotonic() + SECONDS
        if time.monotonic() > stop_at:
            for trainer in trainers:
                trainer.stop("drop")
        for index in list(running):
            message = trainers[index].receive(0.05)
            memory = psutil.Process(trainers[index].pid).memory_full_info()
            now = {"own": memory.uss, "with_share": memory.pss, "resident": memory.rss}
            most[index] = {key: max(most[index][key], value >> 20) for key, value in now.items()}
            if isinstance(message, Failed):
                raise SystemExit(message.message)
            if isinstance(message, Trained):
                running.remove(index)
        time.sleep(0.05)
    for trainer in trainers:
        trainer.kill()
    return most


def main() -> None:
    """Reads the arguments and runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=491)
    parser.add_argument("--slots", type=int, default=2)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = given.megabytes * 1_000_000 // SIDE**2
        (alone,) = measured(definition(folder, images // 100), folder, 1)
        print(json.dumps({"megabytes": given.megabytes // 100} | alone), flush=True)
        for one in measured(definition(folder, images), folder, given.slots):
            print(json.dumps({"megabytes": given.megabytes} | one), flush=True)


if __name__ == "__main__":
    main()
