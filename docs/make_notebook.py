"""Makes the tables and pictures of `docs/notebook.md` from studies that repeat the notebook's experiments.

    .venv/bin/python docs/make_notebook.py [--from DATABASE ARTIFACTS]

With `--from` it first reads the studies of the database (a URL) and their files (a folder), writes all their epochs to
`docs/notebook.csv` and draws the pictures. In every case it then writes the tables into the page, between the comments
that name them, from that file and from the notebook's own results (`studies.notebook`). A test compares the two.

The pictures need the development packages and a Chromium, as those of `docs/make_pictures.py` do.
"""

import argparse
import csv
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.io
from playwright.sync_api import Page, sync_playwright
from scipy import stats

import studies
from studies import definition as definitions
from studies import notebook, registry, statistics

FOLDER = Path(__file__).parent
RECORD, PAGE, PICTURES = FOLDER / "notebook.csv", FOLDER / "notebook.md", FOLDER / "img"
IMAGES = 10_000  # test images of MNIST
EXAMPLE = "mnist-cnn"  # the study of the credited Keras example, for which the notebook printed no figure
FIGURES = {
    "notebook-dropout-3": ("notebook", "learning-curves"),
    "notebook-dropout-7": ("notebook", "learning-curves"),
    "notebook-conclusion": ("notebook", "learning-curves"),
}
# A fluctuation between epochs is looked for in the second half, when the accuracy has stopped rising.
SECOND_HALF = 10


# --- the record ---------------------------------------------------------------------------------------------


def read_studies(database: str, artifacts: Path) -> Iterator[dict[str, Any]]:
    """A row for every epoch of every complete trial that repeats a result of the notebook, or the credited example."""
    for name in studies.names(database):
        study = registry.find(name, registry.storage_of(database))
        results = notebook.reference_results(definitions.from_json(study.definition))
        if results and notebook.is_labelled(results):
            continue
        for trial in studies.open(name, database).trials:
            result = next((result for point, result in results if point == trial.params), None)
            if trial.state.name != "COMPLETE" or (result is None and name != EXAMPLE):
                continue
            history = json.loads((artifacts / trial.user_attrs["history"]).read_text(encoding="utf-8"))
            for epoch in history:
                yield {
                    "study": name,
                    "source": EXAMPLE if result is None else result.source,
                    "label": EXAMPLE if result is None else result.label,
                    "trial": trial.number,
                    "seed": trial.user_attrs["seed"],
                    "epoch": epoch["epoch"],
                    "loss": f"{epoch['loss']:.5f}",
                    "accuracy": f"{epoch['accuracy']:.5f}",
                    "test_loss": f"{epoch['val_loss']:.5f}",
                    "test_accuracy": f"{epoch['val_accuracy']:.4f}",
                }


def write_record(rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes RECORD."""
    with RECORD.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


# --- the tables ---------------------------------------------------------------------------------------------


def curves() -> dict[tuple[str, str], list[list[float]]]:
    """The test accuracies of the epochs of each training in RECORD, by the notebook's table and label.

    Trainings of one row from other seeds follow each other in a list.
    """
    found: dict[tuple[str, str], dict[tuple[str, str], list[float]]] = {}
    with RECORD.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            trainings = found.setdefault((row["source"], row["label"]), {})
            trainings.setdefault((row["study"], row["trial"]), []).append(float(row["test_accuracy"]))
    return {key: list(trainings.values()) for key, trainings in found.items()}


def conclusion_table() -> list[str]:
    """The notebook's last table beside ours, after the last epoch."""
    all_curves = curves()
    seeds = max(len(all_curves[result.source, result.label]) for result in notebook.CONCLUSION)
    lines = [
        f"| row | rate as run | the notebook | {' | '.join(f'ours, seed {n + 1}' for n in range(seeds))} "
        "| mean difference | 95 % interval | holds 0 |",
        "|---|---|---|" + "---|" * seeds + "---|---|---|",
    ]
    for result in notebook.CONCLUSION:
        ours = [curve[-1] for curve in all_curves[result.source, result.label]]
        mean = sum(ours) / len(ours)
        # Both seeds were measured on the same images, so there are not twice as many.
        interval = statistics.difference_of_two(mean, result.accuracy, IMAGES, IMAGES)
        agrees = "yes" if interval.low <= 0.0 <= interval.high else "no"
        rate = "no dropout" if result.conv_dropout is None else f"{result.conv_dropout:.2f}"
        lines.append(
            f"| {result.label} | {rate} | {result.accuracy:.4f} | {' | '.join(f'{value:.4f}' for value in ours)} "
            f"| {mean - result.accuracy:+.4f} | {interval.low:+.4f} to {interval.high:+.4f} | {agrees} |"
        )
    return lines


def sweep_table(results: Sequence[notebook.Result]) -> list[str]:
    """A sweep beside ours, at its best epoch as the notebook has it, and after the last."""
    all_curves = curves()
    lines = [
        "| its label | rate as run | the notebook, best epoch | ours, best epoch | difference | 95 % interval "
        "| holds 0 | ours, last epoch |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        (curve,) = all_curves[result.source, result.label]
        rate = result.dense_dropout if result.depth == 3 else result.conv_dropout
        interval = statistics.difference_of_two(max(curve), result.accuracy, IMAGES, IMAGES)
        agrees = "yes" if interval.low <= 0.0 <= interval.high else "no"
        lines.append(
            f"| {result.label} | {rate:.2f} | {result.accuracy:.4f} | {max(curve):.4f} "
            f"| {max(curve) - result.accuracy:+.4f} | {interval.low:+.4f} to {interval.high:+.4f} | {agrees} "
            f"| {curve[-1]:.4f} |"
        )
    return lines


def honest_table() -> list[str]:
    """What each of the notebook's models is worth: the last epoch, all trainings of a model together."""
    all_curves = curves()
    models = {
        "depth 3, no dropout": [("conclusion", notebook.CONCLUSION[0].label)],
        "depth 3, dropout 0.00 to 0.07": [(result.source, result.label) for result in notebook.SWEEP_3],
        "depth 5, no dropout": [("conclusion", notebook.CONCLUSION[2].label)],
        "depth 7, dropout 0.00 to 0.07": [(result.source, result.label) for result in notebook.SWEEP_7],
        "depth 7, dropout 0.2": [("conclusion", notebook.CONCLUSION[4].label)],
        "the credited example": [(EXAMPLE, EXAMPLE)],
    }
    lines = [
        "| model | trainings | last epoch: mean | lowest and highest | interval of one training | best epoch: mean "
        "| lowest epoch of the second half |",
        "|---|---|---|---|---|---|---|",
    ]
    for model, keys in models.items():
        trainings = [curve for key in keys for curve in all_curves[key]]
        last = [curve[-1] for curve in trainings]
        mean = sum(last) / len(last)
        interval = statistics.wilson(round(mean * IMAGES), IMAGES)
        best = sum(max(curve) for curve in trainings) / len(trainings)
        lowest = min(value for curve in trainings for value in curve[-SECOND_HALF:])
        lines.append(
            f"| {model} | {len(trainings)} | {mean:.4f} | {min(last):.4f}, {max(last):.4f} "
            f"| {interval.low:.4f} to {interval.high:.4f} | {best:.4f} | {lowest:.4f} |"
        )
    return lines


def correlation_table() -> list[str]:
    """Whether the accuracy after the last epoch rises or falls with the rate."""
    all_curves = curves()
    lines = ["| sweep | rank correlation of rate and last accuracy (Spearman) | p |", "|---|---|---|"]
    for depth, results in ((3, notebook.SWEEP_3), (7, notebook.SWEEP_7)):
        last = [all_curves[result.source, result.label][0][-1] for result in results]
        test = stats.spearmanr(range(len(last)), last)
        lines.append(f"| depth {depth} | {test.statistic:+.2f} | {test.pvalue:.2f} |")
    return lines


def tables() -> dict[str, list[str]]:
    """The tables of the page, by the names in its comments."""
    return {
        "conclusion": conclusion_table(),
        "sweep of depth 3": sweep_table(notebook.SWEEP_3),
        "sweep of depth 7": sweep_table(notebook.SWEEP_7),
        "models": honest_table(),
        "correlation": correlation_table(),
    }


def filled(page: str) -> str:
    """The text of `page` with its tables written again."""
    for name, lines in tables().items():
        start, end = f"<!-- table: {name} -->\n", "<!-- end -->"
        if page.count(start) != 1:
            raise SystemExit(f"{PAGE} has {page.count(start)} places for the table {name!r}")
        before, _, rest = page.partition(start)
        page = before + start + "\n".join(lines) + "\n" + end + rest.partition(end)[2]
    return page


# --- the pictures -------------------------------------------------------------------------------------------


def draw(database: str, artifacts: Path) -> None:
    """Writes the FIGURES as SVG files."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page()
        for name, kinds in FIGURES.items():
            for kind in kinds:
                figure = studies.figure(name, kind, storage=database, artifacts=artifacts)
                save(page, figure, PICTURES / f"{name}-{kind}.svg")
        browser.close()


def save(page: Page, figure: Any, path: Path) -> None:
    """Draws a figure of Plotly's in the browser's `page`, and writes it to `path` as SVG."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figure.html"
        file.write_text(plotly.io.to_html(figure, include_plotlyjs=True), encoding="utf-8")
        page.goto(file.as_uri())
        page.wait_for_selector(".main-svg")
        svg = page.evaluate(
            "Plotly.toImage(document.querySelector('.js-plotly-plot'), "
            "{format: 'svg', width: 800, height: 420, imageDataOnly: true})"
        )
    path.write_text(svg, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the studies if they are given, and writes the page's tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--from", dest="source", nargs=2, metavar=("DATABASE", "ARTIFACTS"))
    options = parser.parse_args(arguments)
    if options.source:
        database, artifacts = options.source[0], Path(options.source[1])
        write_record(list(read_studies(database, artifacts)))
        draw(database, artifacts)
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
