"""``model.lora.from``: LoRAs of other tools have the same effect in the adapter as in those tools."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from loopfast.config import ModelConfig, config_to_yaml, json_schema, parse_config
from loopfast.errors import ConfigError
from loopfast.policies import Policy, adopted_lora, check_model, load_policy
from loopfast.policies.adapter import exported_adapter
from tests.families import settings_of
from tests.policies.test_families import PROMPTS, disturb, settings, weights

RANK, ALPHA = 2, 4.0


def predict(policy: Policy) -> Tensor:
    sample = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return policy.predict(sample.to(policy.dtype), torch.tensor([901, 1]), policy.encode(PROMPTS), 3.0)[0]


def factors(policy: Any) -> dict[str, Tensor]:
    """The trained weights by peft's names, not scaled."""
    unscaled = policy._config.lora.model_copy(update={"alpha": float(RANK)})
    return exported_adapter(policy._denoiser, unscaled, weights(policy))


@pytest.fixture(scope="module")
def trained(pipeline_folder: Path) -> Policy:
    policy = load_policy(settings(pipeline_folder, lora={"rank": RANK, "alpha": ALPHA}))
    disturb(policy)
    return policy


def by_export(policy: Any, folder: Path) -> Path:
    policy.export(folder, weights(policy))
    return folder


def by_file(policy: Any, folder: Path) -> Path:
    return by_export(policy, folder) / "pytorch_lora_weights.safetensors"


def by_run(policy: Any, folder: Path) -> Path:
    by_export(policy, folder / "lora")
    (folder / "config.yaml").write_text("")
    return folder


def by_kohya(policy: Any, folder: Path) -> Path:
    folder.mkdir()
    found: dict[str, Tensor] = {}
    for name, value in factors(policy).items():
        layer, kind = name.split(".lora_")
        place = f"lora_unet_{layer.replace('.', '_')}"
        found[f"{place}.lora_{'down' if kind.startswith('A') else 'up'}.weight"] = value.contiguous()
        found[f"{place}.alpha"] = torch.tensor(ALPHA)
    save_file(found, folder / "style.safetensors")
    return folder


def by_diffusers(policy: Any, folder: Path) -> Path:
    """Writes a file as diffusers' training scripts do: alpha is in its metadata."""
    settings = LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules=["to_k", "to_q", "to_v", "to_out.0"])
    StableDiffusionPipeline.save_lora_weights(
        folder, unet_lora_layers=factors(policy), unet_lora_adapter_metadata=settings.to_dict()
    )
    return folder


def by_earlier_diffusers(policy: Any, folder: Path) -> Path:
    """Writes the names of diffusers' first LoRAs, without an alpha: the factor is in the weights."""
    folder.mkdir()
    found = {}
    for name, value in exported_adapter(policy._denoiser, policy._config.lora, weights(policy)).items():
        place, kind = name.split(".lora_")
        block, _, layer = place.removesuffix(".0").rpartition(".attn")
        number, _, projection = layer.partition(".")
        last = f"attn{number}.processor.{projection}_lora.{'down' if kind.startswith('A') else 'up'}.weight"
        found[f"unet.{block}.{last}"] = value.contiguous()
    save_file(found, folder / "pytorch_lora_weights.safetensors")
    return folder


def by_peft(policy: Any, folder: Path) -> Path:
    return peft_folder(factors(policy), folder, lora_alpha=ALPHA)


def by_rank_stabilized_peft(policy: Any, folder: Path) -> Path:
    """Here the scale is alpha divided by the rank's root."""
    return peft_folder(factors(policy), folder, lora_alpha=ALPHA * RANK**-0.5, use_rslora=True)


def by_pickle(policy: Any, folder: Path) -> Path:
    found = load_file(by_file(policy, folder))
    (folder / "pytorch_lora_weights.safetensors").unlink()
    torch.save(found, folder / "pytorch_lora_weights.bin")
    return folder


def peft_folder(found: Mapping[str, Tensor], folder: Path, **options: Any) -> Path:
    folder.mkdir()
    named = {f"base_model.model.{name}": value.contiguous() for name, value in found.items()}
    save_file(named, folder / "adapter_model.safetensors")
    LoraConfig(r=RANK, target_modules=["to_k", "to_q", "to_v", "to_out.0"], **options).save_pretrained(folder)
    return folder


WRITERS: list[Callable[[Any, Path], Path]] = [
    by_export,
    by_file,
    by_run,
    by_kohya,
    by_diffusers,
    by_earlier_diffusers,
    by_peft,
    by_rank_stabilized_peft,
    by_pickle,
]


@pytest.mark.parametrize("write", WRITERS)
def test_a_lora_acts_as_it_did_for_its_maker(
    write: Callable[[Any, Path], Path], trained: Policy, pipeline_folder: Path, tmp_path: Path
) -> None:
    """Whatever the adapter's own alpha is, and with room for a higher rank."""
    place = write(trained, tmp_path / "lora")
    options = {"allow_pickle": True} if write is by_pickle else {}
    lora = {"rank": RANK + 1, "alpha": 5, "from": str(place)}
    policy = load_policy(settings(pipeline_folder, lora=lora, **options))
    torch.testing.assert_close(predict(policy), predict(trained), atol=1e-5, rtol=1e-5)
    with policy.reference(), trained.reference():
        assert torch.equal(predict(policy), predict(trained))
    assert f"LoRA rank 3 from {place}: " in policy.describe()


def test_where_a_checkpoints_weights_follow_the_file_is_not_needed(
    trained: Policy, pipeline_folder: Path, tmp_path: Path
) -> None:
    lora = {"rank": RANK, "from": str(tmp_path / "gone")}
    policy = load_policy(settings(pipeline_folder, lora=lora), start=False)
    with trained.reference():
        torch.testing.assert_close(predict(policy), predict(trained), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "dora"), [("sd", True), ("sdxl", False), ("sd3", False), ("flux", False), ("pixart", True)]
)
def test_exports_of_every_family_are_read_back(
    family: str, dora: bool, family_folder: Any, tmp_path: Path
) -> None:
    """Bit by bit, at the same rank and alpha; `adopted_lora` finds what fits."""
    config = settings(family_folder(family), lora={"dora": dora, "alpha": RANK}, **settings_of(family))
    policy = load_policy(config)
    disturb(policy)
    policy.export(tmp_path / "lora", weights(policy))
    start = ModelConfig.model_validate({**config.model_dump(), "lora": {"from": str(tmp_path / "lora")}})
    found = weights(load_policy(adopted_lora(start)))
    assert found.keys() == weights(policy).keys()
    for name, value in weights(policy).items():
        assert torch.equal(found[name], value)


def test_the_adapter_of_the_text_encoder(pipeline_folder: Path, tmp_path: Path) -> None:
    both = settings(pipeline_folder, lora={"text_encoder": True})
    policy = load_policy(both)
    disturb(policy)
    policy.export(tmp_path / "lora", weights(policy))
    start = {"from": str(tmp_path / "lora")}
    found = load_policy(settings(pipeline_folder, lora={**start, "text_encoder": True}))
    torch.testing.assert_close(predict(found), predict(policy), atol=1e-5, rtol=1e-5)
    without = load_policy(settings(pipeline_folder, lora=start))
    assert "lora, without its adapter of text_encoder: " in without.describe()
    assert (predict(without) - predict(policy)).abs().max() > 1e-4
    lora = adopted_lora(settings(pipeline_folder, lora=start)).lora
    assert (lora.text_encoder, lora.rank, lora.alpha) == (True, 2, 2.0)


def test_other_layers_need_other_targets(pipeline_folder: Path, tmp_path: Path) -> None:
    """The message has the targets that fit; what the file lacks starts at the base model."""
    targets = ["attn1.to_q", "ff.net.2", "conv1"]
    policy = load_policy(settings(pipeline_folder, lora={"targets": targets}))
    disturb(policy)
    policy.export(tmp_path / "lora", weights(policy))
    start = {"from": str(tmp_path / "lora")}
    with pytest.raises(
        ConfigError, match=r"^model\.lora\.targets: no adapter for \d+ of the \d+ layers"
    ) as e:
        load_policy(settings(pipeline_folder, lora=start))
    override = str(e.value).partition("--set '")[2].removesuffix("'")
    assert override == "model.lora.targets=[attn1.to_q, conv1, net.2]"
    text = config_to_yaml(parse_config("model: {pretrained: x}", [override, "model.tune=lora"]))
    fitting = parse_config(text).model.lora.targets
    for more in ((), ("to_v",)):
        lora = {**start, "targets": [*(fitting or ()), *more]}
        found = load_policy(settings(pipeline_folder, lora=lora))
        torch.testing.assert_close(predict(found), predict(policy), atol=1e-5, rtol=1e-5)


# ---- errors


def changed(file: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    found = load_file(file)
    change(found)
    save_file(found, file)


def first_renamed(new: str) -> Callable[[dict[str, Tensor]], None]:
    def change(found: dict[str, Tensor]) -> None:
        name = next(iter(found))
        found[new.format(name=name)] = found.pop(name)

    return change


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (
            {"rank": 1},
            r"^model\.lora\.rank: found 1, allowed: 2 or more with '.*' of rank 2 \(model\.lora\.from",
        ),
        ({"dora": True}, r"^model\.lora\.dora: found true, allowed: false with '.*', which is a LoRA"),
    ],
)
def test_an_adapter_that_is_too_small_or_of_another_kind(
    lora: dict[str, Any], message: str, trained: Policy, pipeline_folder: Path, tmp_path: Path
) -> None:
    place = by_export(trained, tmp_path / "lora")
    with pytest.raises(ConfigError, match=message):
        load_policy(settings(pipeline_folder, lora={**lora, "from": str(place)}))


@pytest.mark.parametrize(
    ("new", "message"),
    [
        (
            "unet.nowhere.lora_A.weight",
            r"has no weights at down_blocks|nowhere",
        ),
        ("unet.more.lora_A.bias", r"has no weights at down_blocks"),
        ("unet.a.lokr_w1", r"is a LoKr, an adapter of another kind than LoRA$"),
        ("{name}.dora_scale", r"is a DoRA as kohya's scripts write it"),
        ("transformer.{name}", r"has no weights at down_blocks"),
    ],
)
def test_tensors_that_fit_nothing(
    new: str, message: str, trained: Policy, pipeline_folder: Path, tmp_path: Path
) -> None:
    changed(by_file(trained, tmp_path / "lora"), first_renamed(new))
    with pytest.raises(ConfigError, match=message) as error:
        load_policy(settings(pipeline_folder, lora={"from": str(tmp_path / "lora")}))
    assert str(error.value).startswith("model.lora.from: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("other", ["sdxl", "flux", "pixart"])
def test_the_lora_of_another_model(other: str, family_folder: Any, trained: Policy, tmp_path: Path) -> None:
    place = by_export(trained, tmp_path / "lora")
    with pytest.raises(ConfigError, match=r"^model\.lora\.from: ") as error:
        load_policy(settings(family_folder(other), lora={"from": str(place)}, **settings_of(other)))
    assert "\n" not in str(error.value)


def make_pipeline(folder: Path) -> Path:
    (folder / "model_index.json").write_text("{}")
    return folder


def make_run(folder: Path) -> Path:
    (folder / "config.yaml").write_text("")
    return folder


def make_two(folder: Path) -> Path:
    for name in "ab":
        save_file({"lora": torch.ones(1)}, folder / f"{name}.safetensors")
    return folder


def make_other_adapter(folder: Path) -> Path:
    place = peft_folder({"x": torch.ones(1)}, folder / "a")
    settings = json.loads((place / "adapter_config.json").read_text())
    (place / "adapter_config.json").write_text(json.dumps({**settings, "peft_type": "LOKR"}))
    return place


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "nowhere", r"no such folder or file: '"),
        (lambda folder: folder, r"is no LoRA's folder: it has no pytorch_lora_weights\.safetensors .* none$"),
        (make_two, r"other \.safetensors files: a\.safetensors, b\.safetensors; name the one you mean$"),
        (make_pipeline, r"is a whole pipeline, not a LoRA: it belongs to model\.pretrained$"),
        (make_run, r"is a run's folder without a LoRA: .*`loopfast export .* --to FOLDER` writes"),
        (make_other_adapter, r"is a (PeftType\.)?LOKR adapter; allowed: a LoRA$|LOKR|LoKr|lokr|LoKR|cannot"),
    ],
)
def test_what_is_no_lora(make: Callable[[Path], Path], message: str, tmp_path: Path) -> None:
    config = settings(Path("embedded"), lora={"from": str(make(tmp_path))})
    with pytest.raises(ConfigError, match=message) as error:
        load_policy(config)
    assert str(error.value).startswith("model.lora.from: ")
    assert "\n" not in str(error.value)


def test_a_pickled_lora_needs_the_switch(trained: Policy, pipeline_folder: Path, tmp_path: Path) -> None:
    place = by_pickle(trained, tmp_path / "lora")
    with pytest.raises(ConfigError, match=r"is a pickled file, .*model\.allow_pickle: true reads it"):
        check_model(settings(pipeline_folder, lora={"from": str(place)}))


def test_a_hub_name(
    trained: Policy, pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the client's cache, as it is kept on disk."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--somebody--style"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123")
    by_export(trained, repository / "snapshots" / "0123")
    policy = load_policy(settings(pipeline_folder, lora={"alpha": ALPHA, "from": "somebody/style"}))
    torch.testing.assert_close(predict(policy), predict(trained), atol=1e-5, rtol=1e-5)
    with pytest.raises(
        ConfigError, match=r"^model\.lora\.from: no LoRA at 'somebody/else': .*no such folder"
    ):
        load_policy(settings(pipeline_folder, lora={"from": "somebody/else"}))


def test_the_key_in_configurations() -> None:
    """`from` is a word of Python's own: the field has another name, and no one sees it."""
    config = parse_config("model: {pretrained: x, tune: lora}", ["model.lora.from=runs/a"])
    assert config.model.lora.from_ == "runs/a"
    shown = config_to_yaml(config)
    assert "    from: runs/a\n" in shown
    assert "from_" not in shown
    assert parse_config(shown) == config
    assert "from_" not in json.dumps(json_schema())
    with pytest.raises(
        ConfigError, match=r"unknown key 'model\.lora\.form'; nearest known key: 'model\.lora\.from'"
    ):
        parse_config("model: {pretrained: x, lora: {form: a}}")
    with pytest.raises(ConfigError, match=r"model\.lora\.from: found 3, allowed: "):
        parse_config("model: {pretrained: x, lora: {from: 3}}")


def test_all_weights_have_no_adapter_to_go_on_from() -> None:
    with pytest.raises(
        ConfigError, match=r"model\.lora\.from: found 'x', allowed: null with model\.tune: full"
    ):
        parse_config("model: {pretrained: embedded, lora: {from: x}}")
