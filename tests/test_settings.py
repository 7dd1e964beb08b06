"""TRIALYARD_* variables: defaults, overrides, and a sentence for an invalid value."""

import os
from pathlib import Path

import pytest
import sqlalchemy

from storage import settings
from storage.errors import SettingsError


def test_without_settings_everything_is_in_yard(home: Path) -> None:
    loaded = settings.load()
    assert loaded.url == f"sqlite:///{home}/yard/studies.db"
    assert loaded.artifact_folder == home / "yard" / "artifacts"
    assert loaded.data_folders == (home / "yard" / "data",)
    assert loaded.log_folder == home / "yard" / "logs"


def test_the_environment_decides_and_an_option_overrides_it(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIALYARD_HOME", "/somewhere")
    monkeypatch.setenv("TRIALYARD_STORAGE", "sqlite:///there.db")
    monkeypatch.setenv("TRIALYARD_DATA", os.pathsep.join(["/one", "two"]))
    loaded = settings.load(storage=None)
    assert loaded.url == "sqlite:///there.db"
    assert loaded.data_folders == (Path("/one"), home / "two", Path("/somewhere/data"))
    assert settings.load(storage="sqlite:///here.db").url == "sqlite:///here.db"


def test_an_empty_variable_counts_as_none(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIALYARD_STORAGE", "")
    assert settings.load().url == f"sqlite:///{home}/yard/studies.db"


@pytest.mark.parametrize(("name", "value"), [("GRACE_SECONDS", "soon"), ("BEAT_SECONDS", "0"), ("BEAT_SECONDS", "-1")])
def test_a_value_that_cannot_be_used_is_named(
    home: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(f"TRIALYARD_{name}", value)
    with pytest.raises(SettingsError, match=f"TRIALYARD_{name} = '{value}' cannot be used.*correct or unset it"):
        settings.load()


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("postgresql://me@server/trialyard", "postgresql://me:p%40ss%2Fword@server/trialyard"),
        ("postgresql+psycopg://me@server/trialyard", "postgresql+psycopg://me:p%40ss%2Fword@server/trialyard"),
        ("postgresql://me:its-own@server/trialyard", "postgresql://me:its-own@server/trialyard"),
        ("sqlite:///there.db", "sqlite:///there.db"),
        ("nonsense", "nonsense"),
    ],
)
def test_a_url_without_a_password_gets_it_from_the_file(
    home: Path, monkeypatch: pytest.MonkeyPatch, url: str, expected: str
) -> None:
    (home / "password").write_text("p@ss/word\n", encoding="utf-8")
    (home / "url").write_text(f"{url}\n", encoding="utf-8")
    monkeypatch.setenv("TRIALYARD_STORAGE_PASSWORD_FILE", "password")
    assert settings.load(storage=url).url == expected
    monkeypatch.setenv("TRIALYARD_STORAGE_FILE", "url")
    assert settings.load().url == expected
    assert sqlalchemy.make_url(settings.load(storage="postgresql://me@server/d").url).password == "p@ss/word"


def test_the_home_s_own_database_needs_no_password(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIALYARD_STORAGE_PASSWORD_FILE", "none")
    assert settings.load().url == f"sqlite:///{home}/yard/studies.db"


@pytest.mark.parametrize("text", [None, "", " \n"])
def test_a_password_s_file_that_is_missing_or_empty_is_named(
    home: Path, monkeypatch: pytest.MonkeyPatch, text: str | None
) -> None:
    if text is not None:
        (home / "password").write_text(text, encoding="utf-8")
    monkeypatch.setenv("TRIALYARD_STORAGE_PASSWORD_FILE", "password")
    with pytest.raises(SettingsError, match=r"_STORAGE_PASSWORD_FILE = 'password' .*: write the database's password"):
        _ = settings.load(storage="postgresql://me@server/trialyard").url
