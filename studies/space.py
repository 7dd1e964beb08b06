"""The search space: which hyperparameters are searched, and over which values.

A parameter with `when` applies only if others have certain values. It is suggested only then, so that a trial has
exactly the hyperparameters that it was trained with.
"""

import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal
from random import Random
from types import MappingProxyType
from typing import Annotated, Any, Literal

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

# The type is part of the check, so that an error names the right rule: a TOML `true` is not 1, an integer that is too
# large is not a float, and "3" is not 3.
Scalar = Annotated[
    Annotated[bool, Tag("bool")]
    | Annotated[int, Field(ge=-(2**53), le=2**53), Tag("int")]
    | Annotated[float, Field(allow_inf_nan=False), Tag("float")]
    | Annotated[str, Field(max_length=500), Tag("str")],
    Discriminator(lambda value: type(value).__name__),
]
# The database stores floats, in which larger integers can no longer be distinguished.
Whole = Annotated[int, Field(strict=True, ge=-(2**53), le=2**53)]
Finite = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=-1e100, le=1e100)]
Point = dict[str, Any]
Name = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,63}$")]
Condition = dict[Name, tuple[Scalar, ...]]

GRID_LIMIT = 100_000


class _Parameter(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)

    when: Condition = {}

    @model_validator(mode="before")
    @classmethod
    def _when_with_tuples(cls, raw: Any) -> Any:
        # `when = { depth = 3 }` is short for `when = { depth = [3] }`.
        if isinstance(raw, dict) and isinstance(raw.get("when"), dict):
            when = {
                name: tuple(value) if isinstance(value, (list, tuple)) else (value,)
                for name, value in raw["when"].items()
            }
            return {**raw, "when": when}
        return raw

    def applies(self, point: Mapping[str, Any]) -> bool:
        """Whether the parameter is searched if the others have the values of `point`."""
        return all(name in point and point[name] in values for name, values in self.when.items())


class Float(_Parameter):
    """A real number in [low, high], on steps from `low` if `step` is given, uniform in the logarithm if `log`."""

    type: Literal["float"] = "float"
    low: Finite
    high: Finite
    step: Annotated[Finite, Field(gt=0)] | None = None
    log: Annotated[bool, Field(strict=True)] = False

    @model_validator(mode="after")
    def _rules(self) -> "Float":
        _check_range(self.low, self.high, self.log)
        if self.step is not None:
            if self.log:
                raise ValueError("log and step exclude each other: leave one out")
            if not _divides(self.step, self.low, self.high):
                raise ValueError(
                    f"high = {self.high:g} is not a whole number of steps of {self.step:g} above low = "
                    f"{self.low:g}: choose a step that divides the range"
                )
        return self

    def distribution(self) -> BaseDistribution:
        """The distribution as Optuna's object."""
        return FloatDistribution(self.low, self.high, step=self.step, log=self.log)

    def points(self) -> list[float] | None:
        """Every value on the steps; None for a continuous range."""
        if self.step is None:
            return None
        # With floats 0.1 + 0.2 is not 0.3; with decimals it is.
        low, step = Decimal(str(self.low)), Decimal(str(self.step))
        steps = int((Decimal(str(self.high)) - low) / step)
        return [float(low + i * step) for i in range(min(steps, GRID_LIMIT) + 1)]


class Int(_Parameter):
    """A whole number in [low, high]."""

    type: Literal["int"] = "int"
    low: Whole
    high: Whole
    step: Annotated[Whole, Field(gt=0)] = 1
    log: Annotated[bool, Field(strict=True)] = False

    @model_validator(mode="after")
    def _rules(self) -> "Int":
        _check_range(self.low, self.high, self.log)
        if self.log and self.step != 1:
            raise ValueError("log and step exclude each other: leave one out")
        if (self.high - self.low) % self.step:
            raise ValueError(
                f"high = {self.high} is not a whole number of steps of {self.step} above low = {self.low}: "
                "choose a step that divides the range"
            )
        return self

    def distribution(self) -> BaseDistribution:
        """The distribution as Optuna's object."""
        return IntDistribution(self.low, self.high, step=self.step, log=self.log)

    def points(self) -> list[int]:
        """Every value."""
        return list(itertools.islice(range(self.low, self.high + 1, self.step), GRID_LIMIT + 1))


class Choice(_Parameter):
    """One of a list of values, with no order between them."""

    choices: Annotated[tuple[Scalar, ...], Field(min_length=1, max_length=1000)]

    @model_validator(mode="after")
    def _rules(self) -> "Choice":
        for earlier, later in itertools.combinations(self.choices, 2):
            if earlier == later:
                raise ValueError(f"choices names {later!r} twice: leave one out")
        return self

    def distribution(self) -> BaseDistribution:
        """The distribution as Optuna's object."""
        return CategoricalDistribution(self.choices)

    def points(self) -> list[Any]:
        """Every value."""
        return list(self.choices)


Parameter = Float | Int | Choice
Space = dict[str, Parameter]


def _check_range(low: float, high: float, log: bool) -> None:
    if low > high:
        raise ValueError(f"the range from low = {low:g} to high = {high:g} is reversed: swap them")
    if low == high:
        raise ValueError(f"the range from {low:g} to {high:g} is empty: put a single value under [fixed]")
    if log and low <= 0:
        raise ValueError(f"log needs low > 0, and low is {low:g}: raise low, or leave log out")


def _divides(step: float, low: float, high: float) -> bool:
    """Whether `high` is a whole number of steps above `low`. If it is not, Optuna lowers `high`."""
    # In decimals, as Optuna computes it.
    width, step_width = Decimal(str(high)) - Decimal(str(low)), Decimal(str(step))
    return 1 <= width / step_width <= 2**53 and width % step_width == 0


def parameter_class(raw: Mapping[str, Any]) -> type[Float] | type[Int] | type[Choice]:
    """The class that a table of the definition describes, from its `choices`, its `type` or its numbers."""
    if "choices" in raw:
        return Choice
    if raw.get("type") in ("float", "int"):
        return Float if raw["type"] == "float" else Int
    numbers = [raw.get("low"), raw.get("high"), raw.get("step", 1)]
    return Int if all(isinstance(number, int) and not isinstance(number, bool) for number in numbers) else Float


def in_order(space: Space) -> list[str]:
    """The parameters' names as written, but each one after those in its `when`.

    Raises ValueError, with the name of one of them, if the `when`s are circular.
    """
    ordered: dict[str, None] = {}
    waiting = dict.fromkeys(space)
    while waiting:
        ready = [name for name in waiting if all(other in ordered for other in space[name].when)]
        if not ready:
            raise ValueError(_name_in_cycle(space, waiting))
        ordered |= dict.fromkeys(ready)
        waiting = {name: None for name in waiting if name not in ordered}
    return list(ordered)


def _name_in_cycle(space: Space, waiting: Iterable[str]) -> str:
    # Follow the dependencies from any parameter: the first name that is seen twice is part of a cycle.
    name, seen = next(iter(waiting)), set[str]()
    while name not in seen:
        seen.add(name)
        name = next(other for other in space[name].when if other in waiting)
    return name


def suggest(trial: optuna.Trial, space: Space) -> Point:
    """The trial's hyperparameters. Only parameters that apply are suggested."""
    point: Point = {}
    for name in in_order(space):
        parameter = space[name]
        if not parameter.applies(point):
            continue
        if isinstance(parameter, Choice):
            point[name] = trial.suggest_categorical(name, parameter.choices)
        elif isinstance(parameter, Int):
            point[name] = trial.suggest_int(name, parameter.low, parameter.high, step=parameter.step, log=parameter.log)
        else:
            point[name] = trial.suggest_float(
                name, parameter.low, parameter.high, step=parameter.step, log=parameter.log
            )
    return point


def low_point(space: Space, given: Mapping[str, Any] | None = None) -> Point:
    """The point with the values `given`, and else with the low ends and the first choices."""
    return _point_of(
        space, lambda parameter: parameter.choices[0] if isinstance(parameter, Choice) else parameter.low, given or {}
    )


def high_point(space: Space) -> Point:
    """The point with the high ends and the last choices."""
    return _point_of(
        space, lambda parameter: parameter.choices[-1] if isinstance(parameter, Choice) else parameter.high
    )


def random_point(space: Space, random: Random) -> Point:
    """A point drawn uniformly, also where the range is logarithmic."""

    def value(parameter: Parameter) -> Any:
        values = parameter.points()
        if values is None:
            assert isinstance(parameter, Float)
            return random.uniform(parameter.low, parameter.high)
        return random.choice(values)

    return _point_of(space, value)


def _point_of(
    space: Space, value: Callable[[Parameter], Any], given: Mapping[str, Any] = MappingProxyType({})
) -> Point:
    point: Point = {}
    for name in in_order(space):
        if space[name].applies(point):
            point[name] = given[name] if name in given else value(space[name])
    return point


def grid(space: Space) -> list[Point]:
    """Every point of a space without continuous ranges, the last parameter changing fastest.

    Raises ValueError if there are more than GRID_LIMIT points.
    """
    points: list[Point] = [{}]
    for name in in_order(space):
        parameter = space[name]
        values = parameter.points() or ()
        extended = (
            longer_point
            for point in points
            for longer_point in ([{**point, name: value} for value in values] if parameter.applies(point) else [point])
        )
        points = list(itertools.islice(extended, GRID_LIMIT + 1))
        if len(points) > GRID_LIMIT:
            raise ValueError(f"the grid has more than {GRID_LIMIT} points")
    return points


def is_whole(point: Mapping[str, Any], space: Space) -> bool:
    """Whether `point` has exactly the parameters that apply to it, each with a value that is allowed."""
    needed = [name for name in in_order(space) if space[name].applies(point)]
    return set(needed) == set(point) and all(broken_rule(space[name], point[name]) is None for name in needed)


def key_of(point: Mapping[str, Any]) -> str:
    """What points with the same hyperparameters have in common, and no others.

    The steps of a float are sums, which differ in the last digits: 0.1 + 0.2 is 0.30000000000000004, and a person or a
    table writes 0.3.

    >>> key_of({"dropout": 0.1 + 0.2}) == key_of({"dropout": 0.3})
    True
    """
    return json.dumps({name: _rounded(value) for name, value in point.items()}, sort_keys=True)


def _rounded(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    value = float(f"{value:.10g}")
    return int(value) if value.is_integer() else value  # another program may have stored 0 for 0.0


def size(space: Space) -> int | None:
    """How many different points the space has; None if infinitely many, or more than GRID_LIMIT."""
    values = [parameter.points() for parameter in space.values()]
    if any(each is None for each in values):
        return None
    if not any(parameter.when for parameter in space.values()):
        product = math.prod(len(each or ()) for each in values)
        return product if product <= GRID_LIMIT else None
    try:
        return len(grid(space))
    except ValueError:
        return None


def broken_rule(parameter: Parameter, value: object) -> str | None:
    """The rule of `parameter` that `value` breaks, in words; None if it is allowed."""
    if isinstance(parameter, Choice):
        allowed = any(value == choice and type(value) is type(choice) for choice in parameter.choices)
        return None if allowed else f"must be one of {values_text(parameter.choices)}"
    if isinstance(value, bool) or not isinstance(value, int if isinstance(parameter, Int) else (int, float)):
        return "must be a whole number" if isinstance(parameter, Int) else "must be a number"
    if not parameter.low <= value <= parameter.high:
        return f"must be from {parameter.low:g} to {parameter.high:g}"
    if parameter.step is not None:
        steps = (value - parameter.low) / parameter.step
        if abs(steps - round(steps)) >= 1e-8:  # Optuna's tolerance
            return f"must be {parameter.low:g} plus a whole number of steps of {parameter.step:g}"
    return None


def values_text(values: Iterable[Scalar]) -> str:
    """`values` as a definition writes them, shortened."""
    texts = list(map(_value_text, values))
    text = ", ".join(texts)
    return text if len(text) <= 200 else f"{text[:180]}... ({len(texts)} in all)"


def _value_text(value: Scalar) -> str:
    # JSON escapes line breaks. Plain names such as adam are easier to read without quotes.
    return value if isinstance(value, str) and value.isidentifier() else json.dumps(value)


def range_text(parameter: Parameter) -> str:
    """The values of `parameter` in words: "0.0 to 0.5", "one of 3, 5, 7"."""
    if isinstance(parameter, Choice):
        text = f"one of {values_text(parameter.choices)}"
    else:
        text = f"{'whole numbers ' if isinstance(parameter, Int) else ''}{parameter.low} to {parameter.high}"
        if parameter.step not in (None, 1) or (parameter.step == 1 and not isinstance(parameter, Int)):
            text += f" in steps of {parameter.step}"
        if parameter.log:
            text += ", uniform in the logarithm"
    conditions = [f"{name} is {' or '.join(map(_value_text, values))}" for name, values in parameter.when.items()]
    return f"{text}, if {' and '.join(conditions)}" if conditions else text
