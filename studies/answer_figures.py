"""Figures of one model's answers: the confusion matrix, accuracy by class, its most certain mistakes, sample images.

They are drawn from the file of `studies.predictions`.
"""

import html
import math
from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from studies import drawing
from studies.pictures import mistake_lines, png_uri
from studies.predictions import Answered, class_name

MOST_NUMBERS = 25  # classes: with more, the numbers in the matrix would not be readable
MOST_CLASSES = 200  # of a matrix: with 1,000 it takes 16 MB
MOST_BARS = 40  # classes
TILE, GAP = 1.0, 0.45  # of the images; the gap has the text


def confusion(answered: Answered) -> go.Figure | None:
    """How many images of each class (row) the model took for which class (column); None with very many classes."""
    counts = answered.predictions.counts
    if len(counts) > MOST_CLASSES:
        return None
    names = [html.escape(class_name(number, answered.class_names)) for number in range(len(counts))]
    shares = np.sqrt(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1))  # mistakes are a few percent
    right = np.eye(len(counts), dtype=bool)
    traces = []
    for of_kind, light, dark in ((right, "#C4DDF1", drawing.COLOURS[0]), (~right, "#F6D5BB", drawing.COLOURS[1])):
        chosen = of_kind & (counts > 0)
        traces.append(
            go.Heatmap(
                x=names,
                y=names,
                z=_cells(shares, chosen),
                text=[["" if value is None else value for value in row] for row in _cells(counts, chosen)],
                zmin=0.0,
                zmax=1.0,
                colorscale=[[0.0, light], [1.0, dark]],
                texttemplate="%{text}" if len(counts) <= MOST_NUMBERS else None,
                textfont={"color": "#000000"},
                hovertemplate="%{y} taken for %{x}: %{text}<extra></extra>",
                showscale=False,
                hoverongaps=False,
            )
        )
    figure = drawing.framed(
        traces,
        f"Confusion matrix of trial {answered.trial}, {answered.predictions.judged_on} images",
        "taken for",
        "class",
        xaxis={"type": "category", "constrain": "domain", "automargin": True},
        yaxis={
            "type": "category",
            "autorange": "reversed",
            "scaleanchor": "x",
            "constrain": "domain",
            "automargin": True,
        },
    )
    return figure.update_layout(height=520).update_xaxes(showgrid=False).update_yaxes(showgrid=False)


def accuracy_by_class(answered: Answered) -> go.Figure:
    """The accuracy of each class, the worst first."""
    predictions = answered.predictions
    totals = predictions.counts.sum(axis=1)
    known = [(value, number) for number, value in enumerate(predictions.accuracy_by_class) if value is not None]
    shown = sorted(known)[:MOST_BARS]
    bars = go.Bar(
        x=[html.escape(class_name(number, answered.class_names)) for _, number in shown],
        y=[value for value, _ in shown],
        text=[f"{value:.3f}" for value, _ in shown],
        hovertext=[f"{predictions.counts[number, number]} of {totals[number]} images" for _, number in shown],
        hoverinfo="text",
        marker={"color": drawing.COLOURS[0]},
    )
    which = f", the worst {MOST_BARS} of {len(known)} classes" if len(known) > MOST_BARS else ""
    return drawing.framed(
        [bars],
        f"Accuracy by class of trial {answered.trial}{which}",
        "class",
        f"{predictions.judged_on} accuracy",
        xaxis={"type": "category", "automargin": True},
        yaxis={"range": [0.0, 1.0]},
    )


def mistakes(answered: Answered) -> go.Figure | None:
    """The most certain mistakes: each image with its class, the answer and its probability."""
    predictions = answered.predictions
    if len(predictions.mistakes) == 0:
        return None
    title = f"The most certain mistakes of trial {answered.trial}<br><sup>class > answer, probability</sup>"
    texts = ["<br>".join(map(html.escape, lines)) for lines in mistake_lines(predictions, answered.class_names)]
    return _tiles(predictions.mistakes, texts, title, columns=5)


def samples(answered: Answered) -> go.Figure:
    """Some images of each class."""
    predictions = answered.predictions
    names = [html.escape(class_name(number, answered.class_names)[:12]) for number in predictions.sample_classes]
    return _tiles(predictions.samples, names, f"Images of the data ({predictions.judged_on})", columns=6)


def _cells(values: NDArray[np.float64 | np.int64], chosen: NDArray[np.bool_]) -> list[list[float | None]]:
    """The chosen values; None is an empty cell."""
    return [
        [value if keep else None for value, keep in zip(row, kept, strict=True)]
        for row, kept in zip(values.tolist(), chosen, strict=True)
    ]


def _tiles(images: NDArray[np.uint8], texts: Sequence[str], title: str, columns: int) -> go.Figure:
    """Images of (n, height, width, channels) in rows, each with a text below it, which is HTML."""
    rows = math.ceil(len(images) / columns)
    places = [(at % columns * (TILE + 0.12), at // columns * (TILE + GAP)) for at in range(len(images))]
    labels = go.Scatter(
        x=[x + TILE / 2 for x, _ in places],
        y=[y + TILE + GAP / 2 for _, y in places],
        text=list(texts),
        mode="text",
        textfont={"size": 11, "color": drawing.GREY},
        hoverinfo="skip",
        showlegend=False,
    )
    figure = drawing.framed(
        [labels],
        title,
        "",
        "",
        xaxis={"visible": False, "range": [-0.1, columns * (TILE + 0.12)], "constrain": "domain"},
        yaxis={"visible": False, "range": [rows * (TILE + GAP), -0.1], "scaleanchor": "x", "constrain": "domain"},
    )
    for image, (x, y) in zip(images, places, strict=True):
        size = {"x": x, "y": y, "sizex": TILE, "sizey": TILE, "sizing": "contain"}
        figure.add_layout_image(source=png_uri(image), xref="x", yref="y", layer="below", **size)
    return figure.update_layout(height=90 + 105 * rows, margin={"l": 5, "r": 5, "b": 5})
