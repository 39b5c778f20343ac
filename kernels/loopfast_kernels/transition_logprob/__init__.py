"""Log-probability of a transition of the sampler, differentiable in the model's outputs."""

from .op import transition_logprob

__all__ = ["transition_logprob"]
