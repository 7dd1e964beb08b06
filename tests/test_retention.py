"""The best models and all histories are kept, and no file that a trial needs is ever removed."""

import contextlib
import multiprocessing
import os
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import optuna
import pytest
from conftest import MODEL_PATH, Call
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from locked_folder import locked
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from sqlalchemy import func, select

import studies
from storage import artifacts, attempt_table, claims, database, ledger, owners, retention
from storage.artifact_store import FolderStore, Stored
from storage.artifacts import CHECKPOINT, HISTORY, MISTAKES_PICTURE, MODEL, SUMMARY, WITH_MODEL
from storage.claims import Claim
from storage.errors import StorageError, StudyGone
from storage.ledger import Budget
from storage.owners import Owner
from storage.ranking import ranked
from storage.tables import BaseModel, set_trial_attributes
from storage.transactions import PatientStorage, read
from studies import registry, results
from studies.definition import Definition
from studies.imported import import_trials

COMPLETE, PRUNED, FAIL = TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL
TEMPORARY = f".{'0' * 32}-{MODEL}"
TWICE_TEMPORARY = f".{'1' * 32}-{TEMPORARY}"  # of a file that was copied under a temporary name


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The artifacts folder."""
    return tmp_path / "artifacts"


def _write(root: Path, folder: PurePosixPath | str, *names: str) -> None:
    (root / folder).mkdir(parents=True, exist_ok=True)
    for name in names:
        (root / folder / name).write_bytes(b"x" * 100)


def _claim(storage: RDBStorage, study: str, me: Owner) -> Claim:
    claim = claims.claim(storage, ledger.find(storage, study), me, 60.0)
    assert claim is not None
    return claim


def _end(storage: RDBStorage, root: Path, claim: Claim, state: TrialState, value: float | None) -> None:
    """As a worker ends a trial, its files written before."""
    recorded: dict[str, Any] = {"history": str(claim.folder / HISTORY)}
    _write(root, claim.folder, HISTORY)
    if state == COMPLETE:
        recorded["model"] = str(claim.folder / MODEL)
        _write(root, claim.folder, MODEL, *WITH_MODEL)
    files = [MODEL, HISTORY, MISTAKES_PICTURE] if state == COMPLETE else [HISTORY]
    claims.finish(storage, claim, state, value, recorded, files)


def _trial(storage: RDBStorage, root: Path, study: str, me: Owner, value: float, keep: int = 2) -> Claim:
    claim = _claim(storage, study, me)
    _end(storage, root, claim, COMPLETE, value)
    retention.trim(storage, claim, root, keep)
    return claim


def _files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def _offered(storage: RDBStorage, study: str, name: str) -> set[int]:
    """The numbers of the trials whose file `name` optuna-dashboard offers."""
    return {
        trial.number
        for trial in storage.get_all_trials(registry.find(study, storage).id)
        for one in optuna.artifacts.get_all_artifact_meta(study_or_trial=trial, storage=storage)
        if one.filename == name
    }


def _models(root: Path) -> set[int]:
    return {int(path.parent.parent.name) for path in root.rglob(MODEL)}


# --- while workers work -----------------------------------------------------------------------------------


def _failed_with_a_history(storage: RDBStorage, study: str, root: Path, me: Owner) -> Claim:
    """A failed trial with a file that it does not name."""
    claim = _claim(storage, study, me)
    claims.finish(storage, claim, FAIL, None, {})
    _write(root, claim.folder, HISTORY)
    return claim


@examples(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(st.sampled_from([0.1, 0.5, 0.5, 0.7, 0.9]), min_size=1, max_size=8), keep=st.integers(1, 4))
def test_only_the_best_models_and_all_histories_are_kept(
    storage: RDBStorage, trivial: Definition, root: Path, me: Owner, values: list[float], keep: int
) -> None:
    name = f"s{time.monotonic_ns()}"
    registry.create(trivial.model_copy(update={"name": name}), storage, {"fingerprint": "0" * 16})
    ledger.raise_budget(storage, ledger.find(storage, name), Budget(trials=100, hours=None))
    for value in values:
        _trial(storage, root, name, me, value, keep)
    best = sorted(range(len(values)), key=lambda number: (-values[number], number))[:keep]
    assert {int(path.parent.parent.name) for path in root.glob(f"{name}-*/*/*/{MODEL}")} == set(best)
    assert _offered(storage, name, MODEL) == _offered(storage, name, MISTAKES_PICTURE) == set(best)
    assert _offered(storage, name, HISTORY) == set(range(len(values)))
    histories = {int(path.parent.parent.name) for path in root.glob(f"{name}-*/*/*/{HISTORY}")}
    assert histories == set(range(len(values)))


def _race(url: str, root: Path, study: str, slot: int, trials: int) -> None:
    storage, me = database.connect(url, patience=60.0), owners.this_slot(f"cpu:{slot}")
    for _ in range(trials):
        claim = _claim(storage, study, me)
        _trial_value = (claim.number * 7919 % 101) / 101
        _end(storage, root, claim, COMPLETE, _trial_value)
        retention.trim(storage, claim, root, 3)


@pytest.mark.long
def test_many_workers_at_once_keep_the_best(either_url: str, trivial: Definition, root: Path) -> None:
    storage = database.create(either_url)
    registry.create(trivial, storage, {"fingerprint": "0" * 16})
    ledger.raise_budget(storage, ledger.find(storage, trivial.name), Budget(trials=100, hours=None))
    context = multiprocessing.get_context("spawn")
    racers = [context.Process(target=_race, args=(either_url, root, trivial.name, slot, 10)) for slot in range(4)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
        assert racer.exitcode == 0
    values = {number: (number * 7919 % 101) / 101 for number in range(40)}
    best = set(sorted(values, key=lambda number: -values[number])[:3])
    assert _models(root) == _offered(storage, trivial.name, MODEL) == best
    assert len(list(root.rglob(HISTORY))) == 40
    storage.engine.dispose()


def test_the_model_of_a_killed_worker_is_removed_after_the_next_trial(
    storage: RDBStorage, study: str, root: Path, me: Owner
) -> None:
    for value in (0.1, 0.3, 0.2):
        _end(storage, root, _claim(storage, study, me), COMPLETE, value)  # and no trim
    _trial(storage, root, study, me, 0.9)
    assert _models(root) == {1, 3}


def test_imported_results_do_not_count_as_kept_models(storage: RDBStorage, study: str, root: Path, me: Owner) -> None:
    import_trials(study, [{"dropout": 0.1 * n, "accuracy": 0.99} for n in range(3)], storage)
    numbers = [_trial(storage, root, study, me, value).number for value in (0.5, 0.7, 0.6)]
    assert _models(root) == {numbers[1], numbers[2]}
    assert retention.unneeded(storage, root, 2) == []


def test_the_model_of_a_running_trial_is_kept(storage: RDBStorage, study: str, root: Path, me: Owner) -> None:
    running = _claim(storage, study, me)
    _write(root, running.folder, MODEL, HISTORY)  # written, and not yet recorded
    for value in (0.7, 0.8, 0.9):
        _trial(storage, root, study, me, value, keep=1)
    assert _models(root) == {running.number, 3}


def test_the_best_with_a_model_are_found_behind_many_without(
    storage: RDBStorage, trivial: Definition, me: Owner
) -> None:
    wanted = trivial.model_copy(update={"budget": trivial.budget.model_copy(update={"trials": 30})})
    found = registry.create(wanted, storage, {"fingerprint": "0" * 16}).study
    with_model = {3: 0.1, 7: 0.3, 29: 0.2}
    for number in range(30):
        claim = _claim(storage, found.name, me)
        attributes = {"model": str(claim.folder / MODEL)} if number in with_model else {}
        claims.finish(storage, claim, COMPLETE, with_model.get(number, 0.5 + number / 100), attributes)

    def best(top: int | None, *, with_model: bool) -> list[int]:
        return [
            trial.number
            for trial in read(storage, lambda connection: ranked(connection, found.id, top, with_model=with_model))
        ]

    assert [best(top, with_model=True) for top in (1, 2, 3, 4, None)] == [[7], [7, 29], *[[7, 29, 3]] * 3]
    assert best(2, with_model=False) == [28, 27]


def test_an_infeasible_trial_s_model_is_removed(storage: RDBStorage, study: str, root: Path, me: Owner) -> None:
    claim = _claim(storage, study, me)
    storage.set_trial_system_attr(claim.trial_id, "constraints:size", 1.0)
    _end(storage, root, claim, COMPLETE, 0.99)
    retention.trim(storage, claim, root, 2)
    assert _models(root) == set()


def test_a_worker_of_a_deleted_study_removes_no_file_of_its_successor(
    storage: RDBStorage, trivial: Definition, study: str, root: Path, me: Owner
) -> None:
    old = _claim(storage, study, me)
    _end(storage, root, old, COMPLETE, 0.1)
    claims.delete(storage, ledger.find(storage, study), 60.0)
    registry.create(trivial, storage, {"fingerprint": "0" * 16})
    new = _claim(storage, study, me)
    assert (new.study_id, new.trial_id) == (old.study_id, old.trial_id)  # the numbers are used again
    assert new.folder != old.folder
    _write(root, new.folder, MODEL)
    retention.trim(storage, old, root, 1)
    assert (root / new.folder / MODEL).exists()


# --- prune ------------------------------------------------------------------------------------------------


def _backdate(path: Path) -> None:
    long_ago = time.time() - retention.OLD_SECONDS - 60
    os.utime(path, (long_ago, long_ago))


def test_prune_removes_what_no_trial_needs_and_nothing_else(
    storage: RDBStorage, trivial: Definition, study: str, root: Path, me: Owner
) -> None:
    ended = [_claim(storage, study, me) for _ in range(3)]
    for claim, value in zip(ended, (0.1, 0.3, 0.2), strict=True):
        _end(storage, root, claim, COMPLETE, value)
    running, waiting = _claim(storage, study, me), _claim(storage, study, me)
    claims.requeue(storage, waiting, "interrupted", "", [CHECKPOINT])
    claims.record_epochs(storage, running, {1: 0.5}, [CHECKPOINT])
    for claim in (*ended, running, waiting):
        _write(root, claim.folder, CHECKPOINT)
    _write(root, running.folder, MODEL, HISTORY)
    top = running.folder.parent.parent
    _write(root, top / "9" / "1", MODEL, HISTORY)  # of a copy of this database that went on
    _write(root, ended[1].folder.parent / "2", MODEL, HISTORY)  # of an attempt that lost its trial and went on
    _write(root, ended[1].folder, TEMPORARY, TWICE_TEMPORARY)
    _write(root, ended[2].folder, TEMPORARY, "notes.txt")
    for name in (TEMPORARY, TWICE_TEMPORARY):
        _backdate(root / ended[1].folder / name)
    gone = registry.create(trivial.model_copy(update={"name": "gone"}), storage, {"fingerprint": "0" * 16}).study
    deleted = artifacts.attempt_folder("gone", gone.incarnation, 0, 1)
    claims.delete(storage, gone, 60.0)
    _write(root, deleted, MODEL, HISTORY, CHECKPOINT)
    _write(root, "gone/0", MODEL)  # of a study of this name in another database, as older versions kept it
    other = f"{study}-{'0' * 12}"  # of another database's study of the same name
    _write(root, f"{other}/0/1", MODEL, HISTORY, CHECKPOINT)
    _write(root, "photos/0", "holiday.jpg")  # somebody's own, in a folder of such a name
    (root / "photos" / "x").mkdir()
    (root / "photos" / "x" / MODEL).write_bytes(b"y")
    (root / MODEL).write_bytes(b"y")

    listed = retention.unneeded(storage, root, 2)
    reasons = {str(file.path.relative_to(root)): file.why for file in listed}
    assert reasons == {
        **{f"{claim.folder}/{CHECKPOINT}": "the checkpoint of a finished trial" for claim in ended},
        **{f"{ended[0].folder}/{name}": "not among the best 2" for name in (MODEL, *WITH_MODEL)},
        **{f"{ended[1].folder}/{name}": "an old temporary file" for name in (TEMPORARY, TWICE_TEMPORARY)},
        **{f"{ended[1].folder.parent}/2/{name}": "of an attempt that does not count" for name in (MODEL, HISTORY)},
        **{f"{deleted}/{name}": "its study is gone" for name in (MODEL, HISTORY, CHECKPOINT)},
    }
    assert retention.leftovers(storage, root, 5)[1] == ["gone", other]
    before = set(_files(root))
    assert _offered(storage, study, MODEL) == {0, 1, 2}
    assert retention.remove(storage, root, 2, listed) == 100 * len(listed)
    assert _offered(storage, study, MODEL) == _offered(storage, study, MISTAKES_PICTURE) == {1, 2}
    assert _offered(storage, study, CHECKPOINT) == {running.number, waiting.number}
    assert _offered(storage, study, HISTORY) == {0, 1, 2}
    assert before - set(_files(root)) == set(reasons)
    assert not (root / deleted.parts[0]).exists()
    assert (root / "gone" / "0" / MODEL).exists()
    assert (root / top / "9" / "1" / MODEL).exists()
    assert retention.unneeded(storage, root, 2) == []


def test_what_was_listed_is_looked_at_again_before_it_is_removed(
    storage: RDBStorage, study: str, root: Path, me: Owner
) -> None:
    claim = _failed_with_a_history(storage, study, root, me)
    listed = retention.unneeded(storage, root, 5)
    assert [file.why for file in listed] == ["of an attempt that does not count"]
    with storage.engine.begin() as connection:  # while somebody thought about the answer
        set_trial_attributes(connection, claim.trial_id, {"history": str(claim.folder / HISTORY)})
    assert retention.remove(storage, root, 5, listed) == 0
    assert len(_files(root)) == 1


def test_files_that_a_copy_of_the_study_names_stay(storage: RDBStorage, study: str, root: Path, me: Owner) -> None:
    claim = _claim(storage, study, me)
    _end(storage, root, claim, COMPLETE, 0.9)
    _write(root, claim.folder, SUMMARY)
    optuna.copy_study(from_study_name=study, from_storage=storage, to_storage=storage, to_study_name="copy")
    claims.delete(storage, ledger.find(storage, study), 60.0)
    assert retention.unneeded(storage, root, 5) == []


def test_without_an_artifacts_folder_there_is_nothing_to_prune(storage: RDBStorage, root: Path) -> None:
    assert retention.unneeded(storage, root, 5) == []


# --- delete -----------------------------------------------------------------------------------------------


def _rows(storage: RDBStorage) -> dict[str, int]:
    with storage.engine.connect() as connection:
        return {
            table.name: int(connection.execute(select(func.count()).select_from(table)).scalar_one())
            for table in (*BaseModel.metadata.sorted_tables, attempt_table.table)
            if table.name not in ("version_info", "trial_heartbeats")  # heartbeats are in the table of attempts
        }


def test_deletion_leaves_no_row_of_the_study_and_all_of_the_others(
    either_url: str, trivial: Definition, root: Path, me: Owner
) -> None:
    storage = database.create(either_url)
    other = trivial.model_copy(update={"name": "other"})
    registry.create(other, storage, {"fingerprint": "0" * 16})
    _end(storage, root, _claim(storage, "other", me), COMPLETE, 0.5)
    before = _rows(storage)
    registry.create(trivial, storage, {"fingerprint": "0" * 16})
    opened = registry.open(trivial.name, storage)
    for state, value in ((COMPLETE, 0.9), (FAIL, None), (PRUNED, 0.4)):
        claim = _claim(storage, trivial.name, me)
        assert len(opened.trials) > claim.number  # Optuna's cache must have seen it
        optuna.Trial(opened, claim.trial_id).suggest_float("dropout", 0.0, 0.7)
        storage.set_trial_system_attr(claim.trial_id, "key", 1)
        claims.record_epochs(storage, claim, {1: 0.3})
        _end(storage, root, claim, state, value)
    storage.set_study_system_attr(registry.find(trivial.name, storage).id, "dashboard:note", "a note")
    full = _rows(storage)
    assert all(full[name] > before[name] for name in full), full  # so each table had something to be forgotten
    claims.delete(storage, ledger.find(storage, trivial.name), 60.0)
    assert _rows(storage) == before
    assert registry.names(storage) == ["other"]
    assert database.check(storage) == []
    storage.engine.dispose()


def test_what_plain_optuna_deletes_takes_its_attempts_along(either_url: str, trivial: Definition, me: Owner) -> None:
    """A trial to come may have the same id: it must not begin with another trial's attempts."""
    storage = database.create(either_url)
    registry.create(trivial, storage, {"fingerprint": "0" * 16})
    _claim(storage, trivial.name, me)
    assert _rows(storage)["trialyard_attempts"] == 1
    optuna.delete_study(study_name=trivial.name, storage=either_url)
    assert _rows(storage)["trialyard_attempts"] == 0
    registry.create(trivial, storage, {"fingerprint": "0" * 16})
    assert _claim(storage, trivial.name, me).attempt == 1
    storage.engine.dispose()


def test_a_study_that_is_worked_on_is_deleted_only_when_it_was_stopped(
    storage: RDBStorage, study: str, me: Owner
) -> None:
    claim = _claim(storage, study, me)
    before, found = _rows(storage), ledger.find(storage, study)
    with pytest.raises(StorageError, match=r"has 1 running trial: `trialyard stop trivial` first"):
        claims.delete(storage, ledger.find(storage, study), 60.0)
    assert _rows(storage) == before
    ledger.set_state(storage, ledger.find(storage, study), "stopped")
    claims.delete(storage, ledger.find(storage, study), 60.0)
    assert claims.beat(storage, {}, [claim]) == {claim: None}
    with pytest.raises(StudyGone, match="study 'trivial' is gone"):
        claims.claim(storage, found, me, 60.0)


def test_a_trial_whose_worker_is_gone_does_not_prevent_the_deletion(storage: RDBStorage, study: str, me: Owner) -> None:
    _claim(storage, study, Owner(machine=me.machine, host=me.host, pid=me.pid, born=1.0, slot="cpu:1"))
    claims.delete(storage, ledger.find(storage, study), 60.0)
    assert registry.names(storage) == []


def test_a_worker_of_a_deleted_study_claims_no_trial_of_its_successor(
    storage: RDBStorage, trivial: Definition, study: str, me: Owner
) -> None:
    old = ledger.find(storage, study)
    assert claims.claim(storage, old, me, 60.0) is not None
    ledger.set_state(storage, old, "stopped")
    claims.delete(storage, ledger.find(storage, study), 60.0)
    registry.create(trivial, storage, {"fingerprint": "0" * 16})
    with pytest.raises(StudyGone, match="was deleted, and another one made"):
        claims.claim(storage, old, me, 60.0)
    assert ledger.find(storage, study).id == old.id, "this database does not use ids again: the test shows nothing"


def test_delete_removes_the_files_too_and_a_crash_before_leaves_only_files(
    home: Path, trivial: Definition, me: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage: PatientStorage = database.create(f"sqlite:///{home}/yard/studies.db")
    root = home / "yard" / "artifacts"
    for name in ("one", "two"):
        registry.create(trivial.model_copy(update={"name": name}), storage, {"fingerprint": "0" * 16})
        claim = _claim(storage, name, me)
        _end(storage, root, claim, COMPLETE, 0.9)
        _write(root, claim.folder, CHECKPOINT, SUMMARY)
    assert studies.delete("one") == 700
    assert studies.names() == ["two"]
    assert {path.split("-")[0] for path in _files(root)} == {"two"}

    def die(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(retention, "unneeded", die)
        with pytest.raises(KeyboardInterrupt):
            studies.delete("two")
    assert registry.names(storage) == []
    left = retention.unneeded(storage, root, 5)
    assert retention.remove(storage, root, 5, left) == 700
    assert _files(root) == []


# --- other databases and copies ---------------------------------------------------------------------------


def test_the_old_folder_of_another_database_s_study_of_the_same_name_stays(
    storage: RDBStorage, trivial: Definition, study: str, root: Path, me: Owner, tmp_path: Path
) -> None:
    """Versions before 0.2 named folders by the study alone: only a row tells whose the files are."""
    claims.finish(storage, _claim(storage, study, me), FAIL, None, {})
    _write(root, f"{study}/0", MODEL, HISTORY)
    assert retention.unneeded(storage, root, 5) == []
    assert retention.leftovers(storage, root, 5)[1] == [study]
    assert studies.delete(study, storage) == 0
    assert retention.unneeded(storage, root, 5) == []
    owning = database.create(f"sqlite:///{tmp_path}/old.db")
    created = registry.create(trivial, owning, {"fingerprint": "0" * 16}).study
    claim = _claim(owning, study, me)
    claims.finish(owning, claim, COMPLETE, 0.9, {"history": f"{study}/0/{HISTORY}"})
    assert [file.why for file in retention.unneeded(owning, root, 5)] == ["of an attempt that does not count"]
    claims.delete(owning, created, 60.0)
    assert {file.why for file in retention.unneeded(owning, root, 5)} == {"its study is gone"}
    owning.engine.dispose()


def test_a_backup_never_removes_what_the_original_needs(
    storage: PatientStorage, study: str, root: Path, me: Owner, tmp_path: Path
) -> None:
    _end(storage, root, _claim(storage, study, me), COMPLETE, 0.5)
    running = _claim(storage, study, me)
    database.backup(storage, tmp_path / "copy.db")
    _write(root, running.folder, CHECKPOINT)
    _end(storage, root, _claim(storage, study, me), COMPLETE, 0.9)  # after the copy was made
    files = _files(root)
    copy = database.connect(f"sqlite:///{tmp_path}/copy.db")
    assert ledger.find(copy, study).incarnation != ledger.find(storage, study).incarnation
    assert retention.unneeded(copy, root, 5) == []
    assert results.best_trial(study, copy).user_attrs["model"] in files, "a restored backup still finds its files"
    ledger.set_state(copy, ledger.find(copy, study), "stopped")
    claims.delete(copy, ledger.find(copy, study), 60.0)
    assert retention.unneeded(copy, root, 5) == []
    assert _files(root) == files
    copy.engine.dispose()


def test_a_copied_study_keeps_its_models_and_both_can_be_deleted(
    storage: RDBStorage, study: str, root: Path, me: Owner
) -> None:
    first = _trial(storage, root, study, me, 0.5, keep=1)
    optuna.copy_study(from_study_name=study, from_storage=storage, to_storage=storage, to_study_name="copy")
    _trial(storage, root, study, me, 0.9, keep=1)
    assert (root / first.folder / MODEL).exists(), "it is the copy's best"
    for name in (study, "copy"):
        claims.delete(storage, ledger.find(storage, name), 60.0)
    assert registry.names(storage) == []


def test_files_that_cannot_be_removed_are_named_and_the_others_go(
    storage: RDBStorage, study: str, root: Path, me: Owner, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    claim = _claim(storage, study, me)
    claims.finish(storage, claim, FAIL, None, {})
    _write(root, claim.folder, HISTORY, SUMMARY)
    remove = artifacts.remove

    def refused(path: Path) -> None:
        if path.name == HISTORY:
            raise PermissionError(13, "Permission denied")
        remove(path)

    monkeypatch.setattr(artifacts, "remove", refused)
    assert retention.remove(storage, root, 5, retention.unneeded(storage, root, 5)) == 100
    assert f"{root / claim.folder / HISTORY} stays: Permission denied" in caplog.text


@pytest.mark.parametrize("by", ["the next trial", "prune"])
def test_a_model_that_cannot_be_removed_is_not_offered_any_more_and_removed_later(
    storage: RDBStorage, study: str, root: Path, me: Owner, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    def clean() -> None:
        if by == "prune":
            retention.remove(storage, root, 1, retention.unneeded(storage, root, 1))
        else:
            retention.trim(storage, last, root, 1)

    def refused(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    for value in (0.5, 0.9):
        last = _claim(storage, study, me)
        _end(storage, root, last, COMPLETE, value)
    with monkeypatch.context() as patched, contextlib.suppress(PermissionError):
        patched.setattr(artifacts, "remove", refused)
        clean()
    assert _models(root) == {0, 1}
    assert _offered(storage, study, MODEL) == _offered(storage, study, MISTAKES_PICTURE) == {1}
    clean()
    assert _models(root) == {1}


class _Bucket(FolderStore):
    """A folder that lists its files as an object store does: also those that are at its top."""

    def files(self) -> Iterator[Stored]:
        for path in sorted(self.folder.rglob("*")):
            if path.is_file():
                yield Stored(path=PurePosixPath(path.relative_to(self.folder)), size=path.stat().st_size, modified=0.0)


def test_a_file_at_the_top_of_a_bucket_is_somebody_else_s(
    storage: RDBStorage, study: str, root: Path, me: Owner
) -> None:
    claim = _failed_with_a_history(storage, study, root, me)
    _write(root, "", MODEL)
    unneeded, of_others = retention.leftovers(storage, _Bucket(root), 5)
    assert [str(file.file.path) for file in unneeded] == [f"{claim.folder}/{HISTORY}"]
    assert of_others == []


# --- folders of other users -------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_folder_of_another_user_ends_no_command(
    home: Path, finished_study: str, trialyard: Call, depth: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The folder of a study, a trial or an attempt."""
    folder = home.joinpath("yard", "artifacts", *MODEL_PATH.parts[:depth])
    model = f"{home / 'yard' / 'artifacts' / MODEL_PATH}"
    assert model in trialyard("show", finished_study, "0")[1]
    with locked(folder):
        for command in (("best",), ("report",), ("trials",)):
            assert trialyard(*command, finished_study)[0] == 0
        code, out, _ = trialyard("show", finished_study, "0")
        assert (code, model in out) == (0, False)
        code, _, err = trialyard("export", finished_study, "there")
        assert (code, err.startswith("error: ")) == (1, True)
        caplog.clear()
        assert trialyard("storage", "prune")[:2] == (0, f"0 B were freed below {home}/yard/artifacts\n")
    assert [record.getMessage() for record in caplog.records] == [
        f"the files in {folder} are left out: Permission denied"
    ]


def test_delete_looks_into_no_other_study_s_folder(
    home: Path, trivial: Definition, me: Owner, caplog: pytest.LogCaptureFixture
) -> None:
    storage: PatientStorage = database.create(f"sqlite:///{home}/yard/studies.db")
    root = home / "yard" / "artifacts"
    for name in ("one", "two"):
        registry.create(trivial.model_copy(update={"name": name}), storage, {"fingerprint": "0" * 16})
        _end(storage, root, _claim(storage, name, me), COMPLETE, 0.9)
    (folder,) = root.glob("two-*")
    with locked(folder):
        assert studies.delete("one") == 500
        assert caplog.text == ""
        assert studies.delete("two") == 0
        assert f"the files in {folder} are left out: Permission denied" in caplog.text
    assert registry.names(storage) == []
    assert len(retention.unneeded(storage, root, 5)) == len(_files(root)) == 5, "the folder's user can remove them"
