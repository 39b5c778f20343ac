from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loopfast_kernels import leave_one_out
from tests.kernels.accuracy import FLOAT32, rms


def plain(rewards: torch.Tensor) -> torch.Tensor:
    samples = rewards.shape[-1]
    others = torch.stack(
        [torch.cat((rewards[..., :i], rewards[..., i + 1 :]), dim=-1).mean(-1) for i in range(samples)],
        dim=-1,
    )
    return rewards - others


@given(shape=st.lists(st.integers(1, 4), max_size=3), samples=st.integers(2, 9), seed=st.integers(0, 2**31))
def test_subtracts_the_mean_of_the_others(shape, samples, seed):
    rewards = torch.randn(
        (*shape, samples), generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    advantages = leave_one_out(rewards)
    torch.testing.assert_close(advantages, plain(rewards), rtol=1e-12, atol=1e-12)
    single = leave_one_out(rewards.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), plain(rewards), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("samples", [2, 3, 4, 7, 16, 33])
@pytest.mark.usefixtures("poisoned")
def test_every_backend_against_float64(each_backend, samples):
    rewards = torch.randn(5, 3, samples) + 3.0
    device_rewards = rewards.to(each_backend.device).requires_grad_()
    with each_backend.active():
        advantages = leave_one_out(device_rewards)
        weights = torch.randn(5, 3, samples).to(advantages)
        (gradient,) = torch.autograd.grad(advantages, device_rewards, weights)
        equal = [leave_one_out(torch.full_like(device_rewards, value)) for value in (0.1, 612.3, 100000.3)]
    assert rms(advantages, plain(rewards.double())) < FLOAT32
    assert rms(gradient, plain(weights.cpu().double())) < FLOAT32
    assert not torch.stack(equal).any()


def test_example_by_hand():
    advantages = leave_one_out(torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]]))
    assert advantages.tolist() == [[-3.0, -1.5, 4.5], [-1.5, -1.5, 3.0]]


@given(reward=st.floats(-1e6, 1e6, width=32), samples=st.integers(2, 13))
def test_equal_rewards_give_exactly_zero(reward, samples):
    assert torch.equal(leave_one_out(torch.full((samples,), reward)), torch.zeros(samples))


def test_a_large_common_offset_costs_no_accuracy():
    rewards = torch.tensor([0.0, 1.0, 2.0, 4.0])
    assert torch.equal(leave_one_out(rewards + 2**20), leave_one_out(rewards))


def test_a_group_does_not_depend_on_the_others():
    rewards = torch.randn(64, 7)
    whole = leave_one_out(rewards)
    for groups in range(1, 10):
        assert torch.equal(leave_one_out(rewards[:groups]), whole[:groups])


def test_gradient():
    rewards = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(leave_one_out, (rewards,))
    assert torch.autograd.gradgradcheck(leave_one_out, (rewards,))


def test_opcheck():
    rewards = torch.randn(3, 4, requires_grad=True)
    torch.library.opcheck(torch.ops.loopfast.leave_one_out.default, (rewards,))


@pytest.mark.parametrize(
    ("rewards", "error", "message"),
    [
        (torch.zeros(3, 1), ValueError, "K = 1 .* needs at least 2"),
        (torch.zeros(0, 4), ValueError, "rewards must have shape"),
        (torch.zeros(()), ValueError, "rewards must have shape"),
        (torch.zeros(3, 4, dtype=torch.int64), TypeError, "rewards must be float32 or float64, got int64"),
        ([1.0, 2.0], TypeError, "rewards must be a tensor"),
    ],
)
def test_errors_name_the_argument(rewards, error, message):
    with pytest.raises(error, match=message):
        leave_one_out(rewards)
