"""The devices of this machine, the slots on them, and the precision for each device. Does not import Keras."""

import logging
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import pynvml

from search import allocation
from search.errors import DeviceError
from storage.errors import named_error
from studies.definition import Precision

log = logging.getLogger(__name__)

# Linux's names of the processor flags for bfloat16 multiplication (Intel's AMX and the AVX-512 extension).
BFLOAT16_FLAGS = ("amx_bf16", "avx512_bf16")
# Intel's processors multiply bfloat16 fast in AMX alone. An Emerald Rapids whose AMX was hidden by its virtual machine
# took 51 ms for a product of 1024 x 1024 matrices in bfloat16 with AVX-512, and 29 ms in float32. Models of depth 3,
# 5 and 7 trained at 0.6 to 0.7 of their speed in float32.
SLOW_AVX512_BFLOAT16 = ("GenuineIntel",)
MEMORY_PER_SLOT = 2 << 30  # bytes that a trainer on the processor may need; TensorFlow alone takes a quarter of it
# The share of a GPU's memory that several trainers use together; the rest is for their contexts, some 100 MB each.
MEMORY_SHARE = 0.9
BFLOAT16_CAPABILITY = (8, 0)  # CUDA compute capability from which tensor cores take bfloat16 (Ampere)


@dataclass(frozen=True, kw_only=True)
class Device:
    """A GPU, an instance of a GPU that is divided (NVIDIA's MIG), or this machine's processor."""

    kind: str  # "gpu" or "cpu"
    name: str  # of the card or the processor
    index: int = 0  # the driver's number of the GPU
    instance: int | None = None  # the driver's number of the instance on its GPU
    uuid: str = ""  # of a GPU or an instance: unlike numbers, it stays when another GPU fails
    capability: tuple[int, int] = (0, 0)  # CUDA compute capability, of a GPU
    memory: int = 0  # bytes, of a GPU
    flags: frozenset[str] = frozenset()  # of a processor: which of BFLOAT16_FLAGS it has
    vendor: str = ""  # of a processor, as Linux names it


@dataclass(frozen=True, kw_only=True)
class Slot:
    """A place where one trial can train: a GPU, a share of one, or some of the processor's threads."""

    device: Device
    index: int = 0  # among the slots of its device
    sharing: int = 1  # how many slots the device has
    threads: int = 0  # processor threads for computing; 0 leaves the number to the framework

    @property
    def name(self) -> str:
        """The name for users: ``gpu:1``, or ``gpu:1.0`` for the first of several slots on that GPU; ``cpu:0``.

        ``gpu:1.mig0`` is on an instance of that GPU.
        """
        if self.device.kind == "cpu":
            return f"cpu:{self.index}"
        return self.gpu + (f".{self.index}" if self.sharing > 1 else "")

    @property
    def gpu(self) -> str:
        """The name of its GPU, or of the instance of one."""
        return f"gpu:{self.device.index}" + ("" if self.device.instance is None else f".mig{self.device.instance}")

    @property
    def memory(self) -> int:
        """How many bytes of a shared GPU's memory the slot may use; 0 if the GPU is not shared."""
        return int(self.device.memory * MEMORY_SHARE / self.sharing) if self.sharing > 1 else 0

    def environment(self) -> dict[str, str]:
        """The environment variables that the trainer process needs before it imports Keras."""
        if self.device.kind == "cpu":
            threads = {"OMP_NUM_THREADS": str(self.threads)} if self.threads else {}
            return {"CUDA_VISIBLE_DEVICES": "-1", "JAX_PLATFORMS": "cpu"} | threads
        share = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{MEMORY_SHARE / self.sharing:.3f}"} if self.sharing > 1 else {}
        return {
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # CUDA then numbers the GPUs as the driver does
            "CUDA_VISIBLE_DEVICES": self.device.uuid or str(self.device.index),
            # Without these, a framework takes the memory of the whole card at its first use.
            "TF_FORCE_GPU_ALLOW_GROWTH": "true",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        } | share


@cache
def pin(slot: Slot) -> None:
    """Sets TensorFlow's threads and its share of a GPU. Call it in the trainer process before Keras computes anything.

    JAX reads its settings from the slot's environment; PyTorch has none. TensorFlow accepts these settings only once,
    and a process has only one slot, so a second call does nothing.

    Raises DeviceError if the framework does not see the slot's GPU, because it would train on the processor without a
    warning; and if the GPU does not compute.
    """
    import keras

    backend = keras.backend.backend()
    if slot.device.kind == "gpu":
        _check_gpu(slot, backend)
    if backend == "tensorflow":
        _set_tensorflow(slot)
    if slot.device.kind == "gpu":
        _check_computes(slot)


def _set_tensorflow(slot: Slot) -> None:
    import tensorflow as tf

    if slot.threads:
        tf.config.threading.set_intra_op_parallelism_threads(slot.threads)
        tf.config.threading.set_inter_op_parallelism_threads(slot.threads)
    if slot.memory:
        (gpu,) = tf.config.list_physical_devices("GPU")
        limit = tf.config.LogicalDeviceConfiguration(memory_limit=slot.memory >> 20)
        tf.config.set_logical_device_configuration(gpu, [limit])


def _check_gpu(slot: Slot, backend: str) -> None:
    if backend == "tensorflow":
        import tensorflow as tf

        count = len(tf.config.list_physical_devices("GPU"))
    elif backend == "jax":
        import jax

        count = sum(device.platform == "gpu" for device in jax.devices())
    else:
        import torch

        count = torch.cuda.device_count()
    if count != 1:
        raise DeviceError(
            f"the driver has {slot.name} ({slot.device.name}), but {backend} sees {count or 'no'} GPUs: install its "
            "CUDA libraries (for TensorFlow, `pip install '.[gpu]'` in Trialyard's folder), or give --devices cpu"
        )


def _check_computes(slot: Slot) -> None:
    """Raises DeviceError if the GPU cannot multiply and convolve, before a trial has to find out."""
    import keras

    try:
        ones = keras.ops.ones((1, 8, 8, 8))
        convolved = keras.ops.conv(ones, keras.ops.ones((3, 3, 8, 8)), data_format="channels_last")
        keras.ops.convert_to_numpy(keras.ops.matmul(convolved, keras.ops.ones((8, 8))))
    except Exception as error:
        raise DeviceError(
            f"{slot.name} ({slot.device.name}) does not compute ("
            f"{named_error(error, 500)}): see `nvidia-smi`, and restart its driver or leave it out"
        ) from error


def slots(devices: str = "auto", per_device: int | None = None, workers: int | None = None) -> list[Slot]:
    """The slots of this machine.

    `devices`: "auto" for all GPUs, or the processor if there is none; "cpu"; or numbers of GPUs such as "0,2". A GPU
    that is divided means all its instances. UUIDs, or how they begin, name a GPU or an instance ("MIG-8f2c").
    With `workers`, so many slots are spread evenly over the devices. With `per_device`, each device has so many. By
    default a GPU has one slot, and the processor has one per core (the best in `bench/slots.py`) if memory allows. In a
    Slurm job the GPUs, cores and memory are the job's.

    Raises DeviceError if there is no such GPU.
    """
    chosen = _chosen(devices)
    if workers is not None:
        counts = [workers // len(chosen) + (index < workers % len(chosen)) for index in range(len(chosen))]
    else:
        counts = [per_device or (1 if chosen[0].kind == "gpu" else _slots_on_cpu())] * len(chosen)
    return [
        Slot(device=device, index=index, sharing=count, threads=_threads(device, count))
        for device, count in zip(chosen, counts, strict=True)
        for index in range(count)
    ]


def _chosen(devices: str) -> list[Device]:
    if devices == "cpu":
        return [cpu()]
    existing = gpus()
    if devices == "auto" and existing and allocation.has_no_gpu():
        log.warning(
            "this Slurm job has no GPU, so the trials run on the processor: ask for one with --gpus 1, or give "
            "--devices 0 if Slurm does not give out this machine's GPUs"
        )
        return [cpu()]
    if devices == "auto":
        return existing or [cpu()]
    chosen: list[Device] = []
    for part in (part.strip() for part in devices.split(",")):
        named = [device for device in existing if _names(part, device)]
        if not named:
            numbers = dict.fromkeys(str(device.index) for device in existing)
            available = f"GPUs {', '.join(numbers)}" if numbers else "no GPU"
            raise DeviceError(
                f"--devices {devices}: there is no GPU {part!r}; this machine has {available}: give numbers of GPUs, "
                "auto or cpu"
            )
        chosen += [device for device in named if device not in chosen]
    return chosen


def _names(part: str, device: Device) -> bool:
    """Whether `part` is the number of a GPU, or the first characters of its UUID or its instance's, as CUDA has it."""
    return part == str(device.index) or (part.startswith(("GPU-", "MIG-")) and device.uuid.startswith(part))


def cores() -> int:
    """How many processor cores this process may use: limited by its affinity, its control group and its Slurm job."""
    import joblib  # slow to import

    available = int(joblib.cpu_count())
    return min(available, allocation.slurm_cores() or available)


def memory(folder: Path | None = None) -> int:
    """How many bytes of memory are available: the machine's, or fewer if a control group or a Slurm job limits it.

    `folder` is where control groups are.
    """
    limits = (allocation.free_memory_in_groups(folder), allocation.slurm_memory())
    return min([int(psutil.virtual_memory().available), *(limit for limit in limits if limit is not None)])


def _slots_on_cpu() -> int:
    return max(1, min(cores(), memory() // MEMORY_PER_SLOT))


def _threads(device: Device, sharing: int) -> int:
    # With a GPU the processor only prepares batches: the framework chooses the threads.
    return max(1, cores() // sharing) if device.kind == "cpu" else 0


def gpus() -> list[Device]:
    """NVIDIA's GPUs that CUDA_VISIBLE_DEVICES does not hide; empty without a driver.

    A GPU that is divided computes nothing itself: its instances take its place.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible in ("", "-1"):
        return []
    parts = None if visible is None else [part.strip() for part in visible.split(",")]
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        existing: list[Device] = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            try:
                handle = pynvml.nvmlDeviceGetHandleByIndex(index)
                whole = _gpu(index, handle)
                existing += _instances(whole, handle) or [whole]
            except pynvml.NVMLError as error:
                log.warning("GPU %d is left out: %s", index, error)
        return [device for device in existing if parts is None or any(_names(part, device) for part in parts)]
    finally:
        pynvml.nvmlShutdown()


def _gpu(index: int, handle: Any) -> Device:
    return Device(
        kind="gpu",
        name=str(pynvml.nvmlDeviceGetName(handle)),
        index=index,
        uuid=str(pynvml.nvmlDeviceGetUUID(handle)),
        capability=tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handle)),
        memory=int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
    )


def _instances(whole: Device, handle: Any) -> list[Device]:
    """The instances of a GPU that is divided; empty if it is not."""
    try:
        is_divided, _ = pynvml.nvmlDeviceGetMigMode(handle)
    except pynvml.NVMLError:
        return []  # a card that cannot be divided
    found = []
    for instance in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(handle) if is_divided else 0):
        try:
            part = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, instance)
        except pynvml.NVMLError:
            continue  # fewer instances than there could be
        found.append(
            replace(
                whole,
                instance=instance,
                name=str(pynvml.nvmlDeviceGetName(part)),
                uuid=str(pynvml.nvmlDeviceGetUUID(part)),
                memory=int(pynvml.nvmlDeviceGetMemoryInfo(part).total),
            )
        )
    return found


def cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> Device:
    """This machine's processor. Its flags are known only on Linux."""
    fields: dict[str, str] = {}
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    name = fields.get("model name") or platform.processor() or platform.machine()
    flags = frozenset(fields.get("flags", "").split()) & frozenset(BFLOAT16_FLAGS)
    return Device(kind="cpu", name=name, flags=flags, vendor=fields.get("vendor_id", ""))


def precision_for(
    device: Device, wanted: Precision, began: str | None = None, *, own_model: bool = False
) -> tuple[str, str]:
    """Keras's dtype policy for `device`, and the reason in words. `began` is that of the study's first trials.

    With `own_model` the model is a user's function. In bfloat16 its probabilities have three digits, unless its last
    layer has the dtype float32. So the definition must ask for bfloat16.
    """
    if wanted != "auto":
        return wanted, "the definition asks for it"
    own, reason = (
        ("float32", "a model of your own trains in it, unless `precision` asks for another")
        if own_model
        else _precision_of(device)
    )
    return (own, reason) if began in (None, own) else (str(began), "the study began in it, on another device")


def common_precision(slots: Sequence[Slot], wanted: Precision, *, own_model: bool = False) -> str:
    """Keras's dtype policy for a study that begins on these `slots`: bfloat16 only if all of them compute in it."""
    # float32 comes before mixed_bfloat16.
    return min(precision_for(slot.device, wanted, own_model=own_model)[0] for slot in slots)


def _precision_of(device: Device) -> tuple[str, str]:
    if device.kind == "gpu":
        number = ".".join(map(str, device.capability))
        if device.capability >= BFLOAT16_CAPABILITY:
            return "mixed_bfloat16", f"{device.name} has compute capability {number}, which supports bfloat16"
        return "float32", f"{device.name} has compute capability {number}, and bfloat16 needs 8.0"
    if device.flags == {"avx512_bf16"} and device.vendor in SLOW_AVX512_BFLOAT16:
        return "float32", f"{device.name} has avx512_bf16 without amx_bf16, and is faster in float32"
    if device.flags:
        return "mixed_bfloat16", f"{device.name} has {' and '.join(sorted(device.flags))}"
    return "float32", f"{device.name} has neither {' nor '.join(BFLOAT16_FLAGS)}"
