"""Converts image files to one file of arrays: ``python -P -m search.image_conversion``, with an order as JSON on stdin.

It is a separate program, because importing TensorFlow takes seconds and no command of ours does that. Files are decoded
and resized with the TensorFlow functions that keras.utils.image_dataset_from_directory calls. Here each bad file is
named, images may have one channel or three, and resizing smooths (`antialias`), as large photos need it.
"""

import json
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from search.errors import DataError
from search.images import Array
from storage.artifacts import written_atomically
from storage.errors import many

SHOWN = 5  # bad files that are named


def main() -> None:
    """Reads the order, converts the files and writes the file; prints a problem with the images as one sentence."""
    order = json.load(sys.stdin)
    try:
        arrays = convert(order)
        # Not compressed: all trainers of a machine map one copy of it.
        with written_atomically(Path(order["file"])) as path:
            np.savez(path, allow_pickle=False, **arrays)
    except DataError as error:
        print(
            str(error).encode("utf-8", "replace").decode("utf-8")
        )  # a name of a file may have bytes that are not UTF-8
        sys.exit(1)
    except OSError as error:
        print(f"{order['file']} cannot be written ({error.strerror or error}): is the disk full, or read-only?")
        sys.exit(1)


def convert(order: dict[str, Any]) -> dict[str, Array]:
    """The arrays of `search.image_folder.converted`. Raises DataError."""
    folder, size = Path(order["folder"]), order["size"]
    files = [name for name, _ in (*order["train"], *order["test"])]
    images = _decoded(folder, files, size)
    bad = [name for name, image in zip(files, images, strict=True) if image is None]
    if bad and not order["skip_bad"]:
        names = ", ".join(bad[:SHOWN]) + (", ..." if len(bad) > SHOWN else "")
        files_text, them = many(len(files), "image file"), "it" if len(bad) == 1 else "them"
        raise DataError(
            f"{len(bad):,} of the {files_text} of {folder}/ cannot be read ({names}): repair or remove {them}, or "
            f"leave {them} out with --skip-bad or data.skip_bad = true"
        )
    count = len(order["train"])
    grey = all(image is None or image.shape[-1] == 1 for image in images)
    arrays = _arrays("train", order["train"], images[:count], grey)
    if order["test"]:
        arrays |= _arrays("test", order["test"], images[count:], grey)
    left = set(arrays["y_train"].tolist())
    empty = [name for number, name in enumerate(order["classes"]) if number not in left]
    if empty:
        raise DataError(f"{folder}/ has no readable image of the class {empty[0]!r}: repair its files")
    return {**arrays, "class_names": np.array(order["classes"]), "skipped": np.array(bad, dtype=np.str_)}


def _decoded(folder: Path, files: Sequence[str], size: Sequence[int] | None) -> list[Array | None]:
    """Each image as (height, width, 1 or 3), uint8; None for a file that cannot be read."""
    decode = _decoder(size)
    images: list[Array | None] = []
    first: tuple[str, tuple[int, ...]] | None = None
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for name, image in zip(files, threads.map(decode, (folder / name for name in files)), strict=True):
            images.append(image)
            if image is None:
                continue
            if first is None:
                first = name, image.shape[:2]
                _require_memory(len(files), image.shape, folder)
            if image.shape[:2] != first[1]:
                threads.shutdown(cancel_futures=True)
                shapes = [f"{height}x{width}" for height, width in (first[1], image.shape[:2])]
                raise DataError(
                    f"{folder}/ has images of several sizes ({first[0]}: {shapes[0]}, {name}: {shapes[1]}): choose one "
                    "under [data], such as size = [64, 64]"
                )
    return images


def _decoder(size: Sequence[int] | None) -> Callable[[Path], Array | None]:
    import tensorflow as tf

    def decode(file: Path) -> Array | None:
        try:
            image = tf.io.decode_image(file.read_bytes(), expand_animations=False)
        except (tf.errors.InvalidArgumentError, OSError):
            return None
        channels = 1 if image.shape[-1] in (1, 2) else 3  # 2 and 4 have an alpha channel
        image = image[..., :channels]
        if size is not None and tuple(image.shape[:2]) != tuple(size):
            image = tf.image.resize(tf.cast(image, tf.float32), size, antialias=True)
            image = tf.cast(tf.round(tf.clip_by_value(image, 0.0, 255.0)), tf.uint8)
        decoded: Array = image.numpy()
        return decoded

    return decode


def _require_memory(count: int, shape: tuple[int, ...], folder: Path) -> None:
    needed, free = 2 * count * int(np.prod(shape)), psutil.virtual_memory().available
    if needed > free:
        raise DataError(
            f"{folder}/ has {count} images of {shape[0]}x{shape[1]}, which need {needed / 1e9:.1f} GB of memory while "
            f"they are converted, and {free / 1e9:.1f} GB are free: choose a smaller size under [data], such as "
            "size = [64, 64]"
        )


def _arrays(part: str, files: Sequence[Any], images: Sequence[Array | None], grey: bool) -> dict[str, Array]:
    """The images and labels of one part. If any image has colours, grey ones get three equal channels."""
    pairs = [(image, number) for image, (_, number) in zip(images, files, strict=True) if image is not None]
    if not pairs:
        raise DataError(f"none of the {part} images can be read: repair the files")
    x = np.empty((len(pairs), *pairs[0][0].shape[:2], 1 if grey else 3), np.uint8)
    for index, (image, _) in enumerate(pairs):
        x[index] = image
    return {f"x_{part}": x, f"y_{part}": np.array([number for _, number in pairs], np.int64)}


if __name__ == "__main__":
    main()
