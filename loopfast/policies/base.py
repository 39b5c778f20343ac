"""What the rest of the engine may ask of a policy, whatever pipeline is behind it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from loopfast.policies.text_limits import TextLimit

Conditioning = dict[str, Tensor]
"""What a prompt becomes: tensors by name, a row each per prompt."""


class ForwardWrapper(Protocol):
    """An engine that makes the calls of a denoiser, as this process does not hold all of its weights."""

    def call(self, denoiser: torch.nn.Module, function: Callable[..., Any], *inputs: Any) -> Any:
        """Returns ``function(denoiser, *inputs)``, called with the weights that it needs."""


class Policy(Protocol):
    """A text-to-image diffusion pipeline whose denoiser is trained.

    Attributes:
        scheduler: the diffusers scheduler whose transitions are sampled.
        latent_shape: ``*L``, the shape of one latent.
        decoder_rows: how many latents :meth:`decode` is given at a time.
        device, dtype: where the denoiser is, and the type its latents have.
        performance_options: the options that make its denoiser faster, by name: on, off or the variant in use.
        text_limits: how many tokens of a prompt its text encoders read.
    """

    scheduler: Any
    latent_shape: tuple[int, ...]
    decoder_rows: int
    device: torch.device
    dtype: torch.dtype
    performance_options: dict[str, bool | str]
    text_limits: tuple[TextLimit, ...]

    def describe(self) -> str:
        """One line that names the model and what of it is trained."""

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that training changes, by name."""

    @property
    def denoiser(self) -> torch.nn.Module:
        """The network that :meth:`predict` calls now: the trained one, or another inside :meth:`reference`."""

    @property
    def reference_denoiser(self) -> torch.nn.Module | None:
        """The network before training, where it is a second one."""

    def attach_engine(self, wrapper: ForwardWrapper) -> None:
        """Lets an engine, which now owns the weights, make every call of the denoisers."""

    def with_denoiser(
        self, denoiser: torch.nn.Module, device: torch.device, dtype: torch.dtype, *, autocast: bool
    ) -> Policy:
        """A policy that shares all but the denoiser with this one, to predict with.

        Args:
            denoiser: a network like this policy's, already on ``device``.
            device, dtype: where it is, and the type its latents have.
            autocast: whether to compute in ``dtype`` whatever the weights' type is.
        """

    def encode(self, prompts: list[str]) -> Conditioning:
        """Conditioning of P prompts: rows ``[P, ...]``."""

    def free_text_encoder(self, prompts: list[str]) -> None:
        """Encodes ``prompts`` and the empty one, and releases the text encoder; no other can be encoded afterwards.

        What is encoded stays on the device, or in the host's memory where it is large.
        """

    def enable_gradient_checkpointing(self) -> None:
        """Lets the denoiser's backward pass recompute activations instead of keeping them."""

    def predict(
        self, sample: Tensor, timestep: Tensor, conditioning: Conditioning, guidance_scale: float = 1.0
    ) -> tuple[Tensor, Tensor | None]:
        """The denoiser's outputs for M latents ``[M, *L]`` at timesteps ``[M]``, conditioned row by row.

        Returns:
            ``(conditional, unconditional)``, each ``[M, *L]``, from one call of the denoiser; the second is None
            when ``guidance_scale`` is 1, and where the denoiser is told the scale, having been distilled for it.
        """

    def reference(self) -> AbstractContextManager[None]:
        """Inside, :meth:`predict` answers for the model before training."""

    def decode(self, latents: Tensor) -> Tensor:
        """Images float32 ``[M, 3, H, W]`` in [0, 1] of latents ``[M, *L]``."""

    def export(self, directory: Path, weights: Mapping[str, Tensor]) -> None:
        """Writes what was trained in the form that diffusers opens by itself.

        Args:
            directory: where to.
            weights: the trained ones, by the names of :meth:`trainable`.
        """

    def export_merged(self, directory: Path, weights: Mapping[str, Tensor]) -> None:
        """Writes a whole pipeline that needs no adapter: what was trained is added to the weights.

        Args:
            directory, weights: as for :meth:`export`.
        """


def expand(conditioning: Conditioning, rows: Tensor) -> Conditioning:
    """The conditioning of each of M rows, from indices ``[M]`` into the prompts'."""
    return {name: value[rows] for name, value in conditioning.items()}


def pad_rows(tensor: Tensor, rows: int) -> Tensor:
    """The tensor with its first row repeated at the end until there are ``rows``.

    In calls of one batch size libraries use the same kernels, and on most processors a row's output depends neither on
    its neighbors nor on how many there are: the ratio before the first update is then exactly 1.
    """
    missing = rows - tensor.shape[0]
    return tensor if missing <= 0 else torch.cat([tensor, tensor[:1].expand(missing, *tensor.shape[1:])])
