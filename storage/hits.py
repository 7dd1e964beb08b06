"""The table of hits: which of the images that judged a trial its model got right, one bit for each.

With them, two trials are compared image by image, which shows far smaller differences than two accuracies do.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Column, Connection, ForeignKey, Integer, LargeBinary, MetaData, String, Table, insert, select

from storage.tables import TrialModel

table = Table(
    "trialyard_hits",
    MetaData(),
    # Whoever deletes a trial deletes its hits: an id may be used again.
    Column("trial_id", ForeignKey(TrialModel.__table__.c.trial_id, ondelete="CASCADE"), primary_key=True),
    Column("judged_on", String(20), nullable=False),
    Column("fingerprint", String(64), nullable=False),
    Column("images", Integer, nullable=False),
    Column("bits", LargeBinary, nullable=False),
)

# SQLite obeys a foreign key only where a connection asks for it, and plain Optuna's connections do not.
SQLITE_CASCADE = (
    "CREATE TRIGGER IF NOT EXISTS trialyard_hits_of_deleted_trials AFTER DELETE ON trials "
    "BEGIN DELETE FROM trialyard_hits WHERE trial_id = OLD.trial_id; END"
)


@dataclass(frozen=True, kw_only=True)
class Hits:
    """Which images a trial's model got right."""

    judged_on: Literal["validation", "test"]
    fingerprint: str  # of these images and their labels: only hits on the same images can be paired
    images: int
    bits: bytes  # images / 8 bytes, the first image in the highest bit

    @classmethod
    def of(cls, right: NDArray[np.bool_], judged_on: Literal["validation", "test"], fingerprint: str) -> "Hits":
        """From an array of (images,)."""
        bits = np.packbits(right).tobytes()
        return cls(judged_on=judged_on, fingerprint=fingerprint, images=len(right), bits=bits)

    def array(self) -> NDArray[np.bool_]:
        """As an array of (images,)."""
        return np.unpackbits(np.frombuffer(self.bits, dtype=np.uint8), count=self.images).astype(bool)


def record(connection: Connection, trial_id: int, hits: Hits) -> None:
    """Adds the hits of a trial that has none yet."""
    connection.execute(insert(table).values({"trial_id": trial_id, **asdict(hits)}))


def of_trials(connection: Connection, trial_ids: Iterable[int]) -> dict[int, Hits]:
    """The hits of these trials, by the trial's id; those that have none are left out."""
    rows = connection.execute(select(table).where(table.c.trial_id.in_(list(trial_ids)))).mappings()
    return {
        row["trial_id"]: Hits(
            judged_on=row["judged_on"], fingerprint=row["fingerprint"], images=row["images"], bits=bytes(row["bits"])
        )
        for row in rows
    }
