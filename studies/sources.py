"""What a definition may name as its images: a ready dataset, a file, a folder, or a function."""

from pathlib import Path

DATASETS = ("mnist", "fashion_mnist", "cifar10", "digits")
FUNCTION = "package.module:function"


def is_function(name: str) -> bool:
    """Whether `name` has the form ``package.module:function``."""
    module, colon, function = name.partition(":")
    return bool(colon) and function.isidentifier() and all(part.isidentifier() for part in module.split("."))


def is_folder(dataset: str) -> bool:
    """Whether `dataset` is the path of a folder, which ends in a slash."""
    return dataset.endswith("/")


def is_dataset(dataset: str) -> bool:
    """Whether `dataset` has one of the forms that a definition may have. A file or folder need not exist."""
    return dataset in DATASETS or dataset.endswith(".npz") or is_folder(dataset) or is_function(dataset)


def resolved(dataset: str, folder: Path) -> str:
    """The absolute path of a file or folder that exists relative to `folder`; else `dataset` as it is."""
    if "\0" in dataset:
        return dataset
    path = (folder / dataset).absolute()
    if dataset.endswith((".npz", ".h5")) and path.is_file():
        return str(path)
    if is_folder(dataset) and path.is_dir():
        return f"{path}/"
    return dataset


def without_folder(dataset: str) -> str:
    """`dataset`, of a file or folder only its last part: the same images may be in another place elsewhere."""
    if is_function(dataset) or dataset in DATASETS:
        return dataset
    return Path(dataset).name + ("/" if is_folder(dataset) else "")
