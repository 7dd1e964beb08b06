"""Errors about data, models, devices and pages; `storage.errors` shows the whole tree."""

from storage.errors import TrialyardError


class DataError(TrialyardError):
    """Images or labels cannot be loaded, or do not fit the definition."""


class ModelError(TrialyardError):
    """A model cannot be built."""


class MetricError(ModelError):
    """A model does not report what trials are judged by."""


class MachineError(TrialyardError):
    """This machine cannot train a study: it cannot import Keras or a user's own module, or load the data."""


class DeviceError(TrialyardError):
    """This machine has no such GPU, the framework does not see it, or it fails."""


class AcceleratorError(DeviceError):
    """A GPU failed in a training: the GPU may be to blame, or the training."""


class DashboardError(TrialyardError):
    """The dashboard cannot be served at this address, or needs a password there."""


class WorkerError(TrialyardError):
    """A worker cannot be started as asked, or none is alive."""


class SlurmError(TrialyardError):
    """Slurm cannot run these workers, or does not answer."""


class RayError(TrialyardError):
    """Ray is not installed, its cluster does not answer, or it cannot run the slots that were asked for."""
