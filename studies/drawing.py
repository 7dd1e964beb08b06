"""What all figures of a study have in common: colours, axes, dots, texts and style.

Figures have no background and grey texts, because the page that shows them may be light or dark. Coordinates are plain
lists, because older dashboards cannot draw the base64 arrays of newer Plotly versions. Importing Plotly takes a moment,
so this module is imported only where figures are drawn.
"""

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from optuna.trial import FrozenTrial, TrialState

from storage import attributes, metric
from storage.errors import many
from storage.ranking import is_scored
from studies.definition import Definition
from studies.results import Curve

LIMIT = 1000  # points in a plot: a page with 10,000 is slow, and shows no more
COLOURS = (
    "#3B8FD0",
    "#E0701C",
    "#009E73",
    "#CC79A7",
    "#C9A000",
    "#56B4E9",
    "#9467BD",
)  # colour-blind people can distinguish them (after Okabe and Ito), on white and on black
NOTEBOOK = "#888888"
GREY = "#808080"  # of texts and axes
CLEAR = "rgba(0,0,0,0)"


def complete(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Those that are complete with a finite value."""
    return [trial for trial in trials if is_scored(trial)]


def accuracy(trial: FrozenTrial) -> float | None:
    """The accuracy at which a trial is drawn: its value; of a pruned one that of its last epoch."""
    if trial.state not in (TrialState.COMPLETE, TrialState.PRUNED):
        return None
    if trial.values is not None:
        value = float(trial.values[0])
    elif trial.last_step is not None:
        value = trial.intermediate_values[trial.last_step]
    else:
        return None
    return value if math.isfinite(value) else None


def count_axis(last: int) -> dict[str, Any]:
    """An axis of whole numbers up to `last`. With only a few, Plotly would also label the halves."""
    return {"tick0": 0, "dtick": 1} if last <= 10 else {}


def accuracy_axis(values: Iterable[float | None]) -> dict[str, Any]:
    """An axis of accuracies. If all are equal, Plotly would draw it from one below to one above."""
    different = {value for value in values if value is None or math.isfinite(value)}
    value = next(iter(different), None)
    same = len(different) == 1 and value is not None
    return {"tickformat": ".4~f"} | ({"range": [value - 0.05, value + 0.05]} if same and value is not None else {})


def choice_axis(choices: Iterable[Any]) -> dict[str, Any]:
    """An axis of choices in the order of the definition. Plotly's own is that of the trials."""
    return {
        "type": "category",
        "categoryorder": "array",
        "categoryarray": [html.escape(choice) if isinstance(choice, str) else choice for choice in choices],
    }


def thinned(trials: Sequence[FrozenTrial], limit: int = LIMIT) -> list[FrozenTrial]:
    """At most `limit` trials: half are the best ones, the others are spread evenly over the rest of the ranking."""
    if len(trials) <= limit:
        return list(trials)
    ranked = sorted(trials, key=lambda trial: (-(accuracy(trial) or 0.0), trial.number))
    kept, rest = ranked[: limit // 2], ranked[limit // 2 :]
    return kept + [rest[index * len(rest) // (limit // 2)] for index in range(limit // 2)]


def sample_note(groups: Sequence[Sequence[FrozenTrial]], limit: int = LIMIT) -> str:
    """The end of a title: which trials are shown, if not all are."""
    note = f" (the best {limit // 2}, and a sample of the others)"
    return note if any(len(group) > limit for group in groups) else ""


def dots(
    trials: Sequence[FrozenTrial],
    x: Sequence[Any],
    definition: Definition,
    name: str,
    marker: Mapping[str, Any],
    show: bool = True,
    y: Sequence[float] | None = None,  # the trials' accuracies, unless they are their values
) -> go.Scatter:
    """A trace of one dot for each trial."""
    return go.Scatter(
        x=list(x),
        y=[accuracy(trial) for trial in trials] if y is None else list(y),
        text=[trial_text(trial, definition) for trial in trials],
        hoverinfo="text",
        mode="markers",
        name=html.escape(name),
        legendgroup=html.escape(name),
        showlegend=show,
        marker=dict(marker),
    )


def line(curve: Curve, name: str, values: Sequence[float], index: int, dash: str, show: bool = True) -> go.Scatter:
    """A trace of one value for each epoch, in the colour number `index`."""
    return go.Scatter(
        x=list(range(1, len(values) + 1)),
        y=list(values),
        mode="lines+markers",
        name=name,
        legendgroup=f"trial {curve.number}",
        showlegend=show,
        hovertext=params_text(curve.params),
        line={"color": COLOURS[index % len(COLOURS)], "dash": dash},
        marker={"size": 4},
    )


def trial_text(trial: FrozenTrial, definition: Definition) -> str:
    """What a dot says when the mouse is over it."""
    value = accuracy(trial)
    score = "" if value is None else f"<br>{score_title(definition)} {value:.4f}"
    pruned = f", pruned after {attributes.last_step_text(trial)}" if trial.state == TrialState.PRUNED else ""
    label = f"<br>{html.escape(str(trial.user_attrs['label']))}" if "label" in trial.user_attrs else ""
    return f"trial {trial.number}{pruned}<br>{params_text(trial.params)}{score}{label}"


def params_text(params: Mapping[str, Any]) -> str:
    """Hyperparameters and their values, escaped."""
    texts = (f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in params.items())
    return html.escape(", ".join(texts))


def score_title(definition: Definition) -> str:
    """The title of an axis of trials' values."""
    return definition.judged_on + " accuracy"


def images(kind: str, definition: Definition) -> str:
    """`kind`, but "test" for the validation images of a study with the notebook's protocol."""
    return metric.epochs_judged_on(definition.protocol) if kind == "validation" else kind


def size_text(definition: Definition) -> str:
    """How long and with how many images a replay of the notebook trains."""
    images = f"{definition.data.limit:,}" if definition.data.limit is not None else "60,000"
    return f"{many(definition.budget.epochs, 'epoch')} of {images} images"


def framed(
    traces: Sequence[Any],
    title: str,
    x: str,
    y: str,
    xaxis: Mapping[str, Any] | None = None,
    yaxis: Mapping[str, Any] | None = None,
) -> go.Figure:
    """A figure of `traces` with two axes of these titles and attributes."""
    figure = go.Figure(list(traces))
    figure.update_xaxes(title_text=html.escape(x), **(xaxis or {}))
    figure.update_yaxes(title_text=html.escape(y), **(yaxis or {}))
    return styled(figure, title)


def styled(figure: go.Figure, title: str) -> go.Figure:
    """The figure with a title and the style of all figures."""
    has_legend = sum(trace.showlegend is not False for trace in figure.data) > 1
    # A named template has 7 kB, and the dashboard would send it at every poll.
    figure.update_layout(
        template=go.layout.Template(),
        title={"text": title, "x": 0.01, "font": {"size": 16}},
        font={"color": GREY},
        paper_bgcolor=CLEAR,
        plot_bgcolor=CLEAR,
        height=420,
        margin={"l": 70, "r": 20, "t": 70, "b": 100 if has_legend else 55},
        hovermode="closest",
        # Below, because a phone has no room beside the plot.
        legend={"orientation": "h", "x": 0, "yref": "container", "y": 0, "yanchor": "bottom"},
    )
    axis = {"gridcolor": "rgba(128,128,128,0.25)", "zeroline": False, "linecolor": "#888888", "showline": True}
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis)
    return figure
