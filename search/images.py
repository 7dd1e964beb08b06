"""Some images of a large array, without a copy of them; and arrays of a file that all processes of a machine share."""

import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
LARGE = 64 << 20  # bytes: smaller arrays are copied, and their file may be replaced


class Images:
    """The images of `array` with the given `indices`, in that order: (n, height, width, channels)."""

    def __init__(self, array: Array, indices: Array) -> None:
        self._array, self._indices = array, indices
        self.shape: tuple[int, ...] = (len(indices), *array.shape[1:])
        self.dtype = array.dtype

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, chosen: slice | Array) -> Array:
        """Copies of the chosen ones."""
        copied: Array = self._array[self._indices[chosen]]
        return copied


def chosen(array: Array, indices: Array) -> Array | Images:
    """The images of `array` with these `indices`; of a large array, without a copy."""
    return Images(array, indices) if array.nbytes >= LARGE else array[indices]


def mapped(path: Path, key: str) -> Array | None:
    """The array `key` of the .npz file at `path`, mapped into memory; None if it is compressed or small.

    Processes that map one file have one copy of it, and only as long as the machine has memory to spare.
    """
    with zipfile.ZipFile(path) as archive:
        member = archive.NameToInfo.get(f"{key}.npy")
    if member is None or member.compress_type != zipfile.ZIP_STORED or member.file_size < LARGE:
        return None
    with path.open("rb") as file:
        # Appnote 6.3.10, section 4.3.7: the header before the data has 30 bytes, a name, and what is extra.
        file.seek(member.header_offset + 26)
        name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
        file.seek(member.header_offset + 30 + name + extra)
        header = _header(file)
        if header is None:
            return None
        shape, in_columns, dtype = header
        if dtype.hasobject or in_columns:
            return None
        return np.memmap(path, dtype, "r", offset=file.tell(), shape=shape)


def length(path: Path, key: str) -> int | None:
    """How many entries the array `key` of the .npz file at `path` has, by its header alone; 0 without such an array.

    None if the header is not one of a plain array. Raises OSError, ValueError or BadZipFile if it cannot be read.
    """
    with zipfile.ZipFile(path) as archive:
        if f"{key}.npy" not in archive.NameToInfo:
            return 0
        with archive.open(f"{key}.npy") as member:
            header = _header(member)
    return header[0][0] if header is not None and header[0] else None


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]] | None:
    """The shape, whether columns come first, and the type of the array in a .npy file; None of newer formats."""
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    return readers[version](file) if version in readers else None
