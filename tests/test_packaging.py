from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import loopfast
import loopfast_kernels

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def normalized(requirement: str) -> str:
    name = re.match(r"[\w.-]+", requirement)[0]
    return re.sub(r"[-_.]+", "-", name).lower()


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {
        normalized(name): version
        for name, _, version in (line.partition("==") for line in lines if line and not line.startswith("#"))
    }


def test_one_version():
    assert loopfast.__version__ == loopfast_kernels.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", loopfast.__version__)


def test_the_base_install_needs_torch_only():
    assert [normalized(requirement) for requirement in PROJECT["dependencies"]] == ["torch"]


def test_what_the_makefile_installs_is_pinned():
    extras = PROJECT["optional-dependencies"]
    needed = [*PROJECT["dependencies"], *extras["train"], *extras["bench"], *extras["dev"]]
    assert {normalized(requirement) for requirement in needed} <= set(constraints())


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_help_lists_every_target():
    shown = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    assert sorted(line.split()[0] for line in shown.splitlines()) == sorted(phony)


def test_ci_runs_the_tests():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make test" in script.read_text()


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """The tracked files alone, as a clone would have them."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")
    target = tmp_path_factory.mktemp("sources")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


def build(kind: str, sources: Path, output: Path, **environment: str) -> tuple[Path, str]:
    """Build with the backend that is installed, so that no network is needed: the archive and what was said."""
    program = f"import scikit_build_core.build as b; print(b.build_{kind}({str(output)!r}))"
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=sources,
        env=os.environ | environment,
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    (archive,) = output.iterdir()
    return archive, run.stdout


def run_from(wheel: Path, folder: Path, program: str) -> str:
    """What a program prints that finds the packages in a wheel alone."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    # An editable install would come before the path.
    editable = "type(finder).__module__.startswith('_editable')"
    alone = f"import sys; sys.meta_path[:] = [finder for finder in sys.meta_path if not {editable}]\n"
    run = subprocess.run(
        [sys.executable, "-c", alone + program],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=True,
    )
    return run.stdout.strip()


def packaged_files(sources: Path) -> set[str]:
    kernels = sources / "kernels" / "loopfast_kernels"
    files = [(path, sources) for path in (sources / "loopfast").rglob("*") if path.is_file()]
    files += [(path, kernels.parent) for path in kernels.rglob("*") if path.is_file()]
    return {str(path.relative_to(base)) for path, base in files}


@pytest.mark.skipif(
    "LOOPFAST_WHEEL" not in os.environ, reason="LOOPFAST_WHEEL names no wheel; make test-wheel does"
)
def test_the_wheel_holds_both_packages_their_data_and_the_library(sources, tmp_path):
    wheel = Path(os.environ["LOOPFAST_WHEEL"])
    # Any Python 3, any torch: nothing of theirs is compiled in.
    assert wheel.name.startswith(f"loopfast-{loopfast.__version__}-py3-none-linux_")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert packaged_files(sources) | {"loopfast_kernels/libloopfast.so"} <= names
    assert not any("__pycache__" in name or name.startswith("tests") for name in names)
    program = "from loopfast_kernels import info; print(info()['cpu'], info()['native'])"
    assert run_from(wheel, tmp_path / "unpacked", program).startswith(f"native {loopfast.__version__} (")


# How an op runs, and why it does not run faster.
WITHOUT_LIBRARY = """
import torch
from loopfast_kernels import info, leave_one_out
print(leave_one_out(torch.tensor([1.0, 2.0])).tolist(), info()["cpu"])
"""


def test_a_pure_python_wheel_is_for_any_machine(sources, tmp_path):
    wheel, _ = build("wheel", sources, tmp_path, LOOPFAST_NATIVE="0")
    assert wheel.name == f"loopfast-{loopfast.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        assert packaged_files(sources) <= set(archive.namelist())
    shown = run_from(wheel, tmp_path / "unpacked", WITHOUT_LIBRARY)
    assert shown.startswith("[-1.0, 1.0] reference (native is missing: it was not built")


def test_without_a_compiler_the_package_is_pure_python_too(sources, tmp_path):
    wheel, said = build("wheel", sources, tmp_path, CXX="/nonexistent/c++")
    assert [line for line in said.splitlines() if "loopfast:" in line] == [
        "loopfast: no C++ compiler was found, installing without the native (CPU) kernels"
    ]
    assert "CMake Error" not in said
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert packaged_files(sources) <= names
    assert not any(name.endswith(".so") for name in names)


def test_the_source_distribution_is_complete(sources, tmp_path):
    with tarfile.open(build("sdist", sources, tmp_path)[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {"CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE", "Makefile", "constraints.txt"}
    needed |= {str(path.relative_to(sources)) for path in (sources / "kernels").rglob("*") if path.is_file()}
    needed |= {str(path.relative_to(sources)) for path in (sources / "loopfast").rglob("*") if path.is_file()}
    assert needed <= names
