"""T2I-CompBench's prompt files, with the oddities that the published ones have, and what measures each category."""

from __future__ import annotations

from pathlib import Path

import pytest

from loopfast.config import RewardConfig
from loopfast.errors import ConfigError
from loopfast.evaluation.benchmark.categories import TITLES, t2i_compbench
from loopfast.evaluation.benchmark.metrics import with_metrics, with_options
from loopfast.prompts import Prompt, load_prompts
from loopfast.prompts.t2i_compbench import CATEGORIES, SPLITS, BenchmarkPrompt, read_category
from loopfast.rewards import REWARDS, build_rewards

# Line ends, last lines, byte order marks, spaces, letters beyond ASCII: as in one published file or another.
FORMS = {
    "color": b"a green bench and a red car\r\na red bench and a green car\r\na green bench and a red car",
    "shape": "a conical hat and a spherical piñata\r\n\r\na round bag and a cubic box \r\n".encode(),
    "texture": b"rubber gloves and a fluffy bear\n\ta metallic  car and a wooden desk\n\n\n",
    "spatial": b"a dog on the left of a cat\ra balloon next to a frog\r",
    "3d_spatial": b"a sofa in front of a plate\na fish behind a butterfly",
    "numeracy": b"\xef\xbb\xbffour trucks\ntwo cups and a person",
    "non_spatial": "A person is people-watching at a café.\r\nA child is playing.\r\n\r\n".encode(),
    "complex": b"The red hat was on top of the rack.\r\nThe cat slept.\r\n   \r\n",
}
FIRST = {
    "color": "a green bench and a red car",
    "shape": "a conical hat and a spherical piñata",
    "texture": "rubber gloves and a fluffy bear",
    "spatial": "a dog on the left of a cat",
    "3d_spatial": "a sofa in front of a plate",
    "numeracy": "four trucks",
    "non_spatial": "A person is people-watching at a café.",
    "complex": "The red hat was on top of the rack.",
}
LAST = {
    "color": "a green bench and a red car",
    "shape": "a round bag and a cubic box",
    "texture": "a metallic car and a wooden desk",
    "spatial": "a balloon next to a frog",
    "3d_spatial": "a fish behind a butterfly",
    "numeracy": "two cups and a person",
    "non_spatial": "A child is playing.",
    "complex": "The cat slept.",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for category, data in FORMS.items():
        for split in SPLITS:
            extra = b"" if split == "val" else b"\na prompt to train on"
            (tmp_path / f"{category}_{split}.txt").write_bytes(data + extra)
    return tmp_path


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("category", CATEGORIES)
def test_all_sixteen_files(category: str, split: str, folder: Path) -> None:
    texts = [prompt.text for prompt in read_category(folder, category, split)]
    if split == "train":
        assert texts.pop() == "a prompt to train on"
    assert texts[0] == FIRST[category]
    assert texts[-1] == LAST[category]
    assert len(texts) == (3 if category == "color" else 2)


@pytest.mark.parametrize(("suffix", "split"), [("", "train"), ("-val", "val")])
@pytest.mark.parametrize("category", CATEGORIES)
def test_they_are_a_source_of_prompts(category: str, suffix: str, split: str, folder: Path) -> None:
    found = load_prompts(f"t2i-compbench:{folder}:{category}{suffix}")
    texts = [prompt.text for prompt in read_category(folder, category, split)]
    assert found == [Prompt(text, {"category": category}) for text in texts]


def test_lists_of_complex_prompts_are_read_where_they_are(folder: Path) -> None:
    (folder / "complex_val_spatial.txt").write_text("The red hat was on top of the rack.\r\n")
    (folder / "complex_val_action.txt").write_text("The cat slept.")
    assert read_category(folder, "complex", "val") == [
        BenchmarkPrompt("The red hat was on top of the rack.", ("attribute", "spatial")),
        BenchmarkPrompt("The cat slept.", ("attribute", "action")),
    ]
    prompts = load_prompts(f"t2i-compbench:{folder}:complex-val")
    assert prompts[0].metadata == {"category": "complex", "aspects": ["attribute", "spatial"]}
    assert read_category(folder, "complex", "train")[0].aspects is None


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("t2i-compbench:FOLDER:colour", "with a category of color, shape,"),
        ("t2i-compbench:FOLDER:color-train", "with a category of color, shape,"),
        ("t2i-compbench:color", "allowed: t2i-compbench:<folder>:<category>"),
        ("t2i-compbench:FOLDER/nowhere:color", "there is no folder 'FOLDER/nowhere'"),
        ("t2i-compbench:FOLDER/empty:color", "there is no file 'color_train.txt' in 'FOLDER/empty'"),
        ("t2i-compbench:FOLDER/bad:color", "'FOLDER/bad/color_train.txt' holds no prompt"),
        ("t2i-compbench:FOLDER/bad:shape", "'FOLDER/bad/shape_train.txt' cannot be read"),
    ],
)
def test_what_is_wrong_is_said(source: str, reason: str, folder: Path) -> None:
    (folder / "empty").mkdir()
    (folder / "bad").mkdir()
    (folder / "bad" / "color_train.txt").write_bytes(b"\r\n  \n")
    (folder / "bad" / "shape_train.txt").write_bytes(b"a caf\xe9\n")
    with pytest.raises(ConfigError) as error:
        load_prompts(source.replace("FOLDER", str(folder)))
    assert reason.replace("FOLDER", str(folder)) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_category_that_is_none(folder: Path) -> None:
    with pytest.raises(ConfigError, match="no category 'colour' with a split 'val'"):
        read_category(folder, "colour", "val")


def test_every_category_has_its_metric(folder: Path) -> None:
    found = t2i_compbench(folder)
    assert [category.name for category in found] == list(CATEGORIES) == list(TITLES)
    names = [category.metric.name for category in found]
    assert names == [
        *["blip_vqa"] * 3,
        "spatial",
        "spatial_3d",
        "numeracy",
        "clip_score",
        "three_in_one",
    ]
    assert set(names) <= set(REWARDS)
    for category in found:
        assert [prompt.metadata["category"] for prompt in category.prompts] == [category.name] * len(
            category.prompts
        )
        build_rewards([category.metric], load=False)
    assert [category.name for category in t2i_compbench(folder, ["shape"])] == ["shape"]


def test_metrics_can_be_others(folder: Path) -> None:
    options = {"quality": 80}
    found = with_metrics(
        t2i_compbench(folder, ["color", "shape", "texture"]),
        ["color=jpeg_compressibility", "shape={name: jpeg_compressibility, options: {quality: 80}}"],
    )
    assert [category.metric for category in found] == [
        RewardConfig(name="jpeg_compressibility"),
        RewardConfig(name="jpeg_compressibility", options=options),
        RewardConfig(name="blip_vqa"),
    ]
    [mine] = with_metrics(t2i_compbench(folder, ["color"]), ["color=rewards:mine"])
    assert mine.metric == RewardConfig(name="rewards:mine")


def test_options_reach_every_metric_of_the_name(folder: Path) -> None:
    found = with_options(
        t2i_compbench(folder, ["color", "non_spatial", "complex"]),
        ["blip_vqa.weights=/models/blip", "clip_score.batch_size=4", "blip_vqa.dtype=bfloat16"],
    )
    blip = {"weights": "/models/blip", "dtype": "bfloat16"}
    clip = {"weights": "openai/clip-vit-base-patch32", "revision": "refs/pr/15", "batch_size": 4}
    assert [category.metric.options for category in found] == [
        blip,
        clip,
        {"blip_vqa": blip, "clip_score": clip},
    ]
    other = with_options(found, ["clip_score.weights=/models/clip", "clip_score.batch_size=4"])
    assert other[1].metric.options == {"weights": "/models/clip", "batch_size": 4}
    assert other[2].metric.options["clip_score"] == {"weights": "/models/clip", "batch_size": 4}
    # the benchmark's own are as they were
    assert t2i_compbench(folder, ["color"])[0].metric.options == {}


@pytest.mark.parametrize(
    ("metric", "reason"),
    [
        ("color", "allowed: CATEGORY=NAME or"),
        ("spatial=embedded", "with a category of color"),
        ("color={name: [}", "not YAML"),
        ("color={nam: embedded}", "name: Field required"),
        ("color={name: embedded, options: 3}", "options: Input should be a valid dictionary"),
        ("color=3", "--metric 'color=3': "),
    ],
)
def test_metrics_that_are_none(metric: str, reason: str, folder: Path) -> None:
    with pytest.raises(ConfigError) as error:
        with_metrics(t2i_compbench(folder, ["color"]), [metric])
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("blip_vqa=3", "allowed: NAME.KEY=VALUE"),
        ("blip_vqa.weights", "allowed: NAME.KEY=VALUE"),
        ("spatial.weights=x", "no category is measured by 'spatial'; allowed: options of blip_vqa"),
        ("blip_vqa.weights=[", "not YAML"),
    ],
)
def test_options_that_are_none(option: str, reason: str, folder: Path) -> None:
    with pytest.raises(ConfigError) as error:
        with_options(t2i_compbench(folder, ["color"]), [option])
    assert reason in str(error.value)
