"""The checks before a study is created, and before a worker takes one."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import keras
import pytest

from search import checks, terminal
from search.errors import MachineError
from storage import settings
from studies.definition import Data, Definition


def test_a_crash_while_keras_is_imported_is_a_sentence_with_what_it_printed(broken: Callable[[str], Path]) -> None:
    broken("import os; print('no such instruction', flush=True); os.abort()")
    checks.check_keras.cache_clear()
    with pytest.raises(
        MachineError, match=r"tensorflow .* by signal SIGABRT before it had imported Keras; it printed: "
    ):
        checks.check_keras("tensorflow")


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


def test_confirm_is_proposed_only_if_test_images_exist_that_did_not_choose(
    trivial: Definition, finished_study: str, write_npz: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    def proposed(dataset: str, **changes: object) -> str:
        definition = trivial.model_copy(update={"dataset": dataset, **changes})
        here = settings.load()
        terminal.print_end(finished_study, here.url, can_confirm=checks.can_confirm(definition, here))
        return capsys.readouterr().err

    with_test, without = str(write_npz("a.npz")), str(write_npz("b.npz", x_test=None, y_test=None))
    confirm = f"`trialyard confirm {finished_study}`"
    assert confirm in proposed(with_test)
    assert confirm in proposed("package.module:function"), "it may have some"
    assert "`trialyard report" in proposed(without)
    assert confirm not in proposed(without)
    assert confirm not in proposed(with_test, data=Data(validation="test"))


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
