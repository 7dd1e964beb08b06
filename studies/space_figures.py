"""Figures of the search space: one small panel for each hyperparameter, and all of them as parallel coordinates."""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from optuna.trial import FrozenTrial, TrialState
from plotly.subplots import make_subplots

from studies import drawing, findings
from studies.definition import Definition
from studies.space import Choice, Float, Int

COLUMNS = 3
PANEL_POINTS = 300  # of one panel; all panels together are one figure
LINES = 200  # trials in the parallel coordinates
AXES = 12  # hyperparameters in one figure: more would not be readable


def hyperparameters(trials: Sequence[FrozenTrial], definition: Definition) -> go.Figure | None:
    """Accuracy against each searched hyperparameter, on a logarithmic axis where the space is logarithmic."""
    drawn = [trial for trial in trials if drawing.accuracy(trial) is not None]
    names = [name for name in definition.space if any(name in trial.params for trial in drawn)][:AXES]
    if not names:
        return None
    rows = math.ceil(len(names) / COLUMNS)
    figure = make_subplots(
        rows=rows,
        cols=min(COLUMNS, len(names)),
        shared_yaxes=True,
        horizontal_spacing=0.03,
        vertical_spacing=0.5 / (rows + 1),
    )
    for index, name in enumerate(names):
        at = {"row": index // COLUMNS + 1, "col": index % COLUMNS + 1}
        for state, marker in (
            (TrialState.COMPLETE, {"color": drawing.COLOURS[0], "size": 6}),
            (TrialState.PRUNED, {"color": drawing.GREY, "symbol": "x-thin-open", "size": 6}),
        ):
            of_state = [trial for trial in drawn if trial.state == state and name in trial.params]
            shown = drawing.thinned(of_state, PANEL_POINTS)
            if shown:
                values = [_shown(trial.params[name]) for trial in shown]
                title = state.name.lower()
                figure.add_trace(drawing.dots(shown, values, definition, title, marker, show=index == 0), **at)
        axis = _axis(definition.space[name], [trial.params[name] for trial in drawn if name in trial.params])
        figure.update_xaxes(title_text=html.escape(name.replace("_", " ")), **axis, **at)
    figure.update_yaxes(title_text=drawing.score_title(definition), col=1)
    figure.update_yaxes(**drawing.accuracy_axis(map(drawing.accuracy, drawn)))
    note = drawing.sample_note([drawn], PANEL_POINTS)
    return drawing.styled(figure, f"Accuracy against each hyperparameter{note}").update_layout(height=150 + 230 * rows)


def parallel(trials: Sequence[FrozenTrial], definition: Definition) -> go.Figure | None:
    """Parallel coordinates: a line for each complete trial through its hyperparameters to its accuracy.

    Drawn of plain lines. Plotly's own need WebGL and JavaScript's `eval`, which the report's page forbids.
    """
    ranked = findings.ranked(trials)
    names = [name for name in definition.space if any(name in trial.params for trial in ranked)][:AXES]
    if len(ranked) < 2 or not names:
        return None
    shown = drawing.thinned(ranked, LINES)
    low, high = (float(trial.values[0]) for trial in (ranked[-1], ranked[0]))
    best = max(1, len(ranked) // 10)
    limits = (float(ranked[best - 1].values[0]), float(ranked[(len(ranked) - 1) // 2].values[0]))
    groups: dict[str, list[FrozenTrial]] = {"lower half": [], "upper half": [], "best tenth": []}
    for trial in shown:
        group = "best tenth" if trial.values[0] >= limits[0] else None
        groups[group or ("upper half" if trial.values[0] >= limits[1] else "lower half")].append(trial)
    styles = ((drawing.GREY, 1, 0.4), (drawing.COLOURS[0], 1.5, 0.7), (drawing.COLOURS[1], 2.5, 1.0))
    traces = []
    for (group, of_group), (colour, width, opacity) in zip(groups.items(), styles, strict=True):
        x: list[int | None] = []
        y: list[float | None] = []
        texts: list[str] = []
        for trial in of_group:
            heights = [_height(definition.space[name], trial.params.get(name)) for name in names]
            x += [*range(len(names) + 1), None]  # None ends the line of this trial
            y += [*heights, (float(trial.values[0]) - low) / (high - low) if high > low else 0.5, None]
            texts += [drawing.trial_text(trial, definition)] * (len(names) + 2)
        style: dict[str, Any] = {"line": {"color": colour, "width": width}, "opacity": opacity, "mode": "lines"}
        if of_group:
            traces.append(go.Scatter(x=x, y=y, text=texts, hoverinfo="text", name=group, **style))
    titles = [html.escape(name.replace("_", " ")) for name in names] + ["accuracy"]
    ends = [_ends(definition.space[name]) for name in names] + [(f"{low:.4f}", f"{high:.4f}")]
    ticks = [f"{low_text}<br>{title}" for (low_text, _), title in zip(ends, titles, strict=True)]
    xaxis = {
        "range": [-0.3, len(ticks) - 0.7],
        "tickvals": list(range(len(ticks))),
        "ticktext": ticks,
        "gridcolor": drawing.GREY,
        "showline": False,
    }
    yaxis = {"range": [-0.03, 1.12], "showticklabels": False, "showgrid": False, "showline": False}
    title = f"All hyperparameters together{drawing.sample_note([ranked], LINES)}"
    figure = drawing.framed(traces, title, "", "").update_xaxes(**xaxis).update_yaxes(**yaxis)
    for at, (_, high_text) in enumerate(ends):
        figure.add_annotation(x=at, y=1.07, text=high_text, showarrow=False)
    return figure


def _axis(parameter: Float | Int | Choice, values: Sequence[Any]) -> Mapping[str, Any]:
    if isinstance(parameter, Choice):
        return drawing.choice_axis(parameter.choices)
    if not parameter.log:
        return {}
    # Ticks at powers of ten alone. Between values that are near each other there may be none.
    # Another program may have given a trial any value.
    positive = [value for value in values if isinstance(value, (int, float)) and value > 0]
    is_wide = bool(positive) and max(positive) >= 100 * min(positive)
    return {"type": "log"} | ({"dtick": 1} if is_wide else {})


def _height(parameter: Float | Int | Choice, value: Any) -> float | None:
    """Where on its axis a value is, from 0 to 1; None for a trial without this hyperparameter."""
    if value is None:
        return None
    if isinstance(parameter, Choice):
        places = list(parameter.choices)
        return places.index(value) / max(1, len(places) - 1) if value in places else None
    low, high, value = float(parameter.low), float(parameter.high), float(value)
    if parameter.log and value <= 0:
        return None  # another program gave the trial a value outside the space
    if parameter.log:
        low, high, value = math.log(low), math.log(high), math.log(value)
    return (value - low) / (high - low) if high > low else 0.5


def _ends(parameter: Float | Int | Choice) -> tuple[str, str]:
    if isinstance(parameter, Choice):
        return html.escape(str(parameter.choices[0])), html.escape(str(parameter.choices[-1]))
    return f"{parameter.low:.4g}", f"{parameter.high:.4g}"


def _shown(value: Any) -> Any:
    return html.escape(value) if isinstance(value, str) else value
