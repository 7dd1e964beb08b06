"""TRIALYARD_* environment variables: where this machine keeps and finds things."""

import os
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import sqlalchemy
from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict
from sqlalchemy.exc import ArgumentError

from storage.errors import SettingsError


class Settings(BaseSettings):
    """What the environment says; every field has the twin ``TRIALYARD_<FIELD>``.

    Without any setting all lives in ``./yard``: ``studies.db``, ``artifacts/``, ``data/`` and ``logs/``.
    """

    model_config = SettingsConfigDict(env_prefix="TRIALYARD_", env_ignore_empty=True, frozen=True)

    home: Path = Path("yard")
    storage: str | None = None  # the database's URL; sqlite:///<home>/studies.db without it
    storage_file: Path | None = None  # a file that holds the URL, so that its password stands in no process list
    storage_password_file: Path | None = None  # a file that holds the password of a URL that has none
    artifacts: Path | None = None  # folder of models and histories; <home>/artifacts without it
    data: Annotated[tuple[Path, ...], NoDecode] = ()  # folders with <name>.npz, separated as PATH is
    beat_seconds: float = Field(default=10.0, gt=0)  # how often a running trial is beaten for
    # Silence after which a trial is claimed again: more than a minute without the database and a beat before it.
    grace_seconds: float = Field(default=120.0, gt=0)
    checkpoint_seconds: float = Field(default=30.0, ge=0)  # the least time between two checkpoints of a trial
    stop_seconds: float = Field(default=30.0, gt=0)  # how long a stopped worker may take to end its batches
    patience_seconds: float = Field(default=600.0, ge=0)  # how long a worker waits for a database that is away
    memory_growth: float = Field(default=0.15, gt=0)  # share by which a trainer may grow before it is replaced
    dashboard_password: SecretStr | None = None  # asked for by the dashboard, which else serves this machine alone
    dashboard_password_file: Path | None = None  # a file that holds it

    keep_models: int = Field(default=5, ge=1)  # of a study, the models of so many best trials; histories always stay

    @field_validator("data", mode="before")
    @classmethod
    def _folders(cls, value: Any) -> Any:
        return tuple(Path(part) for part in value.split(os.pathsep)) if isinstance(value, str) else value

    @cached_property
    def url(self) -> str:
        """The database's URL, password and all.

        Raises SettingsError where a file that holds it, or its password, cannot be read, or the password is empty.
        """
        if self.storage is not None:
            found = self.storage
        elif self.storage_file is not None:
            found = _read("TRIALYARD_STORAGE_FILE", self.storage_file, "the database's URL")
        else:
            return f"sqlite:///{self.home.absolute() / 'studies.db'}"
        if self.storage_password_file is None:
            return found
        return _with_password(
            found, _secret("TRIALYARD_STORAGE_PASSWORD_FILE", self.storage_password_file, "the database's password")
        )

    @cached_property
    def password(self) -> SecretStr | None:
        """The dashboard's password, or None where there is none.

        Raises SettingsError where the file that holds it cannot be read or is empty.
        """
        if self.dashboard_password is not None or self.dashboard_password_file is None:
            return self.dashboard_password
        # An empty file must not open the dashboard to everybody.
        return SecretStr(
            _secret("TRIALYARD_DASHBOARD_PASSWORD_FILE", self.dashboard_password_file, "the dashboard's password")
        )

    @cached_property
    def artifact_folder(self) -> Path:
        """Absolute folder under which every study has one of its own."""
        return (self.artifacts or self.home / "artifacts").absolute()

    @cached_property
    def data_folders(self) -> tuple[Path, ...]:
        """Where data files are looked for, in this order: TRIALYARD_DATA, then what was downloaded."""
        return (*(folder.absolute() for folder in self.data), self.home.absolute() / "data")

    @cached_property
    def log_folder(self) -> Path:
        """Where the trainer processes write what they print."""
        return self.home.absolute() / "logs"


def _read(name: str, path: Path, what: str) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"{name} = {str(path)!r} cannot be read ({getattr(error, 'strerror', None) or 'it is no text'}): "
            f"write {what} into it"
        ) from None


def _secret(name: str, path: Path, what: str) -> str:
    found = _read(name, path, what)
    if not found:
        raise SettingsError(f"{name} = {str(path)!r} is empty: write {what} into it")
    return found


def _with_password(url: str, password: str) -> str:
    try:
        parsed = sqlalchemy.make_url(url)
    except (ArgumentError, ValueError):
        return url  # whoever opens it says what is wrong
    if not parsed.drivername.startswith("postgres") or parsed.password is not None:
        return url
    return parsed.set(password=password).render_as_string(hide_password=False)


def load(**overrides: Any) -> Settings:
    """The settings of this process; an override that is None counts as not given.

    Raises SettingsError where a variable has a value of the wrong kind.
    """
    try:
        return Settings(**{name: value for name, value in overrides.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        name = f"TRIALYARD_{str(first['loc'][0]).upper()}" if first["loc"] else "the settings"
        raise SettingsError(
            f"{name} = {first['input']!r} cannot be used: {first['msg']}; correct or unset it"
        ) from None
