from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from loopfast_kernels.registration import Operator, select


class Doubled(torch.autograd.Function):
    operator: Operator

    @classmethod
    def forward(cls, ctx: Any, *inputs: Any) -> Tensor:
        return cls.operator.below_autograd(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return 2 * grad, None


class Factor(NamedTuple):
    factor: float


@pytest.fixture(scope="module")
def scaled() -> Operator:
    """An operator whose gradient is always twice the result's, to tell it from one that autograd makes."""
    return Operator(
        "test_scaled(Tensor values, float factor) -> Tensor",
        lambda arguments: arguments.values.mul(
            select(Factor, arguments).factor
        ),  # in another order: no method
        lambda arguments: torch.empty_like(arguments.values),
        Doubled,
    )


@pytest.mark.parametrize("traced", [False, True])
def test_an_operator_has_its_arguments_by_name_and_its_own_gradient(scaled, traced):
    values = torch.tensor([1.0, 2.0], requires_grad=True)

    def function(values: Tensor) -> Tensor:
        return scaled(values, 3.0)

    if traced:
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    result = function(values)
    assert result.tolist() == [3.0, 6.0]
    result.sum().backward()
    assert values.grad.tolist() == [2.0, 2.0]


def test_arguments_without_a_gradient_are_named_too(scaled):
    named = scaled.named(torch.ones(2), 0.5)
    assert named.factor == 0.5
    assert select(Factor, named) == Factor(0.5)
    assert scaled.directly(*named).tolist() == [0.5, 0.5]


def test_a_schema_says_how_many_arguments_there_are(scaled):
    with pytest.raises(TypeError, match="factor"):
        scaled.directly(torch.ones(2))


@torch.inference_mode()
def test_torch_gives_the_kernel_its_arguments_in_the_schemas_order(scaled):
    values = torch.tensor([1.0, 2.0])  # in this mode torch skips the gradient and calls the kernel itself
    assert torch.ops.loopfast.test_scaled(values, 3.0).tolist() == [3.0, 6.0]
