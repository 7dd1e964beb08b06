"""With trials' files in an object store nothing is lost either: real commands, a real S3 server, cut connections."""

import contextlib
import json
import os
import random
import re
import shlex
import signal
import sys
import time
import uuid
import zipfile
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path, PurePosixPath
from threading import Event
from typing import Any

import keras
import pytest
from conftest import Command, attempts_at, ended
from object_server import Server, answering, failing, free_port, holding_uploads, network_to, without_listing
from optuna.trial import TrialState
from scripted import Message, Scripted, epoch, trained

import studies
from search import dashboard
from search.attempt import Attempt, StudyHandle
from search.heartbeat import Pulse
from search.messages import Failed
from storage import (
    artifacts,
    attempt_files,
    claims,
    database,
    ledger,
    object_store,
    owners,
    promises,
    retention,
    settings,
)
from storage.artifacts import CHECKPOINT, HISTORY, MODEL, PREDICTIONS, SUMMARY
from storage.claims import Claim
from storage.errors import ClaimLost, DiskError, ObjectStoreAway, ObjectStoreError
from storage.object_store import ObjectStore
from storage.transactions import PatientStorage
from storage.trial_cache import TrialCache
from studies import registry
from trialyard import functions

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[1]
AWAY_SECONDS = 20.0
# Each epoch's pause stands for the work of a larger model; the weights make a checkpoint of several parts.
MODEL_OF_OURS = """
import time
import keras

@keras.saving.register_keras_serializable()
class Slow(keras.Sequential):
    def fit(self, *arguments, **options):
        time.sleep({pause})
        return super().fit(*arguments, **options)

def build(hyperparameters, image_shape, classes):
    model = Slow([keras.Input(image_shape), keras.layers.Rescaling(1 / 255), keras.layers.Flatten(),
                  keras.layers.Dropout(hyperparameters["dropout"]), keras.layers.Dense({units}),
                  keras.layers.Dense(classes, activation="softmax")])
    model.compile("adam", "categorical_crossentropy", metrics=["accuracy"], run_eagerly=True)
    return model
"""
DEFINITION = """
name = "slow"
dataset = "small.npz"
model = "mine:build"
precision = "float32"

[data]
validation = 0.2

[budget]
trials = {trials}
epochs = {epochs}

[space]
dropout = {{ low = 0.0, high = 0.5 }}

[fixed]
batch_size = 240
"""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.close()


@pytest.fixture
def bucket(server: Server) -> str:
    """The name of a new bucket."""
    name = f"bucket-{uuid.uuid4().hex[:8]}"
    server.create_bucket(name)
    return name


@pytest.fixture
def at_store(home: Path, server: Server, bucket: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Has commands and this process use the bucket; its URL."""
    url = f"s3://{bucket}/of-the-team"
    for name, value in _variables(server, url).items():
        monkeypatch.setenv(name, value)
    return url


def _variables(server: Server, url: str) -> dict[str, str]:
    return server.variables | {
        "TRIALYARD_ARTIFACTS": url,
        "TRIALYARD_WORKERS": "1",
        "TRIALYARD_CHECKPOINT_SECONDS": "0",
        "TRIALYARD_BEAT_SECONDS": "0.5",
    }


def _objects(url: str, tmp_path: Path) -> list[str]:
    """The paths of all objects, as somebody who has copied none."""
    found = ObjectStore(url, tmp_path / uuid.uuid4().hex).files()
    return [str(stored.path) for stored in found]


def _write_slow(home: Path, write_npz: Callable[..., Path], trials: int, epochs: int, pause: float, units: int) -> None:
    write_npz()
    (home / "mine.py").write_text(MODEL_OF_OURS.format(pause=pause, units=units), encoding="utf-8")
    (home / "slow.toml").write_text(DEFINITION.format(trials=trials, epochs=epochs), encoding="utf-8")


def _named(storage: PatientStorage, study: str) -> set[str]:
    """The files that the rows of a study name."""
    trials = storage.get_all_trials(storage.get_study_id_from_name(study))
    return {str(trial.user_attrs[key]) for trial in trials for key in ("model", "history") if key in trial.user_attrs}


def _section(title: str) -> str:
    text = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
    found = re.search(rf"^## {title}$(.*?)^## ", text, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


def test_the_documented_commands_from_the_first_trial_to_the_last_file(
    home: Path, tmp_path: Path, at_store: str, start: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of docs/deployment.md: one machine searches; another one, with a home of its own, takes the result."""
    monkeypatch.setenv("TRIALYARD_STORAGE", f"sqlite:///{home}/studies.db")
    blocks = re.findall(r"^```sh\n(.*?)^```", _section("Files in an object store"), re.MULTILINE | re.DOTALL)
    monkeypatch.setenv("TRIALYARD_KEEP_MODELS", "1")
    written = {}
    for place, block in zip(("worker", "laptop"), blocks, strict=True):
        (home / place).mkdir(exist_ok=True)
        lines = [shlex.split(line, comments=True) for line in block.splitlines()]
        for words in (words for words in lines if words[:1] == ["trialyard"]):
            written[tuple(words[1:])] = ended(start(*words[1:], folder=home / place))
    here = ObjectStore(at_store, home / "other")
    assert "has no problems, and 0 studies" in written["storage", "check"][0]
    (model,) = [path for path in _objects(at_store, tmp_path) if path.endswith(MODEL)]
    assert f"{at_store}/{model}" in written["best", "digits"][0]
    assert sorted(os.listdir(home / "laptop" / "digits-model"))[-1] == "trial.json"
    assert f"0 B were freed below {at_store}" in written["storage", "prune", "--yes"][0]
    monkeypatch.setenv("TRIALYARD_HOME", str(home / "third"))

    best = studies.best_trial("digits")
    exported = keras.models.load_model(home / "laptop" / "digits-model" / MODEL, compile=False)
    assert exported.count_params() == studies.best_model("digits").count_params() == best.user_attrs["parameters"]
    details = studies.trial("digits", best.number)
    assert {file.url.rpartition("/")[2] for file in details.files} >= {
        MODEL,
        HISTORY,
        SUMMARY,
        artifacts.CURVES_PICTURE,
    }
    assert len(details.curve.loss) == 1
    assert "Confusion matrix" in studies.report("digits")
    # What the dashboard offers is what is there, and nothing else.
    opened = database.connect(f"sqlite:///{home}/studies.db")
    files = dashboard.TrialFiles(opened, here)
    for trial in opened.get_all_trials(opened.get_study_id_from_name("digits")):
        for key in filter(lambda key: key.startswith("artifacts:"), trial.system_attrs):
            name = json.loads(trial.system_attrs[key])["filename"]
            with files.open_reader(key.removeprefix("artifacts:")) as offered:
                assert offered.read(2) in (b"PK", b"[\n", b"<s"), name
    # Nothing but copies is on the machine that trained: no model, and no checkpoint.
    left = {path.name for path in (home / "worker" / "yard" / "objects").rglob("*") if path.is_file()}
    assert left == {HISTORY, SUMMARY, PREDICTIONS}  # of the best, for the figures
    assert studies.delete("digits") > 0
    assert _objects(at_store, tmp_path) == []
    assert list((home / "third").rglob("*.keras")) == []


def test_cut_uploads_and_a_store_that_is_away_lose_nothing(
    home: Path,
    tmp_path: Path,
    at_store: str,
    server: Server,
    write_npz: Callable[..., Path],
    start: Command,
) -> None:
    """Uploads are cut in the middle; then the store is away for 20 s while trials train and end."""
    _write_slow(home, write_npz, trials=3, epochs=3, pause=0.5, units=4000)
    with network_to(server) as network:
        through = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{network.port}"}
        worker = start("run", "slow.toml", variables=os.environ | through)
        _wait_for((home / "yard" / "studies.db").exists)
        network.cut_after = 100_000
        _wait_for(lambda: network.cuts >= 3)
        network.disconnect()
        time.sleep(AWAY_SECONDS)
        network.cut_after = None
        network.connect()
        ended(worker)
    opened = database.connect(f"sqlite:///{home}/yard/studies.db")
    trials = opened.get_all_trials(opened.get_study_id_from_name("slow"))
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 3
    assert {len(attempts_at(opened, trial._trial_id)) for trial in trials} == {1}
    objects = _objects(at_store, tmp_path)
    assert _named(opened, "slow") <= set(objects)
    assert not [path for path in objects if path.endswith(CHECKPOINT)]
    # Each object is whole.
    store = ObjectStore(at_store, home / "other")
    for path in _named(opened, "slow"):
        fetched = store.fetch(path)
        assert fetched is not None
        if fetched.name == MODEL:
            with zipfile.ZipFile(fetched) as archive:
                assert archive.testzip() is None
    assert retention.unneeded(opened, store, 5) == []


def test_a_store_that_stays_away_costs_no_budget(
    home: Path, at_store: str, server: Server, write_npz: Callable[..., Path], start: Command
) -> None:
    """The trial goes back when the worker's patience ends, which says why; the same command finishes it later."""
    _write_slow(home, write_npz, trials=1, epochs=2, pause=0.5, units=10)
    with network_to(server) as network:
        variables = os.environ | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{network.port}"}
        worker = start("run", "slow.toml", variables=variables | {"TRIALYARD_PATIENCE_SECONDS": "1"})
        _wait_for((home / "yard" / "studies.db").exists)
        network.disconnect()
        _, err = ended(worker, 1)
        assert re.search(rf"error: {at_store} cannot be reached .*: bring it back", " ".join(err.split())), err
        opened = database.connect(f"sqlite:///{home}/yard/studies.db")
        study = ledger.find(opened, "slow")
        (trial,) = opened.get_all_trials(study.id)
        assert trial.state == TrialState.WAITING
        assert "failure" not in trial.user_attrs
        assert attempts_at(opened, trial._trial_id)[0].checkpoint is None  # it is on that machine alone
        network.connect()
        ended(start("run", "slow.toml", variables=variables))
        (trial,) = opened.get_all_trials(study.id)
        assert trial.state == TrialState.COMPLETE
        assert attempts_at(opened, trial._trial_id)[1].resumed_after is not None


def test_a_function_of_a_notebook_reaches_other_machines(
    home: Path, at_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(hyperparameters: dict[str, float], image_shape: tuple[int, ...], classes: int) -> str:
        return f"a model of {classes} classes"

    monkeypatch.setattr(functions, "__path__", [*functions.__path__])
    stored = functions.of(build)
    assert isinstance(stored, functions.StoredFunction)
    stored.write()
    monkeypatch.setenv("TRIALYARD_HOME", str(home / "second"))
    registry.fetch_function(stored.name, settings.load().artifact_store)
    loaded = functions.load(str(home / "second" / functions.folder() / f"{stored.module}.py"))
    assert loaded({}, (28, 28, 1), 10) == "a model of 10 classes"


def _wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_another_machine_goes_on_from_the_last_checkpoint(
    home: Path, tmp_path: Path, at_store: str, write_npz: Callable[..., Path], start: Command
) -> None:
    """It has nothing of the first machine but the database and the store, and the numbers are the same."""
    _write_slow(home, write_npz, trials=1, epochs=6, pause=0.6, units=10)
    ended(start("create", "slow.toml"))
    variables = os.environ | {"TRIALYARD_STORAGE": f"sqlite:///{home}/yard/studies.db"}
    first = start("work", "slow", variables=variables | {"TRIALYARD_HOME": str(home / "first")})
    opened = database.connect(f"sqlite:///{home}/yard/studies.db")
    study = ledger.find(opened, "slow")
    _wait_for(lambda: any(trial.last_step == 3 for trial in opened.get_all_trials(study.id)))
    first.send_signal(signal.SIGTERM)
    ended(first, 130)
    (trial,) = opened.get_all_trials(study.id)
    assert trial.state == TrialState.WAITING
    (attempt,) = attempts_at(opened, trial._trial_id)
    assert attempt.checkpoint in _objects(at_store, tmp_path)
    ended(start("work", "slow", variables=variables | {"TRIALYARD_HOME": str(home / "second")}))
    (trial,) = opened.get_all_trials(study.id)
    assert trial.state == TrialState.COMPLETE
    assert attempts_at(opened, trial._trial_id)[1].resumed_after >= 3
    # What the first attempt left is gone, and nothing of it was counted.
    assert {PurePosixPath(path).parent.name for path in _objects(at_store, tmp_path)} == {"2"}
    ended(start("replay", "slow", "0", variables=variables | {"TRIALYARD_HOME": str(home / "third")}))


def test_workers_that_are_killed_lose_nothing(
    home: Path, tmp_path: Path, at_store: str, write_npz: Callable[..., Path], start: Command
) -> None:
    """They get SIGKILL at any moment of an epoch; each next worker has nothing but the database and the store."""
    _write_slow(home, write_npz, trials=3, epochs=4, pause=0.5, units=2000)
    ended(start("create", "slow.toml"))
    variables = os.environ | {"TRIALYARD_STORAGE": f"sqlite:///{home}/yard/studies.db"}
    opened = database.connect(f"sqlite:///{home}/yard/studies.db")
    study, dice = ledger.find(opened, "slow"), random.Random(1)

    def worker(number: int) -> Any:
        return start("work", "slow", variables=variables | {"TRIALYARD_HOME": str(home / f"machine-{number}")})

    def epochs() -> int:
        return sum(len(trial.intermediate_values) for trial in opened.get_all_trials(study.id))

    for kill in range(4):
        process, before = worker(kill), epochs()
        _wait_for(lambda before=before: epochs() > before + 1)  # type: ignore[misc]
        time.sleep(dice.uniform(0.0, 0.6))
        process.kill()
        process.communicate()
    ended(worker(4))
    trials = opened.get_all_trials(study.id)
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 3
    attempts = [attempt for trial in trials for attempt in attempts_at(opened, trial._trial_id)]
    assert [attempt.outcome for attempt in attempts].count("finished") == 3
    assert {attempt.outcome for attempt in attempts} == {"finished", "lost"}
    assert any(attempt.resumed_after for attempt in attempts), "a next worker went on from a checkpoint in the store"
    assert promises.check(opened) == []
    store = ObjectStore(at_store, home / "other")
    assert _named(opened, "slow") <= set(_objects(at_store, tmp_path))
    assert retention.unneeded(opened, store, 5) == []


def test_a_worker_that_lost_its_claim_overwrites_nothing(
    home: Path, tmp_path: Path, at_store: str, storage: PatientStorage, study: str
) -> None:
    """It sleeps before its last upload. Another worker takes the trial over and ends it; then it wakes up."""
    store = settings.load().artifact_store
    slept = claims.claim(storage, ledger.find(storage, study), owners.this_slot("cpu:0"), 60.0)
    assert slept is not None
    claims.requeue(storage, slept, "interrupted", "", None)
    claim = claims.claim(storage, ledger.find(storage, study), owners.this_slot("cpu:1"), 60.0)
    assert claim is not None

    def never() -> None:
        return

    for held in (claim, slept):
        files = attempt_files.of_attempt(store, held, 5.0)
        files.folder.mkdir(parents=True)
        for name in (MODEL, HISTORY):
            (files.folder / name).write_text(f"attempt {held.attempt}", encoding="utf-8")
        if held is claim:
            files.keep_all(never)
            recorded = {"model": str(held.folder / MODEL), "history": str(held.folder / HISTORY)}
            claims.finish(storage, held, TrialState.COMPLETE, 0.9, recorded, [MODEL, HISTORY])
            files.ended()
        else:
            with pytest.raises(ClaimLost):
                claims.finish(storage, held, TrialState.COMPLETE, 0.1, {}, [MODEL])
            files.keep_all(never)  # even if it did
    other = ObjectStore(at_store, home / "other")
    for key in ("model", "history"):
        fetched = other.fetch(storage.get_trial(claim.trial_id).user_attrs[key])
        assert fetched is not None
        assert fetched.read_text(encoding="utf-8") == "attempt 2"
    left = retention.unneeded(storage, other, 5)
    assert [str(file.path) for file in left] == [f"{at_store}/{slept.folder}/{name}" for name in (HISTORY, MODEL)]
    assert retention.remove(storage, other, 5, left) == 2 * len("attempt 1")
    assert _objects(at_store, tmp_path) == [f"{claim.folder}/{name}" for name in (HISTORY, MODEL)]


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        ("no bucket", "the bucket of s3://nobody-has-it does not exist: create it"),
        ("no permission", "refuses this machine .*: give its credentials the right to"),
        ("no listing", "does not tell this machine which objects are missing: give its credentials the right to list"),
        ("away", "cannot be reached .*: bring it back, or correct TRIALYARD_ARTIFACTS"),
        ("no package", r"needs the package obstore, which is not installed: `pip install '\.\[s3\]'`"),
        ("a password", r"TRIALYARD_ARTIFACTS = 's3://\*\*\*@bucket' cannot be used: expected a folder or a URL"),
    ],
)
def test_a_store_that_cannot_be_used_is_found_out_before_anything_is_claimed(
    home: Path,
    at_store: str,
    server: Server,
    write_small: Callable[..., Path],
    trialyard: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
    problem: str,
    reason: str,
) -> None:
    database.create(f"sqlite:///{home}/yard/studies.db")
    monkeypatch.setenv("TRIALYARD_PATIENCE_SECONDS", "0")
    if problem == "no bucket":
        monkeypatch.setenv("TRIALYARD_ARTIFACTS", "s3://nobody-has-it")
    elif problem == "away":
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    elif problem == "no package":
        monkeypatch.setitem(sys.modules, "obstore", None)
        monkeypatch.setitem(sys.modules, "obstore.exceptions", None)
    elif problem == "a password":
        monkeypatch.setenv("TRIALYARD_ARTIFACTS", "s3://key:secret@bucket")
    write_small()
    with contextlib.ExitStack() as stack:
        if problem == "no permission":
            stack.enter_context(server.refusing())
        elif problem == "no listing":
            monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{stack.enter_context(without_listing(server))}")
        for command in (("run", "small.toml"), ("check", "small.toml"), ("storage", "check")):
            code, _, err = trialyard(*command)
            assert code == 1, command
            assert re.search(reason, " ".join(err.split())), err
            assert "Traceback" not in err
            assert "secret" not in err
    assert studies.names(f"sqlite:///{home}/yard/studies.db") == []


@pytest.mark.parametrize(
    ("status", "code", "is_away"),
    [
        (301, "PermanentRedirect", False),  # the bucket is in another region
        (400, "AuthorizationHeaderMalformed", False),  # the same, with another address
        (400, "ExpiredToken", False),
        (400, "InvalidBucketName", False),
        (400, "RequestTimeout", True),
        (503, "SlowDown", True),
        (404, "NoSuchUpload", True),  # its end was asked for twice
    ],
)
def test_only_what_passes_is_waited_for(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, status: int, code: str, is_away: bool
) -> None:
    with answering(status, code) as port:
        for name, value in (server.variables | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ObjectStoreError) as error:
            ObjectStore("s3://bucket/trialyard", tmp_path).check(0.0 if is_away else 5.0)
    assert isinstance(error.value, ObjectStoreAway) is is_away
    assert is_away or "correct the credentials, the region (AWS_REGION) or TRIALYARD_ARTIFACTS" in str(error.value)


def test_a_slow_network_uploads_a_large_file_too(
    at_store: str, tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two parts of it take half of the time that one may take to be answered, and all eight of them twice as long."""
    monkeypatch.setattr(object_store, "READ_TIMEOUT", timedelta(seconds=4))
    store = ObjectStore(at_store, tmp_path)
    content = os.urandom(40_000_000)
    (tmp_path / MODEL).write_bytes(content)
    with network_to(server) as network:
        network.rate = 5_000_000
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{network.port}")
        store.keep(PurePosixPath(MODEL))
        stored = store.open(PurePosixPath(MODEL))
    assert stored is not None
    with stored:
        assert stored.read() == content


@pytest.mark.parametrize(
    "call", [lambda store: store.keep(PurePosixPath(MODEL)), lambda store: store.check()], ids=["a file", "the check"]
)
def test_an_upload_that_the_server_does_not_know_is_tried_again(
    at_store: str, tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, call: Callable[[ObjectStore], None]
) -> None:
    (tmp_path / MODEL).write_bytes(b"the model")
    with failing(server, "PUT", 2, 404, "NoSuchUpload") as port:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        store = ObjectStore(at_store, tmp_path)
        with pytest.raises(ObjectStoreAway, match=r"the server does not know this address or upload .*: correct TRI"):
            call(store)
        store.with_patience(partial(call, store), 30.0)


@pytest.mark.parametrize(
    ("status", "code", "reason"),
    [(403, "AccessDenied", "refuses this machine"), (404, "NoSuchKey", "does not give back what is written to it")],
)
def test_a_check_that_fails_leaves_no_object_behind(
    at_store: str,
    tmp_path: Path,
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    code: str,
    reason: str,
) -> None:
    whole = ObjectStore(at_store, tmp_path)
    assert list(whole._listed(None)) == []
    with failing(server, "GET", 1, status, code) as port:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        with pytest.raises(ObjectStoreError, match=reason):
            ObjectStore(at_store, tmp_path).check()
    assert list(whole._listed(None)) == []


# --- the end of an attempt --------------------------------------------------------------------------------


@pytest.fixture
def claim(storage: PatientStorage, study: str) -> Claim:
    """The running first trial of a study."""
    claimed = claims.claim(storage, ledger.find(storage, study), owners.this_slot("cpu:0"), 60.0)
    assert claimed is not None
    return claimed


def _run(storage: PatientStorage, claim: Claim, folder: Path, *messages: Message | Callable[[], Message]) -> None:
    """Runs the attempt of `claim` with a trainer that says `messages`."""
    handle = StudyHandle(
        study=ledger.find(storage, claim.study),
        definition=registry.definition_of(claim.study, storage),
        storage=storage,
        cached=TrialCache(storage),
    )
    trainer = Scripted(folder, [*messages])
    Attempt(handle, claim, trainer, settings.load(), pulse=Pulse(), listeners=[], interrupted=Event()).run()


def test_a_failed_trial_has_no_checkpoint_though_one_was_being_copied(
    at_store: str,
    tmp_path: Path,
    server: Server,
    storage: PatientStorage,
    claim: Claim,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint = settings.load().artifact_store.folder / claim.folder / CHECKPOINT
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(b"after epoch 1")
    with holding_uploads(server) as uploads:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{uploads.port}")

        def failure() -> Failed:
            assert uploads.came.wait(60)
            return Failed(kind="nan", message="the loss became nan")

        # What an attempt does while it waits for copies.
        monkeypatch.setattr(Attempt, "_look_up", lambda _: uploads.may_end.set())
        _run(storage, claim, tmp_path, epoch(1, 0.5), failure)
        uploads.may_end.set()
        assert uploads.ended.wait(60)
        assert storage.get_trial(claim.trial_id).state == TrialState.FAIL
        assert _objects(at_store, tmp_path) == []


def test_a_file_that_cannot_be_read_for_its_copy_is_the_disk_s_fault(
    at_store: str, tmp_path: Path, storage: PatientStorage, claim: Claim, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIALYARD_PATIENCE_SECONDS", "5")
    model = settings.load().artifact_store.folder / claim.folder / MODEL
    model.parent.mkdir(parents=True)
    model.symlink_to("/proc/self/mem")  # it is opened, and reading it is an error
    with pytest.raises(DiskError, match=rf"the files in {model.parent} cannot be read .*: is the disk damaged\?"):
        _run(storage, claim, tmp_path, trained(stopped=False))
    assert storage.get_trial(claim.trial_id).state == TrialState.WAITING
    assert _objects(at_store, tmp_path) == []
