"""Conclusions from a study in plain sentences, and cautions: for the report and the dashboard's note."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import stdev
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from storage import attributes
from storage.errors import many
from storage.hits import Hits
from storage.ranking import is_feasible, is_scored, rank_key
from studies import importance, model_rules, notebook, sources, statistics
from studies.definition import Definition
from studies.model_rules import Number
from studies.space import Choice, Int, Parameter, key_of, range_text

EDGE = 0.02  # share of a continuous range, from either end, that counts as its edge
NEAR = 50  # so many trials behind the best are compared with it
BEST = 5  # trials whose values are looked at for what they have in common
UNEVEN = 1.5  # times its equal part: then a class is much more frequent than others
GAP = 0.15  # between the accuracies on training and other images: more is warned of


@dataclass(frozen=True, kw_only=True)
class Findings:
    """Plain sentences, not escaped for any markup."""

    best: tuple[str, ...]  # the best trial, and how certain its accuracy is
    influences: tuple[str, ...]  # which hyperparameters made the difference
    cautions: tuple[str, ...]  # what cannot be concluded


def findings(
    trials: Sequence[FrozenTrial],
    definition: Definition,
    data: Mapping[str, Any],
    hits: Mapping[int, Hits] | None = None,
) -> Findings:
    """What can be concluded from `trials`.

    `data` is the study's user attribute of that name, and `hits` are those of its best trials, by the trial's id.
    """
    complete = ranked(trials)
    if definition.confirm is not None:
        sentence = f"This study confirms {definition.confirm.study}: it trains its best configurations again."
        return Findings(best=(sentence,), influences=(), cautions=tuple(_by_state(trials, definition)))
    judged = definition.judged_on
    cautions = [*notebook.caution(definition)]
    if definition.protocol == "test":
        cautions.append(
            "The trials were chosen by the test images, as in the notebook: the best accuracy is too optimistic. Use "
            "it for comparison with the notebook, not for conclusions."
        )
    if not complete:
        none = ("No trial is complete: there is nothing to conclude.",)
        return Findings(best=none, influences=(), cautions=tuple(cautions + _by_state(trials, definition)))
    best = complete[0]
    point = f"with {params_text(best.params)}" if best.params else "with the fixed hyperparameters"
    sentences = [
        f"The best of {many(len(complete), 'complete trial')} is trial {best.number}, {point}: {judged} accuracy "
        f"{best.values[0]:.4f}."
    ]
    images = data.get(judged)
    # Imported results were measured on an unknown number of images.
    repeats = attributes.numbers(best.user_attrs.get("repeats"))
    is_accuracy = 0.0 <= float(best.values[0]) <= 1.0  # other programs may store percent
    if len(repeats) > 1:
        sentences.append(
            f"It is the mean of {len(repeats)} trainings, from {min(repeats):.4f} to {max(repeats):.4f} (standard "
            f"deviation {stdev(repeats):.4f}). The best of many was also lucky."
        )
    elif (
        is_accuracy
        and isinstance(images, int)
        and images > 0
        and (judged == "test" or not best.user_attrs.get("imported"))
    ):
        sentence, noise_cautions = _noise(complete, images, definition, data, hits or {})
        sentences.append(sentence)
        cautions += noise_cautions
    if len(complete) > 1:
        worst = complete[-1]
        sentences.append(
            f"The worst complete one is trial {worst.number}, with {params_text(worst.params)}: {worst.values[0]:.4f}."
        )
    cautions += _contradictions(best, definition, data) + edges(trials, definition) + _by_state(trials, definition)
    influences = _influences(trials, definition)
    return Findings(best=tuple(sentences), influences=tuple(influences), cautions=tuple(cautions))


def ranked(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The complete and feasible trials, best first, as in `storage.ranking`."""
    complete = [trial for trial in trials if is_scored(trial) and is_feasible(trial)]
    return sorted(complete, key=rank_key)


def _noise(
    complete: Sequence[FrozenTrial],
    images: int,
    definition: Definition,
    data: Mapping[str, Any],
    hits: Mapping[int, Hits],
) -> tuple[str, list[str]]:
    """How precise the best accuracy is, and which other trials may be as good."""
    best = float(complete[0].values[0])
    error = statistics.wilson(round(best * images), images)
    can_confirm = definition.protocol == "validation" and sources.has_test_images(definition.dataset, data)
    again = f"; `trialyard confirm {definition.name}` measures it again" if can_confirm else ""
    judged = definition.judged_on
    sentence = (
        f"The sampling error of one such accuracy on {images:,} {judged} images: {error.low:.4f} to {error.high:.4f} "
        f"(95 %). It leaves out the luck of being the best of many trials{again}."
    )
    others = complete[1 : NEAR + 1]
    near = [trial for trial in others if not _is_worse(trial, complete[0], images, hits)]
    if not near:
        return sentence, []
    which = f"{len(complete) - 1} others" if len(others) == len(complete) - 1 else f"{NEAR} next ones"
    them = f"any of the {which}" if len(near) == len(others) else f"{many(len(near), 'trial')} of the {which}"
    example = f"trial {near[0].number} ({near[0].values[0]:.4f})"
    than = f"{them}, such as {example}" if len(others) > 1 else f"the other one, {example}"
    caution = f"On {images:,} {judged} images the best is not reliably better than {than}."
    return sentence, [caution]


def _is_worse(trial: FrozenTrial, best: FrozenTrial, images: int, hits: Mapping[int, Hits]) -> bool:
    """Whether the trial's model is worse than the best one's by more than sampling explains.

    On the same images by McNemar's test, which sees smaller differences than two intervals do.
    """
    if not 0.0 <= float(trial.values[0]) <= 1.0:
        return True  # another program's: no accuracy
    ours, theirs = hits.get(best._trial_id), hits.get(trial._trial_id)
    if ours is not None and theirs is not None and ours.fingerprint == theirs.fingerprint:
        return statistics.mcnemar_p(ours.array(), theirs.array()) < 0.05
    return statistics.difference_of_two(float(best.values[0]), float(trial.values[0]), images, images).low > 0.0


def _contradictions(best: FrozenTrial, definition: Definition, data: Mapping[str, Any]) -> list[str]:
    """Warnings where a result looks as if something else were wrong than the hyperparameters."""
    found = []
    value = float(best.values[0])
    # Other programs may have written anything there.
    classes, images = (
        count if isinstance(count := data.get(key), int) else 0 for key in ("classes", definition.judged_on)
    )
    known = classes > 1 and images > 0
    # It is of the images that judge a search; older versions did not record it.
    most = data.get("most_frequent") if definition.confirm is None else None
    constant = most if known and isinstance(most, int) and 0 < most <= images else 0
    # What guessing gives, or always giving the same answer, with its sampling error.
    if known and value <= statistics.wilson(max(constant, round(images / classes)), images).high:
        share = constant / images
        if share < UNEVEN / classes:
            what = f"at the level of chance for {classes} classes: nothing was learned"
        elif value <= share:
            what = f"no better than always answering the most frequent class, {share:.4f}: nothing was learned"
        else:
            what = (
                f"not reliably better than always answering the most frequent class, {share:.4f}: perhaps nothing was "
                "learned"
            )
        found.append(f"The best accuracy, {value:.4f}, is {what}. Check the data, the labels and the learning rate.")
    trained = attributes.number(best.user_attrs.get("train_accuracy"))
    if trained is not None and trained - value > GAP:
        found.append(
            f"The best trial has {trained:.4f} on the training images and {value:.4f} on the others: it "
            "overfits, or the two sets have different kinds of images."
        )
    return found


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
        # A hyperparameter of a model of one's own has no rule, but most are not negative, and a share is at most 1.
        ends = (rule.low, rule.high) if isinstance(rule, Number) else (0.0, 1.0 if low == 0.0 else math.inf)
        if limit == (ends[0] if end == "lower" else ends[1]):
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
    if parameter is not None and parameter.log and value <= 0:
        return None  # another program gave the trial a value outside the space
    if parameter is not None and parameter.log:
        value, low, high = math.log(value), math.log(low), math.log(high)
    share = (value - low) / (high - low)
    return "lower" if share <= EDGE else "upper" if share >= 1 - EDGE else None


def _by_state(trials: Sequence[FrozenTrial], definition: Definition) -> list[str]:
    states = Counter(trial.state for trial in trials)
    sentences = []
    if states[TrialState.PRUNED]:
        sentences.append(
            f"Pruned: {many(states[TrialState.PRUNED], 'trial')} of {len(trials)}. It is not known what accuracy they "
            "would have reached."
        )
    failed = [attributes.failure(trial.user_attrs.get("failure")) for trial in trials if trial.state == TrialState.FAIL]
    # That trial was not run, because every point has been.
    failed = [failure for failure in failed if failure["kind"] != "exhausted"]
    if failed:
        kinds = Counter(failure["kind"] for failure in failed)
        why = ", ".join(f"{kind} {count}" for kind, count in kinds.most_common())
        sentences.append(f"Failed: {many(len(failed), 'trial')} ({why}). That part of the space was not measured.")
    left = states[TrialState.RUNNING] + states[TrialState.WAITING]
    if left:
        sentences.append(f"Still running or waiting: {many(left, 'trial')}. The result may change.")
    imported = sum(bool(trial.user_attrs.get("imported")) for trial in trials)
    if imported:
        sentences.append(f"Imported, not run here: {many(imported, 'trial')}. Their results were not checked.")
    complete = ranked(trials)
    keys = [key_of(trial.params) for trial in complete]
    once = not keys or keys.count(keys[0]) == 1
    # A confirmation's points have a seed in them.
    if once and definition.budget.repeats == 1 and definition.confirm is None:
        sentences.append("The best configuration was trained once, with one seed: another seed gives other numbers.")
    return sentences


def _influences(trials: Sequence[FrozenTrial], definition: Definition) -> list[str]:
    """What made the difference: shares only if they are more than chance, and the plain facts."""
    sentences = []
    if len(definition.space) > 1:
        if importance.is_significant(trials):
            (first, largest), *others = importance.importances(trials).items()
            text = "".join(f", {name} {share:.0%}" for name, share in others)
            sentences.append(
                f"The hyperparameter that matters most is {first}: it explains {largest:.0%} of the ranking by "
                f"itself{text}."
            )
        else:
            sentences.append("These trials do not show which hyperparameter matters most: chance could give as much.")
    return [*sentences, *_of_the_best(trials, definition), *_alike(trials, definition), *_groups(trials, definition)]


def _of_the_best(trials: Sequence[FrozenTrial], definition: Definition) -> list[str]:
    """Which values the best trials have in common."""
    best = ranked(trials)[:BEST]
    # The best of what was measured: trials that wait, run or failed are not among those that they were better than.
    if len(best) < BEST or sum(map(_counts, trials)) < 2 * BEST:
        return []
    sentences = []
    for name, parameter in definition.space.items():
        values = [trial.params[name] for trial in best if name in trial.params]
        if len(values) < BEST:
            continue
        counted = Counter(map(value_text, values))
        if len(counted) == 1:
            sentences.append(f"All {BEST} best have {name} {value_text(values[0])}.")
        elif isinstance(parameter, Choice):
            parts = ", ".join(f"{count} have {name} {value}" for value, count in counted.most_common())
            sentences.append(f"Of the {BEST} best, {parts}.")
        else:
            low, high = value_text(min(values)), value_text(max(values))
            sentences.append(f"The {BEST} best have {name} from {low} to {high}; searched: {range_text(parameter)}.")
    return sentences


def _alike(trials: Sequence[FrozenTrial], definition: Definition) -> list[str]:
    """For each hyperparameter the largest group of trials that differ in nothing else."""
    ended = [trial for trial in trials if _counts(trial)]
    sentences = []
    for name in definition.space:
        groups: dict[str, dict[str, FrozenTrial]] = {}
        for trial in ended:
            if name in trial.params:
                rest = {other: value for other, value in trial.params.items() if other != name}
                groups.setdefault(params_text(rest), {}).setdefault(value_text(trial.params[name]), trial)
        rest_text, largest = max(groups.items(), key=lambda item: len(item[1]), default=("", {}))
        if len(largest) < 2 or not rest_text:
            continue
        order = sorted(largest.items(), key=lambda item: -_reached(item[1]))[:8]
        parts = ", ".join(f"{name} {value} has {_reached_text(trial)}" for value, trial in order)
        sentences.append(f"With the same {rest_text}: {parts}.")
    return sentences


def _counts(trial: FrozenTrial) -> bool:
    return is_feasible(trial) and (is_scored(trial) or trial.state == TrialState.PRUNED)


def _reached(trial: FrozenTrial) -> float:
    if is_scored(trial):
        return float(trial.values[0])
    mean = attributes.mean_of_repeats(trial)
    if mean is not None:
        return mean
    return max((value for value in trial.intermediate_values.values() if math.isfinite(value)), default=0.0)


def _reached_text(trial: FrozenTrial) -> str:
    pruned = f" (pruned after {attributes.last_step_text(trial)})" if trial.state == TrialState.PRUNED else ""
    return f"{_reached(trial):.4f}{pruned}"


def _groups(trials: Sequence[FrozenTrial], definition: Definition) -> list[str]:
    """For each hyperparameter with choices, the best accuracy of each choice, pruned trials counted."""
    sentences = []
    ended = [trial for trial in trials if _counts(trial)]
    for name, parameter in definition.space.items():
        if not isinstance(parameter, Choice) or len(parameter.choices) < 2:
            continue
        groups: dict[str, list[FrozenTrial]] = {}
        for trial in ended:
            if name in trial.params:
                groups.setdefault(value_text(trial.params[name]), []).append(trial)
        if len(groups) > 1:
            best = sorted(groups.items(), key=lambda item: -max(map(_reached, item[1])))
            sentences.append(f"The best accuracy by {name}: {', '.join(_group(*item) for item in best)}.")
    return sentences


def _group(value: str, trials: Sequence[FrozenTrial]) -> str:
    pruned = sum(trial.state == TrialState.PRUNED for trial in trials)
    counts = f"{len(trials) - pruned} complete" + (f", {pruned} pruned" if pruned else "")
    return f"{max(map(_reached, trials)):.4f} for {value} ({counts})"


def params_text(point: Mapping[str, Any]) -> str:
    """Hyperparameters on one line."""
    return ", ".join(f"{name} {value_text(value)}" for name, value in point.items())


def value_text(value: Any) -> str:
    """A hyperparameter's value; floats have four digits."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.4g}" if isinstance(value, float) else str(value)
