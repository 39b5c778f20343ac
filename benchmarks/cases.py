"""The measured cases: ops, latents, rows and dtypes, and the inputs of each call."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

SHAPES = {"SD": (4, 64, 64), "SDXL": (4, 128, 128), "SD3": (16, 128, 128), "rewards": ()}
"""Latent shapes by model; ``rewards`` is for the op that has none."""

COMPETITORS = ("ours", "eager", "compile", "trl")
SAMPLES = 4
STEPS = 50
TRAIN_STEPS = 1000


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    op: str
    shape: str
    rows: int
    dtype: torch.dtype
    competitor: str
    plain: bool = False  # in a process in which glibc is not configured to keep freed memory

    @property
    def setting(self) -> str:
        """The case without op and competitor, such as ``SD-16-float32``."""
        return f"{self.shape}-{self.rows}-{str(self.dtype).removeprefix('torch.')}"

    def inputs(self, seed: int = 0) -> Inputs:
        """Makes the case's arguments for a seed, on the measured device."""
        op = OPS[self.op]
        return make_inputs(
            *(SHAPES[self.shape], self.rows, self.dtype, device()),
            requires_grad=op.backward,
            guided=op.guided,
            seed=seed,
        )

    def __str__(self) -> str:
        return f"{self.setting}-{self.competitor}{'-plain' * self.plain}"


def device() -> torch.device:
    """Returns the device to measure: ``LOOPFAST_BENCH_DEVICE``, or the GPU if there is one."""
    return torch.device(
        os.environ.get("LOOPFAST_BENCH_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    )


CpuGrid = Iterable[tuple[str, int, torch.dtype, tuple[str, ...]]]


def grid(op: str, cpu: CpuGrid, shapes: Iterable[str] = ("SD", "SDXL", "SD3")) -> list[Case]:
    """Returns the cases of an op: all of them on a GPU, and on a CPU those that take a few minutes.

    Args:
        op: a key of `OPS`.
        cpu: shape, rows, dtype and competitors of every setting measured on a CPU.
        shapes: those of the GPU's grid.
    """
    if device().type == "cpu":
        return [
            Case(op, shape, rows, dtype, competitor)
            for shape, rows, dtype, competitors in cpu
            for competitor in competitors
        ]
    dtypes = (torch.float32,) if "rewards" in shapes else (torch.float32, torch.bfloat16)
    return [
        Case(op, *setting)
        for setting in itertools.product(shapes, (1, 4, 16, 64, 256), dtypes, COMPETITORS)
        if not ("rewards" in shapes and setting[1] < SAMPLES)
    ]


class Schedule(NamedTuple):
    """The same sampler, DDIM with eta = 1 on Stable Diffusion's noise schedule, in the form that each competitor needs.

    Attributes:
        table: float32 ``[T, 3]``, the columns a, b, sigma of ``loopfast_kernels``.
        alphas: float32 ``[T, 3]``, the cumulative alphas before and after the step, and sigma.
        timesteps: int64 ``[T]``.
    """

    table: Tensor
    alphas: Tensor
    timesteps: Tensor


def make_schedule(device: torch.device) -> Schedule:
    """Computes the schedule in float64."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, TRAIN_STEPS, dtype=torch.float64).square()
    alphas = (1 - betas).cumprod(0)
    stride = TRAIN_STEPS // STEPS
    timesteps = torch.arange(STEPS).flip(0) * stride + 1
    before, after = alphas[timesteps], alphas[(timesteps - stride).clamp(min=0)]
    sigma = ((1 - after) / (1 - before) * (1 - before / after)).sqrt()
    b = (1 - after - sigma**2).sqrt() - (after * (1 - before) / before).sqrt()
    return Schedule(
        table=torch.stack(((after / before).sqrt(), b, sigma), 1).to(device, torch.float32),
        alphas=torch.stack((before, after, sigma), 1).to(device, torch.float32),
        timesteps=timesteps.to(device),
    )


@dataclass(frozen=True)
class Inputs:
    """One set of arguments: the latents are ``[N, *L]``, the others ``[N]`` or ``[G, K]``."""

    model_output: Tensor
    uncond_output: Tensor
    sample: Tensor
    prev_sample: Tensor
    schedule: Schedule
    step: Tensor
    seed: Tensor
    old_logprob: Tensor
    advantage: Tensor
    rewards: Tensor
    trajectory: Tensor


GUIDANCE_SCALE = 5.0
ADVANTAGE_CLIP = 5.0
# Wide, so that rounding clips no row of any competitor: a clipped row is less work.
CLIP_RANGE = 0.2


def make_inputs(
    shape: tuple[int, ...],
    rows: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    requires_grad: bool,
    guided: bool = True,
    seed: int = 0,
) -> Inputs:
    """Draws arguments of an update's first pass: `prev_sample` is drawn with these outputs, so every ratio is 1.

    Args:
        shape: ``L``.
        rows: ``N``.
        dtype: the latents' type.
        device: the device of all arguments.
        requires_grad: whether the model outputs require gradients.
        guided: whether the model outputs are combined by guidance.
        seed: the seed of the random numbers.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    schedule = make_schedule(device)
    step = torch.randint(STEPS, (rows,), generator=generator, device=device)
    output, uncond, sample = (normal(rows, *shape).to(dtype) for _ in range(3))
    a, b, sigma = (column.reshape(-1, *(1 for _ in shape)) for column in schedule.table[step].unbind(1))
    combined = output.float()
    if guided:
        combined = uncond.float() + GUIDANCE_SCALE * (combined - uncond.float())
    mean = a * sample + b * combined
    prev_sample = (mean + sigma * normal(rows, *shape)).to(dtype)
    logprob = -0.5 * ((prev_sample - mean) / sigma).square() - sigma.log() - 0.5 * math.log(2 * math.pi)
    return Inputs(
        model_output=output.requires_grad_(requires_grad),
        uncond_output=uncond.requires_grad_(requires_grad),
        sample=sample,
        prev_sample=prev_sample,
        schedule=schedule,
        step=step,
        seed=torch.arange(rows, device=device),
        old_logprob=logprob.reshape(rows, -1).mean(1),
        advantage=normal(rows),
        rewards=normal(math.ceil(rows / SAMPLES), SAMPLES),
        trajectory=torch.arange(rows, device=device),
    )


class Op(NamedTuple):
    """A description of how every competitor is called.

    Attributes:
        function: its name in the modules of `benchmarks.competitors`.
        arguments: positional arguments of that function.
        latents: the number of latents that go in and out, each counted once.
        backward: whether the gradients of both model outputs are part of the work.
        moves_dtype: the type of those latents if it differs from the inputs' type.
        guided: whether there is an unconditional output.
    """

    function: str
    arguments: Callable[[Inputs], tuple[Tensor | Schedule | None, ...]]
    latents: int
    backward: bool = False
    moves_dtype: torch.dtype | None = None
    guided: bool = True

    def bytes(self, inputs: Inputs) -> int:
        """Returns the bytes that must be moved: every latent in and out once, without the few numbers of each row."""
        if self.latents == 0:
            return 2 * inputs.rewards.nbytes
        return self.latents * inputs.sample.numel() * (self.moves_dtype or inputs.sample.dtype).itemsize


def _transition(inputs: Inputs) -> tuple[Tensor | Schedule | None, ...]:
    return (
        inputs.model_output,
        inputs.uncond_output,
        inputs.sample,
        inputs.prev_sample,
        inputs.schedule,
        inputs.step,
    )


OPS = {
    "denoise_step": Op(
        "denoise_step", lambda x: (x.model_output, None, x.sample, x.schedule, x.step, x.seed), latents=3
    ),
    "denoise_step_guided": Op(
        "denoise_step",
        lambda x: (x.model_output, x.uncond_output, x.sample, x.schedule, x.step, x.seed),
        latents=4,
    ),
    "transition_logprob": Op("transition_logprob", _transition, latents=4),
    "transition_logprob_backward": Op("transition_logprob", _transition, latents=6, backward=True),
    "clipped_loss": Op(
        "clipped_loss", lambda x: (*_transition(x), x.old_logprob, x.advantage), latents=6, backward=True
    ),
    "loop_loss": Op(
        "loop_loss",
        lambda x: (*_transition(x), x.old_logprob, x.rewards, x.trajectory),
        latents=6,
        backward=True,
    ),
    "loop_loss_unguided": Op(
        "loop_loss",
        lambda x: (x.model_output, None, *_transition(x)[2:], x.old_logprob, x.rewards, x.trajectory),
        latents=4,
        backward=True,
        guided=False,
    ),
    "leave_one_out": Op("leave_one_out", lambda x: (x.rewards,), latents=0),
    "philox_normal": Op(
        "philox_normal", lambda x: (x.sample, x.step, x.seed), latents=1, moves_dtype=torch.float32
    ),
}
