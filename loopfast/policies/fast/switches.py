"""Options that make a denoiser faster or smaller and leave its mathematics alone."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.utils.deterministic
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from typing_extensions import override

from loopfast.config import ModelConfig
from loopfast.errors import ConfigError, as_config_error, first_line
from loopfast.policies.fast.layers import ShortAttnProcessor, use_fast_layers
from loopfast.system.device import CUBLAS_WORKSPACE, CUBLAS_WORKSPACES
from loopfast.system.xformers_build import why_unusable

# Size of a compile cache, which blocks of one class, or calls of one function, share: shapes and gradient modes.
_COMPILED_VARIANTS = 64
# xformers is chosen below this fraction of PyTorch's time: noise should not decide how a run rounds.
_CLEARLY_FASTER = 0.9


class FlashAttention(AttnProcessor2_0):
    """Diffusers' attention by PyTorch's FlashAttention kernels only."""

    @override
    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return super().__call__(*args, **kwargs)


def set_attention(unet: Any, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> str:
    """Gives a UNet the attention of ``model.attention``, and returns its name; a transformer keeps PyTorch's.

    Raises:
        ConfigError: the implementation that the configuration names cannot work here.
    """
    name: str = config.attention
    if not isinstance(unet, UNet2DConditionModel):
        if name not in ("auto", "sdpa"):
            raise ConfigError(
                f"model.attention: found {name!r}, allowed: auto or sdpa with a {type(unet).__name__}, whose "
                "attention is PyTorch's"
            )
        return "sdpa"
    if name == "auto":
        name = _fastest(unet, device, dtype)
    reason = None
    if config.attention == "xformers":
        reason = _without_xformers(device)
    elif config.attention == "flash":
        reason = _without_flash(unet, device, dtype)
    if reason is not None:
        raise ConfigError(f"model.attention: {name} cannot be used here: {reason}")
    if name == "xformers":
        refused = "model.attention: xformers cannot be used here"
        with as_config_error(refused, ImportError, RuntimeError, ValueError):
            unet.enable_xformers_memory_efficient_attention()
    else:
        unet.set_attn_processor(_PROCESSORS[name]())
    return name


_PROCESSORS = {"sdpa": AttnProcessor2_0, "matmul": ShortAttnProcessor, "flash": FlashAttention}


def _fastest(unet: Any, device: torch.device, dtype: torch.dtype) -> str:
    """Returns ``matmul`` on a CPU; on a GPU ``sdpa``, or xformers if it is clearly faster at the largest attention."""
    if device.type == "cpu":
        return "matmul"
    if _without_xformers(device):
        return "sdpa"
    import xformers.ops

    def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        ).transpose(1, 2)

    layer = _attentions(unet)[0]
    size = unet.config.sample_size
    tokens = size * size if isinstance(size, int) else size[0] * size[1]
    shape = (2, tokens, layer.heads, layer.inner_dim // layer.heads)
    inputs = [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
    with torch.cuda.device(device):
        try:
            trial = _milliseconds(xformers.ops.memory_efficient_attention, inputs)
        except (RuntimeError, ValueError):
            return "sdpa"
        return "xformers" if trial < _CLEARLY_FASTER * _milliseconds(sdpa, inputs) else "sdpa"


def _milliseconds(attention: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> float:
    """Returns the least time of ten forward and backward passes on the current GPU."""
    times = []
    for _ in range(13):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        torch.autograd.grad(attention(*inputs).sum(), inputs)
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return min(times[3:])


def _without_xformers(device: torch.device) -> str | None:
    """Returns the reason why xformers cannot be used, if any."""
    if device.type != "cuda":
        return f"its kernels need a CUDA device, and model.device is {device}"
    return why_unusable()


def _without_flash(unet: Any, device: torch.device, dtype: torch.dtype) -> str | None:
    """Returns the reason why FlashAttention cannot be used, if any, by a trial of every head size of the UNet."""
    for width in sorted({layer.inner_dim // layer.heads for layer in _attentions(unet)}):
        x = torch.randn(1, 1, 16, width, device=device, dtype=dtype, requires_grad=True)
        try:
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                scaled_dot_product_attention(x, x, x).sum().backward()
        except RuntimeError as error:
            return f"no kernel for heads of {width} in {str(dtype)[6:]} on {device} ({first_line(error)})"
    return None


def _attentions(unet: Any) -> list[Any]:
    return [module for module in unet.modules() if isinstance(module, Attention)]


def set_layers(models: Sequence[Any], fast_layers: str, channels_last: str, device: str) -> dict[str, bool]:
    """Gives models on a kind of device the layers and the memory format of these keys, and returns which are in use."""
    fast = fast_layers == "on" or (fast_layers == "auto" and device == "cpu")
    last = channels_last == "on" or (channels_last == "auto" and fast and device == "cpu")
    for model in models:
        if fast:
            use_fast_layers(model)
        if last:
            model.to(memory_format=torch.channels_last)
    return {"fast layers": fast, "channels last": last}


def set_arithmetic(config: ModelConfig, device: torch.device) -> None:
    """Sets CUDA's arithmetic in this process: float32 products in TF32 or not, and deterministic ones if asked for.

    PyTorch has one such setting for all devices and threads of a process. It is therefore set even with a policy
    on the CPU: a rollout copy or a reward on a GPU computes as ``model.tf32`` says, too. It must be called before the
    process uses CUDA.

    Raises:
        ConfigError: the device has no TF32, or determinism is asked for after CUDA has started without
            ``CUBLAS_WORKSPACE_CONFIG``.
    """
    if config.tf32 and (reason := _without_tf32(device)):
        raise ConfigError(f"model.tf32: {reason}")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.tf32
    if not config.deterministic:
        return
    found = os.environ.get(CUBLAS_WORKSPACE)
    if found not in CUBLAS_WORKSPACES and (found is not None or torch.cuda.is_initialized()):
        raise ConfigError(
            f"model.deterministic: needs the environment variable {CUBLAS_WORKSPACE} before CUDA starts; found "
            f"{'none' if found is None else repr(found)}, allowed: {' or '.join(CUBLAS_WORKSPACES)}"
        )
    os.environ.setdefault(CUBLAS_WORKSPACE, CUBLAS_WORKSPACES[0])
    # raises if there is no such algorithm: with warnings only, attention's backward passes stay nondeterministic
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    # no code here reads uninitialized memory
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _without_tf32(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"needs a CUDA device, and model.device is {device}"
    name, (major, minor) = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    if torch.version.hip is not None:
        return f"needs an NVIDIA GPU, and {device} is {name}"
    if major < 8:
        return f"needs compute capability 8.0 or higher; {name} has {major}.{minor}"
    return None


class Tf32Conv2d(nn.Conv2d):
    """A float32 convolution in TF32, for calls without gradients.

    ``torch.backends.cudnn.allow_tf32`` would set it for the whole process: for the denoiser's convolutions, and for a
    reward's in another thread. cuDNN's own operator takes it as an argument.
    """

    @override
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        cudnn = torch.backends.cudnn
        output: Tensor = torch.ops.aten.cudnn_convolution(
            input,
            weight,
            self.padding,
            self.stride,
            self.dilation,
            self.groups,
            cudnn.benchmark,
            cudnn.deterministic,
            True,
        )
        return output if bias is None else output.add_(bias.view(-1, 1, 1))


def decoder_precision(config: ModelConfig, device: torch.device, vae: Any) -> str:
    """Returns ``model.decoder_precision``, with ``auto`` resolved; it is a `ConfigError` if it cannot work here."""
    name: str = config.decoder_precision
    if name == "auto":
        return "float32" if _without_tf32(device) else "tf32"
    if name == "tf32" and (reason := _without_tf32(device)):
        raise ConfigError(f"model.decoder_precision: tf32 {reason}")
    if name == "model" and config.dtype == "float16" and vae.get("force_upcast", True):
        raise ConfigError(
            "model.decoder_precision: found 'model', allowed: auto, float32 or tf32 with model.dtype float16, in which "
            "this autoencoder overflows (its configuration has force_upcast: true)"
        )
    return name


def use_tf32_convolutions(vae: nn.Module) -> None:
    """Makes an autoencoder's convolutions compute in TF32; its parameters and their names stay."""
    for module in vae.modules():
        if type(module) is nn.Conv2d and module.padding_mode == "zeros" and isinstance(module.padding, tuple):
            module.__class__ = Tf32Conv2d


def with_one_graph(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a compiled function whose calls with and without gradients give the same bits.

    A graph without gradients would be fused, and so rounded, differently from one with gradients. Calls without
    gradients therefore use the latter, too, and drop the tensors that it saves for a backward pass at once.
    """

    def call(*inputs: Any) -> Any:
        if torch.is_grad_enabled():
            return function(*inputs)
        with torch.enable_grad(), saved_tensors_hooks(_forget, _forget):
            outputs = function(*inputs)
        if isinstance(outputs, torch.Tensor):
            return outputs.detach()
        return tuple(output.detach() for output in outputs)

    return call


def _forget(saved: Any) -> Any:
    """Replaces a tensor that autograd saves by None."""


def prepare_compiling(device: torch.device) -> None:
    """Lets torch.compile keep the variants of a run; it is a `ConfigError` if the device has no compiler."""
    if device.type != "cuda":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        needed = "model.compile: needs a C++ compiler on the CPU, such as g++"
        with as_config_error(needed, InvalidCxxCompiler, RuntimeError):
            get_cpp_compiler()
    elif not importlib.util.find_spec("triton"):
        raise ConfigError("model.compile: needs triton, which is not installed")
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _COMPILED_VARIANTS)
