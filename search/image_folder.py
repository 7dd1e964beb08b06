"""Images in a folder: which files belong to which class, and the file of arrays that they are converted to once.

Imports no Keras. Another process (`search.image_conversion`) decodes the files, so that no trainer does it again.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from search.errors import DataError
from search.images import Array
from storage.errors import many
from storage.settings import environment_without_secrets
from studies.class_folders import SUFFIXES, files_below, files_by_class, identities_above, parts
from studies.definition import Data
from studies.wording import names_text

PARTS = {"train", "test", "val", "valid", "validation"}  # no classes, where there are no others
FORMAT = 1  # of the converted file: another number makes it again


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The image files of a folder. Files are relative to it, each with the number of its class."""

    folder: Path
    classes: tuple[str, ...]  # the names of the sub-folders, sorted
    train: tuple[tuple[str, int], ...]
    test: tuple[tuple[str, int], ...]
    notes: tuple[str, ...] = ()  # what is not read, a sentence each


def listing(folder: Path, data: Data) -> Listing:
    """The images of a folder with one sub-folder a class, or with ``train/`` and perhaps ``test/`` of such folders.

    Without ``test/``, the share `data.test` of each class is kept as test images, chosen by the names of the files.
    Raises DataError if there are no images, or only those of one class.
    """
    found = parts(folder)
    if "test" in found and "train" not in found:
        raise DataError(
            f"{folder}/ has test/ with a sub-folder for each class, but no such train/: move the folders of the images "
            "to train with into train/, or rename test/ if it is a class"
        )
    by_class = found.get("train") or files_by_class(folder, folder)
    no_classes = by_class.keys() <= PARTS  # also if there are no images at all
    base = folder / "train" if "train" in found or (no_classes and "train" in by_class) else folder
    if no_classes:
        raise DataError(
            f"{base}/ has no images ({', '.join(SUFFIXES)}) in sub-folders: put the images of each class into a "
            "sub-folder of their own, which has the name of the class"
        )
    classes = tuple(by_class)
    if len(classes) < 2:
        raise DataError(f"{base}/ has images of only the class {classes[0]!r}: add a sub-folder of another class")
    notes = [*_other_files(base)]
    if "train" not in found:
        _require_classes(by_class, folder)
        train, test = _kept_for_test(by_class, base, data.test or 0.0)
        return Listing(folder=folder, classes=classes, train=train, test=test, notes=tuple(notes))
    notes += [
        f"{path}/ is not read, only the sub-folders of train/ and test/ are"
        for path in sorted(folder.iterdir())
        if path.is_dir() and path.name not in found and not path.name.startswith(".")
    ]
    tests = found.get("test", {})
    unknown = sorted(tests.keys() - by_class.keys())
    if unknown:
        raise DataError(
            f"{folder}/test/ has the class {unknown[0]!r}, and {base}/ has only {', '.join(classes)}: give both the "
            "same sub-folders"
        )
    if "test" in found and data.test is not None:
        raise DataError(f"data.test = {data.test:g} is for folders without test/, and {folder}/ has one: leave it out")
    numbers = {name: number for number, name in enumerate(classes)}
    missing = [name for name in classes if name not in tests]
    if "test" in found and missing:
        notes.append(
            f"{folder}/test/ has no image of {names_text(missing, 5)}: a confirmation says nothing about such classes"
        )
    if "test" in found:
        train = tuple((file, numbers[name]) for name, files in by_class.items() for file in files)
        test = tuple((file, numbers[name]) for name, files in tests.items() for file in files)
    else:
        train, test = _kept_for_test(by_class, base, data.test or 0.0)
    return Listing(folder=folder, classes=classes, train=train, test=test, notes=tuple(notes))


def _require_classes(by_class: Mapping[str, list[str]], folder: Path) -> None:
    """Raises DataError if the sub-folders are parts of the data under other names, such as ``Training/``."""
    # The sub-folders of each with images in them; "" stands for its own images.
    inner = {
        name: {"" if file.count("/") == 1 else file.split("/")[1] for file in files} for name, files in by_class.items()
    }
    classes = next((inner[name] for name in inner if "train" in name.lower()), set())
    if len(classes) > 1 and "" not in classes and all(each <= classes for each in inner.values()):
        raise DataError(
            f"{folder}/ has the sub-folders {', '.join(by_class)}, and these have sub-folders of the same names "
            f"({', '.join(sorted(classes)[:5])}): call them train/ and test/, or, if they are classes, put the images "
            "into them and not into sub-folders"
        )


def _other_files(base: Path) -> Iterator[str]:
    others = Counter(
        path.suffix.lower() or path.name
        for path in files_below(base, identities_above(base))
        if path.suffix.lower() not in SUFFIXES
    )
    loose = sum(path.suffix.lower() in SUFFIXES for path in base.iterdir() if path.is_file())
    if others:
        kinds = ", ".join(kind for kind, _ in others.most_common(5))
        verb = "is" if others.total() == 1 else "are"
        yield f"{base}/ has {many(others.total(), 'file')} that {verb} not read, because of the type: {kinds}"
    if loose:
        verb, pronoun = ("is", "it has") if loose == 1 else ("are", "they have")
        yield (
            f"{base}/ has {many(loose, 'image')} outside its sub-folders that {verb} not read, because {pronoun} no "
            "class"
        )


_Files = tuple[tuple[str, int], ...]


def _kept_for_test(by_class: Mapping[str, list[str]], base: Path, share: float) -> tuple[_Files, _Files]:
    """The files to train with and the test files, which are `share` of each class.

    The names of the files choose, and no seed: trainings from different seeds must be judged by the same images, and
    none of these may have been in a search.
    """
    train: list[tuple[str, int]] = []
    test: list[tuple[str, int]] = []
    for number, (name, files) in enumerate(by_class.items()):
        if share > 0.0 and len(files) == 1:
            raise DataError(
                f"{base}/{name}/ has only 1 image, and data.test = {share:g} keeps some of each class for the test: "
                "add images to it, or leave data.test out"
            )
        count = min(max(1, round(len(files) * share)), len(files) - 1) if share > 0.0 else 0
        kept = set(sorted(files, key=_order_of_test)[:count])
        for file in files:
            (test if file in kept else train).append((file, number))
    return tuple(train), tuple(test)


def _order_of_test(file: str) -> bytes:
    """Puts files into an order that looks random, but depends on their names alone."""
    return hashlib.sha256(os.fsencode(file)).digest()


def converted(listed: Listing, data: Data, cache: Path) -> Path:
    """The uncompressed .npz file in the folder `cache` with the images of `listed`; made if it does not exist yet.

    It has x_train, y_train, class_names and skipped (the files that were left out), and x_test and y_test if there are
    test images. A file that was changed, by its size or its time, makes another one. Raises DataError.
    """
    file = cache / f"{listed.folder.name}-{_digest(listed, data)}.npz"
    if file.is_file():
        return file
    order = {
        "folder": str(listed.folder),
        "classes": listed.classes,
        "train": listed.train,
        "test": listed.test,
        "size": data.size,
        "skip_bad": data.skip_bad,
        "file": str(file),
    }
    problem = run_conversion(order)
    if problem is not None:
        raise DataError(problem)
    return file


def run_conversion(order: Mapping[str, Any]) -> str | None:
    """Has another process do what `search.image_conversion.main` says; returns what is wrong, as one sentence."""
    result = subprocess.run(
        [sys.executable, "-P", "-m", "search.image_conversion"],
        input=json.dumps(order),
        # The processor is enough, and a GPU's memory belongs to the trainers.
        env=environment_without_secrets() | {"CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode == 0:
        return None
    reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1][:300]
    return result.stdout.strip() or (
        f"the images of {order['folder']}/ cannot be converted ({reason}): can TensorFlow be imported, and is there "
        "memory and disk?"
    )


def _digest(listed: Listing, data: Data) -> str:
    digest = hashlib.sha256(repr((FORMAT, data.size, data.skip_bad, listed.classes)).encode())
    for part in (listed.train, listed.test):
        for name, number in part:
            try:
                status = (listed.folder / name).stat()
                digest.update(repr((name, number, status.st_size, status.st_mtime_ns)).encode())
            except OSError:  # a broken link: the conversion says so
                digest.update(repr((name, number)).encode())
        digest.update(b"|")
    return digest.hexdigest()[:16]


def notes_of(listed: Listing, read: Callable[[], Array]) -> tuple[str, ...]:
    """What is not read of a folder, a sentence each; `read` gives the array `skipped` of its converted file."""
    skipped = [str(name) for name in read()]
    if not skipped:
        return listed.notes
    names = ", ".join(skipped[:5]) + (", ..." if len(skipped) > 5 else "")
    verb, pronoun = ("is", "it") if len(skipped) == 1 else ("are", "they")
    files = many(len(skipped), "file")
    return (*listed.notes, f"{files} {verb} left out, because {pronoun} cannot be read as images: {names}")
