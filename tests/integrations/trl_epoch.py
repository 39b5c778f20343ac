"""An epoch of TRL's DDPOTrainer on the embedded model, unpatched and patched, in an environment that has TRL 0.23.

    python trl_epoch.py RESULT

RESULT receives, as a file of torch.save, for each of the runs "unpatched", "torch" and "philox" (the patch's kinds of
noise), and for the first two in bfloat16: loss, approximate KL and share of clipped rows of every minibatch, samples
and log-probabilities, the epoch's change of every parameter, losses without guidance and without noise, how often
each fused op ran, which of a user's overrides are called, and the error of a step whose tensors hold no values.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from importlib import resources

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from torch.utils._python_dispatch import TorchDispatchMode
from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline

from loopfast.integrations import patch_trl

PROMPTS = ("a red circle", "a blue square", "a green triangle", "a yellow circle")


class FusedOps(TorchDispatchMode):
    """Counts the fused ops by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "loopfast":
            self.calls[function.name().removeprefix("loopfast::")] += 1
        return function(*args, **(kwargs or {}))


class Recorder(DDPOTrainer):
    """Keeps values of which TRL keeps only the average."""

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self.minibatches: list[list[float]] = []

    def calculate_loss(self, *args):
        results = super().calculate_loss(*args)
        self.minibatches.append([result.item() for result in results])
        return results

    def _generate_samples(self, *args, **options):
        (self.sampled,), images = super()._generate_samples(*args, **options)
        return [dict(self.sampled)], images


def host_read(trainer: DDPOTrainer) -> str:
    """Returns the error of the first copy to the host in a step of sampling and of training; empty if there is none.

    On the device "meta" tensors have no values: reading a value, or copying one to the CPU, raises an error.
    """
    pipeline = trainer.sd_pipeline
    pipeline.unet.to("meta")
    latents = torch.zeros(2, 4, 8, 8, dtype=pipeline.unet.dtype, device="meta")
    timesteps = pipeline.scheduler.timesteps[:2].to("meta")
    rows = torch.zeros(2, device="meta")
    embeds = trainer.neg_prompt_embed.to("meta").repeat(4, 1, 1)
    try:
        with torch.no_grad():
            pipeline.scheduler_step(latents, timesteps[0], latents, eta=1.0)
        loss, *_ = DDPOTrainer.calculate_loss(trainer, latents, timesteps, latents, rows, rows, embeds)
        loss.backward()
    except (NotImplementedError, RuntimeError) as error:
        return str(error)
    return ""


def second_step(trainer: DDPOTrainer, **settings) -> torch.Tensor:
    """Returns loss, approximate KL and share of clipped rows of a second step with other settings, unguided."""
    config, trainer.config = trainer.config, replace(trainer.config, train_cfg=False, **settings)
    names = ("latents", "timesteps", "next_latents", "log_probs")
    arguments = [trainer.sampled[name][:, 1] for name in names]
    results = DDPOTrainer.calculate_loss(trainer, *arguments, torch.ones(4), trainer.sampled["prompt_embeds"])
    trainer.config = config
    return torch.stack(results).detach()


def overridden(trainer: DDPOTrainer) -> list[str]:
    """Returns which of a user's overrides, a loss and a step, the trainer calls."""
    calls = []

    def loss(*arguments):
        calls.append("loss")
        return DDPOTrainer.loss(trainer, *arguments)

    def scheduler_step(*arguments, **options):
        calls.append("scheduler_step")
        return DefaultDDPOStableDiffusionPipeline.scheduler_step(pipeline, *arguments, **options)

    pipeline = trainer.sd_pipeline
    timesteps = pipeline.scheduler.timesteps[:2]
    embeds = trainer.neg_prompt_embed.repeat(4, 1, 1)
    latents, rows = torch.zeros(2, 4, 8, 8, dtype=pipeline.unet.dtype), torch.zeros(2)
    for owner, own in ((trainer, loss), (pipeline, scheduler_step)):
        setattr(owner, own.__name__, own)
        DDPOTrainer.calculate_loss(trainer, latents, timesteps, latents, rows, rows, embeds)
        delattr(owner, own.__name__)
    return calls


def epoch(noise: str | None, mixed_precision: str = "no") -> dict[str, object]:
    AcceleratorState._reset_state()  # it holds the precision of the process
    prompts = itertools.cycle(PROMPTS)
    with tempfile.TemporaryDirectory() as folder:
        config = DDPOConfig(
            mixed_precision=mixed_precision,
            log_with="tensorboard",
            project_kwargs={"logging_dir": folder},
            sample_num_steps=4,
            sample_guidance_scale=3.0,
            sample_batch_size=4,
            sample_num_batches_per_epoch=1,
            train_batch_size=2,
            train_clip_range=1e-2,
            train_adv_clip_max=1.0,
            # Adam's first update is the sign of the gradient, rounding errors included, unless epsilon is above them.
            train_adam_epsilon=1e-3,
            train_learning_rate=1e-4,
        )
        trainer = Recorder(
            config,
            # Divided by their spread, rewards of the images would enlarge the rounding that is to be compared.
            lambda images, prompts, metadata: (torch.tensor([float(len(p)) for p in prompts]), metadata),
            lambda: (next(prompts), {}),
            DefaultDDPOStableDiffusionPipeline(
                str(resources.files("loopfast.embedded") / "model"), use_lora=False
            ),
            image_samples_hook=lambda *_: None,
        )
        trainer.sd_pipeline.set_progress_bar_config(disable=True)
        parameters = dict(trainer.sd_pipeline.unet.named_parameters())
        before = {name: value.detach().clone() for name, value in parameters.items()}
        with patch_trl(noise=noise) if noise else contextlib.nullcontext(), FusedOps() as ops:
            trainer.train(epochs=1)
            updates = {name: value.detach() - before[name] for name, value in parameters.items()}
            calls = dict(ops.calls)
            unguided, deterministic = second_step(trainer), second_step(trainer, sample_eta=0.0)
            overrides = overridden(trainer)
            stopped_by = host_read(trainer)
        trainer.accelerator.end_training()
    return {
        "minibatches": torch.tensor(trainer.minibatches),
        "samples": trainer.sampled["next_latents"],
        "logprobs": trainer.sampled["log_probs"],
        "updates": updates,
        "calls": calls,
        "unguided": unguided,
        "deterministic": deterministic,
        "overrides": overrides,
        "host_read": stopped_by,
    }


if __name__ == "__main__":
    PartialState()  # TRL logs before it makes one
    results = {noise or "unpatched": epoch(noise) for noise in (None, "torch", "philox")}
    results |= {f"{noise or 'unpatched'}, bfloat16": epoch(noise, "bf16") for noise in (None, "torch")}
    torch.save(results, sys.argv[1])
