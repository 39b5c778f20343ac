"""One run of TRL 0.23.1's DDPOTrainer, in the environment that has it: ``python trl_worker.py JOB``.

JOB is a JSON file that `benchmarks.race.jobs.trl_job` describes. The trainer is used as its documentation shows, with
nothing that slows it down: no image hook, no checkpoints, no progress bars. Its own methods are timed.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from resident import resident_peak
from safetensors.torch import save_file
from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline

from loopfast.config import RewardConfig
from loopfast.rewards import build_rewards

IMPORTED = resident_peak()


class Stopwatch(DDPOTrainer):
    """Times the three phases of an iteration, and keeps the share of clipped ratios that TRL averages away."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.phases: dict[str, float] = defaultdict(float)
        self.outside: list[float] | None = None

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        self.phases[name] += time.perf_counter() - began

    def _generate_samples(self, *arguments: Any, **options: Any) -> Any:
        with self._phase("sampling"):
            return super()._generate_samples(*arguments, **options)

    def compute_rewards(self, *arguments: Any, **options: Any) -> Any:
        with self._phase("reward"):
            return super().compute_rewards(*arguments, **options)

    def _train_batched_samples(self, *arguments: Any, **options: Any) -> Any:
        with self._phase("training"):
            return super()._train_batched_samples(*arguments, **options)

    def calculate_loss(self, *arguments: Any) -> Any:
        results = super().calculate_loss(*arguments)
        if self.outside is not None:
            self.outside.append(results[2].item())
        return results


def prompt_function(job: dict[str, Any]) -> Any:
    """Returns a function that draws a prompt for each image: in turn, each several times in a row, or at random."""
    prompts, repeat = job["prompts"], job["repeat"]
    if repeat:
        turn = itertools.cycle(prompt for prompt in prompts for _ in range(repeat))
        return lambda: (next(turn), {})
    draw = random.Random(job["ddpo"]["seed"])
    return lambda: (draw.choice(prompts), {})


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Trains, and returns the measurements."""
    rewards = build_rewards([RewardConfig(name=job["reward"])])
    scored: list[dict[str, Any]] = []

    def reward(images: torch.Tensor, prompts: tuple[str, ...], metadata: tuple[Any, ...]) -> Any:
        scores = rewards.score(images.float(), prompts, metadata).total
        if job["keep_images"] and not scored:
            save_file({"images": images.float().contiguous(), "rewards": scores}, job["keep_images"])
            scored.append({"prompts": list(prompts)})
        return scores, metadata

    with tempfile.TemporaryDirectory() as folder:
        trainer = Stopwatch(
            DDPOConfig(
                **job["ddpo"], save_freq=2**31, log_with="tensorboard", project_kwargs={"logging_dir": folder}
            ),
            reward,
            prompt_function(job),
            DefaultDDPOStableDiffusionPipeline(job["model"], use_lora=job["lora"]),
        )
        trainer.sd_pipeline.set_progress_bar_config(disable=True)
        unet = trainer.sd_pipeline.unet
        if job["ratios"]:
            trainer.outside = []
        iterations: list[dict[str, Any]] = []
        exports: list[dict[str, Any]] = []
        total, updates = 0.0, 0
        for epoch in range(job["iterations"]):
            trainer.phases.clear()
            began = time.perf_counter()
            updates = trainer.step(epoch, updates)
            seconds = time.perf_counter() - began
            total += seconds
            iterations.append({"seconds": seconds, **trainer.phases})
            print(f"TRL iteration {epoch + 1}: {seconds:.1f} s", file=sys.stderr, flush=True)
            over = job["seconds"] is not None and total >= job["seconds"]
            if job["export"] and ((epoch + 1) % job["export_every"] == 0 or over):
                file = Path(job["export"]) / f"iteration-{epoch + 1:06d}.safetensors"
                weights = {name: value.detach().float() for name, value in unet.named_parameters()}
                save_file({name: value.cpu().contiguous() for name, value in weights.items()}, file)
                exports.append({"iteration": epoch + 1, "seconds": total, "file": str(file)})
            if over:
                break
        device = trainer.accelerator.device
        trainer.accelerator.end_training()
    outside = trainer.outside
    return {
        "iterations": iterations,
        "optimizer_steps": updates / len(iterations),
        "trainable": sum(p.numel() for p in unet.parameters() if p.requires_grad),
        "outside": None if outside is None else sum(outside) / len(outside),
        "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else resident_peak(),
        "imported_bytes": IMPORTED,
        "exports": exports,
        "prompts": scored[0]["prompts"] if scored else None,
        "threads": torch.get_num_threads(),
        "versions": {
            name: version(name)
            for name in ("trl", "torch", "diffusers", "transformers", "accelerate", "peft")
        },
    }


if __name__ == "__main__":
    PartialState()  # TRL logs before it makes one
    task = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    Path(task["result"]).write_text(json.dumps(run(task)), "utf-8")
