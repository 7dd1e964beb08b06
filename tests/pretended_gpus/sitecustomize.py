"""Pretended GPUs: with this folder on PYTHONPATH a process finds as many as the variable PRETENDED_GPUS says.

NVIDIA's driver is a fake, and no framework is asked whether it sees a card: trainings run on the processor. What a
trainer process was pinned to is added to the file PRETENDED_PINS, a JSON value a line.
"""

import importlib.abc
import importlib.util
import json
import os
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

COUNT = int(os.environ.get("PRETENDED_GPUS", "0"))


class Driver(ModuleType):
    """In place of `pynvml`."""

    NVMLError = RuntimeError
    nvmlInit = nvmlShutdown = staticmethod(lambda: None)  # noqa: N815
    nvmlDeviceGetCount = staticmethod(lambda: COUNT)  # noqa: N815
    nvmlDeviceGetHandleByIndex = staticmethod(lambda index: index)  # noqa: N815
    nvmlDeviceGetUUID = staticmethod(lambda index: f"GPU-{index}a3f")  # noqa: N815
    nvmlDeviceGetName = staticmethod(lambda index: "Pretended GPU")  # noqa: N815
    nvmlDeviceGetCudaComputeCapability = staticmethod(lambda index: (8, 0))  # noqa: N815
    nvmlDeviceGetMemoryInfo = staticmethod(lambda index: SimpleNamespace(total=80 << 30))  # noqa: N815

    @staticmethod
    def nvmlDeviceGetMigMode(index: int) -> tuple[int, int]:  # noqa: N802
        raise RuntimeError("Not Supported")


def _note(slot: Any, backend: str) -> None:
    """In place of `search.devices._check_gpu`, which a trainer process calls before it computes anything."""
    pin = {"slot": slot.name, "memory": slot.memory, "visible": os.environ["CUDA_VISIBLE_DEVICES"]}
    with open(os.environ["PRETENDED_PINS"], "a", encoding="utf-8") as file:
        file.write(json.dumps(pin) + "\n")


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "search.devices":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        loader: Any = spec.loader
        run = loader.exec_module

        def run_and_pretend(module: Any) -> None:
            run(module)
            module._check_gpu = _note
            module._set_tensorflow = lambda slot: None

        loader.exec_module = run_and_pretend
        return spec


if COUNT:
    sys.modules["pynvml"] = Driver("pynvml")
    sys.meta_path.insert(0, _Finder())
