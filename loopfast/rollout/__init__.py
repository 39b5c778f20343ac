"""Sampling trajectories from a policy."""

from loopfast.rollout.capture import CapturedStep, StepCache
from loopfast.rollout.replica import Replica, make_replica
from loopfast.rollout.sampler import Sampler, automatic_microbatch, initial_latents, slices
from loopfast.rollout.step import DenoisingStep
from loopfast.rollout.window import StochasticSteps, stochastic_steps

__all__ = [
    "CapturedStep",
    "DenoisingStep",
    "Replica",
    "Sampler",
    "StepCache",
    "StochasticSteps",
    "automatic_microbatch",
    "initial_latents",
    "make_replica",
    "slices",
    "stochastic_steps",
]
