"""Which studies were deleted from this database: their files may go.

An artifacts folder may be shared with other databases, so a folder that names no study of this one is not garbage yet.
"""

from sqlalchemy import Column, Connection, DateTime, MetaData, String, Table, insert, select

from storage.tables import utc_now

table = Table(
    "trialyard_deleted_studies",
    MetaData(),
    Column("incarnation", String(64), primary_key=True),
    Column("study", String(512), nullable=False),
    Column("deleted", DateTime, nullable=False),  # UTC
)


def record(connection: Connection, study: str, incarnation: str) -> None:
    """Remembers that the study was deleted."""
    connection.execute(insert(table).values(incarnation=incarnation, study=study, deleted=utc_now()))


def all_deleted(connection: Connection) -> list[tuple[str, str]]:
    """The name and the incarnation of every study that was deleted."""
    rows = connection.execute(select(table.c.study, table.c.incarnation))
    return [(study, incarnation) for study, incarnation in rows]
