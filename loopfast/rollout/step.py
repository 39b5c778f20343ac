"""One denoising step on buffers at fixed addresses."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from loopfast.policies import Conditioning, Policy, adapter_signature, addresses
from loopfast.profiling import model_call
from loopfast.schedules import TransitionSchedule
from loopfast.system.memory import to_device
from loopfast_kernels import denoise_step_


class DenoisingStep:
    """One step of M trajectories, with all inputs and outputs at fixed addresses.

    A counter on the device selects the timestep, the coefficients, and the rows of the store that are read and
    written. The same work, recorded once, therefore serves every step, and the host never waits.

    Args:
        policy: makes the predictions; with guidance, both halves in one call of 2 M rows.
        rows: the number of trajectories, M.
        schedule: the T transitions; :meth:`load` may give others of the same number.
        conditioning: the conditioning of any number of prompts, rows ``[P, ...]``; only shapes and types are read.
        guidance_scale: the scale of classifier-free guidance; 1 for none.
        reduction: ``sum`` or ``mean``, the reduction of the log-probability over a latent's elements.

    Attributes:
        trajectory: ``[T + 1, M, *L]`` in the policy's dtype, the store.
        logprob: float32 ``[T, M]``.
        buffers: every tensor that the step reads or writes, by name.
    """

    def __init__(
        self,
        policy: Policy,
        rows: int,
        schedule: TransitionSchedule,
        conditioning: Conditioning,
        guidance_scale: float,
        reduction: str,
    ) -> None:
        device, dtype, steps = policy.device, policy.dtype, len(schedule)
        self._policy, self._guidance_scale, self._reduction = policy, guidance_scale, reduction
        self.trajectory = torch.zeros(steps + 1, rows, *policy.latent_shape, dtype=dtype, device=device)
        self.logprob = torch.zeros(steps, rows, dtype=torch.float32, device=device)
        self._input = torch.zeros_like(self.trajectory[0])
        self._step = torch.zeros(1, dtype=torch.int64, device=device)
        self._timesteps = schedule.timesteps.to(device, copy=True)
        self._table = schedule.table.to(device, copy=True)
        self._seed = torch.zeros(rows, dtype=torch.int64, device=device)
        self._text = {
            name: torch.zeros(
                rows,
                *value.shape[1:],
                dtype=dtype if value.is_floating_point() else value.dtype,
                device=device,
            )
            for name, value in conditioning.items()
        }
        self.buffers: Mapping[str, Tensor] = MappingProxyType(
            {
                "trajectory": self.trajectory,
                "logprob": self.logprob,
                "model_input": self._input,
                "step": self._step,
                "timesteps": self._timesteps,
                "table": self._table,
                "seed": self._seed,
                **self._text,
            }
        )

    def load(
        self,
        schedule: TransitionSchedule,
        latents: Tensor,
        conditioning: Conditioning,
        prompts: Tensor,
        seeds: Tensor,
    ) -> None:
        """Fills the buffers and sets the counter to the first step.

        Args:
            schedule: T transitions.
            latents: ``[M, *L]``, the initial noise.
            conditioning: the conditioning of P prompts, rows ``[P, ...]``.
            prompts, seeds: int64 ``[M]`` each, the index of a row's prompt and its noise seed.
        """
        device = self._seed.device
        self._timesteps.copy_(to_device(schedule.timesteps, device))
        self._table.copy_(to_device(schedule.table, device))
        self.trajectory[0].copy_(latents)
        self._input.copy_(latents)
        for name, buffer in self._text.items():
            value = conditioning[name]
            rows = value[to_device(prompts, value.device)]
            buffer.copy_(to_device(rows, device))
        self._seed.copy_(to_device(seeds, device))
        self.rewind()

    def rewind(self) -> None:
        """Sets the counter to the first step."""
        self._step.zero_()

    def advance(self) -> None:
        """Takes one step of all rows."""
        timestep = self._timesteps.index_select(0, self._step).expand(self._seed.shape)
        with model_call("denoiser", "rollout", device=self._input.device):
            output, unconditional = self._policy.predict(
                self._input, timestep, self._text, self._guidance_scale
            )
        denoise_step_(
            output,
            self.trajectory,
            self.logprob,
            self._input,
            self._step,
            self._table,
            self._seed,
            uncond_output=unconditional,
            guidance_scale=1.0 if unconditional is None else self._guidance_scale,
            reduction=self._reduction,
        )

    def addresses(self) -> dict[str, int]:
        """Returns the address of each buffer and weight that a recorded step reads or writes, by name."""
        weights = addresses(self._policy.denoiser)
        return {name: tensor.data_ptr() for name, tensor in self.buffers.items()} | weights

    def adapter(self) -> Hashable:
        """Returns the state of the denoiser's adapter, which a recorded step holds as constants."""
        return adapter_signature(self._policy.denoiser)
