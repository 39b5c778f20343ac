"""Benchmarks from end to end on tiny models: determinism, interruption, what is written, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from loopfast.__main__ import main
from loopfast.config import Config, RewardConfig
from loopfast.errors import ConfigError, LoopfastError
from loopfast.evaluation.benchmark.run import Category, MeasuredModel, SamplingPlan, image_seed, run_benchmark
from loopfast.evaluation.benchmark.score_file import Scored, ScoreFile
from loopfast.policies import load_policy
from loopfast.prompts import Prompt
from loopfast.rollout import Sampler
from loopfast.run.console import Display
from loopfast.training.train import train
from tests.tiny_models import write_blip, write_detector

MakeConfig = Callable[..., Config]

COLORS = [
    "a green bench and a red car",
    "a red bench and a green car",
    "a blue bowl and a red star",
    "a red bowl",
]

# Scores by brightness, keeps the prompts of each call, and fails from a given call on.
COUNTING = """
asked = []
fail_at = None

def score(images, prompts, metadata, scale=1.0):
    if fail_at is not None and len(asked) >= fail_at:
        raise RuntimeError("the power is gone")
    asked.append(list(prompts))
    return scale * images.mean((1, 2, 3))
"""


# It moves far in one short iteration.
SHORT = (
    "rollout.microbatch=3",
    "rollout.prompts_per_iteration=2",
    "rollout.steps=2",
    "train.iterations=1",
    "train.learning_rate=0.01",
    "evaluation.limit_prompts=1",
)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory, make_config: MakeConfig) -> Path:
    return train(make_config(tmp_path_factory.mktemp("full"), *SHORT), display=Display(quiet=True))


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory, make_config: MakeConfig) -> Path:
    config = make_config(tmp_path_factory.mktemp("lora"), *SHORT, "model.tune=lora")
    return train(config, display=Display(quiet=True))


@pytest.fixture
def prompt_files(tmp_path: Path) -> Path:
    folder = tmp_path / "t2i"
    folder.mkdir()
    (folder / "color_val.txt").write_bytes("\r\n".join(COLORS).encode())
    (folder / "spatial_val.txt").write_text("a dog next to a cat\na key on the left of a lamp\n")
    (folder / "numeracy_val.txt").write_text("two dogs\nthree cats and a key\n")
    return folder


@pytest.fixture
def counting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module of a reward of the user's own, in the current directory."""
    name = f"counting_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(COUNTING)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    import importlib

    yield importlib.import_module(name)
    sys.modules.pop(name)


def measure(*arguments: object) -> int:
    return main(["eval", *map(str, arguments)])


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text("utf-8"))


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()[1:]]


def test_t2i_compbench_with_its_own_metrics(
    full: Path, prompt_files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blip, detector = write_blip(tmp_path / "blip"), write_detector(tmp_path / "detector")
    output = tmp_path / "out"
    options = ["--benchmark", "t2i-compbench", "--prompts-dir", prompt_files, "--images-per-prompt", "2"]
    for name in ("numeracy", "color", "spatial"):
        options += ["--category", name]
    for name, weights in (("blip_vqa", blip), ("spatial", detector), ("numeracy", detector)):
        options += ["--metric-option", f"{name}.weights={weights}"]
    assert measure(full, *options, "--output", output, "--keep-images", 1) == 0

    found = results(output)
    assert list(found["categories"]) == ["color", "spatial", "numeracy"]
    assert list(found["models"]) == ["base", "trained"]
    assert found["models"]["trained"]["weights"]["checkpoint"] == "iteration-000001"
    assert set(found["versions"]) == {"loopfast", "torch", "diffusers", "transformers"}
    color = found["categories"]["color"]
    assert color["metric"] == {"name": "blip_vqa", "options": {"weights": str(blip)}}
    assert (color["prompts"], color["images_per_prompt"]) == (4, 2)
    assert [item["prompt"] for item in color["items"]] == COLORS
    for item in color["items"]:
        for model in ("base", "trained"):
            assert len(item[model]["images"]) == 2
            assert item[model]["mean"] == pytest.approx(sum(item[model]["images"]) / 2)
    for model in ("base", "trained"):
        interval = color["intervals"][model]
        assert interval["mean"] == pytest.approx(sum(item[model]["mean"] for item in color["items"]) / 4)
        assert interval["low"] <= interval["mean"] <= interval["high"]
    difference = color["intervals"]["difference"]
    assert difference["mean"] == pytest.approx(
        color["intervals"]["trained"]["mean"] - color["intervals"]["base"]["mean"]
    )
    assert difference["mean"] != 0

    table = (output / "results.md").read_text("utf-8").splitlines()
    assert table[2] == "| model | Color | 2D-Spatial | Numeracy |"
    assert [line.split(" | ")[0] for line in table[4:7]] == ["| base", "| trained", "| trained − base"]
    shown = capsys.readouterr().out
    assert "difference" in shown
    assert f"{color['intervals']['base']['mean']:.4f}" in shown
    # the names that the benchmark's own programs read
    samples = output / "images" / "trained" / "color" / "samples"
    assert sorted(path.name for path in samples.iterdir()) == sorted(
        f"{text}_{index:06d}.png" for index, text in enumerate(COLORS)
    )
    with Image.open(next(samples.iterdir())) as image:
        assert image.size == (32, 32)


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_the_base_is_the_model_before_training(
    tune: str, request: pytest.FixtureRequest, prompt_files: Path, counting: Any, tmp_path: Path
) -> None:
    """An untrained policy, sampled with the same noise, gives the base's images."""
    run: Path = request.getfixturevalue(tune)
    options = ["--benchmark", "t2i-compbench", "--prompts-dir", prompt_files, "--category", "color"]
    options += ["--metric", f"color={counting.__name__}:score", "--images-per-prompt", 1]
    assert measure(run, *options, "-q", "--output", tmp_path / "out") == 0
    from loopfast.evaluation.models import run_config, sampler_of

    config = run_config(run)
    sampler = sampler_of(config, load_policy(config.model, seed=config.run.seed))
    seeds = torch.tensor([image_seed(0, text, 0, 0) for text in COLORS])
    latents = sampler.sample(sampler.policy.encode(COLORS), torch.arange(4), seeds).final
    expected = sampler.decode(latents).mean((1, 2, 3))
    base, trained = (
        [row["score"] for row in rows(tmp_path / "out" / "scores" / f"{model}-color.jsonl")]
        for model in ("base", "trained")
    )
    assert base == pytest.approx(expected.tolist(), abs=1e-5)
    assert trained != pytest.approx(expected.tolist(), abs=1e-5)


def test_a_model_that_was_sampled_makes_room_for_the_next(full: Path) -> None:
    from loopfast.evaluation.models import RunModels, newest_checkpoint, run_config

    models = RunModels(run_config(full), newest_checkpoint(full, Display(quiet=True)))
    for opened in (models.base, models.trained):
        with opened() as sampler:
            sampler.sample(sampler.policy.encode(COLORS), torch.arange(4), torch.arange(4))
            assert len(sampler.steps) > 0
        assert len(sampler.steps) == 0


def test_the_embedded_benchmark(
    full: Path, capsys: pytest.CaptureFixture[str], tf32: Callable[[bool], None]
) -> None:
    tf32(True)
    assert measure(full, "--benchmark", "embedded", "--images-per-prompt", 1, "--limit-prompts", 1) == 0
    # as in a run, whatever the model's device
    assert not torch.backends.cudnn.allow_tf32
    folder = full / "benchmarks" / "embedded"
    assert f"written: {folder / 'results.json'}" in capsys.readouterr().out
    found = results(folder)
    assert list(found["categories"]) == ["color", "shape", "texture", "spatial", "numeracy", "complex"]
    assert all(category["metric"]["name"] == "embedded" for category in found["categories"].values())
    assert all(len(category["items"]) == 1 for category in found["categories"].values())


def counted(counting: Any, prompt_files: Path, output: Path, *more: object) -> list[object]:
    return [
        *("--benchmark", "t2i-compbench", "--prompts-dir", prompt_files, "--category", "color", "-q"),
        *("--metric", f"color={counting.__name__}:score", "--images-per-prompt", 2, "--output", output),
        *more,
    ]


def test_what_was_scored_before_a_failure_is_not_scored_again(
    full: Path, prompt_files: Path, counting: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert measure(full, *counted(counting, prompt_files, whole)) == 0
    # two models of 4 prompts with 2 images each, three images a call
    expected = list(counting.asked)
    assert [len(prompts) for prompts in expected] == [3, 3, 2, 3, 3, 2]

    counting.asked.clear()
    counting.fail_at = 4
    assert measure(full, *counted(counting, prompt_files, broken)) == 1
    error = capsys.readouterr().err
    assert "raised RuntimeError: the power is gone" in error
    assert counting.asked == expected[:4]
    assert len(rows(broken / "scores" / "base-color.jsonl")) == 8
    assert len(rows(broken / "scores" / "trained-color.jsonl")) == 3
    assert not (broken / "results.json").exists()

    # as if killed in the middle of a line
    with (broken / "scores" / "trained-color.jsonl").open("a") as file:
        file.write('{"prompt": 1, "im')
    counting.asked.clear()
    counting.fail_at = None
    assert measure(full, *counted(counting, prompt_files, broken)) == 0
    assert counting.asked == expected[4:]
    assert results(broken) == results(whole)

    # nothing is left to do: no image is drawn
    counting.fail_at = 0
    assert measure(full, *counted(counting, prompt_files, broken)) == 0
    assert results(broken) == results(whole)


def test_scores_of_other_settings_are_not_mixed(
    full: Path, prompt_files: Path, counting: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    options = counted(counting, prompt_files, output, "--limit-prompts", 1, "--no-base")
    assert measure(full, *options) == 0
    file = output / "scores" / "trained-color.jsonl"
    before = file.read_bytes()
    for changed, reason in (
        (["--seed", 1], "seed (was 0, is 1)"),
        (["--guidance-scale", 2], "model.rollout.guidance_scale (was 1.0, is 2.0)"),
        (["--steps", 3], "model.rollout.steps (was 2, is 3)"),
        (
            ["--metric-option", f"{counting.__name__}:score.scale=2.0"],
            "metric.options.scale (was None, is 2.0)",
        ),
        (["--metric", "color=jpeg_compressibility"], "is jpeg_compressibility)"),
    ):
        assert measure(full, *options, *changed) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert f"{file} holds scores of other settings: " in line
        assert reason in line
        assert "choose another folder with --output, or remove the file" in line
        assert file.read_bytes() == before


def test_other_prompts_and_a_checkpoint_trained_further_are_other_settings(
    full: Path,
    prompt_files: Path,
    counting: Any,
    tmp_path: Path,
    make_config: MakeConfig,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = Path(shutil.copytree(full, tmp_path / "small"))
    options = counted(counting, prompt_files, tmp_path / "out", "--limit-prompts", 1, "--no-base")
    assert measure(folder, *options) == 0
    train(make_config(tmp_path, *SHORT, "train.iterations=2"), resume="auto", display=Display(quiet=True))
    assert measure(folder, *options) == 2
    error = capsys.readouterr().err
    assert "trained-color.jsonl" in error
    assert "model.weights.checkpoint (was iteration-000001, is iteration-000002)" in error
    (prompt_files / "color_val.txt").write_text("a blue car\n")
    assert measure(folder, *options) == 2
    assert "prompts (was " in capsys.readouterr().err


def test_an_option_that_only_places_a_metric_is_no_other_setting(
    full: Path, prompt_files: Path, tmp_path: Path
) -> None:
    blip = write_blip(tmp_path / "blip")
    options = ["--benchmark", "t2i-compbench", "--prompts-dir", prompt_files, "--category", "color", "-q"]
    options += ["--metric-option", f"blip_vqa.weights={blip}", "--images-per-prompt", 1, "--no-base"]
    options += ["--output", tmp_path / "out"]
    assert measure(full, *options) == 0
    assert measure(full, *options, "--metric-option", "blip_vqa.batch_size=2") == 0


@pytest.mark.parametrize(
    ("options", "code", "reason"),
    [
        (["--benchmark", "geneval"], 2, "--benchmark: found 'geneval', allowed: t2i-compbench, embedded"),
        (["--benchmark", "t2i-compbench"], 2, "needs --prompts-dir, the folder of its prompt files"),
        (["--benchmark", "embedded", "--prompts-dir", "FILES"], 2, "--prompts-dir belongs to"),
        (
            ["--benchmark", "embedded", "--category", "size"],
            2,
            "embedded has no category 'size'; allowed: color",
        ),
        (["--benchmark", "embedded", "--prompts", "embedded:color"], 2, "--prompts: not with --benchmark"),
        (["--category", "color", "--eta", "0"], 2, "--category, --eta: only with --benchmark"),
        (["--no-base"], 2, "--no-base: only with --benchmark"),
        (["--benchmark", "t2i-compbench", "--prompts-dir", "FILES/none"], 2, "there is no folder"),
        (["--benchmark", "t2i-compbench", "--prompts-dir", "FILES"], 2, "there is no file 'shape_val.txt'"),
        (
            ["--benchmark", "embedded", "--metric", "color=embeded"],
            2,
            "no reward 'embeded'; nearest: 'embedded'",
        ),
        (["--benchmark", "embedded", "--output", "FILES/color_val.txt"], 1, "cannot write in "),
    ],
)
def test_errors_are_one_line(
    options: list[str],
    code: int,
    reason: str,
    full: Path,
    prompt_files: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [option.replace("FILES", str(prompt_files)) for option in options]
    assert measure(full, *given) == code
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert reason in line


def test_the_command_and_its_older_spelling_are_one(
    full: Path, prompt_files: Path, counting: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, _, *options = counted(counting, prompt_files, tmp_path / "old", "--no-base", "--limit-prompts", 1)
    assert measure(full, "--benchmark=t2i-compbench", *options) == 0
    options[options.index(tmp_path / "old")] = tmp_path / "new"
    assert main(["benchmark", str(full), "t2i-compbench", *map(str, options)]) == 0
    assert results(tmp_path / "new") == results(tmp_path / "old")
    assert main(["eval", "--help"]) == 0
    assert "Deprecated: loopfast eval RUN --benchmark NAME" in capsys.readouterr().out


@pytest.mark.parametrize("names", [[], ["embedded", "--benchmark", "embedded"]])
def test_a_benchmark_is_given_once(names: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", "runs/tiny", *names]) == 2
    assert capsys.readouterr().err == "error: give one benchmark: t2i-compbench or embedded\n"


def test_a_run_without_a_checkpoint_is_refused(
    full: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_bytes((full / "config.yaml").read_bytes())
    assert measure(tmp_path, "--benchmark", "embedded") == 1
    assert "has no checkpoint that can be used" in capsys.readouterr().err


# Without a command line.


@pytest.fixture(scope="module")
def sampler(make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Sampler:
    from loopfast.evaluation.models import sampler_of

    config = make_config(tmp_path_factory.mktemp("unused"), "rollout.microbatch=3")
    return sampler_of(config, load_policy(config.model))


def measured(sampler: Sampler, name: str = "base") -> MeasuredModel:
    @contextmanager
    def opened() -> Iterator[Sampler]:
        yield sampler

    return MeasuredModel(name, {"pretrained": "tiny"}, opened)


CATEGORIES = [
    Category(
        "one",
        [Prompt("a red circle"), Prompt("a blue star"), Prompt("a red circle")],
        RewardConfig(name="jpeg_compressibility"),
    ),
    Category("two", [Prompt("a blue star")], RewardConfig(name="jpeg_compressibility")),
]


def test_noise_is_a_function_of_seed_prompt_and_image(sampler: Sampler, tmp_path: Path) -> None:
    quiet = Display(quiet=True)
    found = run_benchmark([measured(sampler)], CATEGORIES, SamplingPlan(2), tmp_path / "a", quiet)["base"]
    assert {name: values.shape for name, values in found.items()} == {"one": (3, 2), "two": (1, 2)}
    other = Sampler(sampler.policy, sampler.schedule, 1.0, "sum", 8)
    again = run_benchmark([measured(other)], CATEGORIES, SamplingPlan(2), tmp_path / "b", quiet)["base"]
    for name, values in found.items():
        # a file's size jumps where a pixel does, by a few bytes
        assert torch.allclose(values, again[name], atol=0.02)
    one = {(row["prompt"], row["image"]): row["seed"] for row in rows(tmp_path / "a/scores/base-one.jsonl")}
    two = {(row["prompt"], row["image"]): row["seed"] for row in rows(tmp_path / "a/scores/base-two.jsonl")}
    assert one == {
        (p, k): image_seed(0, CATEGORIES[0].prompts[p].text, int(p == 2), k) for p in range(3) for k in (0, 1)
    }
    assert len(set(one.values())) == 6
    assert two == {(0, 0): one[1, 0], (0, 1): one[1, 1]}


def test_more_images_and_prompts_keep_those_there_are(
    sampler: Sampler, counting: Any, tmp_path: Path
) -> None:
    category = Category(
        "color", [Prompt(text) for text in COLORS], RewardConfig(name=f"{counting.__name__}:score")
    )

    def scores(folder: str, plan: SamplingPlan) -> torch.Tensor:
        found = run_benchmark([measured(sampler)], [category], plan, tmp_path / folder, Display(quiet=True))
        return found["base"]["color"]

    few = scores("a", SamplingPlan(1, limit_prompts=2))
    counting.asked.clear()
    more = scores("a", SamplingPlan(2))
    assert sum(map(len, counting.asked)) == 8 - 2
    assert torch.equal(more[:2, :1], few)
    # drawn in other batches
    assert torch.allclose(more, scores("b", SamplingPlan(2)), atol=1e-5)
    assert torch.allclose(
        scores("b", SamplingPlan(1, limit_prompts=2)), scores("c", SamplingPlan(2))[:2, :1], atol=1e-5
    )
    assert not torch.isclose(scores("d", SamplingPlan(2, seed=1)), more, atol=1e-5).any()


def test_both_models_have_the_same_noise(sampler: Sampler, tmp_path: Path) -> None:
    models = [measured(sampler), measured(sampler, "trained")]
    found = run_benchmark(models, CATEGORIES, SamplingPlan(1), tmp_path, Display(quiet=True))
    assert torch.equal(found["base"]["one"], found["trained"]["one"])


def test_images_of_long_prompts_and_slashes_are_kept(sampler: Sampler, tmp_path: Path) -> None:
    prompts = [Prompt("a red/blue circle_and " + "é" * 300)]
    category = Category("one", prompts, RewardConfig(name="jpeg_compressibility"))
    plan = SamplingPlan(3, keep_images=2)
    run_benchmark([measured(sampler)], [category], plan, tmp_path, Display(quiet=True))
    names = sorted(path.name for path in (tmp_path / "images/base/one/samples").iterdir())
    assert [name[-11:] for name in names] == ["_000000.png", "_000001.png"]
    assert all(name.startswith("a red blue circle and ") and len(name.encode()) <= 255 for name in names)


def test_progress_is_shown(sampler: Sampler, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for limit in (1, None):
        plan = SamplingPlan(2, limit_prompts=limit)
        run_benchmark([measured(sampler)], CATEGORIES[:1], plan, tmp_path, Display())
    assert capsys.readouterr().out.splitlines() == [
        "base, one: 2/2 images",
        "base, one: 2 of 6 images are scored already",
        "base, one: 6/6 images",
    ]


def test_a_score_file_keeps_what_it_was_given(tmp_path: Path) -> None:
    file = ScoreFile(tmp_path / "scores.jsonl", {"seed": 0, "options": {"a": [1, 2]}})
    file.add([Scored(0, 0, 7, 0.5), Scored(0, 1, 8, 0.1)])
    again = ScoreFile(tmp_path / "scores.jsonl", {"options": {"a": [1, 2]}, "seed": 0})
    assert again.scores == file.scores == {(0, 0): 0.5, (0, 1): 0.1}
    with pytest.raises(
        ConfigError, match=r"options\.a \(was \[1, 2\], is None\), options\.b \(was None, is 3\)"
    ):
        ScoreFile(tmp_path / "scores.jsonl", {"seed": 0, "options": {"b": 3}})


def test_a_damaged_score_file_is_not_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    ScoreFile(path, {"seed": 0}).add([Scored(0, 0, 7, 0.5)])
    path.write_text(path.read_text().replace('"image"', '"imag"') + "{}\n")
    with pytest.raises(LoopfastError, match="is damaged: line 2 is not as it was written"):
        ScoreFile(path, {"seed": 0})
    path.write_text("[]\n")
    with pytest.raises(LoopfastError, match="is damaged: line 1"):
        ScoreFile(path, {"seed": 0})
    # killed before its first line was whole
    path.write_text('{"settings": {"se')
    assert ScoreFile(path, {"seed": 0}).scores == {}
