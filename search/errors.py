"""The mistakes that only show when images are loaded or a model is built; `storage.errors` draws the tree."""

from storage.errors import TrialyardError


class DataError(TrialyardError):
    """Images or labels cannot be loaded, or do not fit the definition."""


class ModelError(TrialyardError):
    """A model cannot be imported or built."""


class DeviceError(TrialyardError):
    """There is no such GPU on this machine."""
