"""DDPO in plain PyTorch and diffusers, as ddpo-pytorch does it: ``python plain_worker.py JOB``.

This is a good implementation without an engine: prompts are encoded once, all images of a batch pass through the model
at once with guidance, the log-probabilities of sampling are kept as the old ones, and the optimizer is fused. The
sampler is the scheduler's own ``step``, which accepts one timestep for the whole batch, so the training loops over
timesteps. JOB is a JSON file with the keys of `loopfast_worker.py`; this program reads the keys that an equal iteration
needs.
"""

from __future__ import annotations

import json
import math
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor

from loopfast.config import Config, parse_config
from loopfast.rewards import build_rewards

sys.path.append(str(Path(__file__).parents[1] / "race" / "workers"))
from resident import resident_peak

IMPORTED = resident_peak()


class Plain:
    """The parts of the loop, and the times of its phases."""

    def __init__(self, config: Config, prompts: list[str]) -> None:
        self.config = config
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.pipeline = StableDiffusionPipeline.from_pretrained(
            config.model.pretrained, safety_checker=None, requires_safety_checker=False
        ).to(self.device, torch.float32)
        self.unet = self.pipeline.unet
        self.pipeline.vae.requires_grad_(False)
        self.pipeline.text_encoder.requires_grad_(False)
        self.scheduler = DDIMScheduler.from_config(self.pipeline.scheduler.config)
        self.scheduler.set_timesteps(config.rollout.steps, device=self.device)
        self.rewards = build_rewards(config.reward)
        self.prompts = [prompt for prompt in prompts for _ in range(config.algorithm.samples_per_prompt)]
        self.parameters = list(self.unet.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.train.learning_rate,
            betas=(config.train.beta1, config.train.beta2),
            weight_decay=config.train.weight_decay,
            fused=True,
        )
        size = self.unet.config.sample_size
        self.shape = (self.unet.config.in_channels, size, size)
        self.phases: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Context whose time is added to a phase."""
        began = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.phases[name] = self.phases.get(name, 0.0) + time.perf_counter() - began

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Tensor:
        """Returns text states ``[P, S, D]``."""
        tokenizer = self.pipeline.tokenizer
        ids = tokenizer(
            prompts,
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        return self.pipeline.text_encoder(ids.to(self.device))[0]

    def predict(self, latents: Tensor, timestep: Tensor, text: Tensor, empty: Tensor) -> Tensor:
        """Returns the guided model output for latents ``[N, *L]`` at one timestep."""
        states = torch.cat([text, empty.expand_as(text)])
        both = self.unet(torch.cat([latents, latents]), timestep, states, return_dict=False)[0]
        conditional, unconditional = both.chunk(2)
        return unconditional + self.config.rollout.guidance_scale * (conditional - unconditional)

    def transition(
        self, output: Tensor, timestep: Tensor, latents: Tensor, noise: Tensor | None, after: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Takes the scheduler's step and returns DDPO's log-probability ``[N]``, of a new sample drawn with `noise` or
        of `after`.
        """
        step = int(timestep)
        before = step - self.scheduler.config.num_train_timesteps // self.scheduler.num_inference_steps
        sigma = self.config.rollout.eta * float(self.scheduler._get_variance(step, before)) ** 0.5
        drawn = torch.zeros_like(latents) if noise is None else noise
        stepped = self.scheduler.step(
            output, step, latents, eta=self.config.rollout.eta, variance_noise=drawn, return_dict=False
        )[0]
        # without noise the scheduler's result is the mean
        deviation = noise if after is None else (after - stepped) / sigma
        assert deviation is not None
        constant = math.log(sigma) + 0.5 * math.log(2 * math.pi)
        return stepped, -0.5 * deviation.square().flatten(1).mean(1) - constant

    @torch.no_grad()
    def sample(self, text: Tensor, empty: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Returns the T + 1 latents ``[N, *L]`` and the T log-probabilities ``[N]``."""
        latents = [torch.randn(len(text), *self.shape, device=self.device)]
        logprobs = []
        for timestep in self.scheduler.timesteps:
            output = self.predict(latents[-1], timestep, text, empty)
            noise = torch.randn_like(latents[-1])
            following, logprob = self.transition(output, timestep, latents[-1], noise, None)
            latents.append(following)
            logprobs.append(logprob)
        return latents, logprobs

    @torch.no_grad()
    def score(self, latents: Tensor) -> Tensor:
        """Returns the rewards of the decoded images, ``[N]``."""
        vae = self.pipeline.vae
        images = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]
        return self.rewards.score((images / 2 + 0.5).clamp(0, 1), self.prompts).total.to(self.device)

    def train(
        self, latents: list[Tensor], old: list[Tensor], advantages: Tensor, text: Tensor, empty: Tensor
    ) -> None:
        """Makes the iteration's updates, each on its part of the images, timestep by timestep."""
        clip = self.config.algorithm.clip_range
        assert clip is not None
        order = list(range(len(old)))
        for rows in torch.randperm(len(text), device=self.device).chunk(
            self.config.train.updates_per_iteration
        ):
            random.shuffle(order)
            for index in order:
                before = latents[index][rows]
                timestep = self.scheduler.timesteps[index]
                output = self.predict(before, timestep, text[rows], empty)
                _, logprob = self.transition(output, timestep, before, None, latents[index + 1][rows])
                ratio = (logprob - old[index][rows]).exp()
                advantage = advantages[rows]
                loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip)).mean()
                (loss / len(order)).backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, self.config.train.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def iteration(self, prompts: list[str]) -> dict[str, float]:
        """Runs one iteration and returns its seconds by phase."""
        self.phases = {}
        began = time.perf_counter()
        with self.phase("sampling"):
            text = self.encode(prompts).repeat_interleave(self.config.algorithm.samples_per_prompt, 0)
            empty = self.encode([""])
            latents, logprobs = self.sample(text, empty)
        with self.phase("reward"):
            rewards = self.score(latents[-1])
        with self.phase("training"):
            self.train(latents, logprobs, (rewards - rewards.mean()) / (rewards.std() + 1e-8), text, empty)
        return {"seconds": time.perf_counter() - began, **self.phases}


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Trains, and returns the measurements."""
    config = parse_config(json.dumps(job["config"]))
    torch.manual_seed(config.run.seed)
    prompts = Path(config.prompts.source).read_text("utf-8").splitlines()
    loop = Plain(config, prompts)
    iterations = [loop.iteration(prompts) for _ in range(config.train.iterations)]
    cuda = loop.device.type == "cuda"
    return {
        "iterations": iterations,
        "optimizer_steps": config.train.updates_per_iteration,
        "trainable": sum(parameter.numel() for parameter in loop.parameters),
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else resident_peak(),
        "imported_bytes": IMPORTED,
    }


if __name__ == "__main__":
    task = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    Path(task["result"]).write_text(json.dumps(run(task)), "utf-8")
