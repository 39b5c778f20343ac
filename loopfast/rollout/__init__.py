"""Sampling trajectories from a policy."""

from loopfast.rollout.sampler import Sampler, automatic_microbatch, initial_latents, slices

__all__ = ["Sampler", "automatic_microbatch", "initial_latents", "slices"]
