"""FLUX.1: a transformer over packed latents, sampled as a flow."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from loopfast.policies.base import Conditioning, call_denoiser
from loopfast.policies.pipeline import JOINT_ATTENTION, PipelinePolicy


class FluxPolicy(PipelinePolicy):
    """A ``FluxPipeline``; see `PipelinePolicy`.

    Latents are packed at every step, ``[H/2 · W/2, 4 C]``: a token holds 2x2 pixels of C channels. A model that was
    distilled for guidance ([dev]) takes the scale as an input and is called once; another ([schnell]) is guided as all
    models are, if the scale is not 1.
    """

    lora_targets: ClassVar[tuple[str, ...]] = JOINT_ATTENTION
    sequence_length: ClassVar[int | None] = 512
    t5_tokenizer: ClassVar[str | None] = "tokenizer_2"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        channels, height, width = self.latent_shape  # the denoiser's channels are those of a token
        self._size = height, width
        self.latent_shape = (height // 2 * (width // 2), channels)
        self._distilled = bool(self._denoiser.config.guidance_embeds)

    @override
    def _encode(self, prompts: list[str]) -> Conditioning:
        states, pooled, _ = self.pipeline.encode_prompt(
            prompts, prompt_2=None, device=self.device, max_sequence_length=self.max_sequence_length
        )
        return {"encoder_hidden_states": states, "pooled_projections": pooled}

    @staticmethod
    @override
    def forward(
        denoiser: torch.nn.Module, sample: Tensor, timestep: Tensor, conditioning: Conditioning
    ) -> Tensor:
        return call_denoiser(denoiser, sample, timestep / 1000, conditioning)

    @override
    def predict(
        self, sample: Tensor, timestep: Tensor, conditioning: Conditioning, guidance_scale: float = 1.0
    ) -> tuple[Tensor, Tensor | None]:
        if not self._distilled:
            return super().predict(sample, timestep, conditioning, guidance_scale)
        scale = torch.full_like(timestep, guidance_scale, dtype=torch.float32)
        return self._denoise(sample, timestep, {**conditioning, "guidance": scale}), None

    @override
    def _denoise(self, sample: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        text = conditioning["encoder_hidden_states"]
        height, width = self._size
        positions = {
            "img_ids": image_positions(height // 2, width // 2, sample.device, text.dtype),
            "txt_ids": torch.zeros(text.shape[1], 3, device=text.device, dtype=text.dtype),
        }
        return super()._denoise(sample, timestep, {**conditioning, **positions})

    @override
    def decode(self, latents: Tensor) -> Tensor:
        height, width = self._size
        tokens = latents.view(len(latents), height // 2, width // 2, -1, 2, 2)
        return super().decode(tokens.permute(0, 3, 1, 4, 2, 5).reshape(len(latents), -1, height, width))


def image_positions(height: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Returns the positions ``[height · width, 3]`` of an image's tokens: 0, row and column."""
    rows = torch.arange(height, device=device, dtype=dtype)[:, None].expand(height, width)
    columns = torch.arange(width, device=device, dtype=dtype).expand(height, width)
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).view(-1, 3)
