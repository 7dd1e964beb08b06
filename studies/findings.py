"""What can be said of a study in plain words, and what cannot: for its note in the dashboard and its report."""

import math
import random
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from storage import attributes
from storage.ranking import is_scored
from studies import model_rules, notebook
from studies.definition import Definition
from studies.model_rules import Number
from studies.space import Choice, Int, Parameter, listed

EDGE = 0.02  # share of a continuous range, from either end, that counts as its edge
SAMPLE = 300  # trials that importances are computed from: a few hundredths of a second each time
SHUFFLES = 19  # of which none may look as telling as what was found: chance does so once in 20 times


@dataclass(frozen=True, kw_only=True)
class Findings:
    """Plain sentences, not escaped for any markup."""

    found: tuple[str, ...]  # the best, and how sure it is
    mattered: tuple[str, ...]  # which hyperparameters made the difference
    cautions: tuple[str, ...]  # what cannot be concluded


def findings(trials: Sequence[FrozenTrial], definition: Definition, data: Mapping[str, Any]) -> Findings:
    """What `trials`, of a study that was made with `data` (its user attribute), let one say."""
    complete = ranked(trials)
    judged = "test" if definition.data.validation == "test" else "validation"
    cautions = [*notebook.caution(definition)]
    if definition.data.validation == "test":
        cautions.append(
            "The trials were chosen by the test images, as the notebook chose: the best accuracy is flattered, and is "
            "for comparison with the notebook, not for conclusions."
        )
    if not complete:
        none = ("No trial is complete: there is nothing to conclude.",)
        return Findings(found=none, mattered=(), cautions=tuple(cautions + _by_state(trials)))
    best = complete[0]
    told = f"with {shown(best.params)}" if best.params else "with the fixed hyperparameters"
    found = [
        f"The best of {_many(len(complete), 'complete trial')} is trial {best.number}, {told}: {judged} accuracy "
        f"{best.values[0]:.4f}."
    ]
    images = data.get(judged)
    # What was imported was measured on others' images, of which nobody knows how many.
    if isinstance(images, int) and images > 0 and (judged == "test" or not best.user_attrs.get("imported")):
        sure, unsure = _noise(complete, images, judged)
        found.append(sure)
        cautions += unsure
    if len(complete) > 1:
        worst = complete[-1]
        found.append(
            f"The worst complete one is trial {worst.number}, with {shown(worst.params)}: {worst.values[0]:.4f}."
        )
    cautions += edges(trials, definition) + _by_state(trials)
    return Findings(found=tuple(found), mattered=tuple(_mattered(complete, definition)), cautions=tuple(cautions))


def ranked(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The complete and feasible ones, best first; of equals, the first (as `storage.ranking` has it)."""
    complete = [trial for trial in trials if is_scored(trial) and is_feasible(trial)]
    return sorted(complete, key=lambda trial: (-float(trial.values[0]), trial.number))


def is_feasible(trial: FrozenTrial) -> bool:
    """Whether the trial violates none of its constraints, if it has any."""
    return all(value <= 0.0 for value in trial.constraints.values())


def half_width(accuracy: float, images: int) -> float:
    """Half of the 95 % interval of an accuracy measured on so many images, as a binomial share.

    At 0 and 1, where that has no width, the rule of three: 3 / n.
    """
    if accuracy <= 0.0 or accuracy >= 1.0:
        return 3.0 / images
    return 1.96 * math.sqrt(accuracy * (1.0 - accuracy) / images)


def _noise(complete: Sequence[FrozenTrial], images: int, judged: str) -> tuple[str, list[str]]:
    best = float(complete[0].values[0])
    half = half_width(best, images)
    sure = f"On {images:,} {judged} images, the 95 % interval of that accuracy is {best:.4f} ± {half:.4f}."
    unsure = []
    near = [trial for trial in complete[1:] if _alike(best, float(trial.values[0]), images)]
    if near:
        second = complete[1]
        unsure.append(
            f"{images:,} {judged} images do not tell the best from the runner-up, trial {second.number} "
            f"({second.values[0]:.4f}), and with it {_many(len(near), 'trial')} of the {len(complete) - 1} others."
        )
    if len(complete) > 1:
        unsure.append(
            f"The best of {len(complete)} is also the luckiest, and each accuracy is that of its best epoch: measured "
            "anew, it will be a little lower."
        )
    return sure, unsure


def _alike(one: float, other: float, images: int) -> bool:
    """Whether two accuracies on so many images each differ by no more than the 95 % interval of a difference."""
    return abs(one - other) <= math.hypot(half_width(one, images), half_width(other, images))


def edges(trials: Sequence[FrozenTrial], definition: Definition) -> list[str]:
    """A warning for each numeric hyperparameter whose best value lies at an end of what was searched.

    None where nothing lies beyond that end: a dropout rate cannot be less than 0.
    """
    complete = ranked(trials)
    if not complete:
        return []
    rules = model_rules.rules(definition.model) or model_rules.TRAINING
    warned = []
    for name, value in complete[0].params.items():
        parameter = definition.space.get(name)
        span = None if parameter is None else _span(parameter)
        if span is None:
            continue
        low, high = span
        end = _end(parameter, value, low, high)
        rule = rules.get(name)
        if end is None or not isinstance(rule, Number | None):
            continue
        limit = low if end == "lower" else high
        if isinstance(rule, Number) and limit == (rule.low if end == "lower" else rule.high):
            continue
        warned.append(
            f"The best trial's {name} = {value_text(value)} lies at the {end} end of what was searched "
            f"({low:g} to {high:g}): a better one may lie beyond it, so search a wider range."
        )
    return warned


def _span(parameter: Parameter) -> tuple[float, float] | None:
    if not isinstance(parameter, Choice):
        return (parameter.low, parameter.high) if parameter.low < parameter.high else None
    numbers = [
        choice for choice in parameter.choices if isinstance(choice, (int, float)) and not isinstance(choice, bool)
    ]
    # Of two choices, each is at an end.
    return (min(numbers), max(numbers)) if len(numbers) == len(parameter.choices) and len(numbers) > 2 else None


def _end(parameter: Parameter | None, value: Any, low: float, high: float) -> str | None:
    if isinstance(parameter, (Choice, Int)) or (parameter is not None and parameter.step is not None):
        return "lower" if value <= low else "upper" if value >= high else None
    if parameter is not None and parameter.log:
        value, low, high = math.log(value), math.log(low), math.log(high)
    place = (value - low) / (high - low)
    return "lower" if place <= EDGE else "upper" if place >= 1 - EDGE else None


def _by_state(trials: Sequence[FrozenTrial]) -> list[str]:
    states = Counter(trial.state for trial in trials)
    told = []
    if states[TrialState.PRUNED]:
        told.append(
            f"Ended early, lagging behind: {_many(states[TrialState.PRUNED], 'trial')} of {len(trials)}. What "
            "they would have reached is not known."
        )
    failed = [attributes.failure(trial.user_attrs.get("failure")) for trial in trials if trial.state == TrialState.FAIL]
    if failed:
        kinds = Counter(failure["kind"] for failure in failed)
        why = ", ".join(f"{kind} {count}" for kind, count in kinds.most_common())
        told.append(f"Failed: {_many(len(failed), 'trial')} ({why}). That part of the space was not measured.")
    left = states[TrialState.RUNNING] + states[TrialState.WAITING]
    if left:
        told.append(f"Still running or waiting: {_many(left, 'trial')}. This is not the end.")
    imported = sum(bool(trial.user_attrs.get("imported")) for trial in trials)
    if imported:
        told.append(f"Imported, not run here: {_many(imported, 'trial')}. What they say was not checked.")
    complete = ranked(trials)
    if not complete or sum(trial.params == complete[0].params for trial in complete) == 1:
        told.append("The best configuration was trained once, with one seed: another seed gives other numbers.")
    return told


def importances(trials: Sequence[FrozenTrial]) -> dict[str, float]:
    """How much each hyperparameter has to do with being among the best tenth, or best five (PED-ANOVA), as shares of 1.

    Empty where there are too few trials, or all have the same accuracy. Shares alone say little: of three
    hyperparameters that have nothing to do with the accuracy one easily has two thirds, see `stands_out`.
    """
    found = _weights(_sampled(trials))
    total = sum(found.values())
    return {name: share / total for name, share in found.items()} if total > 0 else {}


def stands_out(trials: Sequence[FrozenTrial]) -> bool:
    """Whether the first of `importances` says more than chance would: a permutation test at 5 %.

    The same accuracies are dealt to the same hyperparameters anew, `SHUFFLES` times; no hyperparameter may then weigh
    as much as the heaviest does in truth. The same trials give the same answer.
    """
    sampled = _sampled(trials)
    heaviest = max(_weights(sampled).values(), default=0.0)
    accuracies, chance = [float(trial.values[0]) for trial in sampled], random.Random(0)
    for _ in range(SHUFFLES):
        chance.shuffle(accuracies)
        dealt = [
            optuna.trial.create_trial(params=trial.params, distributions=trial.distributions, value=accuracy)
            for trial, accuracy in zip(sampled, accuracies, strict=True)
        ]
        if max(_weights(ranked(dealt)).values(), default=0.0) >= heaviest:
            return False
    return heaviest > 0.0


def _sampled(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """At most `SAMPLE` of the complete ones, best first: every n-th, from the best to the worst."""
    complete = ranked(trials)
    return complete[:: max(1, math.ceil(len(complete) / SAMPLE))]


def _weights(complete: Sequence[FrozenTrial]) -> dict[str, float]:
    """The importances of ranked trials as PED-ANOVA gives them, largest first."""
    if len(complete) < 4 or complete[0].values[0] == complete[-1].values[0]:
        return {}
    # A tenth of few trials is one: take enough of them.
    quantile = min(0.5, max(0.1, 5 / len(complete)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says, trial by trial, that they are few
        try:
            evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=quantile)
            return optuna.importance.get_param_importances(_in_memory(complete), evaluator=evaluator, normalize=False)
        except (ValueError, RuntimeError, ArithmeticError, AssertionError):
            return {}


def _in_memory(trials: Sequence[FrozenTrial]) -> optuna.Study:
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(direction="maximize")
    finally:
        optuna.logging.set_verbosity(level)
    study.add_trials(trials)
    return study


def _mattered(complete: Sequence[FrozenTrial], definition: Definition) -> list[str]:
    shares = importances(complete)
    if not shares:
        return ["Too few complete trials, or too equal ones, to say which hyperparameter made the difference."]
    told = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
    first = next(iter(shares))
    sentences = []
    if len(shares) > 1 and stands_out(complete):
        sentences = [f"What told the best trials from the others was most of all {first} ({told})."]
    elif len(shares) > 1:
        sentences = [
            f"These trials do not say which hyperparameter made the difference: by chance alone, one would seem to as "
            f"much as {first} does ({told})."
        ]
    return sentences + _groups(complete, definition)


def _groups(complete: Sequence[FrozenTrial], definition: Definition) -> list[str]:
    """For each choice: the best accuracy of each of its values."""
    told = []
    for name, parameter in definition.space.items():
        if not isinstance(parameter, Choice) or len(parameter.choices) < 2:
            continue
        groups: dict[str, list[float]] = {}
        for trial in complete:
            if name in trial.params:
                groups.setdefault(value_text(trial.params[name]), []).append(float(trial.values[0]))
        if len(groups) > 1:
            best = sorted(groups.items(), key=lambda item: -max(item[1]))
            parts = ", ".join(f"{value} {max(values):.4f} (of {len(values)})" for value, values in best)
            told.append(f"The best accuracy by {name}: {parts}.")
    return told


def searched(definition: Definition) -> dict[str, str]:
    """Each hyperparameter that is searched, and over what, in words."""
    return {name: _range(parameter) for name, parameter in definition.space.items()}


def _range(parameter: Parameter) -> str:
    if isinstance(parameter, Choice):
        told = f"one of {listed(parameter.choices)}"
    else:
        told = f"{parameter.low:g} to {parameter.high:g}"
        if parameter.log:
            told += ", logarithmic"
        if parameter.step is not None and not (isinstance(parameter, Int) and parameter.step == 1):
            told += f", in steps of {parameter.step:g}"
    conditions = (f"{name} is {' or '.join(map(value_text, values))}" for name, values in parameter.when.items())
    when = " and ".join(conditions)
    return f"{told}, where {when}" if when else told


def shown(point: Mapping[str, Any]) -> str:
    """Hyperparameters on one line."""
    return ", ".join(f"{name} {value_text(value)}" for name, value in point.items())


def value_text(value: Any) -> str:
    """One hyperparameter's value, a real number with four digits."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _many(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
