"""Gradients that overflow float16: all processes repeat the update together, by our loss scale or by DeepSpeed's."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from safetensors.torch import load_file

from loopfast.run.tracking import read_metrics
from tests.distributed.conftest import NO_REPORT, Runs, distance, saved

# DeepSpeed refuses float16 where oneDNN has no kernels for it. PyTorch computes it all the same, slowly.
WITH_FLOAT16 = """\
import loopfast.system.processor
from deepspeed.accelerator import get_accelerator
loopfast.system.processor.has_kernels = lambda dtype: True
type(get_accelerator()).is_fp16_supported = lambda self: True
"""


@pytest.mark.parametrize(("size", "stage"), [(2, 0), (2, 2), (2, 3)])
def test_an_update_that_overflows_is_repeated_in_all_processes(
    size: int, stage: int, runs: Runs, pipeline_folder: Path
) -> None:
    name = f"overflow-{size}-{stage}"
    options = ("model.dtype=float16", "train.iterations=1", f"distributed.zero_stage={stage}")
    folder = runs.train(name, size, *options, before=WITH_FLOAT16 + NO_REPORT)
    updates = runs.updates(name)
    assert len(updates) == 2
    assert all(math.isfinite(update["grad_norm"]) for update in updates)
    overflows = sum(update["overflows"] for update in updates)
    assert overflows > 0
    assert read_metrics(folder / "metrics.jsonl")[-1]["overflows"] == overflows
    [warning] = runs.ranks.errors(0).splitlines()
    assert warning.startswith("warning: iteration 1: the gradient overflowed float16")
    base = load_file(pipeline_folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert distance(saved(folder), base) > 1e-6
