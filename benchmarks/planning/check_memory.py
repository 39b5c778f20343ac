"""Compares the estimate of `loopfast plan` with the peak memory of real runs, on this machine's GPU or else its CPU.

    python -m benchmarks.planning.check_memory            # a table in Markdown, in about ten minutes
    python -m benchmarks.planning.check_memory full lora  # only these cases

Each case trains a random model of Stable Diffusion's block structure for one iteration, twice, each time in a separate
process. Once PyTorch's profiler counts the tensors that an update allocates, and once the whole process is
measured: on a CPU by VmHWM of Linux, on a GPU by the metric `device_memory_bytes`, so no other process may use the GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from loopfast.system.allocator import reuse_freed_memory

RUN = """\
run: {name: check, trackers: []}
model: {pretrained: MODEL, device: DEVICE}
prompts: {source: "embedded:color"}
reward: [{name: jpeg_compressibility}]
algorithm: {samples_per_prompt: 2}
rollout: {prompts_per_iteration: 2, steps: 4, guidance_scale: 3.0, microbatch: 4}
train: {iterations: 1, updates_per_iteration: 2, steps: all, microbatch: 4, warmup_updates: 0}
evaluation: {every: 0, images_per_prompt: 1, limit_prompts: 2, preview_images: 0}
checkpoint: {every: 100}
"""
CASES = {
    "full": [],
    "full, microbatch 8": ["rollout.prompts_per_iteration=4", "rollout.microbatch=8", "train.microbatch=8"],
    "full, one call an update": ["train.microbatch=8"],
    "full, checkpointing": ["train.gradient_checkpointing=true"],
    "full, bfloat16": ["model.dtype=bfloat16"],
    "full, no guidance": ["rollout.guidance_scale=1.0"],
    "full, reference": ["algorithm.kl_weight=0.1"],
    "full, diffusers' layers": ["model.fast_layers=off", "model.attention=sdpa"],
    "full, replica in bfloat16": ["rollout.dtype=bfloat16", "train.on_policy_check=off"],
    "lora": ["model.tune=lora"],
    "lora, microbatch 8": [
        "model.tune=lora",
        "rollout.prompts_per_iteration=4",
        "rollout.microbatch=8",
        "train.microbatch=8",
    ],
    "lora, bfloat16": ["model.tune=lora", "model.dtype=bfloat16"],
    "lora, checkpointing": ["model.tune=lora", "train.gradient_checkpointing=true"],
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def tensors_held(tree: Iterable[Any]) -> int:
    """Returns the most bytes that PyTorch's allocator for `DEVICE` held at one time, from a profile's events."""
    found, events = [], list(tree)
    while events:
        event = events.pop()
        events.extend(event.children)
        allocation = event.tag == torch._C._profiler._EventType.Allocation
        if allocation and event.extra_fields.device.type == DEVICE:
            found.append((event.start_time_ns, event.extra_fields.alloc_size))
    now = peak = 0
    for _, size in sorted(found):
        now += size
        peak = max(peak, now)
    return peak


@contextmanager
def recording_replay() -> Iterator[list[int]]:
    """Context in which each update adds the peak bytes of its tensors, in all of its model calls, to the list."""
    from loopfast.training.update_pass import UpdatePass
    from loopfast_kernels import buffers

    peaks: list[int] = []
    losses = UpdatePass.losses

    def profiled(*args: Any, **kwargs: Any) -> Any:
        buffers.clear()  # the profiler does not see a block that is used again
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            result = losses(*args, **kwargs)
        peaks.append(tensors_held(found.profiler.kineto_results.experimental_event_tree()))
        return result

    UpdatePass.losses = profiled  # type: ignore[method-assign]
    try:
        yield peaks
    finally:
        UpdatePass.losses = losses  # type: ignore[method-assign]


def run(text: str, overrides: list[str], *, tensors: bool) -> int:
    """Trains with a configuration; returns the peak bytes of the update's tensors, or of this whole process."""
    from loopfast.config import parse_config
    from loopfast.run.console import Display
    from loopfast.run.tracking import read_metrics
    from loopfast.training.train import train

    with recording_replay() if tensors else nullcontext([]) as peaks, Display(quiet=True) as display:
        folder = train(parse_config(text, overrides), display=display)
    if tensors:
        return max(peaks)
    if DEVICE == "cuda":
        return max(line["device_memory_bytes"] for line in read_metrics(folder / "metrics.jsonl"))
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def measure(text: str, overrides: list[str], *, tensors: bool) -> int:
    """Calls `run` in a separate process."""
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.planning.check_memory", "--worker"],
        input=json.dumps([text, overrides, tensors]),
        capture_output=True,
        text=True,
        env=environment,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return int(done.stdout.splitlines()[-1])


def planned(text: str, overrides: list[str]) -> dict[str, int]:
    """Returns the plan's bytes for both."""
    from loopfast.config import parse_config
    from loopfast.planning.architectures import load_architecture
    from loopfast.planning.memory import Resources, footprint

    config = parse_config(text, overrides)
    found = footprint(config, load_architecture(config.model), Resources(DEVICE, 2**40))
    replay = sum(found.phases["replay"][part] for part in ("gradients", "activations"))
    return {"tensors": replay, "process": found.total}


def write_pipeline(folder: Path, latents: int = 32, layers: int = 2) -> Path:
    """Writes a pipeline of Stable Diffusion 1.5's structure; with 2 layers a block its denoiser has 34 M random
    weights.
    """
    from benchmarks.race.models import sd_small
    from loopfast.policies.portable import save_portable

    pipeline = sd_small(layers)
    pipeline.unet.register_to_config(sample_size=latents)
    save_portable(pipeline, folder)
    return folder


def main(names: list[str]) -> None:
    """Runs the command."""
    heads = ("work", "tensors of the replay", "measured", "", "whole process", "measured", "")
    print(f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", sep="\n")
    with tempfile.TemporaryDirectory() as folder:
        text = RUN.replace("MODEL", str(write_pipeline(Path(folder) / "model"))).replace("DEVICE", DEVICE)
        for index, name in enumerate(names or CASES):
            overrides = [*CASES[name], f"run.directory={folder}"]
            cells = [name]
            for key, expected in planned(text, overrides).items():
                named = [*overrides, f"run.name=check-{index}-{key}"]
                found = measure(text, named, tensors=key == "tensors")
                cells += [f"{size / 2**20:,.0f} MiB" for size in (expected, found)]
                cells.append(f"{expected / found - 1:+.0%}")
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["--worker"]:
        # as the command line does, before anything is allocated
        reuse_freed_memory()
        text, overrides, tensors = json.loads(sys.stdin.read())
        print(run(text, overrides, tensors=tensors))
    else:
        main(sys.argv[1:])
