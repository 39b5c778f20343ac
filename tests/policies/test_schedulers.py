"""The scheduler that a model is trained with, from the files of published checkpoints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)

from loopfast.__main__ import main
from loopfast.config import Config, ModelConfig, RolloutConfig, parse_config
from loopfast.errors import ConfigError
from loopfast.policies import load_policy, load_schedule, load_scheduler, scheduler_notes
from loopfast.run.console import Display
from loopfast.run.folder import RunFolder
from loopfast.schedules import transition_schedule
from tests.families import save_tiny, settings_of

PROCESS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LEGACY_DDIM = {"_class_name": "DDIMScheduler", **PROCESS, "set_alpha_to_one": False, "steps_offset": 1}
LEGACY_LMS = {
    "_class_name": "LMSDiscreteScheduler",
    **PROCESS,
    "timestep_values": None,
    "trained_betas": None,
}
KARRAS: dict[str, Any] = {
    "_class_name": "DPMSolverMultistepScheduler",
    **PROCESS,
    "algorithm_type": "dpmsolver++",
    "clip_sample": False,
    "final_sigmas_type": "zero",
    "lambda_min_clipped": -float("inf"),
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "use_karras_sigmas": True,
    "use_lu_lambdas": False,
    "variance_type": None,
}

Model = Callable[..., ModelConfig]

# What Stable Diffusion's pipeline says when it changes a scheduler's options.
pytestmark = pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's tiny pipeline."""
    root = tmp_path_factory.mktemp("tiny")

    def folder(family: str) -> Path:
        return root / family if (root / family).exists() else save_tiny(family, root / family)

    return folder


@pytest.fixture
def model(tiny: Callable[[str], Path], tmp_path: Path) -> Model:
    """``model(family, file)``: a pipeline with this file as its scheduler's, None being its own."""

    def make(family: str = "sd", file: Any = None, **options: Any) -> ModelConfig:
        folder = Path(shutil.copytree(tiny(family), tmp_path / "model", dirs_exist_ok=True))
        if file is not None:
            (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(file))
            index = json.loads((folder / "model_index.json").read_text())
            index["scheduler"] = ["diffusers", file.get("_class_name", "DDIMScheduler")]
            (folder / "model_index.json").write_text(json.dumps(index))
        return ModelConfig(pretrained=str(folder), device="cpu", **settings_of(family), **options)

    return make


def options_of(config: ModelConfig) -> dict[str, Any]:
    return dict(load_scheduler(config).config)


@pytest.mark.parametrize("kind", [PNDMScheduler, EulerDiscreteScheduler])
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_other_samplers_of_the_process_become_ddim(family: str, kind: Any, model: Model) -> None:
    given = kind(**PROCESS, steps_offset=1, prediction_type="v_prediction")
    file = {key: value for key, value in given.config.items() if not key.startswith("_")}
    config = model(family, {"_class_name": kind.__name__, **file})
    scheduler = load_scheduler(config)
    assert type(scheduler) is DDIMScheduler
    # DDIM's own default would clip, which the model's own sampler never did
    assert scheduler.config.clip_sample is False
    assert scheduler.config.steps_offset == 1
    assert scheduler.config.prediction_type == "v_prediction"
    torch.testing.assert_close(scheduler.alphas_cumprod, given.alphas_cumprod)
    assert len(load_schedule(config, RolloutConfig(steps=10))) == 10
    assert scheduler_notes(config) == ()


# ---- what the family's pipeline makes of the file


@pytest.mark.parametrize("file", [LEGACY_DDIM, PROCESS, LEGACY_LMS])
def test_stable_diffusion_takes_what_the_file_does_not_say_as_its_pipeline_does(
    file: dict[str, Any], model: Model
) -> None:
    config = model("sd", file)
    ours = load_scheduler(config).config
    assert (ours.clip_sample, ours.steps_offset) == (False, 1)
    assert scheduler_notes(config) == ()
    if file is not LEGACY_LMS:  # whose class needs scipy
        theirs = DiffusionPipeline.from_pretrained(config.pretrained).scheduler.config
        assert (theirs.clip_sample, theirs.steps_offset) == (False, 1)


@pytest.mark.parametrize(
    ("option", "value", "taken"),
    [("clip_sample", True, False), ("steps_offset", 0, 1), ("steps_offset", 7, 1)],
)
def test_what_the_file_says_and_its_pipeline_changes_is_told(
    option: str, value: object, taken: object, model: Model
) -> None:
    config = model("sd", {**LEGACY_DDIM, option: value})
    assert options_of(config)[option] is taken
    [note] = scheduler_notes(config)
    assert f"says {option}={value}; StableDiffusionPipeline takes {taken} instead" in note
    theirs = DiffusionPipeline.from_pretrained(config.pretrained).scheduler.config
    assert theirs[option] == taken


@pytest.mark.parametrize("family", ["sdxl", "pixart"])
def test_other_pipelines_take_the_file_as_it_is(family: str, model: Model) -> None:
    file = {**LEGACY_DDIM, "clip_sample": False, "steps_offset": 0}
    assert options_of(model(family, file))["steps_offset"] == 0
    for kind in (DDIMScheduler, DDPMScheduler):
        with pytest.raises(
            ConfigError, match=r"clip_sample=True makes .*; model\.scheduler overrides options"
        ):
            load_scheduler(model(family, {**LEGACY_DDIM, "_class_name": kind.__name__}))
    # as the error advises
    assert options_of(model(family, LEGACY_DDIM, scheduler={"clip_sample": False}))["clip_sample"] is False


# ---- what DDIM replaces, and what is wrong


@pytest.mark.parametrize("family", ["sd", "sdxl", "pixart"])
def test_karras_sigmas_give_way_to_ddim_and_that_is_told(family: str, model: Model) -> None:
    config = model(family, KARRAS)
    [note] = scheduler_notes(config)
    assert (
        "DPMSolverMultistepScheduler, samples with use_karras_sigmas=True; training samples with DDIM" in note
    )
    plain = DDIMScheduler(**PROCESS, set_alpha_to_one=False, steps_offset=1, clip_sample=False)
    found = load_schedule(config, RolloutConfig(steps=10))
    assert torch.equal(found.table64, transition_schedule(plain, 10).table64)


def test_what_changes_the_process_is_still_refused(model: Model) -> None:
    for option, value in (("use_flow_sigmas", True), ("thresholding", True), ("timestep_spacing", "log")):
        with pytest.raises(ConfigError, match=f"the scheduler of '.*' cannot be used: .*{option}={value!r}"):
            load_scheduler(model("sd", {**KARRAS, option: value}))


def test_a_number_given_as_text_is_named(model: Model) -> None:
    with pytest.raises(ConfigError) as error:
        load_scheduler(model("sd", {**PROCESS, "num_train_timesteps": "1000", "clip_sample": False}))
    assert "num_train_timesteps='1000' is not a whole number from 1 to 100,000" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_scheduler_whose_class_needs_what_is_not_here_is_trained_and_exported(
    model: Model, tmp_path: Path
) -> None:
    policy = load_policy(model("sd", LEGACY_LMS))
    policy.export(tmp_path / "export", dict(policy.trainable()))
    exported = DiffusionPipeline.from_pretrained(tmp_path / "export").scheduler
    assert type(exported) is DDIMScheduler
    assert torch.equal(
        transition_schedule(exported, 10).table64, transition_schedule(policy.scheduler, 10).table64
    )


# ---- model.scheduler


def test_a_folder_is_chosen(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "other" / "scheduler"
    DDIMScheduler(**PROCESS, timestep_spacing="trailing", clip_sample=False).save_pretrained(folder)
    for name in (str(folder), str(folder.parent), "~/other", str(folder / "scheduler_config.json")):
        # the model's own cannot be used
        config = model("sd", {**PROCESS, "beta_end": "high"}, scheduler=name)
        assert options_of(config)["timestep_spacing"] == "trailing"
        assert "says steps_offset=0; StableDiffusionPipeline takes 1" in scheduler_notes(config)[0]


def test_a_class_is_chosen_with_the_models_own_options(model: Model) -> None:
    config = model("sdxl", KARRAS, scheduler="DDIMScheduler")
    assert options_of(config)["beta_end"] == PROCESS["beta_end"]
    # who asks for DDIM knows that it has no Karras sigmas
    assert scheduler_notes(config) == ()
    # also in place of a class that is not known here
    config = model("sdxl", {**KARRAS, "_class_name": "HeunDiscreteScheduler"})
    with pytest.raises(
        ConfigError, match=r"is HeunDiscreteScheduler; supported: .*; model\.scheduler chooses"
    ):
        load_scheduler(config)
    assert load_scheduler(config.model_copy(update={"scheduler": "DDIMScheduler"}))


def test_a_mapping_overrides_the_models_own_options(model: Model) -> None:
    config = model("sdxl", KARRAS, scheduler={"timestep_spacing": "trailing", "use_karras_sigmas": False})
    assert options_of(config)["timestep_spacing"] == "trailing"
    assert scheduler_notes(config) == ()
    config = model("sdxl", KARRAS, scheduler={"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True})
    assert options_of(config)["rescale_betas_zero_snr"] is True
    assert scheduler_notes(config) == ()
    config = model("sd3", scheduler={"shift": 1.0})
    assert type(load_scheduler(config)) is FlowMatchEulerDiscreteScheduler
    assert options_of(config)["shift"] == 1.0


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        (
            "nowhere",
            "model.scheduler: found 'nowhere', allowed: a folder with scheduler_config.json, a mapping of",
        ),
        ("~nobody/there", "model.scheduler: found '~nobody/there', allowed: a folder"),
        ("HeunDiscreteScheduler", "found 'HeunDiscreteScheduler', allowed: a folder"),
        (
            "FlowMatchEulerDiscreteScheduler",
            "model.scheduler is FlowMatchEulerDiscreteScheduler; supported: DDIM",
        ),
        ({"_class_name": 3}, "model.scheduler is 3; supported: DDIMScheduler"),
        (
            {"_class_name": ["DDIMScheduler"]},
            "model.scheduler is ['DDIMScheduler']; supported: DDIMScheduler",
        ),
        (
            {"clip_samples": 1},
            "model.scheduler cannot be used: the scheduler's option clip_samples=1 is not known",
        ),
        (
            {"beta_end": "0.01"},
            "model.scheduler cannot be used: the scheduler's option beta_end='0.01' is not a",
        ),
        ({"thresholding": True}, "the scheduler's option thresholding=True makes the mean nonlinear"),
    ],
)
def test_a_choice_that_is_none(chosen: Any, said: str, model: Model) -> None:
    with pytest.raises(ConfigError) as error:
        load_scheduler(model(scheduler=chosen))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [None, "{", "[]", "[" * 100_000])
def test_a_chosen_folder_that_is_none(content: str | None, model: Model, tmp_path: Path) -> None:
    folder = tmp_path / "chosen"
    folder.mkdir()
    if content is not None:
        (folder / "scheduler_config.json").write_text(content)
    with pytest.raises(
        ConfigError, match=r"model\.scheduler: .*(there is no|cannot read|holds no object)"
    ) as error:
        load_scheduler(model(scheduler=str(folder)))
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("value", ["3", "true", "[a]", "''"])
def test_a_choice_of_another_kind(value: str) -> None:
    with pytest.raises(
        ConfigError, match=r"model\.scheduler: found .*, allowed: null or .*text.* or a mapping"
    ):
        parse_config("model: {pretrained: embedded}", [f"model.scheduler={value}"])


def test_a_resumed_run_keeps_its_scheduler(tmp_path: Path) -> None:
    def config(*overrides: str) -> Config:
        return parse_config("model: {pretrained: embedded}", [f"run.directory={tmp_path}", *overrides])

    folder = RunFolder(config("model.scheduler={timestep_spacing: trailing}"))
    folder.open(None, Display(quiet=True))
    for now in (config(), config("model.scheduler=DDIMScheduler")):
        with pytest.raises(ConfigError, match=r"another configuration: model\.scheduler"):
            RunFolder(now)._require_same(folder.path / "config.yaml")
    RunFolder(config("model.scheduler.timestep_spacing=trailing"))._require_same(folder.path / "config.yaml")


def test_commands_use_and_check_it(capsys: pytest.CaptureFixture[str]) -> None:
    def run(*options: str) -> tuple[int, str]:
        code = main(["schedule", "--config", "tiny", *(part for o in options for part in ("--set", o))])
        shown = capsys.readouterr()
        return code, shown.out + shown.err

    assert run() != run("model.scheduler.timestep_spacing=trailing")
    code, shown = run("model.scheduler={_class_name: EulerDiscreteScheduler, use_karras_sigmas: true}")
    assert code == 0
    assert "model.scheduler, EulerDiscreteScheduler, samples with use_karras_sigmas=True" in " ".join(
        shown.split()
    )
    assert main(["config", "check", "tiny", "--set", "model.scheduler.beta_end=high"]) == 2
    assert "beta_end='high' is not a number from 0 to below 1" in capsys.readouterr().err
