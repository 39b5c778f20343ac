"""A policy of two small weights, its trajectories, and a run around it that takes milliseconds."""

from __future__ import annotations

import copy
import io
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor

from loopfast.algorithms import PromptStatistics
from loopfast.config import AlgorithmConfig, Config, parse_config
from loopfast.policies import TextLimit
from loopfast.rollout import Sampler
from loopfast.rollout.trajectories import Trajectories
from loopfast.run.console import Display
from loopfast.schedules import TransitionSchedule
from loopfast.training import setup
from loopfast.training.batch import Batch, draw_batch
from loopfast.training.collect import collect
from loopfast.training.loss import PolicyLoss, compare
from loopfast.training.run import Run, Stopped
from loopfast.training.state import TrainState
from loopfast.training.train import learn
from loopfast.training.update import Screening, UpdateStatistics, screen, update
from loopfast.training.update_pass import UpdatePass

GROUPS, SAMPLES, STEPS, SHAPE = 2, 3, 3, (2, 2)
ROWS = GROUPS * SAMPLES
REWARDS = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]])
KEPT = torch.tensor([True, True])
LEAVE_ONE_OUT = torch.tensor([-3.0, -1.5, 4.5, -1.5, -1.5, 3.0], dtype=torch.float64)


class ToyPolicy:
    """One weight matrix for the latent and one for the prompt, in float64 unless another type is given.

    Sums are added up term by term, so that a row's bits depend on no other row, on any processor.
    """

    latent_shape = SHAPE
    scheduler = reference_denoiser = None
    decoder_rows = 4

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        self.device, self.dtype = torch.device("cpu"), dtype
        kept = torch.float64 if dtype == torch.float64 else torch.float32
        self.weight = torch.nn.Parameter(0.3 * torch.randn(4, 4, dtype=kept))
        self.prompt = torch.nn.Parameter(0.3 * torch.randn(4, dtype=kept))
        self._initial = [self.weight.detach().clone(), self.prompt.detach().clone()]
        self._inside_reference = False
        self.performance_options: dict[str, bool | str] = {"attention": "none"}
        self.text_limits: tuple[TextLimit, ...] = ()
        self.batches: list[int] = []
        self.outputs: list[Tensor] = []
        self.gradients: list[Tensor] = []
        self.denoiser = torch.nn.ParameterDict(self.trainable())

    def describe(self) -> str:
        return "a toy of 20 weights"

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        return {"weight": self.weight, "prompt": self.prompt}

    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        return {"text": torch.tensor([len(prompt) - 12.5 for prompt in prompts], dtype=self.dtype)}

    def predict(
        self, sample: Tensor, timestep: Tensor, conditioning: dict[str, Tensor], guidance_scale: float = 1.0
    ) -> tuple[Tensor, Tensor | None]:
        self.batches.append(len(sample))
        weight, prompt = self._initial if self._inside_reference else (self.weight, self.prompt)
        weight, prompt = weight.to(sample.dtype), prompt.to(sample.dtype)
        plain = (timestep[:, None] / 10).to(sample.dtype)
        for row, column in zip(weight, sample.flatten(1).unbind(1), strict=True):
            plain = plain + column[:, None] * row
        told = (plain + conditioning["text"][:, None] * prompt).view_as(sample)
        self.outputs.append(told)
        if told.requires_grad:
            told.register_hook(self.gradients.append)
        return told, None if guidance_scale == 1.0 else plain.view_as(sample)

    def forget(self) -> None:
        for record in (self.batches, self.outputs, self.gradients):
            record.clear()

    @contextmanager
    def reference(self) -> Iterator[None]:
        self._inside_reference = True
        yield
        self._inside_reference = False

    def with_denoiser(
        self, denoiser: torch.nn.ParameterDict, device: torch.device, dtype: torch.dtype, *, autocast: bool
    ) -> ToyPolicy:
        made = copy.copy(self)
        made.denoiser, made.device, made.dtype = denoiser, device, dtype
        made.weight, made.prompt = denoiser["weight"], denoiser["prompt"]
        return made

    def decode(self, latents: Tensor) -> Tensor:
        """Returns gray images of 8x8 pixels, a square for each number."""
        squares = (latents.float() / 16 + 0.5).clamp(0.0, 1.0).repeat_interleave(4, 1).repeat_interleave(4, 2)
        return squares[:, None].expand(-1, 3, -1, -1).contiguous()

    def export(self, directory: Path, weights: Mapping[str, Tensor]) -> None:
        directory.mkdir(exist_ok=True)
        save_file(dict(weights), directory / "toy.safetensors")


class Gradients:
    """An engine that keeps its gradients and takes no step."""

    learning_rate = 0.5

    def __init__(self) -> None:
        self.updates = self.discarded = 0
        self.last: list[bool] = []

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        loss.backward()
        self.last.append(last)

    def discard(self) -> None:
        self.discarded += 1

    def update(self) -> float:
        self.updates += 1
        return 2.5


TABLE = torch.tensor([[1.1, -0.2, 0.5], [0.9, 0.4, 0.7], [1.0, 0.3, 0.4]], dtype=torch.float64)


def schedule(dtype: torch.dtype = torch.float64) -> TransitionSchedule:
    """Returns three transitions; without noise only the model output moves a row."""
    sensitivity = (TABLE[:, 1] / TABLE[:, 2]) ** 2
    noiseless = TABLE * torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64)
    return TransitionSchedule(torch.tensor([9, 5, 1]), TABLE.to(dtype), TABLE, sensitivity, noiseless)


class Case:
    """Trajectories of a policy, and the policy after its weights have moved on."""

    def __init__(self, *, guidance_scale: float = 1.0, reduction: str = "sum", moved: float = 0.05) -> None:
        self.policy = ToyPolicy()
        policy: Any = self.policy
        self.sampler = Sampler(policy, schedule(), guidance_scale, reduction, ROWS)
        self.text = torch.randn(GROUPS, dtype=torch.float64)
        self.prompts = torch.arange(GROUPS).repeat_interleave(SAMPLES)
        sampled = self.sampler.sample({"text": self.text}, self.prompts, torch.arange(ROWS))
        self.trajectories = Trajectories(sampled.latents, sampled.logprob.double())
        with torch.no_grad():
            for parameter in self.policy.trainable().values():
                parameter += moved * torch.randn_like(parameter)
        order = torch.randperm(ROWS * STEPS)[:11]
        self.rows, self.steps = order % ROWS, order // ROWS

    def update_pass(self, algorithm: AlgorithmConfig, rewards: Tensor = REWARDS) -> UpdatePass:
        advantages = compare(algorithm, rewards, KEPT, ["a", "b"], PromptStatistics(), torch.device("cpu"))
        return UpdatePass(
            self.sampler,
            PolicyLoss(algorithm, advantages),
            self.trajectories,
            {"text": self.text},
            self.prompts,
        )

    def screen(
        self, algorithm: AlgorithmConfig, microbatch: int = 11, rewards: Tensor = REWARDS
    ) -> Screening:
        self.policy.forget()
        update_pass = self.update_pass(algorithm, rewards)
        return screen(update_pass, (self.rows, self.steps), microbatch=microbatch)

    def update(
        self,
        algorithm: AlgorithmConfig,
        microbatch: int = 4,
        rewards: Tensor = REWARDS,
        engine: Any = None,
        **options: Any,
    ) -> UpdateStatistics:
        self.policy.forget()
        for parameter in self.policy.trainable().values():
            parameter.grad = None
        done = update(
            self.update_pass(algorithm, rewards),
            gradients := engine or Gradients(),
            (self.rows, self.steps),
            microbatch=microbatch,
            **options,
        )
        assert engine is not None or gradients.updates == 1
        return done

    def gradients(self) -> list[Tensor]:
        found = [parameter.grad for parameter in self.policy.trainable().values()]
        assert all(gradient is not None for gradient in found)
        return [gradient.clone() for gradient in found if gradient is not None]

    def plain(
        self, advantage: Tensor, clip_range: float | None, kl_weight: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns loss, ratios and gradients by autograd of the textbook formula, one pair at a time."""
        g, mean = self.sampler.guidance_scale, self.sampler.reduction == "mean"
        losses, ratios = [], []
        for row, step in zip(self.rows.tolist(), self.steps.tolist(), strict=True):
            a, b, sigma = self.sampler.schedule.table64[step]
            x, y = self.trajectories.latents[step, row], self.trajectories.latents[step + 1, row]

            def output(x: Tensor = x, row: int = row, step: int = step) -> Tensor:
                text = {"text": self.text[self.prompts[row]].view(1)}
                time = self.sampler.schedule.timesteps[step].view(1)
                told, plain = self.policy.predict(x[None], time, text, g)
                return (told if plain is None else plain + g * (told - plain))[0]

            density = torch.distributions.Normal(a * x + b * output(), sigma).log_prob(y)
            ratio = torch.exp(
                (density.mean() if mean else density.sum()) - self.trajectories.logprob[step, row]
            )
            loss = -advantage[row] * ratio
            if clip_range is not None:
                loss = torch.maximum(loss, -advantage[row] * ratio.clamp(1 - clip_range, 1 + clip_range))
            if kl_weight:
                with torch.no_grad(), self.policy.reference():
                    before = output()
                shift = 0.5 * (b * (output() - before) / sigma) ** 2
                loss = loss + kl_weight * (shift.mean() if mean else shift.sum())
            losses.append(loss)
            ratios.append(ratio)
        total = torch.stack(losses).mean()
        return total, torch.stack(ratios), torch.autograd.grad(total, self.policy.trainable().values())


# Each prompt has another length, which is the only property that the toy reads.
PROMPTS = ("a red circle", "a blue star", "a green triangle", "a white cross")

RUN = """\
run: {name: toy, trackers: []}
model: {pretrained: embedded, device: cpu}
reward: [{name: "tests.training.toys:first_pixel", label: pixel}]
algorithm: {samples_per_prompt: 2}
rollout: {prompts_per_iteration: 3, steps: 3}
train: {iterations: 2, updates_per_iteration: 3, steps: all, learning_rate: 0.1, warmup_updates: 0}
evaluation: {every: 0, images_per_prompt: 1, limit_prompts: 2, preview_images: 0}
"""


def first_pixel(
    images: Tensor, prompts: list[str], metadata: list[dict[str, Any]], word: str = "none", how: str = "nan"
) -> list[float]:
    """Returns the first pixel's red; prompts with certain words always give the same number, no number, or an error."""
    bad = [word in prompt for prompt in prompts]
    if any(bad) and how == "raises":
        raise ZeroDivisionError("no luck")
    if any(bad) and how == "memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    value = 0.5 if how == "flat" else torch.nan
    return [value if no else pixel for no, pixel in zip(bad, images[:, 0, 0, 0].tolist(), strict=True)]


class Heard(Display):
    """Shows a run only to a test, and sends this process a signal when a phase is entered for the nth time."""

    def __init__(self) -> None:
        self.text = io.StringIO()
        super().__init__(console=Console(file=self.text, width=1000))
        self.warnings: list[str] = []
        self.phases: list[str] = []
        self.stop_at: tuple[str, int] | None = None

    def warning(self, text: str) -> None:
        self.warnings.append(text)

    def phase(self, name: str) -> None:
        self.phases.append(name)
        if self.stop_at == (name, self.phases.count(name)):
            signal.raise_signal(signal.SIGTERM)


@dataclass
class Toy:
    """A run of a toy policy, and its current state."""

    run: Run
    state: TrainState
    policy: ToyPolicy
    heard: Heard

    @property
    def weights(self) -> dict[str, Tensor]:
        return {name: weight.detach().clone() for name, weight in self.policy.trainable().items()}

    def sampled(self) -> Batch:
        """Begins an iteration; afterwards its images are sampled and scored."""
        self.state.pending = None
        batch = draw_batch(self.run, self.state.iteration)
        self.state.rollout = collect(self.run, self.state, batch)
        return batch

    def stopped(self, updates: int = 1) -> None:
        """Begins an iteration that a signal stops after this number of updates; of several runs only the last one
        receives it.
        """
        batch = self.sampled()
        self.heard.stop_at = "replay", self.heard.phases.count("replay") + updates
        with pytest.raises(Stopped):
            learn(self.run, self.state, batch)


MakeToy = Callable[..., Toy]


def bad_reward(word: str, how: str = "nan") -> str:
    """Returns the setting with which the reward fails for prompts with a given word."""
    name = "tests.training.toys:first_pixel"
    return f"reward=[{{name: '{name}', label: pixel, options: {{word: {word}, how: {how}}}}}]"


def memory_for(
    toy: Toy, rows: int, patch: pytest.MonkeyPatch, *, after: int = 0, training: bool = True
) -> None:
    """Lets model calls with more rows run out of memory, after the first ones; ``training`` selects those with
    gradients.
    """
    predict, calls = toy.policy.predict, list[int]()

    def limited(sample: Tensor, *args: Any) -> tuple[Tensor, Tensor | None]:
        found = predict(sample, *args)
        if torch.is_grad_enabled() or not training:
            calls.append(len(sample))
            if len(sample) > rows and len(calls) > after:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return found

    patch.setattr(toy.policy, "predict", limited)


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in expected)


def toy_config(folder: Path, *overrides: str) -> Config:
    """Returns a run of three prompts with two images each, whose folder and file of prompts will be in the folder."""
    if not (folder / "prompts.txt").exists():
        (folder / "prompts.txt").write_text("\n".join(PROMPTS), "utf-8")
    given = (f"run.directory={folder}", f"prompts.source={folder / 'prompts.txt'}")
    return parse_config(RUN, (*given, *overrides))


@contextmanager
def toy_model() -> Iterator[list[ToyPolicy]]:
    """Context in which runs train a toy policy instead of the model that they name; yields the policies."""
    made: list[ToyPolicy] = []

    def load_policy(config: Any, **options: Any) -> ToyPolicy:
        torch.manual_seed(1)
        made.append(ToyPolicy(getattr(torch, config.dtype)))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "load_policy", load_policy)
        patch.setattr(setup, "load_schedule", lambda model, rollout: schedule(torch.float32))
        patch.setattr(setup, "scheduler_notes", lambda model: ())
        yield made


@contextmanager
def toy_run(folder: Path, *overrides: str, resume: str | None = None) -> Iterator[Toy]:
    """Returns a run of a toy policy; all its parts except the model are those of any run."""
    heard = Heard()
    with (
        toy_model() as made,
        setup.start(toy_config(folder, *overrides), resume, heard) as (run, state),
    ):
        yield Toy(run, state, made[0], heard)
