"""One workload for five ways of searching: which finds the best model, and how long does it take?

    pip install -r bench/peers-requirements.txt
    TRIALYARD_DATA=folder-with-mnist.npz python bench/peers.py [--seeds 1 2 3] [--sides trialyard optuna]

Each side trains on the same 4,000 images of MNIST and judges by the same 2,000: 24 trials of at most 6 epochs, batch
128, over depth 3, 5 or 7 and a dropout rate from 0 to 0.7. All have the same models (`search.model.build(plain=True)`,
only layers of Keras) and two processors:

- notebook: a loop of plain `model.fit` over 8 rates at each depth, nothing pruned;
- optuna: TPE and Hyperband, one trial after the other;
- ray: Ray Tune with OptunaSearch and ASHA, two trials at once;
- keras_tuner: KerasTuner's Hyperband, whose four rounds are 24 trials;
- trialyard: `search.run` with TPE and ASHA, a trial for each processor.

All that prune may do so after one epoch.

It prints a line of JSON for each side and seed: seconds of the whole program with its imports, epochs that were
trained, the best validation accuracy by the side's own scoring, and after how many seconds that was 0.96 and 0.97.
`outside` is the accuracy of the model that the side would hand over, on the 10,000 test images, which nobody trained on
or chose by; it is computed here, by plain Keras, after the clock has stopped.
"""

from __future__ import annotations  # Ray sends functions to processes where those of a class's body are not known

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np

TRIALS, EPOCHS, BATCH = 24, 6, 128
FIRST = 1  # the epoch after which a side may prune
DEPTHS, HIGHEST_RATE = (3, 5, 7), 0.7
GOALS = (0.96, 0.97)
CLASSES = 10
DEFINITION = """
name = "peers"
dataset = "{images}"
model = "convnet"

[data]
validation = 0.3333333333
seed = {seed}

[budget]
trials = {trials}
epochs = {epochs}

[space]
depth = {{ choices = [3, 5, 7] }}
dropout = {{ low = 0.0, high = 0.7 }}

[fixed]
batch_size = {batch}

[sampler]
seed = {seed}

[pruner]
kind = "asha"
min_epochs = {first}
"""

Report = Callable[[int, float], None]


class Scores:
    """The epochs of one side, with the time since its program was started."""

    def __init__(self, began: float) -> None:
        self._began = began
        self.rows: list[tuple[float, float]] = []  # seconds, accuracy

    def add(self, accuracy: float) -> None:
        self.rows.append((time.time() - self._began, float(accuracy)))

    def add_at(self, moment: float, accuracy: float) -> None:
        self.rows.append((moment - self._began, float(accuracy)))

    def summary(self) -> dict[str, Any]:
        """Epochs, best accuracy, and seconds to each goal."""
        self.rows.sort()
        reached = {goal: next((seconds for seconds, score in self.rows if score >= goal), None) for goal in GOALS}
        return {
            "epochs": len(self.rows),
            "best": round(max(score for _, score in self.rows), 4),
            **{f"seconds_to_{goal}": None if at is None else round(at, 1) for goal, at in reached.items()},
        }


# --- plain Keras, for all sides but Trialyard ---------------------------------------------------------------


def arrays(folder: Path, seed: int) -> tuple[Any, Any, Any, Any]:
    """The images and one-hot labels to train with, and to judge by: those that Trialyard takes."""
    import keras

    from search import data
    from studies.definition import Data

    dataset = data.load(str(folder / "images.npz"), Data(validation=0.3333333333, seed=seed), [])
    y_train, y_validation = (
        keras.utils.to_categorical(labels, CLASSES) for labels in (dataset.y_train, dataset.y_validation)
    )
    return dataset.x_train, y_train, dataset.x_validation, y_validation


def plain_model(depth: int, dropout: float) -> Any:
    """The model as a user of plain Keras has it."""
    from search.model import build

    model = build("convnet", {"depth": depth, "dropout": dropout}, (28, 28, 1), CLASSES, plain=True)
    model.compile("adam", "categorical_crossentropy", metrics=["accuracy"])
    return model


def fit(depth: int, dropout: float, images: tuple[Any, Any, Any, Any], file: Path, report: Report) -> float:
    """Trains with plain `fit`; saves the model of the best epoch, whose accuracy it returns."""
    import keras

    x, y, x_validation, y_validation = images
    model, best = plain_model(depth, dropout), 0.0

    class Each(keras.callbacks.Callback):  # type: ignore[misc]
        def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
            nonlocal best
            accuracy = float((logs or {})["val_accuracy"])
            if accuracy > best:
                best = accuracy
                self.model.save(file)
            report(epoch + 1, accuracy)

    model.fit(
        *(x, y),
        batch_size=BATCH,
        epochs=EPOCHS,
        validation_data=(x_validation, y_validation),
        callbacks=[Each()],
        verbose=0,
    )
    return best


# --- the five sides: each searches, and returns the file of the model that it hands over ----------------------


def notebook(folder: Path, seed: int, scores: Scores) -> Path:
    """A loop over the rates at each depth."""
    import keras

    keras.utils.set_random_seed(seed)
    images, found = arrays(folder, seed), {}
    rates = np.linspace(0.0, HIGHEST_RATE, TRIALS // len(DEPTHS))
    for depth in DEPTHS:
        for rate in rates:
            keras.backend.clear_session()
            file = folder / f"notebook-{depth}-{rate:.1f}.keras"
            found[file] = fit(depth, float(rate), images, file, lambda _, accuracy: scores.add(accuracy))
    return max(found, key=lambda file: found[file])


def optuna(folder: Path, seed: int, scores: Scores) -> Path:
    """Optuna's own loop with its TPE and Hyperband."""
    import keras
    import optuna as library

    keras.utils.set_random_seed(seed)
    images = arrays(folder, seed)

    def objective(trial: Any) -> float:
        keras.backend.clear_session()

        def report(epoch: int, accuracy: float) -> None:
            scores.add(accuracy)
            trial.report(accuracy, epoch)
            if trial.should_prune():
                raise library.TrialPruned

        depth = trial.suggest_categorical("depth", DEPTHS)
        dropout = trial.suggest_float("dropout", 0.0, HIGHEST_RATE)
        return fit(depth, dropout, images, folder / f"optuna-{trial.number}.keras", report)

    study = library.create_study(
        direction="maximize",
        sampler=library.samplers.TPESampler(seed=seed),
        pruner=library.pruners.HyperbandPruner(min_resource=FIRST, max_resource=EPOCHS),
    )
    study.optimize(objective, n_trials=TRIALS)
    return folder / f"optuna-{study.best_trial.number}.keras"


def ray(folder: Path, seed: int, scores: Scores) -> Path:
    """Ray Tune: OptunaSearch proposes, ASHA prunes, and two trials run at once."""
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    import ray as library
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.optuna import OptunaSearch

    library.init(num_cpus=2, include_dashboard=False, log_to_driver=False)

    def trainable(config: dict[str, Any]) -> None:
        import keras

        keras.utils.set_random_seed(seed)
        file = folder / f"ray-{tune.get_context().get_trial_id()}.keras"

        def report(epoch: int, accuracy: float) -> None:
            tune.report({"accuracy": accuracy, "epoch": epoch, "moment": time.time(), "file": str(file)})

        fit(config["depth"], config["dropout"], arrays(folder, seed), file, report)

    seen: list[tuple[float, float, str]] = []

    class Collect(tune.Callback):
        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **_: Any) -> None:
            seen.append((result["moment"], result["accuracy"], result["file"]))

    tune.Tuner(
        tune.with_resources(trainable, {"cpu": 1}),
        param_space={"depth": tune.choice(DEPTHS), "dropout": tune.uniform(0.0, HIGHEST_RATE)},
        tune_config=tune.TuneConfig(
            metric="accuracy",
            mode="max",
            num_samples=TRIALS,
            search_alg=OptunaSearch(seed=seed),
            scheduler=ASHAScheduler(time_attr="epoch", max_t=EPOCHS, grace_period=FIRST),
        ),
        run_config=tune.RunConfig(storage_path=str(folder / "ray"), callbacks=[Collect()], verbose=0),
    ).fit()
    for moment, accuracy, _ in seen:
        scores.add_at(moment, accuracy)
    library.shutdown()
    return Path(max(seen, key=lambda row: row[1])[2])


def keras_tuner(folder: Path, seed: int, scores: Scores) -> Path:
    """KerasTuner's Hyperband. A round has two brackets: 3 trials of which 1 goes on, and 2; four rounds are 24."""
    import keras
    import keras_tuner as library

    keras.utils.set_random_seed(seed)
    x, y, x_validation, y_validation = arrays(folder, seed)

    def hypermodel(parameters: Any) -> Any:
        return plain_model(parameters.Choice("depth", list(DEPTHS)), parameters.Float("dropout", 0.0, HIGHEST_RATE))

    class Each(keras.callbacks.Callback):  # type: ignore[misc]
        def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
            scores.add((logs or {})["val_accuracy"])

        def __deepcopy__(self, memory: dict[int, Any]) -> Each:
            return self  # KerasTuner copies callbacks for each trial

    tuner = library.Hyperband(
        hypermodel,
        objective="val_accuracy",
        max_epochs=EPOCHS,
        factor=3,
        hyperband_iterations=4,
        seed=seed,
        directory=str(folder / "keras_tuner"),
        project_name="peers",
    )
    tuner.search(
        *(x, y),
        batch_size=BATCH,
        validation_data=(x_validation, y_validation),
        callbacks=[Each()],
        verbose=0,
    )
    file = folder / "keras_tuner.keras"
    tuner.get_best_models(1)[0].save(file)
    return file


def trialyard(folder: Path, seed: int, scores: Scores) -> Path:
    """`search.run` on a definition, as a user writes it."""
    import search
    from search.messages import Epoch
    from search.progress import Listener
    from storage import settings
    from studies import best_trial

    class Collect(Listener):
        def epoch(self, claim: Any, record: Epoch) -> None:
            scores.add(record.val_accuracy)

    os.environ["TRIALYARD_HOME"] = str(folder / "trialyard")
    (folder / "peers.toml").write_text(
        DEFINITION.format(
            images=folder / "images.npz", seed=seed, trials=TRIALS, epochs=EPOCHS, batch=BATCH, first=FIRST
        ),
        encoding="utf-8",
    )
    search.run(folder / "peers.toml", listeners=[Collect()])
    best = best_trial("peers")
    return settings.load().artifact_folder / str(best.user_attrs["model"])


SIDES: dict[str, Callable[[Path, int, Scores], Path]] = {
    side.__name__: side for side in (notebook, optuna, ray, keras_tuner, trialyard)
}


# --- the measurement ----------------------------------------------------------------------------------------


def write_images(mnist: Path, folder: Path, seed: int) -> None:
    """6,000 training images of MNIST, and its test images in a file of their own, which no side gets."""
    with np.load(mnist) as archive:
        chosen = np.random.default_rng(seed).permutation(len(archive["y_train"]))[:6000]
        np.savez(folder / "images.npz", x_train=archive["x_train"][chosen], y_train=archive["y_train"][chosen])
        np.savez(folder / "outside.npz", x=archive["x_test"][..., np.newaxis], y=archive["y_test"])


def outside(model: Path, folder: Path) -> float:
    """The accuracy of a saved model on the test images, by plain Keras."""
    import keras

    with np.load(folder / "outside.npz") as archive:
        predicted = keras.models.load_model(model).predict(archive["x"], batch_size=500, verbose=0)
        return float((predicted.argmax(axis=1) == archive["y"]).mean())


def search_side(side: str, folder: Path, seed: int, began: float) -> None:
    """What the process of one side does; its result goes to a file."""
    scores = Scores(began)
    model = SIDES[side](folder, seed, scores)
    (folder / f"{side}.json").write_text(json.dumps({**scores.summary(), "model": str(model)}), encoding="utf-8")


def measure(side: str, mnist: Path, seed: int) -> dict[str, Any]:
    """Runs one side in a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(mnist, folder, seed)
        began = time.time()
        command = [sys.executable, __file__, "--side", side, "--folder", name, "--seeds", str(seed)]
        subprocess.run([*command, "--began", str(began)], check=True, stdout=subprocess.DEVNULL)
        seconds = time.time() - began
        found = json.loads((folder / f"{side}.json").read_text(encoding="utf-8"))
        model = Path(found.pop("model"))
        return {"side": side, "seed": seed, "seconds": round(seconds, 1), **found, "outside": outside(model, folder)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures every side with every seed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    for internal in ("--side", "--folder", "--began"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.side is not None:
        search_side(options.side, Path(options.folder), options.seeds[0], float(options.began))
        return
    folders = [Path(part) for part in os.environ.get("TRIALYARD_DATA", "").split(os.pathsep) if part]
    mnist = next((folder / "mnist.npz" for folder in folders if (folder / "mnist.npz").is_file()), None)
    if mnist is None:
        parser.error("there is no mnist.npz in the folders of TRIALYARD_DATA")
    for seed in options.seeds:
        for side in options.sides:
            print(json.dumps(measure(side, mnist, seed)), flush=True)


if __name__ == "__main__":
    main()
