"""What `check` says about a definition: the space in words, and what samplers do with it."""

import importlib.util
from collections import Counter
from typing import Any

import optuna
import pytest

from studies import advice, sampling
from studies.definition import Definition, parse
from studies.space import suggest

NO_TORCH = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="Optuna's GPSampler needs PyTorch, which is not installed"
)


def _definition(space: str, more: str = "", trials: int = 30) -> Definition:
    text = f'name = "n"\ndataset = "digits"\nmodel = "own:build"\nbudget.trials = {trials}\n{more}\n[space]\n{space}'
    return parse(text)


@pytest.mark.parametrize(
    ("parameter", "text"),
    [
        ("{ low = 0.0, high = 0.5 }", "0.0 to 0.5"),
        ("{ low = 0, high = 0.5 }", "0.0 to 0.5"),
        ("{ low = 0, high = 1 }", "whole numbers 0 to 1"),
        ("{ choices = [3, 5, 7] }", "one of 3, 5, 7"),
        ("{ choices = [true, 'adam'] }", "one of true, adam"),
        ("{ low = 16, high = 64, step = 16 }", "whole numbers 16 to 64 in steps of 16"),
        ("{ low = 0.0, high = 4.0, step = 1.0 }", "0.0 to 4.0 in steps of 1.0"),
        ("{ low = 1e-4, high = 0.1, log = true }", "0.0001 to 0.1, uniform in the logarithm"),
        ("{ low = 1, high = 9, when = { a = [1, 2] } }", "whole numbers 1 to 9, if a is 1 or 2"),
        ("{ low = 1, high = 9, when = { b = true } }", "whole numbers 1 to 9, if b is true"),
    ],
)
def test_the_space_is_said_as_it_was_understood(parameter: str, text: str) -> None:
    definition = _definition(f"a = {{ choices = [1, 2, 3] }}\nb = {{ choices = [true, ':cat:'] }}\nx = {parameter}")
    said = advice.space_text(definition)
    assert said == {"a": "one of 1, 2, 3", "b": 'one of true, ":cat:"', "x": text}


def test_fewer_points_than_trials_are_said() -> None:
    (note,) = advice.notes(_definition("dropout = { choices = [0.1, 0.2] }", trials=6))
    assert note == "the space has only 2 points, so the study ends after 2 trials, not 6"
    assert advice.notes(_definition("dropout = { choices = [0.1, 0.2] }", trials=2)) == []
    assert advice.notes(_definition("dropout = { low = 0.1, high = 0.2 }")) == []


def test_one_bracket_of_hyperband_is_said() -> None:
    space = "dropout = { low = 0.1, high = 0.2 }"
    (note,) = advice.notes(_definition(space, "pruner.kind = 'hyperband'\nbudget.epochs = 2"))
    assert note == "the pruner hyperband has one bracket here, so it is successive halving"
    assert advice.notes(_definition(space, "pruner.kind = 'hyperband'\nbudget.epochs = 3")) == []


MIXED = """
kind = { choices = ["a", "b"] }
x = { low = 0.0, high = 1.0 }
y = { low = 0.0, high = 1.0 }
z = { low = 0.0, high = 1.0, when.kind = "a" }
"""


@pytest.mark.parametrize("sampler", ["tpe", pytest.param("gp", marks=NO_TORCH), "qmc", "cmaes", "nsga2"])
def test_what_is_said_to_be_drawn_at_random_is(sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compared with what the last trials leave to Optuna's random sampler, each time."""
    definition = _definition(MIXED, f'sampler.kind = "{sampler}"')
    drawn, suggested = Counter[str](), Counter[str]()
    original = optuna.samplers.RandomSampler.sample_independent

    def counting(self: Any, study: Any, trial: Any, name: str, distribution: Any) -> Any:
        drawn[name] += 1
        return original(self, study, trial, name, distribution)

    monkeypatch.setattr(optuna.samplers.RandomSampler, "sample_independent", counting)
    study = optuna.create_study(direction="maximize")
    for number in range(definition.trials):
        if number == definition.trials // 2:
            drawn.clear()
            suggested.clear()
        study.sampler = sampling.sampler(definition, number)
        trial = study.ask()
        point = suggest(trial, definition.space)
        suggested.update(list(point))
        study.tell(trial, point["x"])
    # The mutations of nsga2 are random draws, too, but rare.
    always = sorted(name for name in suggested if drawn[name] == suggested[name])
    assert always == advice.drawn_at_random(definition)
    said = " ".join(advice.notes(definition))
    assert all(name in said for name in always)
    assert bool(said) == bool(always)
