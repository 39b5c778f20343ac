"""The interface of a policy, which is the same for every pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from loopfast.policies.text_limits import TextLimit

Conditioning = dict[str, Tensor]
"""Encoded prompts: tensors by name, each with a row per prompt."""


class ForwardWrapper(Protocol):
    """An engine that makes the calls of a denoiser, as this process does not hold all of its weights."""

    def call(self, denoiser: torch.nn.Module, function: Callable[..., Any], *inputs: Any) -> Any:
        """Returns ``function(denoiser, *inputs)``, called with the weights that it needs."""


class Policy(Protocol):
    """A text-to-image diffusion pipeline whose denoiser is trained.

    Attributes:
        scheduler: the diffusers scheduler whose transitions are sampled.
        denoiser: the network that :meth:`predict` calls now: the trained one, or the one of :meth:`reference`.
        reference_denoiser: the network before training, if it is a second one.
        latent_shape: ``*L``, the shape of one latent.
        decoder_rows: the number of latents that :meth:`decode` is given at a time.
        device, dtype: the denoiser's device and the type of its latents.
        performance_options: the options that make its denoiser faster, by name: on, off or the variant in use.
        text_limits: the number of tokens of a prompt that each text encoder reads.
    """

    scheduler: Any
    denoiser: torch.nn.Module
    reference_denoiser: torch.nn.Module | None
    latent_shape: tuple[int, ...]
    decoder_rows: int
    device: torch.device
    dtype: torch.dtype
    performance_options: dict[str, bool | str]
    text_limits: tuple[TextLimit, ...]

    def describe(self) -> str:
        """Returns one line that names the model and what is trained."""

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """Returns the parameters that training changes, by name."""

    def attach_engine(self, wrapper: ForwardWrapper) -> None:
        """Lets an engine, which now owns the weights, make every call of the denoisers."""

    def with_denoiser(
        self, denoiser: torch.nn.Module, device: torch.device, dtype: torch.dtype, *, autocast: bool
    ) -> Policy:
        """Returns a policy that predicts with another denoiser and shares everything else with this one.

        The denoiser is already on ``device``, and its latents have ``dtype``. With ``autocast`` it computes in that
        type, whatever its weights' type is.
        """

    def encode(self, prompts: list[str]) -> Conditioning:
        """Returns the conditioning of P prompts: rows ``[P, ...]``."""

    def free_text_encoder(self, prompts: list[str]) -> None:
        """Encodes ``prompts`` and the empty one, and frees the text encoder; no other can be encoded afterwards.

        The encodings stay on the device, or in the host's memory if they are large.
        """

    def enable_gradient_checkpointing(self) -> None:
        """Has the denoiser's backward pass recompute activations instead of keeping them."""

    def predict(
        self, sample: Tensor, timestep: Tensor, conditioning: Conditioning, guidance_scale: float = 1.0
    ) -> tuple[Tensor, Tensor | None]:
        """Predicts the denoiser's outputs for M latents ``[M, *L]`` at timesteps ``[M]``, conditioned row by row.

        Returns:
            ``(conditional, unconditional)``, each ``[M, *L]``, from one call of the denoiser; the second is None if
            ``guidance_scale`` is 1, or if the denoiser takes the scale as an input (guidance-distilled models).
        """

    def reference(self) -> AbstractContextManager[None]:
        """Context in which :meth:`predict` calls the model before training."""

    def decode(self, latents: Tensor) -> Tensor:
        """Decodes latents ``[M, *L]`` to images float32 ``[M, 3, H, W]`` in [0, 1]."""

    def export(self, directory: Path, weights: Mapping[str, Tensor]) -> None:
        """Writes the trained weights, given by the names of :meth:`trainable`, in a form that diffusers reads."""

    def export_merged(self, directory: Path, weights: Mapping[str, Tensor]) -> None:
        """Writes a whole pipeline in which the adapter is added to the weights; see :meth:`export`."""


def expand(conditioning: Conditioning, rows: Tensor) -> Conditioning:
    """Returns the conditioning of M rows, from the indices ``[M]`` of their prompts."""
    return {name: value[rows] for name, value in conditioning.items()}


def call_denoiser(
    denoiser: Any, sample: Tensor, timestep: Tensor, conditioning: Conditioning, added: tuple[str, ...] = ()
) -> Tensor:
    """Returns a diffusers denoiser's output for latents ``[M, *L]`` at timesteps ``[M]``.

    The conditioning holds its arguments by name. It takes those named in ``added`` in its argument
    ``added_cond_kwargs``, where a missing one is None.
    """
    options: dict[str, Any] = dict(conditioning)
    if added:
        options["added_cond_kwargs"] = {name: options.pop(name, None) for name in added}
    output: Tensor = denoiser(sample, timestep=timestep, **options, return_dict=False)[0]
    return output


def pad_rows(tensor: Tensor, rows: int) -> Tensor:
    """Returns the tensor with its first row repeated at the end until there are ``rows``.

    In calls of one batch size libraries use the same kernels, and on most processors a row's output does not depend on
    the other rows: the ratio before the first update is then exactly 1.
    """
    missing = rows - tensor.shape[0]
    return tensor if missing <= 0 else torch.cat([tensor, tensor[:1].expand(missing, *tensor.shape[1:])])
