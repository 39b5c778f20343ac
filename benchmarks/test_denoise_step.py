from __future__ import annotations

import torch

from loopfast_kernels import denoise_step, philox_normal


def test_denoise_step(benchmark, batch):
    benchmark(denoise_step, batch.model_output, batch.sample, batch.table, batch.step, batch.seed)


def test_denoise_step_with_guidance(benchmark, batch):
    benchmark(
        denoise_step,
        batch.model_output,
        batch.sample,
        batch.table,
        batch.step,
        batch.seed,
        uncond_output=batch.uncond_output,
        guidance_scale=5.0,
    )


def test_philox_normal(benchmark, batch):
    benchmark(philox_normal, batch.seed, batch.step, batch.sample.shape)


def test_torch_randn(benchmark, batch):
    """What noise costs without reproducibility: the bound for `philox_normal`."""
    benchmark(torch.randn, batch.sample.shape)
