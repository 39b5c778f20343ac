"""One step of the sampler and its log-probability."""

from .op import denoise_step, denoise_step_

__all__ = ["denoise_step", "denoise_step_"]
