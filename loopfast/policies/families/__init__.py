"""The families of pipelines that can be trained, recognized by the class that ``model_index.json`` names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal


@dataclass(frozen=True)
class Family:
    """A family of pipelines.

    Attributes:
        pipelines: names of their diffusers classes.
        title: what people call it.
        policy: ``module:class`` of its policy.
        denoiser: name of the component that is trained.
        process: what its scheduler samples: the ``diffusion`` process of DDPM, or a ``flow``.
        patch: latent pixels on a side of what the denoiser takes as one token; 1 for a UNet.
        size: height and width of the latents, where the denoiser's configuration has none.
        scheduler_options: options that the pipeline sets in its scheduler, whatever the scheduler's file says.
        lora_of_text: the text encoder can be trained, too, by an adapter.
    """

    pipelines: tuple[str, ...]
    title: str
    policy: str
    denoiser: Literal["unet", "transformer"]
    process: Literal["diffusion", "flow"] = "diffusion"
    patch: int = 1
    size: int | None = None
    scheduler_options: tuple[tuple[str, object], ...] = ()
    lora_of_text: bool = False

    def policy_class(self) -> Any:
        """The class of its policy, a `loopfast.policies.pipeline.PipelinePolicy`."""
        module, name = self.policy.split(":")
        return getattr(import_module(module), name)

    def latent_size(self, denoiser: Mapping[str, Any]) -> tuple[int, int]:
        """Height and width of the latents that a denoiser of this configuration was made for."""
        size = self.size or denoiser["sample_size"]
        return (size, size) if isinstance(size, int) else (size[0], size[1])


FAMILIES = (
    Family(
        ("StableDiffusionPipeline",),
        "Stable Diffusion 1.x and 2.x",
        "loopfast.policies.families.sd:StableDiffusionPolicy",
        "unet",
        scheduler_options=(("steps_offset", 1), ("clip_sample", False)),
        lora_of_text=True,
    ),
    Family(
        ("StableDiffusionXLPipeline",),
        "SDXL",
        "loopfast.policies.families.sdxl:StableDiffusionXLPolicy",
        "unet",
    ),
    Family(
        ("StableDiffusion3Pipeline",),
        "Stable Diffusion 3 and 3.5",
        "loopfast.policies.families.sd3:StableDiffusion3Policy",
        "transformer",
        "flow",
        patch=2,
    ),
    Family(
        ("FluxPipeline",),
        "FLUX.1",
        "loopfast.policies.families.flux:FluxPolicy",
        "transformer",
        "flow",
        patch=2,
        size=128,
    ),
    Family(
        ("PixArtAlphaPipeline", "PixArtSigmaPipeline"),
        "PixArt-α and PixArt-Σ",
        "loopfast.policies.families.pixart:PixArtPolicy",
        "transformer",
        patch=2,
    ),
)


def family_of(pipeline: str) -> Family | None:
    """The family that a pipeline's class belongs to, if any."""
    return next((family for family in FAMILIES if pipeline in family.pipelines), None)


def supported() -> str:
    """The classes of pipelines that can be trained, in words."""
    return ", ".join(f"{' and '.join(family.pipelines)} ({family.title})" for family in FAMILIES)
