"""Which files stay: what a trial that runs or waits has, all histories, and the models of a study's best trials.

What is superfluous is decided by what the database says *now*, under the study's lock, and never by what was listed
before. Nobody but a finished trial's own rank makes its model superfluous, and a rank never rises. With a file goes the
trial's entry of it, by which optuna-dashboard offers it.
"""

import contextlib
import re
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from optuna.storages import RDBStorage
from optuna.trial import TrialState
from sqlalchemy import Connection, delete, select

from storage import artifacts, attributes
from storage.artifacts import CHECKPOINT, HISTORY, MODEL, SUMMARY
from storage.claims import Claim
from storage.database import read, write
from storage.ranking import ranked
from storage.tables import StudyModel, TrialModel, TrialSystemAttributeModel, TrialUserAttributeModel

# Behind the best, so many are looked at when a trial ends: what a worker left that was killed at that moment.
LOOK_PAST_KEPT = 20
OLD_SECONDS = 24 * 3600.0  # a temporary file that is older was left by a process that was killed
DELETE_BATCH = 100  # files that are removed under one hold of the lock
_NUMBER = re.compile(r"0|[1-9][0-9]*")
# No other file is ever touched, wherever the settings point.
_OURS = re.compile(rf"(\.[0-9a-f]{{32}}-)?({'|'.join(map(re.escape, (MODEL, HISTORY, SUMMARY, CHECKPOINT)))})")


@dataclass(frozen=True, kw_only=True)
class Superfluous:
    """A file that no trial needs."""

    study: str
    number: int  # of the trial
    path: Path
    size: int  # bytes
    why: str


def trim(storage: RDBStorage, claim: Claim, root: Path, keep: int) -> None:
    """After the finish of `claim`: removes models of its study below `root` that are not among the best `keep`.

    Its own, and that of the trial that it pushed out. Killed in between, the next trial's end removes it.
    """

    def beyond(connection: Connection) -> list[Path]:
        study_id = _study_id(connection, claim.study)
        if study_id is None:
            return []
        best = ranked(connection, study_id, keep + LOOK_PAST_KEPT, with_model=True)
        numbers = {standing.number for standing in best[keep:]}
        own = (TrialModel.study_id == study_id, TrialModel.number == claim.number)
        if connection.execute(select(TrialModel.state).where(*own)).scalar() == TrialState.COMPLETE:
            numbers |= {claim.number} - {standing.number for standing in best[:keep]}
        spared = _told(connection, "model", [standing.trial_id for standing in best[:keep]])
        paths = (artifacts.folder(root, claim.study, number) / MODEL for number in sorted(numbers))
        return [path for path in paths if path.exists() and str(path.relative_to(root)) not in spared]

    def remove_all(connection: Connection) -> None:
        for path in beyond(connection):
            artifacts.remove(path)
            _unlist(connection, claim.study, int(path.parent.name), MODEL)

    # Most often there is nothing to do, and the lock is others' to have.
    if read(storage, beyond):
        write(storage, claim.study, remove_all)


def superfluous(storage: RDBStorage, root: Path, keep: int, study: str | None = None) -> list[Superfluous]:
    """What below `root` no trial needs, by path; only that of `study` if it is given.

    Files of studies and trials that are gone, checkpoints of finished trials, models beyond the best `keep`, and what
    was left half written more than a day ago.
    """
    # First the files: a trial stands in the database before it has one.
    found = list(_files(root, study))
    return read(storage, lambda connection: _superfluous(connection, root, keep, found))


def remove(storage: RDBStorage, root: Path, keep: int, listed: Sequence[Superfluous]) -> int:
    """Removes those of the `listed` files that are superfluous still; returns how many bytes that freed."""
    freed = 0
    by_study: dict[str, list[Superfluous]] = defaultdict(list)
    for file in listed:
        by_study[file.study].append(file)
    for study, files in by_study.items():
        for begin in range(0, len(files), DELETE_BATCH):
            part = [(file.study, file.number, file.path) for file in files[begin : begin + DELETE_BATCH]]

            def work(connection: Connection, part: list[tuple[str, int, Path]] = part) -> int:
                gone = _superfluous(connection, root, keep, part)
                for file in gone:
                    artifacts.remove(file.path)
                    _unlist(connection, file.study, file.number, file.path.name)
                    if file.why in (STUDY_GONE, TRIAL_GONE):
                        _remove_empty(file.path.parent)
                    if file.why == STUDY_GONE:
                        _remove_empty(file.path.parent.parent)
                return sum(file.size for file in gone)

            freed += write(storage, study, work)
    return freed


STUDY_GONE, TRIAL_GONE = "its study is gone", "its trial is gone"


def _files(root: Path, study: str | None) -> Iterator[tuple[str, int, Path]]:
    """(study, trial's number, path) of every file of ours, by path."""
    if not root.is_dir():
        return
    for folder in sorted(root.iterdir()):
        if (study is not None and folder.name != study) or folder.is_symlink() or not folder.is_dir():
            continue
        for trial in sorted(folder.iterdir()):
            if _NUMBER.fullmatch(trial.name) and trial.is_dir() and not trial.is_symlink():
                for path in sorted(trial.iterdir()):
                    if _OURS.fullmatch(path.name) and not path.is_symlink():
                        yield folder.name, int(trial.name), path


def _superfluous(
    connection: Connection, root: Path, keep: int, files: Sequence[tuple[str, int, Path]]
) -> list[Superfluous]:
    named = _named(connection, keep)
    studies = {name: _study_id(connection, name) for name in dict.fromkeys(study for study, _, _ in files)}
    states = {name: _states(connection, study_id) for name, study_id in studies.items()}
    best = {
        name: {standing.number for standing in ranked(connection, study_id, keep, with_model=True)}
        for name, study_id in studies.items()
        if study_id is not None
    }
    found = []
    for study, number, path in files:
        if str(path.relative_to(root)) in named:
            continue  # also by a copy of the study
        if studies[study] is None:
            why: str | None = STUDY_GONE
        elif number not in states[study]:
            why = TRIAL_GONE
        else:
            why = _why(path.name, states[study][number], number in best[study], keep)
        with contextlib.suppress(FileNotFoundError):  # its worker removed it a moment ago
            status = path.stat()
            if path.name.startswith("."):
                why = "half written, long ago" if time.time() - status.st_mtime > OLD_SECONDS else None
            if why is not None:
                found.append(Superfluous(study=study, number=number, path=path, size=status.st_size, why=why))
    return found


def _why(name: str, state: TrialState, is_best: bool, keep: int) -> str | None:
    if not state.is_finished():
        return None
    if name == CHECKPOINT:
        return "the checkpoint of a finished trial"
    return f"not among the best {keep}" if name == MODEL and not is_best else None


def _named(connection: Connection, keep: int) -> set[str]:
    """The paths, below the artifacts' folder, that trials of any study name, but for models beyond the best `keep`."""
    histories = _told(connection, "history", None)
    named = histories | {str(Path(history).with_name(SUMMARY)) for history in histories}
    for study_id in connection.execute(select(StudyModel.study_id)).scalars().all():
        best = [standing.trial_id for standing in ranked(connection, study_id, keep, with_model=True)]
        named |= _told(connection, "model", best)
    return named


def _unlist(connection: Connection, study: str, number: int, name: str) -> None:
    """Takes the entry of a file that is gone from its trial, where there is one."""
    trial = select(TrialModel.trial_id).where(
        TrialModel.study_id == select(StudyModel.study_id).where(StudyModel.study_name == study).scalar_subquery(),
        TrialModel.number == number,
    )
    stored, key = TrialSystemAttributeModel, artifacts.listing(study, number, name)[0]
    connection.execute(delete(stored).where(stored.trial_id.in_(trial), stored.key == key))


def _told(connection: Connection, key: str, trial_ids: Sequence[int] | None) -> set[str]:
    stored = TrialUserAttributeModel
    wanted = select(stored.value_json).where(stored.key == key)
    if trial_ids is not None:
        wanted = wanted.where(stored.trial_id.in_(trial_ids))
    paths = map(attributes.decoded, connection.execute(wanted).scalars())
    return {path for path in paths if artifacts.inside(Path(), path) is not None}


def _states(connection: Connection, study_id: int | None) -> dict[int, TrialState]:
    rows = connection.execute(select(TrialModel.number, TrialModel.state).where(TrialModel.study_id == study_id))
    return {int(number): state for number, state in rows}


def _study_id(connection: Connection, study: str) -> int | None:
    return connection.execute(select(StudyModel.study_id).where(StudyModel.study_name == study)).scalar()


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):  # it has other files
        folder.rmdir()
