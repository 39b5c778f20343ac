from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from loopfast.errors import LoopfastError, NonFiniteError
from loopfast.training.checks import ON_POLICY_TOLERANCE, check_ratio, explained, warn_of_overflows
from loopfast.training.rounding import rounding_bound
from loopfast.training.update import UpdateStatistics
from tests.training.toys import MakeToy, Toy, toy_config


def done(deviation: float = 0.0, overflows: int = 0) -> UpdateStatistics:
    """An update whose largest ratio is so far from 1, a quarter of them farther than the clip range."""
    return UpdateStatistics(0.0, 0.0, 0.0, 0.0, 0.25, deviation, 0.0, 0.0, overflows=overflows)


def explicable(toy: Toy) -> float:
    """The largest difference of the first iteration's ratios from 1 that rounding explains."""
    config, (schedule, steps) = toy.run.config, toy.run.steps.for_iteration(0, 0)
    bound = rounding_bound(
        schedule,
        steps,
        dtype=toy.policy.dtype,
        shape=(2, 2),
        guidance_scale=config.rollout.guidance_scale,
        mean=config.algorithm.logprob == "mean",
    )
    return math.expm1(bound)


@pytest.mark.parametrize(
    ("check", "deviation", "updates"), [("error", 0.0, 0), ("off", 0.5, 0), ("error", 0.5, 1)]
)
def test_a_ratio_is_checked_before_the_first_update_and_where_it_is_asked_for(
    check: str, deviation: float, updates: int, make_toy: MakeToy
) -> None:
    toy = make_toy(f"train.on_policy_check={check}")
    toy.state.updates = [{"loss": 1.0}] * updates
    check_ratio(toy.run, toy.state, done(deviation))
    assert toy.heard.warnings == []


# What the largest difference that rounding explains depends on.
ROUNDED = pytest.mark.parametrize(
    "override",
    [
        "rollout.replica=resident",
        "rollout.guidance_scale=3.0",
        "algorithm.logprob=mean",
        "rollout.stochastic_steps=window:1",
        "model.dtype=bfloat16",
    ],
)


@ROUNDED
@pytest.mark.parametrize("check", ["error", "warn"])
def test_a_difference_that_rounding_explains_is_said_once(
    check: str, override: str, make_toy: MakeToy
) -> None:
    toy = make_toy(f"train.on_policy_check={check}", override)
    deviation = 0.9 * explicable(toy)
    for _ in range(2):
        check_ratio(toy.run, toy.state, done(deviation))
    [warning] = toy.heard.warnings
    assert warning.startswith(
        f"iteration 1: before the first update the ratio differs from 1 by up to {deviation:.2g}, and for 25.0% of "
        "the pairs by more than the clip range; equal calls are rounded differently here (rollout.microbatch and "
        "train.microbatch are both 6). The run goes on. "
    )
    assert toy.state.warned_of_rounding


@ROUNDED
def test_a_larger_difference_between_equal_calls_is_an_error(override: str, make_toy: MakeToy) -> None:
    toy = make_toy(override)
    with pytest.raises(LoopfastError, match="disagree, by more than rounding explains, though ") as caught:
        check_ratio(toy.run, toy.state, done(1.1 * explicable(toy)))
    # all processes know the same ratios: they can save together
    assert caught.value.on_all_ranks
    assert toy.heard.warnings == []


def test_a_larger_difference_is_said_every_time_where_a_warning_is_asked_for(make_toy: MakeToy) -> None:
    toy = make_toy("train.on_policy_check=warn")
    for toy.state.iteration in range(2):
        check_ratio(toy.run, toy.state, done(0.5))
    assert [warning[:12] for warning in toy.heard.warnings] == ["iteration 1:", "iteration 2:"]
    assert not toy.state.warned_of_rounding


CAUSES = {
    "Give rollout.microbatch (3) and train.microbatch (4) the same value": (
        "rollout.microbatch=3",
        "train.microbatch=4",
    ),
    "rollout.dtype (bfloat16) is not model.dtype (float32)": ("rollout.dtype=bfloat16",),
    "rollout.merge_lora=true rounds otherwise than the adapter that is trained": (
        "model.tune=lora",
        "rollout.merge_lora=true",
    ),
}


@pytest.mark.parametrize("cause", CAUSES)
def test_a_key_that_makes_other_calls_is_named_beyond_the_tolerance(cause: str, make_toy: MakeToy) -> None:
    toy = make_toy(*CAUSES[cause])
    check_ratio(toy.run, toy.state, done(ON_POLICY_TOLERANCE))
    assert toy.heard.warnings == []
    with pytest.raises(LoopfastError) as caught:
        check_ratio(toy.run, toy.state, done(1.1 * ON_POLICY_TOLERANCE))
    assert str(caught.value).endswith(f"; rollout and replay disagree. {cause}")


def test_another_device_is_a_cause(make_toy: MakeToy, tmp_path: Path) -> None:
    """A machine without a second kind of device can only be told that there is one."""
    toy = make_toy("rollout.replica=resident")
    assert toy.run.sampler.rollout_copy is not None
    toy.run.sampler.rollout_copy.exact = False
    toy.run.config = toy_config(tmp_path, "rollout.device=cuda:7")
    with pytest.raises(LoopfastError, match=r"rollout\.device \(cuda:7\) is not model\.device \(cpu\)"):
        check_ratio(toy.run, toy.state, done(0.5))


@pytest.mark.parametrize(
    ("device", "dtype", "remedy"),
    [
        ("cuda", torch.bfloat16, "model.attention: flash may make it 0"),
        ("cpu", torch.bfloat16, "model.dtype: float32 makes it smaller"),
        ("cpu", torch.float32, "it matters only where it comes near the clip range"),
    ],
)
def test_what_makes_rounding_smaller_is_said(
    device: str, dtype: torch.dtype, remedy: str, make_toy: MakeToy
) -> None:
    toy = make_toy()
    toy.policy.device, toy.policy.dtype = torch.device(device), dtype
    check_ratio(toy.run, toy.state, done(0.9 * explicable(toy)))
    [warning] = toy.heard.warnings
    assert warning.endswith(
        f"ratio_max_deviation in metrics.jsonl says by how much in each iteration; {remedy}"
    )
    toy.policy.device = torch.device("cpu")


def test_a_loss_that_is_not_finite_is_told_with_prompts_and_images(make_toy: MakeToy) -> None:
    toy = make_toy("rollout.microbatch=2", "train.microbatch=2")
    batch = toy.sampled()
    assert toy.state.rollout is not None
    with pytest.raises(NonFiniteError) as caught, explained(toy.run, toy.state, batch):
        raise NonFiniteError("the loss is not finite", (1, 4, 5))
    kept = toy.run.folder.path / "failures" / "iteration-000001"
    assert str(caught.value) == f"iteration 1: the loss is not finite; images and prompts are in {kept}"
    assert (caught.value.rows, caught.value.on_all_ranks) == ((1, 4, 5), True)
    # as many as a call has rows: more may not fit into memory
    prompts = json.loads((kept / "prompts.json").read_text("utf-8"))
    assert list(prompts.values()) == [batch.texts[0], batch.texts[2]]
    images = toy.policy.decode(toy.state.rollout.trajectories.final[[1, 4]])
    for name, image in zip(prompts, images, strict=True):
        with Image.open(kept / name) as picture:
            assert picture.getpixel((7, 0)) == tuple((image[:, 0, 7] * 255).round().int().tolist())


def test_another_error_in_an_update_is_left_as_it_is(make_toy: MakeToy) -> None:
    toy = make_toy()
    batch, error = toy.sampled(), LoopfastError("something else")
    with pytest.raises(LoopfastError) as caught, explained(toy.run, toy.state, batch):
        raise error
    assert caught.value is error
    assert not (toy.run.folder.path / "failures").exists()


def test_overflows_are_said_once(make_toy: MakeToy) -> None:
    toy = make_toy()
    toy.state.pending = None
    for overflows, said in ((0, 0), (3, 1), (2, 1)):
        warn_of_overflows(toy.run, toy.state, done(overflows=overflows))
        assert len(toy.heard.warnings) == said
    assert toy.heard.warnings[0].startswith(
        "iteration 1: the gradient overflowed float16, so that an update was repeated 3 time(s)"
    )
