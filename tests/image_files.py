"""Image files that tests write, without a library: PNG, as https://www.w3.org/TR/png-3/ says."""

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.datasets import load_digits


def write_png(path: Path, image: Any) -> None:
    """Writes `image`, (height, width, 1 or 3 or 4) in uint8, to `path`; the folder is made if needed."""
    height, width, channels = image.shape
    kind = {1: 0, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.tobytes() for row in np.ascontiguousarray(image))
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    chunks = [
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in parts
    ]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


def write_digits(folder: Path, count: int, classes: tuple[str, ...] = ("even", "odd")) -> None:
    """Writes the first `count` digits of scikit-learn, 8x8 and grey, as PNG files, class by `digit % len(classes)`."""
    digits = load_digits()
    for index, (image, digit) in enumerate(zip(digits.images[:count], digits.target, strict=False)):
        grey = np.rint(image * 255.0 / 16.0).astype(np.uint8)[..., np.newaxis]
        write_png(folder / classes[digit % len(classes)] / f"{index:04}.png", grey)
