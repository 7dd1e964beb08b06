"""Samplers and pruners: the points of trial n depend on (seed, n) and on the finished trials."""

import importlib.util
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import optuna
import pytest
from conftest import TRIVIAL
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from scipy.stats import qmc

from search.attempt import StudyHandle
from search.proposal import SpaceExhausted, _taken, hyperparameters_of
from storage import claims, database, ledger, trial_cache
from storage.claims import Claim
from storage.errors import ClaimLost
from storage.owners import Owner
from storage.trial_cache import TrialCache
from studies import additions, registry, sampling
from studies.definition import Definition, parse
from studies.errors import DefinitionError
from studies.imported import import_trials
from studies.space import Point, broken_rule, key_of

NO_TORCH = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="Optuna's GPSampler needs PyTorch, which is not installed"
)
DRAWING = ["tpe", pytest.param("gp", marks=NO_TORCH), "random", "qmc", "cmaes", "nsga2"]
DATA = {"fingerprint": "0" * 16}

# Two numbers and a switch that always apply, and two rates of which a trial has one or none.
CONDITIONAL = """
name = "sampled"
dataset = "digits"
model = "convnet"

[budget]
trials = {trials}
epochs = {epochs}

[space]
depth = {{ choices = [3, 5, 7] }}
learning_rate = {{ low = 1e-4, high = 1e-2, log = true }}
width = {{ low = 0.5, high = 2.0 }}
conv_dropout = {{ low = 0.0, high = 0.7, when = {{ depth = [5, 7] }} }}
dense_dropout = {{ low = 0.0, high = 0.7, when = {{ depth = 3 }} }}

[sampler]
kind = "{sampler}"
seed = {seed}

[pruner]
kind = "{pruner}"
min_epochs = {min_epochs}
"""

PLAIN = CONDITIONAL.partition("conv_dropout")[0] + "\n[sampler]" + CONDITIONAL.partition("[sampler]")[2]


def _definition(
    text: str = CONDITIONAL,
    *,
    sampler: str = "random",
    seed: int = 0,
    pruner: str = "none",
    trials: int = 24,
    epochs: int = 9,
    min_epochs: int = 1,
) -> Definition:
    return parse(
        text.format(sampler=sampler, seed=seed, pruner=pruner, trials=trials, epochs=epochs, min_epochs=min_epochs)
    )


class Searched:
    """A study on SQLite, whose trials are drawn as a worker draws them, and never trained."""

    def __init__(self, storage: RDBStorage, definition: Definition, me: Owner) -> None:
        registry.create(definition, storage, DATA)
        self.storage, self.me = storage, me
        self.study = StudyHandle(
            study=registry.find(definition.name, storage),
            definition=definition,
            storage=storage,
            cached=TrialCache(storage),
        )

    def claim(self) -> Claim:
        claim = claims.claim(self.storage, self.study.study, self.me, grace_seconds=600)
        assert claim is not None
        return claim

    def suggest(self, claim: Claim) -> Point:
        return hyperparameters_of(self.study.definition, self.study.storage, self.study.opened(claim), claim)

    def finish(self, claim: Claim, value: float, state: TrialState = TrialState.COMPLETE) -> None:
        claims.finish(self.storage, claim, state, value, {})

    def draw(self, trials: int, value: float | None = 0.5) -> list[Point]:
        """The points of so many more trials, each finished with `value` before the next; with None it keeps running."""
        points = []
        for _ in range(trials):
            claim = self.claim()
            points.append(self.suggest(claim))
            if value is not None:
                self.finish(claim, value)
        return points


@pytest.fixture
def searched(tmp_path: Path, sqlite_template: Path, me: Owner) -> Iterable[Any]:
    """Makes studies, each in a database of its own."""
    made: list[RDBStorage] = []

    def make(definition: Definition) -> Searched:
        path = shutil.copy(sqlite_template, tmp_path / f"{len(made)}.db")
        made.append(database.connect(f"sqlite:///{path}"))
        return Searched(made[-1], definition, me)

    yield make
    for storage in made:
        storage.engine.dispose()


def _key(point: Point) -> tuple[Any, ...]:
    return tuple(sorted(point.items()))


# --- samplers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DRAWING)
def test_a_sampler_proposes_valid_points_before_and_after_it_has_results(searched: Any, kind: str) -> None:
    study = searched(_definition(sampler=kind))
    space = study.study.definition.space
    for number in range(16):
        claim = study.claim()
        point = study.suggest(claim)
        assert {name: broken_rule(space[name], value) for name, value in point.items()} == dict.fromkeys(point)
        assert set(point) == {name for name, parameter in space.items() if parameter.applies(point)}
        stored = study.storage.get_trial(claim.trial_id)
        assert stored.params == point
        assert stored.number == number
        study.finish(claim, number % 5 / 5)


@pytest.mark.parametrize(
    ("kind", "points"),
    [("grid", ""), ("points", "[[points]]\ndepth = 5\nwidth = 0.5\n[[points]]\ndepth = 3\nwidth = 1.5")],
)
def test_a_grid_and_a_list_of_points_are_tried_in_their_order(searched: Any, kind: str, points: str) -> None:
    definition = parse(
        'name = "listed"\ndataset = "digits"\nmodel = "convnet"\n[space]\ndepth = { choices = [3, 5] }\n'
        f'width = {{ low = 0.5, high = 2.0, step = 0.5 }}\n[sampler]\nkind = "{kind}"\n{points}'
    )
    study = searched(definition)
    assert study.draw(definition.trials) == definition.queue()
    assert claims.claim(study.storage, ledger.find(study.storage, "listed"), study.me, grace_seconds=600) is None


@pytest.mark.parametrize("kind", DRAWING)
def test_trials_that_run_at_once_never_draw_the_same_points(searched: Any, kind: str) -> None:
    points = searched(_definition(PLAIN, sampler=kind)).draw(8, value=None)
    for name in ("learning_rate", "width"):
        assert len({point[name] for point in points}) == 8


@pytest.mark.parametrize("kind", DRAWING)
def test_the_points_of_the_start_are_not_repeated_by_a_restart(searched: Any, kind: str, me: Owner) -> None:
    study = searched(_definition(PLAIN, sampler=kind))
    before = study.draw(4, value=None)
    again = Searched(study.storage, study.study.definition, me)
    after = again.draw(4, value=None)
    assert len({_key(point) for point in before + after}) == 8


@pytest.mark.parametrize("kind", DRAWING)
def test_the_same_seed_and_number_draw_the_same(searched: Any, kind: str) -> None:
    one, other = (searched(_definition(sampler=kind, seed=7)).draw(12) for _ in range(2))
    assert one == other


@pytest.mark.parametrize("kind", DRAWING)
def test_two_seeds_draw_differently_from_the_first_trial_on(searched: Any, kind: str) -> None:
    one, other = (searched(_definition(PLAIN, sampler=kind, seed=seed)).draw(3, value=None) for seed in (0, 1))
    assert all(mine["width"] != theirs["width"] for mine, theirs in zip(one, other, strict=True))


def test_seeds_of_trials_and_purposes_are_all_different() -> None:
    definitions = [_definition(seed=seed) for seed in (0, 1, 2**32 - 1)]
    seeds = [
        sampling.seed_of(definition, number, purpose)
        for definition in definitions
        for number in range(200)
        for purpose in (0, 1)
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**32 for seed in seeds)


@pytest.mark.parametrize("kind", DRAWING)
def test_an_interrupted_trial_runs_again_with_its_own_points(searched: Any, kind: str) -> None:
    study = searched(_definition(sampler=kind))
    study.draw(3)
    claim = study.claim()
    point = study.suggest(claim)
    claims.requeue(study.storage, claim, "interrupted", "a test")
    # Results that were stored meanwhile must not change it.
    claim = study.claim()
    assert claim.attempt == 2
    study.draw(8, value=0.9)
    assert study.suggest(claim) == point


def test_a_trial_that_died_between_two_suggestions_keeps_the_first(searched: Any) -> None:
    study = searched(_definition(PLAIN))
    claim = study.claim()
    trial = optuna.Trial(study.study.opened(claim), claim.trial_id)
    first = trial.suggest_categorical("depth", (3, 5, 7))
    claims.requeue(study.storage, claim, "crashed", "a test")
    point = study.suggest(study.claim())
    assert point["depth"] == first
    assert set(point) == {"depth", "learning_rate", "width"}


def _rate_of(point: Point) -> float:
    return float(point.get("dense_dropout", point.get("conv_dropout")))


def _value(point: Point) -> float:
    """Best at depth 3 and a rate of 0.1."""
    return (1.0 if point["depth"] == 3 else 0.5) - abs(_rate_of(point) - 0.1)


def _taught(study: Searched, trials: int) -> list[Point]:
    points = []
    for _ in range(trials):
        claim = study.claim()
        points.append(study.suggest(claim))
        study.finish(claim, _value(points[-1]))
    return points


def test_tpe_learns_on_a_conditional_space_and_suggests_only_what_applies(searched: Any) -> None:
    study = searched(_definition(sampler="tpe", trials=40))
    space = study.study.definition.space
    points = _taught(study, 40)
    for point in points:
        assert set(point) == {name for name, parameter in space.items() if parameter.applies(point)}
    first, last = points[:10], points[-20:]
    assert _mean(map(_value, last)) > _mean(map(_value, first)) + 0.2
    # At random it would be a third of them, with a mean rate of 0.35.
    assert sum(point["depth"] == 3 for point in last) >= 14
    assert _mean(map(_rate_of, last)) < 0.25


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


@pytest.mark.parametrize(
    ("kind", "learns"),
    [("tpe", True), pytest.param("gp", True, marks=NO_TORCH), ("cmaes", True), ("random", False), ("qmc", False)],
)
def test_results_change_what_is_drawn_only_where_the_sampler_learns(searched: Any, kind: str, learns: bool) -> None:
    good, bad = (searched(_definition(PLAIN, sampler=kind)) for _ in range(2))
    for study, sign in ((good, 1.0), (bad, -1.0)):
        for _ in range(12):
            claim = study.claim()
            study.finish(claim, sign * study.suggest(claim)["width"])
    assert (good.draw(1) != bad.draw(1)) == learns


def test_the_sampler_also_learns_from_pruned_trials(searched: Any) -> None:
    means = []
    for worst in (True, False):
        study = searched(_definition(PLAIN, sampler="tpe"))
        for _ in range(16):
            claim = study.claim()
            width = study.suggest(claim)["width"]
            claims.record_epochs(study.storage, claim, {1: width})
            pruned = worst and width < 1.25
            study.finish(claim, width, TrialState.PRUNED if pruned else TrialState.COMPLETE)
        means.append(_mean(point["width"] for point in study.draw(4, value=None)))
    assert min(means) > 1.25


class TestQMC:
    """Trial n takes point n of one sequence."""

    def test_the_points_are_sobols(self, searched: Any) -> None:
        definition = parse(
            'name = "sobol"\ndataset = "digits"\nmodel = "convnet"\n[budget]\ntrials = 16\n[space]\n'
            "dropout = { low = 0.0, high = 0.5 }\nwidth = { low = 0.5, high = 2.5 }\n[fixed]\ndepth = 3\n"
            '[sampler]\nkind = "qmc"\nseed = 3'
        )
        points = searched(definition).draw(16)
        sobol = qmc.Sobol(2, seed=3, scramble=True).random(16)
        assert [point["dropout"] for point in points] == pytest.approx([0.5 * x for x, _ in sobol])
        assert [point["width"] for point in points] == pytest.approx([0.5 + 2 * y for _, y in sobol])

    def test_the_order_in_which_trials_ask_does_not_matter(self, searched: Any) -> None:
        straight = searched(_definition(PLAIN, sampler="qmc")).draw(16)
        study = searched(_definition(PLAIN, sampler="qmc"))
        claimed = [study.claim() for _ in range(16)]
        asked = {claim.number: study.suggest(claim) for claim in reversed(claimed)}
        assert [asked[number] for number in range(16)] == straight
        assert len({point["width"] for point in straight}) == 16

    def test_queued_points_take_none_of_the_sequence_from_others(self, searched: Any) -> None:
        free = searched(_definition(PLAIN, sampler="qmc")).draw(6)
        point = "[[points]]\ndepth = 3\nlearning_rate = 1e-3\nwidth = 1.0\n"
        queued = searched(_definition(PLAIN + point, sampler="qmc")).draw(6)
        assert queued[0] == {"depth": 3, "learning_rate": 1e-3, "width": 1.0}
        assert queued[1:] == free[1:]

    def test_what_applies_only_sometimes_is_of_the_sequence_too(self, searched: Any) -> None:
        points = searched(_definition(sampler="qmc", trials=32)).draw(32, value=None)
        # 32 points of a Sobol sequence lie 4 to an eighth, in every coordinate.
        eighths = sorted(int((point["width"] - 0.5) / 1.5 * 8) for point in points)
        assert eighths == sorted(list(range(8)) * 4)
        assert {frozenset(point) for point in points} == {
            frozenset({"depth", "learning_rate", "width", "conv_dropout"}),
            frozenset({"depth", "learning_rate", "width", "dense_dropout"}),
        }


@pytest.mark.parametrize(("trials", "population"), [(1, 4), (12, 4), (40, 10), (200, 50), (5000, 50)])
def test_a_generation_is_a_fraction_of_a_small_study(trials: int, population: int) -> None:
    assert sampling.sampler(_definition(sampler="nsga2", trials=trials), 0).population_size == population  # type: ignore[attr-defined]


def test_a_sampler_whose_package_is_missing_is_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DefinitionError, match=r"needs PyTorch.*pip install 'trialyard\[gp\]'.*choose tpe"):
        sampling.check_installed(_definition(PLAIN, sampler="gp"))
    sampling.check_installed(_definition(PLAIN, sampler="tpe"))


@pytest.mark.parametrize("kind", DRAWING)
def test_a_sampler_proposes_the_same_where_many_run(searched: Any, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Many running trials are read in brief: all that a sampler of ours asks for is there."""
    found = []
    for few in (1000, 0):
        monkeypatch.setattr(trial_cache, "FEW", few)
        monkeypatch.setattr(trial_cache, "SECONDS_EACH", 0.0)
        study = searched(_definition(PLAIN, sampler=kind, trials=40))
        points = study.draw(12, value=0.5)
        for value in (0.2, 0.9):
            claim = study.claim()
            points.append(study.suggest(claim))
            claims.record_epochs(study.storage, claim, {1: value})
        found.append([*points, *study.draw(4, value=None), *study.draw(2, value=0.7), *study.draw(1)])
    assert found[0] == found[1]


# --- pruners ----------------------------------------------------------------------------------------------


def _trained(study: Searched, values: list[float]) -> int | None:
    """Reports `values`, one per epoch, and ends the trial. Returns the epoch after which it was pruned, if it was."""
    claim = study.claim()
    opened = study.study.opened(claim)
    hyperparameters_of(study.study.definition, study.study.storage, opened, claim)
    for epoch, value in enumerate(values, start=1):
        claims.record_epochs(study.storage, claim, {epoch: value})
        # As `search.attempt` asks: not after the last epoch.
        if epoch < len(values) and opened.pruner.prune(opened, study.storage.get_trial(claim.trial_id)):
            study.finish(claim, value, TrialState.PRUNED)
            return epoch
    study.finish(claim, max(values))
    return None


GOOD, BAD = 0.9, 0.1
PRUNERS = ["hyperband", "asha", "median"]


@pytest.mark.parametrize("min_epochs", [1, 3])
@pytest.mark.parametrize("kind", PRUNERS)
def test_a_weak_trial_is_pruned_but_not_before_min_epochs(searched: Any, kind: str, min_epochs: int) -> None:
    study = searched(_definition(PLAIN, pruner=kind, epochs=10, min_epochs=min_epochs))
    assert [_trained(study, [GOOD] * 10) for _ in range(5)] == [None] * 5
    # Hyperband judges trials of its later brackets later.
    ends = [_trained(study, [BAD] * 10) for _ in range(3)]
    assert all(end is not None and min_epochs <= end < 10 for end in ends), ends
    if kind in ("asha", "median"):
        assert ends == [min_epochs] * 3


@pytest.mark.parametrize("kind", PRUNERS)
def test_the_best_trial_so_far_is_never_pruned(searched: Any, kind: str) -> None:
    study = searched(_definition(PLAIN, pruner=kind, epochs=5))
    assert [_trained(study, [value / 10] * 5) for value in range(1, 8)] == [None] * 7


def test_asha_lets_the_better_half_go_on_whenever_the_epochs_have_doubled(searched: Any) -> None:
    study = searched(_definition(PLAIN, pruner="asha", epochs=6))
    assert [_trained(study, [value] * 6) for value in (0.5, 0.6, 0.7)] == [None] * 3
    assert _trained(study, [0.65] * 6) is None  # the second of four
    assert _trained(study, [0.55] * 6) == 1
    assert _trained(study, [0.8] * 3 + [0.6] * 3) == 4


REPEATED = PLAIN.replace("epochs = {epochs}", "epochs = {epochs}\nrepeats = 8")


def test_wilcoxon_ends_a_configuration_whose_repeats_are_worse(searched: Any) -> None:
    study = searched(_definition(REPEATED, pruner="wilcoxon"))
    luck = [0.01, -0.02, 0.015, 0.0, -0.01, 0.02, -0.005, 0.003]  # of each seed, the same for all configurations
    assert _trained(study, [0.9 + each for each in luck]) is None
    assert _trained(study, [0.85 + each for each in luck]) == 4
    assert _trained(study, [0.92 + each for each in luck]) is None
    # Better in every second repeat: it is not known to be worse.
    assert _trained(study, [0.92 + each + (0.01 if at % 2 else -0.01) for at, each in enumerate(luck)]) is None


@pytest.mark.parametrize("kind", PRUNERS)
def test_a_pruner_decides_the_same_where_many_run(searched: Any, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """As above: successive halving compares a trial with those that run, too."""
    found = []
    for few in (1000, 0):
        monkeypatch.setattr(trial_cache, "FEW", few)
        monkeypatch.setattr(trial_cache, "SECONDS_EACH", 0.0)
        study = searched(_definition(PLAIN, pruner=kind, epochs=9))
        for value in (0.4, 0.45, 0.5, 0.55, 0.6, 0.65):
            _trained(study, [value] * 9)
        running = [study.claim() for _ in range(6)]
        for claim in running:
            study.suggest(claim)
        opened, decisions = [study.study.opened(claim) for claim in running], []
        for epoch in range(1, 9):
            for index, claim in enumerate(running):
                claims.record_epochs(study.storage, claim, {epoch: 0.8 - 0.1 * index + 0.01 * epoch})
                trial = study.storage.get_trial(claim.trial_id)
                decisions.append(opened[index].pruner.prune(opened[index], trial))
        found.append(decisions)
        assert any(decisions)
        assert not all(decisions)
    assert found[0] == found[1]


def test_without_a_pruner_nothing_is_pruned(searched: Any) -> None:
    study = searched(_definition(PLAIN, pruner="none", epochs=4))
    for values in [[GOOD] * 4] * 6 + [[BAD] * 4, [0.0] * 4]:
        assert _trained(study, values) is None


@pytest.mark.parametrize("kind", [*PRUNERS, "none"])
def test_min_epochs_above_the_budget_prune_nothing(searched: Any, kind: str) -> None:
    study = searched(_definition(PLAIN, pruner=kind, epochs=3, min_epochs=50))
    assert [_trained(study, [value] * 3) for value in [GOOD] * 5 + [BAD] * 2] == [None] * 7


@pytest.mark.parametrize("kind", [*PRUNERS, "none"])
def test_a_pruner_can_be_made_for_one_epoch(searched: Any, kind: str) -> None:
    study = searched(_definition(PLAIN, pruner=kind, epochs=1))
    assert [_trained(study, [value]) for value in (GOOD, BAD)] == [None, None]


def test_a_bad_start_before_min_epochs_is_not_pruned(searched: Any) -> None:
    for kind in ("asha", "median"):
        study = searched(_definition(PLAIN, pruner=kind, epochs=6, min_epochs=4))
        assert [_trained(study, [GOOD] * 6) for _ in range(5)] == [None] * 5
        assert _trained(study, [BAD] * 3 + [0.95] * 3) is None


def test_optuna_reads_what_is_suggested_and_reported(searched: Any) -> None:
    study = searched(_definition(PLAIN))
    _trained(study, [0.1, 0.2, 0.3])
    plain = optuna.load_study(study_name="sampled", storage=str(study.storage.engine.url))
    (trial,) = plain.trials
    assert isinstance(trial, FrozenTrial)
    assert (trial.state, trial.value) == (TrialState.COMPLETE, 0.3)
    assert trial.intermediate_values == {1: 0.1, 2: 0.2, 3: 0.3}


@pytest.mark.parametrize(("trials", "drawn"), [(1, 2), (12, 5), (24, 9), (30, 10), (500, 10)])
def test_tpe_draws_a_share_of_the_budget_at_random_before_it_learns(trials: int, drawn: int) -> None:
    sampler = sampling.sampler(parse(TRIVIAL, trials=trials), number=0)
    assert sampler._n_startup_trials == drawn  # type: ignore[attr-defined]


# --- no point twice ----------------------------------------------------------------------------------------

DISCRETE = (
    PLAIN.partition("[space]")[0]
    + """[space]
depth = {{ choices = [3, 5] }}
dropout = {{ low = 0.0, high = 0.2, step = 0.1 }}

[sampler]"""
    + CONDITIONAL.partition("[sampler]")[2]
)


@pytest.mark.parametrize("kind", ["random", "tpe", "qmc", "nsga2"])
def test_in_a_discrete_space_no_point_is_tried_twice(searched: Any, kind: str) -> None:
    study = searched(_definition(DISCRETE, sampler=kind, trials=50))
    assert study.study.study.budget.trials == 6
    points = [json.dumps(point, sort_keys=True) for point in study.draw(6)]
    assert len(set(points)) == 6
    assert claims.claim(study.storage, study.study.study, study.me, grace_seconds=600) is None


def test_points_that_run_or_wait_are_not_proposed(searched: Any) -> None:
    listed = "[[points]]\ndepth = 3\ndropout = 0.1\n"
    study = searched(_definition(DISCRETE + listed, sampler="random", trials=6))
    points = [json.dumps(point, sort_keys=True) for point in study.draw(6, None)]
    assert json.loads(points[0]) == {"depth": 3, "dropout": 0.1}
    assert len(set(points)) == 6


def test_a_listed_point_is_taken_before_its_trial_has_begun(searched: Any) -> None:
    """Another worker may have claimed that trial since this one has looked."""
    listed = "[[points]]\ndepth = 3\ndropout = 0.1\n"
    study = searched(_definition(DISCRETE + listed, sampler="random", trials=6))
    study.claim()
    claim, space = study.claim(), study.study.definition.space

    def begin(point: Point) -> None:
        params = {name: (space[name].distribution(), value) for name, value in point.items()}
        claims.begin(study.storage, claim, params, unique=True)

    with pytest.raises(claims.PointTaken):
        begin({"depth": 3, "dropout": 0.1})
    begin({"depth": 5, "dropout": 0.1})


def test_a_trial_that_goes_back_before_it_has_its_point_is_lost_and_the_worker_goes_on(searched: Any) -> None:
    study = searched(_definition(DISCRETE, sampler="random", trials=6))
    claim = study.claim()
    opened = study.study.opened(claim)
    claims.requeue(study.storage, claim, "interrupted", "as if it had been taken back")
    with pytest.raises(ClaimLost):
        hyperparameters_of(study.study.definition, study.study.storage, opened, claim)


@pytest.mark.parametrize(("given", "slots"), [({}, 6), ({"depth": 3}, 3)])
def test_two_slots_at_once_never_have_one_point(searched: Any, given: Point, slots: int) -> None:
    """Both read the trials before either has recorded its point."""
    study = searched(_definition(DISCRETE, sampler="random", trials=6))
    for _ in range(slots) if given else ():
        registry.open("sampled", study.storage).enqueue_trial(given)
    claimed = [study.claim() for _ in range(slots)]
    opened = [study.study.opened(claim) for claim in claimed]
    for each in opened:  # as one read them at the same moment
        trials = each.get_trials(deepcopy=True)
        each.get_trials = lambda *_, trials=trials, **__: trials
    points = [
        hyperparameters_of(study.study.definition, study.study.storage, each, claim)
        for each, claim in zip(opened, claimed, strict=True)
    ]
    assert len({json.dumps(point, sort_keys=True) for point in points}) == slots
    assert all(given.items() <= point.items() for point in points)


CONDITIONAL_DISCRETE = DISCRETE.replace("step = 0.1", "step = 0.1, when = {{ depth = 3 }}")


@pytest.mark.parametrize("text", [DISCRETE, CONDITIONAL_DISCRETE])
@pytest.mark.parametrize("kind", ["random", "tpe", "qmc", "nsga2"])
def test_a_trial_that_was_added_with_some_hyperparameters_keeps_them_in_a_point_of_its_own(
    searched: Any, kind: str, text: str
) -> None:
    study = searched(_definition(text, sampler=kind, trials=6))
    points = []
    for _ in range(3):
        additions.enqueue("sampled", {"depth": 3}, study.storage)
        points += study.draw(1)
    assert [point["depth"] for point in points] == [3, 3, 3]
    assert sorted(point["dropout"] for point in points) == pytest.approx([0.0, 0.1, 0.2])
    # No other point has depth 3. A person asks for it all the same, and the study goes on.
    additions.enqueue("sampled", {"depth": 3}, study.storage)
    (again,) = study.draw(1)
    assert key_of(again) in map(key_of, points)
    rest = study.draw(study.study.definition.size - 4)
    assert all(point["depth"] == 5 for point in rest)


@pytest.mark.parametrize(
    ("text", "given"), [(DISCRETE, {"depth": 3, "dropout": 0.1}), (CONDITIONAL_DISCRETE, {"depth": 5})]
)
def test_a_trial_that_was_added_with_all_hyperparameters_keeps_them_though_another_has_them(
    searched: Any, text: str, given: Point
) -> None:
    study = searched(_definition(text, sampler="random", trials=4))
    for _ in range(2):
        registry.open("sampled", study.storage).enqueue_trial(given)
    assert study.draw(2) == [given, given]


def test_a_trial_that_waits_again_keeps_its_point_from_others(searched: Any) -> None:
    study = searched(_definition(DISCRETE, sampler="random", trials=6))
    first = study.claim()
    point = study.suggest(first)
    second = study.claim()
    claims.requeue(study.storage, first, "interrupted", "a signal")
    assert json.dumps(point, sort_keys=True) not in {json.dumps(study.suggest(second), sort_keys=True)}
    assert _taken(study.storage, study.study.opened(second), second) == {key_of(point)}


def test_a_space_that_others_have_used_up_ends_the_study_with_a_sentence(searched: Any) -> None:
    study = searched(_definition(DISCRETE, sampler="random", trials=6))
    rows = [{"depth": depth, "dropout": rate, "accuracy": 0.9} for depth in (3, 5) for rate in (0.0, 0.1, 0.2)]
    import_trials(study.study.study.name, rows, study.storage)
    claim = study.claim()
    with pytest.raises(SpaceExhausted, match="all 6 combinations of the space have a trial"):
        study.suggest(claim)


def test_a_trial_that_begins_again_keeps_its_point(searched: Any) -> None:
    study = searched(_definition(DISCRETE, sampler="random", trials=6))
    claim = study.claim()
    point = study.suggest(claim)
    claims.requeue(study.storage, claim, "interrupted", "a signal")
    again = study.claim()
    assert (again.number, again.attempt) == (0, 2)
    assert study.suggest(again) == point


@pytest.mark.parametrize("sampler", DRAWING)
def test_samplers_leave_out_trials_of_another_space(
    searched: Any, sampler: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Plain Optuna may have added results with other choices, or another kind of range."""
    study = searched(_definition(PLAIN, sampler=sampler, trials=24))
    foreign = {
        "depth": optuna.distributions.CategoricalDistribution([3, 9]),
        "learning_rate": optuna.distributions.CategoricalDistribution(["low", "high"]),
        "width": optuna.distributions.IntDistribution(1, 9),
    }
    opened = registry.open("sampled", study.storage)
    for _ in range(12):  # more than any sampler draws at random first
        opened.add_trial(
            optuna.trial.create_trial(
                params={"depth": 3, "learning_rate": "low", "width": 7}, distributions=foreign, value=0.9
            )
        )
    points = study.draw(4)
    assert all(
        broken_rule(study.study.definition.space[name], point[name]) is None for point in points for name in point
    )
    assert len({_key(point) for point in points}) == 4
    assert caplog.text.count("samplers leave out trial 3, which another program added") <= 1
