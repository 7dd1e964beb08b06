"""Conclusions from a study in plain sentences, and cautions: for the report and the dashboard's note."""

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
from studies.space import Choice, Int, Parameter, values_text

EDGE = 0.02  # share of a continuous range, from either end, that counts as its edge
SAMPLE = 300  # trials that importances are computed from: this takes a few hundredths of a second
SHUFFLES = 19  # none may give a larger importance than the real order: by chance that happens once in 20 times


@dataclass(frozen=True, kw_only=True)
class Findings:
    """Plain sentences, not escaped for any markup."""

    best: tuple[str, ...]  # the best trial, and how certain its accuracy is
    influences: tuple[str, ...]  # which hyperparameters made the difference
    cautions: tuple[str, ...]  # what cannot be concluded


def findings(trials: Sequence[FrozenTrial], definition: Definition, data: Mapping[str, Any]) -> Findings:
    """What can be concluded from `trials`; `data` is the study's user attribute of that name."""
    complete = ranked(trials)
    if definition.confirm is not None:
        sentence = f"This study confirms {definition.confirm.study}: it trains its best configurations again."
        return Findings(best=(sentence,), influences=(), cautions=tuple(_by_state(trials)))
    judged = definition.judged_on
    cautions = [*notebook.caution(definition)]
    if definition.data.validation == "test":
        cautions.append(
            "The trials were chosen by the test images, as in the notebook: the best accuracy is too optimistic. Use "
            "it for comparison with the notebook, not for conclusions."
        )
    if not complete:
        none = ("No trial is complete: there is nothing to conclude.",)
        return Findings(best=none, influences=(), cautions=tuple(cautions + _by_state(trials)))
    best = complete[0]
    point = f"with {params_text(best.params)}" if best.params else "with the fixed hyperparameters"
    sentences = [
        f"The best of {_many(len(complete), 'complete trial')} is trial {best.number}, {point}: {judged} accuracy "
        f"{best.values[0]:.4f}."
    ]
    images = data.get(judged)
    # Imported results were measured on an unknown number of images.
    if isinstance(images, int) and images > 0 and (judged == "test" or not best.user_attrs.get("imported")):
        interval, noise_cautions = _noise(complete, images, judged)
        sentences.append(interval)
        cautions += noise_cautions
    if len(complete) > 1:
        worst = complete[-1]
        sentences.append(
            f"The worst complete one is trial {worst.number}, with {params_text(worst.params)}: {worst.values[0]:.4f}."
        )
    cautions += edges(trials, definition) + _by_state(trials)
    influences = _influences(complete, definition)
    return Findings(best=tuple(sentences), influences=tuple(influences), cautions=tuple(cautions))


def ranked(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The complete and feasible trials, best first and equal ones by number, as in `storage.ranking`."""
    complete = [trial for trial in trials if is_scored(trial) and is_feasible(trial)]
    return sorted(complete, key=lambda trial: (-float(trial.values[0]), trial.number))


def is_feasible(trial: FrozenTrial) -> bool:
    """Whether the trial violates no constraint."""
    return all(value <= 0.0 for value in trial.constraints.values())


def half_width(accuracy: float, images: int) -> float:
    """Half of the width of the 95 % interval of a binomial share: an accuracy measured on so many images.

    At 0 and 1 the normal approximation has no width, so the rule of three is used: 3 / n.
    """
    if accuracy <= 0.0 or accuracy >= 1.0:
        return 3.0 / images
    return 1.96 * math.sqrt(accuracy * (1.0 - accuracy) / images)


def _noise(complete: Sequence[FrozenTrial], images: int, judged: str) -> tuple[str, list[str]]:
    best = float(complete[0].values[0])
    half = half_width(best, images)
    interval = f"On {images:,} {judged} images, the 95 % interval of that accuracy is {best:.4f} ± {half:.4f}."
    cautions = []
    near = [trial for trial in complete[1:] if _indistinguishable(best, float(trial.values[0]), images)]
    if near:
        second = complete[1]
        cautions.append(
            f"{images:,} {judged} images are too few to distinguish the best from the runner-up, trial {second.number} "
            f"({second.values[0]:.4f}): {_many(len(near), 'trial')} of the {len(complete) - 1} others may be as good."
        )
    if len(complete) > 1:
        cautions.append(
            f"The best of {len(complete)} was also lucky, and each accuracy is that of its best epoch: measured again, "
            "it will be a little lower."
        )
    return interval, cautions


def _indistinguishable(first: float, second: float, images: int) -> bool:
    """Whether two accuracies, each on so many images, differ by no more than the 95 % interval of a difference."""
    return abs(first - second) <= math.hypot(half_width(first, images), half_width(second, images))


def edges(trials: Sequence[FrozenTrial], definition: Definition) -> list[str]:
    """A warning for each numeric hyperparameter whose best value is at an end of its searched range.

    There is no warning if no value exists beyond that end: a dropout rate cannot be less than 0.
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
            f"The best trial's {name} = {value_text(value)} is at the {end} end of the searched range "
            f"({low:g} to {high:g}): a better value may be beyond it, so search a wider range."
        )
    return warned


def _span(parameter: Parameter) -> tuple[float, float] | None:
    if not isinstance(parameter, Choice):
        return (parameter.low, parameter.high) if parameter.low < parameter.high else None
    numbers = [
        choice for choice in parameter.choices if isinstance(choice, (int, float)) and not isinstance(choice, bool)
    ]
    # With only two choices, each is at an end.
    return (min(numbers), max(numbers)) if len(numbers) == len(parameter.choices) and len(numbers) > 2 else None


def _end(parameter: Parameter | None, value: Any, low: float, high: float) -> str | None:
    if isinstance(parameter, (Choice, Int)) or (parameter is not None and parameter.step is not None):
        return "lower" if value <= low else "upper" if value >= high else None
    if parameter is not None and parameter.log:
        value, low, high = math.log(value), math.log(low), math.log(high)
    share = (value - low) / (high - low)
    return "lower" if share <= EDGE else "upper" if share >= 1 - EDGE else None


def _by_state(trials: Sequence[FrozenTrial]) -> list[str]:
    states = Counter(trial.state for trial in trials)
    sentences = []
    if states[TrialState.PRUNED]:
        sentences.append(
            f"Pruned: {_many(states[TrialState.PRUNED], 'trial')} of {len(trials)}. It is not known what accuracy they "
            "would have reached."
        )
    failed = [attributes.failure(trial.user_attrs.get("failure")) for trial in trials if trial.state == TrialState.FAIL]
    if failed:
        kinds = Counter(failure["kind"] for failure in failed)
        why = ", ".join(f"{kind} {count}" for kind, count in kinds.most_common())
        sentences.append(f"Failed: {_many(len(failed), 'trial')} ({why}). That part of the space was not measured.")
    left = states[TrialState.RUNNING] + states[TrialState.WAITING]
    if left:
        sentences.append(f"Still running or waiting: {_many(left, 'trial')}. The result may change.")
    imported = sum(bool(trial.user_attrs.get("imported")) for trial in trials)
    if imported:
        sentences.append(f"Imported, not run here: {_many(imported, 'trial')}. Their results were not checked.")
    complete = ranked(trials)
    if not complete or sum(trial.params == complete[0].params for trial in complete) == 1:
        sentences.append("The best configuration was trained once, with one seed: another seed gives other numbers.")
    return sentences


def importances(trials: Sequence[FrozenTrial]) -> dict[str, float]:
    """How much each hyperparameter decides whether a trial is among the best tenth (or best five), as shares of 1.

    Computed by PED-ANOVA. Empty if there are too few trials, or all have the same accuracy. Shares alone say little: if
    three hyperparameters have no influence at all, one can still get two thirds. See `is_significant`.
    """
    weights = _weights(_sampled(trials))
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()} if total > 0 else {}


def is_significant(trials: Sequence[FrozenTrial]) -> bool:
    """Whether the largest of `importances` is more than chance: a permutation test at 5 %.

    The accuracies are shuffled among the trials `SHUFFLES` times. No hyperparameter may then have as much weight as the
    largest has in the real order. The same trials always give the same answer.
    """
    sample = _sampled(trials)
    largest = max(_weights(sample).values(), default=0.0)
    accuracies, generator = [float(trial.values[0]) for trial in sample], random.Random(0)
    for _ in range(SHUFFLES):
        generator.shuffle(accuracies)
        shuffled = [
            optuna.trial.create_trial(params=trial.params, distributions=trial.distributions, value=accuracy)
            for trial, accuracy in zip(sample, accuracies, strict=True)
        ]
        if max(_weights(ranked(shuffled)).values(), default=0.0) >= largest:
            return False
    return largest > 0.0


def _sampled(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """At most `SAMPLE` of the complete trials: every n-th of the ranking."""
    complete = ranked(trials)
    return complete[:: max(1, math.ceil(len(complete) / SAMPLE))]


def _weights(complete: Sequence[FrozenTrial]) -> dict[str, float]:
    """The importances of ranked trials as PED-ANOVA gives them, largest first."""
    if len(complete) < 4 or complete[0].values[0] == complete[-1].values[0]:
        return {}
    # A tenth of few trials would be a single one.
    quantile = min(0.5, max(0.1, 5 / len(complete)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna warns that the trials are few
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


def _influences(complete: Sequence[FrozenTrial], definition: Definition) -> list[str]:
    shares = importances(complete)
    if not shares:
        return ["There are too few complete trials, or they are too similar, to say which hyperparameter matters."]
    shares_text = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
    first = next(iter(shares))
    sentences = []
    if len(shares) > 1 and is_significant(complete):
        sentences = [f"The hyperparameter that matters most is {first} ({shares_text})."]
    elif len(shares) > 1:
        sentences = [
            f"These trials do not show which hyperparameter matters: chance alone could give {first} as large a share "
            f"({shares_text})."
        ]
    return sentences + _groups(complete, definition)


def _groups(complete: Sequence[FrozenTrial], definition: Definition) -> list[str]:
    """For each hyperparameter with choices, the best accuracy of each choice."""
    sentences = []
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
            sentences.append(f"The best accuracy by {name}: {parts}.")
    return sentences


def ranges(definition: Definition) -> dict[str, str]:
    """The name of each searched hyperparameter, and its range in words."""
    return {name: _range(parameter) for name, parameter in definition.space.items()}


def _range(parameter: Parameter) -> str:
    if isinstance(parameter, Choice):
        text = f"one of {values_text(parameter.choices)}"
    else:
        text = f"{parameter.low:g} to {parameter.high:g}"
        if parameter.log:
            text += ", logarithmic"
        if parameter.step is not None and not (isinstance(parameter, Int) and parameter.step == 1):
            text += f", in steps of {parameter.step:g}"
    conditions = (f"{name} is {' or '.join(map(value_text, values))}" for name, values in parameter.when.items())
    when = " and ".join(conditions)
    return f"{text}, if {when}" if when else text


def params_text(point: Mapping[str, Any]) -> str:
    """Hyperparameters on one line."""
    return ", ".join(f"{name} {value_text(value)}" for name, value in point.items())


def value_text(value: Any) -> str:
    """A hyperparameter's value; floats have four digits."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _many(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
