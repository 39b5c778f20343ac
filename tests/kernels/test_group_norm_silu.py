from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import silu

from loopfast_kernels import backend, group_norm_silu, native_library
from tests.kernels.accuracy import FLOAT32, ROUNDING

LAYOUTS = [torch.contiguous_format, torch.channels_last]


@dataclass(frozen=True)
class Case:
    x: Tensor
    weight: Tensor
    bias: Tensor
    shift: Tensor | None
    grad: Tensor
    groups: int

    def to(self, target: torch.dtype | str) -> Case:
        return replace(
            self,
            **{name: value.to(target) for name, value in vars(self).items() if isinstance(value, Tensor)},
        )

    def rows(self, index: slice) -> Case:
        """Some of the rows, in storage of their own."""
        layout = torch.contiguous_format if self.x.is_contiguous() else torch.channels_last
        return replace(
            self,
            x=self.x[index].clone(memory_format=layout),
            shift=None if self.shift is None else self.shift[index].clone(),
            grad=self.grad[index].clone(memory_format=layout),
        )

    def run(self, function=group_norm_silu) -> list[Tensor]:
        """The result and every gradient."""
        given = [value for value in (self.x, self.weight, self.bias, self.shift) if value is not None]
        inputs = [value.detach().requires_grad_() for value in given]
        shift = None if self.shift is None else inputs[3]
        y = function(*inputs[:3], self.groups, eps=1e-5, shift=shift)
        return [y, *torch.autograd.grad(y, inputs, self.grad)]


def plain(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, *, eps: float, shift: Tensor | None
) -> Tensor:
    shifted = x if shift is None else x + shift[:, :, None, None]
    # torch's kernel for channels last takes the variance as E[x²] - E[x]², which cancels in float64 too
    return silu(torch.group_norm(shifted.contiguous(), groups, weight, bias, eps))


def make_case(
    shape: tuple[int, int, int, int] = (3, 15, 4, 3),
    groups: int = 3,
    *,
    dtype: torch.dtype = torch.float32,
    layout: torch.memory_format = torch.channels_last,
    shifted: bool = True,
    mean: float = 0.5,
    affine: torch.dtype = torch.float32,
    seed: int = 0,
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    channels = shape[1]
    return Case(
        x=(normal(*shape) + mean).to(dtype).contiguous(memory_format=layout),
        weight=(1.0 + 0.3 * normal(channels)).to(affine),
        bias=(0.3 * normal(channels)).to(affine),
        shift=normal(shape[0], channels).to(dtype) if shifted else None,
        grad=normal(*shape).to(dtype).contiguous(memory_format=layout),
        groups=groups,
    )


def check_against_float64(each_backend, case: Case) -> None:
    exact = case.to(torch.float64).run(plain)
    with each_backend.active():
        mine = case.to(each_backend.device).run()
    assert mine[0].stride() == mine[1].stride() == case.x.stride()
    u = case.x.double() if case.shift is None else case.x.double() + case.shift.double()[:, :, None, None]
    variance = u.reshape(len(u), case.groups, -1).var(-1, correction=0)
    # Few values cancel in a group's gradients: those of a single one are 0, and what is left of the terms is rounding.
    terms = 0.01 * case.grad.double().norm() / (variance.min() + 1e-5).sqrt()
    inputs = [case.x, case.x, case.weight, case.bias, case.shift]
    for value, expected, like in zip(mine, exact, inputs, strict=False):
        assert value.dtype == like.dtype
        error = (value.detach().cpu().double() - expected.detach()).norm()
        size = max(expected.detach().norm(), terms)
        assert error <= (ROUNDING[like.dtype] + FLOAT32) * size


@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("shape", "groups", "shifted"),
    [
        ((2, 40, 4, 8), 4, False),
        ((2, 15, 5, 3), 3, True),
        ((1, 80, 4, 4), 4, True),
        ((1, 4, 70, 70), 2, True),
    ],
)
@pytest.mark.usefixtures("poisoned")
def test_every_backend_against_float64(each_backend, dtype, layout, shape, groups, shifted):
    each_backend.skip_unless_it_takes(dtype)
    check_against_float64(each_backend, make_case(shape, groups, dtype=dtype, layout=layout, shifted=shifted))


@settings(max_examples=15)
@given(
    rows=st.integers(1, 2),
    groups=st.integers(1, 3),
    per_group=st.integers(1, 7),
    height=st.integers(1, 5),
    width=st.integers(1, 5),
    layout=st.sampled_from(LAYOUTS),
    shifted=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_every_backend_on_any_shape(
    each_backend, rows, groups, per_group, height, width, layout, shifted, seed
):
    shape = (rows, groups * per_group, height, width)
    case = make_case(shape, groups, layout=layout, shifted=shifted, seed=seed)
    if per_group * height * width < 4:
        # So few values may lie so close together that their differences are mostly rounding.
        case = replace(case, x=case.x.round())
    check_against_float64(each_backend, case)


@pytest.mark.parametrize("mean", [3000.0, 3e6])  # the second rounds by an eighth of the standard deviation
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_large_mean_costs_no_accuracy(each_backend, layout, mean):
    check_against_float64(each_backend, make_case((2, 12, 9, 7), 4, layout=layout, shifted=False, mean=mean))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_may_have_the_dtype_of_the_image(each_backend, dtype):
    each_backend.skip_unless_it_takes(dtype)
    check_against_float64(each_backend, make_case(dtype=dtype, affine=dtype))


def test_example_by_hand():
    # Mean 2, variance 4: normalized to -1 and 1, then to -2 and 4.
    x = torch.tensor([0.0, 4.0]).reshape(1, 1, 1, 2)
    y = group_norm_silu(x, torch.tensor([3.0]), torch.tensor([1.0]), 1, eps=1e-12)
    z = torch.tensor([-2.0, 4.0])
    torch.testing.assert_close(y.flatten(), z / (1 + torch.exp(-z)))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("extreme", [60.0, 100.0, 1e10])
def test_the_ends_of_the_sigmoid(each_backend, extreme):
    x = torch.tensor([-1.0, 1.0], device=each_backend.device).reshape(1, 2, 1, 1).requires_grad_()
    weight = torch.zeros(2, device=each_backend.device)
    bias = torch.tensor([-extreme, extreme], device=each_backend.device, requires_grad=True)
    with each_backend.active():
        y = group_norm_silu(x, weight, bias, 1)
        y.sum().backward()
    assert abs(float(y[0, 0].detach())) < 1e-20
    assert float(y[0, 1].detach()) == pytest.approx(extreme, rel=1e-6)
    torch.testing.assert_close(bias.grad.cpu(), torch.tensor([0.0, 1.0]))


def test_what_is_not_a_number_stays_so(each_backend):
    case = make_case().to(each_backend.device)
    case.x[1, 2, 0, 0] = torch.nan
    with each_backend.active():
        y = case.run()[0]
    assert y[1, :5].isnan().all()
    assert not y[1, 5:].isnan().any()
    assert not y[[0, 2]].isnan().any()


@pytest.mark.parametrize("name", ["native", "triton"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_row_does_not_depend_on_the_others(name, layout):
    device = "cuda" if name == "triton" and torch.cuda.is_available() else "cpu"
    case = make_case((4, 12, 5, 4), 2, layout=layout).to(device)
    with backend(name):
        y, grad_x, _, _, grad_shift = case.run()
        for index in (slice(0, 1), slice(1, 4)):
            part = case.rows(index).run()
            assert torch.equal(part[0], y[index])
            assert torch.equal(part[1], grad_x[index])
            assert torch.equal(part[4], grad_shift[index])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_of_threads_changes_nothing(layout, dtype):
    case = make_case((37, 40, 8, 8), 8, layout=layout, dtype=dtype)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(case.run())
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_only_the_gradients_that_are_needed_are_computed(each_backend):
    case = make_case((2, 6, 4, 3), 2).to(each_backend.device)
    given = [case.x, case.weight, case.bias, case.shift]
    with each_backend.active():
        every = case.run()
        statistics = torch.ops.loopfast.group_norm_silu(*given, case.groups, 1e-5)[1]
        for wanted in range(4):
            inputs = [value.clone().requires_grad_(i == wanted) for i, value in enumerate(given)]
            y = group_norm_silu(*inputs[:3], case.groups, shift=inputs[3])
            (gradient,) = torch.autograd.grad(y, inputs[wanted], case.grad)
            assert torch.equal(gradient, every[1 + wanted])
            mask = [index == wanted for index in range(4)]
            results = torch.ops.loopfast.group_norm_silu_backward(
                case.grad, *given, statistics, case.groups, 1e-5, mask
            )
            assert [result.numel() > 0 for result in results] == mask


def test_kept_for_the_backward_pass_are_the_inputs_and_three_numbers_a_group():
    case = make_case((2, 40, 8, 8), 8)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda value: kept.append(value) or value, lambda value: value
    ):
        group_norm_silu(case.x.requires_grad_(), case.weight, case.bias, 8, shift=case.shift)
    new = [value for value in kept if all(value is not given for given in vars(case).values())]
    assert [tuple(value.shape) for value in new] == [(2, 8, 3)]


def test_a_gradient_in_another_layout(each_backend):
    case = make_case().to(each_backend.device)
    with each_backend.active():
        expected = case.run()
        other = replace(case, grad=case.grad.contiguous()).run()
    assert all(torch.equal(a, b) for a, b in zip(expected, other, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shifted", [False, True])
def test_gradient(layout, shifted):
    case = make_case((2, 4, 2, 3), 2, layout=layout, shifted=shifted).to(torch.float64)
    inputs = [value for value in (case.x, case.weight, case.bias, case.shift) if value is not None]

    def function(*values: Tensor) -> Tensor:
        return group_norm_silu(*values[:3], 2, shift=values[3] if shifted else None)

    assert torch.autograd.gradcheck(function, tuple(value.requires_grad_() for value in inputs))


def test_a_second_derivative_is_refused():
    case = make_case()
    y = group_norm_silu(case.x.requires_grad_(), case.weight, case.bias, 3)
    (gradient,) = torch.autograd.grad(y, case.x, case.grad.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout):
    case = make_case(layout=layout)
    inputs = [value.requires_grad_() for value in (case.x, case.weight, case.bias, case.shift)]
    torch.library.opcheck(torch.ops.loopfast.group_norm_silu.default, (*inputs, 3, 1e-5))
    with torch.no_grad():
        statistics = torch.ops.loopfast.group_norm_silu(*inputs, 3, 1e-5)[1]
        arguments = (
            case.grad,
            *(value.detach() for value in inputs),
            statistics,
            3,
            1e-5,
            [True, False, True, True],
        )
        torch.library.opcheck(torch.ops.loopfast.group_norm_silu_backward.default, arguments)


def test_compiles_whole():
    case = make_case(shifted=False)
    compiled = torch.compile(group_norm_silu, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(case.run(compiled), case.run(), strict=True))


X, ONES = torch.zeros(2, 6, 3, 3), torch.ones(6)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((X[0], ONES, ONES, 2), {}, ValueError, r"x must have shape \[N, C, H, W\]"),
        ((X[:0], ONES, ONES, 2), {}, ValueError, "x must have shape .* with elements"),
        ((X[:, :, ::2], ONES, ONES, 2), {}, ValueError, "x must be contiguous or channels last, got strides"),
        ((X.long(), ONES, ONES, 2), {}, TypeError, "x must be float32 or .*, got int64"),
        ((X, ONES, ONES, 4), {}, ValueError, "groups must divide the 6 channels of x, got 4"),
        ((X, ONES, ONES, 0), {}, ValueError, "groups must divide the 6 channels of x, got 0"),
        ((X, ONES, ONES, 2), {"eps": 0.0}, ValueError, "eps must be positive, got 0.0"),
        ((X, ONES[:5], ONES, 2), {}, ValueError, r"weight must have shape \[6\], got \[5\]"),
        ((X, ONES, ONES.half(), 2), {}, TypeError, "bias must be float32, got float16"),
        ((X, ONES, None, 2), {}, TypeError, "bias must be a tensor"),
        ((X, ONES, ONES, 2), {"shift": ONES}, ValueError, r"shift must have shape \[2, 6\], got \[6\]"),
        ((X, ONES, ONES, 2), {"shift": X[..., 0, 0].half()}, TypeError, "shift must be float32, got float16"),
        ((X, ONES.to("meta"), ONES, 2), {}, ValueError, "weight is on meta"),
    ],
)
def test_errors_name_the_argument(arguments, options, error, message):
    with pytest.raises(error, match=message):
        group_norm_silu(*arguments, **options)


def test_the_native_library_takes_no_other_layout():
    with pytest.raises(ValueError, match="x must be contiguous"), backend("native"):
        torch.ops.loopfast.group_norm_silu(X[:, :, ::2], ONES, ONES, None, 2, 1e-5)
    assert native_library.missing() is None
