"""A trial's files are written whole or not at all."""

from pathlib import Path

import pytest

from storage import artifacts
from storage.artifact_store import FolderStore


def test_every_trial_has_its_own_folder(tmp_path: Path) -> None:
    assert str(artifacts.attempt_folder("digits", "0123456789abcdef" * 2, 7, 2)) == "digits-0123456789ab/7/2"


def test_a_file_appears_whole_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "digits" / "0" / artifacts.MODEL
    with artifacts.written_atomically(path) as temporary:
        assert temporary.suffix == path.suffix  # Keras chooses its format by it
        temporary.write_bytes(b"part")
        assert not path.exists()
        temporary.write_bytes(b"whole")
    assert path.read_bytes() == b"whole"
    assert list(path.parent.iterdir()) == [path]


def test_an_error_leaves_the_old_file_and_no_temporary_one(tmp_path: Path) -> None:
    path = tmp_path / artifacts.HISTORY
    path.write_bytes(b"old")

    def fail() -> None:
        with artifacts.written_atomically(path) as temporary:
            temporary.write_bytes(b"ha")
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_download_that_was_cut_off_is_one_of_our_files(tmp_path: Path) -> None:
    """Such as a checkpoint's, which is copied to a temporary name of its own: `storage prune` finds it."""
    folder = tmp_path / artifacts.attempt_folder("digits", "0123456789abcdef" * 2, 7, 2)
    with artifacts.written_atomically(folder / f".{'0' * 32}-{artifacts.CHECKPOINT}") as temporary:
        temporary.touch()
        assert [tmp_path / stored.path for stored in FolderStore(tmp_path).files()] == [temporary]
