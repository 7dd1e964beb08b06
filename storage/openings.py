"""The table of test openings: each confirmation that was made, and of which data it opened the test images.

It outlives the studies: whoever has seen a confirmation may choose by it, also after it was deleted.
"""

import uuid

from optuna.storages import RDBStorage
from sqlalchemy import Column, Connection, DateTime, MetaData, String, Table, func, insert, select

from storage.tables import utc_now
from storage.transactions import read

table = Table(
    "trialyard_test_openings",
    MetaData(),
    Column("call", String(32), primary_key=True),
    Column("fingerprint", String(64), nullable=False, index=True),  # of the training images that they belong to
    Column("study", String(512), nullable=False),  # that was to be confirmed
    Column("opened", DateTime, nullable=False),  # UTC
)


def add(connection: Connection, study: str, fingerprint: str) -> None:
    """Records in the caller's transaction that a confirmation of `study` opens the test images of these data."""
    row = {"call": uuid.uuid4().hex, "fingerprint": fingerprint, "study": study, "opened": utc_now()}
    connection.execute(insert(table).values(row))


def count(storage: RDBStorage, fingerprint: str) -> int:
    """How often the test images that belong to these training images were opened."""
    query = select(func.count()).select_from(table).where(table.c.fingerprint == fingerprint)
    return int(read(storage, lambda connection: connection.execute(query).scalar_one()))
