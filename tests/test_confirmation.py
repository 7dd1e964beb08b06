"""The best configurations are trained again from several seeds, and judged by test images that nobody chose by."""

import contextlib
import shutil
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import optuna
import pytest
from conftest import SMALL, TRIVIAL, Command, ended
from optuna.distributions import FloatDistribution
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from sklearn.datasets import load_digits

import search
import studies
from storage import claims, database, hits, ledger, openings, promises
from storage.owners import Owner
from storage.transactions import PatientStorage, read
from studies import confirmation, registry, text
from studies import definition as definitions
from studies.confirmation import Confirmed, Run
from studies.definition import Candidate, parse
from studies.errors import StudyError

# Test arrays that leave a line for each time they are read, and cannot be read at all while a search runs.
WATCHED = """
import os
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits


class Watched:
    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        assert not Path("forbidden").exists(), "a test array was read"
        with open("reads", "a") as file:
            file.write(f"{os.getpid()}\\n")
        return self.array


def load():
    images, labels = load_digits(return_X_y=True)
    images = np.rint(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    return (images[:300], labels[:300]), (Watched(images[300:400]), Watched(labels[300:400]))
"""
SEEDS = 2


@dataclass(frozen=True)
class Done:
    """A folder where a study was searched and confirmed, and what the commands printed."""

    folder: Path
    out: str
    reads: int  # of the test images and of their labels

    @property
    def url(self) -> str:
        return f"sqlite:///{self.folder}/yard/studies.db"


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, command: Callable[..., str]) -> Done:
    """Two candidates with two seeds each, after a search of three trials."""
    folder = tmp_path_factory.mktemp("confirmed")
    (folder / "watched.py").write_text(WATCHED, encoding="utf-8")
    definition = SMALL.format(trials=3, epochs=3).replace("small.npz", "watched:load")
    (folder / "small.toml").write_text(definition, encoding="utf-8")
    (folder / "forbidden").touch()
    command("run", "small.toml", folder=folder)
    (folder / "forbidden").unlink()
    assert not (folder / "reads").exists()
    out = command("confirm", "small", "--top", "2", "--seeds", str(SEEDS), folder=folder)
    return Done(folder=folder, out=out, reads=len((folder / "reads").read_text().splitlines()))


@pytest.fixture
def confirmed(done: Done, home: Path) -> Done:
    """A copy of that folder as the current one."""
    shutil.copytree(done.folder, home, dirs_exist_ok=True)
    return Done(folder=home, out=done.out, reads=done.reads)


def test_a_search_reads_no_test_image_and_a_confirmation_once_a_run(done: Done) -> None:
    # Two arrays. Trials with the same seed have the same split, so their data are loaded once.
    assert done.reads == 2 * SEEDS


def test_each_candidate_is_trained_from_the_same_seeds_and_splits(done: Done) -> None:
    storage = database.connect(done.url)
    trials = optuna.load_study(study_name="small-confirm", storage=storage).trials
    searched = studies.leaderboard("small", done.url)
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 4
    points = [(trial.params["seed"], trial.params["candidate"]) for trial in trials]
    assert points == [(seed, row.number) for seed in (1, 2) for row in searched[:2]]
    seeds = [trial.user_attrs["seed"] for trial in trials]
    assert seeds[0] == seeds[1] != seeds[2] == seeds[3]
    assert {trial.user_attrs["protocol"] for trial in trials} == {"confirmation"}
    best_epochs = {
        trial.number: trial.user_attrs["best_epoch"]
        for trial in optuna.load_study(study_name="small", storage=storage).trials
    }
    for trial in trials:
        assert trial.user_attrs["epochs"] == trial.user_attrs["best_epoch"] == best_epochs[trial.params["candidate"]]


def test_values_are_those_of_a_plain_evaluation_of_the_saved_models(done: Done) -> None:
    images, labels = load_digits(return_X_y=True)
    images = np.rint(images.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)[300:400]
    storage = database.connect(done.url)
    trials = optuna.load_study(study_name="small-confirm", storage=storage).trials
    measured = read(storage, lambda connection: hits.of_trials(connection, [trial._trial_id for trial in trials]))
    for trial in trials:
        model = keras.models.load_model(done.folder / "yard" / "artifacts" / trial.user_attrs["model"])
        model.compile(loss="sparse_categorical_crossentropy", metrics=["accuracy"])
        _, accuracy = model.evaluate(images, labels[300:400], verbose=0)
        assert trial.values == [pytest.approx(accuracy, abs=1e-6)]
        own = measured[trial._trial_id]
        assert (own.judged_on, own.images) == ("test", 100)
        assert (own.array() == (model.predict(images, verbose=0).argmax(axis=1) == labels[300:400])).all()
    assert len({own.fingerprint for own in measured.values()}) == 1


def test_the_hits_of_a_search_are_those_of_its_validation_images(done: Done) -> None:
    storage = database.connect(done.url)
    trials = optuna.load_study(study_name="small", storage=storage).trials
    measured = read(storage, lambda connection: hits.of_trials(connection, [trial._trial_id for trial in trials]))
    for trial in trials:
        own = measured[trial._trial_id]
        assert (own.judged_on, own.images) == ("validation", 60)
        assert own.array().mean() == pytest.approx(trial.values[0], abs=1e-6)
    assert len({own.fingerprint for own in measured.values()}) == 1


def test_the_result_is_the_same_in_python_json_report_note_and_terminal(confirmed: Done) -> None:
    found = studies.confirmed("small")
    assert (found.study, found.confirmation, found.seeds, found.openings) == ("small", "small-confirm", SEEDS, 1)
    assert (found.trained, found.trainings, found.images) == (4, 4, 100)
    assert found == studies.confirmed("small-confirm")
    first, second = found.estimates
    assert first.mean is not None
    assert second.mean is not None
    assert first.mean >= second.mean
    rows = {row.number: row for row in studies.leaderboard("small")}
    for each in found.estimates:
        assert each.searched == rows[each.trial].value
        assert each.hyperparameters == rows[each.trial].params
        assert each.parameters == rows[each.trial].parameters
        assert each.shrinkage == pytest.approx(rows[each.trial].value - np.mean(each.accuracies))
    (comparison,) = found.comparisons
    assert comparison.difference == pytest.approx(first.mean - second.mean)
    assert (comparison.p, comparison.p_holm, found.winner) == (None, None, None)
    assert set(found.tied) == {first.trial, second.trial}
    assert found.smallest in found.tied

    assert f"{first.mean:.4f}" in confirmed.out
    for words in (
        "No test is made: with 2 seeds",
        "A tie: these measurements",
        "No other confirmation that this",
    ):
        assert words in " ".join(confirmed.out.split())
    report = studies.report("small", format="markdown")
    assert "## Confirmed on the test images" in report
    assert text.confirmed(found) in report
    own = studies.report("small-confirm", format="markdown")
    assert "This study confirms small" in own
    assert "trained once, with one seed" not in own
    storage = database.connect(confirmed.url)
    stored = storage.get_study_system_attrs(registry.find("small", storage).id)
    note = "".join(value for key, value in sorted(stored.items()) if key.startswith("dashboard:note_str"))
    assert "### Confirmed on the test images" in note


@pytest.mark.long
def test_again_it_trains_nothing_and_another_number_of_seeds_opens_the_images_again(confirmed: Done) -> None:
    before = _rows(confirmed)
    assert search.confirm("small", top=2, seeds=SEEDS, listeners=[]) == studies.confirmed("small")
    assert _rows(confirmed) == before
    other = search.confirm("small", top=1, seeds=1, workers=1, listeners=[])
    assert (other.confirmation, other.trained, other.openings) == ("small-confirm-2", 1, 2)
    assert studies.confirmed("small") == other
    (estimate,) = other.estimates
    assert (estimate.of_mean, estimate.of_new_seed, other.tied, other.winner) == (None, None, (), None)
    # A seed's training is the same in every confirmation.
    first = next(each for each in studies.confirmed("small-confirm").estimates if each.trial == estimate.trial)
    assert estimate.accuracies == first.accuracies[:1]
    assert "opened by 2 confirmations" in text.confirmed(other)
    # Also when the confirmations are gone.
    studies.delete("small-confirm")
    studies.delete("small-confirm-2")
    with pytest.raises(StudyError, match="was not confirmed yet"):
        studies.confirmed("small")
    # Also when the study is gone, and the same images are searched and confirmed again.
    storage = database.connect(confirmed.url)
    fingerprint = registry.find("small", storage).data["fingerprint"]
    studies.delete("small")
    assert openings.count(storage, fingerprint) == 2


@pytest.mark.long
def test_again_it_trains_what_was_added_for_a_training_that_failed(confirmed: Done) -> None:
    before = {each.trial: each.accuracies for each in studies.confirmed("small").estimates}
    with contextlib.closing(sqlite3.connect(confirmed.folder / "yard" / "studies.db")) as connection, connection:
        connection.execute("UPDATE trials SET state = 'FAIL' WHERE trial_id = (SELECT max(trial_id) FROM trials)")
    assert studies.confirmed("small").trained == 3
    assert studies.retry("small-confirm") == [4]
    found = search.confirm("small", top=2, seeds=SEEDS, workers=1, listeners=[])
    assert (found.trained, found.trainings, found.openings) == (4, 4, 1)
    assert {each.trial: each.accuracies for each in found.estimates} == before


def test_studies_that_chose_by_the_test_images_are_named(confirmed: Done, write_npz: Callable[..., Path]) -> None:
    _make("shown", confirmed, write_npz)
    assert studies.confirmed("small").chosen_by == ("shown",)
    assert "These studies chose by the test images: shown." in text.confirmed(studies.confirmed("small"))


def test_a_confirmation_takes_no_name_of_another_program_s_study(confirmed: Done) -> None:
    storage = database.connect(confirmed.url)
    optuna.create_study(study_name="small-confirm-2", storage=confirmed.url)
    definition = confirmation.definition_of(registry.find("small", storage), storage, 1, 1)
    assert definition.name == "small-confirm-3"


def test_what_others_added_is_left_out(confirmed: Done) -> None:
    """Plain Optuna may add trials to any study, and results may be imported from anywhere."""
    before = studies.confirmed("small")
    storage = database.connect(confirmed.url)
    opened = optuna.load_study(study_name="small-confirm", storage=storage)
    kinds = opened.trials[0].distributions
    added = [({}, {}), ({"candidate": before.estimates[0].trial}, {"candidate": kinds["candidate"]})]
    for params, distributions in added:
        opened.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=1.0))
    found = studies.confirmed("small")
    assert [each.accuracies for each in found.estimates] == [each.accuracies for each in before.estimates]
    assert (found.trained, found.trainings) == (before.trained, before.trainings)
    with pytest.raises(StudyError, match="is a confirmation: its result must come from its own trainings"):
        studies.import_trials("small-confirm", [{"seed": 1, "candidate": 0, "accuracy": 1.0}])

    searched = optuna.load_study(study_name="small", storage=storage)
    dropout = searched.trials[0].distributions["dropout"]
    other = optuna.distributions.FloatDistribution(0.0, 1.0)
    for params, attributes in (
        ({"dropout": 0.11}, {"best_epoch": -2}),
        ({"dropout": 0.12, "a-b": 0.5}, {}),
        ({}, {}),
    ):
        kinds = {name: dropout if name == "dropout" else other for name in params}
        trial = optuna.trial.create_trial(params=params, distributions=kinds, value=1.0, user_attrs=attributes)
        searched.add_trial(trial)
    definition = confirmation.definition_of(registry.find("small", storage), storage, 2, 6)
    assert definition.confirm is not None
    first, second = definition.confirm.candidates
    assert (first.hyperparameters, first.epochs) == ({"dropout": 0.11}, 3)
    assert second.trial < 3


def test_a_configuration_that_was_tried_twice_is_one_candidate(storage: RDBStorage, study: str) -> None:
    """Optuna adds up the steps of a range; a person who repeats the trial writes the sum."""
    opened = registry.open(study, storage)
    kinds = {"dropout": FloatDistribution(0.0, 0.7)}
    for rate, value in ((0.1 + 0.2, 0.9), (0.3, 0.8), (0.4, 0.7)):
        opened.add_trial(optuna.trial.create_trial(params={"dropout": rate}, distributions=kinds, value=value))
    registry.stop(study, storage)
    definition = confirmation.definition_of(registry.find(study, storage), storage, None, 2)
    assert definition.confirm is not None
    assert [candidate.trial for candidate in definition.confirm.candidates] == [0, 2]


def test_a_confirmation_is_created_by_confirm_alone(confirmed: Done, start: Command) -> None:
    """Who wrote its definition into a file would open the test images uncounted."""
    definition = registry.definition_of("small-confirm", database.connect(confirmed.url))
    (confirmed.folder / "again.toml").write_text(definitions.to_toml(definition), encoding="utf-8")
    before = _rows(confirmed)
    for command in ("check", "create", "run"):
        out, err = ended(start(command, "again.toml"), code=1)
        assert (out, len(err.splitlines())) == ("", 1)
        assert "is the definition of a confirmation" in err
        assert "`trialyard confirm small` creates it" in err
    with pytest.raises(StudyError, match="is the definition of a confirmation"):
        search.create(definition, name="other")
    assert _rows(confirmed) == before


def test_a_candidate_without_any_result_is_never_recommended() -> None:
    runs = {0: {seed: Run(accuracy=0.9 + seed / 1000) for seed in range(8)}, 1: {}, 2: {0: Run(accuracy=0.5)}}
    found = confirmation.comparisons([0, 2], runs)
    assert [(each.other, each.seeds) for each in found] == [(2, 1)]
    assert confirmation.verdict([0, 2], found) == (None, (0, 2))
    assert confirmation.verdict([0], []) == (None, ())


def _result(trainings: dict[int, dict[int, int]]) -> Confirmed:
    """The result of a confirmation: for each candidate and seed how many of 200 test images were right."""
    runs: dict[int, dict[int, Run]] = {number: {} for number in trainings}
    for number, by_seed in trainings.items():
        for seed, right in by_seed.items():
            measured = hits.Hits.of(np.arange(200) < right, "test", "a")
            runs[number][seed] = Run(accuracy=right / 200, hits=measured)
    candidates = [Candidate(trial=number, epochs=1, hyperparameters={}) for number in runs]
    estimates = tuple(confirmation._estimate(each, runs[each.trial], None) for each in candidates)
    order = [each.trial for each in estimates if each.mean is not None]
    compared = confirmation.comparisons(order, runs)
    winner, tied = confirmation.verdict(order, compared)
    return Confirmed(
        study="small",
        confirmation="small-confirm",
        seeds=8,
        trained=sum(map(len, runs.values())),
        trainings=8 * len(runs),
        images=200,
        openings=1,
        chosen_by=(),
        estimates=estimates,
        comparisons=tuple(compared),
        winner=winner,
        tied=tied,
        smallest=None,
    )


def test_the_comparison_that_lacks_seeds_is_named() -> None:
    """Three trainings of one candidate failed; the others have all eight seeds."""
    best, good, few = ({seed: right + seed for seed in range(seeds)} for right, seeds in ((190, 8), (150, 8), (140, 5)))
    found = _result({0: best, 1: good, 2: few})
    assert [each.p is None for each in found.comparisons] == [False, True]
    shown = text.confirmed(found)
    assert "No test is made of trial 0 with trial 2: with 5 seeds its smallest possible p is" in shown
    assert "No test is made: " not in shown
    assert (found.winner, found.tied) == (None, (0, 2))


@pytest.mark.parametrize(("seeds", "possible"), [(6, False), (7, True)])
def test_too_few_seeds_for_a_winner_are_said(seeds: int, possible: bool) -> None:
    trainings = {number: dict.fromkeys(range(seeds), 190 - 40 * number) for number in range(3)}
    found = _result(trainings)
    assert ("No winner is possible: with 3 candidates 7 seeds are needed" in text.confirmed(found)) is not possible
    assert (found.winner == 0) is possible


def test_a_winner_is_not_better_than_a_candidate_without_a_result() -> None:
    both = {number: dict.fromkeys(range(8), 190 - 40 * number) for number in range(2)}
    assert "better than each other candidate by more" in text.confirmed(_result(both))
    shown = text.confirmed(_result(both | {2: {}}))
    assert "The winner is trial 0: it is better than each other candidate that has a result by more" in shown
    assert "Trial 2 has no result" in shown


def test_a_copy_of_the_database_has_the_same_result(confirmed: Done) -> None:
    search.backup_storage(confirmed.folder / "copy.db", confirmed.url)
    copy = f"sqlite:///{confirmed.folder}/copy.db"
    assert studies.confirmed("small", copy) == studies.confirmed("small", confirmed.url)


def test_an_unfinished_confirmation_has_no_verdict(confirmed: Done) -> None:
    storage = database.connect(confirmed.url)
    study = registry.find("small", storage)
    definition = confirmation.definition_of(study, storage, 2, 6)
    created = registry.create(definition, storage, dict(study.data)).study
    found = confirmation.of_study(created, storage)
    assert (found.trained, found.trainings, found.winner, found.tied) == (0, 12, None, ())
    assert all(estimate.mean is None for estimate in found.estimates)
    assert "0 of 12 trainings are complete" in text.confirmed(found)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing"], "there is no study 'nothing'"),
        (["small", "--top", "4"], "study 'small' has 3 complete configurations, and 4 candidates"),
        (["small", "--top", "0"], "--top = 0: it must be from 1 to 1000"),
        (["small", "--seeds", "0"], "--seeds = 0: it must be from 1 to 1000"),
        (["small", "--seeds", "1001"], "--seeds = 1001: it must be from 1 to 1000"),
        (["small-confirm"], "study 'small-confirm' is a confirmation itself: confirm small again"),
        (["open"], "study 'open' has not ended (0 of 3 trials): `trialyard work open` finishes it"),
        (["empty"], "study 'empty' was stopped before any of its trials was complete"),
        (["shown"], "study 'shown' has chosen by the test images, as the notebook did"),
        (["untested"], "has no array 'x_test'"),
        (["changed"], "study 'changed' started with other images"),
    ],
)
def test_a_mistake_is_one_sentence_and_changes_nothing(
    confirmed: Done, start: Command, write_npz: Callable[..., Path], arguments: list[str], words: str
) -> None:
    _make(arguments[0], confirmed, write_npz)
    before = _rows(confirmed)
    out, err = ended(start("confirm", *arguments), code=1)
    assert out == ""
    assert len(err.splitlines()) == 1
    assert words in err
    assert _rows(confirmed) == before


def _make(name: str, confirmed: Done, write_npz: Callable[..., Path]) -> None:
    """A study like `small` that cannot be confirmed."""
    changes: dict[str, dict[str, Any]] = {
        "open": {},
        "empty": {},
        "shown": {"data": {"validation": "test"}},
        "untested": {"dataset": str(write_npz("untested.npz", x_test=None, y_test=None))},
        "changed": {},
    }
    if name not in changes:
        return
    storage = database.connect(confirmed.url)
    searched = registry.find("small", storage)
    definition = definitions.from_json({**searched.definition, "name": name, **changes[name]})
    point = {"dropout": (definition.space["dropout"].distribution(), 0.1)}
    results = None if name in ("open", "empty") else [ledger.Imported(value=0.9, params=point, attributes={})]
    fingerprint = "of others" if name == "changed" else searched.data["fingerprint"]
    registry.create(definition, storage, {"fingerprint": fingerprint}, results)
    if name == "empty":
        registry.stop(name, storage)
    storage.engine.dispose()


def _rows(confirmed: Done) -> list[str]:
    """All that the database holds."""
    with contextlib.closing(sqlite3.connect(confirmed.folder / "yard" / "studies.db")) as connection:
        return list(connection.iterdump())


# --- without a training --------------------------------------------------------------------------------------


DATA = {"fingerprint": "0" * 16}


def _stopped(storage: RDBStorage, text: str, params: dict[str, Any], best_epoch: int = 2) -> ledger.Study:
    """A study of this definition, stopped after one complete trial with these hyperparameters."""
    definition = parse(text)
    registry.create(definition, storage, DATA)
    kinds = {name: definition.space[name].distribution() for name in params}
    trial = optuna.trial.create_trial(
        params=params, distributions=kinds, value=0.9, user_attrs={"best_epoch": best_epoch}
    )
    registry.open(definition.name, storage).add_trial(trial)
    registry.stop(definition.name, storage)
    return registry.find(definition.name, storage)


@pytest.mark.parametrize(
    ("space", "fixed", "chosen"),
    [
        ('optimizer = { choices = ["adam", "sgd"] }', "momentum = 0.9", {"optimizer": "adam"}),
        ('schedule = { choices = ["constant", "one_cycle"] }', "warmup_epochs = 1", {"schedule": "one_cycle"}),
    ],
)
def test_the_candidates_need_not_use_all_that_their_search_needed(
    storage: PatientStorage, space: str, fixed: str, chosen: dict[str, Any]
) -> None:
    """The best ones of a search over several optimizers may all be of one that has no momentum."""
    text = TRIVIAL.replace("[fixed]", f"{space}\n\n[fixed]\n{fixed}")
    definition = confirmation.definition_of(_stopped(storage, text, {"dropout": 0.1} | chosen), storage, None, 2)
    assert definition.confirm is not None
    assert [each.hyperparameters for each in definition.confirm.candidates] == [{"dropout": 0.1} | chosen]


@pytest.mark.parametrize(
    ("fixed", "best_epoch", "kept"),
    [
        ("", 3, None),
        ("warmup_epochs = 3", 3, None),
        ("warmup_epochs = 3.5", 3, 10),
        ("warmup_epochs = 20", 10, None),  # trained for as many epochs as in the search
        ('schedule = "cosine"', 3, 10),
        ('schedule = "cosine"\nwarmup_epochs = 1', 10, 10),
    ],
)
def test_a_candidate_that_trains_for_fewer_epochs_keeps_the_learning_rates_of_its_search(
    storage: PatientStorage, fixed: str, best_epoch: int, kept: int | None
) -> None:
    """None where they do not depend on the number of epochs, as in confirmations that older versions made."""
    study = _stopped(storage, TRIVIAL.replace("epochs = 2", "epochs = 10") + fixed, {"dropout": 0.1}, best_epoch)
    definition = confirmation.definition_of(study, storage, None, 2)
    assert definition.confirm is not None
    (candidate,) = definition.confirm.candidates
    assert (candidate.epochs, candidate.schedule_epochs) == (best_epoch, kept)


@pytest.mark.parametrize(("seeds", "names"), [(2, ["trivial-confirm"]), (3, ["trivial-confirm", "trivial-confirm-2"])])
def test_two_confirmations_at_the_same_moment_count_as_many_openings_as_they_are_studies(
    either_url: str, monkeypatch: pytest.MonkeyPatch, seeds: int, names: list[str]
) -> None:
    """The second one has chosen its name when the first one takes it: with the same options or with others."""
    storage = database.create(either_url)
    study, create, made = _stopped(storage, TRIVIAL, {"dropout": 0.1}), registry.create, list[str]()

    def overtaken(*arguments: Any, **options: Any) -> ledger.Creation:
        monkeypatch.setattr(registry, "create", create)
        made.append(confirmation.create(study, storage, None, 2, DATA).name)
        return create(*arguments, **options)

    monkeypatch.setattr(registry, "create", overtaken)
    made.append(confirmation.create(study, storage, None, seeds, DATA).name)
    assert made == [names[0], names[-1]]
    assert [each.name for each in confirmation.confirmations(study, storage)] == names
    assert openings.count(storage, DATA["fingerprint"]) == len(names)
    storage.engine.dispose()


def test_a_confirmation_that_is_refused_opens_nothing(storage: PatientStorage) -> None:
    study = _stopped(storage, TRIVIAL, {"dropout": 0.1})
    confirmation.create(study, storage, None, 2, DATA)
    with pytest.raises(StudyError, match="study 'trivial-confirm' started with other images"):
        confirmation.create(study, storage, None, 2, {"fingerprint": "1" * 16})
    assert (openings.count(storage, DATA["fingerprint"]), openings.count(storage, "1" * 16)) == (1, 0)


def _end_next(storage: PatientStorage, created: ledger.Study, me: Owner, accuracy: float | None) -> Any:
    """Ends the next training of a confirmation, without an accuracy as a failure; returns its hyperparameters."""
    claim = claims.claim(storage, ledger.find(storage, created.name), me, 60.0)
    assert claim is not None
    point = storage.get_trial(claim.trial_id).system_attrs["fixed_params"]
    space = definitions.from_json(created.definition).space
    claims.begin(storage, claim, {name: (space[name].distribution(), value) for name, value in point.items()})
    if accuracy is None:
        claims.finish(storage, claim, TrialState.FAIL, None, {"failure": {"kind": "memory", "message": "no luck"}})
    else:
        claims.finish(storage, claim, TrialState.COMPLETE, accuracy, {})
    return point


def test_a_training_that_failed_is_repeated_by_the_same_confirmation(
    storage: PatientStorage, me: Owner, caplog: pytest.LogCaptureFixture
) -> None:
    study = _stopped(storage, TRIVIAL, {"dropout": 0.1})
    created = confirmation.create(study, storage, None, 2, DATA)
    _end_next(storage, created, me, 0.9)
    failed = _end_next(storage, created, me, None)
    assert ledger.find(storage, created.name).has_ended
    assert studies.retry(created.name, storage) == [2]
    again = confirmation.create(study, storage, None, 2, DATA)
    assert (again.name, again.has_ended) == (created.name, False)
    assert "larger budget" not in caplog.text
    found = studies.confirmed("trivial", storage)
    assert (found.trained, found.trainings) == (1, 2)
    assert _end_next(storage, again, me, 0.8) == failed
    found = studies.confirmed("trivial", storage)
    assert (found.trained, found.trainings, found.openings) == (2, 2, 1)
    assert found.estimates[0].accuracies == (0.9, 0.8)
    assert promises.check(storage) == []


@pytest.mark.parametrize("stop", [False, True])
def test_a_confirmation_takes_no_training_of_a_person_s_own(storage: PatientStorage, stop: bool) -> None:
    created = confirmation.create(_stopped(storage, TRIVIAL, {"dropout": 0.1}), storage, None, 2, DATA)
    if stop:
        registry.stop(created.name, storage)
    sentence = "whose trials are fixed: `trialyard confirm trivial --seeds N` makes one with more seeds"
    with pytest.raises(StudyError, match=f"^study 'trivial-confirm' is a confirmation, {sentence}$"):
        studies.enqueue(created.name, {"seed": 1, "candidate": 0}, storage)
    assert ledger.find(storage, created.name).waiting == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seeds": 8.0}, "--seeds = 8.0 must be a whole number"),
        ({"top": "3"}, "--top = '3' must be a whole number"),
    ],
)
def test_a_number_that_is_not_whole_is_one_sentence(finished_study: str, options: dict[str, Any], words: str) -> None:
    """The command line takes no other; Python may."""
    with pytest.raises(StudyError, match=rf"\A{words}[^\n]*\Z"):
        search.confirm(finished_study, devices="cpu", workers=1, **options)
