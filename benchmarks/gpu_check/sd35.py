"""Training at Stable Diffusion 3.5 medium's sizes: 384x384 pixels, 10 steps of which 3 are trained, LoRA of rank 32.

The work is that of the published figures in `benchmarks.gpu_report.page`: 16 images for each prompt and a window of
stochastic steps, as Flow-GRPO trains. Weights are random, T5 is absent, and the reward is a JPEG's size.
"""

from __future__ import annotations

import time

from loopfast.config import Config, parse_config

from . import models, training
from .measure import Measurement, Work

TRAINED_STEPS = 3

_RUN = """\
run: {name: run, trackers: []}
model: {dtype: bfloat16, tune: lora, lora: {rank: 32, alpha: 64, init: gaussian}}
prompts: {source: "embedded:color"}
reward: [{name: jpeg_compressibility}]
algorithm: {samples_per_prompt: 16, logprob: mean, clip_range: 1e-4}
rollout: {prompts_per_iteration: 3, steps: 10, noise_level: 0.7, microbatch: 8}
train: {updates_per_iteration: 2, steps: "0:9", learning_rate: 3e-4, warmup_updates: 0, microbatch: 8}
evaluation: {every: 0, images_per_prompt: 1, limit_prompts: 1, preview_images: 0}
checkpoint: {every: 1000}
"""


def _write_model(work: Work) -> None:
    began = time.monotonic()
    pipeline = models.tiny("sd35") if work.small else models.sd35_medium(work.device)
    facts = models.write(pipeline, work.folder / "model")
    work.record.write(work.name, **facts, wall_seconds=time.monotonic() - began)


def _train(guidance: float, *, iterations: int = 2, small: bool = True) -> Measurement:
    def config(work: Work) -> Config:
        given = [f"model.pretrained={work.folder / 'model'}", f"model.device={work.device}"]
        given += [f"run.directory={work.folder / work.name.replace(' ', '-')}"]
        given += [f"rollout.stochastic_steps=window:{TRAINED_STEPS}", f"rollout.guidance_scale={guidance}"]
        given += ["train.on_policy_check=warn", f"train.iterations={iterations + 1}"]
        size = 32 if work.small else 384
        given += [f"model.height={size}", f"model.width={size}", "model.max_sequence_length=128"]
        if work.small:
            given += ["model.dtype=float32"]
            given += ["algorithm.samples_per_prompt=4", "rollout.prompts_per_iteration=1"]
            given += ["rollout.microbatch=4", "train.microbatch=4"]
        return parse_config(_RUN, given)

    def run(work: Work) -> None:
        found = config(work)
        images = found.rollout.prompts_per_iteration * found.algorithm.samples_per_prompt
        training.run(work, found, images * TRAINED_STEPS)

    return Measurement(run, 60, config, small=small)


MEASUREMENTS = {
    "model": Measurement(_write_model, needed=True),
    "guidance 4.5": _train(4.5),
    "no guidance": _train(1.0, small=False),
}
