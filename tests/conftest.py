from __future__ import annotations

import copy
import gc
import os
import signal
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from loopfast.config import Config

# Before torch is imported: two busy processes with two threads each slow each other down.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The command line does the same: or else transformers lists at every import what does not work without torchvision.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

MakeConfig = Callable[..., "Config"]

# Three iterations take about a second: 8 images of 32x32 each, 2 denoising steps, 2 updates.
SMALL_RUN = """\
run: {name: small, trackers: []}
prompts: {source: "embedded:color"}
reward: [{name: jpeg_compressibility}, {name: jpeg_incompressibility, weight: 0}]
algorithm: {samples_per_prompt: 2}
rollout: {prompts_per_iteration: 4, steps: 2}
train: {iterations: 3, updates_per_iteration: 2, steps: all, learning_rate: 1e-4, warmup_updates: 0}
evaluation: {every: 2, images_per_prompt: 1, limit_prompts: 4, preview_images: 2}
checkpoint: {every: 1}
"""


# Files whose runs are forked from a process that has imported everything: only one of pytest's processes starts it.
FORKED = (
    "distributed",
    "test_resume",
    "test_profile",
    "test_process",
    "test_thread",
    "test_http",
    "test_study",
)
# Files of 20 seconds and more: they start first, so that no process still runs one when the other has ended.
LONG = (
    "test_train",
    "test_memory",
    "test_recipes",
    "test_sd",
    "test_families",
    "test_gpu_check",
    "test_benchmarks",
)


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        return  # this process distributes the tests and imports none
    # Garbage collection finds nothing while modules are imported, and takes a fifth of that time.
    gc.disable()
    import torch
    from hypothesis import settings

    # Before triton is imported: without a GPU its kernels run in its interpreter.
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    settings.register_profile("loopfast", deadline=None, derandomize=True, max_examples=25)
    settings.load_profile("loopfast")


def is_forked(path: Path) -> bool:
    return path.parent.name in FORKED or path.stem in FORKED


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file's tests stay in one process, and the tests of all files that are forked stay in another."""
    from xdist.scheduler import LoadFileScheduling

    class Spread(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "forked" if is_forked(Path(file)) else file

    return Spread(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    items.sort(key=lambda item: (not is_forked(item.path), item.path.stem not in LONG))
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


def pytest_collection_finish() -> None:
    """Excludes imported objects from garbage collection, which freeing a model triggers: this saves half a second each
    time.
    """
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    import torch

    torch.manual_seed(0)


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Writes a user's module into the current folder, and returns its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def write(text: str) -> str:
        name = f"user_module_{tmp_path.name}".replace("-", "_")
        (tmp_path / f"{name}.py").write_text(text)
        return name

    return write


@pytest.fixture
def foreground() -> Iterator[None]:
    """Python's own signal handlers; a process that was started in the background, or by nohup, does not have them."""
    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler),
        signal.SIGHUP: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    }
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def tf32() -> Iterator[Callable[[bool], None]]:
    """Sets whether GPUs compute float32 in TF32; the earlier setting is restored after the test."""
    import torch

    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]

    def use(allowed: bool) -> None:
        for backend in backends:
            backend.allow_tf32 = allowed

    yield use
    for backend, allowed in zip(backends, before, strict=True):
        backend.allow_tf32 = allowed


@pytest.fixture(scope="session")
def _read_once() -> Iterator[None]:
    """Reads a pipeline from its files once; a copy of the result takes less than half of the time."""
    from diffusers import DiffusionPipeline

    read = DiffusionPipeline.from_pretrained.__func__  # type: ignore[attr-defined]
    known: dict[str, Any] = {}

    def from_pretrained(cls: Any, folder: Any, **options: Any) -> Any:
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        states = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        if sum(size for _, size, _ in states) > 2**22:
            return read(cls, folder, **options)
        key = repr((cls, str(folder), options, states))
        if key not in known:
            known[key] = read(cls, folder, **options)
        return copy.deepcopy(known[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DiffusionPipeline, "from_pretrained", classmethod(from_pretrained))
        yield


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory, _read_once: None) -> Path:
    """A Stable Diffusion pipeline with random weights: 32x32 images, 8x8x4 latents, the embedded vocabulary."""
    from tests.families import save_tiny, smallest_stable_diffusion

    return save_tiny(smallest_stable_diffusion, tmp_path_factory.mktemp("pipeline") / "model")


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory: pytest.TempPathFactory, _read_once: None) -> Callable[[Any], Path]:
    """``family_folder(family)`` returns the saved tiny pipeline of a family, by its name or by the function that builds
    it.
    """
    from tests.families import save_tiny

    @cache
    def saved(family: Any) -> Path:
        return save_tiny(family, tmp_path_factory.mktemp("family") / "model")

    return saved


@pytest.fixture(scope="session")
def make_config(pipeline_folder: Path) -> MakeConfig:
    """``make_config(directory, "section.key=value", ...)`` makes a small run whose folder will be in ``directory``."""
    from loopfast.config import parse_config

    def make(directory: Path, *overrides: str) -> Config:
        given = (f"model={{pretrained: {pipeline_folder}, device: cpu}}", f"run.directory={directory}")
        return parse_config(SMALL_RUN, (*given, *overrides))

    return make


@pytest.fixture
def small_config(tmp_path: Path, make_config: MakeConfig) -> MakeConfig:
    """The same as `make_config`, in the test's own folder."""

    def make(*overrides: str) -> Config:
        return make_config(tmp_path, *overrides)

    return make
