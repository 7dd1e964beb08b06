"""Which files are kept: those of running and waiting trials, all histories, and the models of the best trials.

Before a file is removed, the database is asked again under the study's lock: an earlier list may be out of date. A
model is removed only because of its trial's rank, and a rank never rises. With a file its entry in the database is
removed, which makes optuna-dashboard offer the file.
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

# `trim` also looks at so many trials after the kept ones: a worker that was killed just then left a model there.
LOOK_PAST_KEPT = 20
OLD_SECONDS = 24 * 3600.0  # an older temporary file belongs to a process that was killed
DELETE_BATCH = 100  # files that are removed while the lock is held once
_NUMBER = re.compile(r"0|[1-9][0-9]*")
# No other file is touched, even if the settings name a wrong folder.
_OURS = re.compile(rf"(\.[0-9a-f]{{32}}-)?({'|'.join(map(re.escape, (MODEL, HISTORY, SUMMARY, CHECKPOINT)))})")


@dataclass(frozen=True, kw_only=True)
class UnneededFile:
    """A file that no trial needs."""

    study: str
    number: int  # of the trial
    path: Path
    size: int  # bytes
    why: str


def trim(storage: RDBStorage, claim: Claim, root: Path, keep: int) -> None:
    """Removes models below `root` that are not among the study's best `keep`; called when the trial of `claim` ends.

    These are the trial's own model, or that of the trial that it replaced among the best. If the process is killed
    before it removes one, the end of the next trial does.
    """

    def unneeded_models(connection: Connection) -> list[Path]:
        study_id = _study_id(connection, claim.study)
        if study_id is None:
            return []
        best = ranked(connection, study_id, keep + LOOK_PAST_KEPT, with_model=True)
        numbers = {trial.number for trial in best[keep:]}
        own = (TrialModel.study_id == study_id, TrialModel.number == claim.number)
        if connection.execute(select(TrialModel.state).where(*own)).scalar() == TrialState.COMPLETE:
            numbers |= {claim.number} - {trial.number for trial in best[:keep]}
        needed = _paths_in_attribute(connection, "model", [trial.trial_id for trial in best[:keep]])
        paths = (artifacts.folder(root, claim.study, number) / MODEL for number in sorted(numbers))
        return [path for path in paths if path.exists() and str(path.relative_to(root)) not in needed]

    def remove_all(connection: Connection) -> None:
        for path in unneeded_models(connection):
            artifacts.remove(path)
            _remove_entry(connection, claim.study, int(path.parent.name), MODEL)

    # Usually there is nothing to do. Then other workers need not wait for the lock.
    if read(storage, unneeded_models):
        write(storage, claim.study, remove_all)


def unneeded(storage: RDBStorage, root: Path, keep: int, study: str | None = None) -> list[UnneededFile]:
    """The files below `root` that no trial needs, in the order of their paths; only those of `study` if it is given.

    They are the files of deleted studies and trials, checkpoints of finished trials, models that are not among the best
    `keep`, and temporary files older than a day.
    """
    # Files first: a trial is in the database before its first file exists.
    files = list(_files(root, study))
    return read(storage, lambda connection: _unneeded(connection, root, keep, files))


def remove(storage: RDBStorage, root: Path, keep: int, files: Sequence[UnneededFile]) -> int:
    """Removes those of `files` that are still unneeded; returns how many bytes that freed."""
    freed = 0
    by_study: dict[str, list[UnneededFile]] = defaultdict(list)
    for file in files:
        by_study[file.study].append(file)
    for study, of_study in by_study.items():
        for start in range(0, len(of_study), DELETE_BATCH):
            batch = [(file.study, file.number, file.path) for file in of_study[start : start + DELETE_BATCH]]

            def work(connection: Connection, batch: list[tuple[str, int, Path]] = batch) -> int:
                still_unneeded = _unneeded(connection, root, keep, batch)
                for file in still_unneeded:
                    artifacts.remove(file.path)
                    _remove_entry(connection, file.study, file.number, file.path.name)
                    if file.why in (STUDY_GONE, TRIAL_GONE):
                        _remove_empty(file.path.parent)
                    if file.why == STUDY_GONE:
                        _remove_empty(file.path.parent.parent)
                return sum(file.size for file in still_unneeded)

            freed += write(storage, study, work)
    return freed


STUDY_GONE, TRIAL_GONE = "its study is gone", "its trial is gone"


def _files(root: Path, study: str | None) -> Iterator[tuple[str, int, Path]]:
    """(study, trial number, path) of every file of ours, in the order of the paths."""
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


def _unneeded(
    connection: Connection, root: Path, keep: int, files: Sequence[tuple[str, int, Path]]
) -> list[UnneededFile]:
    needed = _needed_paths(connection, keep)
    studies = {name: _study_id(connection, name) for name in dict.fromkeys(study for study, _, _ in files)}
    states = {name: _states(connection, study_id) for name, study_id in studies.items()}
    best = {
        name: {trial.number for trial in ranked(connection, study_id, keep, with_model=True)}
        for name, study_id in studies.items()
        if study_id is not None
    }
    unneeded_files = []
    for study, number, path in files:
        if str(path.relative_to(root)) in needed:
            continue  # perhaps a copy of the study needs it
        if studies[study] is None:
            why: str | None = STUDY_GONE
        elif number not in states[study]:
            why = TRIAL_GONE
        else:
            why = _why(path.name, states[study][number], number in best[study], keep)
        with contextlib.suppress(FileNotFoundError):  # its worker removed it a moment ago
            status = path.stat()
            if path.name.startswith("."):
                why = "an old temporary file" if time.time() - status.st_mtime > OLD_SECONDS else None
            if why is not None:
                file = UnneededFile(study=study, number=number, path=path, size=status.st_size, why=why)
                unneeded_files.append(file)
    return unneeded_files


def _why(name: str, state: TrialState, is_best: bool, keep: int) -> str | None:
    if not state.is_finished():
        return None
    if name == CHECKPOINT:
        return "the checkpoint of a finished trial"
    return f"not among the best {keep}" if name == MODEL and not is_best else None


def _needed_paths(connection: Connection, keep: int) -> set[str]:
    """The paths of all studies' histories, summaries and best `keep` models, relative to the artifacts folder."""
    histories = _paths_in_attribute(connection, "history", None)
    needed = histories | {str(Path(history).with_name(SUMMARY)) for history in histories}
    for study_id in connection.execute(select(StudyModel.study_id)).scalars().all():
        best = [trial.trial_id for trial in ranked(connection, study_id, keep, with_model=True)]
        needed |= _paths_in_attribute(connection, "model", best)
    return needed


def _remove_entry(connection: Connection, study: str, number: int, name: str) -> None:
    """Removes a trial's entry of the file `name`, if there is one: the dashboard no longer offers the file."""
    trial = select(TrialModel.trial_id).where(
        TrialModel.study_id == select(StudyModel.study_id).where(StudyModel.study_name == study).scalar_subquery(),
        TrialModel.number == number,
    )
    stored, key = TrialSystemAttributeModel, artifacts.listing(study, number, name)[0]
    connection.execute(delete(stored).where(stored.trial_id.in_(trial), stored.key == key))


def _paths_in_attribute(connection: Connection, key: str, trial_ids: Sequence[int] | None) -> set[str]:
    stored = TrialUserAttributeModel
    query = select(stored.value_json).where(stored.key == key)
    if trial_ids is not None:
        query = query.where(stored.trial_id.in_(trial_ids))
    paths = map(attributes.decoded, connection.execute(query).scalars())
    return {path for path in paths if artifacts.inside(Path(), path) is not None}


def _states(connection: Connection, study_id: int | None) -> dict[int, TrialState]:
    rows = connection.execute(select(TrialModel.number, TrialModel.state).where(TrialModel.study_id == study_id))
    return {int(number): state for number, state in rows}


def _study_id(connection: Connection, study: str) -> int | None:
    return connection.execute(select(StudyModel.study_id).where(StudyModel.study_name == study)).scalar()


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):  # it is not empty
        folder.rmdir()
