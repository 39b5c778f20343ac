from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import loopfast
import loopfast.evaluation
import loopfast.training.train
from loopfast.__main__ import main
from loopfast.config import Config, config_to_yaml, load_config
from loopfast.errors import Interrupted, LoopfastError, MissingExtraError, RewardError
from loopfast.policies import load_schedule, trained_steps

COMMANDS = [
    "train",
    "launch",
    "plan",
    "profile",
    "sample",
    "eval",
    "benchmark",
    "report",
    "schedule",
    "rewards",
    "config",
    "doctor",
]


class Calls(list[tuple[tuple[Any, ...], dict[str, Any]]]):
    """Stands in for a function: keeps the arguments of each call, and answers or raises."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.append((args, kwargs))
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer


def test_entry_point_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "loopfast", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"loopfast {loopfast.__version__}\n", "")


def test_help_shows_every_command_and_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for command in COMMANDS:
        assert f" {command} " in shown
    assert "loopfast train --config tiny" in shown


@pytest.mark.parametrize(
    "command", [*COMMANDS, "config show", "config check", "config schema", "config deepspeed"]
)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split(), "--help"]) == 0
    assert f"Usage: loopfast {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["train"], "--config"),
        (["trian"], "trian"),
        (["train", "--config", "tiny", "--frobnicate"], "--frobnicate"),
        (["sample", "runs/tiny", "a cat", "--count", "none"], "--count"),
        (["sample", "runs/tiny", "a cat", "--eta", "2"], "--eta"),
        (["sample", "runs/tiny"], "give a prompt"),
        (["train", "--config", "nope"], "error: no configuration 'nope'"),
        (["train", "--config", "tiny", "--set", "train.lr=3"], "nearest known key: 'train.learning_rate'"),
        (["train", "--config", "tiny", "--set", "prompts.source=nope.txt"], "error: prompts 'nope.txt'"),
        (["config", "check", "tiny", "-s", "reward.0.name=nope"], "error: no reward 'nope'"),
        (
            ["config", "check", "tiny", "-s", "reward.0.name=./mine.py:fn"],
            "written module:function: write mine:fn",
        ),
        (["config", "check", "tiny", "-s", "evaluation.prompts=embedded:x"], "error: prompts 'embedded:x'"),
        (["report", "nowhere"], "error: 'nowhere' is not a run's folder"),
        (["schedule", "--config", "tiny", "-s", "model.pretrained=./nowhere"], "error: model.pretrained"),
    ],
)
def test_wrong_usage_or_configuration_exits_with_2(
    arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert reason in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_train_passes_configuration_and_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    train = Calls(tmp_path)
    monkeypatch.setattr(loopfast.training.train, "train", train)
    options = ["--set", "run.seed=3", "-s", "train.iterations=2", "--resume", "auto"]
    assert main(["train", "--config", "tiny", *options]) == 0
    [((config,), keywords)] = train
    assert config == load_config("tiny", ["run.seed=3", "train.iterations=2"])
    assert keywords["resume"] == "auto"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (Interrupted("saved in runs/tiny", exit_code=143), 143),
        (Interrupted("saved in runs/tiny"), 130),
        (RewardError("reward 'mine' raised", [0]), 1),
        (LoopfastError("the disk is full"), 1),
        (MissingExtraError("the tracker wandb", "wandb"), 1),
        (ModuleNotFoundError("No module named 'wandb'", name="wandb"), 1),
        (ModuleNotFoundError("No module named 'diffusers.x'", name="diffusers.x"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_failure_is_one_line_and_an_exit_code(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loopfast.training.train, "train", Calls(error))
    assert main(["train", "--config", "tiny"]) == code
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    if isinstance(error, LoopfastError):
        assert line == f"error: {error}"
    elif isinstance(error, ModuleNotFoundError):
        extra = "wandb" if error.name == "wandb" else "train"
        assert line.startswith("error: loopfast train needs the extra ")
        assert line.endswith(f"pip install 'loopfast[{extra}]'")


@pytest.mark.parametrize(
    "command", ["report", "compare", "sample --prompts embedded:color", "eval", "export --to y", "plan -c"]
)
def test_a_name_that_is_too_long_is_one_line(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split(), "x" * 300]) > 0
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "xxx" in line


@pytest.mark.parametrize(
    "error",
    [ZeroDivisionError(), OSError(5, "of a device"), ModuleNotFoundError("No module named 'x'", name="x")],
)
def test_defect_keeps_its_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loopfast.training.train, "train", Calls(error))
    with pytest.raises(type(error)):
        main(["train", "--config", "tiny"])


def forget_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that it is imported anew."""
    for name in [name for name in sys.modules if name.startswith("loopfast.cli")]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize("missing", ["typer", "rich.console"])
def test_base_install_names_the_extra(
    missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forget_the_command_line(monkeypatch)
    monkeypatch.setitem(sys.modules, missing, None)
    assert main(["train", "--config", "tiny"]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line == (
        f"error: loopfast train needs the extra 'train' (no module named '{missing.partition('.')[0]}'): "
        "pip install 'loopfast[train]'"
    )


def test_doctor_works_in_a_base_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor"]) == 0
    complete = capsys.readouterr().out
    forget_the_command_line(monkeypatch)
    monkeypatch.setitem(sys.modules, "typer", None)
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out == complete
    assert "kernels" in complete


def test_sample_passes_prompts_and_options(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sample = Calls([tmp_path / "a.png", tmp_path / "b.png"])
    monkeypatch.setattr(loopfast.evaluation, "sample_images", sample)
    (tmp_path / "more.txt").write_text("a dog\na bird\n")
    options = {
        "count": 2,
        "seed": 5,
        "steps": 20,
        "eta": 0.5,
        "guidance_scale": 3.0,
        "output": tmp_path / "out",
    }
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    assert main(["sample", "runs/tiny", "a cat", "--prompts", str(tmp_path / "more.txt"), *flags]) == 0
    [(positional, keywords)] = sample
    assert positional == ("runs/tiny", ["a cat", "a dog", "a bird"])
    assert {name: keywords[name] for name in options} == options
    assert capsys.readouterr().out.endswith(f"2 file(s) in {tmp_path / 'out'}\n")


def test_eval_passes_options_and_shows_rewards(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def scores(reward: float, exact: float, **more: Any) -> dict[str, Any]:
        return {"reward": reward, "parts": {"exact": exact}, **more}

    by_category = {"color": scores(0.5, 0.25, count=3), "shape": scores(0.75, 0.125, count=1)}
    result = scores(0.5625, 0.21875, by_category=by_category, items=[{}] * 4)
    evaluate = Calls(result)
    monkeypatch.setattr(loopfast.evaluation, "evaluate_checkpoint", evaluate)
    flags = [
        "--prompts",
        "embedded:all",
        "--images-per-prompt",
        "2",
        "--seed",
        "7",
        "-o",
        str(tmp_path / "x.json"),
    ]
    assert main(["eval", "runs/tiny", *flags]) == 0
    [(positional, keywords)] = evaluate
    assert positional == (Path("runs/tiny"),)
    del keywords["display"]
    assert keywords == {
        "pretrained": None,
        "prompts": "embedded:all",
        "images_per_prompt": 2,
        "seed": 7,
        "output": tmp_path / "x.json",
    }
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert ["color", "0.500", "0.250", "3"] in rows
    assert ["shape", "0.750", "0.125", "1"] in rows
    assert ["all", "0.562", "0.219", "4"] in rows


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, make_config: Callable[..., Config]) -> Path:
    """The folder of a run that the command has trained."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "mine.yaml").write_text(config_to_yaml(make_config(folder)), encoding="utf-8")
    assert main(["train", "--config", str(folder / "mine.yaml"), "-s", "train.iterations=1", "-q"]) == 0
    return folder / "small"


def test_train_trains(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = trained / "config.yaml"
    assert load_config(settings).train.iterations == 1
    assert main(["train", "--config", str(settings)]) == 2
    assert f"error: {trained} already holds a run" in capsys.readouterr().err
    assert main(["train", "--config", str(settings), "--resume", "auto", "--set", "train.iterations=2"]) == 0
    shown = capsys.readouterr()
    assert "iteration 2/2  reward " in shown.out
    assert str(trained / "report.html") in shown.out
    assert shown.err == ""
    # a resumed run is one run
    lines = (trained / "metrics.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [0, 1, 2]


def test_report_writes_a_page(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (trained / "report.html").unlink()
    assert main(["report", str(trained)]) == 0
    assert capsys.readouterr().out.split() == [str(trained / "report.html")]
    assert "<html" in (trained / "report.html").read_text("utf-8")


def test_schedule_shows_every_step_and_whether_it_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plot = tmp_path / "schedule.png"
    assert main(["schedule", "--config", "tiny", "-s", "train.steps=1:4", "--plot", str(plot)]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    config = load_config("tiny", ["train.steps=1:4"])
    schedule = load_schedule(config.model, config.rollout)
    assert [int(row[0]) for row in rows] == list(range(config.rollout.steps))
    assert [int(row[1]) for row in rows] == schedule.timesteps.tolist()
    for column, cells in enumerate(zip(*(row[2:5] for row in rows), strict=True)):
        assert [float(cell) for cell in cells] == pytest.approx(
            schedule.table64[:, column].tolist(), abs=1e-5
        )
    assert [float(row[5]) for row in rows] == pytest.approx(schedule.sensitivity.tolist(), rel=1e-2)
    trained = [step for step, row in enumerate(rows) if row[6] == "yes"]
    assert trained == list(trained_steps(schedule, "1:4")) == [1, 2, 3]
    assert f"3 of {config.rollout.steps} steps are trained on" in lines[-2]
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_config_show_prints_what_can_be_read_back(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["config", "show", "tiny", "--set", "run.seed=9"]) == 0
    shown = capsys.readouterr().out
    assert shown == config_to_yaml(load_config("tiny", ["run.seed=9"]))
    (tmp_path / "mine.yaml").write_text(shown)
    assert load_config(tmp_path / "mine.yaml").run.seed == 9


def test_config_check_counts_prompts_and_names_rewards(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\n# more\na dog\na cat\n")
    document = {"model": {"pretrained": "some/model"}, "prompts": {"source": str(file)}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(document))
    assert (
        main(["config", "check", str(tmp_path / "mine.yaml"), "-s", "reward.0.name=jpeg_compressibility"])
        == 2
    )
    assert main(["config", "check", str(tmp_path / "mine.yaml")]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown == [
        f"prompts {file}: 3 prompts (1 of them repeated; skipped: 1 comment line), the first 'a cat'",
        "lengths of prompts: not checked; the tokenizers of 'some/model' are not on this machine",
        "reward embedded: weight 1",
        f"{tmp_path / 'mine.yaml'}: no problem found",
    ]


def test_config_check_lists_the_prompts_that_are_cut(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "prompts.txt"
    # the embedded model reads 16 tokens, two of them marks of beginning and end
    kept = "a red circle and a blue cross and a red square and a green"
    file.write_text(f"# animals\na red circle\n{kept}\n{kept} cross\n{kept} triangle and a circle\n")
    assert main(["config", "check", "tiny", "-s", f"prompts.source={file}"]) == 0
    model, *shown = capsys.readouterr().out.splitlines()
    assert model == "model embedded: Stable Diffusion 1.x and 2.x"
    end = "'… red square and a green'"
    assert shown[0] == f"prompts {file}: 4 prompts (skipped: 1 comment line), the first 'a red circle'"
    assert shown[1].startswith(
        "  of which 2 of 4 are longer than a text encoder reads and cut (CLIP at 16 tokens: 2)"
    )
    assert shown[1].endswith(f", the first after {end}; 2 then the same to the model as an earlier one")
    assert shown[2:4] == [
        f"  line {line}: {tokens} tokens, of which CLIP reads 16, up to {end}; the same to the model as line 3"
        for line, tokens in ((4, 17), (5, 20))
    ]
    assert shown[4].startswith("prompts embedded:color-heldout: ")
    assert shown[-1] == "tiny: no problem found"


def test_config_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "schema"]) == 0
    assert set(json.loads(capsys.readouterr().out)["properties"]) == set(Config.model_fields)


def test_a_launch_hands_its_options_to_each_process(monkeypatch: pytest.MonkeyPatch) -> None:
    import loopfast.distributed.launch

    calls = Calls(None)
    monkeypatch.setattr(loopfast.distributed.launch, "launch", calls)
    options = ["--config", "tiny", "--set", "run.seed=1", "--resume", "auto", "--quiet"]
    assert main(["launch", "--nproc", "3", "--max-restarts", "2", *options]) == 0
    [(arguments, given)] = calls
    assert arguments == (["train", *options],)
    assert given == {"processes": 3, "restarts": 2}


def test_a_launch_of_what_cannot_run_starts_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import loopfast.distributed.launch

    monkeypatch.setattr(loopfast.distributed.launch, "launch", calls := Calls(None))
    assert main(["launch", "--nproc", "2", "--config", "tiny", "--set", "distributed.zero_stage=4"]) == 2
    assert "distributed.zero_stage: found 4, allowed: 0 or 1 or 2 or 3" in capsys.readouterr().err
    assert calls == []


def test_what_deepspeeds_launcher_puts_before_the_command_is_taken(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--local_rank=1", "config", "show", "tiny"]) == 0
    assert "name: tiny" in capsys.readouterr().out


def test_deepspeeds_settings_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "deepspeed", "sd15-jpeg", "--set", "distributed.zero_stage=3"]) == 0
    settings = json.loads(capsys.readouterr().out)
    assert settings["zero_optimization"]["stage"] == 3
    # of the 859.5 M parameters of its UNet, which is not here
    assert settings["zero_optimization"]["stage3_max_live_parameters"] == 859_520_964 // 20


def test_a_plan_is_printed_and_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--config", "tiny", "--card", "rtx3060", "--gpus", "2"]
    assert main(["plan", *options]) == 0
    assert "peak" in capsys.readouterr().out
    assert main(["plan", *options, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["device"]["gpus"] == 2
    assert main(["plan", "--config", "tiny", "--memory", "much"]) == 2
    assert "error: --memory" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", ["config show", "config check", "config deepspeed", "schedule", "plan --card rtx3060"]
)
def test_a_configuration_is_an_argument_or_an_option(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = []
    for given in (["tiny"], ["--config", "tiny"], ["-c", "tiny"]):
        assert main([*command.split(), *given, "--set", "run.seed=3"]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] == shown[2] != ""
    assert main([*command.split(), "tiny", "--config", "mine.yaml"]) == 2
    error = "error: the configuration is given twice, as 'tiny' and as --config 'mine.yaml'\n"
    assert capsys.readouterr().err == error
    values = ["--set", "run.seed=3", "run.name=b", "run.directory=c"]
    assert main([*command.split(), "--config", "tiny", *values]) == 2
    assert capsys.readouterr().err == "error: found 'run.name=b', allowed: one KEY=VALUE after each --set\n"
    assert main(command.split()) == 2
    assert "with or without --config" in " ".join(capsys.readouterr().err.replace("│", " ").split())


@pytest.mark.parametrize("command", [["train"], ["launch", "--nproc", "2"]])
def test_a_name_that_is_taken_comes_with_the_command_that_works(
    command: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("tiny", "tiny-2"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "metrics.jsonl").touch()
    assert main([*command, "--config", "tiny", "--set", "reward=[{name: embedded}]"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    start = (
        "error: runs/tiny already holds a run: go on with it (--resume auto), or give this one another name ("
    )
    assert line.startswith(start)
    arguments = shlex.split(line[len(start) : -1])
    assert arguments == [
        *("loopfast", *command, "--config", "tiny"),
        *("--set", "reward=[{name: embedded}]", "--set", "run.name=tiny-3"),
    ]
    done = Calls(tmp_path)
    monkeypatch.setattr(loopfast.training.train, "train", done)
    monkeypatch.setattr("loopfast.distributed.launch.launch", done)
    assert main(arguments[1:]) == 0
    assert len(done) == 1
