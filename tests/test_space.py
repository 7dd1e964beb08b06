"""The search space: a trial has only the parameters that apply, and a grid has every such point once."""

import itertools
from collections.abc import Iterable
from typing import Any

import optuna
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from pydantic import ValidationError

from studies.space import (
    Choice,
    Float,
    Int,
    Parameter,
    Point,
    Space,
    broken_rule,
    grid,
    in_order,
    parameter_class,
    suggest,
)

DEPTH = Choice(choices=(3, 5, 7))


def _chain() -> Space:
    # Written from the last to the first, so that the order must come from the conditions.
    return {
        "momentum": Float(low=0.0, high=0.9, when={"optimizer": ("sgd",)}),
        "optimizer": Choice(choices=("adam", "sgd"), when={"depth": (5, 7)}),
        "depth": DEPTH,
        "width": Int(low=1, high=3),
    }


def _fixed(point: Point, space: Space) -> Point:
    return suggest(optuna.trial.FixedTrial(point), space)  # type: ignore[arg-type]


class TestSuggest:
    """`suggest` asks for each parameter that applies."""

    def test_every_parameter_has_its_own_kind_of_distribution(self) -> None:
        space: Space = {
            "depth": DEPTH,
            "dropout": Float(low=0.0, high=0.7, step=0.1),
            "learning_rate": Float(low=1e-4, high=1e-2, log=True),
            "batch_size": Int(low=16, high=256, log=True),
            "layers": Int(low=1, high=9, step=2),
        }
        trial = optuna.create_study().ask()
        point = suggest(trial, space)
        expected = {
            "depth": CategoricalDistribution((3, 5, 7)),
            "dropout": FloatDistribution(0.0, 0.7, step=0.1),
            "learning_rate": FloatDistribution(1e-4, 1e-2, log=True),
            "batch_size": IntDistribution(16, 256, log=True),
            "layers": IntDistribution(1, 9, step=2),
        }
        assert trial.distributions == expected
        assert {name: parameter.distribution() for name, parameter in space.items()} == expected
        assert trial.params == point

    @pytest.mark.parametrize(
        ("point", "held"),
        [
            ({"depth": 3, "width": 1}, ["depth", "width"]),
            ({"depth": 5, "width": 1, "optimizer": "adam"}, ["depth", "width", "optimizer"]),
            (
                {"depth": 7, "width": 1, "optimizer": "sgd", "momentum": 0.5},
                ["depth", "width", "optimizer", "momentum"],
            ),
        ],
    )
    def test_a_chain_of_conditions_is_followed_link_by_link(self, point: Point, held: list[str]) -> None:
        everything = {"optimizer": "sgd", "momentum": 0.5} | point
        suggested = _fixed(everything, _chain())
        assert list(suggested) == held
        assert suggested == point

    def test_a_trial_holds_only_what_applies(self) -> None:
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        seen = set()
        for _ in range(60):
            trial = study.ask()
            point = suggest(trial, _chain())
            assert trial.params == point
            assert ("optimizer" in point) == (point["depth"] in (5, 7))
            assert ("momentum" in point) == (point.get("optimizer") == "sgd")
            seen.add(frozenset(point))
        assert len(seen) == 3, "a branch of the conditions was never drawn"

    def test_several_conditions_must_all_hold(self) -> None:
        space: Space = {
            "a": Choice(choices=(1, 2)),
            "b": Choice(choices=("x", "y")),
            "c": Int(low=0, high=1, when={"a": (1,), "b": ("y",)}),
        }
        for a, b in itertools.product((1, 2), ("x", "y")):
            assert ("c" in _fixed({"a": a, "b": b, "c": 0}, space)) == (a == 1 and b == "y")

    def test_a_single_value_is_short_for_a_list_of_one(self) -> None:
        short = Float.model_validate({"low": 0.0, "high": 1.0, "when": {"depth": 3}})
        assert short == Float(low=0.0, high=1.0, when={"depth": (3,)})


class TestOrder:
    """`in_order` puts a parameter after those that it depends on."""

    def test_what_depends_on_nothing_stays_as_written(self) -> None:
        names = ["width", "depth", "a", "Z"]
        assert in_order(dict.fromkeys(names, DEPTH)) == names

    @given(st.permutations(["momentum", "optimizer", "depth", "width"]))
    def test_conditions_come_first_however_the_space_is_written(self, names: list[str]) -> None:
        ordered = in_order({name: _chain()[name] for name in names})
        assert sorted(ordered) == sorted(names)
        assert ordered.index("depth") < ordered.index("optimizer") < ordered.index("momentum")

    def test_a_circle_is_an_error_that_names_one_of_its_members(self) -> None:
        space: Space = {
            "outside": Choice(choices=(1, 2), when={"one": (1,)}),
            "one": Choice(choices=(1, 2), when={"two": (1,)}),
            "two": Choice(choices=(1, 2), when={"one": (1,)}),
        }
        with pytest.raises(ValueError, match=r"^(one|two)$"):
            in_order(space)


class TestGrid:
    """`grid` gives every point of a space with steps."""

    def test_the_last_parameter_changes_fastest(self) -> None:
        space: Space = {"depth": Choice(choices=(3, 5)), "width": Int(low=1, high=3)}
        assert [tuple(point.values()) for point in grid(space)] == [(3, 1), (3, 2), (3, 3), (5, 1), (5, 2), (5, 3)]

    def test_the_points_are_the_numbers_that_a_person_would_write(self) -> None:
        assert Float(low=0.0, high=0.7, step=0.1).points() == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
        assert Float(low=0.0, high=0.07, step=0.01).points() == [0.0, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07]
        assert Float(low=0.1, high=1.0, step=0.3).points() == [0.1, 0.4, 0.7, 1.0]

    def test_small_numbers_are_rounded_no_more_than_large_ones(self) -> None:
        assert Float(low=1e-14, high=4e-14, step=1e-14).points() == [1e-14, 2e-14, 3e-14, 4e-14]

    def test_a_conditional_grid_has_each_part_once(self) -> None:
        space: Space = {
            "depth": DEPTH,
            "dropout": Float(low=0.0, high=0.2, step=0.1, when={"depth": (3, 5)}),
            "batch_norm": Choice(choices=(True, False)),
        }
        points = list(grid(space))
        assert len(points) == (2 * 3 + 1) * 2
        assert [point for point in points if point["depth"] == 7] == [
            {"depth": 7, "batch_norm": True},
            {"depth": 7, "batch_norm": False},
        ]

    def test_a_grid_of_one_point_is_that_point(self) -> None:
        assert list(grid({"rate": Choice(choices=(0.25,))})) == [{"rate": 0.25}]

    def test_a_continuous_range_has_no_points(self) -> None:
        assert Float(low=0.0, high=1.0).points() is None


class TestRules:
    """`broken_rule` says in words why a value is none of a parameter's."""

    @pytest.mark.parametrize(
        ("parameter", "value", "rule"),
        [
            (DEPTH, 3, None),
            (DEPTH, 4, "must be one of 3, 5, 7"),
            (DEPTH, 3.0, "must be one of 3, 5, 7"),
            (DEPTH, "3", "must be one of 3, 5, 7"),
            (Choice(choices=(1, 2)), True, "must be one of 1, 2"),
            (Choice(choices=(True, False)), 1, "must be one of "),
            (Int(low=1, high=9), 9, None),
            (Int(low=1, high=9), 10, "must be from 1 to 9"),
            (Int(low=1, high=9), 0, "must be from 1 to 9"),
            (Int(low=1, high=9), 2.0, "must be a whole number"),
            (Int(low=1, high=9), True, "must be a whole number"),
            (Int(low=1, high=9), "2", "must be a whole number"),
            (Int(low=1, high=9, step=4), 5, None),
            (Int(low=1, high=9, step=4), 6, "must be 1 plus a whole number of steps of 4"),
            (Float(low=0.0, high=0.7), 0, None),
            (Float(low=0.0, high=0.7), 0.7, None),
            (Float(low=0.0, high=0.7), 0.71, "must be from 0 to 0.7"),
            (Float(low=0.0, high=0.7), -0.01, "must be from 0 to 0.7"),
            (Float(low=0.0, high=0.7), float("nan"), "must be from 0 to 0.7"),
            (Float(low=0.0, high=0.7), False, "must be a number"),
            (Float(low=0.0, high=0.7), None, "must be a number"),
            (Float(low=0.0, high=0.7, step=0.1), 0.1 * 3, None),
            (Float(low=0.0, high=0.7, step=0.1), 0.35, "must be 0 plus a whole number of steps of 0.1"),
        ],
    )
    def test_a_value_is_judged_by_type_range_and_step(
        self, parameter: Parameter, value: object, rule: str | None
    ) -> None:
        broken = broken_rule(parameter, value)
        assert broken is None if rule is None else (broken or "").startswith(rule)

    def test_a_list_of_many_choices_is_cut_to_a_line(self) -> None:
        broken = broken_rule(Choice(choices=tuple(range(1000))), -1)
        assert broken is not None
        assert len(broken) < 500

    @pytest.mark.parametrize(
        ("raw", "kind"),
        [
            ({"choices": [1]}, Choice),
            ({"low": 1, "high": 3}, Int),
            ({"low": 1, "high": 3, "step": 1}, Int),
            ({"low": 1, "high": 3.0}, Float),
            ({"low": 1, "high": 3, "step": 0.5}, Float),
            ({"low": 1, "high": 3, "type": "float"}, Float),
            ({"low": 1.0, "high": 3.0, "type": "int"}, Int),
            ({"low": True, "high": 3}, Float),
            ({}, Float),
        ],
    )
    def test_a_parameters_kind_follows_from_its_numbers(self, raw: dict[str, Any], kind: type) -> None:
        assert parameter_class(raw) is kind


# --- properties -------------------------------------------------------------------------------------------


@st.composite
def _stepped_floats(draw: st.DrawFn) -> Float:
    """Ranges as a person writes them: decimals, and a high that is a whole number of steps away."""
    exponent = draw(st.integers(-9, 3))
    step = draw(st.integers(1, 50))
    low = draw(st.integers(-1000, 1000))
    high = low + step * draw(st.integers(1, 30))
    return Float(low=_decimal(low, exponent), high=_decimal(high, exponent), step=_decimal(step, exponent))


def _decimal(digits: int, exponent: int) -> float:
    return float(f"{digits}e{exponent}")


@st.composite
def _ints(draw: st.DrawFn, limit: int = 10**6) -> Int:
    low = draw(st.integers(-limit, limit))
    step = draw(st.integers(1, 50))
    return Int(low=low, high=low + step * draw(st.integers(1, 30)), step=step)


_scalars = st.one_of(st.booleans(), st.integers(-5, 5), st.floats(-1, 1), st.text(max_size=3))


@st.composite
def _choices(draw: st.DrawFn) -> Choice:
    return Choice(choices=tuple(_different(draw(st.lists(_scalars, min_size=1, max_size=4)))))


def _different(values: Iterable[Any]) -> list[Any]:
    kept: list[Any] = []
    for value in values:
        if value not in kept:
            kept.append(value)
    return kept


@st.composite
def _spaces(draw: st.DrawFn) -> Space:
    """Small spaces with steps, each parameter perhaps conditional on an earlier one, written in any order."""
    space: Space = {}
    for name in ["a", "b", "c", "d"][: draw(st.integers(1, 4))]:
        parameter: Parameter = draw(st.one_of(_stepped_floats(), _ints(), _choices()))
        assume(len(parameter.points() or []) <= 8)
        earlier = [other for other, on in space.items() if not isinstance(on, Float)]
        if earlier and draw(st.booleans()):
            other = draw(st.sampled_from(earlier))
            values = draw(st.lists(st.sampled_from(space[other].points()), min_size=1, max_size=3))
            parameter = parameter.model_copy(update={"when": {other: tuple(values)}})
        space[name] = parameter
    return {name: space[name] for name in draw(st.permutations(list(space)))}


@given(_spaces())
@settings(max_examples=200, deadline=None)
def test_every_grid_point_is_complete_and_valid(space: Space) -> None:
    points = list(grid(space))
    assert points
    for point in points:
        for name, parameter in space.items():
            assert (name in point) == parameter.applies(point)
        for name, value in point.items():
            assert broken_rule(space[name], value) is None
            distribution = space[name].distribution()
            assert distribution._contains(distribution.to_internal_repr(value))
        # A waiting trial with these values is given exactly them.
        assert _fixed(point, space) == point


@given(_spaces())
@settings(max_examples=200, deadline=None)
def test_a_grid_has_every_point_once(space: Space) -> None:
    points = list(grid(space))
    keys = [tuple(sorted((name, repr(value)) for name, value in point.items())) for point in points]
    assert len(set(keys)) == len(keys)
    # The reference: every combination of all values, without the parameters that do not apply.
    every = itertools.product(*(parameter.points() or [] for parameter in space.values()))
    wanted = set()
    for values in every:
        point = _fixed(dict(zip(space, values, strict=True)), space)
        wanted.add(tuple(sorted((name, repr(value)) for name, value in point.items())))
    assert set(keys) == wanted


@given(_spaces(), st.integers(0, 2**32 - 1))
@settings(max_examples=100, deadline=None)
def test_every_suggestion_obeys_the_rules(space: Space, seed: int) -> None:
    trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed)).ask()
    point = suggest(trial, space)
    assert all(broken_rule(space[name], value) is None for name, value in point.items())
    assert set(point) == {name for name, parameter in space.items() if parameter.applies(point)}


@given(st.floats(-1e3, 1e3), st.floats(1e-3, 1e3), st.integers(1, 50), st.sampled_from([0.0, 1e-12, 3e-8, -3e-8]))
@example(0.0, 0.7, 3, 3e-8)
@example(0.0, 0.7, 3, -3e-8)
@settings(max_examples=200, deadline=None)
def test_a_step_that_is_accepted_divides_the_range(low: float, width: float, steps: int, off: float) -> None:
    try:
        parameter = Float(low=low, high=low + width, step=width / steps * (1 + off))
    except ValidationError:
        return
    # Optuna would warn, and lower the end.
    distribution = parameter.distribution()
    assert isinstance(distribution, FloatDistribution)
    assert distribution.high == parameter.high
    assert all(distribution._contains(value) for value in parameter.points() or [])


@given(_stepped_floats(), st.integers(-2, 32), st.sampled_from([0.0, 1e-12, 1e-7, -1e-7, 1e-3, -1e-3, 0.5]))
@example(Float(low=0.0, high=0.7, step=0.1), 1, 5e-7)
@settings(max_examples=200, deadline=None)
def test_a_value_near_a_step_is_allowed_if_optuna_allows_it(parameter: Float, steps: int, off: float) -> None:
    assert parameter.step is not None
    value = parameter.low + (steps + off) * parameter.step
    assert (broken_rule(parameter, value) is None) == parameter.distribution()._contains(value)


@given(_ints(limit=2**50), st.integers(-60, 2000))
@settings(max_examples=200, deadline=None)
def test_a_whole_number_is_allowed_exactly_on_the_steps(parameter: Int, above: int) -> None:
    value = parameter.low + above
    assert (broken_rule(parameter, value) is None) == (
        value in range(parameter.low, parameter.high + 1, parameter.step)
    )


@given(st.floats(allow_nan=False), st.floats(allow_nan=False), st.booleans())
@settings(max_examples=200, deadline=None)
def test_a_range_that_is_accepted_is_one_that_optuna_accepts(low: float, high: float, log: bool) -> None:
    try:
        parameter = Float(low=low, high=high, log=log)
    except ValidationError:
        return
    assert parameter.low < parameter.high
    assert not parameter.distribution().single()
