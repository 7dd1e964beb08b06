"""Writes the first definition of a study, with comments, and a model file where one is wanted."""

import contextlib
import json
import math
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from storage.errors import nearest
from studies import class_folders, model_rules, script
from studies import definition as definitions
from studies.errors import DefinitionError
from studies.sources import idx_array, is_folder
from studies.wording import one_line

OWN = "own"
MODELS = (*model_rules.NAMES, OWN)
STEPS = 6  # at least so many batches in the files of a folder: check needs one after the splits, and an epoch several
LARGEST_BATCH = 128
_PENALTY = re.compile(r"(^|_)(l1|l2|decay|reg|penalty)$")  # real numbers, and small ones
SMALL_GREY = ("mnist", "fashion_mnist", "digits")  # what the notebook's convnets were made for

SPACES = {
    "convnet": """\
depth = { choices = [3, 5, 7] }                              # layers with weights
dropout = { low = 0.0, high = 0.6 }
learning_rate = { low = 1e-4, high = 1e-2, log = true }
""",
    "mnist_cnn": """\
conv_dropout = { low = 0.0, high = 0.6 }
dense_dropout = { low = 0.0, high = 0.6 }
learning_rate = { low = 1e-4, high = 1e-2, log = true }
""",
    "resnet": """\
depth = { low = 1, high = 3 }                                # blocks in each of the 3 stages
width = { choices = [0.5, 1.0, 2.0] }                        # times the filters of a ResNet for CIFAR-10
dropout = { low = 0.0, high = 0.5 }
learning_rate = { low = 1e-4, high = 1e-2, log = true }
""",
    "backbone": """\
frozen = { choices = [true, false] }                         # true: only the last layer learns
dropout = { low = 0.0, high = 0.5 }
learning_rate = { low = 1e-4, high = 1e-2, log = true }
""",
    OWN: """\
filters = { choices = [16, 32, 64] }
dropout = { low = 0.0, high = 0.6 }
learning_rate = { low = 1e-4, high = 1e-2, log = true }
""",
}
FIXED = {
    "resnet": "flip = false                                                 # true: mirror half of the images\n",
    "backbone": """\
backbone = "mobilenet_v3_small"
weights = "imagenet"                                         # downloaded by Keras; or "none", or the path of a file
""",
}

MODULE = '''\
"""The model of the study {name}. `build` is called for each trial."""

import keras
from keras import layers


def build(hyperparameters: dict, image_shape: tuple, classes: int) -> keras.Model:
    """A model from images on the scale 0 to 255 to the probabilities of the classes.

    It is compiled afterwards, with the learning rate of the trial.
    """
    filters = hyperparameters["filters"]
    return keras.Sequential(
        [
            keras.Input(image_shape),
            layers.Rescaling(1 / 255),
            layers.Conv2D(filters, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(padding="same"),
            layers.Conv2D(2 * filters, 3, padding="same", activation="relu"),
            layers.GlobalMaxPooling2D(),
            layers.Dropout(hyperparameters["dropout"]),
            # float32, because probabilities in bfloat16 would have three digits.
            layers.Dense(classes, activation="softmax", dtype="float32"),
        ]
    )
'''
ADAPTER = '''\
"""Calls `build` of {module}.py with the hyperparameters of each trial."""

from {module} import build as build_of_script


def build(hyperparameters, image_shape, classes):
    """The model of {module}.py for images of this shape."""
    return build_of_script(
{arguments}    )
'''


@dataclass(frozen=True, kw_only=True)
class _Images:
    """The image files of a folder."""

    files: int  # to train with
    has_test: bool


def draft(
    data: str | Path,
    file: Path | None = None,
    *,
    model: str | None = None,
    name: str | None = None,
    trials: int = 20,
    epochs: int = 10,
    from_script: Path | None = None,
) -> dict[Path, str]:
    """A definition of a search over `data`, with the built-in `model`, or "own" for a model file beside it.

    `data` and `model` are as in a definition; a folder needs no slash at its end. `model` is by default `convnet` for
    small grey images, else `resnet`. With `from_script` the model is the function `build` of that Keras script, which
    is read and not run. A script and a model file are imported from the current folder, so they must be in it. `name`
    is by default that of the `file`, else of the data.

    Returns the texts of the files by their paths, the definition first. Raises DefinitionError.
    """
    data = os.path.expanduser(data)  # a shell leaves ~ as it is in quotes, and after --data=
    try:
        if Path(data).is_dir() and not is_folder(data):
            data = f"{data}/"
        images = _images(Path(data)) if is_folder(data) else None
    except (FileNotFoundError, NotADirectoryError):
        raise DefinitionError(
            f"there is no folder {data}: correct --data, or name a ready data set such as digits"
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte
        reason = getattr(error, "strerror", None) or error
        raise DefinitionError(f"the folder {one_line(data, 300)} cannot be read ({reason}): check it") from None
    name = name or _name(Path(data).stem if file is None else file.stem)
    file = file or Path(f"{name}.toml")
    if model is not None and from_script is not None:
        raise DefinitionError(f"model = {model!r} and a script exclude each other: leave one out")
    if model is None:
        model = "convnet" if data in SMALL_GREY else "resnet"
    if model not in MODELS and ":" not in model:
        raise DefinitionError(f"model = {model!r} must be one of {', '.join(MODELS)}{nearest(model, MODELS)}")
    module = f"{_identifier(file.stem)}_model"
    files: dict[Path, str] = {}
    if from_script is not None:
        found = script.read(from_script)
        _require_current_folder(from_script, found.module)
        space, fixed = _of_script(found.hyperparameters)
        model = f"{found.module if found.adapter is None else module}:build"
        if found.adapter is not None:
            arguments = [f"{name}={value}" for name, value in found.adapter.items()]
            arguments += [f'{name}=hyperparameters["{name}"]' for name in found.hyperparameters]
            lines = "".join(f"        {argument},\n" for argument in arguments)
            files[file.with_name(f"{module}.py")] = ADAPTER.format(module=found.module, arguments=lines)
    elif model == OWN:
        space, fixed, model = SPACES[OWN], "", f"{module}:build"
        files[file.with_name(f"{module}.py")] = MODULE.format(name=name)
    else:
        space, fixed = SPACES.get(model, SPACES[OWN]), FIXED.get(model, "")
    if len(files) > 0:
        _require_current_folder(file, module)
    if not re.search(r"^batch_size = ", space, re.MULTILINE):  # else a script has it
        fixed = _batch_size(images) + fixed
    text = _text(name, data, images, model, file, trials, epochs, space, fixed)
    definitions.parse(text, source=str(file), folder=file.parent)  # so that a mistake in an argument is said
    return {file: text, **files}


def write(texts: Mapping[Path, str]) -> None:
    """Writes the files with these texts. Raises DefinitionError, before anything is written, if one of them exists."""
    for path in texts:
        if os.path.lexists(path):
            raise DefinitionError(f"{path} exists already, and is not overwritten: name another file")
    try:
        contents = {path: text.encode("utf-8") for path, text in texts.items()}
    except UnicodeEncodeError as error:  # of the definition's path
        part = one_line(repr(error.object[max(0, error.start - 20) : error.end]), 100)
        raise DefinitionError(f"a name with {part} in it is not text in UTF-8: choose another one") from None
    written: list[Path] = []
    for path, content in contents.items():
        try:
            with path.open("xb") as opened:
                written.append(path)
                opened.write(content)
        except (OSError, UnicodeEncodeError) as error:  # UnicodeEncodeError: a name that this locale cannot write
            for each in written:
                with contextlib.suppress(OSError):
                    each.unlink()
            reason = getattr(error, "strerror", None) or error
            raise DefinitionError(f"{path} cannot be written ({reason}): name another file") from None


def _require_current_folder(file: Path, module: str) -> None:
    """Raises DefinitionError if `module`, which is in the folder of `file`, would not be imported from there."""
    if file.parent.resolve() != Path.cwd():
        raise DefinitionError(
            f"{file} is not in the current folder, and the model in {module}.py is imported from there: change to the "
            f"folder {file.parent} first"
        )


def _text(
    name: str,
    data: str,
    images: _Images | None,
    model: str,
    file: Path,
    trials: int,
    epochs: int,
    space: str,
    fixed: str,
) -> str:
    quoted = shlex.quote(str(file))
    parts = [
        f"# `trialyard check {quoted}` says what is wrong with this file, `trialyard run {quoted}` runs the search.\n"
        "# docs/definition.md of Trialyard explains every key.\n"
        + tomli_w.dumps({"name": name, "dataset": data, "model": model}),
        _data_table(images),
        f"[budget]\ntrials = {trials}\n{_line(f'epochs = {epochs}', 'of each trial')}",
        f"[space]\n{space}",
        f"[fixed]\n{fixed}" if fixed else "",
    ]
    if epochs >= 9:  # else hyperband has one bracket
        parts.append("[pruner]\n" + _line('kind = "hyperband"', "ends weak trials early") + "min_epochs = 3\n")
    return "\n".join(part for part in parts if part)


def _images(folder: Path) -> _Images | None:
    """The image files of a folder; None if it has IDX files. Raises OSError."""
    if any(idx_array(path.name) for path in folder.iterdir()):
        return None
    parts = class_folders.parts(folder)
    by_class = parts.get("train") or class_folders.files_by_class(folder, folder)
    return _Images(files=sum(map(len, by_class.values())), has_test="test" in parts)


def _data_table(images: _Images | None) -> str:
    if images is None:
        return ""
    lines = _line("size = [64, 64]", "height and width that every image is resized to")
    if not images.has_test:
        lines += _line("test = 0.2", "the share of the images kept for `trialyard confirm`")
    return f"[data]\n{lines}"


def _batch_size(images: _Images | None) -> str:
    """The line for a folder of images: by default a batch has more images than a small folder leaves to train with."""
    if images is None or images.files == 0:
        return ""
    size = LARGEST_BATCH
    while size > 1 and size * STEPS > images.files:
        size //= 2
    return _line(f"batch_size = {size}", "images that one step of the training sees")


def _line(text: str, comment: str) -> str:
    return f"{text:<60} # {comment}\n"


def _of_script(hyperparameters: Mapping[str, Any]) -> tuple[str, str]:
    """The lines of [space] and [fixed]: numbers and switches are searched around their defaults."""
    space = "".join(
        _line(line, f"{json.dumps(value)} in the script")
        for name, value in hyperparameters.items()
        if (line := _range(name, value))
    )
    return space, tomli_w.dumps({name: value for name, value in hyperparameters.items() if isinstance(value, str)})


def _range(name: str, value: Any) -> str | None:
    if isinstance(value, str):
        return None
    if isinstance(value, bool):
        return f"{name} = {{ choices = [true, false] }}"
    rule = model_rules.TRAINING.get(name)
    is_rate = isinstance(rule, model_rules.Number) and rule.high == 1.0
    is_penalty = _PENALTY.search(name) is not None
    if isinstance(value, int) and not is_rate and not (value == 0 and (is_penalty or "drop" in name)):
        low, high = (max(1, value // 2), max(2, 2 * value)) if value > 0 else (2 * value, 2)
        return f"{name} = {{ low = {low}, high = {_allowed(high, rule)} }}"
    if value == 0 and is_penalty:
        return f"{name} = {{ low = 0.0, high = 0.01 }}"
    if value == 0 or ("drop" in name and 0 < value < 1):
        return f"{name} = {{ low = 0.0, high = {max(0.6, value, min(0.95, round(value + 0.1, 2))):g} }}"
    if value < 0:
        return f"{name} = {{ low = {2.0 * value!r}, high = 0.0 }}"
    if 0.9 <= value < 1.0:  # a momentum, say: what matters is how far it is from 1
        rest = 1.0 - value
        least, most = round(1.0 - 10 * rest, 6), round(1.0 - rest / 10, 6)
        if not least < value < most < 1.0:
            least, most = 1.0 - 10 * rest, value
        return f"{name} = {{ low = {least!r}, high = {most!r} }}"
    most = min(10.0 * value, 0.99) if value < 0.9 else _allowed(10.0 * value, rule)
    return f"{name} = {{ low = {value / 10!r}, high = {most!r}, log = true }}"


def _allowed(high: Any, rule: model_rules.Rule | None) -> Any:
    """The end of a range, or what a hyperparameter of the training may be at most."""
    if isinstance(rule, model_rules.Number) and rule.high < math.inf:
        return min(high, type(high)(rule.high))
    return high


def _name(text: str) -> str:
    """`text` as a study may be called."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).lstrip("._-")[:100] or "my-search"


def _identifier(text: str) -> str:
    """`text` as a Python module may be called."""
    word = re.sub(r"\W", "_", text, flags=re.ASCII)
    return word if word[:1].isalpha() else f"study_{word}"
