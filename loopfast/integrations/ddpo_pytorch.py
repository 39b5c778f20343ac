"""ddpo-pytorch (Black et al., 2023; github.com/kvablack/ddpo-pytorch) on the fused ops."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from .ddim import PARAMETERS, ddim_step
from .patching import Patch, check_noise, find_original, import_target
from .steps import Generators, Source, differentiates_sampling

_FEATURE = "patch_ddpo_pytorch()"


def patch_ddpo_pytorch(
    *, noise: str = "torch", module: str = "ddpo_pytorch.diffusers_patch.ddim_with_logprob"
) -> Patch:
    """Replace ``ddim_step_with_logprob`` wherever it is bound.

    Same results as the original to the rounding of float32 and the same random stream. In half types the
    log-probability is that of the rounded sample that is returned, so that an unchanged model's ratio is exactly 1.

    Args:
        noise: ``"torch"``, or ``"philox"`` for noise made inside the kernel from a seed a row: faster, but another
            random stream.
        module: where a fork of ddpo-pytorch defines the function.

    Returns:
        The patch, already in place: undo it, or use it as a context manager.

    Raises:
        LoopfastError: ddpo-pytorch cannot be imported, or its function is another version.
        ValueError: `noise` is unknown. From the step: the scheduler clips, thresholds, or has no Gaussian transition.
    """
    check_noise(noise)
    target = import_target(_FEATURE, module, "ddpo-pytorch (github.com/kvablack/ddpo-pytorch)")
    original = find_original(_FEATURE, target, "ddim_step_with_logprob", PARAMETERS)
    source = Source(noise, target.randn_tensor)

    @functools.wraps(original)
    def ddim_step_with_logprob(
        self: Any,
        model_output: Tensor,
        timestep: Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Generators = None,
        prev_sample: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        arguments = (
            self,
            model_output,
            timestep,
            sample,
            eta,
            use_clipped_model_output,
            generator,
            prev_sample,
        )
        if differentiates_sampling(model_output, sample, prev_sample):
            return original(*arguments)
        return ddim_step(*arguments, source=source)

    return Patch([(original, ddim_step_with_logprob, None)])
