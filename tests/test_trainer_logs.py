"""A trainer's log does not grow for ever, and goes when its worker is gone."""

import os
import subprocess
import time
from pathlib import Path

import pytest
from conftest import Call

import search
from storage import database, settings, slots, trainer_logs, transactions
from storage.owners import Owner
from storage.trainer_logs import SHORTENED, shorten

DAY = 24 * 3600.0


@pytest.fixture
def logs(home: Path) -> Path:
    """The folder of the logs, beside a database without a study."""
    search.create_storage()
    folder = settings.load().log_folder
    folder.mkdir(parents=True)
    return folder


def _write(log: Path, age: float) -> Path:
    log.write_bytes(b"x" * 1500)
    os.utime(log, (time.time() - age,) * 2)
    return log


@pytest.fixture
def gone() -> int:
    """The number of a process that has ended."""
    with subprocess.Popen(["true"]) as process:
        pass
    return process.pid


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_logs, "MOST_BYTES", 1000)
    monkeypatch.setattr(trainer_logs, "KEPT_BYTES", 95)


@pytest.mark.usefixtures("small_limits")
def test_of_a_log_that_is_too_large_the_last_lines_stay(tmp_path: Path) -> None:
    log = tmp_path / "log"
    lines = [f"line {number:04d}\n".encode() for number in range(1000)]
    with log.open("ab", buffering=0) as trainer:
        trainer.write(b"".join(lines))
        shorten(log)
        trainer.write(b"the next trial\n")
        assert log.read_bytes() == SHORTENED + b"".join(lines[-9:]) + b"the next trial\n"
        shorten(log)
        assert log.stat().st_size < 1000


@pytest.mark.usefixtures("small_limits")
def test_a_log_that_is_small_is_missing_or_is_no_file_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"x" * 1000)
    shorten(tmp_path / "log")
    assert (tmp_path / "log").stat().st_size == 1000
    shorten(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    (tmp_path / "full").symlink_to("/dev/full")
    shorten(tmp_path / "full")


def test_storage_prune_removes_old_logs_of_workers_that_are_gone(logs: Path, gone: int, trialyard: Call) -> None:
    old = _write(logs / f"trainer-cpu-0-{gone}.log", 2 * DAY)
    elsewhere = Owner(machine="another", host="b", pid=gone + 1, born=1.0, slot="gpu:0")
    storage = database.connect(settings.load().url)
    transactions.write(storage, None, lambda connection: slots.beat(connection, {elsewhere: "A100"}, {}))
    kept = {
        _write(logs / f"trainer-gpu-0-{gone}.log", DAY / 2),
        _write(logs / f"trainer-gpu-0-{os.getpid()}.log", 2 * DAY),
        _write(logs / f"trainer-gpu-0-{gone + 1}.log", 2 * DAY),
        _write(logs / "mine.log", 2 * DAY),
    }
    assert [log.path for log in search.leftovers().logs] == [old]
    code, out, err = trialyard("storage", "prune", "--yes")
    assert code == 0
    assert f"{old}: 1.5 kB, the log of a worker that ended more than a day ago" in err
    assert out.startswith("1.5 kB were freed below ")
    assert out.endswith(f" and in {logs}\n")
    assert set(logs.iterdir()) == kept


def test_a_log_that_is_written_again_meanwhile_is_not_removed(logs: Path, gone: int) -> None:
    log = _write(logs / f"trainer-cpu-0-{gone}.log", 2 * DAY)
    found = search.leftovers()
    log.touch()
    assert search.prune(found) == 0
    assert log.exists()
