"""The memory of a slot's trainer process over 100 small trials, and how often it was replaced.

    python bench/memory.py [--trials 100]

Each trial trains a new model (mnist_cnn on 240 images of 8x8, one epoch) in the trainer of one CPU slot, as in a
worker. Prints the resident memory after the first trial and after each tenth of the trials, and the ratio of the
largest to the first. Above 1 + TRIALYARD_MEMORY_GROWTH the process is replaced before its next trial.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits

from search.devices import Slot, cpu
from search.messages import Batches, Epoch, Job
from search.trainer import MEMORY_GROWTH, Trainer
from studies import recipe
from studies.definition import parse

DEFINITION = """
name = "memory"
dataset = "small.npz"
model = "mnist_cnn"

[data]
validation = 0.2

[budget]
trials = 100
epochs = 1

[space]
dropout = { low = 0.0, high = 0.5 }

[fixed]
width = 0.1
batch_size = 60
"""


def main() -> None:
    """Trains and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100)
    trials = parser.parse_args().trials
    images, labels = load_digits(return_X_y=True)
    definition = parse(DEFINITION)
    slot = Slot(device=cpu(), threads=1)
    resident: list[int] = []
    pids = []
    with tempfile.TemporaryDirectory() as name, Trainer(slot, Path(name) / "log") as trainer:
        folder = Path(name)
        scaled = np.rint(images[:300].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
        np.savez(folder / "small.npz", x_train=scaled, y_train=labels[:300])
        for number in range(trials):
            trainer.submit(
                Job(
                    definition=definition,
                    recipe=recipe.of_trial(definition, number, {"dropout": 0.5 * number / trials}),
                    slot=slot,
                    data_folders=(folder,),
                    folder=folder / "trials" / str(number),
                )
            )
            while (message := trainer.receive(60)) is None or isinstance(message, (Batches, Epoch)):
                pass
            resident.append(trainer.resident() or 0)
            pids.append(trainer.pid)
    table = Table(title=f"{trials} small trials in one slot, {cpu().name}")
    for title in ("after trials", "resident MB", "ratio to the first"):
        table.add_column(title, justify="right")
    for at in [0, *range(trials // 10 - 1, trials, max(1, trials // 10))]:
        table.add_row(str(at + 1), f"{resident[at] >> 20}", f"{resident[at] / resident[0]:.2f}")
    Console().print(table)
    print(
        f"largest: {max(resident) / resident[0]:.2f} of the first; replaced {len(set(pids)) - 1} times "
        f"(it may grow by {MEMORY_GROWTH:.0%})"
    )


if __name__ == "__main__":
    main()
