from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loopfast_kernels import transition_logprob
from tests.kernels.accuracy import FLOAT32, ROUNDING, rms


def plain(
    model_output: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    table: Tensor,
    step: Tensor,
    uncond_output: Tensor | None = None,
    guidance_scale: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    """The formula by torch.distributions; autograd differentiates it."""
    a, b, sigma = (column.reshape(-1, *(1,) * (sample.dim() - 1)) for column in table[step].unbind(1))
    output = model_output
    if uncond_output is not None:
        output = uncond_output + guidance_scale * (model_output - uncond_output)
    density = torch.distributions.Normal(a * sample + b * output, sigma).log_prob(prev_sample).flatten(1)
    return density.sum(1) if reduction == "sum" else density.mean(1)


@given(
    rows=st.integers(1, 6),
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    seed=st.integers(0, 2**31),
    guidance_scale=st.none() | st.floats(-2, 9),
    reduction=st.sampled_from(["mean", "sum"]),
)
def test_is_the_density_of_a_gaussian(make_transition, rows, shape, seed, guidance_scale, reduction):
    case = make_transition(rows, tuple(shape), dtype=torch.float64, seed=seed)
    options = {"reduction": reduction}
    if guidance_scale is not None:
        options |= {"uncond_output": case.uncond_output, "guidance_scale": guidance_scale}
    arguments = (case.model_output, case.sample, case.prev_sample, case.table, case.step)
    logprob = transition_logprob(*arguments, **options)
    torch.testing.assert_close(logprob, plain(*arguments, **options), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_arithmetic_is_float32_whatever_the_inputs(make_transition, dtype, reduction):
    case = make_transition(dtype=dtype)
    arguments = (case.model_output, case.sample, case.prev_sample, case.table, case.step)
    logprob = transition_logprob(*arguments, reduction=reduction)
    assert logprob.dtype == torch.float32
    exact = plain(*(t.double() if t.is_floating_point() else t for t in arguments), reduction=reduction)
    torch.testing.assert_close(logprob.double(), exact, rtol=1e-5, atol=1e-5)


def check_against_float64(each_backend, case, guided: bool, reduction: str) -> None:
    dtype = case.sample.dtype
    weights = 1.0 + torch.rand(len(case.step))

    def run(of, device: str) -> tuple[Tensor, ...]:
        of = of.to(device)
        inputs = [of.model_output.requires_grad_()]
        options = {"reduction": reduction}
        if guided:
            inputs.append(of.uncond_output.requires_grad_())
            options |= {"uncond_output": of.uncond_output, "guidance_scale": 2.5}
        logprob = transition_logprob(of.model_output, of.sample, of.prev_sample, of.table, of.step, **options)
        # Kept off the range where float16 is subnormal.
        scale = of.model_output[0].numel() if reduction == "mean" else 1
        loss = (logprob * weights.to(logprob)).sum() * scale
        return logprob, *torch.autograd.grad(loss, inputs)

    exact = run(case.to(torch.float64), "cpu")
    with each_backend.active():
        mine = run(case, each_backend.device)
    assert rms(mine[0], exact[0]) < FLOAT32
    for gradient, expected in zip(mine[1:], exact[1:], strict=True):
        assert gradient.dtype == dtype
        assert rms(gradient, expected) < ROUNDING[dtype] + FLOAT32


@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("shape", [(1,), (3,), (4, 3, 3), (1000,), (4, 32, 32), (2, 64, 64)])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.usefixtures("poisoned")
def test_every_backend_against_float64(make_transition, each_backend, dtype, shape, guided):
    each_backend.skip_unless_it_takes(dtype)
    case = make_transition(rows=2, shape=shape, dtype=dtype)
    case.table[case.step[1], 2] = 0.0
    check_against_float64(each_backend, case, guided, "mean")


def test_every_backend_on_a_very_long_row(make_transition, each_backend, tile):
    """More partial sums than one program holds."""
    tile(2, 16384)
    elements = 40_000 if each_backend.interpreted else 600_000
    check_against_float64(each_backend, make_transition(rows=1, shape=(elements,)), False, "mean")


@settings(max_examples=12)
@given(
    rows=st.integers(1, 3),
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    guided=st.booleans(),
    reduction=st.sampled_from(["mean", "sum"]),
    seed=st.integers(0, 2**31),
)
def test_every_backend_on_any_shape(
    make_transition, each_backend, rows, shape, dtype, guided, reduction, seed
):
    case = make_transition(rows, tuple(shape), dtype=dtype, seed=seed)
    check_against_float64(each_backend, case, guided, reduction)


def test_example_by_hand():
    # x' - (a x + b m) = 1 - (0.5 * 2 + 0.25 * 4) = -1, sigma = 2
    logprob = transition_logprob(
        torch.tensor([[4.0]]),
        torch.tensor([[2.0]]),
        torch.tensor([[1.0]]),
        torch.tensor([[9.0, 9.0, 9.0], [0.5, 0.25, 2.0]]),
        torch.tensor([1]),
    )
    assert logprob.item() == pytest.approx(-1 / 8 - math.log(2) - 0.5 * math.log(2 * math.pi))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("guided", [False, True])
def test_backward_is_that_of_the_plain_formula(make_transition, reduction, guided):
    case = make_transition(dtype=torch.float64)
    weights = torch.randn(5, dtype=torch.float64)
    gradients = []
    for function in (transition_logprob, plain):
        output = case.model_output.clone().requires_grad_()
        uncond = case.uncond_output.clone().requires_grad_()
        options = {"uncond_output": uncond, "guidance_scale": 3.5} if guided else {}
        logprob = function(
            output, case.sample, case.prev_sample, case.table, case.step, reduction=reduction, **options
        )
        (logprob * weights).sum().backward()
        gradients.append((output.grad, uncond.grad))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=1e-12)
    assert (gradients[0][1] is not None) == guided


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradcheck(make_transition, reduction):
    case = make_transition(rows=3, shape=(2, 3), dtype=torch.float64)

    def function(output: Tensor, uncond: Tensor) -> Tensor:
        return transition_logprob(
            output,
            case.sample,
            case.prev_sample,
            case.table,
            case.step,
            uncond_output=uncond,
            guidance_scale=2.5,
            reduction=reduction,
        )

    inputs = (case.model_output.requires_grad_(), case.uncond_output.requires_grad_())
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_have_the_dtype_of_their_inputs(make_transition, dtype):
    case = make_transition(dtype=dtype)
    output, uncond = case.model_output.requires_grad_(), case.uncond_output.requires_grad_()
    transition_logprob(
        output,
        case.sample,
        case.prev_sample,
        case.table,
        case.step,
        uncond_output=uncond,
        guidance_scale=2.0,
    ).sum().backward()
    assert output.grad.dtype == uncond.grad.dtype == dtype
    torch.testing.assert_close(output.grad, -2 * uncond.grad)


def test_deterministic_step_has_no_logprob_and_no_gradient(transition):
    table = transition.table.clone()
    table[:, 2] = 0.0
    output = transition.model_output.requires_grad_()
    logprob = transition_logprob(output, transition.sample, transition.prev_sample, table, transition.step)
    assert torch.equal(logprob, torch.zeros(5))
    logprob.sum().backward()
    assert torch.equal(output.grad, torch.zeros_like(output))


@pytest.mark.parametrize("elements", [1, 17, 256, 1001, 20_000])
def test_a_row_does_not_depend_on_its_neighbors(make_transition, each_backend, tile, elements):
    tile(16, 1024)
    count = 3 if each_backend.interpreted else 31 if elements < 20_000 else 5
    case = make_transition(rows=count, shape=(elements,)).to(each_backend.device)

    def run(part):
        with each_backend.active():
            return transition_logprob(
                part.model_output,
                part.sample,
                part.prev_sample,
                part.table,
                part.step,
                uncond_output=part.uncond_output,
                guidance_scale=5.0,
            )

    whole = run(case)
    for rows in {1, 2, 3, count - 1}:
        assert torch.equal(run(case.rows(slice(rows))), whole[:rows])
    order = torch.randperm(count).to(each_backend.device)
    assert torch.equal(run(case.rows(order)), whole[order])


def test_opcheck(transition):
    output = transition.model_output.requires_grad_()
    uncond = transition.uncond_output.requires_grad_()
    data = (transition.sample, transition.prev_sample, transition.table, transition.step)
    torch.library.opcheck(torch.ops.loopfast.transition_logprob.default, (output, *data, uncond, 2.0, "mean"))
    torch.library.opcheck(torch.ops.loopfast.transition_logprob.default, (output, *data, None, 1.0, "sum"))
    torch.library.opcheck(
        torch.ops.loopfast.transition_logprob_backward.default,
        (torch.randn(5), output.detach(), *data, uncond.detach(), 2.0, "mean"),
    )


def test_compiles_in_one_graph(transition):
    def function(output: Tensor) -> Tensor:
        return transition_logprob(
            output, transition.sample, transition.prev_sample, transition.table, transition.step
        ).sum()

    output = transition.model_output.requires_grad_()
    expected = torch.autograd.grad(function(output), output)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(torch.autograd.grad(compiled(output), output)[0], expected[0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model_output": [1.0]}, TypeError, "model_output must be a tensor, got list"),
        (
            {"model_output": torch.zeros(5, 2, dtype=torch.int64)},
            TypeError,
            "model_output must be float32 or",
        ),
        ({"model_output": torch.zeros(5)}, ValueError, r"model_output must have shape \[N, ...\]"),
        ({"model_output": torch.zeros(0, 4)}, ValueError, "model_output must have shape"),
        ({"sample": torch.zeros(5, 4, 3, 2)}, ValueError, r"sample must have shape \[5, 4, 3, 3\]"),
        ({"prev_sample": torch.zeros(4, 4, 3, 3)}, ValueError, "prev_sample must have shape"),
        ({"prev_sample": torch.zeros(5, 4, 3, 3, device="meta")}, ValueError, "prev_sample is on meta"),
        ({"uncond_output": torch.zeros(5, 4)}, ValueError, "uncond_output must have shape"),
        ({"table": torch.zeros(4, 2)}, ValueError, r"table must have shape \[T, 3\], got \[4, 2\]"),
        ({"table": torch.zeros(0, 3)}, ValueError, "table must have shape"),
        ({"table": torch.zeros(4, 3, dtype=torch.float16)}, TypeError, "table must be float32 or float64"),
        ({"step": torch.zeros(5, dtype=torch.int32)}, TypeError, "step must be int64, got int32"),
        ({"step": torch.zeros(4, dtype=torch.int64)}, ValueError, r"step must have shape \[5\]"),
        ({"step": torch.tensor([0, 1, 4, 0, 0])}, ValueError, r"step must lie in \[0, 4\), got 4"),
        (
            {"model_output": torch.zeros(5, 4, 3, 3).to(memory_format=torch.channels_last)},
            ValueError,
            r"model_output must be contiguous, got strides \[36, 1, 12, 4\] for shape \[5, 4, 3, 3\]",
        ),
        ({"table": torch.full((4, 3), -1.0)}, ValueError, "table has sigma -1 at step 0"),
        ({"step": torch.tensor([0, -1, 3, 0, 0])}, ValueError, "step must lie in .* got -1"),
        ({"guidance_scale": 7.5}, ValueError, "guidance_scale=7.5 needs uncond_output"),
        ({"reduction": "max"}, ValueError, "reduction must be one of mean, sum, got 'max'"),
    ],
)
def test_errors_name_the_argument(transition, change, error, message):
    arguments = {
        name: getattr(transition, name) for name in ("model_output", "sample", "prev_sample", "table", "step")
    }
    with pytest.raises(error, match=message):
        transition_logprob(**(arguments | change))
