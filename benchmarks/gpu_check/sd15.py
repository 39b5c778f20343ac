"""Training at Stable Diffusion 1.5's sizes with random weights: LoRA and full, and the effect of each performance
option.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from loopfast.config import Config, parse_config
from loopfast.policies import Policy, load_policy, load_schedule
from loopfast.policies.adapter import without_adapter
from loopfast.rollout import Sampler, StepCache
from loopfast.rollout.sampler import initial_latents

from . import models, training
from .measure import Measurement, Work
from .record import first_line

_STEPS, _SMALL_STEPS = 10, 3
_RUN = """\
run: {name: run, trackers: []}
model: {dtype: bfloat16, tune: lora, lora: {rank: 4, alpha: 4}}
prompts: {source: "embedded:color"}
reward: [{name: jpeg_compressibility}]
algorithm: {samples_per_prompt: 4}
rollout: {prompts_per_iteration: 4, steps: 10, guidance_scale: 5.0, microbatch: 16}
train: {updates_per_iteration: 2, steps: all, learning_rate: 1e-4, warmup_updates: 0, microbatch: 16}
evaluation: {every: 0, images_per_prompt: 1, limit_prompts: 1, preview_images: 0}
checkpoint: {every: 1000}
"""


def _write_model(work: Work) -> None:
    began = time.monotonic()
    pipeline = models.tiny("sd15") if work.small else models.sd15(work.device)
    facts = models.write(pipeline, work.folder / "model")
    work.record.write(work.name, **facts, wall_seconds=time.monotonic() - began)


def _config(work: Work, iterations: int, overrides: tuple[str, ...]) -> Config:
    """Makes a run whose last iteration is not reached; see `training.run`."""
    given = [f"model.pretrained={work.folder / 'model'}", f"model.device={work.device}"]
    given += [f"run.directory={work.folder / work.name.replace(' ', '-')}", *overrides]
    if work.small:
        given += ["model.dtype=float32", "rollout.prompts_per_iteration=1", f"rollout.steps={_SMALL_STEPS}"]
        given += [f"{call}.microbatch=4" for call in ("rollout", "train")]
    return parse_config(_RUN, [*given, "train.on_policy_check=warn", f"train.iterations={iterations + 1}"])


def _train(*overrides: str, iterations: int = 2, seconds: float = 60, small: bool = False) -> Measurement:
    def config(work: Work) -> Config:
        return _config(work, iterations, overrides)

    def run(work: Work) -> None:
        found = config(work)
        images = found.rollout.prompts_per_iteration * found.algorithm.samples_per_prompt
        training.run(work, found, images * found.rollout.steps)

    return Measurement(run, seconds, config, small=small)


def _parts(work: Work) -> None:
    """Measures sampling with and without the adapter's arithmetic, and decoding in each precision."""
    config = _config(work, 1, ()).model
    steps = _SMALL_STEPS if work.small else _STEPS
    policy = load_policy(config)
    schedule = load_schedule(config, _config(work, 1, ()).rollout).to(policy.device)
    rows = 4 if work.small else 16
    text, prompts, seeds = (
        policy.encode(["a red circle"]),
        torch.zeros(rows, dtype=torch.int64),
        torch.arange(rows),
    )
    failed: list[str] = []

    def part(what: str, measure: Callable[[], dict[str, Any]]) -> None:
        try:
            work.record.write(what, rows=rows, **measure())
        except Exception as error:
            failed.append(what)
            work.record.write(what, error=first_line(error))

    def sampler_of(policy: Policy) -> Sampler:
        return Sampler(policy, schedule, 5.0, "sum", rows, steps=StepCache())

    def sample() -> dict[str, Any]:
        sampler = sampler_of(policy)
        try:
            seconds = _seconds(lambda: sampler.sample(text, prompts, seeds), work.device)
        finally:
            sampler.release()
        return {"steps": steps, "images_per_second": rows / seconds}

    def decode(precision: str) -> dict[str, Any]:
        decoding = load_policy(config.model_copy(update={"decoder_precision": precision}))
        sampler, latents = sampler_of(decoding), initial_latents(decoding, seeds)
        before = torch.cuda.memory_allocated() if work.device == "cuda" else 0
        if work.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = _seconds(lambda: sampler.decode(latents), work.device)
        extra = torch.cuda.max_memory_allocated() - before if work.device == "cuda" else None
        return {
            "precision": precision,
            "at_a_time": min(rows, decoding.decoder_rows),
            "ms_per_image": 1e3 * seconds / rows,
            "extra_bytes": extra,
        }

    part("rollout with adapter", sample)
    with without_adapter(policy.denoiser):
        part("rollout without adapter", sample)
    for precision in ("float32", "tf32", "model") if work.device == "cuda" else ("float32", "model"):
        part(f"decode {precision}", lambda precision=precision: decode(precision))
    if failed:
        raise RuntimeError(f"failed: {', '.join(failed)}")


def _seconds(call: Callable[[], object], device: str, repeats: int = 2) -> float:
    """Returns the mean seconds of a call, after one call to warm up."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    call()
    wait()
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    wait()
    return (time.perf_counter() - began) / repeats


MEASUREMENTS = {
    "model": Measurement(_write_model, needed=True),
    "lora": _train(iterations=3, small=True),
    "lora, no graph": _train("rollout.cuda_graph=false"),
    "lora, flash attention": _train("model.attention=flash"),
    "full": _train("model.tune=full"),
    "lora, microbatch 4": _train("rollout.microbatch=4", "train.microbatch=4"),
    "parts": Measurement(_parts),
    "lora, microbatch auto": _train(
        "rollout.microbatch=auto", "train.microbatch=auto", "rollout.prompts_per_iteration=16", seconds=90
    ),
    "lora, compiled": _train("model.compile=whole", seconds=120),
}
"""By name: the figure of figures first."""
