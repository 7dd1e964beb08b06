"""The checks before a study is created, and before a worker takes one."""

import errno
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import pytest
from optuna.trial import TrialState

from search import checks, service, terminal, trainer
from search.errors import MachineError
from storage import claims
from storage.owners import Owner
from storage.settings import load
from storage.transactions import PatientStorage
from studies import registry
from studies.definition import Data, Definition
from studies.rendering import report


def test_a_crash_while_keras_is_imported_is_a_sentence_with_what_it_printed(broken: Callable[[str], Path]) -> None:
    broken("import os; print('no such instruction', flush=True); os.abort()")
    checks.check_keras.cache_clear()
    with pytest.raises(
        MachineError, match=r"tensorflow .* by signal SIGABRT before it had imported Keras; it printed: "
    ):
        checks.check_keras("tensorflow")


@pytest.mark.parametrize("stopped", [True, False])
def test_a_check_that_hangs_ends(
    home: Path, monkeypatch: pytest.MonkeyPatch, trivial: Definition, stopped: bool
) -> None:
    """As where a file server does not answer."""
    (home / "hanging.py").write_text("import time\n\n\ndef load():\n    time.sleep(600)\n", encoding="utf-8")
    definition = trivial.model_copy(update={"dataset": "hanging:load"})
    stop = threading.Event()
    if stopped:
        stop.set()
    else:
        monkeypatch.setattr(checks, "CHECK_SECONDS", 0.0)
    reason = (
        "the check of trivial was stopped" if stopped else "hanging:load took longer than 0 minutes on this machine"
    )
    with pytest.raises(MachineError, match=reason):
        checks.check(definition, load(), stop=stop)


@pytest.mark.parametrize("call", ["Pipe", "launch"])
def test_a_trainer_process_that_cannot_be_started_for_a_check_is_a_sentence(
    home: Path, monkeypatch: pytest.MonkeyPatch, trivial: Definition, call: str
) -> None:
    """Before and after its log is made."""

    def refused(*arguments: Any) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(trainer, call, refused)
    with pytest.raises(MachineError, match=r"a trainer process cannot be started \(Too many open files\)"):
        checks.check(trivial.model_copy(update={"dataset": "mine:load"}), load())


@pytest.mark.parametrize("kind", ["fork", "spawn"])
def test_a_pool_of_a_user_s_function_can_be_ended(home: Path, trivial: Definition, kind: str) -> None:
    """A trainer ignores the signals that mean its worker, and so do the processes that it starts."""
    lines = (
        "import multiprocessing, time\nfrom sklearn.datasets import load_digits\n\n\ndef load():\n"
        f"    with multiprocessing.get_context('{kind}').Pool(2) as pool:\n"
        "        pool.map(abs, range(2))\n"
        "        pool.map_async(time.sleep, [600, 600])\n"
        "    images, labels = load_digits(return_X_y=True)\n"
        "    images = images.reshape(-1, 8, 8).repeat(3, 1).repeat(3, 2) / 16\n"
        "    return (images[:300], labels[:300]), (images[300:400], labels[300:400])\n"
    )
    (home / "pooled.py").write_text(lines, encoding="utf-8")
    began = time.monotonic()
    checks.check(trivial.model_copy(update={"dataset": "pooled:load"}), load())
    assert time.monotonic() - began < 300


def test_that_keras_can_be_imported_is_remembered_for_a_day_and_for_this_installation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def started() -> None:
        raise AssertionError("it was checked again")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    checks.check_keras.cache_clear()
    checks.check_keras("tensorflow")
    (mark,) = (tmp_path / "trialyard").iterdir()
    monkeypatch.setattr(checks, "_trainer", started)

    def check_again() -> None:
        checks.check_keras.cache_clear()
        checks.check_keras("tensorflow")

    check_again()
    monkeypatch.setenv("LD_LIBRARY_PATH", "/another")
    with pytest.raises(AssertionError, match="checked again"):
        check_again()
    monkeypatch.delenv("LD_LIBRARY_PATH")
    long_ago = time.time() - checks.REMEMBERED_SECONDS - 60
    os.utime(mark, (long_ago, long_ago))
    with pytest.raises(AssertionError, match="checked again"):
        check_again()
    mark.touch()
    check_again()
    checks.forget_keras()
    with pytest.raises(AssertionError, match="checked again"):
        check_again()


@pytest.mark.parametrize(
    ("dataset", "test", "validation", "proposed"),
    [
        ("small.npz", 100, 0.1, True),
        ("small.npz", 0, 0.1, False),
        ("small.npz", None, 0.1, False),  # an older version did not record it
        ("digits", None, 0.1, True),
        ("small.npz", 100, "test", False),
    ],
)
def test_confirm_is_proposed_only_if_test_images_are_known_that_did_not_choose(
    storage: PatientStorage,
    trivial: Definition,
    me: Owner,
    capsys: pytest.CaptureFixture[str],
    dataset: str,
    test: int | None,
    validation: Any,
    proposed: bool,
) -> None:
    definition = trivial.model_copy(update={"dataset": dataset, "data": Data(validation=validation)})
    facts = {"fingerprint": "0" * 16, definition.judged_on: 100} | ({} if test is None else {"test": test})
    study = registry.create(definition, storage, facts).study
    claim = claims.claim(storage, study, me, 60.0)
    assert claim is not None
    claims.finish(storage, claim, TrialState.COMPLETE, 0.9, {})
    confirm = f"`trialyard confirm {study.name}`"
    text = report(study.name, storage, "markdown").replace("\\", "")
    assert (f"{confirm} measures it again" in text) is proposed
    url = storage.engine.url.render_as_string(hide_password=False)
    can_confirm = service.can_confirm(study.name, storage=url)
    assert can_confirm is proposed
    terminal.print_end(study.name, url, storage=None, can_confirm=can_confirm)
    assert (confirm in capsys.readouterr().err) is proposed


ASK = "import keras; print(keras.backend.backend())"


def test_the_versions_are_those_of_the_software_without_their_patch_level() -> None:
    versions = checks.software()
    assert keras.__version__.startswith(f"{versions['keras']}.")
    assert versions["keras"].count(".") == versions["trialyard"].count(".") == 1


@pytest.mark.parametrize(
    ("variable", "configured", "expected"),
    [
        (None, None, "tensorflow"),
        (None, "jax", "jax"),
        ("jax", None, "jax"),
        ("tensorflow", "jax", "tensorflow"),
        ("", "jax", "jax"),
    ],
)
def test_the_backend_is_the_one_that_keras_will_choose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str | None, configured: str | None, expected: str
) -> None:
    """Known without importing Keras; compared with the choice of Keras in another process."""
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.delenv("KERAS_BACKEND", raising=False)
    if variable is not None:
        monkeypatch.setenv("KERAS_BACKEND", variable)
    if configured is not None:
        (tmp_path / "keras.json").write_text(json.dumps({"backend": configured}), encoding="utf-8")
    assert checks.software()["backend"] == expected
    asked = subprocess.run(
        [sys.executable, "-c", ASK],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert asked.stdout.strip() == expected
