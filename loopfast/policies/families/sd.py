"""Stable Diffusion 1.x and 2.x: one text encoder, a UNet, an autoencoder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from loopfast.policies.adapter import exported_adapter
from loopfast.policies.base import Conditioning, call_denoiser
from loopfast.policies.fast.guided_unet import guided_forward, shares_trunk
from loopfast.policies.pipeline import PipelinePolicy
from loopfast.policies.portable import text_model_names
from loopfast.seeds import derive

TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")


class TextConditionedUNet(torch.nn.Module):
    """A UNet and the text encoder that is trained with it, as one denoiser."""

    def __init__(self, unet: Any, text_encoder: Any) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder


class StableDiffusionPolicy(PipelinePolicy):
    """A ``StableDiffusionPipeline``; see `PipelinePolicy`.

    With ``model.lora.text_encoder`` the denoiser includes the text encoder: the conditioning is token ids, and every
    call encodes them anew.
    """

    load_options: ClassVar[dict[str, Any]] = {"safety_checker": None, "requires_safety_checker": False}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._guided = self._compiled(_guided)

    @override
    def _add_adapter(self, seed: int, dtype: torch.dtype) -> None:
        super()._add_adapter(seed, dtype)
        if self._config.lora.text_encoder:
            self._adapt("text_encoder", TEXT_TARGETS, derive(seed, "text encoder"), dtype)
            self._denoiser = TextConditionedUNet(self._denoiser, self.pipeline.text_encoder)

    @property
    def _trains_text(self) -> bool:
        return isinstance(self._denoiser, TextConditionedUNet)

    @override
    def _encode(self, prompts: list[str]) -> Conditioning:
        tokenizer = self.pipeline.tokenizer
        ids = tokenizer(
            prompts,
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids.to(self.device)
        if self._trains_text:
            return {"input_ids": ids}
        return {"encoder_hidden_states": self.pipeline.text_encoder(ids)[0]}

    @staticmethod
    @override
    def forward(
        denoiser: torch.nn.Module, sample: Tensor, timestep: Tensor, conditioning: Conditioning
    ) -> Tensor:
        text = {"encoder_hidden_states": _text(denoiser, conditioning)}
        return call_denoiser(_unet(denoiser), sample, timestep, text)

    @override
    def predict(
        self, sample: Tensor, timestep: Tensor, conditioning: Conditioning, guidance_scale: float = 1.0
    ) -> tuple[Tensor, Tensor | None]:
        if guidance_scale == 1.0 or not (self._config.shared_trunk and shares_trunk(_unet(self.denoiser))):
            return super().predict(sample, timestep, conditioning, guidance_scale)
        empty = {name: self._unconditional[name].expand_as(value) for name, value in conditioning.items()}
        conditional, unconditional = self._call(self._guided, sample, timestep, conditioning, empty)
        return conditional.to(self.dtype).contiguous(), unconditional.to(self.dtype).contiguous()

    @override
    def export_merged(self, directory: Path, weights: Mapping[str, Tensor]) -> None:
        if not self._trains_text:
            super().export_merged(directory, weights)
            return
        merged = self._merged(weights)
        self._save_pipeline(
            directory, merged.unet.state_dict(), merged.unet, text_encoder=merged.text_encoder
        )

    @override
    def _save_adapter(self, directory: Path, weights: Mapping[str, Tensor]) -> None:
        if not self._trains_text:
            super()._save_adapter(directory, weights)
            return
        layers = {
            name: exported_adapter(getattr(self._denoiser, name), self._config.lora, _below(name, weights))
            for name in ("unet", "text_encoder")
        }
        self.pipeline.save_lora_weights(
            directory,
            unet_lora_layers=layers["unet"],
            text_encoder_lora_layers=text_model_names(layers["text_encoder"]),
        )


def _unet(denoiser: torch.nn.Module) -> Any:
    return denoiser.unet if isinstance(denoiser, TextConditionedUNet) else denoiser


def _text(denoiser: torch.nn.Module, conditioning: Conditioning) -> Tensor:
    """Returns the encoded text, ``[M, S, D]``."""
    if not isinstance(denoiser, TextConditionedUNet):
        return conditioning["encoder_hidden_states"]
    states: Tensor = denoiser.text_encoder(conditioning["input_ids"])[0]
    return states


def _guided(
    denoiser: torch.nn.Module,
    sample: Tensor,
    timestep: Tensor,
    conditioning: Conditioning,
    empty: Conditioning,
) -> tuple[Tensor, Tensor]:
    text = _text(denoiser, conditioning)
    return guided_forward(_unet(denoiser), sample, timestep, text, _text(denoiser, empty))


def _below(prefix: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the weights of one network, by its own names."""
    start = f"{prefix}."
    return {name.removeprefix(start): value for name, value in weights.items() if name.startswith(start)}
