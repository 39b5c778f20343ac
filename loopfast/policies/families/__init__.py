"""The families of pipelines that can be trained, recognized by the class in ``model_index.json``."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal


@dataclass(frozen=True)
class Family:
    """A family of pipelines.

    Attributes:
        pipelines: the names of their diffusers classes.
        title: the family's usual name.
        policy: ``module:class`` of its policy.
        denoiser: the name of the component that is trained.
        process: the process of its scheduler: DDPM's ``diffusion``, or a ``flow``.
        patch: the side of a token in latent pixels; 1 for a UNet.
        size: height and width of the latents, if the denoiser's configuration has none.
        scheduler_options: options that the pipeline sets in its scheduler, whatever the scheduler's file says.
        lora_of_text: the text encoder can be trained by an adapter, too.
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

    def pipeline_class(self) -> Any:
        """Imports and returns the diffusers class of its pipelines."""
        return getattr(import_module("diffusers"), self.pipelines[0])

    def policy_class(self) -> Any:
        """Imports and returns its policy's class, a `loopfast.policies.pipeline.PipelinePolicy`."""
        module, name = self.policy.split(":")
        return getattr(import_module(module), name)


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
    """Returns the family of a pipeline's class, if any."""
    return next((family for family in FAMILIES if pipeline in family.pipelines), None)


def supported() -> str:
    """Returns a list of the classes of pipelines that can be trained, for messages."""
    return ", ".join(f"{' and '.join(family.pipelines)} ({family.title})" for family in FAMILIES)
