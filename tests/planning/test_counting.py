from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from loopfast.config import Config, parse_config
from loopfast.planning import load_architecture
from loopfast.planning.counting import Precision, Recorder, rows_to_trace
from loopfast.planning.networks import form_of, sampling_call, training_call, weights_of


def config(*overrides: str) -> Config:
    return parse_config("model: {pretrained: embedded}", overrides)


def test_the_peak_is_of_what_is_held_at_a_time() -> None:
    layers = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).to("meta")
    with torch.no_grad(), Recorder(13, layers.parameters()) as recorder:
        output = layers(torch.empty(13, 8, device="meta"))
    trace = recorder.trace()
    # the input, and the first layer's output with the activation's, or the last two outputs
    assert trace.peak(1) == 4 * (8 + 16 + 16)
    assert trace.peak(100) == 100 * trace.peak(1)
    assert trace.flops == 2 * (8 * 16 + 16 * 4)
    assert recorder.held == (0, 4 * 4 + 0) or recorder.held[1] >= output.shape[1] * 4


def test_what_does_not_grow_with_the_rows_is_told_apart() -> None:
    layer = nn.Linear(8, 8).to("meta")
    with Recorder(13, layer.parameters()) as recorder:
        layer(torch.empty(13, 8, device="meta")).sum().backward()
    trace = recorder.trace()
    assert trace.peak(1000) - trace.peak(999) < 4 * 8 * 3
    assert trace.peak(1) >= sum(p.numel() * 4 for p in layer.parameters())


def test_rows_divide_nothing_of_the_model() -> None:
    assert rows_to_trace(nn.Linear(26, 8)) == 17
    assert rows_to_trace(nn.Linear(8, 8), 13 * 17) == 19


def test_attention_keeps_no_scores() -> None:
    query = torch.empty(13, 2, 1000, 8, device="meta", requires_grad=True)
    with Precision(), Recorder(13, [query]) as recorder:
        F.scaled_dot_product_attention(query, query, query).sum().backward()
    assert recorder.trace().peak(1) < 4 * 1000 * 1000
    # two products forward, five backward
    assert recorder.trace().flops == (2 + 5) * 2 * 2 * 1000 * 1000 * 8


@pytest.mark.parametrize(("on_gpu", "normalized"), [(False, torch.bfloat16), (True, torch.float32)])
def test_autocast_is_that_of_the_device(on_gpu: bool, normalized: torch.dtype) -> None:
    layer, norm = nn.Linear(8, 8).to("meta"), nn.LayerNorm(8).to("meta", torch.bfloat16)
    with Precision(torch.bfloat16, on_gpu=on_gpu):
        product = layer(torch.empty(2, 8, device="meta"))
        assert product.dtype == torch.bfloat16
        assert norm(product).dtype == normalized


def test_operations_are_those_of_the_flop_counter() -> None:
    form = form_of(config("model.fast_layers=off", "model.attention=sdpa"), "cpu", sharded=False)
    architecture = load_architecture(config().model)
    unet = architecture.denoiser.build()
    inputs = (torch.empty(5, 4, 8, 8, device="meta"), torch.empty(5, dtype=torch.int64, device="meta"))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        unet(*inputs, encoder_hidden_states=torch.empty(5, 16, 64, device="meta"))
    assert sampling_call(architecture, form).flops == pytest.approx(counter.get_total_flops() / 5, rel=0.001)


def test_training_costs_three_passes_and_checkpointing_about_one_more() -> None:
    architecture = load_architecture(config().model, "sd15")
    kept, recomputed = (
        form_of(config(f"train.gradient_checkpointing={value}"), "cuda", sharded=False)
        for value in ("false", "true")
    )
    forward = sampling_call(architecture, kept).flops
    # 0.8 tera-multiply-adds with attention, of which 0.34 are known for the convolutions and projections alone
    assert 0.6e12 < forward < 0.9e12
    plain, checked = (training_call(architecture, form, accumulating=True) for form in (kept, recomputed))
    assert 2.9 < plain.flops / forward < 3.3
    assert 0.7 < (checked.flops - plain.flops) / forward < 1.1
    assert checked.peak(4) < 0.5 * plain.peak(4)


def test_the_adapter_is_the_one_that_is_trained() -> None:
    from loopfast.policies import load_policy

    lora = config("model.tune=lora", "model.lora.rank=3", "model.device=cpu")
    found = weights_of(load_architecture(lora.model), form_of(lora, "cpu", sharded=False))
    policy = load_policy(lora.model)
    assert found.trained == sum(p.numel() for p in policy.trainable().values())
    assert found.parameters == sum(p.numel() for p in policy.denoiser.parameters()) - found.trained
