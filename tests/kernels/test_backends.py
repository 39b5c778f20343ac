from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import loopfast_kernels
from loopfast_kernels import BackendUnavailableError, backend, info, leave_one_out, native

REWARDS = torch.tensor([1.0, 2.0])


def test_the_reference_can_be_asked_for_by_name(monkeypatch):
    expected = leave_one_out(REWARDS)
    with backend("reference"):
        assert info()["requested"] == "reference"
        assert torch.equal(leave_one_out(REWARDS), expected)
    monkeypatch.setenv("LOOPFAST_BACKEND", "reference")
    assert info()["requested"] == "reference"
    assert torch.equal(leave_one_out(REWARDS), expected)


@pytest.mark.parametrize("name", ["native", "triton"])
def test_a_missing_backend_is_an_error(monkeypatch, name):
    with (
        pytest.raises(BackendUnavailableError, match=f"'{name}', which is not available in this version"),
        backend(name),
    ):
        pass
    monkeypatch.setenv("LOOPFAST_BACKEND", name)
    with pytest.raises(BackendUnavailableError, match=f"LOOPFAST_BACKEND asks for the backend '{name}'"):
        leave_one_out(REWARDS)
    # The innermost request wins.
    with backend("reference"):
        leave_one_out(REWARDS)


def test_an_unknown_name_is_an_error(monkeypatch):
    with (
        pytest.raises(ValueError, match="unknown backend 'cudnn'; known: reference, native, triton"),
        backend("cudnn"),
    ):
        pass
    monkeypatch.setenv("LOOPFAST_BACKEND", "cudnn")
    with pytest.raises(ValueError, match="LOOPFAST_BACKEND names an unknown backend"):
        leave_one_out(REWARDS)


def test_the_request_reaches_other_threads():
    seen = []
    thread = threading.Thread(target=lambda: seen.append(info()["requested"]))
    with backend("reference"):
        thread.start()
        thread.join()
    assert seen == ["reference"]


def test_the_request_ends_with_the_block(monkeypatch):
    monkeypatch.delenv("LOOPFAST_BACKEND", raising=False)
    with contextlib.suppress(KeyError), backend("reference"):
        raise KeyError
    assert info()["requested"] == "by device"


@pytest.fixture
def fresh_native(monkeypatch, tmp_path):
    """An installation whose folder is empty."""
    native.load.cache_clear()
    monkeypatch.setattr(loopfast_kernels, "__path__", [str(tmp_path)])
    yield tmp_path
    native.load.cache_clear()


def test_info_says_when_the_native_library_is_not_there(fresh_native):
    assert native.load() is None
    assert info()["native_library"].startswith("not built")


def test_info_says_when_the_native_library_cannot_be_loaded(fresh_native):
    (fresh_native / "libloopfast.so").write_bytes(b"not a library")
    assert info()["native_library"].startswith("cannot be loaded")


def test_the_native_library_knows_its_version_and_processor(fresh_native):
    sources = Path(__file__).parents[2] / "kernels" / "native"
    subprocess.run(
        [
            "c++",
            "-std=c++17",
            "-shared",
            "-fPIC",
            "-Wall",
            "-Wextra",
            "-Werror",
            '-DLOOPFAST_VERSION="1.2.3"',
            f"-I{sources / 'include'}",
            *map(str, sources.glob("cpu/*.cpp")),
            "-o",
            str(fresh_native / "libloopfast.so"),
        ],
        check=True,
    )
    library = native.load()
    assert library.version == "1.2.3"
    known = set(Path("/proc/cpuinfo").read_text().split())
    renamed = {"avx512bf16": "avx512_bf16", "neon": "asimd"}
    assert all(renamed.get(feature, feature) in known for feature in library.cpu_features)
    assert info()["native_library"].startswith("1.2.3 (")


def test_importing_leaves_the_gpu_alone_and_brings_nothing_but_torch():
    program = """
import sys, torch
before = set(sys.modules)
import loopfast_kernels
assert not torch.cuda.is_initialized()
brought = {name.partition(".")[0] for name in set(sys.modules) - before}
print(sorted(brought - {"loopfast_kernels", "torch"} - set(sys.stdlib_module_names)))
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_all_is_the_interface():
    assert sorted(loopfast_kernels.__all__) == loopfast_kernels.__all__
    assert all(hasattr(loopfast_kernels, name) for name in loopfast_kernels.__all__)
