from __future__ import annotations

import io
import itertools
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

import loopfast.training.train as training
from loopfast.config import Config, load_config
from loopfast.errors import (
    CheckpointError,
    ConfigError,
    LoopfastError,
    MissingExtraError,
    NonFiniteError,
    RewardError,
)
from loopfast.policies.families.sd import StableDiffusionPolicy
from loopfast.run.console import Display
from loopfast.run.tracking import describe, read_metrics
from loopfast.training.facts import announce
from loopfast.training.loss import PolicyLoss
from loopfast.training.run import Run
from loopfast.training.setup import start
from loopfast.training.state import TrainState
from loopfast.training.update import UpdateStatistics
from loopfast_kernels import backend
from tests.rounding import no_deviation

MakeConfig = Callable[..., Config]
Weights = dict[str, Tensor]


def run(config: Config, resume: str | None = None) -> Path:
    return training.train(config, resume=resume, display=Display(quiet=True))


def weights(folder: Path, iteration: int) -> Weights:
    return load_file(folder / "checkpoints" / f"iteration-{iteration:06d}" / "policy.safetensors")


def relative_distance(found: Weights, expected: Weights) -> float:
    """Of all weights together: a tensor that was zero before training is the noise of its gradient's sign."""
    assert found.keys() == expected.keys()
    difference, norm = (
        torch.cat([part.flatten() for part in parts]).norm()
        for parts in ([found[name] - expected[name] for name in expected], expected.values())
    )
    return float(difference / norm)


def same(found: Weights, expected: Weights) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in expected)


# A run of which only the training is looked at.
BARE = ("evaluation.every=0", "checkpoint.every=2", "reward=[{name: jpeg_compressibility}]")
# The size of a JPEG changes by a whole byte with a pixel's last bit; this does not.
SMOOTH = "def reward(images, prompts, metadata):\n    return images.mean((1, 2, 3))\n"

GUIDED_AND_PADDED = ("rollout.guidance_scale=3.0", "rollout.microbatch=5", "train.microbatch=5")


@contextmanager
def memory_for(rows: int) -> Iterator[list[int]]:
    """Inside, a training call with more rows runs out of memory; gives the training calls' rows."""
    predict = StableDiffusionPolicy.predict
    calls: list[int] = []

    def limited(self: StableDiffusionPolicy, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            calls.append(len(sample))
            if len(sample) > rows:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return predict(self, sample, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StableDiffusionPolicy, "predict", limited)
        yield calls


def run_told(config: Config, resume: str | None = None) -> tuple[Path, list[str]]:
    """The run's folder, and the warnings it gave."""
    warnings = io.StringIO()
    display = Display(quiet=True, errors=Console(file=warnings, width=1000))
    return training.train(config, resume=resume, display=display), warnings.getvalue().splitlines()


@contextmanager
def predictions_in_training(change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, what the policy predicts where it is trained is changed; where it samples it is not."""
    predict = StableDiffusionPolicy.predict

    def changed(self: StableDiffusionPolicy, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        output, unconditional = predict(self, *args, **kwargs)
        return change(output) if torch.is_grad_enabled() else output, unconditional

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StableDiffusionPolicy, "predict", changed)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, make_config: MakeConfig) -> Path:
    return run(make_config(tmp_path_factory.mktemp("runs"), "run.trackers=[tensorboard]"))


def test_metrics_have_a_line_per_iteration_and_one_before_training(finished: Path) -> None:
    lines = read_metrics(finished / "metrics.jsonl")
    assert [line["iteration"] for line in lines] == [0, 1, 2, 3]
    assert [line["images"] for line in lines] == [0, 8, 16, 24]
    assert ["eval_reward" in line for line in lines] == [True, False, True, True]
    always = {"iteration", "images", "seconds", "peak_memory_bytes"}
    trained = {
        "reward_mean",
        "reward_std",
        "group_spread",
        "reward_jpeg_compressibility",
        "reward_jpeg_incompressibility",
        "loss",
        "kl",
        "clip_fraction",
        "zero_gradient",
        "screened_out",
        "ratio_max_deviation",
        "ratio_outside_clip",
        "on_policy_outside_clip",
        "logprob_change",
        "grad_norm",
        "learning_rate",
        "seconds_rollout",
        "seconds_reward",
        "seconds_replay",
        "seconds_optimizer",
        "seconds_iteration",
        "seconds_model",
        "images_per_second",
        "model_calls",
        "model_calls_per_second",
        "outside_model_share",
    }
    evaluated = {"eval_reward", "eval_jpeg_compressibility", "eval_jpeg_incompressibility", "seconds_eval"}
    for line in lines:
        expected = always | (trained if line["iteration"] else set())
        # a checkpoint's time is known when its iteration is recorded: it is in the next line
        expected |= {"seconds_checkpoint"} if line["iteration"] > 1 else set()
        assert set(line) == expected | (evaluated if "eval_reward" in line else set())
        assert all(describe(name) for name in line)
        assert all(isinstance(value, int | float) and math.isfinite(value) for value in line.values())
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds)
    assert seconds[0] > 0
    for line in lines[1:]:
        parts = sum(line[f"seconds_{name}"] for name in ("rollout", "reward", "replay", "optimizer"))
        assert 0 < line["seconds_model"] < parts <= line["seconds_iteration"] * (1 + 1e-9)
        share = line["outside_model_share"]
        assert share == pytest.approx(1 - line["seconds_model"] / line["seconds_iteration"])
        assert line["images_per_second"] == pytest.approx(8 / line["seconds_iteration"])
        # 8 images in 2 steps; 2 updates of 8 pairs, all of them in a call, of which the second may be screened
        kept = round(8 * (1 - 2 * line["screened_out"]))
        assert line["model_calls"] == 2 + 1 + (1 if kept == 8 else 2)
    assert lines[1]["reward_mean"] == pytest.approx(lines[1]["reward_jpeg_compressibility"], rel=1e-6)
    assert lines[1]["peak_memory_bytes"] > 1e8


def test_a_finished_run_leaves_everything_a_user_was_promised(finished: Path) -> None:
    for name in ("config.yaml", "metrics.jsonl", "report.html", "summary.json", "model/model_index.json"):
        assert (finished / name).stat().st_size > 0, name
    assert {path.stem for path in (finished / "images").iterdir()} == {
        f"iteration-{iteration:06d}" for iteration in (0, 2, 3)
    }
    assert list((finished / "tensorboard").glob("events.out.*"))
    assert sorted(path.name for path in (finished / "checkpoints").iterdir())[-1] == "iteration-000003"
    assert load_config(finished / "config.yaml").train.iterations == 3
    assert not (finished / "failures").exists()
    assert "<html" in (finished / "report.html").read_text("utf-8")


def test_evaluations_are_of_the_same_prompts_and_noise(finished: Path) -> None:
    first, last = (
        json.loads((finished / "evaluation" / f"iteration-{iteration:06d}.json").read_text("utf-8"))
        for iteration in (0, 3)
    )
    assert (first["iteration"], first["images"], last["iteration"], last["images"]) == (0, 0, 3, 24)
    assert [(item["prompt"], item["seed"]) for item in first["items"]] == [
        (item["prompt"], item["seed"]) for item in last["items"]
    ]
    assert len({item["seed"] for item in first["items"]}) == len(first["items"]) == 4
    assert first["reward"] == read_metrics(finished / "metrics.jsonl")[0]["eval_reward"] != last["reward"]
    assert set(first["by_category"]) == {"color"}
    with Image.open(finished / "evaluation" / "iteration-000000.png") as sheet:
        assert sheet.size == (2 * 32, 32)


def test_the_export_is_what_was_trained(finished: Path) -> None:
    exported = load_file(finished / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    assert same(exported, weights(finished, 3))


def test_the_same_configuration_trains_the_same_run(finished: Path, small_config: MakeConfig) -> None:
    again = run(small_config())
    assert same(weights(again, 3), weights(finished, 3))
    other = run(small_config("run.seed=1", "run.name=other", "train.iterations=1"))
    assert not same(weights(other, 1), weights(finished, 1))


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param((), id="plain"),
        pytest.param(("model.tune=lora", "model.lora.rank=2", *GUIDED_AND_PADDED), id="lora"),
        pytest.param(
            ("algorithm.name=grpo", "algorithm.logprob=mean", "rollout.steps=4", "train.steps=1:3"), id="grpo"
        ),
        pytest.param(("model.dtype=bfloat16", *GUIDED_AND_PADDED), id="bfloat16"),
        pytest.param(
            (
                "model.dtype=bfloat16",
                "model.tune=lora",
                "model.lora.rank=2",
                *GUIDED_AND_PADDED,
            ),
            id="bfloat16-lora",
        ),
        pytest.param(
            (
                "model.attention=flash",
                "model.channels_last=on",
                "model.free_text_encoder=true",
                "train.gradient_checkpointing=true",
                "trajectories.device=host",
                *GUIDED_AND_PADDED,
            ),
            id="performance-options",
        ),
    ],
)
def test_the_ratio_is_one_for_every_pair_before_the_first_update(
    overrides: tuple[str, ...], small_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    updates: list[list[Tensor]] = []

    class Recorded(PolicyLoss):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            result = super().__call__(*args, **kwargs)
            updates[-1].append(result.ratio.detach().clone())
            return result

    def update(*args: Any, **kwargs: Any) -> Any:
        updates.append([])
        return original(*args, **kwargs)

    original = training.update
    monkeypatch.setattr(training, "PolicyLoss", Recorded)
    monkeypatch.setattr(training, "update", update)
    # a screening's ratios would be counted, too
    config = small_config("train.iterations=2", "train.screening=off", *BARE, *overrides)
    folder = run(config)
    first, second, third, fourth = (torch.cat(ratios) for ratios in updates)
    pairs = 8 * (2 if config.train.steps == "1:3" else config.rollout.steps) // 2
    for ratios in (first, third):
        assert ratios.shape == (pairs,)
        assert float((ratios - 1).abs().max()) == no_deviation()
    for ratios in (second, fourth):
        assert not torch.equal(ratios, torch.ones(pairs))
    for line in read_metrics(folder / "metrics.jsonl")[1:]:
        assert line["ratio_max_deviation"] == no_deviation()


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_the_divergence_from_the_model_before_training_is_penalized(
    tune: str, small_config: MakeConfig
) -> None:
    options = ("train.iterations=2", "train.updates_per_iteration=1", f"model.tune={tune}")
    free = run(small_config(*options, "run.name=free"))
    held = run(small_config(*options, "run.name=held", "algorithm.kl_weight=0.5"))
    first, second = read_metrics(held / "metrics.jsonl")[1:]
    assert first["kl_reference"] == pytest.approx(0.0, abs=1e-7)
    assert second["kl_reference"] > 1e-6
    assert "kl_reference" not in read_metrics(free / "metrics.jsonl")[1]
    # in the first update there is nothing to hold back yet
    assert relative_distance(weights(held, 1), weights(free, 1)) < 1e-6
    assert not same(weights(held, 2), weights(free, 2))


def test_lora_trains_and_exports_the_adapter_alone(small_config: MakeConfig) -> None:
    folder = run(small_config("model.tune=lora", "model.lora.rank=2", "train.iterations=1"))
    trained = weights(folder, 1)
    assert all("lora_" in name for name in trained)
    assert all(tensor.abs().max() > 0 for tensor in trained.values())
    exported = load_file(folder / "lora" / "pytorch_lora_weights.safetensors")
    assert len(exported) == len(trained)
    assert not (folder / "model").exists()


def test_replay_that_disagrees_with_the_rollout_stops_the_run(small_config: MakeConfig) -> None:
    config = small_config()
    with predictions_in_training(lambda output: output + 0.01), pytest.raises(LoopfastError) as caught:
        run(config)
    message = str(caught.value)
    assert message.startswith("iteration 1: before the first update the ratio differs from 1 by up to")
    assert "rollout.microbatch" in message
    folder = Path(config.run.directory, "small")
    assert [line["iteration"] for line in read_metrics(folder / "metrics.jsonl")] == [0]
    assert not (folder / "checkpoints").exists()


def test_a_loss_that_is_not_finite_is_explained_and_changes_nothing(
    small_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = itertools.count()
    runs: list[Run] = []
    announce = training.announce

    def begun(run: Run, state: TrainState) -> None:
        runs.append(run)
        announce(run, state)

    def spoil(output: Tensor) -> Tensor:
        # the second call of the second iteration's training, that is, its second update
        if next(calls) != 3:
            return output
        return torch.cat([output[:1] * math.nan, output[1:]])

    monkeypatch.setattr(training, "announce", begun)
    config = small_config("train.microbatch=16", "rollout.microbatch=16")
    snapshots = []
    original = training.update

    def update(*args: Any, **kwargs: Any) -> Any:
        parameters = runs[0].sampler.policy.trainable()
        snapshots.append({name: value.detach().clone() for name, value in parameters.items()})
        return original(*args, **kwargs)

    monkeypatch.setattr(training, "update", update)
    with predictions_in_training(spoil), pytest.raises(NonFiniteError) as caught:
        run(config)
    folder = Path(config.run.directory, "small")
    failures = folder / "failures" / "iteration-000002"
    assert str(caught.value) == (f"iteration 2: the loss is not finite; images and prompts are in {failures}")
    [(image, prompt)] = json.loads((failures / "prompts.json").read_text("utf-8")).items()
    assert Image.open(failures / image).size == (32, 32)
    assert prompt in {p.text for p in runs[0].prompts}
    assert len(snapshots) == 4
    assert same(dict(runs[0].sampler.policy.trainable()), snapshots[-1])
    assert [line["iteration"] for line in read_metrics(folder / "metrics.jsonl")] == [0, 1]
    # what went wrong is over: the run goes on from its last checkpoint
    resumed = run(config, "auto")
    assert read_metrics(resumed / "metrics.jsonl")[-1]["iteration"] == 3


REWARD = """\
import torch

calls = 0

def reward(images, prompts, metadata, fail_at, how):
    global calls
    calls += 1
    assert images.shape == (len(prompts), 3, 32, 32) and images.dtype == torch.float32
    assert 0 <= images.min() and images.max() <= 1
    assert all(entry["category"] == "color" for entry in metadata)
    values = images.mean((1, 2, 3))
    if calls == fail_at:
        if how == "raises":
            raise ZeroDivisionError("no luck")
        if how == "length":
            return values[1:]
        if how == "type":
            return "good"
        values[2] = float(how)
    return values
"""


def losses_of(config: Config) -> list[float]:
    """Trains, and gives the loss of each update."""
    update, losses = training.update, []

    def recorded(*arguments: Any, **options: Any) -> UpdateStatistics:
        done = update(*arguments, **options)
        losses.append(done.loss)
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "update", recorded)
        run(config)
    return losses


def test_the_microbatch_changes_no_result(
    small_config: MakeConfig, user_module: Callable[[str], str]
) -> None:
    options = (
        f"reward=[{{name: '{user_module(SMOOTH)}:reward'}}]",
        "train.learning_rate=1e-5",
        "algorithm.logprob=mean",
        "evaluation.every=0",
        "rollout.guidance_scale=2.0",
        "train.iterations=1",
    )

    def trained(*sizes: int) -> tuple[list[float], Weights]:
        given = (f"{key}.microbatch={size}" for key, size in zip(("rollout", "train"), sizes, strict=False))
        config = small_config(*options, *given, f"run.name=sizes-{'-'.join(map(str, sizes))}")
        return losses_of(config), weights(Path(config.run.directory, config.run.name), 1)

    expected, whole = trained()  # 8
    assert len(expected) == 2
    assert max(map(abs, expected)) > 1e-2
    for sizes in ((1, 5), (8, 2), (64, 64)):
        losses, parts = trained(*sizes)
        # The losses are small differences of terms whose size is the advantages': their standard deviation, 1.
        assert losses == pytest.approx(expected, rel=0, abs=1e-4), sizes
        # Adam makes a step of full length, 1e-5, of a gradient that is little more than its rounding.
        assert relative_distance(parts, whole) < 1e-5, sizes


def test_auto_halves_until_a_model_call_fits_and_then_trains_as_with_that_size(
    small_config: MakeConfig,
) -> None:
    options = ("train.iterations=1", "rollout.guidance_scale=3.0", *BARE)
    options = (*options, "model.tune=lora", "model.lora.rank=2", "model.dtype=float16")
    with memory_for(3) as calls:
        folder, warnings = run_told(small_config(*options))
    assert without_overflows(warnings) == [
        f"warning: train.microbatch: {rows} rows per model call do not fit into memory; going on with {rows // 2}"
        for rows in (8, 4)
    ]
    assert calls[:3] == [8, 4, 2]
    assert set(calls[3:]) == {2}
    given = small_config(*options, "rollout.microbatch=2", "train.microbatch=2", "run.name=given")
    expected, warnings = run_told(given)
    assert without_overflows(warnings) == []
    last = given.train.iterations
    assert same(weights(folder, last), weights(expected, last))
    lines, others = (read_metrics(path / "metrics.jsonl")[1:] for path in (folder, expected))
    assert len(lines) == last
    for line, other in zip(lines, others, strict=True):
        assert line["ratio_max_deviation"] == no_deviation()
        for name in ("images", "loss", "reward_mean", "grad_norm", "on_policy_outside_clip"):
            assert line[name] == other[name], name


def without_overflows(warnings: list[str]) -> list[str]:
    """The warnings but for that of float16, whose first loss scales are too high on purpose."""
    return [line for line in warnings if "the gradient overflowed float16" not in line]


# Few ratios stay inside this clip range after an update.
MUCH_CLIPPED = (
    "algorithm.name=ppo",
    "algorithm.logprob=mean",
    "algorithm.clip_range=1e-4",
    "train.updates_per_iteration=4",
    "train.iterations=2",
    "evaluation.every=0",
)


@dataclass
class Replayed:
    """What an update called the model with: the rows of its calls without and with gradients."""

    screening: list[int] = field(default_factory=list)
    training: list[int] = field(default_factory=list)
    done: UpdateStatistics | None = None


@contextmanager
def replayed() -> Iterator[list[Replayed]]:
    """Inside, updates are entered in the list."""
    fit = training.update_with_fallback
    entered: list[Replayed] = []

    def update(run: Run, *args: Any) -> UpdateStatistics:
        def called(module: Any, args: Any, kwargs: Any) -> None:
            part = entry.training if torch.is_grad_enabled() else entry.screening
            part.append(len(kwargs.get("sample", args[0] if args else None)))

        entered.append(entry := Replayed())
        handle = run.sampler.policy.denoiser.register_forward_pre_hook(called, with_kwargs=True)
        try:
            entry.done = fit(run, *args)
        finally:
            handle.remove()
        return entry.done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "update_with_fallback", update)
        yield entered


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        (("model.tune=full",), 1e-6),
        # In 16 bits each call's gradient is rounded, and screening puts other pairs into a call. Adam makes a step of
        # full length of a gradient that is little more than its rounding.
        (("model.tune=lora", "model.lora.rank=2", "model.dtype=float16", "train.learning_rate=1e-3"), 0.05),
    ],
    ids=["float32", "float16-lora"],
)
def test_screening_leaves_out_the_backward_pass_of_pairs_without_a_gradient_and_nothing_else(
    options: tuple[str, ...],
    tolerance: float,
    small_config: MakeConfig,
    user_module: Callable[[str], str],
) -> None:
    options = (
        *MUCH_CLIPPED,
        *options,
        f"reward=[{{name: '{user_module(SMOOTH)}:reward'}}]",
        "train.iterations=1",
    )
    options = (*options, "rollout.microbatch=8", "train.microbatch=4", "rollout.steps=4")
    whole = run(small_config(*options, "train.screening=off", "run.name=whole"))
    with replayed() as updates:
        folder = run(small_config(*options, "train.screening=on"))
    assert relative_distance(weights(folder, 1), weights(whole, 1)) < tolerance
    line, other = (read_metrics(path / "metrics.jsonl")[1] for path in (folder, whole))
    if tolerance < 1e-3:
        for name in ("zero_gradient", "clip_fraction", "kl", "logprob_change", "grad_norm"):
            # kl and logprob_change are differences of numbers near 1, which are rounded to 2^-24
            assert line[name] == pytest.approx(other[name], rel=1e-5, abs=4 * 2**-24), name
        # on some processors a row is rounded by what else is in its call
        assert line["loss"] == pytest.approx(other["loss"], abs=1e-5)
    assert line["zero_gradient"] > 0.1
    assert line["screened_out"] == line["zero_gradient"]
    assert other["screened_out"] == 0.0
    # 8 pairs each; the first is not screened
    assert [update.screening for update in updates] == [[], [8], [8], [8]]
    kept = [round(8 * (1 - update.done.screened_out)) for update in updates]
    assert [update.training for update in updates] == [[4] * max(1, math.ceil(k / 4)) for k in kept]
    calls = sum(len(update.screening) + len(update.training) for update in updates)
    assert line["model_calls"] == 4 + calls
    assert other["model_calls"] == 4 + 8


def test_trajectories_on_the_host_and_a_released_text_encoder_change_no_bit(small_config: MakeConfig) -> None:
    options = ("train.iterations=1", "rollout.guidance_scale=2.0", "model.tune=lora", "evaluation.every=0")
    plain = run(small_config(*options))
    faster = ("trajectories.device=host", "model.free_text_encoder=true", "run.name=faster")
    folder = run(small_config(*options, *faster))
    assert same(weights(folder, 1), weights(plain, 1))


def test_the_native_kernels_train_as_the_reference_does(
    small_config: MakeConfig, user_module: Callable[[str], str]
) -> None:
    options = (
        # the layers' ops have backends, too, which round differently; here the loss's are compared
        "model.fast_layers=off",
        f"reward=[{{name: '{user_module(SMOOTH)}:reward'}}]",
        "train.iterations=2",
        "algorithm.logprob=mean",
        "evaluation.every=0",
    )
    losses = {}
    for name in ("native", "reference"):
        with backend(name):
            losses[name] = losses_of(small_config(*options, f"run.name={name}"))
    assert len(losses["native"]) == 4
    # The losses are small differences of terms whose size is the advantages': their standard deviation, 1.
    assert losses["native"] == pytest.approx(losses["reference"], rel=0, abs=1e-5)
    assert max(map(abs, losses["native"])) > 1e-2


@pytest.mark.parametrize(
    ("fail_at", "how", "said", "images"),
    [
        (1, "raises", "raised ZeroDivisionError: no luck", None),
        (3, "raises", "raised ZeroDivisionError: no luck", None),
        (1, "length", "number(s); allowed: ", None),
        (1, "type", "returned str; allowed: ", None),
        (1, "nan", "is not finite for 1 of ", 1),
        (3, "-inf", "is not finite for 1 of ", 1),
    ],
)
def test_a_reward_that_fails_is_reported(
    fail_at: int,
    how: str,
    said: str,
    images: int | None,
    small_config: MakeConfig,
    user_module: Callable[[str], str],
) -> None:
    reward = f"{user_module(REWARD)}:reward"
    options = f"{{fail_at: {fail_at}, how: '{how}'}}"
    config = small_config(f"reward=[{{name: '{reward}', options: {options}}}]")
    with pytest.raises(RewardError) as caught:
        run(config)
    # the first call scores the evaluation before training, the third the second iteration
    iteration, batch = {1: (0, 4), 3: (2, 8)}[fail_at]
    message = str(caught.value)
    folder = Path(config.run.directory, "small")
    failures = folder / "failures" / f"iteration-{iteration:06d}"
    assert message.startswith(f"iteration {iteration}: reward {reward!r} ")
    assert said in message
    checkpoint = folder / "checkpoints" / f"iteration-{max(iteration - 1, 0):06d}"
    assert message.endswith(
        f"; images and prompts are in {failures}; {checkpoint} is saved, --resume auto goes on from there"
    )
    assert checkpoint.is_dir()
    kept = json.loads((failures / "prompts.json").read_text("utf-8"))
    assert len(kept) == (images or batch)
    # what is wrong with some images names their prompts; the whole batch's are in the file only
    assert (next(iter(kept.values())) in message) == (images is not None)
    for name in kept:
        with Image.open(failures / name) as image:
            assert image.size == (32, 32)
    recorded = [line["iteration"] for line in read_metrics(folder / "metrics.jsonl")]
    assert recorded == ([] if iteration == 0 else [0, 1])


def test_a_users_reward_and_prompts_train(
    small_config: MakeConfig, user_module: Callable[[str], str]
) -> None:
    module = user_module(
        "from loopfast.prompts import Prompt\n"
        "def reward(images, prompts, metadata, weight):\n"
        "    return [weight * float(i.mean()) + m.get('bonus', 0) for i, m in zip(images, metadata)]\n"
        "def prompts():\n"
        "    return ['a red circle', Prompt('a blue star', {'bonus': 7.0})]\n"
    )
    folder = run(
        small_config(
            f"reward=[{{name: '{module}:reward', options: {{weight: 2.0}}}}]",
            f"prompts.source={module}:prompts",
            "train.iterations=1",
        )
    )
    lines = read_metrics(folder / "metrics.jsonl")
    # more prompts an iteration than there are: each is drawn twice, so half of the images have the bonus
    assert 3.5 < lines[1]["reward_mean"] < 5.5
    assert lines[1]["reward_std"] == pytest.approx(3.5, abs=0.5)
    assert lines[1][f"reward_{module}:reward"] == pytest.approx(lines[1]["reward_mean"])
    assert (folder / "report.html").exists()


def test_a_scheduler_that_ddim_replaces_and_prompts_that_are_cut_are_said_at_the_start(
    small_config: MakeConfig, tmp_path: Path
) -> None:
    long = "a red circle and a blue star and a green cross and a red square and"
    (tmp_path / "train.txt").write_text(f"# shapes\n{long} one\n{long} two\na red circle\n")
    (tmp_path / "other.jsonl").write_text(f'"a blue star"\n"{long} three"\n"{long} four"')
    config = small_config(
        f"prompts.source={tmp_path / 'train.txt'}",
        f"evaluation.prompts={tmp_path / 'other.jsonl'}",
        "evaluation.limit_prompts=2",
        "evaluation.every=0",
        "model.free_text_encoder=true",
        "model.scheduler={_class_name: DPMSolverMultistepScheduler, use_karras_sigmas: true}",
    )
    warnings, shown = io.StringIO(), io.StringIO()
    display = Display(console=Console(file=shown, width=1000), errors=Console(file=warnings, width=1000))
    with start(config, None, display) as parts:
        announce(*parts)
    limit = "longer than a text encoder reads and cut (CLIP at 16 tokens"
    scheduler, first, second = warnings.getvalue().splitlines()
    assert scheduler.startswith(
        "warning: model.scheduler, DPMSolverMultistepScheduler, samples with use_karras"
    )
    assert first.startswith(
        f"warning: prompts {tmp_path / 'train.txt'}: 2 of 3 are {limit}: 2), the first after '"
    )
    assert first.endswith(
        "; 1 then the same to the model as an earlier one (loopfast config check lists them)"
    )
    assert second.startswith(
        f"warning: prompts {tmp_path / 'other.jsonl'}: 1 of 2 is {limit}: 1), the first after"
    )
    assert f"3 prompts (skipped: 1 comment line) from {tmp_path / 'train.txt'}" in shown.getvalue()


def test_starting_over_an_existing_run_is_refused(finished: Path, make_config: MakeConfig) -> None:
    before = (finished / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=r"already holds a run: go on with it \(--resume auto\)"):
        run(make_config(finished.parent, "run.trackers=[tensorboard]"))
    assert (finished / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("resume", ["auto", "path"])
def test_resuming_with_another_configuration_names_what_changed(
    resume: str, finished: Path, make_config: MakeConfig
) -> None:
    config = make_config(finished.parent, "train.learning_rate=3e-4", "algorithm.samples_per_prompt=4")
    where = "auto" if resume == "auto" else str(finished / "checkpoints" / "iteration-000002")
    with pytest.raises(ConfigError, match="cannot resume") as caught:
        run(config, where)
    message = str(caught.value)
    assert "algorithm.samples_per_prompt (was 2, is 4)" in message
    assert "train.learning_rate (was 0.0001, is 0.0003)" in message
    assert message.count("(was") == 2
    assert load_config(finished / "config.yaml").algorithm.samples_per_prompt == 2


def test_a_run_may_branch_off_another(finished: Path, small_config: MakeConfig) -> None:
    origin = finished / "checkpoints" / "iteration-000002"
    config = small_config("run.name=branch")
    folder = run(config, str(origin))
    assert same(weights(folder, 3), weights(finished, 3))
    lines, theirs = (read_metrics(path / "metrics.jsonl") for path in (folder, finished))
    assert lines[:3] == theirs[:3]
    assert lines[3]["eval_reward"] == theirs[3]["eval_reward"]
    assert {path.name for path in (folder / "evaluation").iterdir()} == {
        path.name for path in (finished / "evaluation").iterdir()
    }
    with pytest.raises(ConfigError, match="branch already holds a run"):
        run(config, str(origin))


def test_resuming_from_nowhere_is_refused(small_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        run(small_config(), str(tmp_path / "nowhere"))
    assert not (tmp_path / "small").exists()


def test_a_configuration_that_cannot_run_leaves_nothing_behind(
    small_config: MakeConfig, pipeline_folder: Path
) -> None:
    lora = f"model={{pretrained: {pipeline_folder}, tune: lora, lora: {{targets: [nothing]}}}}"
    for override, reason in (
        ("model.pretrained=./nowhere/at/all", "no such folder or file"),
        ("model.device=cuda:77", "cuda:77 is not there"),
        (lora, "model.lora.targets"),
        ("rollout.noise_level=0.5", "rollout.noise_level belongs to flow-matching models"),
        ("prompts.source=embedded:cats", "no category 'cats'"),
        ("evaluation.prompts=nowhere.txt", "no such file"),
        ("reward.0.name=beauty", "no reward 'beauty'"),
    ):
        with pytest.raises(ConfigError, match=reason):
            run(small_config(override))
    # so the next try, with the same name, is a new run
    run(small_config("train.iterations=1"))


def test_a_tracker_that_is_not_installed_names_its_extra(
    small_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'loopfast\[wandb\]'"):
        run(small_config("run.trackers=[wandb]"))


def test_the_display_tells_the_whole_story(small_config: MakeConfig) -> None:
    shown = io.StringIO()
    with Display(console=Console(file=shown, width=200)) as display:
        folder = training.train(
            small_config("train.iterations=2", "rollout.steps=4", "train.steps=0:2"), display=display
        )
    text = shown.getvalue()
    for expected in (
        "loopfast train",
        "UNet:",
        "loop, K = 2",
        "8 images, 2 updates of 8 pairs",
        "2 of 4 trained, not 2, 3",
        "1 x jpeg_compressibility, 0 x jpeg_incompressibility",
        "iteration 1/2  reward ",
        "base reward",
        "final reward",
        str(folder / "report.html"),
        str(folder / "model"),
    ):
        assert expected in text
