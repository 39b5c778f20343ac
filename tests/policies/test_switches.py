"""The performance options with an effect on a GPU: their settings, their errors, and with a GPU their results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.deterministic
from safetensors.torch import load_file
from torch import Tensor, nn

from loopfast.config import ModelConfig, load_config
from loopfast.errors import ConfigError, LoopfastError
from loopfast.policies import Policy, load_policy
from loopfast.policies.fast import switches
from loopfast.policies.fast.switches import Tf32Conv2d, decoder_precision, set_arithmetic, set_attention
from loopfast.system import xformers_build
from loopfast.system.interrupts import StopRequest
from loopfast.training.setup import processes

CPU, GPU = torch.device("cpu"), torch.device("cuda:1")


@pytest.fixture(autouse=True)
def _process() -> Iterator[None]:
    """Restores the settings of the process."""
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    tf32 = [backend.allow_tf32 for backend in backends]
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    fills, workspace = (
        torch.utils.deterministic.fill_uninitialized_memory,
        os.environ.get(switches.CUBLAS_WORKSPACE),
    )
    yield
    for backend, value in zip(backends, tf32, strict=True):
        backend.allow_tf32 = value
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fills
    os.environ.pop(switches.CUBLAS_WORKSPACE, None)
    if workspace is not None:
        os.environ[switches.CUBLAS_WORKSPACE] = workspace


def settings(folder: Path | str = "-", **options: Any) -> ModelConfig:
    return ModelConfig(pretrained=str(folder), **{"device": "cpu", **options})


def decode(policy: Policy) -> Tensor:
    latents = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    return policy.decode(latents.to(policy.device))


def pretend(monkeypatch: pytest.MonkeyPatch, major: int, *, cuda: str | None = "13.0") -> None:
    """Some GPU, of this compute capability."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 5))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.version, "cuda", cuda)


# ---- TF32


def test_products_are_ieee_beside_a_policy_on_the_cpu(pipeline_folder: Path) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    load_policy(settings(pipeline_folder))
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32


def test_tf32_needs_a_gpu_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, 8)
    set_arithmetic(settings(tf32=True), GPU)
    assert torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cudnn.allow_tf32
    pretend(monkeypatch, 7)
    with pytest.raises(ConfigError, match=r"model\.tf32: needs compute capability 8\.0 .* Some GPU has 7\.5"):
        set_arithmetic(settings(tf32=True), GPU)
    pretend(monkeypatch, 9)
    monkeypatch.setattr(torch.version, "hip", "6.3")
    with pytest.raises(ConfigError, match=r"model\.tf32: needs an NVIDIA GPU, and cuda:1 is Some GPU"):
        set_arithmetic(settings(tf32=True), GPU)


# ---- the decoder


@pytest.mark.parametrize(
    ("major", "device", "asked", "found"),
    [
        (9, GPU, "auto", "tf32"),
        (7, GPU, "auto", "float32"),
        (9, CPU, "auto", "float32"),
        (9, GPU, "float32", "float32"),
        (9, GPU, "tf32", "tf32"),
        (9, GPU, "model", "model"),
    ],
)
def test_the_precision_of_the_decoder(
    major: int, device: torch.device, asked: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, major)
    assert decoder_precision(settings(decoder_precision=asked), device, {}) == found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decoder_precision": "tf32"}, r"model\.decoder_precision: tf32 needs a CUDA device, and .* is cpu"),
        (
            {"decoder_precision": "model", "dtype": "float16"},
            r"model\.decoder_precision: found 'model', allowed: auto, float32 or tf32 with model\.dtype float16",
        ),
    ],
)
def test_a_precision_that_the_decoder_cannot_have(
    options: dict[str, Any], message: str, pipeline_folder: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_policy(settings(pipeline_folder, **options))


def test_ieee_for_the_decoder_alone_is_refused() -> None:
    overrides = ["model.tf32=true", "model.decoder_precision=float32"]
    with pytest.raises(
        ConfigError, match=r"model\.decoder_precision: found 'float32', allowed: auto, tf32 or"
    ):
        load_config("tiny", overrides)


@pytest.mark.parametrize("fast", ["on", "off"])
def test_a_decoder_in_tf32_leaves_the_process_and_the_denoiser_alone(
    fast: str, pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = load_policy(settings(pipeline_folder, fast_layers=fast))
    monkeypatch.setattr(switches, "_without_tf32", lambda device: None)
    policy: Any = load_policy(settings(pipeline_folder, fast_layers=fast))
    assert policy.performance_options["decoder"] == "tf32"
    assert not any(isinstance(module, Tf32Conv2d) for module in policy.denoiser.modules())
    allowed: list[bool] = []

    def convolution(
        x: Tensor, w: Tensor, padding: Any, stride: Any, dilation: Any, groups: int, *rest: bool
    ) -> Tensor:
        allowed.append(rest[-1])
        assert not torch.backends.cudnn.allow_tf32
        return F.conv2d(x, w, None, stride, padding, dilation, groups)

    monkeypatch.setattr(torch.ops.aten, "cudnn_convolution", convolution)
    names = set(policy.pipeline.vae.state_dict())
    torch.testing.assert_close(decode(policy), decode(plain), atol=1e-5, rtol=0)
    inner = [m for m in policy.pipeline.vae.decoder.modules() if isinstance(m, nn.Conv2d)]
    # an upsampler's, too, which fast layers would take apart, and the one before the decoder
    assert allowed == [True] * (len(inner) + 1)
    assert set(policy.pipeline.vae.state_dict()) == names == set(plain.pipeline.vae.state_dict())  # type: ignore[attr-defined]


def test_a_decoder_in_the_models_type_is_not_exported(pipeline_folder: Path, tmp_path: Path) -> None:
    exact = decode(load_policy(settings(pipeline_folder)))
    policy = load_policy(settings(pipeline_folder, dtype="bfloat16", decoder_precision="model"))
    types = []
    policy._vae.decoder.register_forward_hook(lambda module, args, output: types.append(output.dtype))  # type: ignore[attr-defined]
    found = decode(policy)
    assert types == [torch.bfloat16]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, atol=0.05, rtol=0)
    policy.export(tmp_path, {name: p.detach() for name, p in policy.trainable().items()})
    given, written = (
        load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
        for folder in (pipeline_folder, tmp_path)
    )
    assert all(torch.equal(written[name], value) for name, value in given.items())


@pytest.mark.gpu
def test_a_gpu_decodes_in_tf32(pipeline_folder: Path) -> None:
    images = {}
    for name in ("float32", "tf32", "model"):
        policy = load_policy(
            settings(pipeline_folder, device="cuda", dtype="bfloat16", decoder_precision=name)
        )
        images[name] = decode(policy)
        assert not torch.backends.cudnn.allow_tf32
    torch.testing.assert_close(images["tf32"], images["float32"], atol=3e-2, rtol=0)
    torch.testing.assert_close(images["model"], images["float32"], atol=0.1, rtol=0)
    assert load_policy(settings(pipeline_folder, device="cuda")).performance_options["decoder"] in (
        "tf32",
        "float32",
    )


# ---- determinism


def test_deterministic_algorithms_are_set(pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(switches.CUBLAS_WORKSPACE, raising=False)
    torch.backends.cudnn.benchmark = True
    load_policy(settings(pipeline_folder))
    assert not torch.are_deterministic_algorithms_enabled()
    assert switches.CUBLAS_WORKSPACE not in os.environ
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    policy = load_policy(settings(pipeline_folder, deterministic=True))
    assert policy.performance_options["deterministic"] is True
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark
    assert not torch.utils.deterministic.fill_uninitialized_memory
    assert os.environ[switches.CUBLAS_WORKSPACE] == ":4096:8"
    # the value is there now: it no longer matters whether CUDA runs
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    set_arithmetic(settings(deterministic=True), CPU)


@pytest.mark.parametrize(("found", "started"), [(None, True), (":0:0", False)])
def test_a_workspace_that_is_not_deterministic(
    found: str | None, started: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(switches.CUBLAS_WORKSPACE, raising=False)
    if found is not None:
        monkeypatch.setenv(switches.CUBLAS_WORKSPACE, found)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: started)
    with pytest.raises(
        ConfigError, match=r"model\.deterministic: needs .* CUBLAS_WORKSPACE_CONFIG before CUDA"
    ):
        set_arithmetic(settings(deterministic=True), CPU)
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_run_sets_the_workspace_before_processes_join(monkeypatch: pytest.MonkeyPatch) -> None:
    def joined(*_: Any) -> Any:
        raise LoopfastError(f"the workspace is {os.environ.get(switches.CUBLAS_WORKSPACE)}")

    monkeypatch.setattr("loopfast.training.setup.connected", joined)
    monkeypatch.delenv(switches.CUBLAS_WORKSPACE, raising=False)
    sharded = ["distributed.zero_stage=1"]
    with (
        pytest.raises(LoopfastError, match="is None"),
        processes(load_config("tiny", sharded), StopRequest()),
    ):
        pass
    config = load_config("tiny", [*sharded, "model.deterministic=true"])
    with pytest.raises(LoopfastError, match="is :4096:8"), processes(config, StopRequest()):
        pass
    assert os.environ[switches.CUBLAS_WORKSPACE] in switches.CUBLAS_WORKSPACES


# Runs in a process of its own: the environment variable has no effect after the first product on CUDA.
TWICE = """
import sys
import torch
from loopfast.config import ModelConfig
from loopfast.policies import load_policy
folder, tune, dtype = sys.argv[1:]
policy = load_policy(ModelConfig(pretrained=folder, device="cuda", tune=tune, dtype=dtype, deterministic=True))
sample = torch.randn(8, *policy.latent_shape).to("cuda", policy.dtype)
timestep, text = torch.arange(1, 9, device="cuda"), policy.encode(["a red circle"] * 8)
found = []
for _ in range(2):
    for parameter in policy.trainable().values():
        parameter.grad = None
    policy.predict(sample, timestep, text, 3.0)[0].float().square().sum().backward()
    found.append([parameter.grad for parameter in policy.trainable().values()])
assert all(torch.equal(first, second) for first, second in zip(*found, strict=True))
"""


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tune", ["full", "lora"])
def test_two_backward_passes_on_a_gpu_are_the_same(tune: str, dtype: str, pipeline_folder: Path) -> None:
    command = [sys.executable, "-c", TWICE, str(pipeline_folder), tune, dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ---- xformers


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An xformers that was built for something, the only one there is; importing it is an error."""

    def install(built: dict[str, Any] | None, requires: str = "torch>=2.10") -> None:
        folder = tmp_path / "xformers"
        folder.mkdir()
        (folder / "__init__.py").write_text("raise AssertionError('xformers was imported')")
        if built is not None:
            (folder / "cpp_lib.json").write_text(json.dumps({"version": built, "env": {}}))
        information = tmp_path / "xformers-0.0.35.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(
            f"Metadata-Version: 2.4\nName: xformers\nVersion: 0.0.35\nRequires-Dist: {requires}\n"
        )
        monkeypatch.syspath_prepend(str(tmp_path))

    return install


def torch_is(monkeypatch: pytest.MonkeyPatch, version: str, cuda: str | None) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(torch.version, "cuda", cuda)


BUILT = {"cuda": 1208, "hip": None, "torch": "2.10.0+cu128"}


@pytest.mark.parametrize(
    ("built", "requires", "torch_version", "cuda", "reason"),
    [
        (BUILT, "torch>=2.10", "2.10.0+cu128", "12.8", None),
        # torch's stable interface
        (BUILT, "torch>=2.10", "2.11.0+cu126", "12.6", None),
        (
            BUILT,
            "torch>=2.10",
            "2.11.0+cu130",
            "13.0",
            "it was built for torch 2.10.0+cu128, whose CUDA is 12.8, and this is torch 2.11.0+cu130 for CUDA 13.0",
        ),
        (
            BUILT,
            "torch>=2.10",
            "2.13.0+cpu",
            None,
            "it was built for torch 2.10.0+cu128, whose CUDA is 12.8, and this is torch 2.13.0+cpu for no CUDA",
        ),
        (
            BUILT,
            "torch==2.10.0",
            "2.11.0+cu128",
            "12.8",
            "it needs torch 2.10.0 exactly, and this is torch 2.11.0+cu128 for CUDA 12.8",
        ),
        (
            {**BUILT, "cuda": None, "hip": 603},
            "torch>=2.10",
            "2.11.0",
            "13.0",
            "it was built for torch 2.10.0+cu128 without CUDA, and this is torch 2.11.0 for CUDA 13.0",
        ),
        (None, "torch>=2.10", "2.11.0", "13.0", "it has no kernels (a readable cpp_lib.json is missing"),
        (
            {"torch": "2.10.0"},
            "torch>=2.10",
            "2.11.0",
            "13.0",
            "it has no kernels (a readable cpp_lib.json is",
        ),
    ],
)
def test_what_xformers_was_built_for(
    built: dict[str, Any] | None,
    requires: str,
    torch_version: str,
    cuda: str | None,
    reason: str | None,
    wheel: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wheel(built, requires)
    torch_is(monkeypatch, torch_version, cuda)
    found = xformers_build.why_unusable()
    assert found == reason or (found is not None and reason is not None and found.startswith(reason))


def test_xformers_that_cannot_load_costs_nothing(
    wheel: Any, pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = load_policy(settings(pipeline_folder)).denoiser
    wheel(BUILT)
    torch_is(monkeypatch, "2.11.0+cu130", "13.0")
    assert set_attention(unet, settings(), GPU, torch.float32) == "sdpa"
    both = r"model\.attention: xformers cannot be used here: it was built for torch 2\.10\.0\+cu128.*2\.11\.0\+cu130"
    with pytest.raises(ConfigError, match=both):
        set_attention(unet, settings(attention="xformers"), GPU, torch.float32)
    assert xformers_build.describe().startswith(
        "its kernels cannot load: it was built for torch 2.10.0+cu128"
    )


def test_kernels_that_fit_are_loaded_to_be_sure(
    wheel: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel(BUILT)
    torch_is(monkeypatch, "2.10.0+cu128", "12.8")
    (tmp_path / "xformers" / "_C.so").write_bytes(b"no library")
    assert xformers_build.describe().startswith("its kernels cannot load: ")
    asked: list[str] = []
    monkeypatch.setattr(torch.ops, "load_library", asked.append)
    assert xformers_build.describe() == "its kernels load"
    assert asked == [str(tmp_path / "xformers" / "_C.so")]


def test_attention_is_timed_on_the_policys_gpu(
    pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = load_policy(settings(pipeline_folder)).denoiser
    current: list[Any] = []
    timed: list[tuple[Any, ...]] = []

    @contextmanager
    def device(index: torch.device) -> Iterator[None]:
        current.append(index)
        yield
        current.pop()

    def milliseconds(attention: Any, inputs: list[Tensor]) -> float:
        timed.append(tuple(current))
        return 1.0 if attention is theirs.memory_efficient_attention else 2.0

    theirs = SimpleNamespace(memory_efficient_attention=lambda *args: None)
    package = ModuleType("xformers")
    package.ops = theirs  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", theirs)
    draw = torch.randn
    monkeypatch.setattr(torch, "randn", lambda shape, **options: draw(shape))
    monkeypatch.setattr(switches, "why_unusable", lambda: None)
    monkeypatch.setattr(switches, "_milliseconds", milliseconds)
    monkeypatch.setattr(torch.cuda, "device", device)
    assert switches._fastest(unet, GPU, torch.float32) == "xformers"
    assert timed == [(GPU,), (GPU,)]
