"""Which files stay: those that a trial names, all files of trials that are not finished, and the best trials' models.

A file of a finished trial that no row names is garbage, whoever wrote it: an attempt that lost its trial, or one that
was followed by another. What is garbage is decided by what the database says *now*, under the study's lock, and never
by what was listed before. Only a finished trial's own rank makes its model unneeded, and a rank never rises. With a
file goes the entry by which optuna-dashboard offers it.

An artifacts folder may be shared with other databases: the files of a study that this database neither has nor has
deleted are left alone.
"""

import logging
import re
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from optuna.storages import RDBStorage
from optuna.trial import TrialState
from sqlalchemy import Connection, delete, select

from storage import artifact_store, artifacts, attributes, deletions
from storage.artifact_store import ArtifactStore, ObjectFile, Stored
from storage.artifacts import CHECKPOINT, ID_LENGTH, MODEL, WITH_HISTORY, WITH_MODEL
from storage.claims import Claim
from storage.deletions import has_old_folder
from storage.errors import ObjectStoreError
from storage.ranking import RankedTrial, ranked
from storage.tables import (
    IDS_IN_CLAUSE,
    StudyModel,
    TrialModel,
    TrialSystemAttributeModel,
    TrialUserAttributeModel,
)
from storage.transactions import read, write

log = logging.getLogger(__name__)

# Behind the best, so many are looked at when a trial ends: what a worker left that was killed at that moment.
LOOK_PAST_KEPT = 20
OLD_SECONDS = 24 * 3600.0  # a temporary file that is older was left by a process that was killed
DELETE_BATCH = 100  # files that are removed under one hold of the lock
_NUMBER = re.compile(r"0|[1-9][0-9]*")
_STUDY = re.compile(rf"(.+)-([0-9a-f]{{{ID_LENGTH}}})")
STUDY_GONE = "its study is gone"


@dataclass(frozen=True, kw_only=True)
class File:
    """A file of an attempt at a trial, below the artifacts folder."""

    study: str
    id: str | None  # the first digits of the study's incarnation; None: of an older version, whose folders had none
    number: int  # of the trial
    attempt: int | None  # None: of an older version, which had one folder for a trial
    stored: Stored

    @property
    def path(self) -> PurePosixPath:
        """The file, relative to the artifacts folder."""
        return self.stored.path


@dataclass(frozen=True, kw_only=True)
class UnneededFile:
    """A file that no trial needs."""

    file: File
    path: Path | ObjectFile
    size: int  # bytes
    why: str


def trim(storage: RDBStorage, claim: Claim, root: ArtifactStore | Path, keep: int) -> None:
    """After the finish of `claim`: removes models of its study in `root` that are not among the best `keep`.

    Its own, and that of the trial that it pushed out. Killed in between, the next trial's end removes it; or, from an
    object store, `storage prune`.
    """
    store = artifact_store.of(root)

    def beyond(connection: Connection) -> list[str]:
        if attributes.of_study(connection, claim.study_id, "incarnation") != claim.incarnation:
            return []
        best = ranked(connection, claim.study_id, keep + LOOK_PAST_KEPT, with_model=True)
        trials = {trial.trial_id for trial in best[keep:]} | {claim.trial_id}
        kept = _paths(connection, "model", [trial.trial_id for trial in best[:keep]])
        paths = _paths(connection, "model", sorted(trials)) - kept
        if paths and _may_be_shared(connection, claim, paths):
            paths -= _named(connection, keep)
        if store.is_far:  # to ask it for each takes too long; who removes one withdraws it from the dashboard, too
            return sorted(_offered(connection, trials, paths))
        return sorted(map(str, store.existing(list(map(PurePosixPath, paths)))))

    def withdraw_all(connection: Connection) -> list[PurePosixPath]:
        gone = []
        for path in map(PurePosixPath, beyond(connection)):
            # The model last: while it exists, the next trial's end looks at this folder again.
            for file in (*map(path.with_name, WITH_MODEL), path):
                _withdraw(connection, file)
                gone.append(file)
        return gone

    # Most often there is nothing to do, and the lock is others' to have.
    if read(storage, beyond):
        # The files after the commit: the dashboard must not offer what is gone. A rank never rises.
        store.remove(write(storage, claim.study, withdraw_all))


def remove_attempts(claim: Claim, root: ArtifactStore | Path) -> None:
    """After the finish of `claim`: removes what earlier attempts left, and its own checkpoint."""
    store = artifact_store.of(root)
    folders = [PurePosixPath(checkpoint).parent for checkpoint in claim.checkpoints]
    store.remove([claim.folder / CHECKPOINT, *(folder / name for folder in folders for name in artifacts.ALL)])
    for folder in folders:
        store.remove_empty(folder)


def unneeded(
    storage: RDBStorage, root: ArtifactStore | Path, keep: int, study: str | None = None
) -> list[UnneededFile]:
    """What in `root` no trial needs, by path; only that of `study` if it is given.

    Files of studies that were deleted, files of attempts that do not count, checkpoints of finished trials, models
    beyond the best `keep`, and what was left half written more than a day ago.
    """
    store = artifact_store.of(root)
    # First the files: a trial is in the database before it has one.
    stored = store.files() if study is None else store.files_of(study)
    files = [file for file in _files(stored) if study is None or file.study == study]
    return read(storage, lambda connection: _unneeded(connection, store, keep, files))


def leftovers(storage: RDBStorage, root: ArtifactStore | Path, keep: int) -> tuple[list[UnneededFile], list[str]]:
    """What is `unneeded`, and the folders in `root` of studies that this database neither has nor has deleted.

    Lists the files once: that takes a while in an object store, and names what cannot be listed.
    """
    store = artifact_store.of(root)
    files = list(_files(store.files()))

    def of_others(connection: Connection) -> list[str]:
        studies = _study_ids(connection, files)
        return sorted({file.path.parts[0] for file in files if studies[file.study, file.id] == _UNKNOWN})

    return read(storage, lambda connection: (_unneeded(connection, store, keep, files), of_others(connection)))


def remove(storage: RDBStorage, root: ArtifactStore | Path, keep: int, listed: Sequence[UnneededFile]) -> int:
    """Removes those of the `listed` files that are still unneeded; returns how many bytes that freed."""
    store, freed = artifact_store.of(root), 0
    by_study: dict[str, list[File]] = defaultdict(list)
    for each in listed:
        by_study[each.file.study].append(each.file)
    for study, files in by_study.items():
        for begin in range(0, len(files), DELETE_BATCH):
            batch = files[begin : begin + DELETE_BATCH]

            def withdraw(connection: Connection, batch: list[File] = batch) -> list[UnneededFile]:
                found = _unneeded(connection, store, keep, batch)
                for each in found:
                    _withdraw(connection, each.file.path)
                return found

            # The files after the commit: what is unneeded stays so, and the dashboard must not offer what is gone.
            found = write(storage, study, withdraw)
            # In a folder one file may be another user's; a store is asked once for all.
            for part in [found] if store.is_far else [[each] for each in found]:
                if _remove(store, part):
                    freed += sum(each.size for each in part)
    return freed


def _remove(store: ArtifactStore, files: Sequence[UnneededFile]) -> bool:
    try:
        store.remove([each.file.path for each in files])
    except (OSError, ObjectStoreError) as error:  # another user's
        names = ", ".join(str(each.path) for each in files[:3]) + (", ..." if len(files) > 3 else "")
        log.warning(
            "%s %s: %s", names, "stays" if len(files) == 1 else "stay", getattr(error, "strerror", None) or error
        )
        return False
    for each in files:
        for folder in list(each.file.path.parents)[:-1]:
            store.remove_empty(folder)
    return True


def _files(found: Iterable[Stored]) -> Iterator[File]:
    """Those of the files `found` that are ours, in their order."""
    for stored in found:
        study, *numbers = stored.path.parts[:-1] or ("",)  # somebody else's file may be at the top of a bucket
        match = _STUDY.fullmatch(study)
        if not numbers or not all(map(_NUMBER.fullmatch, numbers)):
            continue
        number = int(numbers[0])
        if len(numbers) == 1:
            yield File(study=study, id=None, number=number, attempt=None, stored=stored)
        elif len(numbers) == 2 and match is not None:
            yield File(study=match[1], id=match[2], number=number, attempt=int(numbers[1]), stored=stored)


def _unneeded(connection: Connection, store: ArtifactStore, keep: int, files: Sequence[File]) -> list[UnneededFile]:
    named, models = _named(connection, keep), _paths(connection, "model", None)
    studies = _study_ids(connection, files)
    states = {study_id: _states(connection, study_id) for study_id in set(studies.values()) if study_id > 0}
    found = []
    for file in files:
        study_id = studies[file.study, file.id]
        if study_id == _UNKNOWN or str(file.path) in named:
            continue
        reason = STUDY_GONE if study_id == _DELETED else _reason(file, states[study_id], models, keep)
        stored = store.still(file.stored)
        if stored is None:  # its worker removed it a moment ago
            continue
        if file.path.name.startswith("."):
            reason = "an old temporary file" if time.time() - stored.modified > OLD_SECONDS else None
        if reason is not None:
            path = ObjectFile(url=store.name(file.path), size=stored.size) if store.is_far else store.folder / file.path
            found.append(UnneededFile(file=file, path=path, size=stored.size, why=reason))
    return found


def _reason(file: File, states: dict[int, TrialState], models: set[str], keep: int) -> str | None:
    # Nobody deletes single trials: a number that this database does not have is of a copy of it that went on.
    if file.number not in states or not states[file.number].is_finished():
        return None
    if file.path.name == CHECKPOINT:
        return "the checkpoint of a finished trial"
    model = file.path.with_name(MODEL) if file.path.name in WITH_MODEL else file.path
    return f"not among the best {keep}" if str(model) in models else "of an attempt that does not count"


def _named(connection: Connection, keep: int) -> set[str]:
    """The paths that trials of any study name, but for models beyond the best `keep`. A study may have been copied."""
    histories = _paths(connection, "history", None)
    best = set[str]()
    for study_id in connection.execute(select(StudyModel.study_id)).scalars().all():
        trials: list[RankedTrial] = ranked(connection, study_id, keep, with_model=True)
        best |= _paths(connection, "model", [trial.trial_id for trial in trials])
    return _with(histories, WITH_HISTORY) | _with(best, WITH_MODEL) | _without_model(connection)


def _with(paths: Collection[str], names: Collection[str]) -> set[str]:
    """The `paths`, and the files of these names in the same folders."""
    return {*paths, *(str(PurePosixPath(path).with_name(name)) for path in paths for name in names)}


def _without_model(connection: Connection) -> set[str]:
    """The predictions and pictures of models that could not be saved: no rank removes them."""
    unsaved = TrialUserAttributeModel
    ids = connection.execute(select(unsaved.trial_id).where(unsaved.key == "model_unsaved")).scalars().all()
    found = set[str]()
    for start in range(0, len(ids), IDS_IN_CLAUSE):
        found |= _paths(connection, "predictions", ids[start : start + IDS_IN_CLAUSE])
    return _with(found, WITH_MODEL)


def _withdraw(connection: Connection, path: PurePosixPath) -> None:
    """Removes the entry of a file, which is removed afterwards, from its trial, if there is one."""
    stored = TrialSystemAttributeModel
    connection.execute(delete(stored).where(stored.key == artifacts.listing(path)[0]))


def _offered(connection: Connection, trial_ids: Collection[int], paths: Collection[str]) -> set[str]:
    """Those of `paths` that these trials have entries of."""
    by_key = {artifacts.listing(PurePosixPath(path))[0]: path for path in paths}
    stored = TrialSystemAttributeModel
    wanted = select(stored.key).where(stored.trial_id.in_(trial_ids), stored.key.in_(by_key))
    return {by_key[key] for key in connection.execute(wanted).scalars()}


def _paths(connection: Connection, key: str, trial_ids: Sequence[int] | None) -> set[str]:
    """The files that trials name in the user attribute `key`, relative to the artifacts folder."""
    stored = TrialUserAttributeModel
    wanted = select(stored.value_json).where(stored.key == key)
    if trial_ids is not None:
        wanted = wanted.where(stored.trial_id.in_(trial_ids))
    paths = map(attributes.decoded, connection.execute(wanted).scalars())
    return {path for path in paths if artifacts.inside(Path(), path) is not None}


def _states(connection: Connection, study_id: int) -> dict[int, TrialState]:
    rows = connection.execute(select(TrialModel.number, TrialModel.state).where(TrialModel.study_id == study_id))
    return {int(number): state for number, state in rows}


_UNKNOWN, _DELETED = 0, -1


def _study_ids(connection: Connection, files: Sequence[File]) -> dict[tuple[str, str | None], int]:
    """The ids of the studies that the files are of; _DELETED or _UNKNOWN, as of another database, for one without."""
    deleted = deletions.all_deleted(connection)
    existing = {
        _study_folder(study.name, str(study.values["incarnation"])): study.study_id
        for study in attributes.of_studies(connection, ("incarnation",))
        if "incarnation" in study.values
    }
    named = connection.execute(select(StudyModel.study_name, StudyModel.study_id))
    # A name says little: another database may have a study of this name, and its files in the same old folder.
    by_name = {name: study_id for name, study_id in named if has_old_folder(connection, study_id, name)}
    gone = {_study_folder(study, incarnation) for study, incarnation, _ in deleted}
    gone_by_name = {study for study, _, old in deleted if old}
    ids: dict[tuple[str, str | None], int] = {}
    for study, short in {(file.study, file.id) for file in files}:
        if short is None:
            found, was_deleted = by_name.get(study), study in gone_by_name
        else:
            found, was_deleted = existing.get(f"{study}-{short}"), f"{study}-{short}" in gone
        ids[study, short] = found or (_DELETED if was_deleted else _UNKNOWN)
    return ids


def _study_folder(study: str, incarnation: str) -> str:
    return artifacts.attempt_folder(study, incarnation, 0, 1).parts[0]


def _may_be_shared(connection: Connection, claim: Claim, paths: Collection[str]) -> bool:
    """Whether another study may name some of `paths`, as a copy does. Most studies have none: to ask all is slow."""
    mine = _study_folder(claim.study, claim.incarnation)
    studies = attributes.of_studies(connection, ("incarnation",))
    copies = sum(study.values.get("incarnation") == claim.incarnation for study in studies)
    return copies > 1 or any(PurePosixPath(path).parts[0] != mine for path in paths)
