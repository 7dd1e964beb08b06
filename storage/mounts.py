"""Which kind of file system a folder is on: SQLite cannot be shared on a network disk."""

import re
from pathlib import Path

MOUNTS = Path("/proc/mounts")  # of Linux; other systems have none
NETWORK_KINDS = ("nfs", "nfs4", "cifs", "smb3", "smbfs", "fuse.sshfs")


def network_kind(path: Path) -> str | None:
    """The kind of the network file system that `path` is on, such as ``nfs4``; None if it is on none, or not known.

    The path itself need not exist.
    """
    try:
        lines = MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return None
    kinds = {}  # by mount point; what is mounted last over a folder hides what was there
    for line in lines:
        _, point, kind, *_ = line.split(" ")
        kinds[Path(re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), point))] = kind
    resolved = path.resolve()
    mounted = next((kinds[folder] for folder in (resolved, *resolved.parents) if folder in kinds), None)
    return mounted if mounted in NETWORK_KINDS else None
