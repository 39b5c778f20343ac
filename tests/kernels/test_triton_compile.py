"""The compile gate: what becomes of the Triton kernels on GPUs, found out without one."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "kernels" / "loopfast_kernels"


def run(*command: str | Path) -> Any:
    """A program's output; in a process of its own, as here triton may interpret."""
    completed = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert completed.returncode == 0, completed.stderr
    return json.loads(completed.stdout)


@pytest.fixture(scope="module")
def kernels() -> list[dict[str, Any]]:
    return run(ROOT / "profiles" / "ptx_report.py", "--json")


def test_no_kernel_has_a_defect(kernels):
    found = [
        f"sm_{k['architecture']} {k['name']} ({k['variant']}): {k['defects']}"
        for k in kernels
        if k["defects"]
    ]
    assert found == []


def test_every_kernel_is_compiled(kernels):
    sources = [
        path.read_text() for path in [PACKAGE / "triton_common.py", *PACKAGE.glob("*/triton_kernels.py")]
    ]
    defined = {
        name for source in sources for name in re.findall(r"^def (\w+_kernel)\(", source, re.MULTILINE)
    }
    assert {kernel["name"] for kernel in kernels} == defined
    assert {kernel["architecture"] for kernel in kernels} == {80, 90, 100}


def test_a_row_that_fits_is_read_once(kernels):
    """16384 bfloat16 elements over 512 threads are 4 instructions of 16 bytes for each tensor."""
    by_variant = {k["variant"]: k for k in kernels if k["name"] == "loss_kernel" and k["architecture"] == 90}
    plain = by_variant["4x64x64 bfloat16"]
    assert (plain["loads"]["16"], plain["stores"]["16"]) == (3 * 4, 4)
    guided = by_variant["4x64x64 bfloat16 guided reference"]
    assert (guided["loads"]["16"], guided["stores"]["16"]) == (5 * 4, 2 * 4)


def test_the_gate_can_fail():
    broken = run(Path(__file__).with_name("broken_kernels.py"))
    assert broken["sound"]["defects"] == []
    assert broken["double"]["defects"] == ["double precision"]
    assert re.match(r"not 16 bytes wide: loads \{4: 8\}", *broken["narrow"]["defects"])
    assert re.match(r"\d+ bytes spilled", *broken["spilling"]["defects"])
    # one for each of a thread's 8 elements; those of the library's logarithm do not count
    assert broken["contracted"]["defects"] == ["8 contracted multiply-adds"]


CHECK = """\
import sys
sys.path.insert(0, {folder!r})
import ptx_report
from pathlib import Path

kernel = ptx_report.Kernel("loss_kernel", "a variant", 90, 4, 64, 0, {spilled}, {{16: 1}}, {{16: 1}}, True, False, 0)
ptx_report.ARCHITECTURES = (90,)
ptx_report.compile_all = lambda architecture: [kernel]
ptx_report.REPORT = Path({report!r})
sys.exit(ptx_report.main({arguments!r}))
"""


@pytest.mark.parametrize(("spilled", "code"), [(0, 0), (12, 1)])
@pytest.mark.parametrize("arguments", [["--check"], []])
def test_a_check_names_what_is_wrong(arguments: list[str], spilled: int, code: int, tmp_path: Path) -> None:
    report = tmp_path / "ptx.md"
    program = CHECK.format(
        folder=str(ROOT / "profiles"), spilled=spilled, report=str(report), arguments=arguments
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    first, *named = done.stdout.splitlines()
    assert re.fullmatch(rf"triton [\d.]+, sm_90: 1 kernels, {code} with defects, \d+ s", first)
    assert named == ["sm_90 loss_kernel (a variant): 12 bytes spilled"] * code
    assert report.exists() is (arguments == [])
