"""The publisher of a worker that runs for months neither repeats what cannot succeed, nor holds what it published."""

import itertools
import logging
from pathlib import Path
from typing import Any

import pytest
from conftest import Clock
from optuna.trial import TrialState

from search import publisher as publisher_module
from search.publisher import LONGEST_PAUSE_SECONDS, UNUSED_SECONDS, Publisher
from storage import claims, ledger
from storage.owners import Owner
from storage.transactions import PatientStorage
from studies import notes, registry
from studies.definition import Definition


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of the publisher."""
    moved = Clock()
    monkeypatch.setattr(publisher_module, "time", moved)
    return moved


@pytest.fixture
def publisher(storage: PatientStorage, tmp_path: Path) -> Publisher:
    """A publisher whose thread does not run: the test looks in its place."""
    return Publisher(storage, tmp_path / "artifacts")


def _end(storage: PatientStorage, publisher: Publisher, study: str, me: Owner) -> None:
    claim = claims.claim(storage, ledger.find(storage, study), me, 60.0)
    assert claim is not None
    claims.finish(storage, claim, TrialState.FAIL, None, {"failure": {"kind": "nan", "message": "the loss became nan"}})
    publisher.ended(claim, storage.get_trial(claim.trial_id))


def test_a_study_that_is_deleted_before_it_was_published_is_forgotten(
    storage: PatientStorage, study: str, me: Owner, publisher: Publisher, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    _end(storage, publisher, study, me)
    publisher._look()
    _end(storage, publisher, study, me)
    publisher._look()
    assert (set(publisher._due), set(publisher._caches)) == ({study}, {study}), "it is not its turn yet"
    registry.delete(study, storage)
    clock.now += notes.PAUSE_SECONDS
    publisher._look()
    assert (publisher._due, publisher._caches, publisher._failures, caplog.text) == ({}, {}, {}, "")


def test_an_error_that_stays_is_said_once_and_tried_less_and_less_often(
    storage: PatientStorage,
    study: str,
    me: Owner,
    publisher: Publisher,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    problem, attempts = "a figure that cannot be drawn", list[float]()

    def broken(*_: Any, **__: Any) -> bool:
        attempts.append(clock.now)
        if not problem:
            return True
        raise ZeroDivisionError(problem)

    monkeypatch.setattr(notes, "publish", broken)
    _end(storage, publisher, study, me)
    with caplog.at_level(logging.WARNING):
        for _ in range(2400):
            publisher._look()
            clock.now += 1.0
    pauses = [later - earlier for earlier, later in itertools.pairwise(attempts)]
    assert pauses == [10.0, 20.0, 40.0, 80.0, 160.0, 320.0, LONGEST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS]
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [f"the notes and figures of study {study} were not written: {problem}"]
    problem = "another one"
    clock.now += LONGEST_PAUSE_SECONDS
    publisher._look()
    assert caplog.records[-1].getMessage().endswith("another one")
    problem = ""
    clock.now += LONGEST_PAUSE_SECONDS
    publisher._look()
    assert (publisher._due, publisher._failures) == ({}, {})


def test_the_trials_of_a_study_that_has_ended_are_held_no_longer(
    storage: PatientStorage, study: str, trivial: Definition, me: Owner, publisher: Publisher, clock: Clock
) -> None:
    registry.create(trivial.model_copy(update={"name": "other"}), storage, {"fingerprint": "0" * 16})
    _end(storage, publisher, study, me)
    _end(storage, publisher, "other", me)
    publisher._look()
    assert set(publisher._caches) == {study, "other"}
    for _ in range(4):
        _end(storage, publisher, study, me)
    assert publisher._publish(study, last=True) is None
    assert set(publisher._caches) == {"other"}
    clock.now += UNUSED_SECONDS
    publisher._look()
    assert publisher._caches == {}, "its last trials may run elsewhere"
