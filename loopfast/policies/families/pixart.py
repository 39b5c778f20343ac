"""PixArt-α and PixArt-Σ: a transformer that attends to T5's encoding, sampled as a diffusion."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor
from typing_extensions import override

from loopfast.config import ModelConfig
from loopfast.policies.adapter import exported_adapter, lora_config
from loopfast.policies.base import Conditioning, call_denoiser
from loopfast.policies.pipeline import PipelinePolicy


class PixArtPolicy(PipelinePolicy):
    """A ``PixArtAlphaPipeline`` or ``PixArtSigmaPipeline``; see `PipelinePolicy`.

    Diffusers has no ``load_lora_weights`` for these: an adapter is written in peft's own form, which
    ``peft.PeftModel.from_pretrained(pipeline.transformer, folder)`` reads.
    """

    sequence_length: ClassVar[int | None] = 300
    t5_tokenizer: ClassVar[str | None] = "tokenizer"
    lowers_prompts: ClassVar[bool] = True

    @classmethod
    @override
    def t5_tokens(cls, config: ModelConfig, pipeline: str) -> int | None:
        own = 120 if pipeline == "PixArtAlphaPipeline" else cls.sequence_length
        return config.max_sequence_length or own

    @override
    def _encode(self, prompts: list[str]) -> Conditioning:
        states, mask, _, _ = self.pipeline.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            device=self.device,
            max_sequence_length=self.max_sequence_length,
        )
        found = {"encoder_hidden_states": states, "encoder_attention_mask": mask}
        if self._denoiser.config.use_additional_conditions:
            scale = self.pipeline.vae_scale_factor
            height, width = (float(side * scale) for side in self.latent_shape[1:])
            sizes = torch.tensor([[height, width]], device=self.device)
            found["resolution"] = sizes.expand(len(prompts), -1).contiguous()
            found["aspect_ratio"] = found["resolution"][:, :1] / found["resolution"][:, 1:]
        return found

    @staticmethod
    @override
    def forward(
        denoiser: torch.nn.Module, sample: Tensor, timestep: Tensor, conditioning: Conditioning
    ) -> Tensor:
        output = call_denoiser(denoiser, sample, timestep, conditioning, ("resolution", "aspect_ratio"))
        # the second half is a learned variance for DDPM's sampler; DDIM does not use it
        return output[:, : sample.shape[1]]

    @override
    def _save_adapter(self, directory: Path, weights: Mapping[str, Tensor]) -> None:
        layers = exported_adapter(self._denoiser, self._config.lora, weights)
        directory.mkdir(parents=True, exist_ok=True)
        named = {f"base_model.model.{name}": value.contiguous() for name, value in layers.items()}
        save_file(named, directory / "adapter_model.safetensors", metadata={"format": "pt"})
        settings = self._config.lora.model_copy(update={"alpha": float(self._config.lora.rank)})
        lora_config(settings, settings.targets or self.lora_targets).save_pretrained(str(directory))
