"""What this machine can train on, and in which precision. Found without importing TensorFlow or JAX."""

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import pynvml

from studies.definition import Precision

# Processor flags of units that multiply bfloat16 (Linux's names; Intel's AMX and the AVX-512 extension).
BFLOAT16_FLAGS = ("amx_bf16", "avx512_bf16")
BFLOAT16_CAPABILITY = (8, 0)  # CUDA compute capability from which tensor cores take bfloat16 (Ampere)


@dataclass(frozen=True, kw_only=True)
class Device:
    """A GPU, or this machine's processor."""

    kind: str  # "gpu" or "cpu"
    name: str  # the card's or the processor's own
    index: int = 0  # the driver's number of the GPU
    capability: tuple[int, int] = (0, 0)  # CUDA compute capability, of a GPU
    flags: frozenset[str] = frozenset()  # of a processor: which of BFLOAT16_FLAGS it has

    @property
    def slot(self) -> str:
        """The slot's name, for people."""
        return f"{self.kind}:{self.index}"

    def environment(self) -> dict[str, str]:
        """What the trainer process must have in its environment before it imports Keras."""
        if self.kind == "cpu":
            return {"CUDA_VISIBLE_DEVICES": "-1", "JAX_PLATFORMS": "cpu"}
        return {
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # so that CUDA counts as the driver does
            "CUDA_VISIBLE_DEVICES": str(self.index),
            # Either framework would take the whole card at its first use.
            "TF_FORCE_GPU_ALLOW_GROWTH": "true",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        }


def best() -> Device:
    """The first GPU, or the processor where there is none."""
    found = gpus()
    return found[0] if found else cpu()


def gpus() -> list[Device]:
    """The GPUs that NVIDIA's driver names, unless CUDA_VISIBLE_DEVICES hides them all; none without a driver."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return []
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        found = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
            name = pynvml.nvmlDeviceGetName(handle)
            found.append(Device(kind="gpu", name=str(name), index=index, capability=(major, minor)))
        return found
    finally:
        pynvml.nvmlShutdown()


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
