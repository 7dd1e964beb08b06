"""The image files of a folder that has one sub-folder for each class: which ones are read, and of which class."""

from collections.abc import Iterator
from pathlib import Path

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png")  # those of keras.utils.image_dataset_from_directory


def files_by_class(base: Path, folder: Path) -> dict[str, list[str]]:
    """The image files of each sub-folder of `base` that has any, relative to `folder`. Raises OSError."""
    found = {}
    above = identities_above(base) | {_identity(base)}
    for path in sorted(base.iterdir()):
        if path.is_dir() and not path.name.startswith("."):
            files = [
                file.relative_to(folder).as_posix()
                for file in files_below(path, above)
                if file.suffix.lower() in SUFFIXES
            ]
            if files:
                found[path.name] = files
    return found


def parts(folder: Path) -> dict[str, dict[str, list[str]]]:
    """The images of ``train/`` and ``test/`` by their class, if they are parts of the data. Raises OSError.

    A folder of this name whose images are in no sub-folder is a class as any other.
    """
    found = {part: files_by_class(folder / part, folder) for part in ("train", "test") if (folder / part).is_dir()}
    return {part: by_class for part, by_class in found.items() if by_class}


def files_below(folder: Path, above: frozenset[tuple[int, int]]) -> Iterator[Path]:
    """All files below `folder` in a fixed order, without hidden ones. Raises OSError.

    `above` identifies the folders that contain this one. A link to one of them is not followed: it would repeat its
    images.
    """
    identity = _identity(folder)
    if identity in above:
        return
    folders = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            folders.append(path)
        else:
            yield path
    for path in folders:
        yield from files_below(path, above | {identity})


def identities_above(folder: Path) -> frozenset[tuple[int, int]]:
    """What identifies the folders that contain `folder`."""
    return frozenset(map(_identity, folder.resolve().parents))


def _identity(folder: Path) -> tuple[int, int]:
    """What a folder has in common with the links to it, and with no other folder."""
    status = folder.stat()
    return status.st_dev, status.st_ino
