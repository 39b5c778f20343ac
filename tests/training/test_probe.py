from __future__ import annotations

from typing import Any

import pytest
import torch

from loopfast.config import TrainConfig
from loopfast.engines import LocalEngine
from loopfast.errors import LoopfastError
from loopfast.training import probe as module
from loopfast.training.probe import fit_training_calls, probe, probe_memory
from tests.training.toys import Case, MakeToy, memory_for, same


@pytest.mark.parametrize("with_reference", [False, True])
def test_a_memory_probe_calls_as_an_update_does_and_changes_nothing(with_reference: bool) -> None:
    case = Case(guidance_scale=2.0)
    case.policy.batches.clear()
    engine = LocalEngine(case.policy, TrainConfig())  # type: ignore[arg-type]
    before = [parameter.detach().clone() for parameter in case.policy.trainable().values()]
    backward = []
    case.policy.weight.register_post_accumulate_grad_hook(lambda parameter: backward.append(1))
    probe_memory(case.sampler, engine, {"text": case.text}, microbatch=5, with_reference=with_reference)
    assert case.policy.batches == [5] * (1 + with_reference)
    assert len(backward) == 1
    for parameter, value in zip(case.policy.trainable().values(), before, strict=True):
        assert parameter.grad is None
        assert torch.equal(parameter, value)


def test_a_memory_probe_leaves_room(monkeypatch: pytest.MonkeyPatch) -> None:
    case, sizes, empty = Case(), list[int](), torch.empty

    def noted(*size: int, **options: Any) -> torch.Tensor:
        if options.get("dtype") == torch.uint8:
            sizes.extend(size)
        return empty(*size, **options)

    monkeypatch.setattr(torch, "empty", noted)
    engine = LocalEngine(case.policy, TrainConfig())  # type: ignore[arg-type]
    probe_memory(case.sampler, engine, {"text": case.text}, microbatch=5, with_reference=False, reserve=1000)
    assert sizes == [1000]


@pytest.fixture
def small_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PROBE_RESERVE", 1000)


@pytest.mark.usefixtures("small_reserve")
@pytest.mark.parametrize(
    ("overrides", "tried", "sizes"),
    [
        ((), [6, 3, 1], (1, 1)),
        # the policy before training is asked as well, and first
        (("algorithm.kl_weight=0.1",), [6, 3, 1, 1], (1, 1)),
        (("rollout.microbatch=5",), [5, 2], (5, 2)),
    ],
)
def test_a_training_call_is_halved_until_it_fits(
    overrides: tuple[str, ...],
    tried: list[int],
    sizes: tuple[int, int],
    make_toy: MakeToy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    toy = make_toy(*overrides)
    before = toy.weights
    memory_for(toy, 2, monkeypatch, training=False)
    probe(toy.run)
    assert toy.policy.batches == tried
    assert (toy.run.microbatches.rollout, toy.run.microbatches.train) == sizes
    assert [warning.split(" rows")[0] for warning in toy.heard.warnings] == [
        f"train.microbatch: {rows}" for rows in tried if rows > 2
    ]
    assert same(toy.weights, before)
    assert all(weight.grad is None for weight in toy.policy.trainable().values())


@pytest.mark.usefixtures("small_reserve")
def test_where_not_even_one_row_fits_the_run_ends(make_toy: MakeToy, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = make_toy()
    memory_for(toy, 0, monkeypatch)
    with pytest.raises(LoopfastError, match=r"train\.microbatch: not even one row per model call fits"):
        probe(toy.run)


@pytest.mark.usefixtures("small_reserve")
def test_room_is_left_for_the_optimizers_moments(make_toy: MakeToy, monkeypatch: pytest.MonkeyPatch) -> None:
    toy, reserves = make_toy(), list[int]()
    original = module.probe_memory

    def noted(*args: Any, reserve: int, **options: Any) -> None:
        reserves.append(reserve)
        original(*args, reserve=reserve, **options)

    monkeypatch.setattr(module, "probe_memory", noted)
    probe(toy.run)
    assert reserves == [1000 + 8 * 20]


@pytest.mark.parametrize(
    ("device", "retries", "microbatch", "probed"),
    [
        ("cuda", True, "auto", True),
        ("cpu", True, "auto", False),
        ("cuda", False, "auto", False),
        ("cuda", True, "4", False),
    ],
)
def test_calls_are_probed_on_a_gpu_where_they_may_be_made_again(
    device: str,
    retries: bool,
    microbatch: str,
    probed: bool,
    make_toy: MakeToy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    toy, runs = make_toy(f"train.microbatch={microbatch}"), []
    monkeypatch.setattr(module, "probe", runs.append)
    monkeypatch.setattr(toy.policy, "device", torch.device(device))
    toy.run.engine.retries = retries
    fit_training_calls(toy.run)
    assert runs == [toy.run] * probed
