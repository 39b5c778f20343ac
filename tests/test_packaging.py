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


def test_the_base_install_needs_torch_and_triton_only():
    assert [normalized(requirement) for requirement in PROJECT["dependencies"]] == ["torch", "triton"]


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


def build(kind: str, sources: Path, output: Path) -> Path:
    """Build with the backend that is installed, so that no network is needed."""
    program = f"import scikit_build_core.build as b; print(b.build_{kind}({str(output)!r}))"
    subprocess.run([sys.executable, "-c", program], cwd=sources, check=True, capture_output=True)
    (archive,) = output.iterdir()
    return archive


def packaged_files(sources: Path) -> set[str]:
    kernels = sources / "kernels" / "loopfast_kernels"
    files = [(path, sources) for path in (sources / "loopfast").rglob("*") if path.is_file()]
    files += [(path, kernels.parent) for path in kernels.rglob("*") if path.is_file()]
    return {str(path.relative_to(base)) for path, base in files}


def test_the_wheel_holds_both_packages_their_data_and_the_library(sources, tmp_path):
    wheel = build("wheel", sources, tmp_path)
    assert wheel.name.startswith(f"loopfast-{loopfast.__version__}-py3-none-")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        assert packaged_files(sources) | {"loopfast_kernels/libloopfast.so"} <= names
        assert not any("__pycache__" in name or name.startswith("tests") for name in names)
        archive.extractall(tmp_path / "unpacked")
    # The library of the wheel, loaded by the package of the wheel.
    program = "from loopfast_kernels import native; print(native.load().version)"
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "unpacked")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == loopfast.__version__


def test_the_source_distribution_is_complete(sources, tmp_path):
    with tarfile.open(build("sdist", sources, tmp_path)) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {"CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE", "Makefile", "constraints.txt"}
    needed |= {str(path.relative_to(sources)) for path in (sources / "kernels").rglob("*") if path.is_file()}
    needed |= {str(path.relative_to(sources)) for path in (sources / "loopfast").rglob("*") if path.is_file()}
    assert needed <= names
