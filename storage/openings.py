"""The table of test openings: each confirmation that was made, and of which data it opened the test images.

It outlives the studies: whoever has seen a confirmation may choose by it, also after it was deleted.
"""

import uuid

from optuna.storages import RDBStorage
from sqlalchemy import Column, Connection, DateTime, MetaData, String, Table, func, insert, select

from storage.tables import utc_now
from storage.transactions import read, write

table = Table(
    "trialyard_test_openings",
    MetaData(),
    Column("call", String(32), primary_key=True),
    Column("fingerprint", String(64), nullable=False, index=True),  # of the training images that they belong to
    Column("study", String(512), nullable=False),  # that was to be confirmed
    Column("opened", DateTime, nullable=False),  # UTC
)


def record(storage: RDBStorage, study: str, fingerprint: str) -> None:
    """Records that a confirmation of `study` will open the test images that belong to these training images."""
    call = uuid.uuid4().hex

    def work(connection: Connection) -> None:
        if connection.execute(select(table.c.call).where(table.c.call == call)).first() is None:
            add(connection, call, study, fingerprint)  # else the commit succeeded, but its answer was lost

    write(storage, study, work)


def add(connection: Connection, call: str, study: str, fingerprint: str) -> None:
    """The same in the caller's transaction."""
    row = {"call": call, "fingerprint": fingerprint, "study": study, "opened": utc_now()}
    connection.execute(insert(table).values(row))


def count(storage: RDBStorage, fingerprint: str) -> int:
    """How often the test images that belong to these training images were opened."""
    query = select(func.count()).select_from(table).where(table.c.fingerprint == fingerprint)
    return int(read(storage, lambda connection: connection.execute(query).scalar_one()))
