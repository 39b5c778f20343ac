"""Describes a run when it starts and when it ends."""

from __future__ import annotations

from pathlib import Path

import torch

from loopfast.config import RewardConfig
from loopfast.policies import read_prompts
from loopfast.prompts import Prompt
from loopfast.run.tracking import read_metrics
from loopfast.training.run import Run
from loopfast.training.state import TrainState
from loopfast_kernels import info


def announce(run: Run, state: TrainState) -> None:
    """Shows the run's header, and warns about prompts that the text encoders truncate."""
    facts = describe_run(run)
    run.display.header("loopfast train", facts)
    run.world.on_main(lambda: run.folder.write_summary(facts))
    if run.world.is_main:
        _warn_of_cut_prompts(run)
    run.display.start(run.config.train.iterations, state.iteration)


def conclude(run: Run, state: TrainState, exported: Path, report: Path) -> None:
    """Shows a summary of the run. Only rank 0 calls it."""
    lines = read_metrics(run.folder.path / "metrics.jsonl")
    evaluated = [line for line in lines if "eval_reward" in line]
    deviation = max(line.get("ratio_max_deviation", 0.0) for line in lines)
    base, final = evaluated[0]["eval_reward"], evaluated[-1]["eval_reward"]
    run.display.finish(
        [
            ("base reward", f"{base:.3f}"),
            ("final reward", f"{final:.3f} ({final - base:+.3f})"),
            ("images", f"{state.images}"),
            ("time", f"{evaluated[-1]['seconds']:.0f} s"),
            *([("ratio off by", f"{deviation:.2g} at first")] if deviation else []),
            ("model", str(exported)),
            ("report", str(report)),
        ]
    )


def _warn_of_cut_prompts(run: Run) -> None:
    """Warns about prompts that the model's text encoders truncate."""
    source, evaluation = run.config.prompts.source, run.config.evaluation
    read: dict[str, list[Prompt]] = {source: run.prompts}
    if evaluation.prompts is not None:
        read.setdefault(evaluation.prompts, run.evaluation_prompts[: evaluation.limit_prompts])
    for name, prompts in read.items():
        found = read_prompts(run.sampler.policy.text_limits, [prompt.text for prompt in prompts])
        if found.warning:
            run.display.warning(f"prompts {name}: {found.warning} (loopfast config check lists them)")


def describe_rollout(run: Run) -> str:
    """Returns a line with the rollout's performance options."""
    sampler, config = run.sampler, run.config.rollout
    graphs = sampler.model.device.type == "cuda" and config.cuda_graph
    replica = "off"
    if sampler.rollout_copy is not None:
        merged = ", LoRA merged" if config.merge_lora else ""
        dtype = str(sampler.model.dtype).removeprefix("torch.")
        gathered = "" if sampler.rollout_copy.resident else ", gathered for each rollout"
        replica = f"{dtype} on {sampler.model.device}{merged}{gathered}"
    return (
        f"stochastic steps {config.stochastic_steps}, CUDA graph {'on' if graphs else 'off'}, replica {replica}, "
        f"reward worker {run.reward_worker}"
    )


def describe_run(run: Run) -> list[tuple[str, str]]:
    """Returns the lines of the header: names and texts."""
    config, sampler = run.config, run.sampler
    policy, algorithm, settings = sampler.policy, config.algorithm, config.train
    steps = config.rollout.steps
    images = config.images_per_iteration
    pairs = images * run.trained_per_trajectory // settings.updates_per_iteration
    left_out = [str(step) for step in range(steps) if step not in run.steps.trained_steps]
    reason = {"auto": " (each would outweigh the others)", "all": " (deterministic)"}.get(settings.steps, "")
    options = {**policy.performance_options, "screening": run.screening}
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
        ("prompts", f"{run.prompts.summary()} from {config.prompts.source}"),
        ("reward", ", ".join(_describe_term(term) for term in config.reward)),
        (
            "an iteration",
            f"{images} images, {settings.updates_per_iteration * settings.inner_epochs} updates of {pairs} pairs",
        ),
        (
            "steps",
            f"{run.steps.count} of {steps} trained"
            + (f", a window of {len(run.steps.trained_steps)}" if run.steps.window else "")
            + (f", not {', '.join(left_out)}{reason}" if left_out else "")
            + (
                f"; {run.trained_per_trajectory} of them drawn for a pass"
                if run.trained_per_trajectory < run.steps.count
                else ""
            ),
        ),
        ("processes", _describe_processes(run)),
        ("rollout", describe_rollout(run)),
        ("speed", ", ".join(f"{name} {_switch(state)}" for name, state in options.items())),
        ("memory", _describe_memory(run)),
        ("run", str(run.folder.path)),
    ]


def _describe_term(term: RewardConfig) -> str:
    normalized = {"none": "", "std": " / std", "range": f" of range {term.range}"}[term.normalize]
    return f"{term.weight:g} x {term.title}{normalized}"


def _describe_processes(run: Run) -> str:
    distributed, size = run.config.distributed, run.world.size
    if not distributed.needs_deepspeed(size):
        return "1"
    offload = "" if distributed.offload == "none" else f", {distributed.offload} offloaded to the host"
    return f"{size}, ZeRO stage {distributed.zero_stage}{offload}"


def _describe_memory(run: Run) -> str:
    config, sizes = run.config, run.microbatches
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
