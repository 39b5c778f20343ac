"""Finds the number of rows of a training call that fits into memory, before images are sampled."""

from __future__ import annotations

import torch

from loopfast.engines import Engine
from loopfast.policies import Conditioning, expand
from loopfast.rollout import Sampler
from loopfast.training.run import Run
from loopfast.training.update_pass import reference_output

# Bytes that the probe leaves free for decoded images, rewards and the libraries under PyTorch. These libraries fail in
# various ways on a full GPU.
PROBE_RESERVE = 2**30


def fit_training_calls(run: Run) -> None:
    """On a GPU, halves the automatic rows of a training call until it fits into memory.

    Raises:
        LoopfastError: not even one row fits.
    """
    # Only a GPU raises an error that can be caught when memory is full.
    on_gpu = run.sampler.policy.device.type == "cuda"
    if on_gpu and run.engine.retries and run.microbatches.automatic("train"):
        probe(run)


def probe(run: Run) -> None:
    """Halves the rows of a training call until it fits into memory; see `fit_training_calls`."""
    conditioning = run.sampler.policy.encode([run.prompts[0].text])
    with_reference = run.config.algorithm.kl_weight > 0
    # The optimizer's first step allocates two float32 numbers for each trained weight.
    trained = sum(parameter.numel() for parameter in run.sampler.policy.trainable().values())
    reserve = PROBE_RESERVE + 8 * trained

    def attempt(rows: int) -> None:
        probe_memory(
            run.sampler,
            run.engine,
            conditioning,
            microbatch=rows,
            with_reference=with_reference,
            reserve=reserve,
        )

    run.microbatches.with_oom_fallback("train", attempt)


def probe_memory(
    sampler: Sampler,
    engine: Engine,
    conditioning: Conditioning,
    *,
    microbatch: int,
    with_reference: bool,
    reserve: int = 0,
) -> None:
    """Makes the model call of an update, forward and backward, on zeros, to find out whether memory suffices.

    Args:
        sampler: the policy and its transitions.
        engine: owns the policy's weights, which do not change.
        conditioning: the conditioning of one prompt or more.
        microbatch: the number of pairs in the call.
        with_reference: whether the call includes the policy before training.
        reserve: the bytes that must stay free on the policy's device.

    Raises:
        torch.OutOfMemoryError: memory does not suffice.
    """
    policy = sampler.policy
    held = torch.empty(reserve, dtype=torch.uint8, device=policy.device)
    rows = torch.zeros(microbatch, dtype=torch.int64, device=policy.device)
    sample = torch.zeros(microbatch, *policy.latent_shape, dtype=policy.dtype, device=policy.device)
    text, timestep = expand(conditioning, rows), sampler.schedule.timesteps[rows]
    try:
        reference = reference_output(sampler, sample, timestep, text) if with_reference else None
        outputs = policy.predict(sample, timestep, text, sampler.guidance_scale)
        engine.backward(torch.stack([o.float().mean() for o in outputs if o is not None]).sum())
        del reference, outputs, held
    finally:
        engine.discard()
