"""Which kind of file system a folder is on: SQLite cannot be on a network disk, and files for many machines must be."""

import re
from pathlib import Path

MOUNTS = Path("/proc/mounts")  # of Linux; other systems have none
NETWORK_KINDS = ("nfs", "nfs4", "cifs", "smb3", "smbfs", "fuse.sshfs")
LOCAL_KINDS = ("bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "tmpfs", "xfs", "zfs")


def network_kind(path: Path) -> str | None:
    """The kind of the network file system that `path` is on, such as ``nfs4``; None if it is on none, or not known.

    The path itself need not exist.
    """
    kind = _kind(path)
    return kind if kind in NETWORK_KINDS else None


def local_kind(path: Path) -> str | None:
    """The kind of the file system of this machine alone that `path` is on, such as ``ext4``; None as above.

    Clusters share files in many ways (Lustre, GPFS, BeeGFS, ...): what is not known to be local may be shared.
    """
    kind = _kind(path)
    return kind if kind in LOCAL_KINDS else None


def _kind(path: Path) -> str | None:
    try:
        lines = MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return None
    kinds = {}  # by mount point; what is mounted last over a folder hides what was there
    for line in lines:
        _, point, kind, *_ = line.split(" ")
        kinds[Path(re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), point))] = kind
    resolved = path.resolve()
    return next((kinds[folder] for folder in (resolved, *resolved.parents) if folder in kinds), None)
