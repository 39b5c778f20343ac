"""The norms of a small denoiser's residual blocks: forward, and with the gradients for image, weight and bias."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.nn.functional import group_norm, silu

import loopfast_kernels

from ..cases import device

SHAPES = [(40, 8, 8), (80, 8, 8), (120, 8, 8), (80, 4, 4), (160, 4, 4)]
LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
ROWS, GROUPS, BUDGET_SECONDS = 256, 8, 0.5

Images = Sequence[Tensor]  # the image, weight, bias, and the gradient of the result


def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return silu(group_norm(x, GROUPS, weight, bias))


def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return loopfast_kernels.group_norm_silu(x, weight, bias, GROUPS)


def make_images(
    shape: tuple[int, int, int], layout: torch.memory_format, requires_grad: bool, seed: int
) -> list[Tensor]:
    """Makes random arguments, and a gradient for the result."""
    generator = torch.Generator(device()).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device())

    image, grad = (normal(ROWS, *shape).contiguous(memory_format=layout) for _ in range(2))
    inputs = [image, normal(shape[0]), normal(shape[0])]
    return [*(value.requires_grad_(requires_grad) for value in inputs), grad]


def runner(competitor: str, backward: bool) -> Callable[[Images], tuple[Tensor, ...]]:
    """Returns the function to time."""
    function = ours if competitor == "ours" else eager
    if competitor == "compile":
        torch.compiler.reset()
        function = torch.compile(function, fullgraph=True, dynamic=False)

    def run(images: Images) -> tuple[Tensor, ...]:
        *inputs, grad = images
        if not backward:
            with torch.no_grad():
                return (function(*inputs),)
        return torch.autograd.grad(function(*inputs), inputs, grad)

    return run


@pytest.mark.parametrize("competitor", ["ours", "eager", "compile"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward-and-backward"])
def test_group_norm_silu(
    time_call: Callable[..., None],
    shape: tuple[int, int, int],
    layout: str,
    competitor: str,
    backward: bool,
) -> None:
    # In and out once; the backward pass reads image and gradient and writes another.
    passes = 5 if backward else 2
    time_call(
        runner(competitor, backward),
        lambda seed: make_images(shape, LAYOUTS[layout], backward, seed),
        lambda images: images[0].nbytes * passes,
        op="group_norm_silu_backward" if backward else "group_norm_silu",
        setting=f"{'x'.join(map(str, shape))}-{layout}-{ROWS}-float32",
        competitor=competitor,
        budget=BUDGET_SECONDS,
    )
