"""A run's folder: where everything a run leaves behind is, and what may be resumed there."""

from __future__ import annotations

import json
import resource
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from loopfast.checkpoints import Checkpoint, CheckpointStore
from loopfast.config import Config, RewardConfig, config_to_yaml, load_config
from loopfast.console import Display
from loopfast.engines import needs_deepspeed
from loopfast.errors import CheckpointError, ConfigError
from loopfast.files import write_file, writing
from loopfast_kernels import info

if TYPE_CHECKING:
    from loopfast.train import Trainer

# What may differ between a run and its continuation: nothing that changes what came before.
_CHANGEABLE = {
    "run.directory",
    "run.trackers",
    "model.device",
    "rollout.cuda_graph",
    "rollout.device",
    "rollout.on_bad_reward",
    "rollout.replica",
    "rollout.reward_worker",
    "train.iterations",
    "train.on_policy_check",
    "evaluation.every",
    "checkpoint.every",
    "checkpoint.keep",
    "checkpoint.keep_best",
    "distributed.zero_stage",
    "distributed.offload",
    "distributed.timeout",
    "distributed.deepspeed",
}


class RunFolder:
    """``<run.directory>/<run.name>`` of a configuration."""

    def __init__(self, config: Config) -> None:
        self.path = Path(config.run.directory).expanduser() / config.run.name
        self.checkpoints = CheckpointStore(
            self.path / "checkpoints", config.checkpoint.keep, config.checkpoint.keep_best
        )
        self._config = config

    def open(self, resume: str | None, display: Display) -> Checkpoint | None:
        """Prepares the folder for a new run, or finds the checkpoint to go on from.

        Args:
            resume: None for a new run; ``auto`` for the newest good checkpoint of this folder, if any; or the path of
                a checkpoint.

        Raises:
            ConfigError: a new run would overwrite another, or the configuration is not that of the run to resume.
            CheckpointError: the checkpoint cannot be used.
            LoopfastError: the folder cannot be written.
        """
        checkpoint = None
        if resume is None:
            self._require_unused()
        elif resume == "auto":
            checkpoint = self.checkpoints.latest(display.warning)
            if checkpoint is None and self.checkpoints.paths():
                raise CheckpointError(f"none of the checkpoints in {self.checkpoints.directory} can be used")
        else:
            checkpoint = self.checkpoints.load(Path(resume).resolve())
        origin = checkpoint.path.resolve().parent.parent if checkpoint else self.path.resolve()
        if checkpoint is not None:
            self._require_same(origin / "config.yaml")
        with writing(self.path):
            if checkpoint is not None and origin != self.path.resolve():
                self._require_unused()
                self._continue_record(origin, checkpoint.iteration)
            write_file(self.path / "config.yaml", config_to_yaml(self._config).encode())
        return checkpoint

    def _require_unused(self) -> None:
        if self.checkpoints.paths() or (self.path / "metrics.jsonl").exists():
            raise ConfigError(
                f"{self.path} already holds a run: go on with it (--resume auto), or give this one another name "
                f"(--set run.name=...)"
            )

    def _continue_record(self, origin: Path, iteration: int) -> None:
        """Copies what another run recorded up to the iteration that this one goes on from."""
        self.path.mkdir(parents=True, exist_ok=True)
        if (origin / "metrics.jsonl").exists():
            shutil.copy(origin / "metrics.jsonl", self.path)  # the tracker cuts off what came later
        for name in ("evaluation", "images"):
            for file in sorted((origin / name).glob("iteration-*")):
                if int(file.stem.removeprefix("iteration-")) <= iteration:
                    (self.path / name).mkdir(exist_ok=True)
                    shutil.copy(file, self.path / name)

    def _require_same(self, file: Path) -> None:
        if not file.is_file():
            raise CheckpointError(f"{file.parent} is not a run's folder: there is no config.yaml in it")
        before, now = (_flatten(_comparable(config)) for config in (load_config(file), self._config))
        changed = [
            f"{key} (was {before.get(key)}, is {now.get(key)})"
            for key in sorted({*before, *now} - _CHANGEABLE - {"run.name"})
            if before.get(key) != now.get(key)
        ]
        if changed:
            raise ConfigError(f"cannot resume {file.parent} with another configuration: {', '.join(changed)}")

    def write_summary(self, facts: Sequence[tuple[str, str]]) -> None:
        """Keeps the header's lines for the report."""
        with writing(self.path):
            write_file(self.path / "summary.json", json.dumps({"facts": facts}, indent=1).encode())

    def save_failure(
        self,
        iteration: int,
        images: Sequence[Tensor],
        prompts: Sequence[str],
        rank: int | None = None,
        *,
        place: str = "failures",
    ) -> Path:
        """Keeps the images that something was wrong with, with their prompts.

        Args:
            iteration: the one they are of.
            images: N float ``[3, H, W]`` in [0, 1]; NaN is drawn black.
            prompts: N texts.
            rank: of the process they are from, where each has its own.
            place: the folder of the run they go to, those that a run stopped at to ``failures``.

        Returns:
            The folder they are in.

        Raises:
            LoopfastError: the folder cannot be written.
        """
        process = "" if rank is None else f"-rank-{rank}"
        folder = self.path / place / f"iteration-{iteration:06d}{process}"
        names = [f"{index:03d}.png" for index in range(len(prompts))]
        with writing(folder):
            write_file(
                folder / "prompts.json", json.dumps(dict(zip(names, prompts, strict=True)), indent=1).encode()
            )
            for name, image in zip(names, images, strict=True):
                save_image(image, folder / name)
        return folder


def save_image(image: Tensor, path: Path) -> None:
    """Writes one float image ``[3, H, W]`` in [0, 1]; NaN is drawn black."""
    pixels = (image.float().nan_to_num(0).clamp(0, 1) * 255).round().to(torch.uint8)
    Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy()).save(path)


def _comparable(config: Config) -> dict[str, Any]:
    """Of a reward server it is where and how it is asked that is configured: it may move."""
    sections = config.model_dump(mode="json")
    for term in sections["reward"]:
        if term["name"] == "http":
            term["options"] = {}
    return sections


def _flatten(section: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(section, dict):
        return {prefix: section}
    return {
        key: value
        for name, part in section.items()
        for key, value in _flatten(part, f"{prefix}.{name}" if prefix else name).items()
    }


def memory_used(device: torch.device) -> dict[str, int]:
    """The metrics of a process's memory in bytes, by the names of `loopfast.tracking.METRICS`.

    On a CUDA device torch's tensors are a part of what its allocator has reserved, which is a part of what is taken:
    beside it lie the CUDA context, workspaces of libraries, NCCL's buffers, and whatever other processes hold.
    On a CPU there is only the peak of the whole process.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return {
            "peak_memory_bytes": torch.cuda.max_memory_allocated(device),
            "peak_reserved_bytes": torch.cuda.max_memory_reserved(device),
            "device_memory_bytes": total - free,
        }
    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}


def describe_rollout(trainer: Trainer) -> str:
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


def describe_run(trainer: Trainer) -> list[tuple[str, str]]:
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
        ("prompts", f"{len(trainer.prompts)} from {config.prompts.source}"),
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


def _describe_processes(trainer: Trainer) -> str:
    distributed, size = trainer.config.distributed, trainer.group.size
    if not needs_deepspeed(trainer.config, size):
        return "1"
    offload = "" if distributed.offload == "none" else f", {distributed.offload} offloaded to the host"
    return f"{size}, ZeRO stage {distributed.zero_stage}{offload}"


def _describe_memory(trainer: Trainer) -> str:
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
