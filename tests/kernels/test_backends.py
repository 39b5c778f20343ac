from __future__ import annotations

import contextlib
import threading

import pytest
import torch

import loopfast_kernels
from loopfast_kernels import BackendUnavailableError, backend, backends, info, leave_one_out, native_library
from tests.forks import printed

REWARDS = torch.tensor([1.0, 2.0])


def test_the_device_chooses_unless_somebody_asks(monkeypatch):
    monkeypatch.setattr(backends, "_requested", None)
    choose = backends.Implementations("loopfast_kernels.leave_one_out", "leave_one_out").choose
    assert choose(REWARDS).__module__ == "loopfast_kernels.leave_one_out.native"
    assert choose(REWARDS.double()).__module__ == "loopfast_kernels.leave_one_out.reference"
    assert choose(REWARDS, None, REWARDS.double()).__module__ == "loopfast_kernels.leave_one_out.reference"
    assert choose(REWARDS.to("meta")).__module__ == "loopfast_kernels.leave_one_out.reference"
    monkeypatch.setattr(backends, "_requested", "reference")
    assert choose(REWARDS).__module__ == "loopfast_kernels.leave_one_out.reference"
    # The innermost request wins.
    with backend("native"):
        assert choose(REWARDS).__module__ == "loopfast_kernels.leave_one_out.native"


@pytest.mark.parametrize("name", ["reference", "native"])
def test_info_says_who_was_asked_for(name):
    with backend(name):
        assert info()["requested"] == name


@pytest.mark.parametrize(("value", "requested"), [("reference", "reference"), ("", "by device")])
def test_the_environment_is_read_when_the_package_is_imported(value, requested):
    program = """
import os, torch, loopfast_kernels
os.environ["LOOPFAST_BACKEND"] = "cudnn"
print(loopfast_kernels.leave_one_out(torch.tensor([1.0, 2.0])).tolist(), loopfast_kernels.info()["requested"])
"""
    assert printed(program, LOOPFAST_BACKEND=value).strip() == f"[-1.0, 1.0] {requested}"


def test_a_backend_asked_for_is_never_replaced(monkeypatch):
    with (
        pytest.raises(
            BackendUnavailableError, match=r"leave_one_out cannot run on the backend 'native': .*float64"
        ),
        backend("native"),
    ):
        leave_one_out(REWARDS.double())
    with (
        pytest.raises(BackendUnavailableError, match="'native': it serves the CPU, not meta"),
        backend("native"),
    ):
        backends.Implementations("loopfast_kernels.leave_one_out", "leave_one_out").choose(REWARDS.to("meta"))
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    backends._implementation.cache_clear()
    with (
        pytest.raises(BackendUnavailableError, match="'triton': it serves CUDA devices, not cpu"),
        backend("triton"),
    ):
        leave_one_out(REWARDS)


def test_an_unknown_name_is_an_error(monkeypatch):
    with (
        pytest.raises(ValueError, match="unknown backend 'cudnn'; known: reference, native, triton"),
        backend("cudnn"),
    ):
        pass
    monkeypatch.setattr(backends, "_requested", "cudnn")
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
    monkeypatch.setattr(backends, "_requested", None)
    with contextlib.suppress(KeyError), backend("reference"):
        raise KeyError
    assert info()["requested"] == "by device"


@pytest.fixture
def fresh_library(monkeypatch, tmp_path):
    """An installation whose folder is empty."""
    monkeypatch.setattr(backends, "_requested", None)
    native_library.load.cache_clear()
    backends._missing.cache_clear()
    backends._implementation.cache_clear()
    monkeypatch.setattr(loopfast_kernels, "__path__", [str(tmp_path)])
    yield tmp_path
    native_library.load.cache_clear()
    backends._missing.cache_clear()
    backends._implementation.cache_clear()


def test_without_the_library_the_reference_serves_the_cpu(fresh_library, monkeypatch):
    assert info()["native"].startswith("it was not built")
    assert info()["cpu"].startswith("reference (native is missing: it was not built")
    assert leave_one_out(REWARDS).tolist() == [-1.0, 1.0]
    with (
        pytest.raises(
            BackendUnavailableError, match=r"asks for the backend 'native', which is missing: it was not"
        ),
        backend("native"),
    ):
        pass
    monkeypatch.setattr(backends, "_requested", "native")
    with pytest.raises(BackendUnavailableError, match="LOOPFAST_BACKEND asks for the backend 'native'"):
        leave_one_out(REWARDS)


def test_a_library_that_cannot_be_loaded_is_reported(fresh_library):
    (fresh_library / native_library.FILE_NAME).write_bytes(b"not a library")
    assert info()["native"].startswith("it cannot be loaded")
    assert leave_one_out(REWARDS).tolist() == [-1.0, 1.0]


def test_importing_leaves_the_gpu_alone_and_brings_nothing_but_torch():
    program = """
import sys, torch
before = set(sys.modules)
import loopfast_kernels, loopfast
assert not torch.cuda.is_initialized()
brought = {name.partition(".")[0] for name in set(sys.modules) - before}
print(sorted(brought - {"loopfast", "loopfast_kernels", "torch"} - set(sys.stdlib_module_names)))
"""
    assert printed(program).strip() == "[]"


def test_all_is_the_interface():
    assert sorted(loopfast_kernels.__all__) == loopfast_kernels.__all__
    assert all(hasattr(loopfast_kernels, name) for name in loopfast_kernels.__all__)
