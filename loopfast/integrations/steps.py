"""The step that DDPO's descendants share: it draws ``x_{t-1}``, or takes the one given, and scores it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from loopfast_kernels import denoise_step, transition_logprob

Generators = torch.Generator | list[torch.Generator] | None


class Source(NamedTuple):
    """The source of the noise.

    Attributes:
        noise: ``"torch"`` for the original's random stream, or ``"philox"`` for the kernels' own noise.
        randn: diffusers' ``randn_tensor``, as the original calls it.
    """

    noise: str
    randn: Callable[..., Tensor]


class Transitions(NamedTuple):
    """The steps of a scheduler, on the device of the samples.

    Attributes:
        table: float32 ``[T + 1, 3]``, columns a, b, sigma. The last row is for timesteps that are not the scheduler's.
            It makes every result NaN, as a check would have to wait for the GPU.
        undefined: float32 ``[T + 1]``, NaN for deterministic steps, whose log-probability is NaN in the originals, and
            0 for others; None where every step is stochastic.
    """

    table: Tensor
    undefined: Tensor | None

    @classmethod
    def of(cls, table: Tensor, deterministic: Tensor | None) -> Transitions:
        """Appends the last row to a table ``[T, 3]``. Which steps are deterministic, bool ``[T]``, may be unknown."""
        unknown = table.new_tensor([[float("nan"), float("nan"), 1.0]])
        undefined = None
        if deterministic is not None:
            undefined = torch.zeros(len(table) + 1, device=table.device)
            undefined[:-1].masked_fill_(deterministic, float("nan"))
        return cls(torch.cat([table, unknown]).to(torch.float32), undefined)

    def coefficients(self, step: Tensor, dimensions: int) -> tuple[Tensor, ...]:
        """The coefficients a, b and sigma of each row, in a shape that broadcasts over its latents."""
        return self.table[step].reshape(-1, 3, *[1] * (dimensions - 1)).unbind(1)

    def score(self, model_output: Tensor, sample: Tensor, prev_sample: Tensor, step: Tensor) -> Tensor:
        """The log-probability of `prev_sample`, the mean over a row's elements; differentiable in `model_output`."""
        logprob = transition_logprob(
            model_output.contiguous(), sample.contiguous(), prev_sample.contiguous(), self.table, step
        )
        return self._mark_undefined(logprob, step)

    def advance(
        self,
        model_output: Tensor,
        sample: Tensor,
        step: Tensor,
        prev_sample: Tensor | None,
        generator: Generators,
        source: Source,
    ) -> tuple[Tensor, Tensor]:
        """Draws ``x_{t-1}``, or takes the one given, and scores it.

        Args:
            model_output: ``[N, *L]``.
            sample: ``[N, *L]``, ``x_t``.
            step: int64 ``[N]``, each row's position in the table.
            prev_sample: ``[N, *L]``, or None to draw it.
            generator: a generator for the noise, or one for each row.
            source: the source of the noise.

        Returns:
            ``x_{t-1}`` in the dtype of `sample`, and its log-probability, differentiable in `model_output`.

        Raises:
            ValueError: `generator` and `prev_sample` are both given.
        """
        if prev_sample is not None:
            if generator is not None:
                raise ValueError(
                    "generator and prev_sample exclude each other: a sample that is given needs no noise"
                )
            return prev_sample.to(sample.dtype), self.score(model_output, sample, prev_sample, step)
        if source.noise == "philox":
            seed = draw_seeds(len(sample), generator, sample.device)
            prev_sample, logprob = denoise_step(
                model_output.contiguous(), sample.contiguous(), self.table, step, seed
            )
            return prev_sample, self._mark_undefined(logprob, step)
        noise = source.randn(
            model_output.shape, generator=generator, device=model_output.device, dtype=model_output.dtype
        )
        a, b, sigma = self.coefficients(step, sample.dim())
        prev_sample = (a * sample).addcmul_(b, model_output).addcmul_(sigma, noise).to(sample.dtype)
        return prev_sample, self.score(model_output, sample, prev_sample, step)

    def _mark_undefined(self, logprob: Tensor, step: Tensor) -> Tensor:
        return logprob if self.undefined is None else logprob + self.undefined[step]


def differentiates_sampling(model_output: Tensor, sample: Tensor, prev_sample: Tensor | None) -> bool:
    """Returns whether gradients are to flow through the samples, which are data to the ops."""
    drawn = prev_sample is None and model_output.requires_grad
    return torch.is_grad_enabled() and (drawn or sample.requires_grad)


def check_known(timestep: Tensor, step: Tensor, steps: int) -> None:
    """Raises `ValueError`, on the CPU only, if a timestep is not one of the scheduler's."""
    if step.device.type == "cpu" and bool((step == steps).any()):
        unknown = timestep[step == steps][0]
        raise ValueError(f"timestep {unknown} is none of the {steps} that the scheduler is set to")


def draw_seeds(rows: int, generator: Generators, device: torch.device) -> Tensor:
    """Draws one seed per row for the kernels' noise from torch's random stream."""

    def draw(count: int, source: torch.Generator | None) -> Tensor:
        where = device if source is None else source.device
        return torch.randint(-(2**63), 2**63 - 1, (count,), generator=source, device=where).to(device)

    if isinstance(generator, list):
        return torch.cat([draw(1, source) for source in generator])
    return draw(rows, generator)
