"""The search space: which hyperparameters are searched, and over what.

A parameter may apply only `when` others have certain values. It is then suggested only there, so that a trial
holds just what it was trained with.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from pydantic import BaseModel, ConfigDict, Field, model_validator

# Strict: a TOML `true` is no 1, and "3" is no 3.
Scalar = (
    Annotated[bool, Field(strict=True)]
    | Annotated[int, Field(strict=True, ge=-(2**53), le=2**53)]
    | Annotated[float, Field(strict=True, allow_inf_nan=False)]
    | Annotated[str, Field(strict=True, max_length=500)]
)
# Larger integers are not told apart once they are floats, which is what the database holds.
Whole = Annotated[int, Field(strict=True, ge=-(2**53), le=2**53)]
Finite = Annotated[float, Field(strict=True, allow_inf_nan=False, ge=-1e100, le=1e100)]
Point = dict[str, Any]
Condition = dict[str, tuple[Scalar, ...]]

GRID_LIMIT = 100_000


class _Parameter(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    when: Condition = {}

    @model_validator(mode="before")
    @classmethod
    def _listed(cls, raw: Any) -> Any:
        # `when = { depth = 3 }` is short for `when = { depth = [3] }`.
        if isinstance(raw, dict) and isinstance(raw.get("when"), dict):
            listed = {
                name: tuple(value) if isinstance(value, (list, tuple)) else (value,)
                for name, value in raw["when"].items()
            }
            return {**raw, "when": listed}
        return raw

    def applies(self, point: Mapping[str, Any]) -> bool:
        """Whether the parameter is searched where the others have the values of `point`."""
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
            steps = (self.high - self.low) / self.step
            if steps < 1 - 1e-9 or abs(steps - round(steps)) > 1e-6 or steps > 2**53:
                raise ValueError(
                    f"high = {self.high:g} is no whole number of steps of {self.step:g} above low = "
                    f"{self.low:g}: choose a step that divides the range"
                )
        return self

    def distribution(self) -> BaseDistribution:
        """Optuna's own form."""
        return FloatDistribution(self.low, self.high, step=self.step, log=self.log)

    def points(self) -> list[float] | None:
        """Every value on the steps; None for a continuous range."""
        if self.step is None:
            return None
        # 0.1 + 0.2 is not 0.3: rounded to what a person would have written.
        return [round(self.low + i * self.step, 12) for i in range(_steps(self.low, self.high, self.step))]


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
                f"high = {self.high} is no whole number of steps of {self.step} above low = {self.low}: "
                "choose a step that divides the range"
            )
        return self

    def distribution(self) -> BaseDistribution:
        """Optuna's own form."""
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
        """Optuna's own form."""
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


def _steps(low: float, high: float, step: float) -> int:
    return min(math.floor((high - low) / step + 1e-6) + 1, GRID_LIMIT + 1)


def parameter_class(raw: Mapping[str, Any]) -> type[Float] | type[Int] | type[Choice]:
    """Which of the three a table of the definition describes: by `choices`, by `type`, by its numbers."""
    if "choices" in raw:
        return Choice
    if raw.get("type") in ("float", "int"):
        return Float if raw["type"] == "float" else Int
    numbers = [raw.get("low"), raw.get("high"), raw.get("step", 1)]
    return Int if all(isinstance(number, int) and not isinstance(number, bool) for number in numbers) else Float


def in_order(space: Space) -> list[str]:
    """The parameters' names, each after those that its `when` names, else as written.

    Raises ValueError, with a name, where `when`s go in a circle.
    """
    ordered: list[str] = []
    waiting = list(space)
    while waiting:
        ready = [name for name in waiting if all(other in ordered for other in space[name].when)]
        if not ready:
            raise ValueError(waiting[0])
        ordered += ready
        waiting = [name for name in waiting if name not in ready]
    return ordered


def suggest(trial: optuna.Trial, space: Space) -> Point:
    """The trial's hyperparameters: each parameter that applies is asked for, the others are left out."""
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


def grid(space: Space) -> Iterator[Point]:
    """Every point of a space without continuous ranges, the last parameter changing fastest."""
    names = in_order(space)

    def extended(point: Point, rest: list[str]) -> Iterator[Point]:
        if not rest:
            yield point
            return
        parameter = space[rest[0]]
        if not parameter.applies(point):
            yield from extended(point, rest[1:])
            return
        for value in parameter.points() or ():
            yield from extended({**point, rest[0]: value}, rest[1:])

    return extended({}, names)


def broken_rule(parameter: Parameter, value: object) -> str | None:
    """Why `value` is no value of `parameter`, in words; None if it is one."""
    if isinstance(parameter, Choice):
        good = any(value == choice and type(value) is type(choice) for choice in parameter.choices)
        return None if good else f"must be one of {', '.join(map(str, parameter.choices))}"
    if isinstance(value, bool) or not isinstance(value, int if isinstance(parameter, Int) else (int, float)):
        return "must be a whole number" if isinstance(parameter, Int) else "must be a number"
    if not parameter.low <= value <= parameter.high:
        return f"must be from {parameter.low:g} to {parameter.high:g}"
    if parameter.step is not None:
        steps = (value - parameter.low) / parameter.step
        if abs(steps - round(steps)) > 1e-6:
            return f"must be {parameter.low:g} plus a whole number of steps of {parameter.step:g}"
    return None
