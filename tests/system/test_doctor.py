from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

import pytest
import torch

import loopfast
from loopfast.system import xformers_build
from loopfast.system.doctor import examine

REQUIREMENTS = [
    "torch>=2.10",
    'diffusers>=0.39; extra == "train"',
    'PyYAML>=6.0; extra == "train"',
    "deepspeed>=0.18; platform_system == 'Linux' and extra == 'zero3'",
    "xformers>=0.0.33; platform_system == 'Linux' and extra == 'xformers'",
]


def installed(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str]) -> None:
    """Make these the only distributions installed beside loopfast."""

    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(metadata, "requires", lambda name: REQUIREMENTS)
    monkeypatch.setattr(metadata, "version", version)


def facts(report: str) -> dict[str, str]:
    """The report's lines by name."""
    lines = [line.split(maxsplit=1) for line in report.splitlines() if line.startswith("  ")]
    return {line[0]: line[1] for line in lines}


def test_versions_devices_and_backends_are_shown() -> None:
    report = examine()
    assert [line for line in report.splitlines() if line and not line.startswith(" ")] == [
        "loopfast",
        "processor",
        "devices",
        "kernels",
        "extras",
    ]
    found = facts(report)
    assert found["loopfast"] == loopfast.__version__
    assert found["python"] == platform.python_version()
    assert found["torch"] == torch.__version__
    assert found["native"].startswith(loopfast.__version__)
    assert {"model", "instructions", "used", "bfloat16", "float16"} <= found.keys()
    assert found["requested"] == "by device"


def test_complete_extra_is_shown_with_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, {"diffusers": "0.42.1", "PyYAML": "6.0.3"})
    assert facts(examine())["train"] == "diffusers 0.42.1, PyYAML 6.0.3"


def test_incomplete_extra_is_shown_with_what_is_missing_and_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    installed(monkeypatch, {"diffusers": "0.42.1"})
    found = facts(examine())
    assert found["train"] == "missing PyYAML: pip install 'loopfast[train]'"
    assert found["zero3"] == "missing deepspeed: pip install 'loopfast[zero3]'"


def test_xformers_comes_with_whether_its_kernels_load(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, {"xformers": "0.0.35"})
    monkeypatch.setattr(xformers_build, "why_unusable", lambda: "it was built for another torch")
    expected = "xformers 0.0.35: its kernels cannot load: it was built for another torch"
    assert facts(examine())["xformers"] == expected


def test_checkout_that_was_never_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", requires)
    assert "pip install -e" in facts(examine())["unknown"]


@pytest.mark.parametrize(
    ("cuda", "described"),
    [(None, "none (torch is built for the CPU)"), ("13.0", "none found (torch is built for 13.0)")],
)
def test_machine_without_a_gpu(monkeypatch: pytest.MonkeyPatch, cuda: str | None, described: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", None)
    assert facts(examine())["gpu"] == described


def test_every_gpu_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    class Device:
        name, total_memory, major, minor = "Some GPU", 80 * 2**30, 9, 0

    def properties(index: int) -> Any:
        return Device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    found = facts(examine())
    assert found["cuda:0"] == found["cuda:1"] == "Some GPU, 80 GiB, compute capability 9.0"
