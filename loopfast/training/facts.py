"""What a run says when it starts and when it ends."""

from __future__ import annotations

from typing import Any

import torch

from loopfast.config import RewardConfig
from loopfast_kernels import info


def describe_rollout(trainer: Any) -> str:
    """The levers of the rollout, off or on."""
    sampler, config = trainer.sampler, trainer.config.rollout
    graphs = sampler.model.device.type == "cuda" and config.cuda_graph
    replica = "off"
    if sampler.replica is not None:
        merged = ", LoRA merged" if config.merge_lora else ""
        dtype = str(sampler.model.dtype).removeprefix("torch.")
        gathered = "" if sampler.replica.resident else ", gathered for each rollout"
        replica = f"{dtype} on {sampler.model.device}{merged}{gathered}"
    return (
        f"stochastic steps {config.stochastic_steps}, CUDA graph {'on' if graphs else 'off'}, replica {replica}, "
        f"reward worker {trainer.reward_worker}"
    )


def describe_run(trainer: Any) -> list[tuple[str, str]]:
    """The header's lines: what is trained, how, on what, and where it goes."""
    config, sampler = trainer.config, trainer.sampler
    policy, algorithm, settings = sampler.policy, config.algorithm, config.train
    steps = config.rollout.steps
    images = config.rollout.prompts_per_iteration * algorithm.samples_per_prompt
    pairs = images * trainer.drawn // settings.updates_per_iteration
    left_out = [str(step) for step in range(steps) if step not in trainer.steps.trained]
    reason = {"auto": " (each would outweigh the others)", "all": " (deterministic)"}.get(settings.steps, "")
    levers = {**policy.levers, "screening": trainer.screening}
    threads = f", {torch.get_num_threads()} thread(s)" if policy.device.type == "cpu" else ""
    facts = info()
    by_device = facts.get(policy.device.type, "reference")
    kernels = by_device if facts["requested"] == "by device" else facts["requested"]
    return [
        ("model", policy.describe()),
        ("device", f"{policy.device}{threads}, {config.model.dtype}, kernels: {kernels}"),
        (
            "algorithm",
            f"{algorithm.name}, K = {algorithm.samples_per_prompt}, learning rate {settings.learning_rate:g}",
        ),
        ("prompts", f"{trainer.prompts.summary()} from {config.prompts.source}"),
        ("reward", ", ".join(_describe_term(term) for term in config.reward)),
        (
            "an iteration",
            f"{images} images, {settings.updates_per_iteration * settings.inner_epochs} updates of {pairs} pairs",
        ),
        (
            "steps",
            f"{trainer.steps.count} of {steps} trained"
            + (f", a window of {len(trainer.steps.trained)}" if trainer.steps.window else "")
            + (f", not {', '.join(left_out)}{reason}" if left_out else "")
            + (f"; {trainer.drawn} of them drawn for a pass" if trainer.drawn < trainer.steps.count else ""),
        ),
        ("processes", _describe_processes(trainer)),
        ("rollout", describe_rollout(trainer)),
        ("speed", ", ".join(f"{name} {_switch(state)}" for name, state in levers.items())),
        ("memory", _describe_memory(trainer)),
        ("run", str(trainer.folder.path)),
    ]


def _describe_term(term: RewardConfig) -> str:
    normalized = {"none": "", "std": " / std", "range": f" of range {term.range}"}[term.normalize]
    return f"{term.weight:g} x {term.title}{normalized}"


def _describe_processes(trainer: Any) -> str:
    distributed, size = trainer.config.distributed, trainer.group.size
    if not distributed.needs_deepspeed(size):
        return "1"
    offload = "" if distributed.offload == "none" else f", {distributed.offload} offloaded to the host"
    return f"{size}, ZeRO stage {distributed.zero_stage}{offload}"


def _describe_memory(trainer: Any) -> str:
    config, sizes = trainer.config, trainer.microbatches
    kinds = {True: " (auto)", False: ""}
    return ", ".join(
        [
            f"microbatch {sizes.rollout}{kinds[sizes.automatic('rollout')]} in rollout",
            f"{sizes.train}{kinds[sizes.automatic('train')]} in replay",
            f"gradient checkpointing {_switch(config.train.gradient_checkpointing)}",
            f"optimizer {config.train.optimizer}",
            f"trajectories on the {config.trajectories.device}",
            f"VAE tiling {_switch(config.model.vae_tiling)}",
            f"text encoder {'released' if config.model.free_text_encoder else 'kept'}",
        ]
    )


def _switch(state: bool | str) -> str:
    return state if isinstance(state, str) else "on" if state else "off"
