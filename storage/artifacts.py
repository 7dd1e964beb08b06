"""A trial's files (model, history, pictures, checkpoint ...), on a disk, written whole or not at all."""

import json
import mimetypes
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath, PurePosixPath

from storage.errors import DiskError

MODEL = "model.keras"
HISTORY = "history.json"
SUMMARY = "summary.txt"  # the model's layers
CHECKPOINT = "checkpoint.npz"
PREDICTIONS = "predictions.npz"  # see `studies.predictions`
CURVES_PICTURE, CONFUSION_PICTURE, MISTAKES_PICTURE = "curves.svg", "confusion.svg", "mistakes.svg"
# These are kept as long as the model of their trial, or as its history.
WITH_MODEL = (PREDICTIONS, CONFUSION_PICTURE, MISTAKES_PICTURE)
WITH_HISTORY = (SUMMARY, CURVES_PICTURE)
ALL = (MODEL, HISTORY, CHECKPOINT, *WITH_MODEL, *WITH_HISTORY)
# optuna-dashboard offers these while they exist, and shows the pictures.
DOWNLOADABLE = (MODEL, HISTORY, CHECKPOINT, CURVES_PICTURE, CONFUSION_PICTURE, MISTAKES_PICTURE)

ID_LENGTH = 12  # hexadecimal digits of a study's incarnation, in the name of its folder
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,149}")
_NAMES = uuid.UUID("6f0ed9c4-6bb5-4a55-9a0e-8f5d3f1d3c52")  # of our artifacts' ids


def attempt_folder(study: str, incarnation: str, number: int, attempt: int) -> PurePosixPath:
    """Where an attempt at trial `number` has its files, relative to the artifacts folder.

    ``<study>-<id>/<trial>/<attempt>``: no other attempt has this path, whether of another trial, of a later study of
    this name, or in another database.
    """
    # Plain Optuna may have copied the study under a name that is no folder's.
    name = study if _PLAIN.fullmatch(study) else "study"
    return PurePosixPath(f"{name}-{incarnation[:ID_LENGTH]}", str(number), str(attempt))


def inside(root: Path, below: object) -> Path | None:
    """The path of the file `below` the folder `root`; None unless it is a relative path that stays inside.

    `below` is a trial's attribute. Everyone who may write to the database can change it.
    """
    if not isinstance(below, str) or "\0" in below:
        return None
    path = PurePath(below)
    return root / path if path.name and not path.is_absolute() and ".." not in path.parts else None


def listing(path: PurePosixPath) -> tuple[str, str]:
    """The system attribute, key and value, by which optuna-dashboard offers a trial's file.

    `path` is relative to the artifacts folder. The attribute is the one that ``optuna.artifacts.upload_artifact``
    writes, but the id follows from the path: written again it is the same, and the code that removes the file knows it.
    """
    artifact_id = str(uuid.uuid5(_NAMES, str(path)))
    kind, encoding = mimetypes.guess_type(path.name)
    metadata = {
        "artifact_id": artifact_id,
        "filename": path.name,
        "mimetype": kind or "application/octet-stream",
        "encoding": encoding,
    }
    return f"artifacts:{artifact_id}", json.dumps(metadata)


@contextmanager
def written_atomically(path: Path) -> Iterator[Path]:
    """Yields a temporary path in the same folder, and renames it to `path` when the block ends without an exception.

    A process that is killed at any moment leaves the old file or the new one, never a part. The temporary name keeps
    the suffix, because Keras chooses the format by it.
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


@contextmanager
def stored(path: Path) -> Iterator[Path]:
    """Like `written_atomically`, for a trial's file: raises DiskError if it cannot be written."""
    try:
        with written_atomically(path) as temporary:
            yield temporary
    except OSError as error:
        raise DiskError(
            f"{path} cannot be written ({error.strerror or error}): is the disk full, or the folder another user's?"
        ) from error


def remove(path: Path) -> None:
    """Removes the file, if it exists."""
    path.unlink(missing_ok=True)
