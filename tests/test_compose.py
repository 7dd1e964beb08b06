"""The deployment files for Docker Compose and systemd are right, and their services work."""

import base64
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import containers
import manifests
import pytest
import sqlalchemy
import yaml
from containers import ROOT, Image, InstalledHere, Stack

import studies
from search import worker
from storage import database, slots
from storage.settings import Settings

pytestmark = pytest.mark.long

DEPLOYMENT = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
COMPOSE = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
EXAMPLE = (ROOT / ".env.example").read_text(encoding="utf-8")
EVERY = re.sub(r"^#(?=[A-Z_]+=)", "", EXAMPLE, flags=re.MULTILINE)  # with every setting that it shows
LEAST_STOP = Settings().stop_seconds + worker.EXIT_SECONDS

SERVICES = {"database", "storage", "dashboard", "worker"}


def _project(folder: Path, env: str) -> Path:
    """A copy of what Compose reads, with this `.env`."""
    (folder / "deploy").mkdir()
    for name in ("docker-compose.yml", "deploy/database-port.yml"):
        (folder / name).write_bytes((ROOT / name).read_bytes())
    (folder / ".env").write_text(env, encoding="utf-8")
    return folder


# --- docker-compose.yml and .env.example ------------------------------------------------------------------


@pytest.mark.parametrize("env", ["", EXAMPLE, EVERY], ids=["without .env", "the example", "every setting"])
@pytest.mark.parametrize("profiles", [(), ("gpu",)], ids=["no profile", "gpu"])
def test_compose_accepts_the_file(tmp_path: Path, docker_compose: str, env: str, profiles: tuple[str, ...]) -> None:
    read = containers.resolved(_project(tmp_path, env), docker_compose, *profiles)
    assert read["services"].keys() >= SERVICES
    published = {
        name: [at for at, _ in one.ports] for name, one in containers.services(tmp_path, read).items() if one.ports
    }
    expected = {"dashboard": ["127.0.0.1:8080"]}
    if env == EVERY:  # which names the second file
        expected |= {"database": ["127.0.0.1:5432"]}
    assert published == expected


def test_settings_reach_the_services(tmp_path: Path, docker_compose: str) -> None:
    env = "TRIALYARD_DASHBOARD_ADDRESS=192.0.2.7\nTRIALYARD_ARTIFACTS=/shared/artifacts\nTRIALYARD_WORKERS=3\n"
    read = containers.resolved(_project(tmp_path, env), docker_compose)
    services = containers.services(tmp_path, read)
    assert services["dashboard"].ports == (("192.0.2.7:8080", 8080),)
    assert services["worker"].environment["TRIALYARD_WORKERS"] == "3"
    assert "TRIALYARD_GRACE_SECONDS" not in services["worker"].environment
    for name in ("worker", "dashboard"):
        assert services[name].volumes["/artifacts"] == "/shared/artifacts"


def test_an_object_store_reaches_the_services_that_use_trials_files(tmp_path: Path, docker_compose: str) -> None:
    """By the file that docs/deployment.md shows: TRIALYARD_ARTIFACTS in `.env` is the folder that is mounted."""
    project = _project(tmp_path, "")
    (override,) = re.findall(r"^```yaml\n(.*?)^```", DEPLOYMENT, re.MULTILINE | re.DOTALL)
    (project / "docker-compose.override.yml").write_text(override, encoding="utf-8")
    variables = {"TRIALYARD_ARTIFACTS": "s3://the-bucket/trialyard", "AWS_ACCESS_KEY_ID": "the-key"}
    text = "".join(f"{name}={value}\n" for name, value in variables.items())
    (project / "store.env").write_text(text, encoding="utf-8")
    services = containers.services(project, containers.resolved(project, docker_compose, "gpu"))
    have = {name for name, one in services.items() if variables.items() <= one.environment.items()}
    assert have == {name for name, one in services.items() if "/artifacts" in one.volumes} - {"storage"}
    assert have == {"dashboard", "worker", "worker-gpu"}


@pytest.mark.parametrize("env", ["", EXAMPLE, "TRIALYARD_WORKERS=2\nTRIALYARD_ARTIFACTS=/shared\n"])
def test_our_reader_reads_the_file_as_compose_does(tmp_path: Path, docker_compose: str, env: str) -> None:
    """The services must run in the same way on a machine without docker-compose."""
    project = _project(tmp_path, env)
    theirs, ours = (
        containers.services(project, containers.resolved(project, program, "gpu")) for program in (docker_compose, None)
    )
    assert ours.keys() == theirs.keys()
    for name, one in ours.items():
        for field in (
            "image",
            "command",
            "environment",
            "ports",
            "waits_for",
            "health",
            "grace",
            "stop_signal",
            "profiles",
        ):
            assert getattr(one, field) == getattr(theirs[name], field), f"{name}: {field}"
        assert {target: file.resolve() for target, file in one.secrets.items()} == theirs[name].secrets
        assert one.volumes.keys() == theirs[name].volumes.keys()


def test_every_setting_is_in_the_example_and_every_one_in_it_is_used() -> None:
    port = (ROOT / "deploy" / "database-port.yml").read_text(encoding="utf-8")
    used = set(re.findall(r"\$\{(\w+)", COMPOSE + port)) | set(re.findall(r"^  +([A-Z_]+):$", COMPOSE, re.MULTILINE))
    shown = set(re.findall(r"^#([A-Z_]+)=", EXAMPLE, re.MULTILINE))
    assert shown - {"COMPOSE_FILE", "COMPOSE_PROFILES"} == used


def test_a_default_in_the_example_is_that_of_the_file_or_the_program() -> None:
    defaults = dict(re.findall(r"\$\{(\w+):-([^}]+)\}", COMPOSE))
    product = {f"TRIALYARD_{name.upper()}": str(field.default) for name, field in Settings.model_fields.items()}
    for name, value in re.findall(r"^#(TRIALYARD_\w+)=(.*)$", EXAMPLE, re.MULTILINE):
        about = EXAMPLE.partition(f"#{name}=")[0].rpartition("\n\n")[2]
        if "xample" in about:
            continue
        known = defaults.get(name, product.get(name))
        if known is not None:
            assert value == known or float(value) == float(known), name


def test_workers_have_longer_to_stop_than_they_take() -> None:
    for name, one in containers.services(ROOT, yaml.safe_load(COMPOSE)).items():
        if "worker" in name:
            assert one.grace > LEAST_STOP + 20


def test_only_the_profile_s_worker_gets_gpus() -> None:
    services = yaml.safe_load(COMPOSE)["services"]
    reserved = {
        name: one["deploy"]["resources"] for name, one in services.items() if "resources" in one.get("deploy", {})
    }
    assert (
        reserved.keys() == {"worker-gpu"} == {name for name, one in services.items() if one.get("profiles") == ["gpu"]}
    )
    (device,) = reserved["worker-gpu"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    assert services["worker-gpu"]["build"]["target"] == "gpu"


def test_no_service_has_a_password_in_its_environment() -> None:
    for one in yaml.safe_load(COMPOSE)["services"].values():
        for name, value in one["environment"].items():
            assert "PASSWORD" not in name or (name.endswith("_FILE") and value.startswith("/run/secrets/"))


# --- the Dockerfile ---------------------------------------------------------------------------------------


def test_images_have_pinned_bases_and_no_root() -> None:
    stages = containers.stages()
    assert {"cpu", "gpu"} <= stages.keys()
    for name in ("cpu", "gpu"):
        steps = stages[name]
        assert re.fullmatch(r"python:3\.11\.\d+-slim-bookworm@sha256:[0-9a-f]{64}", steps[0][1])
        assert [rest for word, rest in steps if word == "USER"] == ["1000:1000"]
        assert not [rest for word, rest in steps if word in ("ADD", "ARG")]
    assert re.search(r"image: postgres:17\.\d+-bookworm@sha256:[0-9a-f]{64}\n", COMPOSE)


@pytest.mark.parametrize(("target", "lock"), [("cpu", "requirements.lock"), ("gpu", "requirements-gpu.lock")])
def test_a_change_of_the_code_installs_no_package_again(target: str, lock: str) -> None:
    steps = containers.stages()[target]
    copies = [(at, rest.split()[:-1]) for at, (word, rest) in enumerate(steps) if word == "COPY"]
    install = steps.index(("RUN", f"pip install --require-hashes --requirement {lock}"))
    assert [sources for at, sources in copies if at < install] == [[lock]]
    after = {source for at, sources in copies if at > install for source in sources}
    assert after == {"pyproject.toml", "README.md", "LICENSE", "trialyard", "search", "studies", "storage"}


def test_only_what_is_copied_can_enter_an_image(tmp_path: Path) -> None:
    wanted = {source for word, rest in containers.instructions() if word == "COPY" for source in rest.split()[:-1]}
    for source in wanted:
        assert containers.copied(source), source
    for path in (".env", "secrets/database_password", ".git/config", "tests/conftest.py", "yard/studies.db"):
        assert containers.ignored(path), path
    assert containers.ignored("search/__pycache__/cli.cpython-311.pyc")
    assert not containers.ignored("studies/catalog/digits.toml")


def _locked(name: str) -> dict[str, str]:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert "://" not in text, f"{name} names a place"
    return dict(re.findall(r"^([a-z0-9._-]+)==([^ ;\\]+)", text, re.MULTILINE))


def test_the_locks_agree() -> None:
    cpu, gpu = _locked("requirements.lock"), _locked("requirements-gpu.lock")
    assert cpu.items() <= gpu.items()
    assert cpu.items() <= _locked("requirements-dev.lock").items()
    extra = gpu.keys() - cpu.keys()
    assert {"nvidia-cudnn-cu12", "nvidia-cuda-runtime-cu12"} <= extra
    assert all(name.startswith("nvidia-") for name in extra)


# --- the whole, without an engine -------------------------------------------------------------------------


def _asked(url: str, password: str | None) -> tuple[int, Any]:
    """The dashboard's status and answer with this password."""
    request = urllib.request.Request(url)
    if password is not None:
        request.add_header("Authorization", "Basic " + base64.b64encode(f"anybody:{password}".encode()).decode())
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, None


def _typed(pattern: str, text: str = DEPLOYMENT) -> list[str]:
    """The commands that docs/deployment.md, or that part of it, tells a user to type."""
    lines = re.findall(rf"^{pattern}", text, re.MULTILINE)
    assert lines, pattern
    return [str(line) for line in lines]


def test_the_documented_update_upgrades_an_older_database(tmp_path: Path) -> None:
    """Whose tables the service that creates them refuses. No worker and no dashboard runs meanwhile."""
    project = tmp_path / "project"
    project.mkdir()
    _project(project, "")
    for line in _typed("(?:mkdir|openssl) .*secrets.*"):
        subprocess.run(line, shell=True, cwd=project, check=True)
    password = (project / "secrets" / "database_password").read_text(encoding="utf-8").strip()
    composed = containers.resolved(project, None)
    services = containers.services(project, composed)
    update = DEPLOYMENT.partition("## After an update")[2]
    (stopped,) = _typed("docker compose --profile gpu stop .*", update)
    assert {*stopped.split()[5:]} == services.keys() - {"database", "storage"}
    image = InstalledHere("cpu", tmp_path / "image")
    with Stack(project, services, image, containers.built_image(composed, "cpu"), "database") as stack:
        running = stack.start(services["database"])
        stack.running.append(running)
        containers.until(lambda: stack.healthy(running), "the database is healthy")
        create = services["storage"].command
        stack.run("storage", *create)
        _make_older(f"postgresql+psycopg://trialyard:{password}@127.0.0.1:{stack.database_port}/trialyard")
        with pytest.raises(AssertionError, match="was made by an older Trialyard: run `trialyard storage upgrade`"):
            stack.run("storage", *create)
        for line in _typed("docker compose run .*", update):
            assert "--no-deps" in line, "it would start the service that refuses the database"
            stack.run(*_service_and_command(line))
        assert len([*(project / "containers").glob("worker-*/before-update.db")]) == 1
        stack.run("storage", *create)


def _make_older(url: str) -> None:
    """Makes the tables at `url` those of an older version."""
    engine = sqlalchemy.create_engine(url)
    with engine.begin() as connection:
        for table in database.OUR_TABLES:
            connection.exec_driver_sql(f"DROP TABLE {table.name}")
        connection.exec_driver_sql(f"CREATE TABLE {slots.OLD_TABLE} (slot TEXT)")
    engine.dispose()


def _service_and_command(line: str) -> list[str]:
    """The words of a `docker compose run` without those of its own options."""
    words = shlex.split(line.partition(" run ")[2], comments=True)
    while words[0].startswith("--"):
        del words[: 2 if words[0] in ("--volume", "--workdir") else 1]
    return words


@pytest.mark.timeout(int(containers.INSTALL_SECONDS) + 1200)
def test_a_team_s_service_works_from_installation_to_shutdown() -> None:
    """Installed as the image would be, started as Compose would: two workers finish a study that somebody creates."""
    # Not below pytest's own folder, which is kept: an installation takes gigabytes. (And see `postgresql`.)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        image = Image("cpu", folder / "image")
        assert len(image.build()) == 2
        project = folder / "project"
        project.mkdir()
        _project(project, f"{EXAMPLE}\nTRIALYARD_WORKERS=1\n")
        for line in _typed("(?:mkdir|openssl) .*secrets.*"):
            subprocess.run(line, shell=True, cwd=project, check=True)
        passwords = {path.name: path.read_text(encoding="utf-8").strip() for path in (project / "secrets").iterdir()}
        assert len(set(passwords.values())) == 2
        read = containers.resolved(project, shutil.which("docker-compose"))
        services = containers.services(project, read)
        with Stack(project, services, image, containers.built_image(read, "cpu"), "database") as stack:
            _works(stack, passwords)
        kubernetes = folder / "kubernetes"
        kubernetes.mkdir()
        _works_in_kubernetes(kubernetes, image)


def _works(stack: Stack, passwords: dict[str, str]) -> None:
    stack.up({"worker": 2})
    for one in [*stack.of("dashboard"), *stack.of("worker")]:
        containers.until(lambda one=one: stack.healthy(one), f"{one.service.name} is healthy", 2.0)

    (line,) = _typed("docker compose run .*create [a-z]+")
    service, *command = shlex.split(line.partition("--rm ")[2])
    # A newcomer's study, but small.
    assert "6 trials" in stack.run(service, *command, "--trials", "6", "--epochs", "2", "--limit", "400")

    url, password = stack.address("dashboard"), passwords["dashboard_password"]
    for wrong in (None, "", "wrong", passwords["database_password"]):
        assert _asked(f"{url}/api/studies", wrong) == (401, None)
    status, listed = _asked(f"{url}/api/studies", password)
    assert status == 200
    ((study_id, name),) = [(one["study_id"], one["study_name"]) for one in listed["study_summaries"]]

    def trials(study: int, *states: str) -> list[Any]:
        page_trials = _asked(f"{url}/api/studies/{study}?after=0", password)[1]["trials"]
        return [one for one in page_trials if one["state"] in states]

    def ended() -> list[Any]:
        ended = trials(study_id, "Complete", "Pruned")
        return ended if len(ended) == 6 else []

    finished = containers.until(ended, "the study's end", 2.0)
    complete = [one for one in finished if one["state"] == "Complete"]
    assert complete
    assert all(0.0 < one["values"][0] <= 1.0 for one in complete)
    workers = {one.process.pid for one in stack.of("worker")}
    url_here = f"postgresql://trialyard:{passwords['database_password']}@127.0.0.1:{stack.database_port}/trialyard"
    storage = database.connect(url_here)
    attempts = [studies.attempts(name, trial["number"], storage) for trial in finished]
    storage.engine.dispose()  # a server that is asked to stop waits for those that are connected
    assert {attempt.owner.pid for each in attempts for attempt in each} == workers, "each of the two had its share"
    assert all(len(each) == 1 for each in attempts)

    # Any container sees the models, which are on the shared volume.
    best = json.loads(stack.run("worker", "trialyard", "best", name, "--json"))
    assert Path(best["model"]).is_file()
    assert best["value"] == max(one["values"][0] for one in complete)
    _beside_it(stack, passwords["database_password"], name, best["value"])

    # In the middle of a trial each, the workers are asked to stop.
    stack.run(service, *command, "--name", "long", "--epochs", "100000", "--limit", "400")
    (long_id,) = {one["study_id"] for one in _asked(f"{url}/api/studies", password)[1]["study_summaries"]} - {study_id}

    def under_way() -> bool:
        return len([one for one in trials(long_id, "Running") if one["intermediate_values"]]) == 2

    containers.until(under_way, "two trials under way")
    codes = stack.down()
    checkpoints = list((stack.project / "volumes" / "artifacts").glob("long-*/*/*/checkpoint.npz"))
    assert len(checkpoints) == 2
    assert codes["worker"] == [130, 130]
    assert codes["storage"] == codes["database"] == [0]
    assert codes["dashboard"] == [0]
    for log in (stack.project / "containers").glob("*.log"):
        said = log.read_text(encoding="utf-8")
        assert "Traceback" not in said, said
        assert not [secret for secret in passwords.values() if secret in said], f"{log.name} tells a password"


def _works_in_kubernetes(project: Path, image: Image) -> None:
    """The same image with the commands, files and settings of deploy/kubernetes."""
    for line in _typed("(?:mkdir|openssl|echo) .*secrets.*"):
        subprocess.run(line, shell=True, cwd=project, check=True)
    objects = [
        one for part in ("", "workers-cpu", "study", "upgrade") for one in manifests.build(manifests.FOLDER / part)
    ]
    (project / "files").mkdir()
    cluster = manifests.Cluster(objects, secrets=project / "secrets", files=project / "files")
    names = ("database", "storage", "dashboard", "tools", "worker-cpu", "upgrade", "study")
    small = {"TRIALYARD_TRIALS": "2", "TRIALYARD_EPOCHS": "1", "TRIALYARD_LIMIT": "400", "TRIALYARD_WORKERS": "1"}
    services = {name: cluster.service(name) for name in names}
    # Kubernetes knows no order of starting; `down` needs one to end them.
    services |= {name: replace(services[name], waits_for={"database": "service_started"}) for name in names[1:]}
    for name in ("worker-cpu", "study"):
        services[name] = replace(services[name], environment=services[name].environment | small)
    study = services["study"] = replace(services["study"], image="trialyard:cpu")  # it asks for GPUs; here are none
    with Stack(project, services, image, "trialyard:cpu", "database") as stack:
        # What ends because something is missing is started again.
        running = {
            name: stack.start(services[name]) for name in ("database", "storage", "dashboard", "tools", "worker-cpu")
        }

        def ready() -> bool:
            for name, one in running.items():
                if one.process.poll():
                    running[name] = stack.start(one.service)
            return running["storage"].process.poll() == 0 and all(
                stack.healthy(running[name]) for name in ("database", "dashboard", "worker-cpu")
            )

        try:
            containers.until(ready, "all pods are ready", 2.0)
        finally:
            stack.running += running.values()
        # `kubectl scale --replicas=0`; the job does all by itself.
        idle = running["worker-cpu"].process
        idle.terminate()
        assert idle.wait(services["worker-cpu"].grace) == 130
        assert "best of digits" in stack.run("study", *study.command)
        status = json.loads(stack.run("worker-cpu", "trialyard", "status", "digits", "--json"))
        assert status["complete"] + status["pruned"] == status["budget"] == 2
        model = Path(json.loads(stack.run("worker-cpu", "trialyard", "best", "digits", "--json"))["model"])
        assert model.is_file()
        assert _asked(f"{stack.address('dashboard')}/api/studies", None) == (401, None)
        stack.run("upgrade", *services["upgrade"].command)
        stack.run("tools", "touch", "/data/mine.npz")
        stack.run("worker-cpu", "test", "-f", "/data/mine.npz")
        stack.run("tools", "trialyard", "delete", "digits", "--yes")
        assert not model.exists(), "what a study had is gone with it"
        ended = {"dashboard": [0], "tools": [-15], "worker-cpu": [130], "storage": [0], "database": [0]}
        assert stack.down() == ended


def _beside_it(stack: Stack, password: str, study: str, best: float) -> None:
    """A trialyard outside the containers works with the same database, through one file with its URL."""
    url = stack.project / "url"
    url.write_text(f"postgresql://trialyard:{password}@127.0.0.1:{stack.database_port}/trialyard\n", encoding="utf-8")
    command = [sys.executable, "-m", "search.cli", "status", study, "--json"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRIALYARD_")}
    result = subprocess.run(
        command, env=environment | {"TRIALYARD_STORAGE_FILE": str(url)}, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["best"] == best


# --- without containers -----------------------------------------------------------------------------------

UNIT = ROOT / "deploy" / "trialyard-worker.service"


def _unit(text: str, key: str) -> str:
    (value,) = re.findall(rf"^{key}=(.*)$", text, re.MULTILINE)
    return str(value)


def test_systemd_accepts_the_unit(tmp_path: Path, systemd_analyze: str) -> None:
    text = UNIT.read_text(encoding="utf-8")
    program, arguments = _unit(text, "ExecStart").split(" ", 1)
    assert (Path(program).name, arguments) == ("trialyard", "work --forever")
    # Only the program's folder is replaced: systemd checks that it exists.
    here = Path(sys.executable).with_name("trialyard")
    assert here.is_file()
    for change, accepted in (("", True), ("KillMode=mixd\n", False)):
        unit = tmp_path / UNIT.name
        unit.write_text(text.replace(program, str(here)) + f"\n[Service]\n{change}", encoding="utf-8")
        asked = subprocess.run([systemd_analyze, "verify", unit], capture_output=True, text=True, timeout=60)
        # It reports unknown options, and exits with 0.
        assert ((asked.returncode, asked.stderr) == (0, "")) == accepted, asked.stderr


def test_the_unit_is_hardened(tmp_path: Path, systemd_analyze: str) -> None:
    asked = subprocess.run(
        [systemd_analyze, "security", "--offline=true", "--threshold=30", UNIT],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert asked.returncode == 0, asked.stdout


def test_the_unit_gives_a_worker_time_to_stop_and_writes_where_its_settings_say() -> None:
    text = UNIT.read_text(encoding="utf-8")
    assert float(_unit(text, "TimeoutStopSec")) > LEAST_STOP + 20
    assert (_unit(text, "KillSignal"), _unit(text, "SuccessExitStatus")) == ("SIGTERM", "130")
    variables = containers.settings(ROOT / "deploy" / "trialyard-worker.env.example")
    assert {name.removeprefix("TRIALYARD_").lower() for name in variables} <= Settings.model_fields.keys()
    # Without the folder, as with an object store, the unit still starts.
    assert _unit(text, "ReadWritePaths") == f"-{variables['TRIALYARD_ARTIFACTS']}"
    assert _unit(text, "RequiresMountsFor") == variables["TRIALYARD_ARTIFACTS"]
    assert variables["TRIALYARD_HOME"] == f"/var/lib/{_unit(text, 'StateDirectory')}" == _unit(text, "WorkingDirectory")


def test_the_second_machine_s_command_mounts_what_the_image_expects() -> None:
    """The `docker run` of docs/deployment.md: one URL file, the shared artifacts, the data, and nothing else."""
    (command,) = re.findall(r"^docker run (?:.*\\\n)*.*$", DEPLOYMENT, re.MULTILINE)
    words = shlex.split(command.replace("\\\n", " "))
    mounted = {words[at + 1].split(":")[1] for at, word in enumerate(words) if word == "--volume"}
    (url,) = [words[at + 1] for at, word in enumerate(words) if word == "--env"]
    image = Image("gpu", Path())
    expected = {url.removeprefix("TRIALYARD_STORAGE_FILE=")}
    expected |= {image.environment["TRIALYARD_ARTIFACTS"], image.environment["TRIALYARD_DATA"]}
    assert mounted == expected
    assert words[-1] == yaml.safe_load(COMPOSE)["services"]["worker-gpu"]["image"]
    assert float(words[words.index("--stop-timeout") + 1]) > LEAST_STOP + 20
