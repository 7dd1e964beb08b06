"""The precision fits the device and says why; a trainer is pinned by its environment."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import joblib
import pytest

from search import allocation, devices
from search.devices import Device, Slot, precision_for
from search.errors import DeviceError

A100 = Device(kind="gpu", name="A100", index=2, capability=(8, 0), memory=80 << 30)
T4 = Device(kind="gpu", name="T4", index=0, capability=(7, 5), memory=16 << 30)
CPU = Device(kind="cpu", name="Some Processor")

CPUINFO = "processor\t: 0\nvendor_id\t: {vendor}\nmodel name\t: {name}\nflags\t\t: fpu sse {flags}\n\nprocessor\t: 1\n"


def _cpu(folder: Path, flags: str, vendor: str = "AuthenticAMD") -> Device:
    path = folder / "cpuinfo"
    path.write_text(CPUINFO.format(name="Some Processor", flags=flags, vendor=vendor), encoding="utf-8")
    return devices.cpu(path)


@pytest.mark.parametrize(
    ("flags", "policy", "reason"),
    [
        ("avx2 amx_bf16 amx_tile", "mixed_bfloat16", "Some Processor has amx_bf16"),
        ("avx512_bf16", "mixed_bfloat16", "Some Processor has avx512_bf16"),
        ("avx512_bf16 amx_bf16", "mixed_bfloat16", "Some Processor has amx_bf16 and avx512_bf16"),
        ("avx2 avx512f", "float32", "Some Processor has neither amx_bf16 nor avx512_bf16"),
    ],
)
def test_a_processor_trains_in_bfloat16_where_it_multiplies_it(
    tmp_path: Path, flags: str, policy: str, reason: str
) -> None:
    assert precision_for(_cpu(tmp_path, flags), "auto") == (policy, reason)


def test_an_intel_processor_without_amx_trains_in_float32(tmp_path: Path) -> None:
    assert precision_for(_cpu(tmp_path, "avx512_bf16", "GenuineIntel"), "auto") == (
        "float32",
        "Some Processor has avx512_bf16 without amx_bf16, and is faster in float32",
    )
    assert precision_for(_cpu(tmp_path, "avx512_bf16 amx_bf16", "GenuineIntel"), "auto")[0] == "mixed_bfloat16"


def test_a_gpu_trains_in_bfloat16_from_compute_capability_8() -> None:
    assert precision_for(A100, "auto") == (
        "mixed_bfloat16",
        "A100 has compute capability 8.0, which supports bfloat16",
    )
    assert precision_for(T4, "auto") == ("float32", "T4 has compute capability 7.5, and bfloat16 needs 8.0")


def test_a_study_keeps_the_precision_that_it_began_with() -> None:
    assert precision_for(T4, "auto", "mixed_bfloat16") == (
        "mixed_bfloat16",
        "the study began in it, on another device",
    )
    assert precision_for(A100, "auto", "mixed_bfloat16")[1].startswith("A100 has compute capability")
    assert precision_for(A100, "float32", "mixed_bfloat16") == ("float32", "the definition asks for it")


def test_a_model_of_one_s_own_trains_in_bfloat16_only_where_the_definition_asks_for_it() -> None:
    assert precision_for(A100, "auto", own_model=True) == (
        "float32",
        "a model of your own trains in it, unless `precision` asks for another",
    )
    assert precision_for(A100, "mixed_bfloat16", own_model=True)[0] == "mixed_bfloat16"
    assert precision_for(A100, "auto", "mixed_bfloat16", own_model=True)[0] == "mixed_bfloat16", "an older study"
    assert devices.common_precision([Slot(device=A100)], "auto", own_model=True) == "float32"


def test_mixed_cards_begin_in_the_precision_that_all_of_them_have() -> None:
    assert devices.common_precision([Slot(device=A100)], "auto") == "mixed_bfloat16"
    assert devices.common_precision([Slot(device=A100), Slot(device=T4)], "auto") == "float32"


def test_the_definition_s_precision_wins() -> None:
    assert precision_for(A100, "float32") == ("float32", "the definition asks for it")
    assert precision_for(T4, "mixed_bfloat16") == ("mixed_bfloat16", "the definition asks for it")


def test_without_cpuinfo_there_is_still_a_processor(tmp_path: Path) -> None:
    assert devices.cpu(tmp_path / "none").name
    assert precision_for(devices.cpu(tmp_path / "none"), "auto")[0] == "float32"


def test_a_trainer_sees_only_its_own_device() -> None:
    alone = Slot(device=A100).environment()
    assert alone["CUDA_VISIBLE_DEVICES"] == "2"
    assert alone["TF_FORCE_GPU_ALLOW_GROWTH"] == "true"
    assert alone["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" not in alone
    cpu = Slot(device=CPU, threads=3).environment()
    assert (cpu["CUDA_VISIBLE_DEVICES"], cpu["JAX_PLATFORMS"], cpu["OMP_NUM_THREADS"]) == ("-1", "cpu", "3")


def test_slots_that_share_a_gpu_share_its_memory() -> None:
    shared = Slot(device=A100, index=1, sharing=3)
    assert shared.environment()["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.300"
    assert shared.memory * 3 < A100.memory < shared.memory * 3.4
    assert Slot(device=A100).memory == 0


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with GPUs 0 and 2, as the driver would name them, and 8 cores."""
    monkeypatch.setattr(devices, "gpus", lambda: [T4, A100])
    monkeypatch.setattr(devices, "cores", lambda: 8)


@pytest.mark.parametrize(
    ("asked", "names"),
    [
        ({}, ["gpu:0", "gpu:2"]),
        ({"devices": "2"}, ["gpu:2"]),
        ({"devices": "2, 0"}, ["gpu:2", "gpu:0"]),
        ({"per_device": 2}, ["gpu:0.0", "gpu:0.1", "gpu:2.0", "gpu:2.1"]),
        ({"workers": 3}, ["gpu:0.0", "gpu:0.1", "gpu:2"]),
        ({"workers": 1}, ["gpu:0"]),
        ({"devices": "cpu", "per_device": 4}, ["cpu:0", "cpu:1", "cpu:2", "cpu:3"]),
        ({"devices": "cpu", "workers": 2}, ["cpu:0", "cpu:1"]),
    ],
)
def test_slots_are_what_was_asked_for(two_gpus: None, asked: dict[str, Any], names: list[str]) -> None:
    assert [slot.name for slot in devices.slots(**asked)] == names


def test_slots_of_the_processor_share_its_threads(two_gpus: None) -> None:
    assert [slot.threads for slot in devices.slots("cpu", per_device=3)] == [2, 2, 2]
    assert [slot.threads for slot in devices.slots("cpu", per_device=20)] == [1] * 20
    assert {slot.threads for slot in devices.slots("cpu")} == {1}
    assert len(devices.slots("cpu")) <= 8
    assert [slot.threads for slot in devices.slots()] == [0, 0]


@pytest.mark.parametrize("asked", ["1", "0,1", "gpu", "-1", ""])
def test_a_gpu_that_is_not_there_is_named(two_gpus: None, asked: str) -> None:
    with pytest.raises(
        DeviceError, match=r"there is no GPU .*this machine has GPUs 0, 2: give numbers of GPUs, auto or"
    ):
        devices.slots(asked)


class Driver:
    """A fake of NVIDIA's driver with two GPUs, for machines without one."""

    NVMLError = RuntimeError
    nvmlInit = nvmlShutdown = staticmethod(lambda: None)  # noqa: N815
    nvmlDeviceGetCount = staticmethod(lambda: 2)  # noqa: N815
    nvmlDeviceGetHandleByIndex = staticmethod(lambda index: index)  # noqa: N815
    nvmlDeviceGetUUID = staticmethod(lambda index: f"GPU-{index}a3f")  # noqa: N815
    nvmlDeviceGetName = staticmethod(lambda index: "NVIDIA A100")  # noqa: N815
    nvmlDeviceGetCudaComputeCapability = staticmethod(lambda index: (8, 0))  # noqa: N815

    @staticmethod
    def nvmlDeviceGetMigMode(index: int) -> tuple[int, int]:  # noqa: N802
        raise RuntimeError("Not Supported")

    @staticmethod
    def nvmlDeviceGetMemoryInfo(index: int) -> Any:  # noqa: N802
        return SimpleNamespace(total=80 << 30)


@pytest.mark.parametrize(
    ("visible", "indices"),
    [(None, [0, 1]), ("1", [1]), ("0,1", [0, 1]), ("GPU-1a", [1]), ("GPU-0a3f, 1", [0, 1]), ("7", []), ("-1", [])],
)
def test_gpus_are_those_that_the_driver_names_and_cuda_may_see(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, indices: list[int]
) -> None:
    monkeypatch.setattr(devices, "pynvml", Driver)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    gpus = devices.gpus()
    assert [gpu.index for gpu in gpus] == indices
    assert all((gpu.name, gpu.capability, gpu.memory) == ("NVIDIA A100", (8, 0), 80 << 30) for gpu in gpus)
    # Numbers change when a card fails.
    assert [Slot(device=gpu).environment()["CUDA_VISIBLE_DEVICES"] for gpu in gpus] == [f"GPU-{i}a3f" for i in indices]


def test_a_gpu_that_is_lost_is_left_out(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Driver):
        @staticmethod
        def nvmlDeviceGetMemoryInfo(index: int) -> Any:  # noqa: N802
            if index == 0:
                raise RuntimeError("GPU is lost")
            return SimpleNamespace(total=80 << 30)

    monkeypatch.setattr(devices, "pynvml", Broken)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [gpu.index for gpu in devices.gpus()] == [1]
    assert "GPU 0 is left out: GPU is lost" in caplog.text


class Divided(Driver):
    """GPU 1 is divided into two instances, of at most seven. A handle of an instance is a pair."""

    @staticmethod
    def nvmlDeviceGetMigMode(index: int) -> tuple[int, int]:  # noqa: N802
        return index, index  # now, and after a restart

    nvmlDeviceGetMaxMigDeviceCount = staticmethod(lambda index: 7)  # noqa: N815

    @staticmethod
    def nvmlDeviceGetMigDeviceHandleByIndex(index: int, instance: int) -> tuple[int, int]:  # noqa: N802
        if instance > 1:
            raise RuntimeError("Not Found")
        return index, instance

    @staticmethod
    def nvmlDeviceGetUUID(handle: Any) -> str:  # noqa: N802
        return f"MIG-{handle[1]}c4" if isinstance(handle, tuple) else f"GPU-{handle}a3f"

    @staticmethod
    def nvmlDeviceGetName(handle: Any) -> str:  # noqa: N802
        return "NVIDIA A100" + (" MIG 3g.40gb" if isinstance(handle, tuple) else "")

    @staticmethod
    def nvmlDeviceGetMemoryInfo(handle: Any) -> Any:  # noqa: N802
        return SimpleNamespace(total=(40 if isinstance(handle, tuple) else 80) << 30)


@pytest.mark.parametrize(
    ("visible", "asked", "names"),
    [
        (None, "auto", ["gpu:0", "gpu:1.mig0", "gpu:1.mig1"]),
        (None, "1", ["gpu:1.mig0", "gpu:1.mig1"]),
        (None, "MIG-1c, 0", ["gpu:1.mig1", "gpu:0"]),
        ("MIG-0c4", "auto", ["gpu:1.mig0"]),
        ("1", "auto", ["gpu:1.mig0", "gpu:1.mig1"]),
    ],
)
def test_the_instances_of_a_divided_gpu_are_devices(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, asked: str, names: list[str]
) -> None:
    monkeypatch.setattr(devices, "pynvml", Divided)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [slot.name for slot in devices.slots(asked)] == names
    instance = next(slot for slot in devices.slots() if slot.name.startswith("gpu:1"))
    assert instance.environment()["CUDA_VISIBLE_DEVICES"] == instance.device.uuid
    assert (instance.device.memory, instance.device.capability) == (40 << 30, (8, 0))
    assert instance.device.name == "NVIDIA A100 MIG 3g.40gb"


def test_slots_may_share_an_instance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "pynvml", Divided)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    shared = devices.slots("MIG-0c4", per_device=2)
    assert [slot.name for slot in shared] == ["gpu:1.mig0.0", "gpu:1.mig0.1"]
    assert shared[0].memory < 20 << 30


def test_a_container_s_limits_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory.max").write_text("5000000\n", encoding="ascii")
    (tmp_path / "memory.current").write_text("1000000\n", encoding="ascii")
    assert devices.memory(tmp_path) == 4000000
    (tmp_path / "memory.max").write_text("max\n", encoding="ascii")
    assert devices.memory(tmp_path) > 5000000
    assert devices.memory(tmp_path / "none") > 5000000
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")
    assert devices.cores() == 1


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_hidden_gpus_stay_hidden(monkeypatch: pytest.MonkeyPatch, hidden: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert devices.gpus() == []
    assert {slot.device.kind for slot in devices.slots()} == {"cpu"}


def test_a_slurm_job_s_share_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joblib, "cpu_count", lambda: 64)
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "8")
    assert devices.cores() == 8
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "4")
    assert devices.cores() == 4
    monkeypatch.setattr(joblib, "cpu_count", lambda: 2)  # the affinity may say less
    assert devices.cores() == 2
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "10")
    assert devices.memory(tmp_path) == 80 << 20
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "100")
    assert devices.memory(tmp_path) == 100 << 20


@pytest.mark.parametrize(
    ("line", "folder", "names"),
    [
        ("0::/slurm/job_7/step_batch", "", ("memory.max", "memory.current")),
        ("5:memory:/slurm/job_7/step_batch", "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")),
    ],
)
def test_a_control_group_above_limits_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, folder: str, names: tuple[str, str]
) -> None:
    (tmp_path / "membership").write_text(f"3:cpu,cpuacct:/\n{line}\n", encoding="ascii")
    monkeypatch.setattr(allocation, "MEMBERSHIP", tmp_path / "membership")
    job = tmp_path / folder / "slurm" / "job_7"
    (job / "step_batch").mkdir(parents=True)
    for group, values in ((job, ("5000000", "1000000")), (job / "step_batch", ("9000000", "1000000"))):
        for name, value in zip(names, values, strict=True):
            (group / name).write_text(f"{value}\n", encoding="ascii")
    assert devices.memory(tmp_path) == 4000000


def test_a_slurm_job_without_gpus_leaves_the_machine_s_alone(
    two_gpus: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert {slot.device.kind for slot in devices.slots()} == {"cpu"}
    assert "--gpus 1" in caplog.text
    assert [slot.name for slot in devices.slots("0")] == ["gpu:0"]
    monkeypatch.setenv("SLURM_JOB_GPUS", "0")
    assert {slot.device.kind for slot in devices.slots()} == {"gpu"}
