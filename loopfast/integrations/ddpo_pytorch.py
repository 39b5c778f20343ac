"""ddpo-pytorch (Black et al., 2023; github.com/kvablack/ddpo-pytorch) on the fused ops."""

from __future__ import annotations

from .ddim import PARAMETERS, ddim_replacement
from .patching import Patch, check_noise, find_original, import_target
from .steps import Source

_FEATURE = "patch_ddpo_pytorch()"


def patch_ddpo_pytorch(
    *, noise: str = "torch", module: str = "ddpo_pytorch.diffusers_patch.ddim_with_logprob"
) -> Patch:
    """Replaces ``ddim_step_with_logprob`` wherever it is bound.

    The results are those of the original up to the rounding of float32, from the same random stream. In half types the
    log-probability is that of the rounded sample that is returned, so that an unchanged model's ratio is exactly 1.

    Args:
        noise: ``"torch"``, or ``"philox"`` for noise that the kernel makes from one seed per row, which is faster but
            another random stream.
        module: where a fork of ddpo-pytorch defines the function.

    Returns:
        The patch, already in place. Undo it, or use it as a context manager.

    Raises:
        LoopfastError: ddpo-pytorch cannot be imported, or its function is another version.
        ValueError: `noise` is unknown. From the step: the scheduler clips, thresholds, or has no Gaussian transition.
    """
    check_noise(noise)
    target = import_target(_FEATURE, module, "ddpo-pytorch (github.com/kvablack/ddpo-pytorch)")
    original = find_original(_FEATURE, target, "ddim_step_with_logprob", PARAMETERS)
    step = ddim_replacement(original, Source(noise, target.randn_tensor))
    return Patch([(original, step, None)])
