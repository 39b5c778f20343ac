"""The compile gate: what becomes of the Triton kernels on GPUs, found out without one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.forks import printed

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "kernels" / "loopfast_kernels"


def run(file: Path, *arguments: str) -> Any:
    """A program's output; in a process of its own, as here triton may interpret."""
    program = f"import runpy; runpy.run_path({str(file)!r}, run_name='__main__')"
    return json.loads(printed(program, *arguments))


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


@pytest.fixture(scope="module")
def broken() -> dict[str, Any]:
    return run(Path(__file__).with_name("broken_kernels.py"))


def test_the_gate_can_fail(broken):
    defects = {name: kernel["defects"] for name, kernel in broken["kernels"].items()}
    assert defects["sound"] == []
    assert defects["double"] == ["double precision"]
    assert re.match(r"not 16 bytes wide: loads \{4: 8\}", *defects["narrow"])
    assert re.match(r"\d+ bytes spilled", *defects["spilling"])
    # one for each of a thread's 8 elements; those of the library's logarithm do not count
    assert defects["contracted"] == ["8 contracted multiply-adds"]


def test_a_check_names_what_is_wrong(broken):
    assert len(broken["checks"]) == 4
    for spilled, arguments, code, said, written in broken["checks"]:
        first, *named = said.splitlines()
        assert code == (spilled > 0)
        assert re.fullmatch(rf"triton [\d.]+, sm_90: 1 kernels, {code} with defects, \d+ s", first)
        assert named == ["sm_90 sound (a variant): 12 bytes spilled"] * code
        assert written is (arguments == [])
