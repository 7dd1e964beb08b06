"""Which studies were deleted from this database: their files may go.

An artifacts folder may be shared with other databases, so a folder that names no study of this one is not garbage yet.
"""

from sqlalchemy import Boolean, Column, Connection, DateTime, MetaData, String, Table, delete, insert, select

from storage import attempt_table
from storage.tables import TrialModel, TrialUserAttributeModel, utc_now

table = Table(
    "trialyard_deleted_studies",
    MetaData(),
    Column("incarnation", String(64), primary_key=True),
    Column("study", String(512), primary_key=True),
    Column("old_folder", Boolean, nullable=False),  # whether it had files where versions before 0.2 kept them
    Column("deleted", DateTime, nullable=False),  # UTC
)


def record(connection: Connection, study_id: int, study: str, incarnation: str) -> None:
    """Remembers that the study is deleted, in the transaction that deletes it or before."""
    old_folder = has_old_folder(connection, study_id, study)
    mine = (table.c.incarnation == incarnation, table.c.study == study)
    connection.execute(delete(table).where(*mine))
    row = {"incarnation": incarnation, "study": study, "old_folder": old_folder, "deleted": utc_now()}
    connection.execute(insert(table).values(row))


def all_deleted(connection: Connection) -> list[tuple[str, str, bool]]:
    """The name and the incarnation of every study that was deleted, and whether it had an old folder."""
    rows = connection.execute(select(table.c.study, table.c.incarnation, table.c.old_folder))
    return [(study, incarnation, old) for study, incarnation, old in rows]


def has_old_folder(connection: Connection, study_id: int, study: str) -> bool:
    """Whether trials of a study name files where versions before 0.2 kept them: in ``<study>/<trial>/``."""
    stored, attempt = TrialUserAttributeModel, attempt_table.table
    trials = select(TrialModel.trial_id).where(TrialModel.study_id == study_id)
    named = select(stored.trial_id).where(
        stored.trial_id.in_(trials),
        stored.key.in_(("model", "history")),
        stored.value_json.startswith(f'"{study}/', autoescape=True),
    )
    resumable = select(attempt.c.trial_id).where(
        attempt.c.trial_id.in_(trials), attempt.c.checkpoint.startswith(f"{study}/", autoescape=True)
    )
    return any(connection.execute(query.limit(1)).first() is not None for query in (named, resumable))
