"""SDXL: two text encoders, a pooled embedding, and the image's sizes as time ids."""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from loopfast.policies.base import Conditioning, call_denoiser
from loopfast.policies.pipeline import PipelinePolicy


class StableDiffusionXLPolicy(PipelinePolicy):
    """A ``StableDiffusionXLPipeline``; see `PipelinePolicy`.

    Images are conditioned as uncropped ones of their own size, the pipeline's default (Podell et al., "SDXL", 2023,
    section 2.2).
    """

    load_options: ClassVar[dict[str, Any]] = {"add_watermarker": False}

    @override
    def _encode(self, prompts: list[str]) -> Conditioning:
        states, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, device=self.device, do_classifier_free_guidance=False
        )
        scale = self.pipeline.vae_scale_factor
        size = tuple(side * scale for side in self.latent_shape[1:])
        ids = torch.tensor([[*size, 0, 0, *size]], dtype=torch.float32, device=self.device)
        return {
            "encoder_hidden_states": states,
            "text_embeds": pooled,
            "time_ids": ids.expand(len(prompts), -1).contiguous(),
        }

    @cached_property
    @override
    def _unconditional(self) -> Conditioning:
        encoded = self.encode([""])
        if not self.pipeline.config.force_zeros_for_empty_prompt:
            return encoded
        return {
            name: value if name == "time_ids" else torch.zeros_like(value) for name, value in encoded.items()
        }

    @staticmethod
    @override
    def forward(
        denoiser: torch.nn.Module, sample: Tensor, timestep: Tensor, conditioning: Conditioning
    ) -> Tensor:
        return call_denoiser(denoiser, sample, timestep, conditioning, ("text_embeds", "time_ids"))
