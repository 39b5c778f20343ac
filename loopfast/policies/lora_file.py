"""Reads LoRA files of any tool, by the loaders of diffusers and peft."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loopfast.config import LoraConfig, ModelConfig
from loopfast.errors import ConfigError, first_line, one_line
from loopfast.policies.families import Family
from loopfast.policies.loading import component_config, load_family
from loopfast.policies.signature import ADAPTER, layers_with_adapter
from loopfast.policies.single_file import read_shapes
from loopfast.policies.source import LORA_FILES, PICKLED, is_lora, local_path, locate, not_on_the_hub

KEY = "model.lora.from"
_PEFT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_TEXT = "text_encoder"
_OTHER_KINDS = {"lokr_": "LoKr", "hada_": "LoHa", "oft_": "OFT", "lora_mid": "LoCon in Tucker form"}


@dataclass(frozen=True)
class Factors:
    """The adapter of one layer, which adds ``scale · up · down`` to the layer's weight.

    Attributes:
        down: ``[r, ...]``, where r is the rank.
        up: ``[out, r, ...]``.
        scale: alpha / r, or the file's own scale.
        magnitude: a DoRA's norms of the weight's columns.
    """

    down: Tensor
    up: Tensor
    scale: float
    magnitude: Tensor | None = None


@dataclass(frozen=True)
class Lora:
    """The content of a LoRA file.

    Attributes:
        layers: for each network (the denoiser, the text encoder), its layers with an adapter, by name.
        unused: the names of the other networks that the file has adapters for.
    """

    layers: dict[str, dict[str, Factors]]
    unused: tuple[str, ...] = ()


def read_lora(config: ModelConfig, family: Family) -> Lora:
    """Reads the LoRA that ``model.lora.from`` names; it is a `ConfigError` if it does not fit the model."""
    file = lora_weights(config)
    names = read_shapes(KEY, file)
    if any("dora_scale" in name for name in names):
        raise ConfigError(
            f"{KEY}: {str(file)!r} is a DoRA as kohya's scripts write it, which diffusers does not read"
        )
    other = next((kind for part, kind in _OTHER_KINDS.items() if any(part in name for name in names)), None)
    if other is not None:
        raise ConfigError(f"{KEY}: {str(file)!r} is a {other}, an adapter of another kind than LoRA")
    try:
        if (file.parent / "adapter_config.json").is_file() and file.name in _PEFT_FILES:
            return _of_peft(config, family, file)
        return _of_diffusers(config, family, file)
    except (OSError, ValueError, KeyError, IndexError, TypeError, RuntimeError, AttributeError) as error:
        raise ConfigError(
            f"{KEY}: {str(file)!r} cannot be loaded into the {family.denoiser} of {config.pretrained!r}: "
            f"{one_line(first_line(error))}"
        ) from error


def adopted_lora(config: ModelConfig) -> ModelConfig:
    """Returns the section ``model`` with the rank, the layers and the kind of adapter of its ``lora.from``.

    Raises:
        ConfigError: the model or the LoRA cannot be found or read.
    """
    family = load_family(config)
    lora = read_lora(config, family)
    factors = [each for layers in lora.layers.values() for each in layers.values()]
    rank = _rank(factors)
    settings = config.lora.model_copy(
        update={
            "rank": rank,
            "alpha": float(rank),
            "targets": tuple(lora.layers[family.denoiser]),
            "dora": _is_dora(factors),
            "text_encoder": family.lora_of_text and _TEXT in lora.layers,
        }
    )
    return config.model_copy(update={"tune": "lora", "lora": settings})


def _rank(factors: Iterable[Factors]) -> int:
    """Returns the largest rank of some layers."""
    return max(each.down.shape[0] for each in factors)


def _is_dora(factors: Iterable[Factors]) -> bool:
    return any(each.magnitude is not None for each in factors)


def load_lora(module: torch.nn.Module, layers: Mapping[str, Factors], settings: LoraConfig) -> None:
    """Writes a LoRA into a module's adapter, which then computes the same as the file's.

    If the adapter's rank is higher, the other components stay as they were, and add nothing at first. So do layers
    that the file does not have.

    Raises:
        ConfigError: the adapter is too small for the LoRA, or is of another kind.
    """
    own = layers_with_adapter(module)
    _require_layers(module, own, layers)
    rank, dora = _rank(layers.values()), _is_dora(layers.values())
    if rank > settings.rank:
        raise ConfigError(
            f"model.lora.rank: found {settings.rank}, allowed: {rank} or more with {settings.from_!r} of rank {rank} "
            f"({KEY})"
        )
    if dora != settings.dora:
        raise ConfigError(
            f"model.lora.dora: found {str(settings.dora).lower()}, allowed: {str(dora).lower()} with "
            f"{settings.from_!r}, which is a {'DoRA' if dora else 'LoRA'} ({KEY})"
        )
    with torch.no_grad():
        for name, factors in layers.items():
            layer = own[name]
            rank = factors.down.shape[0]
            layer.lora_A[ADAPTER].weight[:rank] = factors.down
            layer.lora_B[ADAPTER].weight[:, :rank] = factors.up.float() * (
                factors.scale / layer.scaling[ADAPTER]
            )
            if factors.magnitude is not None:
                layer.lora_magnitude_vector[ADAPTER].weight.copy_(factors.magnitude)


def _require_layers(module: torch.nn.Module, own: Collection[str], wanted: Collection[str]) -> None:
    """Raises `ConfigError` if the file has layers that the adapter lacks; the message names targets that match."""
    missing = sorted(set(wanted) - set(own))
    if missing:
        names = [name.replace(".base_layer", "") for name, _ in module.named_modules()]
        raise ConfigError(
            f"model.lora.targets: no adapter for {len(missing)} of the {len(wanted)} layers that {KEY} has, such as "
            f"{missing[0]}; all of them: --set 'model.lora.targets=[{', '.join(_ends(names, wanted))}]'"
        )


def _ends(names: Collection[str], wanted: Collection[str]) -> list[str]:
    """Returns the shortest ends of names that match all ``wanted`` names and no others of ``names``."""
    others = Counter(end for name in set(names) - set(wanted) for end in _all_ends(name))
    return sorted({next((end for end in _all_ends(name) if not others[end]), name) for name in wanted})


def _all_ends(name: str) -> list[str]:
    parts = name.split(".")
    # an end does not begin with a number: to_out.0, not 0
    return [".".join(parts[-count:]) for count in range(1, len(parts) + 1) if not parts[-count].isdigit()]


def lora_weights(config: ModelConfig) -> Path:
    """Returns the file that ``model.lora.from`` names, downloaded if it is on the hub.

    Raises:
        ConfigError: there is no such file.
    """
    name = config.lora.from_
    assert name is not None
    place = local_path(KEY, name) or _downloaded(name)
    if place.is_dir():
        place = _in_folder(place)
    if place.suffix in PICKLED and not config.allow_pickle:
        raise ConfigError(
            f"{KEY}: {str(place)!r} is a pickled file, and such a file can hold a program; model.allow_pickle: true "
            "reads it, and nothing in it but tensors"
        )
    if place.suffix not in (".safetensors", *PICKLED):
        raise ConfigError(f"{KEY}: {str(place)!r} is a file of another kind; allowed: a .safetensors file")
    return place


def _in_folder(folder: Path) -> Path:
    if (folder / "config.yaml").is_file() and not is_lora(folder):
        if not is_lora(folder / "lora"):
            raise ConfigError(
                f"{KEY}: {str(folder)!r} is a run's folder without a LoRA: the run trained all weights, or is not "
                f"finished; `loopfast export {folder} --to FOLDER` writes what it has trained"
            )
        folder = folder / "lora"
    known = (*_PEFT_FILES, *LORA_FILES) if (folder / "adapter_config.json").is_file() else LORA_FILES
    for file in known:
        if (folder / file).is_file():
            return folder / file
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    if (folder / "model_index.json").is_file():
        raise ConfigError(
            f"{KEY}: {str(folder)!r} is a whole pipeline, not a LoRA: it belongs to model.pretrained"
        )
    found = ", ".join(file.name for file in files[:3]) or "none"
    raise ConfigError(
        f"{KEY}: {str(folder)!r} is no LoRA's folder: it has no {LORA_FILES[0]} or {_PEFT_FILES[0]}; other "
        f".safetensors files: {found}{'; name the one you mean' if files else ''}"
    )


def _downloaded(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        files = ["adapter_config.json", *_PEFT_FILES, *LORA_FILES]
        folder = Path(snapshot_download(name, allow_patterns=files))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{KEY}: no LoRA at {name!r}: {first_line(error)}{not_on_the_hub(name)}") from error
    if not is_lora(folder):
        raise ConfigError(
            f"{KEY}: {name!r} on the hub has no {LORA_FILES[0]} or adapter_config.json; download the file you mean, "
            "and name its path"
        )
    return folder


def _of_diffusers(config: ModelConfig, family: Family, file: Path) -> Lora:
    """Reads a file as the pipeline's ``load_lora_weights`` does: diffusers', kohya's and others' formats."""
    skeleton = _denoiser(config, family)
    pipeline_class = family.pipeline_class()
    if not hasattr(pipeline_class, "lora_state_dict"):
        raise ConfigError(
            f"{KEY}: {str(file)!r}: a LoRA for {family.title} is a folder in peft's form, with adapter_config.json"
        )
    options = {"unet_config": skeleton.config} if "StableDiffusionXLPipeline" in family.pipelines else {}
    found = pipeline_class.lora_state_dict(
        str(file.parent),
        weight_name=file.name,
        use_safetensors=file.suffix == ".safetensors",
        return_lora_metadata=True,
        return_alphas=True,
        **options,
    )
    weights, metadata = found[0], found[-1]
    alphas = found[1] if len(found) == 3 else None
    networks = {name.split(".")[0] for name in weights}
    denoiser: str = family.denoiser
    if denoiser not in networks:
        shown = ", ".join(list(weights)[:2])
        raise ConfigError(
            f"{KEY}: {str(file)!r} has no adapter of a {denoiser}; its tensors are called {shown}, ..."
        )
    loading = {"metadata": metadata, "adapter_name": ADAPTER, "low_cpu_mem_usage": True}
    skeleton.load_lora_adapter(weights, prefix=denoiser, network_alphas=alphas, **loading)
    layers = {denoiser: _layers(file, weights, denoiser, skeleton)}
    if family.lora_of_text and _TEXT in networks:
        encoder = _text_encoder(config)
        pipeline_class.load_lora_into_text_encoder(weights, alphas, encoder, prefix=_TEXT, **loading)
        layers[_TEXT] = _layers(file, weights, _TEXT, encoder)
    return Lora(layers, tuple(sorted(networks - layers.keys())))


def _of_peft(config: ModelConfig, family: Family, file: Path) -> Lora:
    """Reads a folder in peft's form: ``adapter_config.json`` and the weights of one network."""
    from peft import PeftConfig, inject_adapter_in_model, set_peft_model_state_dict
    from safetensors.torch import load_file

    settings = PeftConfig.from_pretrained(str(file.parent))
    if str(settings.peft_type).rpartition(".")[2] != "LORA":
        raise ConfigError(f"{KEY}: {str(file.parent)!r} is a {settings.peft_type} adapter; allowed: a LoRA")
    found = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
    weights = {name.removeprefix("base_model.model."): value for name, value in found.items()}
    skeleton, denoiser = _denoiser(config, family), str(family.denoiser)
    named = [f"{denoiser}.{name}" for name in weights]
    inject_adapter_in_model(settings, skeleton, ADAPTER, low_cpu_mem_usage=True)
    set_peft_model_state_dict(skeleton, weights, ADAPTER, low_cpu_mem_usage=True)
    return Lora({denoiser: _layers(file, named, denoiser, skeleton)})


def _layers(file: Path, names: Iterable[str], network: str, skeleton: Any) -> dict[str, Factors]:
    """Returns the layers of a loaded adapter; raises if a tensor of the file for this network was not used."""
    layers = {name: _factors(file, name, layer) for name, layer in layers_with_adapter(skeleton).items()}
    given = [name for name in names if name.startswith(f"{network}.") and not name.endswith("alpha")]
    used = sum(3 if factors.magnitude is not None else 2 for factors in layers.values())
    if used != len(given):
        known = tuple(f"{network}.{name}." for name in layers)
        strange = [name for name in given if not name.startswith(known)]
        shown = f", such as {strange[0]}" if 0 < len(strange) < len(given) else ""
        raise ConfigError(
            f"{KEY}: {str(file)!r} has {len(given)} tensors for the {network}, and {used} of them fit it{shown}"
        )
    return layers


def _factors(file: Path, name: str, layer: Any) -> Factors:
    if ADAPTER not in getattr(layer, "lora_A", {}):
        raise ConfigError(f"{KEY}: {str(file)!r} is an adapter of another kind than LoRA, at {name}")
    down, up = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
    if down.weight.is_meta or up.weight.is_meta or up.bias is not None:
        what = "a bias, which is not supported" if up.bias is not None else "no weights"
        raise ConfigError(f"{KEY}: {str(file)!r} has {what} at {name}")
    magnitude = None
    if ADAPTER in layer.lora_magnitude_vector:
        magnitude = layer.lora_magnitude_vector[ADAPTER].weight.detach().float()
    return Factors(
        down.weight.detach().float(), up.weight.detach().float(), layer.scaling[ADAPTER], magnitude
    )


def _denoiser(config: ModelConfig, family: Family) -> Any:
    """Returns the denoiser without its weights."""
    import diffusers

    settings = component_config(config, family.denoiser)
    kind = getattr(diffusers, settings["_class_name"])
    return _without_weights(lambda: kind.from_config(settings))


def _text_encoder(config: ModelConfig) -> Any:
    """Returns CLIP's text encoder without its weights."""
    from transformers import CLIPTextConfig, CLIPTextModel

    settings = CLIPTextConfig.from_pretrained(
        str(locate(config)), subfolder=_TEXT, revision=config.revision or "main"
    )
    return _without_weights(lambda: CLIPTextModel(settings))


def _without_weights(make: Callable[[], Any]) -> Any:
    """Returns a network whose weights have addresses and no values: untouched memory costs none."""
    with torch.device("meta"):
        network = make()
    return network.to_empty(device="cpu")
