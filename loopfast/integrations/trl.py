"""TRL's ``DDPOTrainer`` on the fused ops. TRL 0.23 is the last release that has it."""

from __future__ import annotations

import functools
import importlib.metadata
from typing import Any

import torch
from torch import Tensor

from loopfast.errors import LoopfastError
from loopfast_kernels import clipped_loss

from .ddim import PARAMETERS, ddim_replacement, ddim_steps
from .patching import Patch, check_noise, find_original, import_target
from .steps import Source

_FEATURE = "patch_trl()"
_VERSION = "0.23"


def patch_trl(*, noise: str = "torch") -> Patch:
    """Replaces ``trl.models.modeling_sd_base.scheduler_step`` and ``DDPOTrainer.calculate_loss``.

    The results are those of the originals up to the rounding of float32, from the same random stream. In half types the
    log-probability is that of the rounded sample that is returned, so that an unchanged model's ratio is exactly 1.

    Overrides of a subclass are respected: a trainer with its own ``loss``, or whose pipeline has its own
    ``scheduler_step``, keeps TRL's ``calculate_loss``. Differentiated sampling (``AlignPropTrainer``) stays TRL's, too.

    Args:
        noise: ``"torch"``, or ``"philox"`` for noise that the kernel makes from one seed per row, which is faster but
            another random stream.

    Returns:
        The patch, already in place. Undo it, or use it as a context manager.

    Raises:
        LoopfastError: TRL 0.23 cannot be imported.
        ValueError: `noise` is unknown. From the step: the scheduler clips, thresholds, or has no Gaussian transition.
    """
    check_noise(noise)
    required = f"{_FEATURE} needs TRL {_VERSION}, the last with DDPOTrainer"
    try:
        version = importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        raise LoopfastError(f"{required}: it is missing") from None
    if not version.startswith(f"{_VERSION}."):
        raise LoopfastError(f"{required}: found {version}")
    needs = "TRL's DDPOTrainer and what it imports"
    steps = import_target(_FEATURE, "trl.models.modeling_sd_base", needs)
    trainer = import_target(_FEATURE, "trl.trainer.ddpo_trainer", needs).DDPOTrainer
    original_step = find_original(_FEATURE, steps, "scheduler_step", PARAMETERS)
    parameters = "self latents timesteps next_latents log_probs advantages embeds"
    original_loss = find_original(_FEATURE, trainer, "calculate_loss", parameters)
    pipeline = steps.DefaultDDPOStableDiffusionPipeline
    source = Source(noise, steps.randn_tensor)
    scheduler_step = ddim_replacement(original_step, source, steps.DDPOSchedulerOutput)

    @functools.wraps(original_loss)
    def calculate_loss(
        self: Any,
        latents: Tensor,
        timesteps: Tensor,
        next_latents: Tensor,
        log_probs: Tensor,
        advantages: Tensor,
        embeds: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        own_loss = _function(self.loss) is not trainer.loss
        own_step = _function(self.sd_pipeline.scheduler_step) is not pipeline.scheduler_step
        if own_loss or own_step:
            return original_loss(self, latents, timesteps, next_latents, log_probs, advantages, embeds)
        config, unet = self.config, self.sd_pipeline.unet
        with self.autocast():
            if config.train_cfg:
                output = unet(torch.cat([latents] * 2), torch.cat([timesteps] * 2), embeds).sample
                # Torch computes the guidance: sampling rounded its result to the model's dtype, as scoring must do.
                unconditional, conditional = output.chunk(2)
                output = unconditional + config.sample_guidance_scale * (conditional - unconditional)
            else:
                output = unet(latents, timesteps, embeds).sample
        transitions, step = ddim_steps(
            self.sd_pipeline.scheduler, timesteps, latents.shape[0], config.sample_eta, latents.device
        )
        old_logprob = log_probs.float().contiguous()
        result = clipped_loss(
            output.contiguous(),
            latents.contiguous(),
            next_latents.contiguous(),
            transitions.table,
            step,
            old_logprob,
            advantages.float().clamp(-config.train_adv_clip_max, config.train_adv_clip_max),
            clip_range=config.train_clip_range,
        )
        loss = result.loss
        if transitions.undefined is not None:
            loss = loss + transitions.undefined[step].sum()
        approximate_kl = 0.5 * (result.logprob - old_logprob).square().mean()
        clipped = ((result.ratio - 1.0).abs() > config.train_clip_range).float().mean()
        return loss, approximate_kl, clipped

    return Patch([(original_step, scheduler_step, None), (original_loss, calculate_loss, trainer)])


def _function(method: Any) -> Any:
    return getattr(method, "__func__", method)
