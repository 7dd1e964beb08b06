"""Plotly figures of a study: pure functions of its trials, its definition and its learning curves.

A figure without data is None. Coordinates are plain lists, because older dashboards cannot draw the base64 arrays of
newer Plotly versions. Importing Plotly takes a moment, so this module is imported only where figures are drawn.
"""

import html
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

import plotly.graph_objects as go
from optuna.trial import FrozenTrial, TrialState
from plotly.subplots import make_subplots

from storage.errors import many
from storage.ranking import is_scored, rank_key
from studies import notebook
from studies.definition import Definition
from studies.results import Curve
from studies.space import Choice

LIMIT = 1000  # points in a plot: a page with 10,000 is slow, and shows no more
DROPOUTS = ("dropout", "dense_dropout", "conv_dropout")
COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
)  # colour-blind people can distinguish them too (Okabe and Ito)
NOTEBOOK = "#888888"


def all_figures(
    trials: Sequence[FrozenTrial],
    definition: Definition,
    curves: Sequence[Curve] = (),
    replays: Sequence[notebook.Replay] = (),
) -> dict[str, go.Figure]:
    """All figures that have data, by name; a name is a valid HTML id."""
    figures = {
        "learning-curves": learning_curves(curves, definition),
        "dropout": against_hyperparameter(trials, definition),
        "cost": against_cost(trials, definition),
        "progress": best_so_far(trials, definition),
        "notebook": notebook_comparison(trials, definition) or replay_comparison(replays),
    }
    return {name: figure for name, figure in figures.items() if figure is not None}


def learning_curves(curves: Sequence[Curve], definition: Definition) -> go.Figure | None:
    """Training and validation loss by epoch, one colour per trial, as in the notebook.

    If no history is on this machine, the validation accuracy from the database instead.
    """
    traces = []
    for index, curve in enumerate(curve for curve in curves if curve.loss):
        for kind, values, dash in (("training", curve.loss, "solid"), ("validation", curve.val_loss, "dash")):
            traces.append(_line(curve, f"trial {curve.number}, {_images(kind, definition)}", values, index, dash))
    epochs = _count_axis(max((len(curve.val_accuracy) for curve in curves), default=0))
    if traces:
        return _figure(traces, "Loss by epoch, best trials first", "epoch", "mean cross-entropy", xaxis=epochs)
    traces = [
        _line(curve, f"trial {curve.number}", curve.val_accuracy, index, "dash")
        for index, curve in enumerate(curve for curve in curves if curve.val_accuracy)
    ]
    if not traces:
        return None
    title = "Accuracy by epoch, best trials first (their losses are not on this machine)"
    accuracies = _accuracy_axis(value for curve in curves for value in curve.val_accuracy)
    return _figure(traces, title, "epoch", _score_title(definition), xaxis=epochs, yaxis=accuracies)


def against_hyperparameter(trials: Sequence[FrozenTrial], definition: Definition) -> go.Figure | None:
    """Accuracy against dropout if it is searched, else against the first numeric hyperparameter, else the first one.

    If depth is searched, each depth has a colour. Pruned trials are crosses at the accuracy of their last epoch.
    """
    names = _axis(definition)
    group = "depth" if "depth" in definition.space and "depth" not in names else None
    with_position = [trial for trial in trials if _accuracy(trial) is not None and _position(trial, names) is not None]
    points: dict[tuple[Any, bool], list[FrozenTrial]] = {}
    for trial in _thinned(with_position):
        key = (trial.params.get(group) if group else None, trial.state == TrialState.PRUNED)
        points.setdefault(key, []).append(trial)
    if not points:
        return None
    depths = sorted({depth for depth, _ in points}, key=lambda depth: (str(type(depth)), depth))
    traces = []
    for depth, pruned in sorted(points, key=lambda key: (depths.index(key[0]), key[1])):
        of_group = points[depth, pruned]
        name = ("all trials" if group is None else f"depth {depth}") if not pruned else "pruned"
        traces.append(
            _dots(
                of_group,
                [_position(trial, names) for trial in of_group],
                definition,
                name=f"depth {depth}, pruned" if pruned and group else name,
                marker={
                    "color": COLOURS[depths.index(depth) % len(COLOURS)],
                    "symbol": "x-thin-open" if pruned else "circle",
                    "size": 8,
                    "line": {"width": 2 if pruned else 0, "color": COLOURS[depths.index(depth) % len(COLOURS)]},
                },
            )
        )
    axis: dict[str, Any] = {}
    parameter = definition.space[names[0]]
    if isinstance(parameter, Choice):
        axis["type"] = "category"
    elif parameter.log:
        axis["type"] = "log"
    elif len({_position(trial, names) for trial in with_position}) == 1:
        # Plotly would draw the axis from one below to one above, where no dropout rate can be.
        margin = 0.04 * (parameter.high - parameter.low)
        axis["range"] = [parameter.low - margin, parameter.high + margin]
    axis_title = " or ".join(name.replace("_", " ") for name in names)
    title = f"Accuracy against {axis_title}{_sample_note([with_position])}"
    accuracies = _accuracy_axis(map(_accuracy, with_position))
    return _figure(traces, title, axis_title, _score_title(definition), xaxis=axis, yaxis=accuracies)


def against_cost(trials: Sequence[FrozenTrial], definition: Definition) -> go.Figure | None:
    """Accuracy against the model's parameters and the training's seconds, each with its Pareto front."""
    complete = _complete(trials)
    panels = []
    for cost, title in (("parameters", "weights in the model"), ("seconds", "seconds of training")):
        known = [trial for trial in complete if isinstance(trial.user_attrs.get(cost), (int, float))]
        if known:
            panels.append((cost, title, known))
    if not panels:
        return None
    figure = make_subplots(rows=1, cols=len(panels), shared_yaxes=True, horizontal_spacing=0.06)
    for column, (cost, title, known) in enumerate(panels, start=1):

        def cost_of(trial: FrozenTrial, cost: str = cost) -> float:
            return float(trial.user_attrs[cost])

        front = pareto(known, cost_of)
        sample = _thinned(known)
        dots = {"color": COLOURS[5], "size": 7}
        costs = [cost_of(trial) for trial in sample]
        figure.add_trace(_dots(sample, costs, definition, "complete trials", dots, show=column == 1), 1, column)
        costs = [cost_of(trial) for trial in front]
        line = _dots(front, costs, definition, "Pareto front", {"color": COLOURS[1]}, show=column == 1)
        figure.add_trace(line.update(mode="lines+markers", line={"shape": "hv", "color": COLOURS[1]}), 1, column)
        figure.update_xaxes(title_text=title, row=1, col=column)
    figure.update_yaxes(title_text=_score_title(definition), col=1)
    figure.update_yaxes(**_accuracy_axis(map(_accuracy, complete)))
    return _styled(figure, f"Accuracy against cost{_sample_note([known for _, _, known in panels])}")


def best_so_far(trials: Sequence[FrozenTrial], definition: Definition) -> go.Figure | None:
    """The best accuracy so far, against trials and against wall time since the first one started."""
    # It is not known when an imported trial was run.
    finished = sorted(
        (trial for trial in trials if trial.state.is_finished() and not trial.user_attrs.get("imported")),
        key=lambda trial: (trial.datetime_complete or datetime.max, trial.number),
    )
    start = min((trial.datetime_start for trial in finished if trial.datetime_start is not None), default=None)
    if start is None or not _complete(finished):
        return None
    best: FrozenTrial | None = None
    counts, hours, values, texts = [], [], [], []
    for count, trial in enumerate(finished, start=1):
        if is_scored(trial) and (best is None or trial.values[0] > best.values[0]):
            best = trial
        elif count != len(finished):
            continue  # only the steps and the end of the line are needed
        if best is not None:
            counts.append(count)
            hours.append(((trial.datetime_complete or start) - start).total_seconds() / 3600)
            values.append(best.values[0])
            texts.append(_text(best, definition))
    unit, factor = ("hours", 1.0) if hours[-1] > 2 else ("minutes", 60.0) if hours[-1] > 2 / 60 else ("seconds", 3600.0)
    figure = make_subplots(rows=1, cols=2, shared_yaxes=True, horizontal_spacing=0.06)
    times = [hour * factor for hour in hours]
    for column, (x, title) in enumerate(((counts, "finished trials"), (times, f"{unit} since the first start")), 1):
        figure.add_trace(
            go.Scatter(
                x=x,
                y=values,
                text=texts,
                hoverinfo="text",
                mode="lines+markers",
                line={"shape": "hv", "color": COLOURS[0]},
                name="best so far",
                showlegend=False,
            ),
            1,
            column,
        )
        figure.update_xaxes(title_text=title, rangemode="tozero", row=1, col=column)
    figure.update_xaxes(**_count_axis(len(finished)), col=1)
    figure.update_yaxes(title_text=_score_title(definition), col=1)
    figure.update_yaxes(**_accuracy_axis(values))
    return _styled(figure, "Best so far")


def notebook_comparison(trials: Sequence[FrozenTrial], definition: Definition) -> go.Figure | None:
    """The notebook's and the study's results, if the study repeats one of the notebook's experiments; else None."""
    rows = notebook.reference_results(definition)
    if not rows:
        return None
    complete = _complete(trials)
    sweep = next((name for name in rows[0][0] if name.endswith("_dropout")), None)
    positions: list[Any] = [point[sweep] if sweep else html.escape(result.label) for point, result in rows]
    of_notebook = go.Scatter(
        x=positions,
        y=[result.accuracy for _, result in rows],
        text=[f"the notebook: {html.escape(result.label)}<br>{result.accuracy:.4f}" for _, result in rows],
        hoverinfo="text",
        mode="markers",
        name="the notebook",
        marker={"color": NOTEBOOK, "symbol": "diamond", "size": 10},
    )
    pairs = [
        (trial, position, notebook.measured(result, trial))
        for trial in complete
        for position, (point, result) in zip(positions, rows, strict=True)
        if trial.params == point
    ]
    accuracies = [accuracy for _, _, accuracy in pairs]
    of_study = _dots(
        [trial for trial, _, _ in pairs],
        [position for _, position, _ in pairs],
        definition,
        "this study",
        {"color": COLOURS[0], "size": 10, "symbol": "circle"},
        y=accuracies,
    )
    title = "The notebook's results and this study's, on the test images"
    if definition.name.endswith("-labelled") or (sweep and max(positions) > 0.5):
        title += "<br><sup>its labels said 0.0 to 0.7, and it ran with 0.00 to 0.07</sup>"
    if not sweep:
        title += "<br><sup>both after the last epoch</sup>"
    if definition.data.limit is not None or definition.budget.epochs != 20:
        title += f"<br><sup>this study: {_size(definition)}; the notebook: 20 epochs of 60,000 images</sup>"
    return _figure(
        [of_notebook, of_study] if pairs else [of_notebook],
        title,
        sweep.replace("_", " ") if sweep else "",
        "test accuracy",
        xaxis={} if sweep else {"type": "category"},
        yaxis=_accuracy_axis([result.accuracy for _, result in rows] + accuracies),
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
        marker={"color": NOTEBOOK, "symbol": "diamond", "size": 10},
    )
    of_replays = [
        _dots(
            [trial for _, trial in replay.trials],
            [positions[result] for result, _ in replay.trials],
            replay.definition,
            f"{replay.definition.name}, {_size(replay.definition)}",
            {"color": COLOURS[index % len(COLOURS)], "size": 10},
            y=[notebook.measured(result, trial) for result, trial in replay.trials],
        )
        for index, replay in enumerate(replays)
    ]
    values = [y for trace in (of_notebook, *of_replays) for y in trace.y]
    figure = _figure(
        [of_notebook, *of_replays],
        "The notebook's results and their replays here, on the test images<br><sup>the notebook: 20 epochs of 60,000 "
        "images; both: the sweeps at their best epoch, the conclusions after the last</sup>",
        "",
        "test accuracy",
        xaxis={"type": "category", "tickangle": -60, "automargin": True},
        yaxis=_accuracy_axis(values),
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


def pareto(trials: Sequence[FrozenTrial], cost: Callable[[FrozenTrial], float]) -> list[FrozenTrial]:
    """The Pareto front: complete trials, cheapest first, each more accurate than all cheaper ones."""
    front: list[FrozenTrial] = []
    for trial in sorted(trials, key=lambda trial: (cost(trial), *rank_key(trial))):
        if not front or trial.values[0] > front[-1].values[0]:
            front.append(trial)
    return front


# --- parts ------------------------------------------------------------------------------------------------


def _axis(definition: Definition) -> tuple[str, ...]:
    """The hyperparameters of the horizontal axis. A trial's position is its value of the first one that it has."""
    space = definition.space
    dropouts = tuple(name for name in DROPOUTS if name in space and not isinstance(space[name], Choice))
    if dropouts:
        return dropouts
    numeric = [name for name, parameter in space.items() if not isinstance(parameter, Choice)]
    dropouts = tuple(name for name in DROPOUTS if name in space)
    return ((*numeric, *dropouts, *space)[0],)


def _position(trial: FrozenTrial, names: Sequence[str]) -> Any:
    position = next((trial.params[name] for name in names if name in trial.params), None)
    if position is None and trial.params.get("dropout_layers") is False:
        return 0.0  # no dropout layer is like a rate of 0
    return html.escape(position) if isinstance(position, str) else position


def _complete(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    return [trial for trial in trials if is_scored(trial)]


def _accuracy(trial: FrozenTrial) -> float | None:
    if trial.state not in (TrialState.COMPLETE, TrialState.PRUNED):
        return None
    if trial.values is not None:
        value = float(trial.values[0])
    elif trial.last_step is not None:
        value = trial.intermediate_values[trial.last_step]
    else:
        return None
    return value if math.isfinite(value) else None


def _count_axis(last: int) -> dict[str, Any]:
    """An axis of whole numbers up to `last`. With only a few, Plotly would also label the halves."""
    return {"tick0": 0, "dtick": 1} if last <= 10 else {}


def _accuracy_axis(values: Iterable[float | None]) -> dict[str, Any]:
    """An axis of accuracies. If all are equal, Plotly would draw it from one below to one above."""
    different = {value for value in values if value is None or math.isfinite(value)}
    value = next(iter(different), None)
    same = len(different) == 1 and value is not None
    return {"tickformat": ".4~f"} | ({"range": [value - 0.05, value + 0.05]} if same and value is not None else {})


def _thinned(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """At most LIMIT trials: half are the best ones, the others are spread evenly over the rest of the ranking."""
    if len(trials) <= LIMIT:
        return list(trials)
    ranked = sorted(trials, key=lambda trial: (-(_accuracy(trial) or 0.0), trial.number))
    kept, rest = ranked[: LIMIT // 2], ranked[LIMIT // 2 :]
    return kept + [rest[index * len(rest) // (LIMIT // 2)] for index in range(LIMIT // 2)]


def _sample_note(groups: Sequence[Sequence[FrozenTrial]]) -> str:
    """The end of a title: which trials are shown, if not all are."""
    note = f" (the best {LIMIT // 2}, and a sample of the others)"
    return note if any(len(group) > LIMIT for group in groups) else ""


def _dots(
    trials: Sequence[FrozenTrial],
    x: Sequence[Any],
    definition: Definition,
    name: str,
    marker: Mapping[str, Any],
    show: bool = True,
    y: Sequence[float] | None = None,  # the trials' accuracies, unless they are their values
) -> go.Scatter:
    return go.Scatter(
        x=list(x),
        y=[_accuracy(trial) for trial in trials] if y is None else list(y),
        text=[_text(trial, definition) for trial in trials],
        hoverinfo="text",
        mode="markers",
        name=html.escape(name),
        legendgroup=html.escape(name),
        showlegend=show,
        marker=dict(marker),
    )


def _line(curve: Curve, name: str, values: Sequence[float], index: int, dash: str) -> go.Scatter:
    return go.Scatter(
        x=list(range(1, len(values) + 1)),
        y=list(values),
        mode="lines+markers",
        name=name,
        legendgroup=f"trial {curve.number}",
        hovertext=_params(curve.params),
        line={"color": COLOURS[index % len(COLOURS)], "dash": dash},
        marker={"size": 4},
    )


def _text(trial: FrozenTrial, definition: Definition) -> str:
    accuracy = _accuracy(trial)
    score = "" if accuracy is None else f"<br>{_score_title(definition)} {accuracy:.4f}"
    pruned = f", pruned after epoch {trial.last_step}" if trial.state == TrialState.PRUNED else ""
    label = f"<br>{html.escape(str(trial.user_attrs['label']))}" if "label" in trial.user_attrs else ""
    return f"trial {trial.number}{pruned}<br>{_params(trial.params)}{score}{label}"


def _params(params: Mapping[str, Any]) -> str:
    texts = (f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in params.items())
    return html.escape(", ".join(texts))


def _score_title(definition: Definition) -> str:
    return definition.judged_on + " accuracy"


def _images(kind: str, definition: Definition) -> str:
    """`kind`, but "test" for the validation images of a study with the notebook's protocol."""
    return "test" if kind == "validation" and definition.data.validation == "test" else kind


def _size(definition: Definition) -> str:
    images = f"{definition.data.limit:,}" if definition.data.limit is not None else "60,000"
    return f"{many(definition.budget.epochs, 'epoch')} of {images} images"


def _figure(
    traces: Sequence[go.Scatter],
    title: str,
    x: str,
    y: str,
    xaxis: Mapping[str, Any] | None = None,
    yaxis: Mapping[str, Any] | None = None,
) -> go.Figure:
    figure = go.Figure(list(traces))
    figure.update_xaxes(title_text=html.escape(x), **(xaxis or {}))
    figure.update_yaxes(title_text=html.escape(y), **(yaxis or {}))
    return _styled(figure, title)


def _styled(figure: go.Figure, title: str) -> go.Figure:
    # A named template has 7 kB, and the dashboard would send it at every poll.
    figure.update_layout(
        template=go.layout.Template(),
        title={"text": title, "x": 0.01, "font": {"size": 16}},
        paper_bgcolor="white",
        plot_bgcolor="white",
        height=420,
        margin={"l": 70, "r": 20, "t": 70, "b": 55},
        hovermode="closest",
    )
    axis = {"gridcolor": "#e5e5e5", "zeroline": False, "linecolor": "#888888", "showline": True}
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis)
    return figure
