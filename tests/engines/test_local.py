from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loopfast.config import TrainConfig
from loopfast.engines import LocalEngine, scaling
from loopfast.errors import MissingExtraError, NonFiniteError


def make(
    seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[LocalEngine, dict[str, torch.nn.Parameter]]:
    generator = torch.Generator().manual_seed(seed)
    parameters = {
        "layer.weight": torch.nn.Parameter(torch.randn(3, 2, generator=generator)),
        "layer.bias": torch.nn.Parameter(torch.randn(3, generator=generator)),
    }
    policy: Any = SimpleNamespace(trainable=lambda: parameters, device=torch.device("cpu"), dtype=dtype)
    return LocalEngine(
        policy, TrainConfig(**{"learning_rate": 0.1, "warmup_updates": 0, **options})
    ), parameters


def loss(parameters: dict[str, torch.nn.Parameter], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 + seed)
    return sum(  # type: ignore[return-value]
        ((p - torch.randn(p.shape, generator=generator)) ** 2).sum() for p in parameters.values()
    )


def copies(parameters: dict[str, torch.nn.Parameter]) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def learning_rates(count: int, **options: Any) -> list[float]:
    engine, parameters = make(**options)
    rates = []
    for step in range(count):
        rates.append(engine.learning_rate)
        engine.backward(loss(parameters, step))
        engine.update()
    return rates


TWELVE = {"iterations": 3, "updates_per_iteration": 2, "inner_epochs": 2}


def test_learning_rate_warms_up_and_stays() -> None:
    assert learning_rates(6, **TWELVE, warmup_updates=4) == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1])


@pytest.mark.parametrize(
    ("schedule", "course"),
    [("linear", lambda part: 1 - part), ("cosine", lambda part: (1 + math.cos(math.pi * part)) / 2)],
)
def test_learning_rate_falls_to_zero_at_the_end_of_the_run(schedule: str, course: Any) -> None:
    rates = learning_rates(14, **TWELVE, warmup_updates=2, lr_schedule=schedule)
    assert rates[:2] == pytest.approx([0.05, 0.1])
    assert rates[2:12] == pytest.approx([0.1 * course(done / 10) for done in range(10)])
    assert rates[12:] == pytest.approx([0.0, 0.0])


def test_the_learning_rate_is_the_one_the_update_used() -> None:
    engine, parameters = make(warmup_updates=10, beta1=0.0, beta2=0.0, max_grad_norm=1e9)
    before = copies(parameters)
    engine.backward(loss(parameters, 0))
    engine.update()
    for name, parameter in parameters.items():
        # without moments Adam moves every weight by the learning rate
        torch.testing.assert_close((parameter - before[name]).abs(), torch.full_like(before[name], 0.01))


def test_updates_are_adamws_with_the_gradient_clipped() -> None:
    options = {"beta1": 0.8, "beta2": 0.9, "weight_decay": 0.3, "max_grad_norm": 0.5}
    engine, parameters = make(**options)
    theirs = {name: torch.nn.Parameter(value) for name, value in copies(parameters).items()}
    adamw = torch.optim.AdamW(theirs.values(), lr=0.1, betas=(0.8, 0.9), weight_decay=0.3)
    for step in range(4):
        engine.backward(loss(parameters, step) / 2)
        engine.backward(loss(parameters, step) / 2)
        norm = engine.update()
        adamw.zero_grad()
        loss(theirs, step).backward()
        gradient = torch.cat([parameter.grad.flatten() for parameter in theirs.values()])  # type: ignore[union-attr]
        assert norm == pytest.approx(gradient.norm().item(), rel=1e-5)
        for parameter in theirs.values():
            parameter.grad *= min(1.0, 0.5 / norm)
        adamw.step()
        for name in parameters:
            torch.testing.assert_close(parameters[name], theirs[name], rtol=1e-4, atol=1e-5)


def test_state_goes_on_bitwise() -> None:
    engine, parameters = make(lr_schedule="cosine", **TWELVE)
    for step in range(3):
        engine.backward(loss(parameters, step))
        engine.update()
    tensors, state = engine.state()
    saved = {
        group: {name: value.clone() for name, value in named.items()} for group, named in tensors.items()
    }
    restored, others = make(seed=1, lr_schedule="cosine", **TWELVE)
    restored.load_state(saved, state)
    for step in range(3, 6):
        for each, its in ((engine, parameters), (restored, others)):
            each.backward(loss(its, step))
            each.update()
        assert engine.learning_rate == restored.learning_rate
        assert all(torch.equal(parameters[name], others[name]) for name in parameters)
    for group, named in engine.state()[0].items():
        assert all(torch.equal(value, restored.state()[0][group][name]) for name, value in named.items())


def test_state_before_any_update_can_be_taken_back() -> None:
    engine, parameters = make()
    restored, others = make(seed=1)
    restored.load_state(*engine.state())
    assert all(torch.equal(parameters[name], others[name]) for name in parameters)
    assert restored.learning_rate == engine.learning_rate


@pytest.mark.parametrize("change", ["shape", "name"])
def test_weights_of_another_model_are_refused(change: str) -> None:
    engine, parameters = make()
    before = copies(parameters)
    tensors, state = engine.state()
    if change == "shape":
        tensors["policy"]["layer.bias"] = torch.zeros(4)
    else:
        tensors["policy"]["layer.gain"] = tensors["policy"].pop("layer.bias")
    with pytest.raises(ValueError, match="not those of this configuration's model"):
        engine.load_state(tensors, state)
    assert all(torch.equal(parameters[name], before[name]) for name in parameters)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_leaves_the_weights(bad: float) -> None:
    engine, parameters = make()
    engine.backward(loss(parameters, 0))
    engine.update()
    before = copies(parameters)
    moments = {name: value.clone() for name, value in engine.state()[0]["optimizer"].items()}
    engine.backward(parameters["layer.bias"].sum() * bad)
    with pytest.raises(NonFiniteError, match=r"the gradient's norm is (nan|inf)"):
        engine.update()
    assert all(torch.equal(parameters[name], before[name]) for name in parameters)
    assert all(torch.equal(value, moments[name]) for name, value in engine.state()[0]["optimizer"].items())
    # what was wrong with it does not reach the next update either
    engine.backward(loss(parameters, 1))
    engine.update()
    assert all(parameter.isfinite().all() for parameter in parameters.values())


def large(policy_seed: int, **options: Any) -> tuple[LocalEngine, dict[str, torch.nn.Parameter]]:
    """An engine of a small parameter and one of over 4,096 elements, whose moments bitsandbytes keeps in 8 bits."""
    generator = torch.Generator().manual_seed(policy_seed)
    parameters = {
        "layer.weight": torch.nn.Parameter(torch.randn(64, 65, generator=generator)),
        "layer.bias": torch.nn.Parameter(torch.randn(64, generator=generator)),
    }
    policy: Any = SimpleNamespace(
        trainable=lambda: parameters, device=torch.device("cpu"), dtype=torch.float32
    )
    return LocalEngine(policy, TrainConfig(learning_rate=0.01, warmup_updates=0, **options)), parameters


def steps(engine: LocalEngine, parameters: dict[str, torch.nn.Parameter], of: range) -> None:
    for step in of:
        engine.backward(loss(parameters, step))
        engine.update()


def test_8_bit_moments_train_alike_in_less_memory_and_go_on_bitwise(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    engine, parameters = large(0, optimizer="adamw_8bit")
    plain, exact = large(0)
    steps(engine, parameters, range(5))
    steps(plain, exact, range(5))
    # five steps of 0.01 each way; the moments are rounded to 8 bits
    torch.testing.assert_close(parameters["layer.weight"], exact["layer.weight"], rtol=0, atol=0.02)
    tensors, state = engine.state()
    moments = tensors["optimizer"]
    assert moments["layer.weight.state1"].dtype == torch.uint8
    assert moments["layer.bias.state1"].dtype == torch.float32
    held = sum(value.nbytes for name, value in moments.items() if "weight" in name)
    assert held < 0.3 * sum(v.nbytes for n, v in plain.state()[0]["optimizer"].items() if "weight" in n)
    for group, named in tensors.items():
        save_file(named, tmp_path / f"{group}.safetensors")

    restored, others = large(1, optimizer="adamw_8bit")
    restored.load_state({group: load_file(tmp_path / f"{group}.safetensors") for group in tensors}, state)
    for each, its in ((engine, parameters), (restored, others)):
        steps(each, its, range(5, 8))
    assert all(torch.equal(parameters[name], others[name]) for name in parameters)


@pytest.mark.parametrize(("given", "taken"), [("adamw", "adamw_8bit"), ("adamw_8bit", "adamw")])
def test_the_state_of_another_optimizer_is_refused(given: Any, taken: Any) -> None:
    pytest.importorskip("bitsandbytes")
    engine, parameters = large(0, optimizer=given)
    steps(engine, parameters, range(1))
    with pytest.raises(ValueError, match=r"not that of train\.optimizer"):
        large(0, optimizer=taken)[0].load_state(*engine.state())


def test_8_bit_moments_need_their_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingExtraError, match=r"adamw_8bit needs .* pip install 'loopfast\[bnb\]'"):
        large(0, optimizer="adamw_8bit")


def test_weights_with_channels_innermost_go_on_bitwise(tmp_path: Path) -> None:
    def make_convolution(seed: int) -> tuple[LocalEngine, dict[str, torch.nn.Parameter]]:
        weight = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(seed))
        parameters = {"weight": torch.nn.Parameter(weight.to(memory_format=torch.channels_last))}
        policy: Any = SimpleNamespace(
            trainable=lambda: parameters, device=torch.device("cpu"), dtype=torch.float32
        )
        return LocalEngine(policy, TrainConfig(learning_rate=0.01, warmup_updates=0)), parameters

    engine, parameters = make_convolution(0)
    steps(engine, parameters, range(3))
    tensors, state = engine.state()
    for group, named in tensors.items():
        save_file(named, tmp_path / f"{group}.safetensors")
    restored, others = make_convolution(1)
    restored.load_state({group: load_file(tmp_path / f"{group}.safetensors") for group in tensors}, state)
    for each, its in ((engine, parameters), (restored, others)):
        steps(each, its, range(3, 6))
    assert torch.equal(parameters["weight"], others["weight"])
    assert others["weight"].is_contiguous(memory_format=torch.channels_last)


def test_what_is_accumulated_can_be_discarded() -> None:
    results = []
    for interrupted in (False, True):
        engine, parameters = make(dtype=torch.float16)
        if interrupted:
            engine.backward(loss(parameters, 7))
            engine.discard()
        for step in range(3):
            engine.backward(loss(parameters, step))
            engine.update()
        assert engine.state()[1]["scaler"]["scale"] == 65536.0
        results.append(copies(parameters))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def half_loss(parameters: dict[str, torch.nn.Parameter], seed: int) -> Tensor:
    """Returns a loss whose gradients pass through float16, in which 2^16 times their size is infinite."""
    halves: Any = {name: parameter.half().float() for name, parameter in parameters.items()}
    return loss(halves, seed)


def overflowing(engine: LocalEngine, parameters: dict[str, torch.nn.Parameter], step: int) -> int:
    """Makes an update, repeated until it does not overflow, and returns the number of overflows."""
    overflows = -1
    norm = None
    while norm is None:
        overflows += 1
        # two parts, as of two model calls
        engine.backward(half_loss(parameters, step))
        engine.backward(half_loss(parameters, step))
        norm = engine.update()
    assert math.isfinite(norm)
    return overflows


def test_an_update_that_overflows_is_as_if_the_scale_had_been_lower_from_the_start() -> None:
    options: dict[str, Any] = {"warmup_updates": 4, "ema_decay": 0.9}
    engine, parameters = make(dtype=torch.float16, **options)
    before, rate = copies(parameters), engine.learning_rate
    engine.backward(half_loss(parameters, 0))
    engine.backward(half_loss(parameters, 0))
    assert engine.update() is None
    # nothing has happened but that the scale is lower
    assert all(torch.equal(parameters[name], before[name]) for name in parameters)
    tensors, state = engine.state()
    assert (engine.learning_rate, state) == (rate, {"updates": 0, "scaler": scaler(2.0**15)})
    assert tensors["optimizer"] == {}
    assert overflowing(engine, parameters, 0) > 0
    low = engine.state()[1]["scaler"]["scale"]
    assert 1.0 <= low < 2.0**15

    other, others = make(dtype=torch.float16, **options)
    tensors, state = other.state()
    other.load_state(tensors, {**state, "scaler": scaler(low)})
    assert overflowing(other, others, 0) == 0
    for step in (1, 2):
        assert overflowing(engine, parameters, step) == overflowing(other, others, step)
    assert engine.state()[1] == other.state()[1]
    assert engine.state()[1]["updates"] == 3
    for group, named in engine.state()[0].items():
        assert all(torch.equal(value, other.state()[0][group][name]) for name, value in named.items()), group


def scaler(scale: float, good: int = 0) -> dict[str, float]:
    return {"scale": scale, "_growth_tracker": good}


def test_a_gradient_that_is_not_finite_at_the_lowest_scale_is_an_error() -> None:
    engine, parameters = make(dtype=torch.float16)
    before = copies(parameters)
    for _ in range(16):
        engine.backward(parameters["layer.bias"].sum() * math.nan)
        assert engine.update() is None
    engine.backward(parameters["layer.bias"].sum() * math.nan)
    with pytest.raises(NonFiniteError, match="the gradient's norm is nan"):
        engine.update()
    assert engine.state()[1] == {"updates": 0, "scaler": scaler(1.0)}
    assert all(torch.equal(parameters[name], before[name]) for name in parameters)


def test_the_scale_grows_after_updates_without_an_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "GROWTH_INTERVAL", 3)
    engine, parameters = make(dtype=torch.float16)
    found = []
    for step in range(4):
        steps(engine, parameters, range(step, step + 1))
        found.append(engine.state()[1]["scaler"])
    assert found == [scaler(2.0**16, 1), scaler(2.0**16, 2), scaler(2.0**17), scaler(2.0**17, 1)]


def test_the_scale_that_torchs_scaler_has_saved_is_taken_back() -> None:
    theirs = torch.amp.GradScaler("cpu", init_scale=256.0)
    theirs.scale(torch.ones(()))
    engine, _ = make(dtype=torch.float16)
    tensors, state = engine.state()
    engine.load_state(tensors, {**state, "scaler": theirs.state_dict()})
    assert engine.state()[1]["scaler"] == scaler(256.0)
