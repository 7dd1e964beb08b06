"""A trial that is trained again from its record has the same numbers, also if the first training was interrupted."""

import contextlib
import dataclasses
import json
import math
import signal
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from conftest import SMALL, Command, ended, until
from optuna.trial import TrialState
from scripted import Scripted, epoch, trained
from sklearn.datasets import load_digits

import search
import studies
from search import checks, retraining
from search.devices import Slot, cpu
from search.errors import DataError, MachineError
from search.messages import Checked, Epoch
from search.retraining import Replayed, ReplayedEpoch
from storage import claims, database, ledger, owners, settings
from storage.owners import Owner
from storage.transactions import PatientStorage
from studies import recipe, registry, statistics
from studies.definition import Definition
from studies.errors import StudyError


def _change(home: Path, number: int, **attributes: object) -> None:
    """Sets user attributes of a trial of `small`, as an editor of the database would."""
    storage = database.connect(f"sqlite:///{home}/yard/studies.db")
    trial_id = storage.get_trial_id_from_study_id_trial_number(registry.find("small", storage).id, number)
    with contextlib.closing(sqlite3.connect(home / "yard" / "studies.db")) as connection, connection:
        for key, value in attributes.items():
            connection.execute(
                "UPDATE trial_user_attributes SET value_json = ? WHERE trial_id = ? AND key = ?",
                (json.dumps(value), trial_id, key),
            )


def test_a_replay_of_a_trial_that_was_killed_and_resumed_is_exact(
    home: Path, write_small: Callable[..., Path], start: Command
) -> None:
    file = str(write_small(trials=1, epochs=30))
    process = start("run", file)
    for _ in range(4):
        until(process, "trial 0 epoch")
    process.send_signal(signal.SIGINT)
    ended(process, code=130)
    ended(start("run", file))
    attempts = studies.attempts("small", 0)
    assert [attempt.outcome for attempt in attempts] == ["interrupted", "finished"]
    assert attempts[1].resumed_after
    url = f"sqlite:///{home}/yard/studies.db"
    before = studies.best_trial("small", url)

    out, err = ended(start("replay", "small", "0"))
    assert "the same in all 30 epochs, to the last bit, though the recorded training took 2 attempts" in out
    assert err.count(" recorded, the same") == 30
    assert "not as it was" not in err
    assert studies.best_trial("small", url) == before

    # Under other circumstances they are named first, and the values may differ a little.
    versions = before.user_attrs["versions"]
    _change(home, 0, device="a faster one", versions=versions | {"keras": "3.1"})
    named: list[str] = []
    epochs: list[ReplayedEpoch] = []
    found = search.replay("small", 0, on_difference=named.append, on_epoch=epochs.append)
    assert [name.split(",")[0] for name in named] == [
        "it was trained on a faster one",
        "it was trained with keras 3.1",
    ]
    assert found.differences == tuple(named)
    assert (found.epochs, found.is_exact, found.holds) == (tuple(epochs), True, True)
    assert 0.01 < found.tolerance < 0.2

    # A record that was changed is found out.
    history = home / "yard" / "artifacts" / before.user_attrs["history"]
    records = json.loads(history.read_text(encoding="utf-8"))
    records[2]["loss"] += 1e-9
    history.write_text(json.dumps(records), encoding="utf-8")
    _change(home, 0, device=before.user_attrs["device"], versions=versions)
    out, _ = ended(start("replay", "small", "0", "--json"), code=1)
    result = json.loads(out)
    assert (result["exact"], result["holds"], result["tolerance"]) == (False, False, 0.0)
    assert [epoch["epoch"] for epoch in result["epochs"]] == list(range(1, 31))


def test_repeats_are_run_shown_and_replayed(home: Path, write_small: Callable[..., Path], start: Command) -> None:
    text = SMALL.replace("epochs = {epochs}", "epochs = {epochs}\nrepeats = 3")
    ended(start("run", str(write_small(trials=1, epochs=2, text=text))))
    best = studies.best_trial("small")
    repeats = best.user_attrs["repeats"]
    assert best.intermediate_values == dict(enumerate(repeats, start=1))
    assert best.values == [pytest.approx(np.mean(repeats))]
    assert studies.leaderboard("small")[0].deviation == pytest.approx(np.std(repeats, ddof=1), abs=1e-6)
    assert f"{repeats[0]:.4f}, {repeats[1]:.4f}, {repeats[2]:.4f}; the mean counts" in ended(start("best", "small"))[0]
    assert "  training         6 epochs in 3 repeats, " in ended(start("best", "small"))[0]
    out, _ = ended(start("replay", "small", "0"))
    assert "the same in all 6 epochs, to the last bit" in out
    # On a machine without the trial's files, the database still has the repeats.
    (home / "yard" / "artifacts" / best.user_attrs["history"]).unlink()
    out, err = ended(start("replay", "small", "0"))
    assert "the same in all 3 repeats (not every epoch is recorded on this machine), to the last bit" in out
    assert err.count(", not recorded") == 6
    _change(home, 0, repeats=[repeats[0], repeats[1], repeats[2] + 1e-9])
    out, _ = ended(start("replay", "small", "0"), code=1)
    assert "not the same in all 3 repeats" in out


def test_an_epoch_without_a_finite_accuracy_is_equal_to_itself() -> None:
    nan = float("nan")
    assert ReplayedEpoch(epoch=1, recorded=nan, replayed=nan, recorded_loss=0.1, replayed_loss=0.1).is_equal
    assert not ReplayedEpoch(epoch=1, recorded=nan, replayed=0.5, recorded_loss=0.1, replayed_loss=0.1).is_equal
    assert not ReplayedEpoch(epoch=1, recorded=None, replayed=nan, recorded_loss=None, replayed_loss=0.1).is_equal


def test_a_replay_that_hangs_is_ended(tmp_path: Path, trivial: Definition, monkeypatch: pytest.MonkeyPatch) -> None:
    def silence() -> None:
        time.sleep(0.03)

    quick = [dataclasses.replace(epoch(number, 0.5), seconds=0.001) for number in (1, 2)]
    trainer = Scripted(tmp_path, [*quick, *[silence] * 50])  # type: ignore[list-item]
    trainer._ready = True
    monkeypatch.setattr(retraining, "Trainer", lambda *arguments: trainer)
    here, seen = settings.Settings(home=tmp_path, stall_seconds=0.2), list[Epoch]()
    wanted = recipe.of_trial(trivial, 0, {"dropout": 0.1})
    with pytest.raises(
        MachineError, match=r"was silent for 0 s in a training and was killed: see what hangs, or allow"
    ):
        retraining._train(trivial, wanted, trainer.slot, here, seen.append)
    assert (seen, trainer.requests[0]) == (quick, "kill")


def test_values_within_the_tolerance_hold() -> None:
    epoch = ReplayedEpoch(epoch=1, recorded=0.9, replayed=0.91, recorded_loss=None, replayed_loss=0.3)
    assert not epoch.is_equal

    def replayed(tolerance: float) -> Replayed:
        return Replayed(
            study="small",
            trial=0,
            differences=("another device",),
            attempts=1,
            epochs=(epoch,),
            recorded_value=0.9,
            replayed_value=0.91,
            tolerance=tolerance,
        )

    assert (replayed(0.02).is_exact, replayed(0.02).holds) == (False, True)
    assert not replayed(0.005).holds
    assert not replayed(0.0).holds


@pytest.mark.parametrize(("value", "repeats", "images"), [(1.0, [], 200), (0.9, [0.88, 0.92], 200), (0.9, [], None)])
def test_the_tolerance_is_that_of_the_images_that_the_study_judged_by(
    storage: PatientStorage,
    trivial: Definition,
    me: Owner,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    value: float,
    repeats: list[float],
    images: int | None,
) -> None:
    """The mean of several repeats has no hits, and a perfect accuracy may be lower the next time."""
    data: dict[str, Any] = {"fingerprint": "0" * 16} | ({} if images is None else {"validation": images})
    study = registry.create(trivial, storage, data).study
    claim = claims.claim(storage, study, me, 60.0)
    assert claim is not None
    claims.begin(storage, claim, {"dropout": (trivial.space["dropout"].distribution(), 0.1)})
    attributes: dict[str, Any] = {"seed": 1} | ({"repeats": repeats} if repeats else {})
    claims.finish(storage, claim, TrialState.COMPLETE, value, attributes)
    monkeypatch.setattr(checks, "check", lambda *_: Checked(data=data))
    monkeypatch.setattr(retraining, "_train", lambda *_: trained(stopped=False))
    here, elsewhere = settings.Settings(home=tmp_path), Slot(device=cpu())  # the trial has no record of its device
    study = registry.find("trivial", storage)
    found = retraining.replay(study, 0, storage, here, elsewhere, lambda _: None, lambda _: None)
    error = 0.0
    if images is not None:
        interval = statistics.wilson(round(value * images), images)
        error = math.sqrt(2) * (interval.high - interval.low) / 2
        assert error > 0.01
    assert found.tolerance == pytest.approx(0.01 + error)


def test_a_trial_that_is_no_number_is_one_sentence(finished_study: str) -> None:
    with pytest.raises(StudyError, match=r"\Atrial = '1' must be a whole number[^\n]*\Z"):
        search.replay(finished_study, "1", devices="cpu")  # type: ignore[arg-type]


def test_what_cannot_be_replayed_is_said_in_one_sentence(
    home: Path,
    write_small: Callable[..., Path],
    write_npz: Callable[..., Path],
    start: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = write_small(trials=4, epochs=2)
    (home / "more.csv").write_text("dropout,accuracy\n0.2,0.9\n", encoding="utf-8")
    search.create(file)
    studies.import_trials("small", home / "more.csv")
    url = f"sqlite:///{home}/yard/studies.db"
    storage = database.connect(url)
    study = ledger.find(storage, "small")
    for state in (optuna.trial.TrialState.PRUNED, optuna.trial.TrialState.FAIL, optuna.trial.TrialState.COMPLETE):
        claim = claims.claim(storage, study, owners.this_slot("cpu:0"), 60.0)
        assert claim is not None
        claims.finish(storage, claim, state, 0.5, {})
    storage.engine.dispose()
    for number, words in (
        (0, "trial 0 of study 'small' was imported: Trialyard did not train it"),
        (1, "trial 1 of study 'small' is pruned: only a complete trial can be trained again"),
        (2, "trial 2 of study 'small' is failed: only a complete trial can be trained again"),
        (3, "trial 3 of study 'small' has no seed"),
        (7, "study 'small' has no trial 7: its 4 trials are numbered from 0"),
        (10**30, "study 'small' has no trial 10"),
    ):
        with pytest.raises(StudyError, match=words):
            search.replay("small", number, storage=url)
    _, err = ended(start("replay", "small", "1"), code=1)
    assert err == "error: trial 1 of study 'small' is pruned: only a complete trial can be trained again\n"

    with database.connect(url).engine.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO trial_user_attributes (trial_id, key, value_json) "
            "SELECT trial_id, 'seed', '1' FROM trials WHERE number = 3"
        )
    images, labels = load_digits(return_X_y=True)
    write_npz(x_train=np.rint(images.reshape(-1, 8, 8)).astype(np.uint8)[100:400], y_train=labels[100:400])
    with pytest.raises(StudyError, match="study 'small' started with other images"):
        search.replay("small", 3, storage=url)
    (home / "small.npz").unlink()
    with pytest.raises(DataError, match="does not exist"):
        search.replay("small", 3, storage=url)
    ledger.record_software(storage, study, {"weights:body.weights.h5": "0" * 16})
    checked = Checked(data=study.data, sources={"weights:body.weights.h5": "1" * 16})
    monkeypatch.setattr(checks, "check", lambda *_: checked)
    with pytest.raises(StudyError, match=r"study 'small' began with another file of weights:body.weights.h5 than this"):
        search.replay("small", 3, storage=url)
