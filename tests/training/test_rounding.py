"""What happens where a processor rounds two equal calls of the model differently."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from rich.console import Console
from torch import Tensor

import loopfast.training.train as training
from loopfast.config import Config
from loopfast.errors import LoopfastError
from loopfast.policies.families.sd import StableDiffusionPolicy
from loopfast.run.console import Display
from loopfast.run.tracking import read_metrics
from loopfast.schedules import transition_schedule
from loopfast.training.rounding import rounding_bound
from loopfast_kernels import transition_logprob

MakeConfig = Callable[..., Config]


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bound_lies_between_rounding_and_errors(dtype: torch.dtype, mean: bool) -> None:
    rows, shape, step = 500, (4, 16, 16), 3
    schedule = transition_schedule(DDIMScheduler(clip_sample=False), 10)
    bound = rounding_bound(schedule, [step], dtype=dtype, shape=shape, mean=mean)
    a, b, sigma = schedule.table64[step]
    steps = torch.full((rows,), step)
    sample, output, noise, error = torch.randn(4, rows, *shape, dtype=torch.float64)
    following = a * sample + b * output + sigma * noise

    def change(relative: float) -> float:
        outputs = (output, output * (1 + relative * error))
        first, second = (
            transition_logprob(
                each, sample, following, schedule.table64, steps, reduction="mean" if mean else "sum"
            )
            for each in outputs
        )
        return float((second - first).abs().max())

    eps = torch.finfo(dtype).eps
    assert change(4 * eps) < bound < change(400 * eps)


def test_guidance_multiplies_what_rounding_does() -> None:
    schedule = transition_schedule(DDIMScheduler(clip_sample=False), 10)
    plain, guided = (
        rounding_bound(schedule, [3], dtype=torch.float32, shape=(4, 8, 8), guidance_scale=scale)
        for scale in (1.0, 4.0)
    )
    assert guided == pytest.approx(5 * plain)  # the root of 4 squared and 3 squared


def train(config: Config, relative: float) -> tuple[Path, str, str]:
    """A run whose training calls are off by relative noise: its folder, what it showed, and its warnings."""
    predict = StableDiffusionPolicy.predict

    def noisy(self: StableDiffusionPolicy, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        output, unconditional = predict(self, *args, **kwargs)
        if torch.is_grad_enabled():
            output = output * (1 + relative * torch.randn_like(output))
        return output, unconditional

    shown, warnings = io.StringIO(), io.StringIO()
    display = Display(console=Console(file=shown, width=400), errors=Console(file=warnings, width=1000))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StableDiffusionPolicy, "predict", noisy)
        folder = training.train(config, display=display)
    return folder, shown.getvalue(), warnings.getvalue()


def test_a_run_goes_on_where_equal_calls_are_rounded_differently(small_config: MakeConfig) -> None:
    folder, shown, warnings = train(small_config("train.iterations=2"), 1e-6)
    [warning] = warnings.splitlines()
    first, second = (line["ratio_max_deviation"] for line in read_metrics(folder / "metrics.jsonl")[1:])
    assert 0 < first < 1e-3
    assert 0 < second < 1e-3
    assert warning.startswith(
        f"warning: iteration 1: before the first update the ratio differs from 1 by up to {first:.2g}, and for 0.0% "
    )
    assert "The run goes on" in warning
    assert f"{max(first, second):.2g} at first" in shown
    assert "Ratio deviation" in (folder / "report.html").read_text("utf-8")


def test_what_rounding_does_not_explain_stops_the_run(small_config: MakeConfig) -> None:
    with pytest.raises(LoopfastError, match="by more than rounding explains"):
        train(small_config("train.iterations=1"), 0.1)
