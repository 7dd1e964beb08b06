"""TRIALYARD_* environment variables: where this machine keeps its files, and how its workers behave."""

import hashlib
import os
import re
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import sqlalchemy
from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict
from sqlalchemy.exc import ArgumentError

from storage.artifact_store import ArtifactStore, FolderStore
from storage.errors import SettingsError
from storage.object_store import ObjectStore

OBJECT_STORES = ("s3", "gs", "az")  # the schemes of their URLs


class Settings(BaseSettings):
    """The settings of this process. The field ``home`` is read from ``TRIALYARD_HOME``, and so on.

    By default everything is in ``./yard``: ``studies.db``, ``artifacts/``, ``data/`` and ``logs/``.
    """

    model_config = SettingsConfigDict(env_prefix="TRIALYARD_", env_ignore_empty=True, frozen=True)

    home: Path = Path("yard")
    storage: str | None = None  # the database's URL; by default sqlite:///<home>/studies.db
    storage_file: Path | None = None  # a file with the URL, so that no process list shows its password
    storage_password_file: Path | None = None  # a file with the password, for a URL without one
    # Of models and histories: a folder, by default <home>/artifacts, or the URL of an object store.
    artifacts: Path | str | None = None
    data: Annotated[tuple[Path, ...], NoDecode] = ()  # folders with <name>.npz, separated as PATH is
    beat_seconds: float = Field(default=10.0, gt=0)  # between two heartbeats of a worker
    # Silence after which a trial is claimed again: longer than a minute without the database plus one heartbeat.
    grace_seconds: float = Field(default=120.0, gt=0)
    checkpoint_seconds: float = Field(default=30.0, ge=0)  # the shortest time between two checkpoints of a trial
    # How long a stopped worker may take to finish its batches. With what follows, less than a scheduler's 30 seconds.
    stop_seconds: float = Field(default=20.0, gt=0)
    # A training is silent for so long, and for 20 of its longest epochs, before it is taken for one that hangs.
    stall_seconds: float = Field(default=600.0, gt=0)
    patience_seconds: float = Field(default=600.0, ge=0)  # how long a worker waits for a database that is away
    memory_growth: float = Field(default=0.15, gt=0)  # share by which a trainer may grow before it is replaced
    dashboard_password: SecretStr | None = None  # without it the dashboard serves only this machine
    dashboard_password_file: Path | None = None  # a file with that password

    network_sqlite: bool = False  # whether a SQLite file may be on a network disk, for one machine alone
    keep_models: int = Field(default=5, ge=1)  # models of a study that are kept, of its best trials

    @field_validator("data", mode="before")
    @classmethod
    def _folders(cls, value: Any) -> Any:
        return tuple(Path(part) for part in value.split(os.pathsep)) if isinstance(value, str) else value

    @field_validator("artifacts", mode="before")
    @classmethod
    def _folder_or_url(cls, value: Any) -> Any:
        if not isinstance(value, str) or "://" not in value:
            return value if value is None else Path(value)
        if re.fullmatch(rf"({'|'.join(OBJECT_STORES)})://[^/@?#:\s]+(/[^@?#\s]*)?", value) is None:
            raise PydanticCustomError(
                "artifacts",
                "expected a folder or a URL such as s3://bucket/prefix, gs://bucket/prefix or az://container/prefix, "
                "without a password",
            )
        return value

    @cached_property
    def url(self) -> str:
        """The database's URL, with its password.

        Raises SettingsError if a file with the URL or the password cannot be read, or the password is empty.
        """
        if self.storage is not None:
            url = self.storage
        elif self.storage_file is not None:
            url = _read("TRIALYARD_STORAGE_FILE", self.storage_file, "the database's URL")
        else:
            return sqlite_url(self.home.absolute() / "studies.db")
        if self.storage_password_file is None:
            return url
        return _with_password(
            url, _secret("TRIALYARD_STORAGE_PASSWORD_FILE", self.storage_password_file, "the database's password")
        )

    @cached_property
    def password(self) -> SecretStr | None:
        """The dashboard's password; None if none is set.

        Raises SettingsError if its file cannot be read or is empty.
        """
        if self.dashboard_password is not None or self.dashboard_password_file is None:
            return self.dashboard_password
        # An empty file must not let everybody in.
        return SecretStr(
            _secret("TRIALYARD_DASHBOARD_PASSWORD_FILE", self.dashboard_password_file, "the dashboard's password")
        )

    @cached_property
    def artifact_store(self) -> ArtifactStore:
        """Where the files of all attempts are kept."""
        if not isinstance(self.artifacts, str):
            return FolderStore((self.artifacts or self.home / "artifacts").absolute())
        # Another store has another folder: it may have other files under the same names.
        digest = hashlib.sha256(self.artifacts.rstrip("/").encode()).hexdigest()[:12]
        return ObjectStore(self.artifacts, self.home.absolute() / "objects" / digest)

    @property
    def artifact_folder(self) -> Path:
        """The absolute folder that has one folder per study; with an object store, of its files on this machine."""
        return self.artifact_store.folder

    @cached_property
    def data_folders(self) -> tuple[Path, ...]:
        """The folders that are searched for data files, in order: those of TRIALYARD_DATA, then the downloads."""
        return (*(folder.absolute() for folder in self.data), self.home.absolute() / "data")

    @cached_property
    def log_folder(self) -> Path:
        """The folder of the trainer processes' output."""
        return self.home.absolute() / "logs"

    def trainer_log(self, slot: str, pid: int) -> Path:
        """The file with what the trainer processes of a `slot` print, of the worker with this process id."""
        return self.log_folder / f"trainer-{re.sub('[:/]', '-', slot)}-{pid}.log"


def sqlite_url(path: Path) -> str:
    """The URL of a SQLite file. What a path may have and a URL quotes, such as ``?`` and ``%``, is quoted."""
    return sqlalchemy.URL.create("sqlite", database=str(path)).render_as_string()


def _read(name: str, path: Path, what: str) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"{name} = {str(path)!r} cannot be read ({getattr(error, 'strerror', None) or 'it is not text'}): "
            f"write {what} into it"
        ) from None


def _secret(name: str, path: Path, what: str) -> str:
    secret = _read(name, path, what)
    if not secret:
        raise SettingsError(f"{name} = {str(path)!r} is empty: write {what} into it")
    return secret


def _with_password(url: str, password: str) -> str:
    try:
        parsed = sqlalchemy.make_url(url)
    except (ArgumentError, ValueError):
        return url  # opening it reports the problem
    if not parsed.drivername.startswith("postgres") or parsed.password is not None:
        return url
    return parsed.set(password=password).render_as_string(hide_password=False)


SECRETS = (
    "TRIALYARD_STORAGE",
    "TRIALYARD_DASHBOARD_PASSWORD",
    "RAY_AUTH_TOKEN",
)  # what the names of secret variables start with


def environment_without_secrets() -> dict[str, str]:
    """The environment for a process that runs users' code: it needs no database, and may print its environment."""
    return {name: value for name, value in os.environ.items() if not name.startswith(SECRETS)}


def named_by(url: str) -> str:
    """Which setting names the database at `url`, in words that follow "and"."""
    here = load()
    if here.url != url:
        return "--storage, or the argument storage, names it"
    if here.storage is not None:
        return "TRIALYARD_STORAGE names it"
    if here.storage_file is not None:
        return "the file of TRIALYARD_STORAGE_FILE names it"
    if "home" in here.model_fields_set:
        return "TRIALYARD_HOME names its folder"
    return "without TRIALYARD_HOME it is in the folder yard of the current folder"


def load(**overrides: Any) -> Settings:
    """The settings of this process. An override that is None is ignored.

    Raises SettingsError if the value of a variable is invalid.
    """
    try:
        return Settings(**{name: value for name, value in overrides.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        name = f"TRIALYARD_{str(first['loc'][0]).upper()}" if first["loc"] else "the settings"
        # A URL may have what should not be in it.
        value = re.sub(r"://[^/]*@", "://***@", str(first["input"]))
        raise SettingsError(f"{name} = {value!r} cannot be used: {first['msg']}; correct or unset it") from None
