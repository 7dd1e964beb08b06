"""A trial's files (model, history, checkpoint), on a disk, written whole or not at all."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MODEL = "model.keras"
HISTORY = "history.json"
CHECKPOINT = "checkpoint.npz"


def folder(root: Path, study: str, number: int) -> Path:
    """Where trial `number` of `study` has its files: ``<root>/<study>/<number>``."""
    return root / study / str(number)


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, and renames it to `path` when the block ends well.

    A process killed at any moment leaves the old file or the new one, never a part. The temporary name
    keeps the ending, because Keras chooses its format by it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex}-{path.name}")
    try:
        yield temporary
        # Without the sync a power cut can leave the new name on an empty file.
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Removes the file, if it is there."""
    path.unlink(missing_ok=True)
