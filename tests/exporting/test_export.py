from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from loopfast.__main__ import main
from loopfast.cli import app
from loopfast.config import load_config
from loopfast.errors import CheckpointError, ConfigError
from loopfast.evaluation.exported import lora_config
from loopfast.evaluation.models import newest_checkpoint, policy_of
from loopfast.exporting import export_run
from loopfast.run.console import Display
from loopfast.training.train import train
from tests.conftest import MakeConfig

SHORT = ("rollout.prompts_per_iteration=2", "rollout.steps=2", "evaluation.limit_prompts=1")
LORA = (*SHORT, "model.tune=lora", "model.lora.rank=4", "model.lora.alpha=8", "train.learning_rate=1e-2")
PROMPT = ["a red circle and a blue square"]


@pytest.fixture(scope="module")
def runs(make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("runs")
    configs = {
        "lora": make_config(directory, *LORA, "run.name=lora", "train.ema_decay=0.5"),
        "full": make_config(directory, *SHORT, "run.name=full", "train.iterations=1"),
    }
    return {tune: train(config, display=Display.silent()) for tune, config in configs.items()}


def export(run: Path, to: Path, **options: object) -> Path:
    return export_run(
        run, to, **{"form": None, "merge": False, "best": False, "display": Display.silent(), **options}
    )


@torch.no_grad()
def outputs(denoiser: torch.nn.Module, run: Path) -> torch.Tensor:
    policy = policy_of(load_config(run / "config.yaml"), newest_checkpoint(run, Display.silent()))
    sample = torch.randn(1, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    timestep, text = torch.tensor([501]), policy.encode(PROMPT)
    ours = policy.predict(sample, timestep, text)[0]
    theirs = denoiser(sample, timestep, **text, return_dict=False)[0]
    torch.testing.assert_close(theirs, ours, atol=2e-5, rtol=0)
    return ours


def card(folder: Path) -> tuple[dict[str, object], str]:
    _, head, body = (folder / "README.md").read_text("utf-8").split("---\n", 2)
    return yaml.safe_load(head), body


def test_an_adapter(runs: dict[str, Path], pipeline_folder: Path, tmp_path: Path) -> None:
    folder = export(runs["lora"], tmp_path / "out")
    pipeline = DiffusionPipeline.from_pretrained(pipeline_folder)
    pipeline.load_lora_weights(folder)
    outputs(pipeline.unet, runs["lora"])
    head, body = card(folder)
    assert head["library_name"] == "diffusers"
    assert "lora" in head["tags"]  # type: ignore[operator]
    assert 'load_lora_weights("PATH/TO/THIS/FOLDER")' in body
    assert "[LOOP](https://arxiv.org/abs/2503.00897),\nK = 2, for `jpeg_compressibility`:" in body
    assert "3 iterations, 12 images sampled; the weights are a moving average." in body
    assert str(pipeline_folder) not in body
    with Image.open(folder / "training.png") as picture:
        assert picture.width > 400
    settings = body.partition("```yaml\n")[2].partition("```")[0]
    (tmp_path / "again.yaml").write_text(settings)
    again, given = (load_config(file) for file in (tmp_path / "again.yaml", runs["lora"] / "config.yaml"))
    assert again.model_copy(update={"model": given.model, "run": given.run}) == given
    # and no key that is a default
    assert "beta1" not in settings


def test_the_moving_average_is_what_is_exported(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = export(runs["lora"], tmp_path / "out")
    tensors = newest_checkpoint(runs["lora"], Display.silent()).tensors
    name = next(name for name in tensors["policy"] if "lora_B" in name)
    written = load_file(folder / "pytorch_lora_weights.safetensors")[f"unet.{name.replace('.loopfast', '')}"]
    # alpha is twice the rank, and readers take it to be the rank
    torch.testing.assert_close(written, 2 * tensors["average"][name])
    assert not torch.equal(tensors["average"][name], tensors["policy"][name])


def test_the_best_checkpoint(runs: dict[str, Path], tmp_path: Path) -> None:
    run = Path(shutil.copytree(runs["lora"], tmp_path / "run"))
    manifest = run / "checkpoints" / "iteration-000002" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "score": 1e9}))
    assert "2 iterations, 8 images" in card(export(run, tmp_path / "best", best=True))[1]
    assert "3 iterations, 12 images" in card(export(run, tmp_path / "newest"))[1]


@pytest.mark.parametrize("options", [{"merge": True}, {"form": "full"}])
def test_an_adapter_merged(options: dict[str, object], runs: dict[str, Path], tmp_path: Path) -> None:
    folder = export(runs["lora"], tmp_path / "out", **options)
    pipeline = DiffusionPipeline.from_pretrained(folder)
    outputs(pipeline.unet, runs["lora"])
    assert 'from_pretrained("PATH/TO/THIS/FOLDER", torch_dtype=torch.float32)' in card(folder)[1]
    assert "lora" not in card(folder)[0]["tags"]  # type: ignore[operator]


def test_all_weights(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = export(runs["full"], tmp_path / "out", best=True)
    outputs_of = DiffusionPipeline.from_pretrained(folder)
    assert type(outputs_of).__name__ == "StableDiffusionPipeline"
    assert "| reward |" in card(folder)[1]


@pytest.mark.parametrize(
    ("tune", "options", "message"),
    [
        ("full", {"form": "lora"}, r"--format lora: .* has trained all weights"),
        ("full", {"merge": True}, r"--merge: .* has trained all weights"),
        ("lora", {"form": "lora", "merge": True}, r"--merge adds the adapter to the weights"),
    ],
)
def test_forms_that_cannot_be_had(
    tune: str, options: dict[str, object], message: str, runs: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        export(runs[tune], tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(runs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(ConfigError, match=r"--to: .* is there already and not empty"):
        export(runs["lora"], tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not a run's folder"):
        export(tmp_path, tmp_path / "out")


def test_a_run_without_checkpoints(runs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text((runs["lora"] / "config.yaml").read_text())
    for best in (False, True):
        with pytest.raises(CheckpointError, match=r"has no checkpoint"):
            export(tmp_path / "run", tmp_path / "out", best=best)


# ---- an exported LoRA by itself


def images(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


SAMPLE = ("a red circle", "--count", "1", "--steps", "2", "-q", "--output")


@pytest.fixture(scope="module")
def alone(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The LoRA of a run in several places: beside its run, exported with a card, and moved away from all that."""
    folder = tmp_path_factory.mktemp("exported")
    carded = export(runs["lora"], folder / "lora")
    bare = Path(shutil.copytree(runs["lora"] / "lora", folder / "bare"))
    moved = Path(shutil.copytree(carded, tmp_path_factory.mktemp("elsewhere") / "a" / "b" / "c"))
    return {"run": runs["lora"] / "lora", "card": carded, "bare": bare, "moved": moved}


@pytest.mark.parametrize("place", ["run", "card", "bare"])
def test_an_exported_lora_is_sampled(
    place: str, alone: dict[str, Path], runs: dict[str, Path], pipeline_folder: Path, tmp_path: Path
) -> None:
    """As its run is: where the run's average was exported, the same weights up to rounding, and the same base."""
    base = ["--pretrained", str(pipeline_folder)] if place == "bare" else []
    noise = ["--eta", "1", "--guidance-scale", "1"]
    assert main(["sample", str(runs["lora"]), *SAMPLE, str(tmp_path / "run"), *noise]) == 0
    assert main(["sample", str(alone[place]), *SAMPLE, str(tmp_path / "lora"), *noise, *base]) == 0
    ours, theirs = images(tmp_path / "lora"), images(tmp_path / "run")
    assert ours.keys() == theirs.keys() == {"000-a-red-circle-00.png", "grid.png"}
    pixels = [
        np.asarray(Image.open(tmp_path / name / "000-a-red-circle-00.png"), np.int16)
        for name in ("run", "lora")
    ]
    assert np.abs(pixels[0] - pixels[1]).max() <= 1


def test_an_exported_lora_is_measured(alone: dict[str, Path], runs: dict[str, Path], tmp_path: Path) -> None:
    found = []
    for number, place in enumerate((runs["lora"], alone["card"], alone["run"])):
        output = tmp_path / f"{number}.json"
        assert main(["eval", str(place), "-q", "--output", str(output)]) == 0
        found.append(json.loads(output.read_text("utf-8")))
    for other in found[1:]:
        assert other["reward"] == pytest.approx(found[0]["reward"], rel=1e-2)
        assert [item["prompt"] for item in other["items"]] == [item["prompt"] for item in found[0]["items"]]


@pytest.mark.parametrize(
    ("place", "command", "message"),
    [
        ("bare", "sample", r"does not say what model it was trained on .*; --pretrained names it"),
        ("bare", "eval", r"whose card has no recipe of loopfast, so there is no reward to measure"),
        (
            "moved",
            "sample",
            r"whose card says that its base model is at '.*', and nothing is there; --pretrained",
        ),
    ],
)
def test_a_lora_whose_base_is_not_known(
    place: str, command: str, message: str, alone: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    given = list(SAMPLE[:1]) if command == "sample" else []
    assert main([command, str(alone[place]), *given]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert re.search(message, line), line


@pytest.mark.parametrize("header", ["base_model: some/model", "base_model: [some/model]"])
def test_a_downloaded_lora_names_its_base(
    header: str, alone: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = Path(shutil.copytree(alone["bare"], tmp_path / "style"))
    (folder / "README.md").write_text(f"---\n{header}\n---\nA style.\n")
    with pytest.raises(ConfigError, match=r"no diffusers pipeline at 'some/model'"):
        lora_config(folder, None)


def test_training_goes_on_from_another_run(
    runs: dict[str, Path], make_config: MakeConfig, tmp_path: Path
) -> None:
    """Its first evaluation equals the last of the first run; afterwards its own checkpoint is enough."""
    before = Path(shutil.copytree(runs["lora"], tmp_path / "before"))
    options = (*LORA, "train.iterations=1", f"model.lora.from={before}", "run.name=after")
    after = train(make_config(tmp_path, *options), display=Display.silent())
    lines = [json.loads(line) for line in (after / "metrics.jsonl").read_text().splitlines()]
    last = json.loads((before / "evaluation" / "iteration-000003.json").read_text())
    assert lines[0]["eval_reward"] == pytest.approx(last["reward"], rel=1e-3)
    assert lines[1]["ratio_max_deviation"] < 1e-3
    shutil.rmtree(before)
    on = make_config(tmp_path, *options, "train.iterations=2")
    assert train(on, resume="auto", display=Display.silent()) == after
    assert f"from: {before}" in (after / "config.yaml").read_text()
    other = make_config(tmp_path, *options, "train.iterations=2", "model.lora.from=other")
    with pytest.raises(ConfigError, match=rf"model\.lora\.from \(was {before}, is other\)"):
        train(other, resume="auto", display=Display.silent())
    folder = export(after, tmp_path / "out")
    assert str(tmp_path) not in card(folder)[1]


def test_the_command(runs: dict[str, Path], tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["export", str(runs["lora"]), "--to", str(tmp_path / "out"), "--quiet"])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").is_file()
