"""Figures that show the notebook's results beside those of studies that repeat its experiments."""

import html
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from optuna.trial import FrozenTrial

from studies import drawing, notebook
from studies.definition import Definition


def notebook_comparison(trials: Sequence[FrozenTrial], definition: Definition) -> go.Figure | None:
    """The notebook's and the study's results, if the study repeats one of the notebook's experiments; else None."""
    rows = notebook.reference_results(definition)
    if not rows:
        return None
    complete = notebook.trained(drawing.complete(trials))
    sweep = next((name for name in rows[0][0] if name.endswith("_dropout")), None)
    positions: list[Any] = [point[sweep] if sweep else html.escape(result.label) for point, result in rows]
    of_notebook = go.Scatter(
        x=positions,
        y=[result.accuracy for _, result in rows],
        text=[f"the notebook: {html.escape(result.label)}<br>{result.accuracy:.4f}" for _, result in rows],
        hoverinfo="text",
        mode="markers",
        name="the notebook",
        marker={"color": drawing.NOTEBOOK, "symbol": "diamond", "size": 10},
    )
    pairs = [
        (trial, position, notebook.measured(result, trial))
        for trial in complete
        for position, (point, result) in zip(positions, rows, strict=True)
        if trial.params == point
    ]
    accuracies = [accuracy for _, _, accuracy in pairs]
    of_study = drawing.dots(
        [trial for trial, _, _ in pairs],
        [position for _, position, _ in pairs],
        definition,
        "this study",
        {"color": drawing.COLOURS[0], "size": 10, "symbol": "circle"},
        y=accuracies,
    )
    title = "The notebook's results and this study's, on the test images"
    if definition.name.endswith("-labelled") or (sweep and max(positions) > 0.5):
        title += "<br><sup>its labels said 0.0 to 0.7, and it ran with 0.00 to 0.07</sup>"
    if not sweep:
        title += "<br><sup>both after the last epoch</sup>"
    if definition.data.limit is not None or definition.budget.epochs != 20:
        title += f"<br><sup>this study: {drawing.size_text(definition)}; the notebook: 20 epochs of 60,000 images</sup>"
    return drawing.framed(
        [of_notebook, of_study] if pairs else [of_notebook],
        title,
        sweep.replace("_", " ") if sweep else "",
        "test accuracy",
        xaxis={} if sweep else {"type": "category"},
        yaxis=drawing.accuracy_axis([result.accuracy for _, result in rows] + accuracies),
    )


def replay_comparison(replays: Sequence[notebook.Replay]) -> go.Figure | None:
    """All results of the notebook, and those of the studies that repeat them; None if there is no such study."""
    if not replays:
        return None
    positions = {result: _row(result) for result in notebook.RESULTS}
    of_notebook = go.Scatter(
        x=list(positions.values()),
        y=[result.accuracy for result in positions],
        text=[f"the notebook: {html.escape(result.label)}<br>{result.accuracy:.4f}" for result in positions],
        hoverinfo="text",
        mode="markers",
        name="the notebook",
        marker={"color": drawing.NOTEBOOK, "symbol": "diamond", "size": 10},
    )
    of_replays = [
        drawing.dots(
            [trial for _, trial in replay.trials],
            [positions[result] for result, _ in replay.trials],
            replay.definition,
            f"{replay.definition.name}, {drawing.size_text(replay.definition)}",
            {"color": drawing.COLOURS[index % len(drawing.COLOURS)], "size": 10},
            y=[notebook.measured(result, trial) for result, trial in replay.trials],
        )
        for index, replay in enumerate(replays)
    ]
    values = [y for trace in (of_notebook, *of_replays) for y in trace.y]
    figure = drawing.framed(
        [of_notebook, *of_replays],
        "The notebook's results and their replays here, on the test images<br><sup>the notebook: 20 epochs of 60,000 "
        "images; both: the sweeps at their best epoch, the conclusions after the last</sup>",
        "",
        "test accuracy",
        xaxis={"type": "category", "tickangle": -60, "automargin": True},
        yaxis=drawing.accuracy_axis(values),
    )
    # The names are long, so the legend is above the plot.
    return figure.update_layout(
        height=600,
        margin={"t": 160},
        title={"y": 0.98, "yanchor": "top"},
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
    )


def _row(result: notebook.Result) -> str:
    if result.source == "conclusion":
        return html.escape(result.label)
    rate = result.dense_dropout if result.depth == 3 else result.conv_dropout
    return f"{result.depth} layers, sweep at {rate:.2f}"
