"""The adapter's arithmetic: the types it computes in and is trained in, and the layers it reaches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from loopfast.config import ModelConfig
from loopfast.policies import Policy, layers_with_adapter, load_policy

PROMPTS = ["a red circle and a blue square", "three green triangles"]
# inside a gated activation, an upsampler and a residual block
UNUSUAL = ["ff.net.0.proj", "upsamplers.0.conv", "conv1"]


def make(folder: Path, **options: Any) -> Policy:
    """A policy whose adapter is no longer 0."""
    lora = {"rank": 4, "alpha": 6, **options.pop("lora", {})}
    policy = load_policy(
        ModelConfig(pretrained=str(folder), device="cpu", tune="lora", lora=lora, **options), seed=1
    )
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in policy.trainable().items():
            if "lora_B" in name:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return policy


def predict(policy: Policy) -> Tensor:
    sample = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    return policy.predict(sample.to(policy.dtype), torch.tensor([901, 1]), policy.encode(PROMPTS), 3.0)[0]


def gradients(policy: Policy) -> dict[str, Tensor]:
    """Adds the gradients of one more backward pass."""
    predict(policy).float().square().mean().backward()
    return {name: p.grad.clone() for name, p in policy.trainable().items() if p.grad is not None}


class Types(TorchDispatchMode):
    """Collects the types of all floating-point tensors that operators return."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if isinstance(output, Tensor) and output.is_floating_point():
            self.found.add(output.dtype)
        return output


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("lora", [{}, {"targets": UNUSUAL}], ids=["attention", "convolutions"])
@torch.no_grad()
def test_an_adapter_computes_in_the_type_of_its_input(
    dtype: str, lora: dict[str, Any], pipeline_folder: Path
) -> None:
    policy = make(pipeline_folder, dtype=dtype, lora=lora)
    calls: list[tuple[Any, Tensor, Tensor, set[torch.dtype]]] = []

    def watched(layer: Any) -> None:
        forward = layer.forward

        def call(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            with Types() as types:
                output: Tensor = forward(x, *args, **kwargs)
            calls.append((layer, x, output, types.found))
            return output

        layer.forward = call

    for layer in layers_with_adapter(policy.denoiser).values():
        watched(layer)
    predict(policy)
    assert len(calls) >= len(layers_with_adapter(policy.denoiser)) > 0
    half = torch.finfo(policy.dtype)
    for layer, x, output, types in calls:
        assert types == {policy.dtype}
        base, x = layer.get_base_layer(), x.float()
        factor_a, factor_b = layer.lora_A["loopfast"], layer.lora_B["loopfast"]
        low = torch.nn.functional.linear
        if base.weight.ndim == 4:
            options = {"stride": base.stride, "padding": base.padding}
            plain = torch.nn.functional.conv2d(x, base.weight.float(), base.bias.float(), **options)
            change = torch.nn.functional.conv2d(x, factor_a.weight, None, **options)
            change = torch.nn.functional.conv2d(change, factor_b.weight)
        else:
            plain = low(x, base.weight.float(), None if base.bias is None else base.bias.float())
            change = low(low(x, factor_a.weight), factor_b.weight)
        # a handful of roundings, each of at most half a unit of what it rounds
        bound = 8 * half.eps * max(plain.abs().max().item(), change.abs().max().item())
        assert (output.float() - plain - 1.5 * change).abs().max() < bound
        assert (output.float() - plain).abs().max() > bound


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_adapter_is_trained_in_float32(dtype: str, pipeline_folder: Path) -> None:
    policy = make(pipeline_folder, dtype=dtype)
    assert {parameter.dtype for parameter in policy.trainable().values()} == {torch.float32}
    once = gradients(policy)
    assert once.keys() == policy.trainable().keys()
    assert {gradient.dtype for gradient in once.values()} == {torch.float32}
    twice = gradients(policy)
    assert all(torch.equal(twice[name], 2 * once[name]) for name in once)


def test_gradients_are_those_of_float32_up_to_rounding(pipeline_folder: Path) -> None:
    exact, found = (gradients(make(pipeline_folder, dtype=dtype)) for dtype in ("float32", "bfloat16"))
    for name in exact:
        difference = (found[name] - exact[name]).norm()
        assert difference < 0.1 * exact[name].norm(), name


def test_recomputed_activations_have_the_same_gradient_in_bfloat16(pipeline_folder: Path) -> None:
    plain, again = (make(pipeline_folder, dtype="bfloat16") for _ in range(2))
    again.enable_gradient_checkpointing()
    first, second = gradients(plain), gradients(again)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_is_exported_are_the_float32_weights(pipeline_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    policy = make(pipeline_folder, dtype="bfloat16", lora={"alpha": 4})
    weights = {name: parameter.detach() for name, parameter in policy.trainable().items()}
    policy.export(tmp_path, weights)
    exported = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert len(exported) == len(weights)
    for name, value in weights.items():
        assert torch.equal(exported[f"unet.{name.replace('.loopfast.', '.')}"], value)


def test_dora_in_16_bits_starts_as_the_base(pipeline_folder: Path) -> None:
    """Norms of columns rounded to 16 bits would change the model before training."""
    policy = load_policy(
        ModelConfig(
            pretrained=str(pipeline_folder),
            device="cpu",
            tune="lora",
            dtype="bfloat16",
            lora={"rank": 4, "dora": True},
        )
    )
    layer = next(iter(layers_with_adapter(policy.denoiser).values()))
    x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        assert torch.equal(layer(x), layer.get_base_layer()(x))
    assert {gradient.dtype for gradient in gradients(policy).values()} == {torch.float32}


@pytest.mark.parametrize("fast", ["on", "off"])
def test_adapters_inside_fast_layers_act(fast: str, family_folder: Any) -> None:
    policy = make(family_folder("sd"), fast_layers=fast, lora={"targets": UNUSUAL})
    trained, found = policy.trainable(), gradients(policy)
    assert any(".proj." in name for name in trained)
    assert any("upsamplers" in name for name in trained)
    assert found.keys() == trained.keys()
    assert all(gradient.abs().max() > 0 for gradient in found.values())
