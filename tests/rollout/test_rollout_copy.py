"""The rollout copy: equal to the policy after every refresh, at fixed addresses."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import loopfast.training.train as training
from loopfast.config import Config, RolloutConfig
from loopfast.errors import ConfigError, LoopfastError
from loopfast.policies import addresses
from loopfast.rollout import RolloutCopy, make_rollout_copy
from loopfast.run.console import Display
from loopfast.run.tracking import read_metrics
from tests.rollout import toy

MakeConfig = Callable[..., Config]
CPU = torch.device("cpu")
LORA: dict[str, Any] = {"tune": "lora", "lora": {"rank": 2, "alpha": 8.0}}


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps, which show the same as more would."""
    monkeypatch.setattr(toy, "STEPS", 2)


def test_there_is_no_copy_where_nothing_asks_for_one(pipeline_folder: Path) -> None:
    policy = toy.load(pipeline_folder, dtype="bfloat16")
    for config in (RolloutConfig(), RolloutConfig(dtype="bfloat16"), RolloutConfig(device="cpu")):
        assert make_rollout_copy(policy, config) is None
    with pytest.raises(ConfigError, match=r"rollout\.device: cuda:77 is not there"):
        make_rollout_copy(policy, RolloutConfig(device="cuda:77"))


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, LORA], ids=["full", "autocast", "lora"])
def test_a_copy_of_the_same_type_samples_the_same_bits(
    pipeline_folder: Path, options: dict[str, Any]
) -> None:
    policy = toy.load(pipeline_folder, **options)
    rollout_copy = RolloutCopy(policy, dtype=None, device=CPU, merge_lora=False)
    before = addresses(rollout_copy.policy.denoiser)
    assert not set(before.values()) & set(addresses(policy.denoiser).values())
    for _ in range(2):
        toy.move(policy)
        direct = toy.run(toy.sampler(policy, pipeline_folder, 2.0))
        assert toy.same(toy.run(toy.sampler(policy, pipeline_folder, 2.0, rollout_copy=rollout_copy)), direct)
    assert addresses(rollout_copy.policy.denoiser) == before


@pytest.mark.parametrize(("guidance", "targets"), [(1.0, None), (3.0, ["to_q", "conv1", "proj_in"])])
def test_merged_weights_compute_what_the_adapter_does(
    pipeline_folder: Path, guidance: float, targets: list[str] | None
) -> None:
    policy = toy.load(pipeline_folder, tune="lora", lora={**LORA["lora"], "targets": targets})
    plain = toy.run(toy.sampler(policy, pipeline_folder, guidance))
    rollout_copy = RolloutCopy(policy, dtype=None, device=CPU, merge_lora=True)
    before = addresses(rollout_copy.policy.denoiser)
    assert not any("lora" in name or "base_layer" in name for name in before)
    for _ in range(2):
        toy.move(policy, 0.2)
        direct = toy.run(toy.sampler(policy, pipeline_folder, guidance))
        merged = toy.run(toy.sampler(policy, pipeline_folder, guidance, rollout_copy=rollout_copy))
        torch.testing.assert_close(merged.latents, direct.latents, atol=2e-4, rtol=1e-4)
        assert (direct.latents - plain.latents).abs().max() > 1e-2
    assert addresses(rollout_copy.policy.denoiser) == before
    assert not any(parameter.requires_grad for parameter in rollout_copy.policy.denoiser.parameters())


@pytest.mark.parametrize("merge", [False, True])
def test_latents_have_the_type_that_the_model_saw(pipeline_folder: Path, merge: bool) -> None:
    policy = toy.load(pipeline_folder, **(LORA if merge else {}))
    config = RolloutConfig(dtype="bfloat16", merge_lora=merge)
    rollout_copy = make_rollout_copy(policy, config)
    assert rollout_copy is not None
    assert {parameter.dtype for parameter in rollout_copy.policy.denoiser.parameters()} == {torch.bfloat16}
    made = toy.sampler(policy, pipeline_folder, 2.0, rollout_copy=rollout_copy)
    found = toy.run(made)
    assert found.latents.dtype == torch.bfloat16
    assert found.latents.device == policy.device
    exact = toy.run(toy.sampler(policy, pipeline_folder, 2.0))
    difference = (found.final.float() - exact.final).norm() / exact.final.norm()
    assert 0 < difference < 0.1


@pytest.mark.parametrize("merge", [False, True])
def test_compiled_blocks_are_compiled_in_the_copy_too(pipeline_folder: Path, merge: bool) -> None:
    policy = toy.load(pipeline_folder, **LORA)
    denoiser: Any = policy.denoiser
    denoiser.compile_repeated_blocks(dynamic=False)
    rollout_copy = RolloutCopy(policy, dtype=torch.bfloat16, device=CPU, merge_lora=merge)
    first, other = (
        [name for name, module in made.named_modules() if module._compiled_call_impl is not None]
        for made in (denoiser, rollout_copy.policy.denoiser)
    )
    assert first == other != []


def train(config: Config) -> tuple[Path, str]:
    warnings = io.StringIO()
    display = Display(quiet=True, errors=Console(file=warnings, width=1000))
    return training.train(config, display=display), warnings.getvalue()


def test_training_from_a_merged_copy_measures_what_it_changes(small_config: MakeConfig) -> None:
    short = ("rollout.prompts_per_iteration=2", "rollout.steps=2", "evaluation.limit_prompts=2")
    lora = ("model.tune=lora", "evaluation.every=0", *short)
    options = (*lora, "rollout.merge_lora=true", "rollout.dtype=bfloat16", "train.iterations=2")
    with pytest.raises(LoopfastError) as caught:
        train(small_config(*options, "run.name=strict"))
    for said in ("before the first update the ratio differs from 1 by up to", "merge_lora"):
        assert said in str(caught.value)
    folder, warnings = train(small_config(*options, "train.on_policy_check=warn"))
    assert warnings.count("before the first update the ratio differs from 1") == 2
    lines = read_metrics(folder / "metrics.jsonl")[1:]
    assert all(line["ratio_max_deviation"] > 1e-3 for line in lines)
    # evaluations sample the policy itself: the same before training, with or without a copy
    plain, _ = train(small_config(*lora, "train.iterations=1", "run.name=plain"))
    first, other = (read_metrics(path / "metrics.jsonl")[0]["eval_reward"] for path in (folder, plain))
    assert first == other


@pytest.mark.gpu
@pytest.mark.parametrize("merge", [False, True])
def test_a_copy_on_another_device_is_refreshed_under_a_graph(pipeline_folder: Path, merge: bool) -> None:
    policy = toy.load(pipeline_folder, **LORA)
    config = RolloutConfig(device="cuda", merge_lora=merge)
    rollout_copy = make_rollout_copy(policy, config)
    assert rollout_copy is not None
    made = toy.sampler(policy, pipeline_folder, 2.0, rollout_copy=rollout_copy)
    for _ in range(2):
        toy.move(policy)
        found = toy.run(made)
        assert found.latents.device == CPU
        direct = toy.run(toy.sampler(policy, pipeline_folder, 2.0))
        torch.testing.assert_close(found.latents, direct.latents, atol=2e-2, rtol=1e-2)
    assert len(made.steps) == 1


@pytest.mark.parametrize("options", [{}, LORA], ids=["full", "lora"])
def test_a_gathered_copy_is_there_while_it_is_used(pipeline_folder: Path, options: dict[str, Any]) -> None:
    policy = toy.load(pipeline_folder, **options)
    rollout_copy = make_rollout_copy(policy, RolloutConfig(replica="gathered"))
    assert rollout_copy is not None
    assert rollout_copy.exact

    def held() -> int:
        return sum(parameter.nbytes for parameter in rollout_copy.policy.denoiser.parameters())

    assert held() == 0
    for _ in range(2):
        toy.move(policy)
        direct = toy.run(toy.sampler(policy, pipeline_folder, 2.0))
        sampler = toy.sampler(policy, pipeline_folder, 2.0, rollout_copy=rollout_copy)
        assert toy.same(toy.run(sampler), direct)
        assert held() == 0
        # a nested use has the same copy, unchanged
        with sampler.ready():
            once = [parameter.data_ptr() for parameter in rollout_copy.policy.denoiser.parameters()]
            toy.move(policy)
            assert toy.same(toy.run(sampler), direct)
            assert [parameter.data_ptr() for parameter in rollout_copy.policy.denoiser.parameters()] == once
        assert held() == 0


def test_a_gathered_copy_is_given_back_whatever_is_raised(pipeline_folder: Path) -> None:
    policy = toy.load(pipeline_folder)
    rollout_copy = make_rollout_copy(policy, RolloutConfig(replica="gathered"))
    assert rollout_copy is not None

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        toy.run(toy.sampler(policy, pipeline_folder, rollout_copy=rollout_copy), between=stop)
    assert all(parameter.numel() == 0 for parameter in rollout_copy.policy.denoiser.parameters())
    found = toy.run(toy.sampler(policy, pipeline_folder, rollout_copy=rollout_copy))
    assert toy.same(found, toy.run(toy.sampler(policy, pipeline_folder)))


def test_a_gathered_copy_is_given_back_by_sampling_that_is_closed(pipeline_folder: Path) -> None:
    policy = toy.load(pipeline_folder)
    rollout_copy = make_rollout_copy(policy, RolloutConfig(replica="gathered"))
    assert rollout_copy is not None
    sampler = toy.sampler(policy, pipeline_folder, rollout_copy=rollout_copy)
    found = sampler.allocate(len(toy.SEEDS))
    sampling = sampler.stream(found, policy.encode(toy.PROMPTS), toy.ROWS, toy.SEEDS)
    with closing(sampling):
        rows = next(sampling)
        assert rows == slice(0, sampler.microbatch)
        # what is sampled needs no gradient; what is done with it between two microbatches may
        assert torch.is_grad_enabled()
        assert all(parameter.numel() > 0 for parameter in rollout_copy.policy.denoiser.parameters())
    assert all(parameter.numel() == 0 for parameter in rollout_copy.policy.denoiser.parameters())
    assert torch.is_grad_enabled()


def test_sharded_weights_are_sampled_from_a_copy(pipeline_folder: Path) -> None:
    full, adapter = toy.load(pipeline_folder), toy.load(pipeline_folder, **LORA)
    gathered, resident = (make_rollout_copy(each, RolloutConfig(), sharded=True) for each in (full, adapter))
    assert gathered is not None
    assert resident is not None
    assert (gathered.resident, resident.resident) == (False, True)
    assert make_rollout_copy(full, RolloutConfig(replica="none"), sharded=True) is None
    kept = make_rollout_copy(full, RolloutConfig(replica="resident"))
    assert kept is not None
    assert kept.resident
    assert kept.exact
    rounded = make_rollout_copy(full, RolloutConfig(dtype="bfloat16"))
    assert rounded is not None
    assert not rounded.exact


def test_whole_weights_are_asked_for_a_layer_at_a_time(pipeline_folder: Path) -> None:
    policy = toy.load(pipeline_folder)
    rollout_copy = make_rollout_copy(policy, RolloutConfig(replica="gathered"))
    assert rollout_copy is not None
    asked: list[set[int]] = []

    @contextmanager
    def gathered(parameters: Iterable[torch.nn.Parameter]) -> Iterator[None]:
        asked.append({id(parameter) for parameter in parameters})
        yield

    rollout_copy.gathered = gathered
    with rollout_copy.ready():
        pass
    everything = {id(parameter) for parameter in policy.denoiser.parameters()}
    assert set.union(*asked) == everything
    assert sum(map(len, asked)) == len(everything)
    assert max(map(len, asked)) == 2  # a weight and a bias
