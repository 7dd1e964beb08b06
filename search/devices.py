"""What this machine can train on: its devices, the slots on them, and the precision. Found without importing Keras."""

import logging
import os
import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import pynvml

from search.errors import DeviceError
from studies.definition import Precision

log = logging.getLogger(__name__)

# Processor flags of units that multiply bfloat16 (Linux's names; Intel's AMX and the AVX-512 extension).
BFLOAT16_FLAGS = ("amx_bf16", "avx512_bf16")
MEMORY_A_SLOT = 2 << 30  # bytes that a trainer on the processor may need: TensorFlow alone holds a quarter of it
# The share of a shared GPU's memory that its trainers use together: each also needs a context of a few hundred MB.
MEMORY_SHARE = 0.9
BFLOAT16_CAPABILITY = (8, 0)  # CUDA compute capability from which tensor cores take bfloat16 (Ampere)


@dataclass(frozen=True, kw_only=True)
class Device:
    """A GPU, or this machine's processor."""

    kind: str  # "gpu" or "cpu"
    name: str  # the card's or the processor's own
    index: int = 0  # the driver's number of the GPU
    capability: tuple[int, int] = (0, 0)  # CUDA compute capability, of a GPU
    memory: int = 0  # bytes, of a GPU
    flags: frozenset[str] = frozenset()  # of a processor: which of BFLOAT16_FLAGS it has


@dataclass(frozen=True, kw_only=True)
class Slot:
    """A place where one trial can train: a GPU, a share of one, or some of the processor's threads."""

    device: Device
    index: int = 0  # among the slots of its device
    sharing: int = 1  # how many slots the device has
    threads: int = 0  # of the processor, to compute with; 0 leaves it to the framework

    @property
    def name(self) -> str:
        """For people: ``gpu:1``, or ``gpu:1.0`` for the first of several on that GPU; ``cpu:0`` and up."""
        if self.device.kind == "cpu":
            return f"cpu:{self.index}"
        return f"gpu:{self.device.index}" + (f".{self.index}" if self.sharing > 1 else "")

    @property
    def memory(self) -> int:
        """Bytes of a shared GPU's memory that the slot may use; 0 where it need not share."""
        return int(self.device.memory * MEMORY_SHARE / self.sharing) if self.sharing > 1 else 0

    def environment(self) -> dict[str, str]:
        """What the trainer process must have in its environment before it imports Keras."""
        if self.device.kind == "cpu":
            threads = {"OMP_NUM_THREADS": str(self.threads)} if self.threads else {}
            return {"CUDA_VISIBLE_DEVICES": "-1", "JAX_PLATFORMS": "cpu"} | threads
        share = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{MEMORY_SHARE / self.sharing:.3f}"} if self.sharing > 1 else {}
        return {
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # so that CUDA counts as the driver does
            "CUDA_VISIBLE_DEVICES": str(self.device.index),
            # Either framework would take the whole card at its first use.
            "TF_FORCE_GPU_ALLOW_GROWTH": "true",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        } | share


@cache
def pin(slot: Slot) -> None:
    """In the trainer process, before Keras computes anything: TensorFlow's threads and its share of a GPU.

    What JAX needs is in the slot's environment; PyTorch shares a GPU as it likes. TensorFlow takes these settings once,
    and a process has one slot for its life: asked again, it does nothing.

    Raises DeviceError where the framework does not see the slot's GPU: it would train on the processor without a word.
    """
    import keras

    if slot.device.kind == "gpu":
        _check_gpu(slot, keras.backend.backend())
    if keras.backend.backend() != "tensorflow":
        return
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

        seen = len(tf.config.list_physical_devices("GPU"))
    elif backend == "jax":
        import jax

        seen = sum(device.platform == "gpu" for device in jax.devices())
    else:
        import torch

        seen = torch.cuda.device_count()
    if seen != 1:
        raise DeviceError(
            f"the driver names {slot.name} ({slot.device.name}), but {backend} sees {seen or 'no'} GPUs there: install "
            "its CUDA libraries (for TensorFlow, `pip install '.[gpu]'` in Trialyard's folder), or give --devices cpu"
        )


def slots(devices: str = "auto", per_device: int | None = None, workers: int | None = None) -> list[Slot]:
    """The slots of this machine.

    `devices`: "auto" for all GPUs, or the processor where there is none; "cpu"; or the driver's numbers of GPUs, as
    "0,2". `workers` slots are spread over them, as evenly as can be; else `per_device` slots share each; else
    a GPU has one, and the processor one a core, as `bench/slots.py` found best, as far as memory goes.

    Raises DeviceError where there is no such GPU.
    """
    chosen = _chosen(devices)
    if workers is not None:
        counts = [workers // len(chosen) + (at < workers % len(chosen)) for at in range(len(chosen))]
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
    found = gpus()
    if devices == "auto":
        return found or [cpu()]
    by_number = {str(device.index): device for device in found}
    wanted = [part.strip() for part in devices.split(",")]
    for number in wanted:
        if number not in by_number:
            here = f"GPUs {', '.join(by_number)}" if by_number else "no GPU"
            raise DeviceError(
                f"--devices {devices}: there is no GPU {number!r}; this machine has {here}: give numbers of GPUs, auto "
                "or cpu"
            )
    return [by_number[number] for number in dict.fromkeys(wanted)]


def cores() -> int:
    """The processor's cores that this process may use: its affinity, and its control group's quota."""
    import joblib  # which takes a moment

    return int(joblib.cpu_count())


def memory(folder: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of memory that are available: the machine's, or less where a control group (a container) limits it."""
    free = int(psutil.virtual_memory().available)
    try:
        limit, used = ((folder / name).read_text(encoding="ascii") for name in ("memory.max", "memory.current"))
        return min(free, int(limit) - int(used))
    except (OSError, ValueError):
        return free  # no such group, or "max"


def _slots_on_cpu() -> int:
    return max(1, min(cores(), memory() // MEMORY_A_SLOT))


def _threads(device: Device, sharing: int) -> int:
    # On a GPU the processor only feeds it: the framework knows best.
    return max(1, cores() // sharing) if device.kind == "cpu" else 0


def gpus() -> list[Device]:
    """The GPUs that NVIDIA's driver names, of those that CUDA_VISIBLE_DEVICES leaves; none without a driver.

    Raises DeviceError where that names parts of one.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible in ("", "-1"):
        return []
    if visible is not None and "MIG-" in visible:
        raise DeviceError(
            f"CUDA_VISIBLE_DEVICES = {visible} names a MIG instance, and slots are whole GPUs: name its GPU, or give "
            "--devices cpu"
        )
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        found = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            try:
                handle = pynvml.nvmlDeviceGetHandleByIndex(index)
                if visible is None or _is_visible(index, str(pynvml.nvmlDeviceGetUUID(handle)), visible):
                    found.append(_gpu(index, handle))
            except pynvml.NVMLError as error:
                log.warning("GPU %d is left out: %s", index, error)
        return found
    finally:
        pynvml.nvmlShutdown()


def _gpu(index: int, handle: Any) -> Device:
    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    total = int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
    name = str(pynvml.nvmlDeviceGetName(handle))
    return Device(kind="gpu", name=name, index=index, capability=(major, minor), memory=total)


def _is_visible(index: int, uuid: str, visible: str) -> bool:
    # CUDA takes numbers, and beginnings of UUIDs.
    return any(part.strip() == str(index) or uuid.startswith(part.strip() or "-") for part in visible.split(","))


def cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> Device:
    """This machine's processor. Its flags are read where Linux gives them, and empty elsewhere."""
    fields: dict[str, str] = {}
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    name = fields.get("model name") or platform.processor() or platform.machine()
    flags = frozenset(fields.get("flags", "").split()) & frozenset(BFLOAT16_FLAGS)
    return Device(kind="cpu", name=name, flags=flags)


def precision_for(device: Device, wanted: Precision) -> tuple[str, str]:
    """Keras's dtype policy for `device`, and the reason in words."""
    if wanted != "auto":
        return wanted, "the definition asks for it"
    if device.kind == "gpu":
        number = ".".join(map(str, device.capability))
        if device.capability >= BFLOAT16_CAPABILITY:
            return "mixed_bfloat16", f"{device.name} has compute capability {number}, which takes bfloat16"
        return "float32", f"{device.name} has compute capability {number}, and bfloat16 needs 8.0"
    if device.flags:
        return "mixed_bfloat16", f"{device.name} has {' and '.join(sorted(device.flags))}"
    return "float32", f"{device.name} shows neither {' nor '.join(BFLOAT16_FLAGS)}"
