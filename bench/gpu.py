"""What one GPU trains: images a second in both precisions, and several trials that share the card.

    TRIALYARD_DATA=folder-with-mnist.npz KERAS_BACKEND=jax python bench/gpu.py [--slots 1 2 4 8] [--images 30000]

Every measurement is a study of its own, run by `search.run` as a user runs it, on MNIST with batches of 128 images:

- one trial after the other, alone on the card: the models of depth 3, 5 and 7, each in float32 and in bfloat16;
- depth 5 in bfloat16 with 1, 2, 4 and 8 slots on the card, two trials for each slot.

It prints a line of JSON for each. `images_per_second` is that of a single trial, the median over its epochs after the
first and over the trials. `trials_per_hour` counts everything from the first claim to the end of the last trial,
including the compilation of each model and, once for each slot, the import of Keras.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial

import search
import studies
from search import devices

DEFINITION = """
name = "{name}"
dataset = "mnist"
model = "convnet"
precision = "{precision}"

[data]
validation = 0.1
limit = {images}

[budget]
trials = {trials}
epochs = {epochs}

[space]
depth = {{ choices = {depths} }}
dropout = {{ low = 0.0, high = 0.5 }}

[fixed]
batch_size = 128

[sampler]
kind = "points"
"""
POINT = """
[[points]]
depth = {depth}
dropout = {dropout}
"""
DEPTHS = (3, 5, 7)
PRECISIONS = ("float32", "mixed_bfloat16")
TRIALS_OF_A_SLOT = 2


def measure(
    name: str, precision: str, depths: Sequence[int], slots: int, options: argparse.Namespace
) -> tuple[list[FrozenTrial], float]:
    """Runs a study with a trial for each of `depths` on `slots` slots; returns its trials, and the seconds it took."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRIALYARD_HOME"] = folder
        file = Path(folder) / f"{name}.toml"
        points = [POINT.format(depth=depth, dropout=index / 100) for index, depth in enumerate(depths)]
        text = DEFINITION.format(
            name=name,
            precision=precision,
            images=options.images,
            trials=len(depths),
            epochs=options.epochs,
            depths=sorted(set(depths)),
        )
        file.write_text(text + "".join(points), encoding="utf-8")
        began = time.perf_counter()
        search.run(file, devices=options.devices, workers=slots, listeners=[])
        seconds = time.perf_counter() - began
        return studies.open(name).trials, seconds


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures each precision and depth alone, then the shared card."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--images", type=int, default=30000)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--devices", default="0")
    options = parser.parse_args(arguments)
    card = devices.slots(options.devices)[0].device.name
    for precision in PRECISIONS:
        trials, _ = measure(f"alone-{precision}", precision, DEPTHS, 1, options)
        for trial in trials:
            row = {"depth": trial.params["depth"], "precision": trial.user_attrs["precision"], **_speed([trial])}
            print(json.dumps({"card": card, "slots": 1, **row}), flush=True)
    for slots in options.slots:
        trials, seconds = measure(f"slots-{slots}", "mixed_bfloat16", [5] * (slots * TRIALS_OF_A_SLOT), slots, options)
        row = {**_speed(trials), "trials_per_hour": round(len(trials) * 3600 / seconds)}
        print(json.dumps({"card": card, "slots": slots, "depth": 5, **row}), flush=True)


def _speed(trials: Sequence[FrozenTrial]) -> dict[str, Any]:
    speeds = [trial.user_attrs["images_per_second"] for trial in trials]
    return {"images_per_second": round(statistics.median(speeds))}


if __name__ == "__main__":
    main()
