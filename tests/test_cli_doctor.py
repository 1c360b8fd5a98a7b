"""`sbert-fast doctor`: what it finds, and what it does where something is missing or broken."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch

import sbert_fast
from planted_gpu import LOADED, plant
from sbert_fast.cli import doctor, main
from sbert_fast.ops import extension


@pytest.fixture(autouse=True)
def _auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SBERT_FAST_IMPL", raising=False)


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["torch"] != "not installed"
    assert report["libraries"]["_C"]["reason"] == extension.CPU.reason
    cuda = report["libraries"]["_C_cuda"]
    assert cuda["reason"] == extension.cuda_refusal(torch.device("cuda"))
    assert report["build"]["cuda"] == cuda.get("CUDA", "")
    assert report["build"]["cuda_targets"] == cuda.get("compiled for", [])
    rows = {(row["device"], row["dtype"]): row for row in report["ops"]}
    expected = "cpu" if extension.CPU.available else "reference"
    assert rows["cpu", "float32"]["implementation"] == expected
    assert "cpu" in rows["cpu", "float16"]["refused"]
    assert "CUDA ops" in rows["cpu", "float16"]["refused"]["cuda"]
    assert main(["doctor"]) == 0
    assert set(report) <= set(capsys.readouterr().out.splitlines())


def test_doctor_where_nothing_is_built(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extension, "CPU", extension.Extension("_C", None, "was not built"))
    for name in ("_host", "_build_info"):
        monkeypatch.delattr(sbert_fast, name, raising=False)
        monkeypatch.setitem(sys.modules, f"sbert_fast.{name}", None)
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["libraries"]["_C"] == {"path": None, "reason": "was not built"}
    assert report["libraries"]["_host"]["path"] is None
    assert "(panels: the C++ ops do not run" in report["linear layers"]["cpu float32"]
    assert report["build"] is None
    assert all(row["implementation"] == "reference" for row in report["ops"])


@pytest.mark.parametrize(
    ("capability", "available", "reason"),
    [
        ((9, 0), True, None),
        ((11, 0), True, "GPU has 11.0: build them again with TORCH_CUDA_ARCH_LIST=11.0"),
        ((9, 0), False, "torch finds no NVIDIA GPU: there is none, or its driver is missing"),
    ],
)
def test_doctor_tells_why_a_library_that_loads_is_not_usable(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    available: bool,
    reason: str | None,
) -> None:
    plant(monkeypatch, capability)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    found = doctor._libraries()["_C_cuda"]
    assert (found["path"], found["compiled for"]) == ("_C_cuda.so", list(LOADED.targets))
    assert found["reason"] is None if reason is None else reason in found["reason"]


@pytest.mark.skipif(not extension.CPU.available, reason=str(extension.CPU.reason))
@pytest.mark.parametrize(
    ("sets", "told"), [("amx_bf16,avx512_bf16", "available"), ("avx512_bf16", "Linux refuses")]
)
def test_doctor_tells_why_a_cpu_with_amx_runs_without(
    monkeypatch: pytest.MonkeyPatch, sets: str, told: str
) -> None:
    from sbert_fast import _host

    features = _host.cpu_features() | {"amx_bf16": True}
    monkeypatch.setattr(_host, "cpu_features", lambda: features)
    monkeypatch.setattr(torch.ops.sbert_fast, "cpu_isas", lambda: sets)
    assert doctor._libraries()["_C"]["AMX"].startswith(told)


def test_doctor_lists_gpus(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = SimpleNamespace(
        name="GPU", major=9, minor=0, total_memory=80 << 30, multi_processor_count=132
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    assert main(["doctor"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert any("GPU" in line and "9.0" in line and "80.0" in line for line in lines)
    assert any(line.startswith("cuda float16: ") for line in lines)


def test_doctor_survives_what_it_examines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(doctor, "_cuda", broken)
    assert main(["doctor"]) == 1
    assert "error: RuntimeError: no such thing" in capsys.readouterr().out
