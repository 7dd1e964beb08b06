"""Trials change hands exactly: no budget overshot, no trial run by two, none left behind."""

import json
import logging
import math
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from datetime import datetime, timedelta
from multiprocessing.synchronize import Event
from typing import Any, Literal

import optuna
import psutil
import pytest
import sqlalchemy
from conftest import attempts_at
from optuna.artifacts import get_all_artifact_meta
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState
from sqlalchemy.exc import TimeoutError as PoolTimeout

from search.devices import Slot, cpu
from search.heartbeat import Heartbeat
from storage import attempt_table, claims, database, ledger, owners, promises, silence, slots, transactions
from storage.artifacts import CHECKPOINT, HISTORY, MODEL
from storage.claims import Claim
from storage.errors import ClaimLost, StorageError
from storage.faults import CRASHES, LOSSES
from storage.ledger import Budget, Imported
from storage.owners import Owner
from storage.tables import TrialModel, utc_now
from storage.transactions import PatientStorage
from studies import registry
from studies.definition import Definition, parse

GRACE = 60.0
OTHER = """
name = "other"
dataset = "digits"
model = "mnist_cnn"

[budget]
trials = 2

[space]
width = { low = 1, high = 2 }
"""
OWN_ARTIFACT = {"artifact_id": "own", "filename": "own.txt", "mimetype": "text/plain", "encoding": None}


@pytest.fixture
def storage(either_url: str) -> Iterator[PatientStorage]:
    """A new database of each kind, with the tables and no study."""
    made = database.create(either_url)
    yield made
    made.engine.dispose()


def _claim(storage: PatientStorage, study: str, worker: Owner, beat_seconds: float = 10.0) -> Claim:
    claim = claims.claim(storage, ledger.find(storage, study), worker, GRACE, beat_seconds)
    assert claim is not None
    return claim


def _beat(storage: PatientStorage, claim: Claim) -> ledger.State | None:
    return claims.beat(storage, {}, [claim])[claim]


def _finish(storage: PatientStorage, claim: Claim, value: float = 0.5) -> None:
    claims.finish(storage, claim, TrialState.COMPLETE, value, {})


@pytest.fixture
def dead(me: Owner) -> Owner:
    """A process of this machine that has ended."""
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    born = psutil.Process(process.pid).create_time() - psutil.boot_time()
    process.wait()
    return replace(me, pid=process.pid, born=born)


@pytest.fixture
def elsewhere(me: Owner) -> Owner:
    """A process of another machine."""
    return replace(me, machine="another", host="another")


# --- scores -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None])
def test_a_trial_without_a_finite_score_is_not_complete(
    storage: PatientStorage, study: str, me: Owner, value: float | None
) -> None:
    claim = _claim(storage, study, me)
    claims.finish(storage, claim, TrialState.COMPLETE, value, {"epochs": 2})
    trial = storage.get_trial(claim.trial_id)
    assert (trial.state, trial.values, trial.user_attrs["epochs"]) == (TrialState.FAIL, None, 2)
    assert trial.user_attrs["failure"] == {
        "kind": "nan",
        "message": f"its score is {value}, which is not a finite number",
    }
    assert promises.check(storage) == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_epoch_s_score_that_is_not_finite_is_the_worst_for_pruners(
    storage: PatientStorage, study: str, me: Owner, value: float
) -> None:
    for _ in range(2):
        claim = _claim(storage, study, me)
        claims.record_epochs(storage, claim, {1: 0.5})
        _finish(storage, claim)
    claim = _claim(storage, study, me)
    claims.record_epochs(storage, claim, {1: value})
    opened, trial = registry.open(study, storage), storage.get_trial(claim.trial_id)
    assert math.isnan(trial.intermediate_values[1])
    for pruner in (
        optuna.pruners.SuccessiveHalvingPruner(min_resource=1),
        optuna.pruners.MedianPruner(n_startup_trials=1),
    ):
        assert pruner.prune(opened, trial)
    claims.finish(storage, claim, TrialState.PRUNED, value, {})
    trial = storage.get_trial(claim.trial_id)
    assert (trial.state, trial.values) == (TrialState.PRUNED, None)
    claims.record_epochs(storage, _claim(storage, study, me), {1: value, 2: 0.5}, resumed_after=2)
    assert claims.running_trials(storage, claim.study_id)[0].epoch == 2


def test_an_import_of_a_score_that_is_not_finite_adds_nothing(storage: PatientStorage, study: str) -> None:
    with pytest.raises(ValueError, match="the value of an imported trial is nan: it must be a finite number"):
        ledger.import_trials(storage, ledger.find(storage, study), _results(0.8, math.nan))
    assert ledger.counts(storage, registry.find(study, storage).id).complete == 0


# --- the budget -------------------------------------------------------------------------------------------


def test_a_study_ends_with_exactly_its_budget(storage: PatientStorage, study: str, me: Owner) -> None:
    numbers = []
    while (claim := claims.claim(storage, ledger.find(storage, study), me, GRACE)) is not None:
        numbers.append(claim.number)
        _finish(storage, claim)
    assert numbers == [0, 1, 2, 3, 4]
    ended = ledger.find(storage, study)
    assert ended.has_ended
    assert ledger.counts(storage, ended.id) == ledger.Counts(complete=5, pruned=0, failed=0, running=0, waiting=0)


def test_running_trials_count_against_the_budget(storage: PatientStorage, study: str, me: Owner) -> None:
    running = [_claim(storage, study, me) for _ in range(5)]
    assert claims.claim(storage, ledger.find(storage, study), me, GRACE) is None
    assert not ledger.find(storage, study).has_ended
    claims.requeue(storage, running[2], "interrupted", "asked to stop")
    assert _claim(storage, study, me).number == 2


@pytest.mark.parametrize("state", [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL])
def test_every_ending_for_good_counts(storage: PatientStorage, study: str, me: Owner, state: TrialState) -> None:
    for _ in range(5):
        claims.finish(storage, _claim(storage, study, me), state, None if state == TrialState.FAIL else 0.5, {})
    assert claims.claim(storage, ledger.find(storage, study), me, GRACE) is None


def test_a_budget_grows_and_never_shrinks(storage: PatientStorage, study: str, me: Owner) -> None:
    for _ in range(5):
        _finish(storage, _claim(storage, study, me))
    found = ledger.find(storage, study)
    assert ledger.raise_budget(storage, found, Budget(trials=4, hours=None)) == Budget(trials=5, hours=None)
    assert ledger.raise_budget(storage, found, Budget(trials=6, hours=None)) == Budget(trials=6, hours=None)
    assert _claim(storage, study, me).number == 5


def test_the_hours_of_a_study_grow_and_never_shrink(storage: PatientStorage, study: str) -> None:
    found = ledger.find(storage, study)
    assert ledger.raise_budget(storage, found, Budget(trials=5, hours=1.0)).hours is None, "no limit is the most"
    registry.create(parse(OTHER.replace("trials = 2", "trials = 2\nhours = 24")), storage, {"fingerprint": "1" * 16})
    for hours, expected in ((0.001, 24.0), (48.0, 48.0), (24.0, 48.0)):
        shorter = parse(OTHER.replace("trials = 2", f"trials = 2\nhours = {hours}"))
        registry.create(shorter, storage, {"fingerprint": "1" * 16})
        assert ledger.find(storage, "other").budget == Budget(trials=2, hours=expected)
    registry.create(parse(OTHER), storage, {"fingerprint": "1" * 16})
    assert ledger.find(storage, "other").budget == Budget(trials=2, hours=None)


def test_hours_are_counted_by_the_database_s_clock(
    storage: PatientStorage, study: str, me: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first worker whose own clock is three hours behind does not end a study of two hours."""
    hours = parse(OTHER.replace("trials = 2", "trials = 2\nhours = 2"))
    registry.create(hours, storage, {"fingerprint": "1" * 16})
    with monkeypatch.context() as behind:
        behind.setattr(claims, "utc_now", lambda: utc_now() - timedelta(hours=3))
        _claim(storage, "other", me)
    assert _claim(storage, "other", me).number == 1


def test_a_study_is_counted_as_of_one_moment(storage: PatientStorage, study: str, me: Owner) -> None:
    """Nobody who looks without the lock may meet a trial between two states: he would think that all have ended."""
    _claim(storage, study, me)
    statements: list[str] = []
    sqlalchemy.event.listen(storage.engine, "before_cursor_execute", lambda *event: statements.append(event[2]))
    (seen,) = ledger.studies(storage)
    assert (seen.finished, seen.running, seen.waiting) == (0, 1, 0)
    assert len([text for text in statements if text.startswith("SELECT") and "FROM trials" in text]) == 1


def test_what_a_trial_sends_does_not_grow_with_the_study(
    storage: PatientStorage, study: str, me: Owner, elsewhere: Owner
) -> None:
    """Statements, of which each takes a network's round trip: many workers share one database."""
    ledger.raise_budget(storage, ledger.find(storage, study), Budget(trials=100, hours=None))
    statements: list[str] = []
    sqlalchemy.event.listen(storage.engine, "before_cursor_execute", lambda *event: statements.append(event[2]))

    def sent(call: Callable[[], Any]) -> int:
        statements.clear()
        call()
        return len(statements)

    def of_one_trial() -> dict[str, int]:
        held: list[Claim] = []
        return {
            "claim": sent(lambda: held.append(_claim(storage, study, me))),
            "report": sent(lambda: claims.record_epochs(storage, held[0], {1: 0.5})),
            "beat": sent(lambda: claims.beat(storage, {me: "Some Processor"}, held)),
            "finish": sent(lambda: claims.finish(storage, held[0], TrialState.COMPLETE, 0.5, {"epochs": 1})),
        }

    _claim(storage, study, elsewhere)
    beside_one = of_one_trial()
    for number in range(20):
        _claim(storage, study, replace(elsewhere, slot=f"cpu:{number}"))
    assert of_one_trial() == beside_one
    assert sum(beside_one.values()) <= 40, beside_one


def test_a_claim_asks_for_each_process_once(
    storage: PatientStorage, study: str, me: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside hundreds of running trials of some workers: each has eight slots or so."""
    ledger.raise_budget(storage, ledger.find(storage, study), Budget(trials=100, hours=None))
    for number in range(8):
        _claim(storage, study, replace(me, slot=f"cpu:{number}"))
    asked: list[int] = []
    gone = Owner.gone

    def ask(owner: Owner) -> bool:
        asked.append(owner.pid)
        return gone(owner)

    monkeypatch.setattr(Owner, "gone", ask)
    _claim(storage, study, me)
    assert asked == [me.pid]


def test_a_claim_reads_few_rows_in_a_database_without_statistics(postgresql_url: str, me: Owner) -> None:
    """A new PostgreSQL knows nothing of the tables' sizes yet: a claim must not read and sort all attempts then."""
    storage = database.create(postgresql_url)
    registry.create(parse(OTHER), storage, {"fingerprint": "1" * 16})
    study = ledger.find(storage, "other")
    ledger.raise_budget(storage, study, Budget(trials=1000, hours=None))
    for _ in range(100):
        _finish(storage, _claim(storage, "other", me))
    asked: list[tuple[str, Any]] = []
    sqlalchemy.event.listen(storage.engine, "before_cursor_execute", lambda *event: asked.append(event[2:4]))
    assert claims.claim(storage, study, me, GRACE) is not None
    read: dict[str, float] = {}
    with storage.engine.connect() as connection:
        for statement, parameters in [ask for ask in asked if ask[0].startswith("SELECT")]:
            explained = connection.exec_driver_sql(f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}", parameters)
            read[statement] = _rows_read(explained.scalar_one()[0]["Plan"])
    assert len(read) >= 3, "the statements of a claim were not seen"
    assert max(read.values()) <= 30, read
    storage.engine.dispose()


def _rows_read(plan: dict[str, Any]) -> float:
    """The rows that a plan's steps returned, or read and left out, in all."""
    below = sum(_rows_read(step) for step in plan.get("Plans", []))
    of_loop = sum(
        plan.get(name, 0) for name in ("Actual Rows", "Rows Removed by Filter", "Rows Removed by Join Filter")
    )
    return float(of_loop) * float(plan["Actual Loops"]) + below


def test_no_trial_starts_after_the_study_s_hours(storage: PatientStorage, me: Owner) -> None:
    short = parse(OTHER.replace("trials = 2", "trials = 2\nhours = 1e-7"))
    registry.create(short, storage, {"fingerprint": "1" * 16})
    first = _claim(storage, "other", me)  # the hours begin with the first trial
    time.sleep(0.01)
    assert claims.claim(storage, ledger.find(storage, "other"), me, GRACE) is None
    assert not ledger.find(storage, "other").has_ended, "its running trial may end"
    _finish(storage, first)
    assert ledger.find(storage, "other").has_ended


def test_a_study_that_was_never_made_whole_gives_no_trial(storage: PatientStorage, me: Owner) -> None:
    half = optuna.create_study(study_name="half", storage=storage, direction="maximize")
    half.set_user_attr("trialyard:definition", parse(OTHER).to_json())
    with pytest.raises(StorageError, match="has no budget: run `trialyard create`"):
        ledger.find(storage, "half")
    assert ledger.studies(storage) == []


# --- ownership --------------------------------------------------------------------------------------------


def test_a_running_trial_always_has_an_owner_and_a_heartbeat(storage: PatientStorage, study: str, me: Owner) -> None:
    claim = _claim(storage, study, me)
    (holding,) = claims.running_trials(storage, claim.study_id)
    assert (holding.number, holding.pid, holding.attempt) == (0, os.getpid(), 1)
    assert holding.silent_seconds < GRACE
    assert promises.check(storage) == []


def test_check_sees_what_must_not_be(storage: PatientStorage, study: str, me: Owner) -> None:
    optuna_study = registry.open(study, storage)
    optuna_study.ask()  # RUNNING without owner or heartbeat: not by our hand
    assert promises.check(storage) == [
        f"study {study}: 1 trial was started outside Trialyard and has not ended: trial 0; "
        "no worker waits for it, and `optuna tell` ends it"
    ]
    for _ in range(6):
        optuna_study.tell(optuna_study.ask(), 0.5)
    assert f"study {study}: it has 6 trials, but its budget is 5" in promises.check(storage)


def test_a_trial_that_was_asked_for_and_never_told_blocks_nothing(
    storage: PatientStorage, study: str, me: Owner
) -> None:
    optuna_study = registry.open(study, storage)
    asked = optuna_study.ask()
    for number in range(1, 6):
        claim = _claim(storage, study, me)
        assert claim.number == number
        claims.finish(storage, claim, TrialState.COMPLETE, 0.5, {})
    ended = ledger.find(storage, study)
    assert (ended.finished, ended.running, ended.outside, ended.has_ended) == (5, 0, 1, True)
    assert claims.claim(storage, ended, me, GRACE) is None
    optuna_study.tell(asked, 0.6)
    assert ledger.find(storage, study).has_ended
    claims.delete(storage, ended, GRACE)


def test_a_trial_of_an_ended_process_is_claimed_again_at_once(
    storage: PatientStorage, study: str, me: Owner, dead: Owner
) -> None:
    lost = _claim(storage, study, dead)
    again = _claim(storage, study, me)
    assert (again.trial_id, again.attempt) == (lost.trial_id, 2)
    first, second = attempts_at(storage, again.trial_id)
    assert (first.outcome, first.owner) == ("lost", dead)
    assert f"process {dead.pid}" in str(first.reason)
    assert first.ended is not None
    assert (second.outcome, second.ended, second.owner) == (None, None, me)


def test_a_process_id_that_is_used_again_is_another_process(storage: PatientStorage, study: str, me: Owner) -> None:
    earlier = replace(me, born=me.born - 3600)
    assert earlier.gone()
    assert not me.gone()
    assert _claim(storage, study, earlier).trial_id == _claim(storage, study, me).trial_id


def test_a_clock_that_is_set_ends_no_worker(me: Owner, monkeypatch: pytest.MonkeyPatch) -> None:
    # Linux counts a process's start from the machine's: psutil adds the latter, which follows the clock.
    booted = psutil.boot_time()
    monkeypatch.setattr("psutil._pslinux.boot_time", lambda: booted + 3600.0)
    assert psutil.Process().create_time() > time.time() + 3000, "psutil does not tell it so any more"
    assert not me.gone()


@pytest.fixture
def pass_time(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets seconds pass for this process's own clock, by which it watches others."""
    passed = [0.0]

    def wait(seconds: float) -> None:
        passed[0] += seconds

    monkeypatch.setattr(silence, "monotonic", lambda: time.monotonic() + passed[0])
    return wait


def test_a_silent_trial_of_another_machine_is_claimed_after_the_grace(
    storage: PatientStorage, study: str, me: Owner, elsewhere: Owner, pass_time: Callable[[float], None]
) -> None:
    lost = _claim(storage, study, elsewhere)
    assert _claim(storage, study, me).number == 1, "the first look notes its heartbeat"
    pass_time(GRACE - 5)
    assert _claim(storage, study, me).number == 2, "it was watched for less than the grace"
    pass_time(5)
    assert _claim(storage, study, me).trial_id == lost.trial_id
    first, _ = attempts_at(storage, lost.trial_id)
    assert first.reason is not None
    assert first.reason.startswith(f"no sign of process {elsewhere.pid} on another for 6")


def test_a_beat_keeps_a_trial_of_another_machine(
    storage: PatientStorage, study: str, me: Owner, elsewhere: Owner, pass_time: Callable[[float], None]
) -> None:
    held = _claim(storage, study, elsewhere)
    _claim(storage, study, me)
    pass_time(GRACE)
    assert _beat(storage, held) == "open"
    assert _claim(storage, study, me).number == 2
    pass_time(GRACE)
    assert _claim(storage, study, me).trial_id == held.trial_id, "the time counts from the last new heartbeat"


def test_a_slow_heartbeat_is_waited_for_as_long_as_its_worker_says(
    storage: PatientStorage, study: str, me: Owner, elsewhere: Owner, pass_time: Callable[[float], None]
) -> None:
    held = _claim(storage, study, elsewhere, beat_seconds=2 * GRACE)
    _claim(storage, study, me)
    pass_time(claims.MISSED_BEATS * 2 * GRACE - 5)
    assert _claim(storage, study, me).number == 2
    pass_time(5)
    assert _claim(storage, study, me).trial_id == held.trial_id


def test_a_look_at_a_copy_of_a_study_does_not_make_the_original_s_silence_shorter(
    storage: PatientStorage, study: str, me: Owner, elsewhere: Owner, pass_time: Callable[[float], None]
) -> None:
    """A copy in the same database has the incarnation of the original."""
    optuna.copy_study(from_study_name=study, from_storage=storage, to_storage=storage, to_study_name="copy")
    lost = _claim(storage, study, elsewhere)
    _claim(storage, "copy", replace(elsewhere, slot="cpu:1"))
    _claim(storage, study, me)
    pass_time(GRACE)
    _claim(storage, "copy", me)
    assert _claim(storage, study, me).trial_id == lost.trial_id


def _set_back_beats(storage: PatientStorage) -> None:
    """Makes every last heartbeat an hour old, as for somebody whose machine or database slept."""
    stored = attempt_table.table
    with storage.engine.begin() as connection:
        for trial_id, beat in connection.execute(sqlalchemy.select(stored.c.trial_id, stored.c.beat)).all():
            earlier = stored.update().where(stored.c.trial_id == trial_id).values(beat=beat - timedelta(hours=1))
            connection.execute(earlier)


def test_a_machine_that_sleeps_takes_nobody_s_trial(
    storage: PatientStorage, study: str, me: Owner, elsewhere: Owner
) -> None:
    """The calendar goes on meanwhile, and the monotonic clock, by which heartbeats are sent and watched, does not."""
    own, other = _claim(storage, study, me), _claim(storage, study, elsewhere)
    _set_back_beats(storage)
    assert _claim(storage, study, replace(me, slot="cpu:1")).number == 2
    assert _beat(storage, own) == _beat(storage, other) == "open"


def test_a_living_process_of_this_machine_keeps_its_trial_however_silent(
    storage: PatientStorage, study: str, me: Owner, pass_time: Callable[[float], None]
) -> None:
    held = _claim(storage, study, me)
    for number in (1, 2):
        assert _claim(storage, study, replace(me, slot="cpu:1")).number == number
        pass_time(3600)
    assert _beat(storage, held) == "open"


def test_silence_while_the_database_is_away_does_not_count(
    storage: PatientStorage, study: str, me: Owner, elsewhere: Owner, pass_time: Callable[[float], None]
) -> None:
    held = _claim(storage, study, elsewhere)
    _claim(storage, study, me)
    pass_time(GRACE)
    storage.patience, tries = 60.0, []

    def work(connection: sqlalchemy.Connection) -> None:
        tries.append(1)
        if len(tries) == 1:
            raise PoolTimeout

    transactions.write(storage, None, work)
    assert _claim(storage, study, me).number == 2
    pass_time(GRACE)
    assert _claim(storage, study, me).trial_id == held.trial_id


def test_a_worker_that_was_stopped_with_the_others_takes_nobody_s_trial(
    storage: PatientStorage, study: str, me: Owner, elsewhere: Owner, pass_time: Callable[[float], None]
) -> None:
    """As paused containers: their monotonic clocks go on meanwhile, and none of them sends a heartbeat."""
    held = _claim(storage, study, elsewhere)
    with silence.watching(GRACE / 6) as runs:
        _claim(storage, study, me)
        pass_time(2 * GRACE)
        assert _claim(storage, study, me).number == 2, "before its own first heartbeat"
        runs()
        for _ in range(6):
            other = claims.claim(storage, ledger.find(storage, study), me, GRACE)
            assert other is None or other.trial_id != held.trial_id
            pass_time(GRACE / 6)
            runs()
        assert _claim(storage, study, me).trial_id == held.trial_id, "it stays silent"


@pytest.mark.parametrize("error", [psutil.NoSuchProcess(1), psutil.AccessDenied(1)])
def test_a_process_that_this_user_may_not_see_lives(
    me: Owner, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """A /proc that is mounted with `hidepid` shows a user only the processes of his own."""

    def hidden(pid: int) -> psutil.Process:
        raise error

    def refused(pid: int, number: int) -> None:
        raise PermissionError

    monkeypatch.setattr(psutil, "Process", hidden)
    monkeypatch.setattr(os, "kill", refused)
    assert not me.gone()


def test_a_worker_that_slept_drops_its_result(storage: PatientStorage, study: str, me: Owner, dead: Owner) -> None:
    slept = _claim(storage, study, dead)
    again = _claim(storage, study, me)
    for late in (
        lambda: claims.record_epochs(storage, slept, {1: 0.9}),
        lambda: claims.begin(storage, slept, {"dropout": (FloatDistribution(0.0, 0.7), 0.5)}),
        lambda: claims.finish(storage, slept, TrialState.COMPLETE, 0.9, {"parameters": 1}),
        lambda: claims.requeue(storage, slept, "interrupted", "too late"),
    ):
        with pytest.raises(ClaimLost, match="its result is dropped"):
            late()
    assert _beat(storage, slept) is None
    trial = storage.get_trial(again.trial_id)
    assert trial.state == TrialState.RUNNING
    assert (trial.intermediate_values, trial.params) == ({}, {})
    assert "parameters" not in trial.user_attrs
    _finish(storage, again, 0.4)
    assert storage.get_trial(again.trial_id).values == [0.4]


def test_the_same_worker_s_earlier_attempt_is_lost_too(storage: PatientStorage, study: str, me: Owner) -> None:
    first = _claim(storage, study, me)
    claims.requeue(storage, first, "crashed", "its trainer died")
    second = _claim(storage, study, me)
    assert second.trial_id == first.trial_id
    with pytest.raises(ClaimLost):
        claims.finish(storage, first, TrialState.COMPLETE, 0.9, {})
    _finish(storage, second)


def test_a_trial_with_the_id_of_a_deleted_one_is_another_trial(
    storage: PatientStorage, study: str, trivial: Definition, me: Owner, elsewhere: Owner
) -> None:
    deleted = _claim(storage, study, me)
    assert claims.trial_exists(storage, deleted)
    registry.stop(study, storage)
    claims.delete(storage, ledger.find(storage, study), GRACE)
    registry.create(trivial, storage, {"fingerprint": "0" * 16})
    new = _claim(storage, study, elsewhere)
    if storage.engine.dialect.name == "sqlite":
        assert new.trial_id == deleted.trial_id, "this database does not use ids again: the test shows nothing"
    assert not claims.trial_exists(storage, deleted)
    assert claims.trial_exists(storage, new)


def test_somebody_s_own_ask_is_left_alone(storage: PatientStorage, study: str, me: Owner) -> None:
    asked = registry.open(study, storage).ask()
    assert _claim(storage, study, me).number == asked.number + 1
    assert storage.get_trial(asked._trial_id).state == TrialState.RUNNING


# --- what is tried again ----------------------------------------------------------------------------------


def test_a_requeued_trial_keeps_its_row_hyperparameters_and_values(
    storage: PatientStorage, study: str, me: Owner, trivial: Definition
) -> None:
    first = _claim(storage, study, me)
    drawn = optuna.Trial(registry.open(study, storage), first.trial_id).suggest_float("dropout", 0.0, 0.7)
    claims.record_epochs(storage, first, {1: 0.3})
    claims.requeue(storage, first, "interrupted", "asked to stop")
    second = _claim(storage, study, me)
    assert second.trial_id == first.trial_id
    assert storage.get_trial(second.trial_id).intermediate_values == {1: 0.3}
    again = optuna.Trial(registry.open(study, storage), second.trial_id).suggest_float("dropout", 0.0, 0.7)
    assert again == drawn


def test_a_trial_that_keeps_crashing_fails_for_good_and_says_why(
    storage: PatientStorage, study: str, me: Owner
) -> None:
    for _ in range(CRASHES + 1):
        claim = _claim(storage, study, me)
        assert claim.number == 0
        claims.requeue(storage, claim, "crashed", "the trainer ended by signal SIGKILL")
    trial = storage.get_trial(claim.trial_id)
    assert trial.state == TrialState.FAIL
    assert trial.user_attrs["failure"] == {
        "kind": "crashed",
        "message": f"the trainer ended by signal SIGKILL; tried {CRASHES + 1} times without getting further",
    }
    assert [attempt.outcome for attempt in attempts_at(storage, claim.trial_id)] == ["crashed"] * (CRASHES + 1)
    assert _claim(storage, study, me).number == 1, "the study goes on"


def test_a_trial_that_gets_further_each_time_is_tried_again_and_again(
    storage: PatientStorage, study: str, me: Owner
) -> None:
    for epoch in range(1, 2 * CRASHES + 1):
        claim = _claim(storage, study, me)
        claims.record_epochs(storage, claim, {epoch: 0.5})
        claims.requeue(storage, claim, "crashed", "the machine was taken away")
    for attempt in range(CRASHES):
        assert storage.get_trial(claim.trial_id).state == TrialState.WAITING, attempt
        claim = _claim(storage, study, me)
        claims.requeue(storage, claim, "crashed", "and now for another reason")
    trial = storage.get_trial(claim.trial_id)
    assert trial.state == TrialState.FAIL
    assert trial.user_attrs["failure"]["message"].endswith(f"tried {CRASHES + 1} times without getting further")
    epochs = [attempt.epoch for attempt in attempts_at(storage, claim.trial_id)]
    assert epochs == [1, 2, 3, 4, 5, 6, 0, 0, 0], "each attempt has its own last epoch"


def test_a_trial_that_loses_its_workers_has_a_larger_limit_of_its_own(
    storage: PatientStorage, study: str, me: Owner, dead: Owner
) -> None:
    """A few machines that were taken away, or a few kills, say nothing about a trial."""
    for _ in range(CRASHES):
        claims.requeue(storage, _claim(storage, study, me), "crashed", "the trainer ended by signal SIGKILL")
    for _ in range(LOSSES + 1):
        claim = _claim(storage, study, dead)
        assert claim.number == 0
    assert _claim(storage, study, me).number == 1
    assert storage.get_trial(claim.trial_id).user_attrs["failure"] == {
        "kind": "lost",
        "message": f"process {dead.pid} on {dead.host} ended; tried {LOSSES + 1} times without getting further",
    }


def test_interruptions_are_not_held_against_a_trial(storage: PatientStorage, study: str, me: Owner) -> None:
    for _ in range(CRASHES + 3):
        claim = _claim(storage, study, me)
        claims.requeue(storage, claim, "interrupted", "asked to stop")
    assert _claim(storage, study, me).attempt == CRASHES + 4


def test_a_claim_whose_answer_was_lost_is_found_again(
    storage: PatientStorage, study: str, me: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection breaks between the commit and its answer, and the claim is made again."""
    for waiting in (False, True):
        with monkeypatch.context() as patched:
            patched.setattr(claims, "write", _twice)
            claim = _claim(storage, study, me)
        assert (claim.number, claim.attempt) == (0, 2 if waiting else 1)
        assert [trial.number for trial in claims.running_trials(storage, claim.study_id)] == [0]
        assert _beat(storage, claim) == "open"
        claims.requeue(storage, claim, "interrupted", "asked to stop")


def test_a_claim_whose_answer_never_came_is_taken_back_by_the_next_one(
    storage: PatientStorage, study: str, me: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The database went away right after the commit, and for longer than it is waited for."""

    def cut(*arguments: Any) -> None:
        transactions.write(*arguments)
        raise StorageError("the database has been away for too long")

    with monkeypatch.context() as patched:
        patched.setattr(claims, "write", cut)
        with pytest.raises(StorageError, match="away for too long"):
            _claim(storage, study, me)
    again = _claim(storage, study, me)
    assert (again.number, again.attempt) == (0, 2)
    first, _ = attempts_at(storage, again.trial_id)
    assert first.outcome == "lost"


def _twice(storage: PatientStorage, study: str | None, work: Callable[[Any], Any]) -> Any:
    transactions.write(storage, study, work)
    return transactions.write(storage, study, work)


def test_the_oldest_waiting_trial_is_taken_first(storage: PatientStorage, study: str, me: Owner) -> None:
    first, second, third = (_claim(storage, study, me) for _ in range(3))
    claims.requeue(storage, third, "interrupted", "")
    claims.requeue(storage, first, "interrupted", "")
    assert [_claim(storage, study, me).number for _ in range(3)] == [0, 2, 3]
    _finish(storage, second)


# --- the heartbeat ----------------------------------------------------------------------------------------


def test_a_heartbeat_survives_beats_that_fail(
    storage: PatientStorage, study: str, me: Owner, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    claim = _claim(storage, study, me)
    results: list[str] = []
    real = claims.beat

    def beat(storage: PatientStorage, slots: Any, held: list[Claim], closed: Any) -> Any:
        results.append("tried")
        if len(results) <= 2:
            raise (StorageError if len(results) == 1 else KeyError)("the database is away")
        states = real(storage, slots, held, closed)
        results.append("beaten")
        return states

    monkeypatch.setattr(claims, "beat", beat)
    heartbeat = Heartbeat(storage, 0.02, [Slot(device=cpu())])
    with caplog.at_level(logging.WARNING), heartbeat.of(claim) as pulse, heartbeat:
        deadline = time.monotonic() + 30
        while "beaten" not in results and time.monotonic() < deadline:
            time.sleep(0.02)
    assert results[:4] == ["tried", "tried", "tried", "beaten"]
    assert not pulse.lost
    assert caplog.text.count("a heartbeat failed, and is sent again in 0 s: ") == 2
    assert transactions.read(storage, slots.present) == [], "a worker that leaves takes its slots off the list"


def test_a_heartbeat_notices_a_lost_claim(storage: PatientStorage, study: str, me: Owner, dead: Owner) -> None:
    slept = _claim(storage, study, dead)
    _claim(storage, study, me)
    held = _claim(storage, study, me)
    heartbeat = Heartbeat(storage, 0.02, [])
    with heartbeat.of(slept) as pulse, heartbeat.of(held) as other, heartbeat:
        deadline = time.monotonic() + 30
        while not pulse.lost and time.monotonic() < deadline:
            time.sleep(0.02)
    assert pulse.lost
    assert not other.lost


def test_what_a_worker_gave_up_is_taken_back_though_its_process_goes_on(
    storage: PatientStorage, study: str, me: Owner
) -> None:
    """In a notebook a worker may end by any error: nobody would take its trial back before the kernel ends."""
    claim, other = _claim(storage, study, me), replace(me, slot="cpu:1")
    heartbeat = Heartbeat(storage, 60.0, [])
    with heartbeat.of(claim):
        assert _claim(storage, study, other).number == 1, "it holds trial 0"
    again = _claim(storage, study, me)
    assert (again.number, again.attempt) == (0, 2)
    (first, _) = attempts_at(storage, claim.trial_id)
    assert first.outcome == "lost"
    assert first.reason == f"the worker in process {me.pid} on {me.host} ended, though the process goes on"
    with pytest.raises(ClaimLost):
        claims.finish(storage, claim, TrialState.COMPLETE, 0.9, {})


# --- many processes ---------------------------------------------------------------------------------------


def _work(url: str, study: str, seed: int, go: Event) -> None:
    """Claims and ends trials until nothing is left, in all the ways that a trial may end."""
    storage = database.connect(url)
    me = owners.this_slot(f"cpu:{seed}")
    dice = random.Random(seed)
    go.wait()
    while not ledger.find(storage, study).has_ended:
        claim = claims.claim(storage, ledger.find(storage, study), me, GRACE)
        if claim is None:
            time.sleep(0.01)
            continue
        claims.record_epochs(storage, claim, {1: dice.random()})
        time.sleep(dice.random() * 0.02)
        ending = dice.randrange(4)
        if ending == 0:
            claims.requeue(storage, claim, "interrupted", "for the test")
        elif ending == 1:
            claims.finish(storage, claim, TrialState.FAIL, None, {"failure": {"kind": "test", "message": ""}})
        else:
            claims.finish(storage, claim, TrialState.COMPLETE, dice.random(), {})


@pytest.mark.long
def test_many_processes_some_of_them_killed_spend_exactly_the_budget(
    storage: PatientStorage, trivial: Definition
) -> None:
    wanted = trivial.model_copy(update={"budget": trivial.budget.model_copy(update={"trials": 60})})
    registry.create(wanted, storage, {"fingerprint": "0" * 16})
    url = storage.url
    study_id = registry.find(wanted.name, storage).id
    context = multiprocessing.get_context("spawn")
    go = context.Event()
    dice = random.Random(1)

    def start(seed: int) -> "multiprocessing.context.SpawnProcess":
        process = context.Process(target=_work, args=(url, wanted.name, seed, go))
        process.start()
        return process

    processes = [start(seed) for seed in range(4)]
    go.set()
    killed = 0
    while killed < 4:
        finished = ledger.counts(storage, study_id).finished
        assert finished < 60, "the study ended before anybody was killed: give it more trials"
        if finished < 5 + killed * 8:
            time.sleep(0.01)
            continue
        victim = dice.randrange(len(processes))
        pid = processes[victim].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        processes[victim].join()
        killed += 1
        processes[victim] = start(10 + killed)
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    counts = ledger.counts(storage, study_id)
    assert counts.finished == 60
    assert (counts.running, counts.waiting) == (0, 0)
    assert promises.check(storage) == []
    assert database.check(storage) == []
    trials = storage.get_all_trials(study_id)
    assert [trial.number for trial in trials] == list(range(60))
    for trial in trials:
        *earlier, last = attempts_at(storage, trial._trial_id)
        assert last.outcome == "finished" or trial.user_attrs["failure"]["kind"] == "lost"
        assert {attempt.outcome for attempt in earlier} <= {"interrupted", "lost"}


CRASH = """
import os, sys
import sqlalchemy
from storage import claims, database, ledger, owners

url, study, statement = sys.argv[1], sys.argv[2], int(sys.argv[3])
storage = database.connect(url)
changes = 0

def counted(connection, cursor, text, *rest):
    global changes
    if text.startswith(("INSERT", "UPDATE", "DELETE")):
        if changes == statement:
            os.kill(os.getpid(), 9)
        changes += 1

def committing(connection):
    if statement == 99:
        os.kill(os.getpid(), 9)

sqlalchemy.event.listen(storage.engine, "before_cursor_execute", counted)
sqlalchemy.event.listen(storage.engine, "commit", committing)
claims.claim(storage, ledger.find(storage, study), owners.this_slot("cpu:0"), 60.0)
print(changes)
os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("statement", [0, 1, 99, 100])
def test_a_crash_at_any_line_of_a_claim_strands_nothing(
    storage: PatientStorage, study: str, me: Owner, statement: int
) -> None:
    """SIGKILL before the claim's first change, between any two, before its commit, and after it."""
    command = [sys.executable, "-c", CRASH, storage.url, study, str(statement)]
    result = subprocess.run(command, check=False, timeout=60, stdout=subprocess.PIPE, text=True)
    assert result.returncode == -signal.SIGKILL
    if statement < 99:
        assert result.stdout == "", "a claim has fewer changes than this: all are tested"
    assert promises.check(storage) == []
    numbers = []
    while (claim := claims.claim(storage, ledger.find(storage, study), me, GRACE)) is not None:
        numbers.append(claim.number)
        _finish(storage, claim)
    assert numbers == [0, 1, 2, 3, 4]
    assert ledger.counts(storage, registry.find(study, storage).id).finished == 5


# --- what is wanted of a study ----------------------------------------------------------------------------


def test_a_paused_study_gives_no_trial_and_tells_those_that_run(storage: PatientStorage, study: str, me: Owner) -> None:
    claim = _claim(storage, study, me)
    assert _beat(storage, claim) == "open"
    registry.pause(study, storage)
    assert _beat(storage, claim) == "paused"
    assert claims.record_epochs(storage, claim, {1: 0.5}) == "paused"
    claims.requeue(storage, claim, "interrupted", "the study was paused")
    assert claims.claim(storage, ledger.find(storage, study), me, GRACE) is None
    assert not ledger.find(storage, study).has_ended
    registry.resume(study, storage)
    assert _claim(storage, study, me).number == 0


def test_a_stopped_study_has_ended_once_nothing_runs(storage: PatientStorage, study: str, me: Owner) -> None:
    _finish(storage, _claim(storage, study, me))
    claim = _claim(storage, study, me)
    registry.stop(study, storage)
    assert not ledger.find(storage, study).has_ended
    claims.requeue(storage, claim, "interrupted", "the study was stopped")
    assert ledger.find(storage, study).has_ended
    assert claims.claim(storage, ledger.find(storage, study), me, GRACE) is None


def test_what_a_checkpoint_has_and_the_database_lacks_is_written_at_once(
    storage: PatientStorage, study: str, me: Owner
) -> None:
    claim = _claim(storage, study, me)
    claims.record_epochs(storage, claim, {1: 0.1})
    claims.record_epochs(storage, claim, {4: 0.9})  # of an attempt that got further than its checkpoint
    claims.record_epochs(storage, claim, {1: 0.1, 2: 0.2, 3: 0.3}, resumed_after=3)
    trial = storage.get_trial(claim.trial_id)
    assert trial.intermediate_values == {1: 0.1, 2: 0.2, 3: 0.3}
    (attempt,) = attempts_at(storage, claim.trial_id)
    assert (attempt.resumed_after, attempt.epoch) == (3, 3)


def test_a_trial_that_starts_over_keeps_no_value_of_an_attempt_that_got_further(
    storage: PatientStorage, study: str, me: Owner
) -> None:
    claim = _claim(storage, study, me)
    for epoch in (1, 2, 3):
        claims.record_epochs(storage, claim, {epoch: 0.9})
    claims.requeue(storage, claim, "interrupted", "the checkpoint was lost with its machine")
    again = _claim(storage, study, me)
    claims.record_epochs(storage, again, {1: 0.4})
    assert storage.get_trial(again.trial_id).intermediate_values == {1: 0.4}


def test_a_finish_that_came_through_unheard_is_done_once(storage: PatientStorage, study: str, me: Owner) -> None:
    claim = _claim(storage, study, me)
    for _ in range(2):
        claims.finish(storage, claim, TrialState.COMPLETE, 0.5, {"epochs": 2})
    trial = storage.get_trial(claim.trial_id)
    assert (trial.state, trial.values, trial.user_attrs["epochs"]) == (TrialState.COMPLETE, [0.5], 2)


@pytest.mark.parametrize("outcome", ["interrupted", "crashed"])
def test_a_requeue_that_came_through_unheard_is_done_once(
    storage: PatientStorage, study: str, me: Owner, elsewhere: Owner, outcome: Literal["interrupted", "crashed"]
) -> None:
    claim = _claim(storage, study, me)
    claims.requeue(storage, claim, outcome, "the reason")
    claims.requeue(storage, claim, outcome, "the reason")
    (attempt,) = attempts_at(storage, claim.trial_id)
    assert (attempt.outcome, storage.get_trial(claim.trial_id).state) == (outcome, TrialState.WAITING)
    other = _claim(storage, study, elsewhere)
    claims.requeue(storage, claim, outcome, "the reason")
    assert storage.get_trial(claim.trial_id).state == TrialState.RUNNING, "the trial is another worker's by now"
    assert _beat(storage, other) == "open"
    with pytest.raises(ClaimLost):
        claims.finish(storage, claim, TrialState.COMPLETE, 0.5, {})


# --- the workers that are there ---------------------------------------------------------------------------


def _offered(storage: PatientStorage, claim: Claim) -> list[str]:
    """The trial's files, as Optuna itself lists its artifacts."""
    trial = storage.get_trial(claim.trial_id)
    return sorted(one.filename for one in get_all_artifact_meta(study_or_trial=trial, storage=storage))


def test_a_trial_s_files_are_optuna_s_artifacts_while_they_are_there(
    storage: PatientStorage, study: str, me: Owner, dead: Owner
) -> None:
    claim = _claim(storage, study, dead)
    storage.set_trial_system_attr(claim.trial_id, "artifacts:own", json.dumps(OWN_ARTIFACT))
    claims.record_epochs(storage, claim, {1: 0.5}, [CHECKPOINT])
    assert _offered(storage, claim) == [CHECKPOINT, "own.txt"]
    claims.record_epochs(storage, claim, {2: 0.6})
    claim = _claim(storage, study, me)  # after the death
    assert (claim.number, claim.attempt) == (0, 2)
    assert _offered(storage, claim) == [CHECKPOINT, "own.txt"]
    claims.requeue(storage, claim, "interrupted", "", [CHECKPOINT, HISTORY])
    assert _offered(storage, claim) == [CHECKPOINT, HISTORY, "own.txt"]
    claim = _claim(storage, study, me)
    claims.record_epochs(storage, claim, {1: 0.5}, [CHECKPOINT], resumed_after=1)
    claims.finish(storage, claim, TrialState.COMPLETE, 0.7, {}, [MODEL, HISTORY])
    assert _offered(storage, claim) == [HISTORY, MODEL, "own.txt"]
    other = _claim(storage, study, me)
    claims.record_epochs(storage, other, {1: 0.5}, [CHECKPOINT])
    claims.finish(storage, other, TrialState.FAIL, None, {})
    assert _offered(storage, other) == []


def test_all_studies_are_seen_in_two_statements(storage: PatientStorage, study: str, me: Owner) -> None:
    optuna.create_study(storage=storage, study_name="somebody's own")
    registry.create(parse(OTHER), storage, {"fingerprint": "1" * 16})
    ledger.set_state(storage, ledger.find(storage, "other"), "paused")
    texts: list[str] = []
    sqlalchemy.event.listen(storage.engine, "before_cursor_execute", lambda *arguments: texts.append(arguments[2]))
    first, second = ledger.studies(storage)
    assert len([text for text in texts if text.startswith("SELECT")]) == 2
    assert (first.name, first.budget.trials, first.state) == (study, 5, "open")
    assert (second.name, second.budget.trials, second.state) == ("other", 2, "paused")
    again = [ledger.find(storage, name) for name in (study, "other")]
    assert [replace(found, read_at=first.read_at) for found in (first, second)] == [
        replace(found, read_at=first.read_at) for found in again
    ]
    assert first.incarnation != second.incarnation
    ledger.raise_budget(storage, ledger.find(storage, study), Budget(trials=6, hours=None))
    assert ledger.studies(storage)[0] != first


def test_workers_are_listed_with_what_they_do_until_they_leave(
    storage: PatientStorage, study: str, me: Owner, dead: Owner, elsewhere: Owner
) -> None:
    _finish(storage, _claim(storage, study, me))
    claim = _claim(storage, study, me)
    claims.record_epochs(storage, claim, {1: 0.5, 2: 0.6})
    for _ in range(2):
        claims.beat(storage, {me: "Some Processor", dead: "Some Processor", elsewhere: "Some GPU"}, [])
    there, mine = sorted(transactions.read(storage, slots.present), key=lambda slot: slot.study or "")
    assert (mine.slot, mine.device, mine.study, mine.trial, mine.epoch) == ("cpu:0", "Some Processor", study, 1, 2)
    assert (there.host, there.study, there.trial, there.epoch) == ("another", None, None, None)
    assert 0 <= mine.silent_seconds < GRACE
    transactions.write(storage, None, lambda connection: slots.remove(connection, [me, elsewhere]))
    assert transactions.read(storage, slots.present) == []


# --- imported trials --------------------------------------------------------------------------------------


def _results(*values: float) -> list[Imported]:
    rate = optuna.distributions.FloatDistribution(0.0, 0.7)
    return [Imported(value=value, params={"dropout": (rate, 0.1)}, attributes={"label": "by hand"}) for value in values]


def test_imported_trials_stand_beside_the_budget(storage: PatientStorage, study: str, me: Owner) -> None:
    running = _claim(storage, study, me)
    assert ledger.import_trials(storage, ledger.find(storage, study), _results(0.8, 0.9)) == 2
    assert ledger.find(storage, study).budget == Budget(trials=5, hours=None, imported=2)
    _finish(storage, running)
    numbers = []
    while (claim := claims.claim(storage, ledger.find(storage, study), me, GRACE)) is not None:
        numbers.append(claim.number)
        _finish(storage, claim)
    assert numbers == [3, 4, 5, 6]
    assert ledger.find(storage, study).has_ended
    assert ledger.counts(storage, running.study_id).complete == 7
    assert promises.check(storage) == []
    ledger.raise_budget(storage, ledger.find(storage, study), Budget(trials=6, hours=None))
    assert ledger.find(storage, study).budget == Budget(trials=6, hours=None, imported=2)
    smaller = ledger.raise_budget(storage, ledger.find(storage, study), Budget(trials=4, hours=None))
    assert smaller == Budget(trials=6, hours=None, imported=2)


def test_an_import_whose_answer_was_lost_is_not_done_twice(storage: PatientStorage, study: str) -> None:
    assert ledger.import_trials(storage, ledger.find(storage, study), _results(0.8, 0.8, 0.9)) == 3
    assert ledger.import_trials(storage, ledger.find(storage, study), _results(0.8, 0.8, 0.9)) == 0
    assert ledger.counts(storage, registry.find(study, storage).id).complete == 3
    assert promises.check(storage) == []


def test_optuna_reads_imported_trials_as_its_own(storage: PatientStorage, study: str) -> None:
    ledger.import_trials(storage, ledger.find(storage, study), _results(0.8))
    (trial,) = optuna.load_study(study_name=study, storage=storage).trials
    assert (trial.number, trial.state, trial.values) == (0, TrialState.COMPLETE, [0.8])
    assert trial.params == {"dropout": 0.1}
    assert (trial.user_attrs["imported"], trial.user_attrs["label"]) == (True, "by hand")
    assert trial.datetime_start is not None
    assert trial.duration is not None


def test_hours_are_counted_from_the_first_trial_that_ran_here(storage: PatientStorage, study: str, me: Owner) -> None:
    ledger.import_trials(storage, ledger.find(storage, study), _results(0.8))
    storage.set_study_user_attr(
        ledger.find(storage, study).id, "trialyard:budget", asdict(Budget(trials=5, hours=1.0, imported=1))
    )
    _finish(storage, _claim(storage, study, me))
    assert not ledger.find(storage, study).has_ended
    with storage.engine.begin() as connection:
        connection.execute(attempt_table.table.update().values(began=datetime(2020, 1, 1)))
    assert ledger.find(storage, study).has_ended
    assert claims.claim(storage, ledger.find(storage, study), me, GRACE) is None


def test_a_budget_that_forgot_an_import_is_noticed(storage: PatientStorage, study: str) -> None:
    ledger.import_trials(storage, ledger.find(storage, study), _results(0.8))
    with storage.engine.begin() as connection:
        connection.exec_driver_sql(
            'UPDATE study_user_attributes SET value_json = \'{"trials": 5, "hours": null}\' '
            "WHERE key = 'trialyard:budget'"
        )
    assert promises.check(storage) == [f"study {study}: 1 imported trial, and its budget says 0"]


def test_an_unreadable_state_of_one_study_stops_no_heartbeat(
    storage: PatientStorage, study: str, me: Owner, caplog: pytest.LogCaptureFixture
) -> None:
    registry.create(parse(OTHER), storage, {"fingerprint": "1" * 16})
    claim, other = _claim(storage, study, me), _claim(storage, "other", replace(me, slot="cpu:1"))
    storage.set_study_user_attr(other.study_id, "trialyard:state", 4)
    assert claims.beat(storage, {}, [claim, other]) == {claim: "open", other: "paused"}
    assert "study 'other' is not readable" in caplog.text


def test_a_trial_that_somebody_asked_for_at_the_same_moment_is_left_to_him(
    storage: PatientStorage, study: str, me: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain Optuna does not take our lock."""
    claims.requeue(storage, _claim(storage, study, me), "interrupted", "asked to stop")
    start = claims.start_waiting

    def late(connection: Any, trial_id: int) -> bool:
        connection.execute(sqlalchemy.update(TrialModel).values(state=TrialState.RUNNING))
        return bool(start(connection, trial_id))

    monkeypatch.setattr(claims, "start_waiting", late)
    assert claims.claim(storage, ledger.find(storage, study), me, GRACE) is None


def test_reasons_with_text_that_a_database_refuses_are_kept(either_url: str, trivial: Definition, me: Owner) -> None:
    opened = database.create(either_url)
    registry.create(trivial, opened, {"fingerprint": "0" * 16})
    claim = claims.claim(opened, ledger.find(opened, "trivial"), me, 60.0)
    assert claim is not None
    reason = "the trainer ended: see caf\udce9/log\0"
    claims.requeue(opened, claim, "crashed", reason)
    (attempt,) = attempts_at(opened, claim.trial_id)
    assert attempt.reason == r"the trainer ended: see caf\udce9/log\0"
    transactions.write(opened, "none", lambda connection: slots.beat(connection, {me: "CPU"}, {me: reason}))
    assert [slot.closed for slot in transactions.read(opened, slots.present)] == [attempt.reason]
    opened.engine.dispose()


def test_the_time_of_an_attempt_that_was_lost_ends_with_its_last_heartbeat(
    storage: PatientStorage, study: str, me: Owner
) -> None:
    """Its end is noticed when somebody takes the trial back, maybe on the next day."""
    began = datetime(2026, 1, 2)
    for attempt in (1, 2):
        claim = _claim(storage, study, me)
        if attempt == 1:
            claims.requeue(storage, claim, "interrupted", "a test")
            times = {"outcome": "lost", "beat": began + timedelta(seconds=60), "ended": began + timedelta(hours=12)}
        else:
            _finish(storage, claim)
            times = {"ended": began + timedelta(seconds=30)}
        with storage.engine.begin() as connection:
            attempt_table.change(connection, claim.trial_id, attempt, began=began, **times)
    with storage.engine.connect() as connection:
        assert attempt_table.durations(connection, claim.study_id, 50) == [90.0]
        assert attempt_table.spent(connection, claim.study_id) == {claim.trial_id: (0, 90.0)}
