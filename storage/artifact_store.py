"""Where the files of all attempts are kept: a folder, or an object store (`storage.object_store`).

Everything that reads, lists or removes a trial's files does it through one of these two. A path is relative, as the
database has it: ``<study>-<id>/<trial>/<attempt>/<name>``. Trainer processes always write plain files, into
`ArtifactStore.folder`.
"""

import logging
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from storage import artifacts

log = logging.getLogger(__name__)

_NUMBER = re.compile(r"0|[1-9][0-9]*")
# No other file is ever touched, wherever the settings point.
OURS = re.compile(rf"(\.[0-9a-f]{{32}}-)*({'|'.join(map(re.escape, artifacts.ALL))})")  # a temporary one may have two


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A file of an attempt."""

    path: PurePosixPath
    size: int  # bytes
    modified: float  # seconds since 1970


@dataclass(frozen=True, kw_only=True)
class ObjectFile:
    """A file in an object store, for people. Its text is its URL."""

    url: str
    size: int  # bytes

    def __str__(self) -> str:
        return self.url


class ArtifactStore(ABC):
    """The files of all attempts."""

    folder: Path  # absolute, on this machine: attempts write below it
    is_far: bool  # whether each look takes a moment: then nothing is looked up or removed inside a transaction

    @abstractmethod
    def check(self, patience: float = 0.0) -> None:
        """Finds out whether files can be written, read, listed and removed, before anything is claimed.

        Waits for `patience` seconds for a store that is away. Raises SettingsError or ObjectStoreError.
        """

    @abstractmethod
    def name(self, path: PurePosixPath | str) -> str:
        """The file or folder `path` as people know it: an absolute path, or a URL."""

    @abstractmethod
    def fetch(self, path: object) -> Path | None:
        """The file `path` on this machine; None if it does not exist, or if `path` is not a relative path.

        A file in a folder that this user may not look into does not exist for him, here and in `existing`.
        `path` is a trial's attribute, so it may be anything. Use it for files that never change: not for checkpoints.
        Raises ObjectStoreError.
        """

    @abstractmethod
    def fetch_all(self, paths: Collection[object]) -> None:
        """Has `fetch` of each of `paths` find it on this machine, all at once. Raises ObjectStoreError."""

    @abstractmethod
    def open(self, path: PurePosixPath) -> BinaryIO | None:
        """The bytes of `path` as they are now; None if it does not exist. Raises ObjectStoreError."""

    @abstractmethod
    def existing(self, paths: Collection[PurePosixPath]) -> "dict[PurePosixPath, Path | ObjectFile]":
        """Those of `paths` that exist, in their order. Raises ObjectStoreError."""

    @abstractmethod
    def files(self) -> Iterator[Stored]:
        """Every file of every attempt, by path, but for those in folders that this user may not look into.

        Such a folder is named in the log. Raises ObjectStoreError.
        """

    def files_of(self, study: str) -> Iterator[Stored]:
        """Those `files` that are in a folder whose name begins with `study`, as those of that study are."""
        return (file for file in self.files() if file.path.parts[0].startswith(study))

    @abstractmethod
    def still(self, file: Stored) -> Stored | None:
        """The `file` that `files` gave, as it is now; None if it was removed. An object is taken to be as it was."""

    @abstractmethod
    def keep(self, path: PurePosixPath) -> None:
        """Has other machines find the file that was written to `path` below `folder`. Raises ObjectStoreError."""

    @abstractmethod
    def remove(self, paths: Collection[PurePosixPath]) -> None:
        """Removes the files, those that exist. Raises OSError or ObjectStoreError."""

    def remove_local(self, paths: Collection[PurePosixPath]) -> None:
        """Removes the files from this machine, and folders that are empty then. Raises OSError."""
        for path in paths:
            artifacts.remove(self.folder / path)
        for parent in {path.parent for path in paths}:
            self.remove_empty(parent)

    def remove_empty(self, folder: PurePosixPath) -> None:
        """Removes the folder from this machine, if it exists and is empty."""
        try:
            (self.folder / folder).rmdir()
        except OSError:
            return  # it has other files


@dataclass(frozen=True)
class FolderStore(ArtifactStore):
    """A folder, of this machine or shared by several. A file is where readers find it as soon as it is written."""

    folder: Path
    is_far = False

    def check(self, patience: float = 0.0) -> None:
        """Does nothing: a disk that cannot be written ends a trial with that reason, and costs no budget."""

    def name(self, path: PurePosixPath | str) -> str:
        return str(self.folder / path)

    def fetch(self, path: object) -> Path | None:
        found = artifacts.inside(self.folder, path)
        return found if found is not None and _is_file(found) else None

    def fetch_all(self, paths: Collection[object]) -> None:
        """Does nothing: they are on this machine."""

    def open(self, path: PurePosixPath) -> BinaryIO | None:
        found = self.folder / path
        # A link must not lead out of the folder.
        if found.resolve().is_relative_to(self.folder.resolve()) and _is_file(found):
            return found.open("rb")
        return None

    def existing(self, paths: Collection[PurePosixPath]) -> dict[PurePosixPath, Path | ObjectFile]:
        return {path: self.folder / path for path in paths if _is_file(self.folder / path)}

    def files(self) -> Iterator[Stored]:
        return local_files(self.folder)

    def files_of(self, study: str) -> Iterator[Stored]:
        # A folder of another study that cannot be listed must not be in the way.
        return local_files(self.folder, study)

    def still(self, file: Stored) -> Stored | None:
        return _stored(self.folder, self.folder / file.path)

    def keep(self, path: PurePosixPath) -> None:
        """Does nothing: it is there."""

    def remove(self, paths: Collection[PurePosixPath]) -> None:
        for path in paths:
            artifacts.remove(self.folder / path)


def of(where: ArtifactStore | Path) -> ArtifactStore:
    """The store itself, or that of a folder."""
    return where if isinstance(where, ArtifactStore) else FolderStore(where.absolute())


def local_files(root: Path, study: str = "") -> Iterator[Stored]:
    """Every file of an attempt below the folder `root`, by path; only those of folders whose name begins with `study`.

    A folder that this user may not look into is named in the log, and has no files.
    """
    for of_study in _scan(root)[0]:
        for trial in _scan(of_study)[0] if of_study.name.startswith(study) else ():
            if not _NUMBER.fullmatch(trial.name):
                continue
            attempts, files = _scan(trial)  # older versions had one folder for a trial
            for attempt in attempts:
                files += _scan(attempt)[1] if _NUMBER.fullmatch(attempt.name) else []
            for path in files:
                stored = _stored(root, path)
                if stored is not None:
                    yield stored


def _stored(root: Path, path: Path) -> Stored | None:
    try:
        status = path.stat()
    except OSError:  # its worker removed it a moment ago, or it is in another user's folder
        return None
    return Stored(path=PurePosixPath(path.relative_to(root)), size=status.st_size, modified=status.st_mtime)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # it is in another user's folder
        return False


def _scan(folder: Path) -> tuple[list[Path], list[Path]]:
    """The folders and the files of ours in `folder`, each by name, without links."""
    folders, files = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.is_dir(follow_symlinks=False):
                    folders.append(Path(entry.path))
                elif OURS.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                    files.append(Path(entry.path))
    except (FileNotFoundError, NotADirectoryError):  # it was removed a moment ago, or never made
        pass
    except OSError as error:  # another user's
        log.warning("the files in %s are left out: %s", folder, error.strerror or error)
    return folders, files
