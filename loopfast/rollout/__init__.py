"""Sampling trajectories from a policy."""

from loopfast.rollout.capture import CapturedStep, StepCache
from loopfast.rollout.rollout_copy import RolloutCopy, make_rollout_copy
from loopfast.rollout.sampler import Sampler, automatic_microbatch, initial_latents, slices
from loopfast.rollout.step import DenoisingStep
from loopfast.rollout.window import StochasticSteps, stochastic_steps

__all__ = [
    "CapturedStep",
    "DenoisingStep",
    "RolloutCopy",
    "Sampler",
    "StepCache",
    "StochasticSteps",
    "automatic_microbatch",
    "initial_latents",
    "make_rollout_copy",
    "slices",
    "stochastic_steps",
]
