"""Which studies were deleted from this database: their files may go.

An artifacts folder may be shared with other databases, so a folder that names no study of this one is not garbage yet.
"""

from sqlalchemy import Boolean, Column, Connection, DateTime, MetaData, String, Table, delete, insert, select

from storage.tables import utc_now

table = Table(
    "trialyard_deleted_studies",
    MetaData(),
    Column("incarnation", String(64), primary_key=True),
    Column("study", String(512), primary_key=True),
    Column("old_folder", Boolean, nullable=False),  # whether it had files where versions before 0.2 kept them
    Column("deleted", DateTime, nullable=False),  # UTC
)


def record(connection: Connection, study: str, incarnation: str, *, old_folder: bool) -> None:
    """Remembers that the study was deleted."""
    mine = (table.c.incarnation == incarnation, table.c.study == study)
    connection.execute(delete(table).where(*mine))
    row = {"incarnation": incarnation, "study": study, "old_folder": old_folder, "deleted": utc_now()}
    connection.execute(insert(table).values(row))


def all_deleted(connection: Connection) -> list[tuple[str, str, bool]]:
    """The name and the incarnation of every study that was deleted, and whether it had an old folder."""
    rows = connection.execute(select(table.c.study, table.c.incarnation, table.c.old_folder))
    return [(study, incarnation, old) for study, incarnation, old in rows]
