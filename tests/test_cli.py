"""The command: results on standard output, one line and exit code 1 for a mistake, 2 for wrong usage."""

import dataclasses
import io
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import optuna
import psutil
import pytest
from conftest import SMALL, Call
from locked_folder import locked
from optuna.trial import TrialState

from search import terminal
from storage import claims, database, ledger, owners
from studies import registry, results
from studies.rendering import report
from studies.trial_records import TrialRecord


def _dump(home: Path) -> list[str]:
    with registry.storage_of(f"sqlite:///{home}/yard/studies.db").engine.connect() as connection:
        return list(connection.connection.driver_connection.iterdump())  # type: ignore[union-attr]


GOOD = """
name = "n"
dataset = "digits"
model = "mnist_cnn"
budget.trials = 1
space.dropout = { low = 0.0, high = 0.5 }
"""

# --- mistakes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "digit"], ["'digit' is neither a file nor in the catalog", "did you mean 'digits'?"]),
        (["create", "none.toml"], ["none.toml cannot be read (No such file or directory)"]),
        (["status", "digit"], ["there is no study 'digit'", "did you mean 'digits'?", "it has digits"]),
        (["status", "mnist-tiny"], ["there is no study 'mnist-tiny'", "`trialyard create mnist-tiny` creates it"]),
        (["best", "nothing"], ["there is no study 'nothing'", "`trialyard create FILE` creates one"]),
        (["best", "digits"], ["study 'digits' has no complete trial yet", "`trialyard work digits`"]),
        (["leaderboard", "nothing"], ["there is no study 'nothing'"]),
        (["work", "nothing"], ["there is no study 'nothing'"]),
        (
            ["create", "digits", "--epochs", "3"],
            ["budget.epochs = 8 in the database and 3 in this definition", "--name"],
        ),
        (
            ["create", "digits", "--limit", "20"],
            ["fixed.batch_size = 64 is larger than the 20 training images of digits"],
        ),
        (["create", "digits", "--name", "a/b"], ['name = "a/b" must be letters, digits']),
        (["status", "--storage", "nonsense"], ["the database URL 'nonsense' does not parse", "sqlite:///"]),
        (["status", "--storage", "sqlite:///none.db"], ["there is no database at sqlite:///none.db"]),
        (["run", "digits", "--storage", "mysql://me@host/db"], ["of a kind that Trialyard does not know"]),
        (["run", "digits", "--storage", "sqlite:////dev/null/x/studies.db"], ["cannot be written", "TRIALYARD_HOME"]),
        (["check", "bad.toml"], ["bad.toml: unknown key 'modle'", "did you mean 'model'?"]),
        (["check", "missing.toml"], ["the data file there.npz does not exist", "TRIALYARD_DATA"]),
        (["create", "own.toml"], ["nowhere:load cannot be imported (ModuleNotFoundError"]),
    ],
)
def test_a_mistake_is_one_sentence_and_changes_nothing(
    home: Path, trialyard: Call, arguments: list[str], words: list[str]
) -> None:
    (home / "bad.toml").write_text(GOOD.replace("model", "modle"), encoding="utf-8")
    (home / "missing.toml").write_text(GOOD.replace('"digits"', '"there.npz"'), encoding="utf-8")
    (home / "own.toml").write_text(GOOD.replace('"digits"', '"nowhere:load"'), encoding="utf-8")
    assert trialyard("create", "digits")[0] == 0
    before = _dump(home)
    code, out, err = trialyard(*arguments)
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    for word in words:
        assert word in err
    assert "tiger" not in err
    assert _dump(home) == before


LONG = "long-" * 60


@pytest.mark.parametrize(
    ("images", "problem"),
    [
        ("closed/photos/", "closed/photos/ cannot be looked for (Permission denied): correct dataset"),
        ("closed/small.npz", "closed/small.npz cannot be looked for (Permission denied): correct dataset"),
        (f"{LONG}/", f"{LONG[:57]}... cannot be looked for (File name too long): correct dataset"),
    ],
)
def test_images_that_cannot_be_looked_for_are_one_sentence(
    home: Path, trialyard: Call, images: str, problem: str
) -> None:
    (home / "closed" / "photos").mkdir(parents=True)
    (home / "n.toml").write_text(GOOD.replace('"digits"', f'"{images}"'), encoding="utf-8")
    with locked(home / "closed"):
        code, out, err = trialyard("check", "n.toml")
    assert (code, out) == (1, "")
    assert err.startswith(f"error: {problem}")
    assert len(err.splitlines()) == 1


def test_an_argument_that_is_not_utf_8_is_one_sentence(trialyard: Call) -> None:
    trialyard("storage", "create")
    code, out, err = trialyard("status", "\udcff")
    assert (code, out, err) == (1, "", "error: '\\udcff' is not valid UTF-8: type it in UTF-8\n")


def test_a_terminal_that_knows_ascii_alone_gets_every_text(
    home: Path, monkeypatch: pytest.MonkeyPatch, trialyard: Call
) -> None:
    (home / "n.toml").write_text(f'description = "größe → ✓"\n{GOOD}', encoding="utf-8")
    trialyard("create", "n.toml")
    study = registry.open("n", f"sqlite:///{home}/yard/studies.db")
    failure = {"kind": "nan", "message": "größe"}
    study.add_trial(optuna.trial.create_trial(state=TrialState.FAIL, user_attrs={"failure": failure}))
    printed = io.BytesIO()
    for arguments in (["status"], ["report", "n", "--format", "table"], ["status", "größe"]):
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding="ascii"))
        code, _, err = trialyard(*arguments)
        assert (code, "UTF-8" in err) == (int("größe" in arguments), False)
        sys.stdout.flush()
    assert b"gr\\xf6\\xdfe" in printed.getvalue()
    assert b"\n * " in printed.getvalue()
    assert b"\\u2022" not in printed.getvalue()


def test_scores_keep_their_column_where_a_terminal_knows_ascii_alone(
    finished_study: str, monkeypatch: pytest.MonkeyPatch, trialyard: Call
) -> None:
    printed = io.BytesIO()
    monkeypatch.setattr(TrialRecord, "score_text", "0.59 \u00b1 0.08")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding="ascii"))
    trialyard("trials", finished_study)
    sys.stdout.flush()
    head, *rows = printed.getvalue().decode().splitlines()
    assert {row.index("0.59 +- 0.08") + len("0.59 +- 0.08") for row in rows} == {head.index("score") + len("score")}


def test_the_commands_that_are_advised_name_the_database_that_was_given(
    finished_study: str, home: Path, trialyard: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "my yard").symlink_to(home / "yard")
    given = f"sqlite:///{home}/my yard/studies.db"
    quoted = f"--storage '{given}'`"
    for arguments in (
        ["create", "digits"],
        ["enqueue", "digits", "depth=5"],
        ["pause", "digits"],
        ["resume", "digits"],
        ["stop", "digits"],
        ["leaderboard", finished_study],
    ):
        code, out, err = trialyard(*arguments, "--storage", given)
        assert (code, quoted in out + err) == (0, True), arguments
        assert "--storage" not in "".join(trialyard(*arguments)[1:]), arguments
    terminal.print_end(finished_study, given, storage=given, can_confirm=True)
    assert capsys.readouterr().err.count(quoted) == 3
    paused = dataclasses.replace(results.status("digits", given), pause_reason="all failed")
    assert terminal.pause_text(paused, given).count(quoted) == 2


def test_trials_that_wait_after_the_end_are_mentioned(finished_study: str, home: Path, trialyard: Call) -> None:
    registry.open(finished_study, f"sqlite:///{home}/yard/studies.db").enqueue_trial({"dropout": 0.3})
    sentence = "1 trial waits, and the budget has no room for it: `trialyard create` with a larger --trials adds room"
    assert f"  {sentence}" in trialyard("status")[1]
    assert f"{sentence}." in report(finished_study, f"sqlite:///{home}/yard/studies.db", "markdown")
    assert trialyard("work", finished_study)[1].endswith(", best 0.9000 (trial 1), ended\n")


@pytest.mark.parametrize(
    "arguments", [["nothing"], ["run"], ["best"], ["status", "--jsn"], ["create", "digits", "--trials", "0"]]
)
def test_wrong_usage_exits_with_2(trialyard: Call, arguments: list[str]) -> None:
    code, out, err = trialyard(*arguments)
    assert (code, out) == (2, "")
    assert "Usage: trialyard" in err


def test_a_database_that_is_no_database_is_one_sentence(home: Path, trialyard: Call) -> None:
    (home / "yard").mkdir()
    (home / "yard" / "studies.db").write_text("a note, not a database" * 10, encoding="utf-8")
    for arguments in (["status"], ["run", "digits"], ["storage", "check"]):
        code, out, err = trialyard(*arguments)
        assert (code, out) == (1, "")
        assert len(err.splitlines()) == 1
        assert err.startswith("error: the database sqlite:///")


def test_storage_check_fails_where_a_promise_is_broken(home: Path, trialyard: Call) -> None:
    trialyard("create", "digits")
    assert trialyard("storage", "check")[0] == 0
    registry.open("digits", f"sqlite:///{home}/yard/studies.db").ask()  # 3 points are waiting: it takes the first
    code, out, err = trialyard("storage", "check")
    assert (code, out) == (1, "")
    assert "1 problem in sqlite:///" in err
    sentence = (
        "1 trial was started outside Trialyard and has not ended: trial 0; no worker waits for it, and `optuna tell` "
        "ends it\n"
    )
    assert f"study digits: {sentence}" in err
    assert f"  {sentence}" in trialyard("status")[1]
    assert json.loads(trialyard("status", "digits", "--json")[1])["outside"] == [0]


def test_an_empty_study_that_optuna_made_is_refused_in_one_sentence(home: Path, trialyard: Call) -> None:
    (home / "n.toml").write_text(GOOD, encoding="utf-8")
    trialyard("storage", "create")
    optuna.create_study(study_name="n", storage=f"sqlite:///{home}/yard/studies.db")  # minimizes by default
    before = _dump(home)
    for command in ("create", "run"):
        code, out, err = trialyard(command, "n.toml")
        assert (code, out) == (1, "")
        assert err == (
            "error: study 'n' minimizes its value, and Trialyard maximizes exactly one, the accuracy: choose another "
            "name with --name, or remove it with `optuna delete-study --study-name n`\n"
        )
    assert _dump(home) == before
    assert trialyard("storage", "check")[0] == 0  # it is not ours


def test_a_study_that_minimizes_is_refused_by_whoever_would_train(home: Path, trialyard: Call) -> None:
    (home / "n.toml").write_text(GOOD, encoding="utf-8")
    trialyard("create", "n.toml")
    with registry.storage_of(f"sqlite:///{home}/yard/studies.db").engine.begin() as connection:
        connection.exec_driver_sql("UPDATE study_directions SET direction = 'MINIMIZE'")
    for arguments in (["run", "n.toml"], ["create", "n.toml"], ["work", "n"]):
        code, _, err = trialyard(*arguments)
        assert (code, err.startswith("error: study 'n' minimizes its value, and Trialyard maximizes")) == (1, True)
    assert trialyard("status")[0] == 0
    assert "study n minimizes its value" in trialyard("storage", "check")[2]


@pytest.mark.usefixtures("finished")
def test_studies_and_trials_of_others_break_no_command(home: Path, trialyard: Call) -> None:
    url = f"sqlite:///{home}/yard/studies.db"
    colleague = optuna.create_study(study_name="colleague", storage=url)
    for name, value in {"budget": {"gpu_hours": 40}, "state": 3, "definition": "a paper", "incarnation": 1998}.items():
        colleague.set_user_attr(name, value)
    ours = registry.open("digits", url)
    recorded = {"parameters": "11M", "best_epoch": 3, "epochs": "20", "attempts": 3, "model": "../../secret"}
    params, distributions = ours.trials[0].params, ours.trials[0].distributions
    made = optuna.trial.create_trial
    ours.add_trial(
        made(params=params, distributions=distributions, value=0.99, user_attrs=recorded | {"history": {"a": 1}})
    )
    ours.add_trial(made(state=TrialState.FAIL, user_attrs={"failure": "OOM"}))
    for arguments in (
        ["status"],
        ["best", "digits"],
        ["best", "digits", "--json"],
        ["leaderboard", "digits"],
        ["trials", "digits"],
        ["show", "digits", "0"],
        ["report", "digits"],
        ["report", "digits", "--format", "table"],
        ["storage", "prune", "--yes"],
    ):
        code, out, err = trialyard(*arguments)
        assert (code, "" if err.startswith("not shown: ") else err) == (0, ""), arguments
        assert "colleague" not in out
    assert json.loads(trialyard("best", "digits", "--json")[1])["model"] is None
    assert "has no model, because Trialyard did not train it" in trialyard("export", "digits", "there")[2]
    # Theirs count, and nothing else is wrong.
    assert "it has 5 trials, but its budget is 4" in trialyard("storage", "check")[2]
    assert "study 'colleague' has no definition" in trialyard("status", "colleague")[2]


def test_an_older_database_says_what_to_run(home: Path, trialyard: Call) -> None:
    trialyard("create", "digits")
    with registry.storage_of(f"sqlite:///{home}/yard/studies.db").engine.begin() as connection:
        connection.exec_driver_sql("UPDATE study_user_attributes SET key = replace(key, 'trialyard:', '')")
    registry._connected.cache_clear()  # each command is a process of its own
    for arguments in (["status"], ["work"], ["create", "digits"], ["run", "digits"], ["storage", "check"]):
        code, out, err = trialyard(*arguments)
        assert (code, out) == (1, "")
        assert err.endswith("has studies of an older Trialyard (digits): run `trialyard storage upgrade`\n")
        assert len(err.splitlines()) == 1
    assert "study digits: brought over from an older Trialyard\n" in trialyard("storage", "upgrade")[1]
    assert trialyard("status")[1].startswith("digits: ")
    # Its trials are scored as before; the definition of today would score them otherwise.
    code, _, err = trialyard("create", "digits")
    assert code == 1
    assert 'fixed.batch_norm_averages = "keras" in the database and null in this definition' in err


@pytest.mark.usefixtures("finished")
def test_a_score_of_an_older_version_that_is_not_finite_is_found_and_repaired(home: Path, trialyard: Call) -> None:
    storage = database.connect(f"sqlite:///{home}/yard/studies.db")
    with storage.engine.begin() as connection:  # SQLite stores NaN as NULL
        connection.exec_driver_sql("UPDATE trial_values SET value = NULL WHERE value = 0.9")
    storage.engine.dispose()
    assert "best 0.7000 (trial 0)" in trialyard("status")[1]
    assert trialyard("best", "digits")[1].startswith("best of digits: trial 0, ")
    assert trialyard("report", "digits", "--format", "table")[0] == 0
    code, out, err = trialyard("storage", "check")
    assert (code, out) == (1, "")
    assert "study digits: trial 2 is complete without a finite score: `trialyard storage upgrade` marks" in err
    code, out, err = trialyard("storage", "upgrade")
    assert (code, err) == (0, "")
    assert out.startswith("study digits: trial 2 is now marked as failed, without a finite score\n")
    assert trialyard("storage", "check")[0] == 0
    assert "1 complete, 0 pruned, 2 failed" in trialyard("status")[1]


# --- results ----------------------------------------------------------------------------------------------


def test_every_ready_definition_is_listed(trialyard: Call) -> None:
    code, out, err = trialyard("catalog")
    assert (code, err) == (0, "")
    listed = json.loads(trialyard("catalog", "--json")[1])
    assert [line.split()[0] for line in out.splitlines()] == [one["name"] for one in listed]
    assert "digits" in out


def test_check_says_what_it_understood(
    home: Path, write_small: Callable[..., Path], command: Callable[..., str]
) -> None:
    text = SMALL.replace("width = 0.1\n", "").replace("[fixed]", "width = {{ choices = [0.1, 0.2] }}\n\n[fixed]")
    write_small(trials=4, epochs=2, text=text + "\n[pruner]\nkind = 'hyperband'\n")
    *lines, time, note = command("check", "small.toml", folder=home).splitlines()
    assert lines == [
        "small is valid: 4 trials of 2 epochs",
        "  dropout: 0.0 to 0.5",
        "  width: one of 0.1, 0.2",
        "images: 240 to train with, 60 validation images; 8x8x1 in 10 classes",
        "models: 4,688 to 8,849 weights",
    ]
    assert re.fullmatch(r"time: about \d+ (s|min) on this machine.*, if no trial is pruned", time)
    assert note == "note: the pruner hyperband has one bracket here, so it is successive halving"


def test_a_name_in_colons_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """Such as a class ":cat:", which is also Rich's name of a picture."""
    terminal.say("classes: :cat:, :dog:")
    terminal.print_report("The class :cat: is *often* wrong.")
    terminal.warn("the class :cat:")
    out, err = capsys.readouterr()
    assert out.split() == ["classes:", ":cat:,", ":dog:", "The", "class", ":cat:", "is", "often", "wrong."]
    assert err == "the class :cat:\n"


def test_create_says_what_is_next_and_does_nothing_twice(trialyard: Call) -> None:
    assert trialyard("create", "digits")[:2] == (0, "study digits: 12 trials; `trialyard work digits` runs them\n")
    code, out, _ = trialyard("create", "digits")
    assert (code, out) == (0, "study digits exists already, and nothing was changed\n")


def test_options_replace_what_the_definition_says(home: Path, trialyard: Call) -> None:
    trialyard("create", "digits", "--name", "mine", "--trials", "4", "--epochs", "1", "--limit", "500")
    made = registry.definition_of("mine", registry.storage_of(f"sqlite:///{home}/yard/studies.db"))
    assert (made.trials, made.budget.epochs, made.data.limit) == (4, 1, 500)


def test_an_option_s_twin_in_the_environment(home: Path, trialyard: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIALYARD_TRIALS", "2")
    monkeypatch.setenv("TRIALYARD_STORAGE", f"sqlite:///{home}/there.db")
    trialyard("create", "digits")
    assert json.loads(trialyard("status", "digits", "--json")[1])["budget"] == 2
    assert (home / "there.db").exists()


@pytest.fixture
def finished(home: Path, trialyard: Call) -> None:
    """The study `digits` with three ended trials of its four: 0.7, failed, 0.9."""
    trialyard("create", "digits", "--trials", "4")
    storage = database.connect(f"sqlite:///{home}/yard/studies.db")
    for value in (0.7, None, 0.9):
        claim = claims.claim(storage, ledger.find(storage, "digits"), owners.this_slot("cpu:0"), 60.0)
        assert claim is not None
        opened = registry.open("digits", storage)
        assert len(opened.trials) > claim.number  # Optuna's cache must have seen it
        trial = optuna.Trial(opened, claim.trial_id)
        trial.suggest_categorical("depth", [3, 5, 7])
        trial.suggest_float("dropout", 0.0, 0.7)
        if value is None:
            claims.finish(
                storage, claim, TrialState.FAIL, None, {"failure": {"kind": "nan", "message": "the loss became nan"}}
            )
        else:
            recorded = {
                "epochs": 8,
                "best_epoch": 7,
                "parameters": 668810,
                "seconds": 12.34,
                "history": "digits/0/h.json",
            }
            recorded |= {"images_per_second": 700.0, "precision": "float32"}
            claims.finish(storage, claim, TrialState.COMPLETE, value, recorded)
    storage.engine.dispose()


@pytest.mark.usefixtures("finished")
def test_status_tells_counts_best_and_why_trials_failed(trialyard: Call) -> None:
    _, out, _ = trialyard("status")
    assert "digits: 3 of 4 trials, best 0.9000 (trial 2), about" in out
    assert "2 complete, 0 pruned, 1 failed, 0 running, 0 waiting, budget 4" in out
    assert "1 of digits's trials failed (nan: the loss became nan)" in out
    (one,) = json.loads(trialyard("status", "--json")[1])["studies"]
    assert one == json.loads(trialyard("status", "digits", "--json")[1])
    assert (one["complete"], one["failed"], one["budget"], one["best"]) == (2, 1, 4, 0.9)
    assert one["failures"] == ["nan: the loss became nan"]


@pytest.mark.usefixtures("finished")
def test_status_tells_who_runs_what(home: Path, trialyard: Call) -> None:
    storage = database.connect(f"sqlite:///{home}/yard/studies.db")
    claims.claim(storage, ledger.find(storage, "digits"), owners.this_slot("cpu:0"), 60.0)
    assert "  trial 3 on cpu:0 of " in trialyard("status", "digits")[1]
    (one,) = json.loads(trialyard("status", "digits", "--json")[1])["workers"]
    assert (one["number"], one["slot"], one["attempt"]) == (3, "cpu:0", 1)


@pytest.mark.usefixtures("finished")
def test_best_and_leaderboard(home: Path, trialyard: Call) -> None:
    code, out, err = trialyard("best", "digits")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "best of digits: trial 2, validation accuracy 0.9000",
        "  hyperparameters  depth 7, dropout 0.25",
        "  training         best epoch 7 of 8, 668,810 weights, 12.3 s, 700 images/s in float32",
    ]
    best = json.loads(trialyard("best", "digits", "--json")[1])
    assert (best["study"], best["number"], best["value"]) == ("digits", 2, 0.9)
    assert best["params"] == {"depth": 7, "dropout": 0.25}
    assert best["history"] == str(home / "yard" / "artifacts" / "digits" / "0" / "h.json")
    rows = json.loads(trialyard("leaderboard", "digits", "--json")[1])
    assert [(row["rank"], row["number"], row["value"]) for row in rows] == [(1, 2, 0.9), (2, 0, 0.7)]
    _, table, _ = trialyard("leaderboard", "digits", "--top", "1")
    title, row = table.splitlines()
    assert title.split() == ["rank", "trial", "accuracy", "depth", "dropout", "epochs", "weights", "seconds"]
    assert row.split() == ["1", "2", "0.9000", "7", "0.25", "8", "668,810", "12.3"]
    lines = trialyard("leaderboard", "digits")[1].splitlines()
    assert len(lines) == 3
    assert len(set(map(len, lines))) == 1
    trialyard("create", "digits", "--name", "empty")
    code, out, err = trialyard("leaderboard", "empty")
    assert (code, out) == (0, "no trial is complete yet\n")
    assert err == "not shown: 3 waiting; `trialyard trials empty` has every trial\n"


def test_commands_without_a_study_say_how_to_make_one(trialyard: Call) -> None:
    trialyard("storage", "create")
    for command in ("status", "work"):
        code, out, _ = trialyard(command)
        assert code == 0
        assert "`trialyard create digits` makes one" in out


def test_ctrl_c_outside_of_work_exits_with_130(home: Path) -> None:
    # Its data come from a function that never ends.
    (home / "slow.py").write_text("import time\ndef load():\n    time.sleep(600)\n", encoding="utf-8")
    (home / "slow.toml").write_text(GOOD.replace('"digits"', '"slow:load"'), encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, "-m", "search.cli", "create", "slow.toml"], cwd=home, stderr=subprocess.PIPE, text=True
    )
    # Past the imports, whose Ctrl-C is Python's own, once it has had the function imported in another process.
    deadline = time.monotonic() + 120
    while not psutil.Process(process.pid).children():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "interrupted\n")


FREED = """
import signal, time
from search import cli

class Freed:
    def __del__(self):
        signal.raise_signal(signal.SIGTERM)

def wait(prog_name):
    Freed()
    time.sleep(60)

cli.app = wait
cli.main()
"""
WRITTEN = """
import io, logging, signal, sys, time
from search import cli

class Terminal(io.RawIOBase):
    def writable(self):
        return True

    signalled = False

    def write(self, data):
        if not self.signalled:
            self.signalled = True
            signal.raise_signal(signal.SIGTERM)
        return len(data)

def wait(prog_name):
    sys.stderr = io.TextIOWrapper(io.BufferedWriter(Terminal()), write_through=True)
    logging.basicConfig(force=True)
    logging.warning("the database is away")
    time.sleep(60)

cli.app = wait
cli.main()
"""


@pytest.mark.parametrize("program", [FREED, WRITTEN], ids=["an object is freed", "a line is written"])
def test_a_signal_ends_a_command_also_while(program: str) -> None:
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_alive_tells_a_worker_that_has_fallen_silent(home: Path, trialyard: Call) -> None:
    storage = database.create(f"sqlite:///{home}/yard/studies.db")
    me = owners.this_slot("cpu:0")
    claims.beat(storage, {me: "a processor"}, [])
    code, out, err = trialyard("alive")
    assert (code, err) == (0, "")
    assert out.startswith("a worker of this machine sent its last heartbeat ")
    with storage.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE trialyard_slots SET beat = datetime(beat, '-200 seconds')")
    code, out, err = trialyard("alive")
    assert (code, out) == (1, "")
    assert " s ago, more than TRIALYARD_GRACE_SECONDS = 120: " in err
    with storage.engine.begin() as connection:  # another machine's is no sign of life of this one's
        connection.exec_driver_sql("UPDATE trialyard_slots SET machine = 'another', beat = datetime('now')")
    assert "there is no worker on this machine" in trialyard("alive")[2]
    storage.engine.dispose()


# --- results, in and out ----------------------------------------------------------------------------------


def test_import_takes_a_file_whole_or_not_at_all(home: Path, trialyard: Call) -> None:
    trialyard("create", "digits")
    (home / "good.csv").write_text("depth,dropout,accuracy\n3,0.1,0.9\n5,0.2,0.95\n", encoding="utf-8")
    (home / "bad.csv").write_text("depth,dropout,accuracy\n3,0.3,0.9\n4,0.2,0.95\n", encoding="utf-8")
    assert trialyard("import", "digits", "good.csv") == (0, "study digits: 2 trials were imported\n", "")
    again = "study digits: 0 trials were imported; all of them existed already\n"
    assert trialyard("import", "digits", "good.csv") == (0, again, "")
    before = _dump(home)
    code, out, err = trialyard("import", "digits", "bad.csv")
    assert (code, out) == (1, "")
    assert err == "error: bad.csv, line 3: depth = '4' must be one of 3, 5, 7, as space.depth says\n"
    assert _dump(home) == before
    assert trialyard("import", "digits")[0] == 2
    # An imported trial can be the best, and has no model.
    assert trialyard("best", "digits")[1].startswith("best of digits: trial 4, validation accuracy 0.9500\n")


def test_import_notebook_makes_its_study_once(home: Path, trialyard: Call) -> None:
    code, out, _ = trialyard("import", "notebook")
    assert (code, out.startswith("study notebook has the notebook's 21 results")) == (0, True)
    before = _dump(home)
    assert "exists already, and nothing was added" in trialyard("import", "notebook")[1]
    assert _dump(home) == before
    assert len(json.loads(trialyard("leaderboard", "notebook", "--json")[1])) == 21


def test_report_writes_the_form_that_is_asked_for(home: Path, trialyard: Call) -> None:
    trialyard("import", "notebook")
    before = _dump(home)
    assert trialyard("report", "notebook") == (0, "the report of notebook is in notebook-report.html\n", "")
    assert (home / "notebook-report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert trialyard("report", "notebook", "--format", "markdown", "--output", "new/n.md")[0] == 0
    assert (home / "new" / "n.md").read_text(encoding="utf-8").startswith("# notebook\n")
    code, out, _ = trialyard("report", "notebook", "--format", "table")
    assert code == 0
    assert "The best of 21 complete trials is trial 5" in out
    assert "0.9810" in out
    assert trialyard("report", "notebook", "--format", "table", "--output", "t")[0] == 2
    (home / "folder").mkdir()
    code, _, err = trialyard("report", "notebook", "--output", "folder")
    assert (code, err) == (1, "error: folder cannot be written (Is a directory): give another file with --output\n")
    code, _, err = trialyard("report", "notebook", "--output", ".")
    assert (code, len(err.splitlines())) == (1, 1)
    assert sorted(path.name for path in home.iterdir()) == ["folder", "new", "notebook-report.html", "yard"]
    assert _dump(home) == before


# --- taking away, and removing ----------------------------------------------------------------------------


@pytest.mark.usefixtures("finished")
def test_a_model_that_is_elsewhere_is_told(home: Path, trialyard: Call) -> None:
    storage = database.connect(f"sqlite:///{home}/yard/studies.db")
    claim = claims.claim(storage, ledger.find(storage, "digits"), owners.this_slot("cpu:0"), 60.0)
    assert claim is not None
    claims.finish(storage, claim, TrialState.COMPLETE, 0.95, {"model": "digits/3/model.keras"})
    path = home / "yard" / "artifacts" / "digits" / "3" / "model.keras"
    assert f"  model            {path} (not on this machine)\n" in trialyard("best", "digits")[1]
    assert json.loads(trialyard("best", "digits", "--json")[1])["model"] is None
    code, out, err = trialyard("export", "digits", "there")
    assert (code, out) == (1, "")
    assert "set TRIALYARD_ARTIFACTS" in err
    path.parent.mkdir(parents=True)
    path.touch()
    assert json.loads(trialyard("best", "digits", "--json")[1])["model"] == str(path)
    assert trialyard("export", "digits", "there", "--format", "pt")[2] == (
        "error: format = 'pt' must be one of tflite, onnx, savedmodel\n"
    )


def _answer(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


@pytest.mark.usefixtures("finished")
def test_delete_asks_first(home: Path, trialyard: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    trialyard("create", "digits", "--name", "other")
    before = _dump(home)
    for answer in ("n\n", "\n", ""):
        _answer(monkeypatch, answer)
        code, out, err = trialyard("delete", "digits")
        assert (code, out) == (1, "")
        assert "Remove study digits with its 3 finished trials, and their models and histories?" in err
        assert _dump(home) == before
    _answer(monkeypatch, "y\n")
    assert trialyard("delete", "digits")[:2] == (0, "study digits was deleted, and 0 B were freed\n")
    assert trialyard("delete", "other", "--yes")[:2] == (0, "study other was deleted, and 0 B were freed\n")
    assert "there is no study 'other'" in trialyard("delete", "other", "--yes")[2]


@pytest.mark.usefixtures("finished")
def test_storage_prune_lists_asks_and_removes(home: Path, trialyard: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    path = home / "yard" / "artifacts" / "digits" / "0" / "checkpoint.npz"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x" * 1500)
    _answer(monkeypatch, "n\n")
    code, out, err = trialyard("storage", "prune")
    assert (code, out) == (1, "")
    assert f"{path}: 1.5 kB, the checkpoint of a finished trial\n" in err
    assert "Remove this file, 1.5 kB?" in err
    assert path.exists()
    code, out, _ = trialyard("storage", "prune", "--yes")
    assert (code, out) == (0, f"1.5 kB were freed below {home}/yard/artifacts\n")
    assert not path.exists()
    assert trialyard("storage", "prune")[:2] == (0, f"0 B were freed below {home}/yard/artifacts\n")


def test_a_stopped_study_that_is_run_again_says_so(trialyard: Call, home: Path) -> None:
    (home / "n.toml").write_text(GOOD, encoding="utf-8")
    assert trialyard("create", "n.toml")[0] == 0
    assert trialyard("stop", "n")[0] == 0
    code, _, err = trialyard("run", "n.toml")
    assert code == 1
    assert err == (
        "study n is stopped: `trialyard resume n`, and the same command goes on\n"
        "error: study 'n' was stopped before any of its trials was complete: `trialyard resume n` opens it, and "
        "`trialyard work n` continues it\n"
    )


def test_compare_puts_two_studies_side_by_side(finished_study: str, trialyard: Call) -> None:
    code, out, _ = trialyard("compare", finished_study, finished_study)
    assert code == 0
    assert "+0.0000" in out
    _, out, _ = trialyard("compare", finished_study, finished_study, "--json")
    assert json.loads(out)["difference"] == 0.0
    code, _, err = trialyard("compare", finished_study)
    assert (code, len(err.splitlines())) == (1, 1)
    assert "repeats no results of the notebook" in err
