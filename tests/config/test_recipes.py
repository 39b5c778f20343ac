"""Every recipe of the package: it is what docs/recipes.md says, and trains a tiny model of its family."""

from __future__ import annotations

import json
import math
import shlex
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    BlipConfig,
    BlipForQuestionAnswering,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from benchmarks.embedded_model.tokenizer import MAX_LENGTH, write_tokenizer
from loopfast.config import Config, ModelConfig, load_config, parse_config, recipes
from loopfast.planning import load_architecture, plan
from loopfast.planning.architectures import Architecture
from loopfast.planning.devices import DEVICES
from loopfast.planning.memory import Resources, footprint
from loopfast.prompts import load_prompts
from loopfast.rewards.models.aesthetic import ScoreHead
from loopfast.run.console import Display
from loopfast.training.train import train
from tests.families import settings_of
from tests.tiny_models import write_blip

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "recipes.md"
GIB = 2**30
TINY = {
    "embedded": None,
    "sd15": "sd",
    "sd21-base": "sd",
    "sdxl": "sdxl",
    "sd35-medium": "sd35",
    "flux-dev": "flux",
}
WIDTH = 16  # of the small CLIP's embeddings
# Each is trained by the same lines as another, since K is at most 2 and all files hold the same prompts: sd21-color is
# -k2, -k3, -shape and -texture, -rloo is -reinforce with the baseline of loop, and sd15-jpeg is -compressibility.
LIKE_ANOTHER = {
    "sd15-compressibility",
    "sd21-color-k2",
    "sd21-color-k3",
    "sd21-color-rloo",
    "sd21-shape",
    "sd21-texture",
}


def architecture_of(config: Config) -> Architecture:
    """Of a recipe's model, without its weights."""
    return _loaded(config.model.model_dump_json())


@cache
def _loaded(model: str) -> Architecture:
    return load_architecture(ModelConfig.model_validate_json(model))


def reward_models() -> dict[str, int]:
    """Bytes in float32 of the published models behind the recipes' rewards."""
    large = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        patch_size=14,
        projection_dim=768,
    )
    huge = CLIPConfig(
        text_config={
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "projection_dim": 1024,
        },
        vision_config={
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "num_hidden_layers": 32,
            "num_attention_heads": 16,
            "patch_size": 14,
            "projection_dim": 1024,
        },
        projection_dim=1024,
    )
    with torch.device("meta"):
        models = {
            "aesthetic": CLIPVisionModelWithProjection(large),
            "pickscore": CLIPModel(huge),
            "blip_vqa": BlipForQuestionAnswering(BlipConfig()),
        }
    return {name: 4 * sum(p.numel() for p in model.parameters()) for name, model in models.items()}


def rows() -> list[list[str]]:
    """The table of the recipes for real weights."""
    found, models = [], reward_models()
    for name in recipes():
        config = load_config(name)
        if config.model.pretrained == "embedded":
            continue
        there = architecture_of(config)
        run = footprint(config, there, Resources("cuda", 80 * GIB)).total
        reward = sum(models.get(term.name, 0) for term in config.reward)
        device = next(device for device in DEVICES.values() if 1.1 * (run + reward) < device.memory)
        found.append(
            [
                f"`{name}`",
                there.title,
                ", ".join(f"`{term.name}`" for term in config.reward),
                f"`{config.prompts.source}`",
                f"`{config.algorithm.name}`, K = {config.algorithm.samples_per_prompt}",
                f"{run / GIB:.1f} + {reward / GIB:.1f}",
                device.title,
            ]
        )
    return found


def test_the_page_says_what_the_recipes_are_and_need() -> None:
    lines = PAGE.read_text("utf-8").splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert [cells for cells in table if len(cells) == 7][2:] == rows()


def test_the_commands_of_the_page_are_allowed() -> None:
    tried = 0
    for line in PAGE.read_text("utf-8").splitlines():
        words = shlex.split(line, comments=True) if line.startswith("loopfast train") else []
        if words:
            overrides = [value for flag, value in pairwise(words) if flag == "--set"]
            load_config(words[words.index("--config") + 1], overrides)
            tried += bool(overrides)
    assert tried == 7


def test_the_comparison_differs_in_the_algorithm_only() -> None:
    base = load_config("sd21-color")
    images = base.rollout.prompts_per_iteration * base.algorithm.samples_per_prompt
    for name in recipes():
        if not name.startswith(("sd21-color-", "sd21-shape", "sd21-texture")):
            continue
        there = load_config(name)
        assert there.rollout.prompts_per_iteration * there.algorithm.samples_per_prompt == images
        category = name.split("-")[1]
        ours, theirs = base.model_dump(), there.model_dump()
        for section in (ours["prompts"], ours["evaluation"]):
            key = "source" if "source" in section else "prompts"
            section[key] = section[key].replace("color", category)
        for data in (ours, theirs):
            del data["run"]["name"], data["rollout"]["prompts_per_iteration"]
            del data["algorithm"]["name"], data["algorithm"]["samples_per_prompt"]
            if there.algorithm.name in ("rloo", "reinforce"):
                del data["algorithm"]["clip_range"], data["train"]["updates_per_iteration"]
        assert ours == theirs
        if there.algorithm.name in ("rloo", "reinforce"):
            assert (there.algorithm.clip_range, there.train.updates_per_iteration) == (None, 1)


def test_ddpos_settings() -> None:
    for name in ("sd15-aesthetic", "sd15-compressibility", "sd21-color"):
        config = load_config(name)
        assert (config.rollout.steps, config.rollout.eta, config.rollout.guidance_scale) == (50, 1.0, 5.0)
        assert (config.train.learning_rate, config.algorithm.clip_range) == (3e-4, 1e-4)
        assert config.algorithm.logprob == "mean"
        images = config.rollout.prompts_per_iteration * config.algorithm.samples_per_prompt
        assert images // config.train.updates_per_iteration == 64


def test_prompts_that_need_no_file() -> None:
    animals = load_prompts("loopfast.recipes.prompts:animals")
    assert len(animals) == len({prompt.text for prompt in animals}) == 45


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP with its preprocessing, and the aesthetic predictor's head for its embeddings."""
    folder = tmp_path_factory.mktemp("clip")
    words = write_tokenizer(folder)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    small["projection_dim"] = WIDTH
    text = {**small, "vocab_size": len(words), "max_position_embeddings": MAX_LENGTH}
    vision = {**small, "image_size": 32, "patch_size": 16}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH)).save_pretrained(
        folder
    )
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        folder
    )
    save_file(ScoreHead(WIDTH).state_dict(), folder / "head.safetensors")
    return folder


@pytest.fixture(scope="module")
def blip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_blip(tmp_path_factory.mktemp("blip"))


@pytest.fixture
def prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of the repositories that the recipes read their prompts from, in the current folder."""
    lines = "a red circle\ntwo blue squares\na green star\na white circle\n"
    benchmark = tmp_path / "T2I-CompBench" / "examples" / "dataset"
    preferences = tmp_path / "flow_grpo" / "dataset" / "pickscore"
    for directory in (benchmark, preferences):
        directory.mkdir(parents=True)
    for category in ("color", "shape", "texture"):
        for split in ("train", "val"):
            (benchmark / f"{category}_{split}.txt").write_text(lines)
    for split in ("train", "test"):
        (preferences / f"{split}.txt").write_text(lines)
    monkeypatch.chdir(tmp_path)


def test_prompts_are_found(prompts: None) -> None:
    for name in recipes():
        config = load_config(name)
        assert load_prompts(config.prompts.source)
        if config.evaluation.prompts is not None:
            assert load_prompts(config.evaluation.prompts)


@pytest.mark.parametrize("name", [name for name in recipes() if name not in LIKE_ANOTHER])
def test_trains_a_tiny_model_of_its_family(
    name: str, family_folder: Any, clip_folder: Path, blip_folder: Path, prompts: None
) -> None:
    recipe = load_config(name)
    assert recipe.run.name == name
    data = recipe.model_dump(mode="json")
    family = TINY[architecture_of(recipe).name]
    if family is not None:
        data["model"] |= {"height": None, "width": None, "max_sequence_length": None, **settings_of(family)}
        data["model"]["pretrained"] = str(family_folder(family))
    data["model"] |= {"device": "cpu", "dtype": "float32"}
    weights = {
        "aesthetic": {"weights": str(clip_folder), "head": str(clip_folder / "head.safetensors")},
        "pickscore": {"weights": str(clip_folder)},
        "blip_vqa": {"weights": str(blip_folder), "revision": None},
    }
    for term in data["reward"]:
        term["options"] |= weights.get(term["name"], {})
    data["rollout"] |= {"prompts_per_iteration": 2, "steps": 2, "microbatch": 4}
    data["algorithm"]["samples_per_prompt"] = min(2, data["algorithm"]["samples_per_prompt"])
    data["train"] |= {"iterations": 1, "updates_per_iteration": 1, "microbatch": 4, "steps": "all"}
    data["evaluation"] |= {"images_per_prompt": 1, "limit_prompts": 1, "preview_images": 0}
    data["run"]["trackers"] = []
    config = parse_config(json.dumps(data))
    if family is not None:
        assert plan(config).chosen.fits
    with Display(quiet=True) as display:
        train(config, display=display)
    last = json.loads((Path("runs") / name / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["iteration"] == 1
    # the ratio before the first update is exactly 1: nothing lies outside of the clip
    assert last["on_policy_outside_clip"] == 0
    assert {f"reward_{term.name}" for term in config.reward} <= last.keys()
    assert all(math.isfinite(last[key]) for key in ("reward_mean", "loss", "grad_norm", "eval_reward"))
