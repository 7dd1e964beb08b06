"""The definition: the file that says what a study searches. Read from TOML, checked, kept as JSON.

Any input gives either a `Definition` or a `DefinitionError` that names the key, its value, the rule and what to do.
"""

import json
import os
import tomllib
from collections.abc import Iterable, Mapping
from functools import cached_property, partial
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError

from storage import metric
from storage.errors import nearest
from studies import model_rules, sources
from studies.errors import DefinitionError
from studies.sources import DATASETS, FUNCTION, is_dataset, is_folder, is_function, resolved, without_folder
from studies.space import (
    Choice,
    Finite,
    Float,
    Int,
    Name,
    Point,
    Scalar,
    Space,
    Whole,
    broken_rule,
    grid,
    in_order,
    parameter_class,
    size,
)
from studies.wording import one_line, sentence, shown

# The Wilcoxon test of Optuna's pruner (p < 0.1, one-sided) can tell two configurations apart after 4 repeats.
LEAST_REPEATS = 5

Precision = Literal["auto", "float32", "mixed_bfloat16"]
SamplerKind = Literal["tpe", "gp", "random", "qmc", "cmaes", "nsga2", "grid", "points"]
PrunerKind = Literal["hyperband", "asha", "median", "wilcoxon", "none"]


_Pixels = Annotated[Whole, Field(ge=1, le=4096)]


class _Table(BaseModel):
    # Built at first use: most commands need no definition, and should not wait for it.
    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)


class Data(_Table):
    """Which images a model is trained on, and which ones it is judged by."""

    # A stratified share of the training images. "test" follows the notebook's protocol, and its trials are marked.
    validation: Annotated[Finite, Field(gt=0, lt=1)] | Literal["test"] = 0.1
    limit: Annotated[Whole, Field(ge=1)] | None = None  # train on only so many images; all validation images are used
    # As in version 0.1: the validation images are a share of those that the limit keeps. For studies that began so.
    limit_includes_validation: bool = False
    seed: Annotated[Whole, Field(ge=0, lt=2**32)] = 0  # decides which images the limit keeps, and the split
    # The others are for a folder of images.
    size: tuple[_Pixels, _Pixels] | None = None  # height and width that its images are resized to
    skip_bad: bool = False  # leave out files that cannot be read
    test: Annotated[Finite, Field(gt=0, lt=1)] | None = None  # the share kept for a confirmation, if there is no test/


class Budget(_Table):
    """How much the study may spend."""

    trials: Annotated[Whole, Field(ge=1, le=1_000_000)] | None = None
    epochs: Annotated[Whole, Field(ge=1, le=100_000)] = 20
    # Each configuration is trained from so many seeds, and its value is the mean.
    repeats: Annotated[Whole, Field(ge=1, le=100)] = 1
    trial_minutes: Annotated[Finite, Field(gt=0)] | None = None
    hours: Annotated[Finite, Field(gt=0)] | None = None


class Sampler(_Table):
    """Which sampler proposes hyperparameters. For trial n it is seeded from (seed, n)."""

    kind: SamplerKind = "tpe"
    seed: Annotated[Whole, Field(ge=0, lt=2**32)] = 0


class Pruner(_Table):
    """Which pruner ends weak trials early."""

    kind: PrunerKind = "none"
    min_epochs: Annotated[Whole, Field(ge=1)] = 1  # no trial is pruned before


class Candidate(_Table):
    """A configuration that a confirmation trains again."""

    trial: Annotated[Whole, Field(ge=0)]  # its number in the study that is confirmed
    epochs: Annotated[Whole, Field(ge=1, le=100_000)]  # that validation chose
    # What the learning rate's schedule was for; None where it does not change with the epochs.
    schedule_epochs: Annotated[Whole, Field(ge=1, le=100_000)] | None = None
    hyperparameters: dict[Name, Scalar]  # those that were searched


class Confirm(_Table):
    """Makes the study a confirmation of another one: see `studies.confirmation`."""

    study: str
    incarnation: str
    candidates: Annotated[tuple[Candidate, ...], Field(min_length=1, max_length=1000)]


def _tag(raw: Any) -> str | None:
    if isinstance(raw, (Float, Int, Choice)):
        return type(raw).__name__
    return parameter_class(raw).__name__ if isinstance(raw, dict) else None


_Parameter = Annotated[
    Annotated[Float, Tag("Float")] | Annotated[Int, Tag("Int")] | Annotated[Choice, Tag("Choice")],
    Discriminator(_tag),
]


class Definition(_Table):
    """A checked definition. The database holds it as JSON."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
    description: Annotated[str, Field(max_length=2000)] = ""
    dataset: Annotated[str, Field(min_length=1, max_length=1000)]
    model: Annotated[str, Field(min_length=1, max_length=1000)]
    precision: Precision = "auto"
    data: Data = Data()
    budget: Budget = Budget()
    space: dict[Name, _Parameter]
    fixed: dict[Name, Scalar] = {}
    sampler: Sampler = Sampler()
    pruner: Pruner = Pruner()
    points: tuple[dict[Name, Scalar], ...] = ()
    confirm: Confirm | None = None

    def queue(self) -> list[Point]:
        """The points that are tried first, in order and without repetition: those of `points`, then those of a grid."""
        queued = [self._typed(point) for point in self.points]
        if self.sampler.kind == "grid":
            queued += [point for point in grid(self.space) if point not in queued]
        return queued

    @cached_property
    def size(self) -> int | None:
        """How many different points the space has; None if infinitely many, or very many."""
        return size(self.space)

    @property
    def trials(self) -> int:
        """The budget in trials, but at most the number of points that there are to try."""
        points = len(self.queue()) if self.sampler.kind in ("grid", "points") else self.size
        if points is None or self.budget.trials is None:
            assert points is not None or self.budget.trials is not None  # _check_sampler makes sure
            return points or self.budget.trials or 0
        return min(points, self.budget.trials)

    @property
    def protocol(self) -> metric.Protocol:
        """How trials are judged."""
        return metric.protocol(self.confirm, self.data.validation)

    @property
    def judged_on(self) -> metric.JudgedOn:
        """Which images give a trial its value."""
        return metric.judged_on(self.protocol)

    @property
    def has_own_model(self) -> bool:
        """Whether the model is a user's function."""
        return is_function(self.model)

    def values_of(self, name: str) -> tuple[Any, ...] | None:
        """All values that the trainings may give to a hyperparameter; only the ends of a range without steps.

        None: none of them has it.
        """
        if name in self.fixed:
            return (self.fixed[name],)
        if self.confirm is not None:
            found = [each.hyperparameters[name] for each in self.confirm.candidates if name in each.hyperparameters]
            return tuple(found) or None
        if name not in self.space:
            return None
        parameter = self.space[name]
        if isinstance(parameter, Choice):
            return parameter.choices
        return tuple(parameter.points() or (parameter.low, parameter.high))

    def to_json(self) -> dict[str, Any]:
        """What the database holds; `from_json` gives the same definition back."""
        stored = self.model_dump(mode="json")
        return {key: value for key, value in stored.items() if key != "confirm" or value is not None}

    def _typed(self, point: Mapping[str, Any]) -> Point:
        # `dropout = 0` in a point means 0.0 if dropout is a float.
        return {name: float(value) if isinstance(self.space[name], Float) else value for name, value in point.items()}


def _catalog_files() -> dict[str, Traversable]:
    folder = resources.files("studies") / "catalog"
    files = {file.name.removesuffix(".toml"): file for file in folder.iterdir() if file.name.endswith(".toml")}
    return dict(sorted(files.items()))


def catalog() -> dict[str, "Definition"]:
    """The ready definitions, by name."""
    files = _catalog_files()
    return {name: parse(file.read_text(encoding="utf-8"), source=name) for name, file in files.items()}


def catalog_text(name: str) -> str:
    """The ready definition `name` as TOML text with its comments. Raises DefinitionError if there is none."""
    files = _catalog_files()
    if name not in files:
        raise DefinitionError(
            f"{shown(name)} is not in the catalog ({', '.join(files)}){nearest(name, files)}: choose one of these"
        )
    return files[name].read_text(encoding="utf-8")


def load(name_or_file: str, **overrides: Any) -> Definition:
    """The definition with this name in the catalog, or of the TOML file at this path.

    `overrides` (name, trials, epochs, limit, skip_bad) that are not None replace its values. Raises DefinitionError.
    """
    names = list(_catalog_files())
    if name_or_file in names:
        return parse(catalog_text(name_or_file), source=name_or_file, **overrides)
    path, shown_path = Path(name_or_file), one_line(name_or_file, 300)
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors start a file with a byte order mark
    except UnicodeDecodeError:
        raise DefinitionError(f"{shown_path} is not text in UTF-8: a definition is a TOML file") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte
        if path.suffix == ".toml" or os.path.isfile(path):
            reason = getattr(error, "strerror", None) or error
            raise DefinitionError(f"{shown_path} cannot be read ({reason}): give the path of a TOML file") from None
        raise DefinitionError(
            f"'{shown_path}' is neither a file nor in the catalog ({', '.join(names)})"
            f"{nearest(name_or_file, names) or '; `trialyard catalog` describes them'}"
        ) from None
    return parse(text, source=str(path), folder=path.parent, **overrides)


def parse(text: str, *, source: str = "the definition", folder: Path | None = None, **overrides: Any) -> Definition:
    """The definition in `text` (TOML).

    A relative file or folder of data or weights is looked for in `folder`, the definition's folder, too. Raises
    DefinitionError.
    """
    try:
        raw = tomllib.loads(text)
        if folder is not None:
            raw = sources.with_weights(raw, partial(resolved, folder=folder))
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise DefinitionError(f"{source} is not valid TOML ({reason}): correct it") from None
    if folder is not None and isinstance(raw.get("dataset"), str):
        raw["dataset"] = resolved(raw["dataset"], folder)
    _override(raw, overrides)
    definition = _checked(raw, source)
    # Not of stored definitions: those of version 0.1 may have `wilcoxon` without repeats, and stay readable.
    problem = _check_repeats(definition)
    if problem:
        raise DefinitionError(f"{source}: {problem}")
    return definition


def from_json(raw: Mapping[str, Any]) -> Definition:
    """The definition from the database's JSON. Raises DefinitionError if this version cannot read it."""
    return _checked(raw, f"the stored definition of {raw.get('name')!r}")


def to_toml(definition: Definition) -> str:
    """`definition` as TOML text, without keys that have their default value; `parse` returns an equal definition."""
    # `type` is left out as well: `parse` derives it from the types of the numbers, which are kept.
    return tomli_w.dumps(definition.model_dump(mode="json", exclude_defaults=True))


def differences(stored: Definition, other: Definition) -> list[str]:
    """The differences that make trials of the two definitions not comparable: each key with both values.

    The description, the budget in trials and time, and the folder of a file of data or weights may differ. What is in
    the files is compared elsewhere.
    """
    may_differ = {"description", "budget.trials", "budget.hours", "budget.trial_minutes"}
    left, right = map(_without_folders, (stored, other))
    return [
        f"{key} = {json.dumps(left.get(key))} in the database and {json.dumps(right.get(key))} in this definition"
        for key in [*left, *(key for key in right if key not in left)]
        # Compared as text, because True == 1 in Python.
        if key not in may_differ and json.dumps(left.get(key)) != json.dumps(right.get(key))
    ]


def _override(raw: dict[str, Any], overrides: Mapping[str, Any]) -> None:
    tables = {"name": None, "trials": "budget", "epochs": "budget", "limit": "data", "skip_bad": "data"}
    for key, value in overrides.items():
        table = tables[key]
        if value is None:
            continue
        if table is None:
            raw[key] = value
        elif isinstance(raw.setdefault(table, {}), dict):
            raw[table][key] = value


def _without_folders(definition: Definition) -> dict[str, Any]:
    raw = definition.to_json() | {"dataset": without_folder(definition.dataset)}
    return _flat(sources.with_weights(raw, without_folder))


def _flat(raw: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in raw.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


# --- the checks -------------------------------------------------------------------------------------------


def _checked(raw: Mapping[str, Any], source: str) -> Definition:
    try:
        definition = Definition.model_validate(raw)
    except ValidationError as error:
        raise DefinitionError(f"{source}: {sentence(error, _known_keys)}") from None
    except RecursionError:
        raise DefinitionError(f"{source} is nested too deeply: see docs/definition.md for the format") from None
    for check in (
        _check_source,
        # The candidates of a confirmation may be those that do not use what others of their search needed.
        *((_check_confirm,) if definition.confirm is not None else (_check_names, _check_momentum, _check_warmup)),
        _check_conditions,
        _check_rules,
        _check_sampler,
        _check_points,
    ):
        problem = check(definition)
        if problem:
            raise DefinitionError(f"{source}: {problem}")
    return definition


def _check_source(definition: Definition) -> str | None:
    dataset, model = definition.dataset, definition.model
    if not is_dataset(dataset):
        return (
            f"dataset = {shown(dataset)} must be one of {', '.join(DATASETS)}, the path of an .npz file, a folder such "
            f'as "photos/", or "{FUNCTION}"{nearest(dataset, DATASETS)}'
        )
    if not is_folder(dataset):
        for key in ("size", "skip_bad", "test"):
            value = getattr(definition.data, key)
            if value not in (None, False):
                return f"data.{key} = {json.dumps(value)} is for a folder of images, not for {dataset}: leave it out"
    if not (model in model_rules.NAMES or is_function(model)):
        return (
            f'model = {shown(model)} must be one of {", ".join(model_rules.NAMES)}, or "{FUNCTION}"'
            f"{nearest(model, model_rules.NAMES)}"
        )
    if "\0" in dataset:
        return f"dataset = {shown(dataset)} is not a path: remove the zero byte"
    return None


def _check_names(definition: Definition) -> str | None:
    if not definition.space:
        return "space is empty, so there is nothing to search: name a hyperparameter with a range or choices"
    for name in definition.fixed:
        if name in definition.space:
            return f"fixed.{name} = {shown(definition.fixed[name])} is in [space] too: leave one of them out"
    rules = model_rules.rules(definition.model)
    if rules is not None:
        for table, names in (("space", definition.space), ("fixed", definition.fixed)):
            for name in names:
                if name not in rules:
                    return (
                        f"{table}.{name}: the model {definition.model} has no hyperparameter {name!r}; it has "
                        f"{', '.join(rules)}{nearest(name, rules)}"
                    )
        required = model_rules.REQUIRED.get(definition.model, "")
        rule = rules.get(required)
        if isinstance(rule, model_rules.OneOf) and required not in (*definition.space, *definition.fixed):
            return f"{required} is missing: give it in [space] or [fixed], one of {', '.join(map(str, rule.values))}"
        searched = definition.space.get(required)
        if searched is not None and searched.when:
            always = f"a {definition.model} always needs its {required}"
            return f"space.{required}.when = {shown(searched.when)}: {always}: leave `when` out"
    return None


def _check_confirm(definition: Definition) -> str | None:
    confirm, rules = definition.confirm, model_rules.rules(definition.model)
    assert confirm is not None
    numbers = tuple(candidate.trial for candidate in confirm.candidates)
    candidate, seed = definition.space.get("candidate"), definition.space.get("seed")
    if set(definition.space) != {"candidate", "seed"} or not isinstance(seed, Choice):
        return "confirm needs exactly the choices `candidate` and `seed` in [space]: use `trialyard confirm`"
    if not isinstance(candidate, Choice) or candidate.choices != numbers:
        return "space.candidate must have the trials of confirm.candidates as choices: use `trialyard confirm`"
    if definition.data.validation == "test":
        return 'data.validation = "test" and confirm exclude each other: leave one out'
    for index, each in enumerate(confirm.candidates, start=1):
        for name, value in each.hyperparameters.items():
            key = f"confirm.candidates[{index}].hyperparameters.{name}"
            if rules is not None and name not in rules:
                return f"{key}: the model {definition.model} has no hyperparameter {name!r}{nearest(name, rules)}"
            broken = (rules or model_rules.TRAINING).get(name)
            problem = None if broken is None else broken.broken_by(value)
            if problem:
                return f"{key} = {shown(value)} {problem}"
    return None


def _check_conditions(definition: Definition) -> str | None:
    space = definition.space
    for name, parameter in space.items():
        for other, values in parameter.when.items():
            key = f"space.{name}.when.{other}"
            if other == name:
                return f"{key}: a parameter cannot depend on itself: name another one"
            if other not in space:
                return f"{key}: there is no {other!r} in [space] to depend on{nearest(other, space)}"
            if isinstance(space[other], Float):
                return f"{key}: {other!r} is a float, and `when` needs a parameter with choices or a whole number"
            if not values:
                return f"{key} = [] has no value: add at least one"
            for value in values:
                broken = broken_rule(space[other], value)
                if broken:
                    return f"{key} = {shown(value)} {broken}, as space.{other} says"
    try:
        in_order(space)
    except ValueError as circle:
        return f"space.{circle}.when is circular: remove one of the conditions"
    return None


def _check_rules(definition: Definition) -> str | None:
    rules = model_rules.rules(definition.model) or model_rules.TRAINING
    for name, value in definition.fixed.items():
        broken = name in rules and rules[name].broken_by(value)
        if broken:
            return f"fixed.{name} = {shown(value)} {broken}"
    for name, parameter in definition.space.items():
        if name not in rules:
            continue
        ends: list[tuple[str, Any]] = (
            [("choices", value) for value in parameter.choices]
            if isinstance(parameter, Choice)
            else [("low", parameter.low), ("high", parameter.high)]
        )
        if isinstance(rules[name], model_rules.OneOf) and isinstance(parameter, Int):
            ends = [("low to high", value) for value in parameter.points()[:1000]]
        for end, value in ends:
            broken = rules[name].broken_by(value)
            if broken:
                return f"space.{name}.{end} = {shown(value)}: {name} {broken}"
    return None


def _check_momentum(definition: Definition) -> str | None:
    if definition.model not in model_rules.NAMES or definition.values_of("momentum") is None:
        return None  # a user's own model may use it in its own way
    optimizers = definition.values_of("optimizer") or ("adam",)
    if any(optimizer in model_rules.WITH_MOMENTUM for optimizer in optimizers):
        return None
    return (
        f"momentum is given, and the optimizer {' or '.join(map(str, optimizers))} has none: choose "
        f"{' or '.join(model_rules.WITH_MOMENTUM)}, or leave momentum out"
    )


def _check_warmup(definition: Definition) -> str | None:
    if definition.values_of("warmup_epochs") is None:
        return None
    schedules = definition.values_of("schedule") or ("constant",)
    if any(schedule in model_rules.WITH_WARMUP for schedule in schedules):
        return None
    return "warmup_epochs is given, and the schedule one_cycle has a warm-up of its own: leave warmup_epochs out"


def _check_sampler(definition: Definition) -> str | None:
    kind = definition.sampler.kind
    if kind == "points" and not definition.points:
        return 'sampler.kind = "points" tries only the points under [[points]], and there are none: add some'
    if kind == "cmaes":
        numbers = [name for name, p in definition.space.items() if not isinstance(p, Choice) and not p.when]
        if len(numbers) < 2:
            return (
                'sampler.kind = "cmaes" needs two or more numeric hyperparameters that always apply, and '
                f"[space] has {len(numbers)}: choose tpe"
            )
    if kind == "grid":
        for name, parameter in definition.space.items():
            if parameter.points() is None:
                return f'space.{name} is continuous and sampler.kind = "grid" needs steps: give it a step'
        try:
            grid(definition.space)
        except ValueError as error:
            return f"{error}: widen a step, or choose sampler tpe"
    elif kind != "points" and definition.budget.trials is None:
        return f"budget.trials is missing, and the sampler {kind} never ends by itself: add it"
    return None


def _check_repeats(definition: Definition) -> str | None:
    repeats, pruner = definition.budget.repeats, definition.pruner.kind
    if pruner == "wilcoxon" and repeats < LEAST_REPEATS:
        return (
            f'pruner.kind = "wilcoxon" compares the repeats of two configurations, and needs budget.repeats of '
            f"{LEAST_REPEATS} or more (it is {repeats}): raise it, or choose hyperband"
        )
    if repeats > 1 and pruner not in ("wilcoxon", "none"):
        return (
            f'pruner.kind = "{pruner}" ends trials by their epochs, and with budget.repeats = {repeats} a trial is '
            "judged by whole trainings: choose wilcoxon or none"
        )
    return None


def _check_points(definition: Definition) -> str | None:
    space = definition.space
    seen: list[Point] = []
    for index, point in enumerate(definition.points, start=1):
        for name, value in point.items():
            key = f"points[{index}].{name}"
            if name not in space:
                return f"{key} = {shown(value)}: there is no {name!r} in [space]{nearest(name, space)}"
            broken = broken_rule(space[name], value)
            if broken:
                return f"{key} = {shown(value)} {broken}, as space.{name} says"
            if not all(other not in point or space[name].applies(point) for other in space[name].when):
                return f"{key} = {shown(value)} does not apply, as space.{name}.when says: leave it out"
        if definition.sampler.kind in ("points", "grid"):
            needed = [name for name in in_order(space) if space[name].applies(point)]
            missing = [name for name in needed if name not in point]
            if missing:
                return (
                    f"points[{index}] has no {missing[0]!r}: with sampler {definition.sampler.kind} a point must "
                    "be complete"
                )
        if point in seen:
            return f"points[{index}] repeats points[{seen.index(point) + 1}]: leave one out"
        seen.append(point)
    return None


def _known_keys(path: Iterable[Any]) -> list[str]:
    """The keys of the table at `path` of a definition."""
    tables: dict[str, type[BaseModel]] = {
        "data": Data,
        "budget": Budget,
        "sampler": Sampler,
        "pruner": Pruner,
        "confirm": Confirm,
        "candidates": Candidate,
        "Float": Float,
        "Int": Int,
        "Choice": Choice,
    }
    table: type[BaseModel] = Definition
    for part in path:
        table = tables.get(part, table) if isinstance(part, str) else table
    return list(table.model_fields)


__all__ = [
    "DATASETS",
    "Budget",
    "Data",
    "Definition",
    "Pruner",
    "Sampler",
    "Space",
    "catalog",
    "catalog_text",
    "differences",
    "from_json",
    "load",
    "parse",
    "to_toml",
]
