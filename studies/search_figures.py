"""Figures of a search: its learning curves, and accuracy against dropout, cost and time.

Each is a pure function of the trials, the definition and the learning curves. A figure without data is None.
"""

import html
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

import plotly.graph_objects as go
from optuna.trial import FrozenTrial, TrialState
from plotly.subplots import make_subplots

from storage.ranking import is_scored, rank_key
from studies import drawing
from studies.definition import Definition
from studies.results import Curve
from studies.space import Choice

DROPOUTS = ("dropout", "dense_dropout", "conv_dropout")


def learning_curves(curves: Sequence[Curve], definition: Definition) -> go.Figure | None:
    """Loss and accuracy by epoch, of training and validation images, one colour for each trial.

    If no history is on this machine, the validation accuracy from the database instead: by epoch, or by repeat.
    """
    known = [curve for curve in curves if curve.loss]
    if not known:
        return _recorded_accuracies([curve for curve in curves if curve.val_accuracy], definition)
    figure = make_subplots(rows=1, cols=2, horizontal_spacing=0.12)
    for index, curve in enumerate(known):
        losses, accuracies = (curve.loss, curve.val_loss), (curve.accuracy, curve.val_accuracy)
        for kind, dash, loss, accuracy in zip(
            ("training", "validation"), ("solid", "dash"), losses, accuracies, strict=True
        ):
            name = f"trial {curve.number}, {drawing.images(kind, definition)}"
            # The title says what a dashed line is: one name for each trial is enough.
            figure.add_trace(drawing.line(curve, name, loss, index, dash, show=dash == "solid"), 1, 1)
            figure.add_trace(drawing.line(curve, f"{name}, accuracy", accuracy, index, dash, show=False), 1, 2)
    epochs = drawing.count_axis(max(len(curve.loss) for curve in known))
    figure.update_xaxes(title_text="epoch", **epochs)
    figure.update_yaxes(title_text="mean cross-entropy", col=1)
    figure.update_yaxes(title_text="accuracy", col=2)
    order = "" if len(known) == 1 else ", best trials first"
    dashed = f"<br><sup>dashed: {drawing.images('validation', definition)}</sup>"
    return drawing.styled(figure, f"Loss and accuracy by epoch{order}{dashed}")


def _recorded_accuracies(curves: Sequence[Curve], definition: Definition) -> go.Figure | None:
    if not curves:
        return None
    step = "repeat" if definition.budget.repeats > 1 else "epoch"
    values = [value for curve in curves for value in curve.val_accuracy]
    order = "" if len(curves) == 1 else ", best trials first"
    return drawing.framed(
        [
            drawing.line(curve, f"trial {curve.number}", curve.val_accuracy, index, "dash")
            for index, curve in enumerate(curves)
        ],
        f"Accuracy by {step}{order} (the losses are not on this machine)",
        step,
        f"{drawing.images('validation', definition)} accuracy",
        xaxis=drawing.count_axis(max(len(curve.val_accuracy) for curve in curves)),
        yaxis=drawing.accuracy_axis(values),
    )


def against_hyperparameter(trials: Sequence[FrozenTrial], definition: Definition) -> go.Figure | None:
    """Accuracy against dropout if it is searched, else against the first numeric hyperparameter, else the first one.

    If depth is searched, each depth has a colour. Pruned trials are crosses at the accuracy of their last epoch.
    """
    names = _axis(definition)
    group = "depth" if "depth" in definition.space and "depth" not in names else None
    with_position = [
        trial for trial in trials if drawing.accuracy(trial) is not None and _position(trial, names) is not None
    ]
    points: dict[tuple[Any, bool], list[FrozenTrial]] = {}
    for trial in drawing.thinned(with_position):
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
            drawing.dots(
                of_group,
                [_position(trial, names) for trial in of_group],
                definition,
                name=f"depth {depth}, pruned" if pruned and group else name,
                marker={
                    "color": drawing.COLOURS[depths.index(depth) % len(drawing.COLOURS)],
                    "symbol": "x-thin-open" if pruned else "circle",
                    "size": 8,
                    "line": {
                        "width": 2 if pruned else 0,
                        "color": drawing.COLOURS[depths.index(depth) % len(drawing.COLOURS)],
                    },
                },
            )
        )
    axis: dict[str, Any] = {}
    parameter = definition.space[names[0]]
    if isinstance(parameter, Choice):
        axis = drawing.choice_axis(parameter.choices)
    elif parameter.log:
        axis["type"] = "log"
    elif len({_position(trial, names) for trial in with_position}) == 1:
        # Plotly would draw the axis from one below to one above, where no dropout rate can be.
        margin = 0.04 * (parameter.high - parameter.low)
        axis["range"] = [parameter.low - margin, parameter.high + margin]
    axis_title = " or ".join(name.replace("_", " ") for name in names)
    title = f"Accuracy against {axis_title}{drawing.sample_note([with_position])}"
    accuracies = drawing.accuracy_axis(map(drawing.accuracy, with_position))
    return drawing.framed(traces, title, axis_title, drawing.score_title(definition), xaxis=axis, yaxis=accuracies)


def against_cost(trials: Sequence[FrozenTrial], definition: Definition) -> go.Figure | None:
    """Accuracy against the model's parameters and the training's seconds, each with its Pareto front."""
    complete = drawing.complete(trials)
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
        sample = drawing.thinned(known)
        dots = {"color": drawing.COLOURS[5], "size": 7}
        costs = [cost_of(trial) for trial in sample]
        figure.add_trace(drawing.dots(sample, costs, definition, "complete trials", dots, show=column == 1), 1, column)
        costs = [cost_of(trial) for trial in front]
        line = drawing.dots(front, costs, definition, "Pareto front", {"color": drawing.COLOURS[1]}, show=column == 1)
        figure.add_trace(
            line.update(mode="lines+markers", line={"shape": "hv", "color": drawing.COLOURS[1]}), 1, column
        )
        figure.update_xaxes(title_text=title, row=1, col=column)
    figure.update_yaxes(title_text=drawing.score_title(definition), col=1)
    figure.update_yaxes(**drawing.accuracy_axis(map(drawing.accuracy, complete)))
    return drawing.styled(figure, f"Accuracy against cost{drawing.sample_note([known for _, _, known in panels])}")


def best_so_far(trials: Sequence[FrozenTrial], definition: Definition) -> go.Figure | None:
    """The best accuracy so far, against trials and against wall time since the first one started."""
    # It is not known when an imported trial was run.
    finished = sorted(
        (trial for trial in trials if trial.state.is_finished() and not trial.user_attrs.get("imported")),
        key=lambda trial: (trial.datetime_complete or datetime.max, trial.number),
    )
    start = min((trial.datetime_start for trial in finished if trial.datetime_start is not None), default=None)
    if start is None or not drawing.complete(finished):
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
            texts.append(drawing.trial_text(best, definition))
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
                line={"shape": "hv", "color": drawing.COLOURS[0]},
                name="best so far",
                showlegend=False,
            ),
            1,
            column,
        )
        figure.update_xaxes(title_text=title, rangemode="tozero", row=1, col=column)
    figure.update_xaxes(**drawing.count_axis(len(finished)), col=1)
    figure.update_yaxes(title_text=drawing.score_title(definition), col=1)
    figure.update_yaxes(**drawing.accuracy_axis(values))
    return drawing.styled(figure, "Best so far")


def pareto(trials: Sequence[FrozenTrial], cost: Callable[[FrozenTrial], float]) -> list[FrozenTrial]:
    """The Pareto front: complete trials, cheapest first, each more accurate than all cheaper ones."""
    front: list[FrozenTrial] = []
    for trial in sorted(trials, key=lambda trial: (cost(trial), *rank_key(trial))):
        if not front or trial.values[0] > front[-1].values[0]:
            front.append(trial)
    return front


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
