"""One iteration of full fine-tuning on a UNet of SDXL's size with random weights: ZeRO-3 with offload against local.

    python -m benchmarks.sharding                      # on a GPU with 80 GB; results to profiles/results/<device>/
    python -m benchmarks.sharding --width 32 --processes 2     # a small one, anywhere

Each engine runs in its own processes. The results are the memory taken from the device, in which no other
process may hold any (on a CPU: the peak of the process), seconds of the iteration, and the plan's estimate.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

import loopfast
from benchmarks.keep import device_slug
from benchmarks.race.models import sd_small
from loopfast.config import config_to_yaml, parse_config
from loopfast.planning import as_dict, plan
from loopfast.policies.portable import save_portable
from loopfast.run.tracking import read_metrics

RUN = """\
run: {name: run, trackers: []}
model: {dtype: bfloat16, tune: full}
prompts: {source: "embedded:color"}
reward: [{name: jpeg_compressibility}]
algorithm: {samples_per_prompt: 4}
rollout: {prompts_per_iteration: 2, steps: 4, microbatch: 1}
train: {iterations: 1, updates_per_iteration: 2, steps: all, warmup_updates: 0, microbatch: 1}
evaluation: {every: 0, images_per_prompt: 1, limit_prompts: 2, preview_images: 0}
checkpoint: {every: 1, keep: 1, keep_best: false}
"""

ENGINES = {
    "local": [],
    "ZeRO-3, all offloaded": ["distributed.zero_stage=3", "distributed.offload=all"],
}


def write_model(folder: Path, width: int, device: str = "cpu") -> int:
    """Writes a pipeline with a UNet of SDXL's blocks and depths, ``width`` channels wide (SDXL: 320); returns its
    parameters.

    The weights are drawn on the device, because a CPU needs minutes for billions of them. SDXL's own conditioning and
    its wide text are absent: 2,243 million parameters instead of 2,567.
    """
    torch.manual_seed(0)
    pipeline = sd_small()
    with torch.device(device):
        unet = UNet2DConditionModel(
            sample_size=32,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(width, 2 * width, 4 * width),
            layers_per_block=2,
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=tuple(max(1, channels // 64) for channels in (width, 2 * width, 4 * width)),
            cross_attention_dim=pipeline.unet.config.cross_attention_dim,
            use_linear_projection=True,
        )
    pipeline.register_modules(unet=unet.to(torch.bfloat16))
    save_portable(pipeline, folder)
    return sum(parameter.numel() for parameter in unet.parameters())


def measure(model: Path, folder: Path, processes: int, overrides: list[str]) -> dict[str, Any]:
    """Returns an engine's peak bytes and seconds of an iteration, and the plan's bytes."""
    given = [f"model.pretrained={model}", f"run.directory={folder}", *overrides]
    config = parse_config(RUN, given)
    file = folder / "config.yaml"
    file.write_text(config_to_yaml(config), "utf-8")
    command = ["train"] if processes == 1 else ["launch", "--nproc", str(processes)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = [sys.executable, "-m", "loopfast", *command, "--quiet", "--config", str(file)]
    subprocess.run(run, check=True, env=environment)
    line = read_metrics(folder / "run" / "metrics.jsonl")[-1]
    planned = as_dict(plan(config, gpus=processes))
    [stage] = [stage for stage in planned["stages"] if stage["stage"] == config.distributed.zero_stage]
    return {
        "peak_bytes": line.get("device_memory_bytes", line["peak_memory_bytes"]),
        "planned_bytes": stage["total"],
        "seconds_iteration": line["seconds_iteration"],
        "ratio_max_deviation": line["ratio_max_deviation"],
    }


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sharding", description=__doc__)
    parser.add_argument("--width", type=int, default=320, help="channels of the first block; SDXL has 320")
    parser.add_argument("--processes", type=int, default=1, help="processes of ZeRO-3, one for each GPU")
    parser.add_argument("--output", type=Path, help="default: profiles/results/<device>/sharding.json")
    arguments = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if on_gpu else "CPU"
    with tempfile.TemporaryDirectory(prefix="loopfast-sharding-") as scratch:
        parameters = write_model(Path(scratch) / "model", arguments.width, "cuda" if on_gpu else "cpu")
        results = {}
        for name, overrides in ENGINES.items():
            folder = Path(scratch) / name.replace(" ", "-").replace(",", "")
            folder.mkdir()
            processes = arguments.processes if overrides else 1
            results[name] = {"processes": processes} | measure(
                Path(scratch) / "model", folder, processes, overrides
            )
    record = {
        "date": date.today().isoformat(),
        "device": device,
        "torch": torch.__version__,
        "loopfast": loopfast.__version__,
        "parameters": parameters,
        "engines": results,
    }
    text = json.dumps(record, indent=2)
    print(text)
    output = arguments.output
    if output is None and on_gpu:
        output = Path("profiles/results") / device_slug(device) / "sharding.json"
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text + "\n", "utf-8")
        print(f"written to {output}")


if __name__ == "__main__":
    main()
