"""Pictures of one trial as SVG files, which optuna-dashboard shows on the trial's page.

They have no background and a grey that is readable on white and on black, because the page may be light or dark.
"""

import base64
import html
import json
import math
import struct
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.artifacts import CONFUSION_PICTURE, CURVES_PICTURE, HISTORY, MISTAKES_PICTURE, PREDICTIONS, stored
from studies.predictions import Predictions, class_name

GREY = "#808080"
BLUE, ORANGE = "#3B8FD0", "#E0701C"  # the figures' first colours
SIZE = 400  # of a picture, in its own units
MOST_NUMBERS = 12  # classes: with more, the numbers in the matrix would not be readable


def write(folder: Path, class_names: Sequence[str] = ()) -> list[str]:
    """Draws what an attempt's `folder` has a history or predictions for; returns the names of the new files.

    Raises DiskError if a file cannot be written.
    """
    drawn: dict[str, str] = {}
    if (folder / HISTORY).is_file():
        drawn[CURVES_PICTURE] = curves(json.loads((folder / HISTORY).read_text(encoding="utf-8")))
    if (folder / PREDICTIONS).is_file():
        predictions = Predictions.read(folder / PREDICTIONS)
        drawn[CONFUSION_PICTURE] = confusion(predictions, class_names)
        drawn[MISTAKES_PICTURE] = mistakes(predictions, class_names)
    for name, svg in drawn.items():
        with stored(folder / name) as temporary:
            temporary.write_text(svg, encoding="utf-8")
    return list(drawn)


def curves(history: Sequence[dict[str, Any]]) -> str:
    """Loss and accuracy by epoch; a solid line of the training images, a dashed one of the others.

    `history` is that of the file.
    """
    parts = [_text(SIZE / 2, 18, "solid: training, dashed: other images", anchor="middle")]
    for top, kind, colour in ((30, "accuracy", BLUE), (220, "loss", ORANGE)):
        lines = [[record[key] for record in history] for key in (kind, f"val_{kind}")]
        known = [value for line in lines for value in line if value is not None]
        if not known:
            continue
        low, high = min(known), max(known)
        high += 0.0 if high > low else 1e-6
        parts.append(_box(60, top, 330, 150))
        parts += [_text(54, top + 12, f"{high:.3g}", anchor="end"), _text(54, top + 148, f"{low:.3g}", anchor="end")]
        parts.append(_text(390, top - 5, kind, anchor="end"))
        for values, dash in zip(lines, ("none", "6 4"), strict=True):
            step = 330 / max(1, len(values) - 1)
            points = [
                f"{60 + at * step:.1f},{top + 150 * (high - value) / (high - low):.1f}"
                for at, value in enumerate(values)
                if value is not None
            ]
            style = f'fill="none" stroke="{colour}" stroke-width="2.5" stroke-dasharray="{dash}"'
            parts.append(f'<polyline points="{" ".join(points)}" {style}/>')
            parts += [
                f'<circle cx="{at.split(",")[0]}" cy="{at.split(",")[1]}" r="3" fill="{colour}"/>' for at in points
            ]
    parts.append(_text(225, 390, f"epochs 1 to {len(history)}", anchor="middle"))
    return _svg(parts, "Loss and accuracy by epoch")


def confusion(predictions: Predictions, class_names: Sequence[str] = ()) -> str:
    """How many images of each class (row) the model took for which class (column)."""
    counts = predictions.counts
    classes = len(counts)
    cell = 330 / classes
    parts = [_text(225, 14, f"taken for, {predictions.judged_on} images", anchor="middle")]
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    every = math.ceil(classes / MOST_NUMBERS)
    for row in range(classes):
        if row % every == 0:
            name = class_name(row, class_names)
            parts.append(_text(56, 52 + (row + 0.5) * cell, name[:7], anchor="end"))
            parts.append(_text(60 + (row + 0.5) * cell, 36, name[: max(1, int(cell * every / 7))], anchor="middle"))
        for column in np.flatnonzero(counts[row]):
            # The square root, because mistakes are a few percent.
            colour = _mixed(BLUE if row == column else ORANGE, 0.3 + 0.7 * math.sqrt(shares[row, column]))
            x, y = 60 + column * cell, 48 + row * cell
            place = f'x="{x:.1f}" y="{y:.1f}" width="{cell:.1f}" height="{cell:.1f}"'
            parts.append(f'<rect {place} fill="{colour}"/>')
            if classes <= MOST_NUMBERS:
                number = str(counts[row, column])
                parts.append(_text(x + cell / 2, y + cell / 2 + 4, number, anchor="middle", colour="#000"))
    parts.append(_box(60, 48, 330, 330))
    return _svg(parts, "Confusion matrix")


def mistakes(predictions: Predictions, class_names: Sequence[str] = ()) -> str:
    """The most certain mistakes, each with its class, the answer and its probability."""
    parts = [_text(SIZE / 2, 14, "class > answer, probability", anchor="middle")]
    if len(predictions.mistakes) == 0:
        parts.append(_text(SIZE / 2, SIZE / 2, "the model made no mistake", anchor="middle"))
    for at, (image, lines) in enumerate(
        zip(predictions.mistakes, mistake_lines(predictions, class_names), strict=True)
    ):
        x, y = 8 + at % 5 * 78, 22 + at // 5 * 76
        size = 58 - 10 * (len(lines) - 1)
        where = f'x="{x + 10}" y="{y}" width="56" height="{size}" style="image-rendering: pixelated"'
        parts.append(f'<image {where} href="{png_uri(image)}"/>')
        for below, line in enumerate(lines):
            parts.append(_text(x + 38, y + size + 11 + 10 * below, line, anchor="middle", size=10))
    return _svg(parts, "The most certain mistakes")


def mistake_lines(predictions: Predictions, class_names: Sequence[str]) -> list[list[str]]:
    """For each of the mistakes its class, the model's answer and its probability, in one line or two: "4 > 9, 0.98"."""
    texts = []
    for true, predicted, probability in zip(
        predictions.true, predictions.predicted, predictions.probability, strict=True
    ):
        names = class_name(true, class_names)[:11], class_name(predicted, class_names)[:7]
        short = len(names[0]) + len(names[1]) <= 5
        texts.append(
            [f"{names[0]} > {names[1]}, {probability:.2f}"] if short else [names[0], f"> {names[1]}, {probability:.2f}"]
        )
    return texts


def png_uri(image: NDArray[np.uint8]) -> str:
    """An image (height, width, channels) as a PNG in a ``data:`` URL: grey, grey and alpha, RGB or RGBA.

    See https://www.w3.org/TR/png-3/. Pillow is larger than all that is needed here.
    """
    height, width, channels = image.shape
    # Each line has a first byte 0: it is not filtered.
    lines = np.concatenate([np.zeros((height, 1), np.uint8), image.reshape(height, width * channels)], axis=1)
    header = struct.pack(">2I5B", width, height, 8, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes(), 9)), (b"IEND", b""))
    body = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return f"data:image/png;base64,{base64.b64encode(body).decode()}"


def _mixed(colour: str, share: float) -> str:
    """`colour` mixed with white. Not transparent, so that black numbers are readable on a dark page, too."""
    channels = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return "#" + "".join(f"{round(255 + (channel - 255) * share):02x}" for channel in channels)


def _svg(parts: Iterable[str], title: str) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {SIZE} {SIZE}" width="{SIZE}" height="{SIZE}"'
    font = 'font-family="system-ui, sans-serif"'
    return "\n".join([f"{head} {font}>", f"<title>{title}</title>", *parts, "</svg>", ""])


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 12, colour: str = GREY) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}"'
    return f'<text {place} fill="{colour}">{html.escape(text)}</text>'


def _box(x: float, y: float, width: float, height: float) -> str:
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="none" stroke="{GREY}" stroke-opacity="0.5"/>'
