"""The mistakes that only show when images are loaded, a model is built or a page is served; `storage.errors` draws the
tree.
"""

from storage.errors import TrialyardError


class DataError(TrialyardError):
    """Images or labels cannot be loaded, or do not fit the definition."""


class ModelError(TrialyardError):
    """A model cannot be built."""


class MachineError(TrialyardError):
    """This machine cannot train a study: Keras, a user's own module or the data cannot be used here."""


class DeviceError(TrialyardError):
    """There is no such GPU on this machine, or the framework does not see it."""


class DashboardError(TrialyardError):
    """The dashboard cannot be served at this address, or not without a password."""


class WorkerError(TrialyardError):
    """No worker of this machine works."""
