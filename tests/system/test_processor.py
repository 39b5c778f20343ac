"""What is said of the processor, and what is refused on one that cannot do it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import loopfast.distributed.launch
import loopfast.training.setup
from loopfast.__main__ import main
from loopfast.config import load_config
from loopfast.engines import require_type
from loopfast.system import processor

X86 = "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nflags\t\t: fpu avx2 fma avx512f avx512_bf16\n\nprocessor\t: 1\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd fphp asimdhp sve bf16\nCPU part\t: 0xd40\n"


def machine(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    *,
    cpuinfo: str | None = None,
    capabilities: dict[str, Any] | None = None,
    kernels: tuple[str, ...] = (),
) -> dict[str, str]:
    """What is said of a machine with this ``/proc/cpuinfo``, torch and oneDNN."""
    file = folder / "cpuinfo"
    if cpuinfo is not None:
        file.write_text(cpuinfo)
    monkeypatch.setattr(processor, "_CPUINFO", file)
    if capabilities is None:
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    monkeypatch.setattr(processor, "has_kernels", lambda dtype: dtype in kernels)
    return dict(processor.describe())


def test_an_x86_processor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = machine(monkeypatch, tmp_path, cpuinfo=X86, kernels=("bfloat16",))
    assert found["model"] == "Some CPU @ 2 GHz"
    assert found["instructions"] == "AVX2, FMA, AVX512F, AVX512_BF16"
    assert found["used by torch"] == torch.backends.cpu.get_cpu_capability()
    assert found["bfloat16"] == "at full speed (AVX512_BF16)"
    assert found["float16"] == (
        "emulated, slower than float32; DeepSpeed refuses it (distributed.zero_stage 1 to 3)"
    )


def test_an_arm_processor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = machine(monkeypatch, tmp_path, cpuinfo=ARM, kernels=("bfloat16", "float16"))
    assert found["model"]
    assert found["instructions"] == "NEON, SVE, BF16, FP16"
    assert (found["bfloat16"], found["float16"]) == ("at full speed (BF16)", "at full speed (FP16)")


def test_a_system_without_cpuinfo_is_known_to_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    capabilities = {"cpu_name": "A CPU", "architecture": "arm64", "neon": True, "sve": False, "cores": 4}
    found = machine(monkeypatch, tmp_path, capabilities=capabilities)
    assert (found["model"], found["instructions"]) == ("A CPU", "NEON")


def test_a_system_that_tells_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = machine(monkeypatch, tmp_path)
    assert found["model"]
    assert found["instructions"] == "unknown"
    assert found["bfloat16"] == "emulated, slower than float32"


def test_variables_that_limit_libraries_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in processor._LIMITS:
        monkeypatch.delenv(name, raising=False)
    assert "limited by" not in dict(processor.describe())
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    monkeypatch.setenv("LOOPFAST_ISA", "portable")
    assert dict(processor.describe())["limited by"] == "ONEDNN_MAX_CPU_ISA=AVX2, LOOPFAST_ISA=portable"


def test_a_torch_without_onednn_has_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "ops", SimpleNamespace(mkldnn=SimpleNamespace()))
    assert not processor.has_kernels("float16")


SHARDED = ("--set", "distributed.zero_stage=2", "--set", "model.dtype=float16", "--set", "model.device=cpu")
COMMANDS = {
    "train": ["train", "--config", "tiny"],
    "profile": ["profile", "--config", "tiny"],
    "launch": ["launch", "--nproc", "2", "--config", "tiny"],
    "check": ["config", "check", "tiny"],
    "plan": ["plan", "--config", "tiny"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_float16_that_deepspeed_refuses_is_one_line_before_anything_is_loaded(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unwanted(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("something was started")

    monkeypatch.setattr(processor, "has_kernels", lambda dtype: False)
    for place, name in (
        (loopfast.training.setup, "connected"),
        (loopfast.training.setup, "load_policy"),
        (loopfast.distributed.launch, "launch"),
    ):
        monkeypatch.setattr(place, name, unwanted)
    assert main([*COMMANDS[command], *SHARDED]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "error: model.dtype: found 'float16', allowed: float32 or bfloat16 with distributed.zero_stage above 0 on this "
        f"processor ({processor.model_name()}): DeepSpeed"
    )


@pytest.mark.parametrize(
    ("overrides", "device", "kernels"),
    [
        ((), "cpu", False),
        (("distributed.zero_stage=2", "model.dtype=bfloat16"), "cpu", False),
        (("distributed.zero_stage=2",), "cpu", True),
        (("distributed.zero_stage=2",), "cuda", False),
    ],
)
def test_float16_elsewhere_is_allowed(
    overrides: tuple[str, ...], device: str, kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor, "has_kernels", lambda dtype: kernels)
    config = load_config("tiny", ["model.dtype=float16", *overrides])
    require_type(config.model.dtype, config.distributed.zero_stage, device)
