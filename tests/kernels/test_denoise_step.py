from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loopfast_kernels import backend, denoise_step, denoise_step_, philox_normal, transition_logprob
from tests.kernels.accuracy import FLOAT32, ROUNDING, rms

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def test_is_the_affine_mean_and_the_philox_noise(make_transition):
    case = make_transition(dtype=torch.float64)
    a, b, sigma = (column.reshape(-1, 1, 1, 1) for column in case.table[case.step].unbind(1))
    with backend("reference"):
        noise = philox_normal(case.seed, case.step, case.sample.shape).double()
    output = case.uncond_output + 2.5 * (case.model_output - case.uncond_output)

    prev, _ = denoise_step(case.model_output, case.sample, case.table, case.step, case.seed)
    torch.testing.assert_close(
        prev, a * case.sample + b * case.model_output + sigma * noise, rtol=1e-13, atol=1e-13
    )
    prev, _ = denoise_step(
        case.model_output,
        case.sample,
        case.table,
        case.step,
        case.seed,
        uncond_output=case.uncond_output,
        guidance_scale=2.5,
    )
    torch.testing.assert_close(prev, a * case.sample + b * output + sigma * noise, rtol=1e-13, atol=1e-13)


def check_against_float64(each_backend, case, guided: bool, reduction: str) -> None:
    dtype = case.sample.dtype
    with backend("reference"):
        noise = philox_normal(case.seed, case.step, case.sample.shape).double()
    exact = case.to(torch.float64)
    mine = case.to(each_backend.device)

    def options(of) -> dict:
        return {"reduction": reduction} | (
            {"uncond_output": of.uncond_output, "guidance_scale": 2.5} if guided else {}
        )

    with each_backend.active():
        prev, logprob = denoise_step(
            mine.model_output, mine.sample, mine.table, mine.step, mine.seed, **options(mine)
        )
        again = transition_logprob(
            mine.model_output, mine.sample, prev, mine.table, mine.step, **options(mine)
        )
    a, b, sigma = (
        column.reshape(-1, *(1,) * (noise.dim() - 1)) for column in exact.table[exact.step].unbind(1)
    )
    output = exact.model_output
    if guided:
        output = exact.uncond_output + 2.5 * (output - exact.uncond_output)
    assert prev.dtype == dtype
    assert rms(prev, a * exact.sample + b * output + sigma * noise) < ROUNDING[dtype] + 1e-6
    # Of what was stored: the rounding of the sample is in both.
    scored = transition_logprob(
        exact.model_output, exact.sample, prev.cpu().double(), exact.table, exact.step, **options(exact)
    )
    assert rms(logprob, scored) < FLOAT32
    assert torch.equal(again, logprob)


@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("shape", [(1,), (3,), (4, 3, 3), (1000,), (4, 32, 32), (2, 64, 64)])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.usefixtures("poisoned")
def test_every_backend_against_float64(make_transition, each_backend, dtype, shape, guided):
    each_backend.skip_unless_it_takes(dtype)
    case = make_transition(rows=2, shape=shape, dtype=dtype)
    case.table[case.step[1], 2] = 0.0
    check_against_float64(each_backend, case, guided, "mean")


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


def test_dtypes_may_be_mixed(make_transition, each_backend):
    case = make_transition(rows=3, shape=(37,))
    sample, model_output = case.sample.half(), case.model_output
    arguments = [t.to(each_backend.device) for t in (model_output, sample, case.table, case.step, case.seed)]
    with each_backend.active():
        prev, logprob = denoise_step(*arguments, uncond_output=arguments[1], guidance_scale=2.0)
    assert prev.dtype == torch.float16
    with backend("reference"):
        expected, scored = denoise_step(
            model_output, sample, case.table, case.step, case.seed, uncond_output=sample, guidance_scale=2.0
        )
    assert rms(prev, expected) < ROUNDING[torch.float16]
    assert rms(logprob, scored) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_conversions_are_torchs_for_every_pattern(each_backend, tile, dtype):
    """Subnormals, ties, overflow, infinities and NaN: with a = 0, b = 1 and sigma = 0 a step is a conversion."""
    each_backend.skip_unless_it_takes(dtype)
    tile(2, 32768)
    device = each_backend.device
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    # Each with the float before it, after it, and those around the middle to its neighbor: where ties are.
    bits = halves.float().view(torch.int32)
    middle = {torch.float16: 1 << 12, torch.bfloat16: 1 << 15}[dtype]
    near = (bits[:, None] + torch.tensor([-1, 0, 1, middle - 1, middle, middle + 1])).view(torch.float32)
    table, step = (
        torch.tensor([[0.0, 1.0, 0.0]], device=device),
        torch.zeros(1, dtype=torch.int64, device=device),
    )

    def convert(values: torch.Tensor, to: torch.dtype) -> torch.Tensor:
        row = values.reshape(1, -1).to(device)
        with each_backend.active():
            return denoise_step(row, torch.zeros_like(row, dtype=to), table, step, step)[0].cpu().flatten()

    for values, to in ((halves, torch.float32), (near.flatten(), dtype)):
        torch.testing.assert_close(convert(values, to), values.to(to), rtol=0, atol=0, equal_nan=True)


def test_bits_depend_on_the_row_alone(make_transition, each_backend):
    """Not on its neighbors, its place, or the number of threads."""
    few = each_backend.interpreted
    count = 3 if few else 7
    case = make_transition(rows=count, shape=(4, 33, 41)).to(each_backend.device)

    def run(part, threads: int) -> tuple:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            with each_backend.active():
                return denoise_step(part.model_output, part.sample, part.table, part.step, part.seed)
        finally:
            torch.set_num_threads(before)

    whole = run(case, 1)
    for rows, threads in ((1, 1), (2, 1)) if few else product((1, 2, 5), (1, 3)):
        order = torch.randperm(count)[:rows].to(each_backend.device)
        part = run(case.rows(order), threads)
        assert torch.equal(part[0], whole[0][order])
        assert torch.equal(part[1], whole[1][order])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("guided", [False, True])
def test_scores_what_it_stores(make_transition, dtype, reduction, guided):
    case = make_transition(rows=33, dtype=dtype)
    options = {"uncond_output": case.uncond_output, "guidance_scale": 4.0} if guided else {}
    prev, logprob = denoise_step(
        case.model_output, case.sample, case.table, case.step, case.seed, reduction=reduction, **options
    )
    assert prev.dtype == dtype
    assert logprob.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    order = torch.randperm(33)[:20]
    part = case.rows(order)
    options = {"uncond_output": part.uncond_output, "guidance_scale": 4.0} if guided else {}
    again = transition_logprob(
        part.model_output, part.sample, prev[order], part.table, part.step, reduction=reduction, **options
    )
    assert torch.equal(again, logprob[order])


def test_same_result_for_any_split_of_the_batch(make_transition):
    case = make_transition(rows=128, shape=(4, 5, 5))
    whole = denoise_step(case.model_output, case.sample, case.table, case.step, case.seed)
    for size in (1, 3, 32, 100):
        parts = [case.rows(slice(start, start + size)) for start in range(0, 128, size)]
        results = [denoise_step(p.model_output, p.sample, p.table, p.step, p.seed) for p in parts]
        assert torch.equal(torch.cat([prev for prev, _ in results]), whole[0])
        assert torch.equal(torch.cat([logprob for _, logprob in results]), whole[1])


def test_deterministic_step_is_the_mean(transition):
    table = transition.table.clone()
    table[:, 2] = 0.0
    prev, logprob = denoise_step(
        transition.model_output, transition.sample, table, transition.step, transition.seed
    )
    a, b, _ = (column.reshape(-1, 1, 1, 1) for column in table[transition.step].unbind(1))
    assert torch.equal(prev, a * transition.sample + b * transition.model_output)
    assert torch.equal(logprob, torch.zeros(5))


def test_a_sample_is_data(transition):
    prev, logprob = denoise_step(
        transition.model_output.requires_grad_(),
        transition.sample.requires_grad_(),
        transition.table,
        transition.step,
        transition.seed,
    )
    assert not prev.requires_grad
    assert not logprob.requires_grad


def test_inputs_are_left_alone(transition):
    before = transition.rows(slice(None))
    denoise_step(
        transition.model_output, transition.sample, transition.table, transition.step, transition.seed
    )
    for name in ("model_output", "sample", "step", "seed"):
        assert torch.equal(getattr(transition, name), getattr(before, name))


def test_opcheck(transition):
    data = (transition.sample, transition.table, transition.step, transition.seed)
    op = torch.ops.loopfast.denoise_step.default
    torch.library.opcheck(op, (transition.model_output, *data, transition.uncond_output, 2.0, "mean"))
    torch.library.opcheck(op, (transition.model_output, *data, None, 1.0, "sum"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("halves", "shape"), [(1, (4, 3, 3)), (2, (4, 34, 34))])
def test_in_place_form_walks_the_same_trajectory(make_transition, each_backend, dtype, halves, shape):
    if dtype == torch.float64 and each_backend.name != "reference":
        pytest.skip("float64 is the reference's")
    each_backend.skip_unless_it_takes(dtype)
    with each_backend.active():
        check_in_place(make_transition, each_backend.device, dtype, halves, shape)


def check_in_place(make_transition, device: str, dtype, halves: int, shape: tuple[int, ...]) -> None:
    rows, steps = 2, 2
    case = make_transition(rows, shape, steps=steps, dtype=dtype).to(device)
    outputs = torch.randn(steps, *case.sample.shape).to(case.sample)

    def filled(*size: int, like: torch.Tensor) -> torch.Tensor:
        return torch.full(size, torch.nan, dtype=like.dtype, device=device)

    trajectory = filled(steps + 1, *case.sample.shape, like=case.sample)
    trajectory[0] = case.sample
    logprob = filled(steps, rows, like=case.table)
    model_input = filled(halves * rows, *case.sample.shape[1:], like=case.sample)
    counter = torch.zeros(1, dtype=torch.int64, device=device)

    sample = case.sample
    for index in range(steps):
        options = {"uncond_output": case.uncond_output, "guidance_scale": 2.0, "reduction": "sum"}
        denoise_step_(
            outputs[index], trajectory, logprob, model_input, counter, case.table, case.seed, **options
        )
        step = torch.full((rows,), index, device=device)
        sample, expected = denoise_step(outputs[index], sample, case.table, step, case.seed, **options)
        assert counter.item() == index + 1
        assert torch.equal(trajectory[index + 1], sample)
        assert torch.equal(logprob[index], expected)
        assert torch.equal(model_input, torch.cat([sample] * halves))
        assert trajectory[index + 2 :].isnan().all()
    if device == "cpu":
        with pytest.raises(ValueError, match=r"step must lie in \[0, 2\)"):
            denoise_step_(outputs[0], trajectory, logprob, model_input, counter, case.table, case.seed)


def in_place_arguments(case):
    return {
        "model_output": case.model_output,
        "trajectory": torch.zeros(5, *case.sample.shape),
        "logprob": torch.zeros(4, 5),
        "model_input": torch.zeros_like(case.sample),
        "step": torch.zeros(1, dtype=torch.int64),
        "table": case.table,
        "seed": case.seed,
    }


def test_in_place_opcheck(transition):
    arguments = tuple(in_place_arguments(transition).values())
    torch.library.opcheck(torch.ops.loopfast.denoise_step_.default, (*arguments, None, 1.0, "mean"))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"seed": torch.zeros(5)}, TypeError, "seed must be int64"),
        ({"seed": torch.zeros(4, dtype=torch.int64)}, ValueError, r"seed must have shape \[5\]"),
        ({"sample": torch.zeros(5, 1)}, ValueError, "sample must have shape"),
        ({"step": torch.full((5,), 9)}, ValueError, "step must lie in"),
    ],
)
def test_errors_name_the_argument(transition, change, error, message):
    arguments = {
        name: getattr(transition, name) for name in ("model_output", "sample", "table", "step", "seed")
    }
    with pytest.raises(error, match=message):
        denoise_step(**(arguments | change))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"step": torch.zeros(5, dtype=torch.int64)}, ValueError, r"step must have shape \[1\]"),
        ({"step": torch.zeros(1)}, TypeError, "step must be int64"),
        ({"seed": torch.zeros(4, dtype=torch.int64)}, ValueError, r"seed must have shape \[5\]"),
        (
            {"trajectory": torch.zeros(4, 5, 4, 3, 3)},
            ValueError,
            r"trajectory must have shape \[5, 5, 4, 3, 3\]",
        ),
        (
            {"trajectory": torch.zeros(5, 5, 4, 3, 6)[..., ::2]},
            ValueError,
            "trajectory must be contiguous",
        ),
        ({"logprob": torch.zeros(5, 5)}, ValueError, r"logprob must have shape \[4, 5\]"),
        ({"logprob": torch.zeros(4, 5, dtype=torch.int64)}, TypeError, "logprob must be float32 or float64"),
        (
            {"model_input": torch.zeros(7, 4, 3, 3)},
            ValueError,
            r"model_input must have shape \[M \* 5, 4, 3, 3\]",
        ),
        ({"model_input": torch.zeros(5, 4, 3)}, ValueError, "model_input must have shape"),
    ],
)
def test_in_place_errors_name_the_argument(transition, change, error, message):
    with pytest.raises(error, match=message):
        denoise_step_(**(in_place_arguments(transition) | change))
