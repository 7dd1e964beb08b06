"""The precision fits the device and says why; a trainer is pinned by its environment."""

from pathlib import Path

import pytest

from search import devices
from search.devices import Device, precision_for

A100 = Device(kind="gpu", name="A100", index=2, capability=(8, 0))
T4 = Device(kind="gpu", name="T4", index=0, capability=(7, 5))

CPUINFO = "processor\t: 0\nmodel name\t: {name}\nflags\t\t: fpu sse {flags}\n\nprocessor\t: 1\n"


def _cpu(folder: Path, flags: str) -> Device:
    path = folder / "cpuinfo"
    path.write_text(CPUINFO.format(name="Some Processor", flags=flags), encoding="utf-8")
    return devices.cpu(path)


@pytest.mark.parametrize(
    ("flags", "policy", "reason"),
    [
        ("avx2 amx_bf16 amx_tile", "mixed_bfloat16", "Some Processor has amx_bf16"),
        ("avx512_bf16", "mixed_bfloat16", "Some Processor has avx512_bf16"),
        ("avx512_bf16 amx_bf16", "mixed_bfloat16", "Some Processor has amx_bf16 and avx512_bf16"),
        ("avx2 avx512f", "float32", "Some Processor shows neither amx_bf16 nor avx512_bf16"),
    ],
)
def test_a_processor_trains_in_bfloat16_where_it_multiplies_it(
    tmp_path: Path, flags: str, policy: str, reason: str
) -> None:
    assert precision_for(_cpu(tmp_path, flags), "auto") == (policy, reason)


def test_a_gpu_trains_in_bfloat16_from_compute_capability_8() -> None:
    assert precision_for(A100, "auto") == (
        "mixed_bfloat16",
        "A100 has compute capability 8.0, which takes bfloat16",
    )
    assert precision_for(T4, "auto") == ("float32", "T4 has compute capability 7.5, and bfloat16 needs 8.0")


def test_the_definition_s_word_decides() -> None:
    assert precision_for(A100, "float32") == ("float32", "the definition asks for it")
    assert precision_for(T4, "mixed_bfloat16") == ("mixed_bfloat16", "the definition asks for it")


def test_without_cpuinfo_there_is_still_a_processor(tmp_path: Path) -> None:
    assert devices.cpu(tmp_path / "none").name
    assert precision_for(devices.cpu(tmp_path / "none"), "auto")[0] == "float32"


def test_a_trainer_sees_its_own_device_alone() -> None:
    assert A100.environment()["CUDA_VISIBLE_DEVICES"] == "2"
    assert A100.environment()["TF_FORCE_GPU_ALLOW_GROWTH"] == "true"
    assert Device(kind="cpu", name="").environment()["CUDA_VISIBLE_DEVICES"] == "-1"
    assert (A100.slot, Device(kind="cpu", name="").slot) == ("gpu:2", "cpu:0")


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_hidden_gpus_stay_hidden(monkeypatch: pytest.MonkeyPatch, hidden: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert devices.gpus() == []
    assert devices.best().kind == "cpu"
