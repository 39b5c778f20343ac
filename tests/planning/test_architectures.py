from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loopfast.config import ModelConfig
from loopfast.errors import ConfigError
from loopfast.planning import known, load_architecture

EMBEDDED = ModelConfig(pretrained="embedded")


@pytest.mark.parametrize(
    ("name", "denoiser", "vae", "encoders"),
    [
        ("sd15", 859_520_964, 83_653_863, [123_060_480]),
        ("sd21", 865_910_724, 83_653_863, [340_387_840]),
        ("sd21-base", 865_910_724, 83_653_863, [340_387_840]),
        ("sdxl", 2_567_463_684, 83_653_863, [123_060_480, 694_659_840]),
        ("sd3-medium", 2_028_328_000, 83_819_683, [123_650_304, 694_659_840, 4_762_310_656]),
        ("sd35-medium", 2_243_171_520, 83_819_683, [123_650_304, 694_659_840, 4_762_310_656]),
        ("sd35-large", 8_056_627_520, 83_819_683, [123_650_304, 694_659_840, 4_762_310_656]),
        ("flux-dev", 11_901_408_320, 83_819_683, [123_060_480, 4_762_310_656]),
        ("flux-schnell", 11_891_178_560, 83_819_683, [123_060_480, 4_762_310_656]),
        ("pixart-sigma", 610_856_096, 83_653_863, [4_762_310_656]),
    ],
)
def test_the_published_architectures_have_the_published_counts(
    name: str, denoiser: int, vae: int, encoders: list[int]
) -> None:
    architecture = load_architecture(EMBEDDED, name)
    assert architecture.denoiser.parameters() == denoiser
    assert architecture.vae.parameters() == vae
    assert [encoder.parameters() for encoder in architecture.text_encoders] == encoders


def test_shapes_of_the_published_architectures() -> None:
    found = {name: load_architecture(EMBEDDED, name) for name in known()}
    assert {name: (a.latent_shape, a.text_tokens, a.text_width) for name, a in found.items()} == {
        "sd15": ((4, 64, 64), 77, 768),
        "sd21": ((4, 96, 96), 77, 1024),
        "sd21-base": ((4, 64, 64), 77, 1024),
        "sdxl": ((4, 128, 128), 77, 2048),
        "sd3-medium": ((16, 128, 128), 333, 4096),
        "sd35-medium": ((16, 128, 128), 333, 4096),
        "sd35-large": ((16, 128, 128), 333, 4096),
        "flux-dev": ((64 * 64, 64), 512, 4096),
        "flux-schnell": ((64 * 64, 64), 512, 4096),
        "pixart-sigma": ((4, 128, 128), 300, 4096),
    }
    assert found["sd21"].image_shape == (3, 768, 768)
    assert found["flux-dev"].image_shape == (3, 1024, 1024)
    assert all(a.trainable for a in found.values())


def test_a_well_known_repository_needs_no_network() -> None:
    names = {hub: name for name, hubs in known().items() for hub in hubs}
    assert names["stable-diffusion-v1-5/stable-diffusion-v1-5"] == "sd15"
    for hub, name in names.items():
        assert load_architecture(ModelConfig(pretrained=hub)).name == name


def test_the_embedded_model_has_the_weights_it_has() -> None:
    from loopfast.policies import load_policy

    architecture = load_architecture(EMBEDDED)
    policy = load_policy(ModelConfig(pretrained="embedded", device="cpu"))
    assert architecture.denoiser.parameters() == sum(p.numel() for p in policy.denoiser.parameters())
    assert architecture.latent_shape == policy.latent_shape
    assert architecture.image_shape == (3, 32, 32)


def test_nothing_is_allocated() -> None:
    module = load_architecture(EMBEDDED, "sdxl").denoiser.build()
    assert all(parameter.device == torch.device("meta") for parameter in module.parameters())


def test_an_unknown_name_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"--model: found 'sd16', allowed: flux-dev, .*, sd15, .*sdxl"):
        load_architecture(EMBEDDED, "sd16")


def test_a_folder_that_is_no_pipeline_is_an_error(tmp_path: Path) -> None:
    config = ModelConfig(pretrained=str(tmp_path))
    with pytest.raises(ConfigError, match="is an empty folder"):
        load_architecture(config)
    (tmp_path / "model_index.json").write_text('{"_class_name": "Other"}')
    with pytest.raises(ConfigError, match="names no unet or transformer"):
        load_architecture(config)
    (tmp_path / "model_index.json").write_text('{"vae": ["diffusers", "A"], "unet": ["diffusers", "Other"]}')
    with pytest.raises(ConfigError, match="its denoiser is a Other; supported: UNet2DConditionModel"):
        load_architecture(config)


def test_a_repository_that_cannot_be_reached_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: object, **kwargs: object) -> None:
        raise OSError("no network\nwith advice")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    with pytest.raises(ConfigError, match=r"cannot read model_index.json of 'some/model': no network;"):
        load_architecture(ModelConfig(pretrained="some/model"))
