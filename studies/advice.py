"""What `check` says about a definition that is valid: the space as it was understood, and what one may not expect."""

from storage.errors import many
from studies import sampling
from studies.definition import Definition
from studies.space import Choice, range_text

# What each sampler draws at random to the last trial, because it learns only about parameters that always apply
# (cmaes: about numbers that always apply). The others learn about all.
_ONLY_NUMBERS, _ALWAYS_APPLYING = ("cmaes",), ("cmaes", "gp", "nsga2")


def space_text(definition: Definition) -> dict[str, str]:
    """The range of each hyperparameter in words, by name: ``{"dropout": "0.0 to 0.5", "depth": "one of 3, 5, 7"}``."""
    return {name: range_text(parameter) for name, parameter in definition.space.items()}


def notes(definition: Definition) -> list[str]:
    """What one may not expect, a sentence each."""
    return [*_few_points(definition), *_drawn_at_random(definition), *_one_bracket(definition)]


def drawn_at_random(definition: Definition) -> list[str]:
    """The hyperparameters that the sampler draws at random, however many trials have finished."""
    kind = definition.sampler.kind
    return [
        name
        for name, parameter in definition.space.items()
        if (parameter.when and kind in _ALWAYS_APPLYING) or (isinstance(parameter, Choice) and kind in _ONLY_NUMBERS)
    ]


def _few_points(definition: Definition) -> list[str]:
    wanted, points = definition.budget.trials, definition.size
    if definition.confirm is not None or wanted is None or points is None or points >= wanted:
        return []
    return [
        f"the space has only {many(points, 'point')}, so the study ends after {many(points, 'trial')}, not {wanted}"
    ]


def _drawn_at_random(definition: Definition) -> list[str]:
    names, kind = drawn_at_random(definition), definition.sampler.kind
    if not names:
        return []
    learns = "numbers that always apply" if kind in _ONLY_NUMBERS else "hyperparameters that always apply"
    return [
        f"the sampler {kind} learns only about {learns}, and draws {', '.join(names)} at random to the last trial: "
        "tpe learns about all"
    ]


def _one_bracket(definition: Definition) -> list[str]:
    if sampling.brackets(definition) != 1:
        return []
    return ["the pruner hyperband has one bracket here, so it is successive halving"]
