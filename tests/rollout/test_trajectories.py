from __future__ import annotations

import pytest
import torch

from loopfast.rollout.trajectories import Trajectories


def test_pairs_are_neighboring_latents() -> None:
    latents = torch.arange(4 * 3 * 2).view(4, 3, 2).float()
    trajectories = Trajectories(latents, torch.arange(9).view(3, 3).float())
    assert (trajectories.steps, trajectories.count) == (3, 3)
    assert torch.equal(trajectories.final, latents[3])
    rows, steps = torch.tensor([2, 0, 2]), torch.tensor([0, 2, 1])
    sample, prev_sample, logprob = trajectories.pairs(rows, steps)
    for index, (row, step) in enumerate(zip(rows.tolist(), steps.tolist(), strict=True)):
        assert torch.equal(sample[index], latents[step, row])
        assert torch.equal(prev_sample[index], latents[step + 1, row])
        assert logprob[index] == trajectories.logprob[step, row]


def test_latents_in_the_hosts_memory_come_back_to_the_log_probabilities_device() -> None:
    """On the device "meta", which has shapes and devices but no data."""
    latents = torch.arange(4 * 3 * 2.0).view(4, 3, 2)
    kept = Trajectories(latents, torch.zeros(3, 3, device="meta"))
    assert kept.to_host().latents is latents
    sample, prev_sample, logprob = kept.pairs(torch.tensor([2, 0]), torch.tensor([0, 2]))
    assert {t.device.type for t in (sample, prev_sample, logprob)} == {"meta"}
    assert sample.shape == prev_sample.shape == (2, 2)


@pytest.mark.gpu
def test_latents_in_page_locked_memory_are_those_of_the_device() -> None:
    latents = torch.randn(5, 6, 4, 8, 8, device="cuda").bfloat16()
    on_gpu = Trajectories(latents, torch.randn(4, 6, device="cuda"))
    on_host = on_gpu.to_host()
    assert on_host.latents.is_pinned()
    rows, steps = torch.tensor([5, 0, 3]), torch.tensor([0, 3, 1])
    for found, expected in zip(on_host.pairs(rows, steps), on_gpu.pairs(rows, steps), strict=True):
        assert found.device == expected.device
        assert torch.equal(found, expected)
