"""The figure of a confirmation: each candidate's accuracies on the test images, and the interval of their mean."""

import plotly.graph_objects as go

from studies import drawing
from studies.confirmation import Confirmed


def confirmed_estimates(confirmed: Confirmed | None) -> go.Figure | None:
    """A row for each candidate, the highest mean first; None while none has a result."""
    estimates = [estimate for estimate in confirmed.estimates if estimate.mean is not None] if confirmed else []
    if not estimates:
        return None
    names = [f"trial {estimate.trial}" for estimate in estimates]
    seeds = [
        (accuracy, name) for estimate, name in zip(estimates, names, strict=True) for accuracy in estimate.accuracies
    ]
    means = [(estimate.mean or 0.0, estimate.of_mean) for estimate in estimates]
    searched = [(e.searched, name) for e, name in zip(estimates, names, strict=True) if e.searched is not None]
    traces = [
        go.Scatter(
            x=[accuracy for accuracy, _ in seeds],
            y=[name for _, name in seeds],
            mode="markers",
            name="one seed, test images",
            marker={"color": drawing.COLOURS[0], "size": 7, "opacity": 0.6},
        ),
        go.Scatter(
            x=[mean for mean, _ in means],
            y=names,
            mode="markers",
            name="mean, with its 95 % interval",
            marker={"color": drawing.COLOURS[1], "size": 11, "symbol": "diamond"},
            error_x={
                "type": "data",
                "symmetric": False,
                "array": [interval.high - mean if interval else 0.0 for mean, interval in means],
                "arrayminus": [mean - interval.low if interval else 0.0 for mean, interval in means],
                "color": drawing.COLOURS[1],
            },
        ),
    ]
    if searched:
        traces.append(
            go.Scatter(
                x=[accuracy for accuracy, _ in searched],
                y=[name for _, name in searched],
                mode="markers",
                name="in the search, validation images",
                marker={"color": drawing.GREY, "size": 10, "symbol": "circle-open"},
            )
        )
    return drawing.framed(
        traces,
        "Confirmed on the test images",
        "accuracy",
        "",
        xaxis={"tickformat": ".4~f"},
        yaxis={"type": "category", "autorange": "reversed"},
    ).update_layout(height=220 + 60 * len(estimates))
