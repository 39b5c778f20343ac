"""The configuration of a run: its vocabulary, how it is read, and what is checked.

A configuration is one YAML file. It is read by the rules of YAML 1.2, so that ``off`` and ``0:5`` are text
and ``1e-4`` is a number; validated without any conversion of types; and returned as frozen pydantic models.
Whatever is wrong with a file or an override ends in a `ConfigError` that names the key, the place and what is
allowed.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_serializer, model_validator
from pydantic_core import ErrorDetails

from loopfast.algorithms import ALGORITHMS
from loopfast.errors import ConfigError, first_line, one_line, short
from loopfast.system.files import read_settings

__all__ = [
    "AdvantageConfig",
    "AlgorithmConfig",
    "CheckpointConfig",
    "Config",
    "DistributedConfig",
    "EvaluationConfig",
    "LoraConfig",
    "ModelConfig",
    "PromptsConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "TrainConfig",
    "TrajectoriesConfig",
    "config_to_yaml",
    "json_schema",
    "load_config",
    "parse_config",
    "recipes",
]


def _pattern(pattern: str, allowed: str) -> Any:
    """A constraint on text; ``allowed`` describes it, in errors and in editors that read the schema."""
    return Field(pattern=pattern, json_schema_extra={"patternErrorMessage": allowed})


_Text = Annotated[str, _pattern(r"^[^\x00]*[^\s\x00][^\x00]*$", "text that is not empty")]
_RunName = Annotated[
    str,
    _pattern(
        r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$",
        "letters, digits, '.', '_' and '-', the first a letter or digit",
    ),
]
_Device = Annotated[str, _pattern(r"^(auto|cpu|cuda|cuda:[0-9]{1,3})$", "auto, cpu, cuda or cuda:N")]
_Steps = Annotated[
    str,
    _pattern(
        r"^(all|auto|[0-9]{1,6}:[0-9]{0,6}|:[0-9]{1,6})$",
        "all, auto or a half-open range START:STOP such as '0:5'",
    ),
]
_StochasticSteps = Annotated[
    str,
    _pattern(
        r"^(all|[0-9]{1,6}:[0-9]{0,6}|:[0-9]{1,6}|window:[1-9][0-9]{0,5})$",
        "all, a half-open range START:STOP such as '0:5', or window:W such as 'window:4'",
    ),
]
_Dtype = Literal["float32", "bfloat16", "float16"]
_Seed = Annotated[int, Field(ge=0, lt=2**63)]
_Count = Annotated[int, Field(ge=1, lt=2**31)]
_CountOrZero = Annotated[int, Field(ge=0, lt=2**31)]
_Positive = Annotated[float, Field(gt=0)]
_NotNegative = Annotated[float, Field(ge=0)]
_Microbatch = Literal["auto"] | _Count


class _Section(BaseModel):
    """Of every section: immutable, no unknown key, no conversion of types, docstrings as descriptions."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        validate_default=True,
        protected_namespaces=(),
    )

    @model_validator(mode="before")
    @classmethod
    def _empty_section_is_all_defaults(cls, value: Any) -> Any:
        # A section whose keys are all commented out reads as null.
        return {} if value is None else value


class RunConfig(_Section):
    """The run as a whole: what it is called and where its files go."""

    name: _RunName = "run"
    """Name of the run and of its folder."""
    seed: _Seed = 0
    """Seed of everything random: prompts, noise, order of updates, new weights."""
    directory: _Text = "runs"
    """Folder that holds the folders of runs, relative to the current one."""
    trackers: Annotated[tuple[Literal["tensorboard", "wandb"], ...], Field(strict=False)] = ("tensorboard",)
    """Where metrics go beside metrics.jsonl."""


class LoraConfig(_Section):
    """The low-rank adapter trained when ``model.tune`` is ``lora``."""

    rank: _Count = 16
    """Rank of the two factors."""
    alpha: _Positive = 16.0
    """Scale: the adapter's output is multiplied by alpha / rank."""
    targets: Annotated[tuple[_Text, ...] | None, Field(strict=False)] = None
    """Names of the modules that get an adapter; null: the attention projections."""
    init: Literal["kaiming", "gaussian"] = "kaiming"
    """First values of the factor A: peft's own (kaiming) or normal ones. B is 0: training starts at the base model."""
    dora: bool = False
    """Also train the norms of the weights' columns (DoRA)."""
    text_encoder: bool = False
    """Also train an adapter of the text encoder's attention; Stable Diffusion 1.x and 2.x only."""
    from_: _Text | None = Field(default=None, alias="from")
    """A LoRA to go on from: a folder, a file, a hub name, or a run's folder; null: training starts at the base model.
    The base model stays the reference."""

    @model_serializer(mode="wrap")
    def _with_the_key_of_the_file(self, handler: Callable[[LoraConfig], dict[str, Any]]) -> dict[str, Any]:
        # `from` is a word of Python's own, so the field has another name
        return {"from" if name == "from_" else name: value for name, value in handler(self).items()}


class ModelConfig(_Section):
    """The model to train and how its weights are held."""

    pretrained: _Text
    """A diffusers pipeline (a directory, a hub name, or ``embedded``, the package's own), or a file of weights."""
    config: _Text | None = None
    """With one file: the pipeline that describes it, a directory or hub name; null: what diffusers takes it for, from
    the hub."""
    allow_pickle: bool = False
    """Also read weights that torch's pickle wrote (.bin, .ckpt), and nothing in them but tensors."""
    revision: _Text | None = None
    """Branch, tag or commit of a hub repository."""
    variant: _Text | None = None
    """Variant of the weight files, such as fp16."""
    scheduler: _Text | dict[str, Any] | None = None
    """Scheduler in place of the model's own: a folder with scheduler_config.json, a class such as DDIMScheduler for the
    model's own options, or a mapping of options that differ from them. null: the model's own."""
    height: _Count | None = None
    """Of the images, in pixels; null: the model's own."""
    width: _Count | None = None
    """Of the images, in pixels; null: the model's own."""
    max_sequence_length: _Count | None = None
    """Tokens of a prompt that a T5 encoder reads; null: the pipeline's own number."""
    dtype: _Dtype = "float32"
    """Type the model computes in."""
    device: _Device = "auto"
    """auto: the first GPU where there is one, else the CPU."""
    tune: Literal["full", "lora"] = "full"
    """Train all weights of the denoiser, or a low-rank adapter."""
    lora: LoraConfig = LoraConfig()
    """The adapter; read only when tune is lora."""
    attention: Literal["auto", "sdpa", "matmul", "xformers", "flash"] = "auto"
    """Attention's implementation; auto: the fastest that works here."""
    fast_layers: Literal["auto", "on", "off"] = "auto"
    """Compute residual blocks and upsampling with less work, equal up to rounding; auto: on the CPU."""
    channels_last: Literal["auto", "on", "off"] = "auto"
    """Hold the denoiser's images with the channels innermost; auto: on the CPU, with fast layers."""
    shared_trunk: bool = True
    """Under guidance, compute what does not depend on the prompt once for both halves."""
    compile: Literal["off", "blocks", "whole"] = "off"
    """Compile the denoiser with torch.compile: its repeated blocks (soon done), or the whole (faster calls, after a
    minute or more)."""
    tf32: bool = False
    """Multiply float32 matrices in TF32 on GPUs that can: faster, with 10 bits of mantissa."""
    decoder_precision: Literal["auto", "float32", "tf32", "model"] = "auto"
    """Arithmetic of the autoencoder's decoder: float32 (IEEE), tf32 (its float32 convolutions in TF32, on GPUs that
    can), or that of model.dtype; auto: tf32 on GPUs that can, else float32. No effect on the denoiser or a ratio."""
    deterministic: bool = False
    """Compute on GPUs by algorithms that always give the same bits, in backward passes too; slower. An operation that
    has none ends the run."""
    vae_tiling: bool = False
    """Decode large images in overlapping tiles: less memory, faint seams."""
    free_text_encoder: bool = False
    """Encode every prompt at the start, then release the text encoder."""


class PromptsConfig(_Section):
    """The prompts to train on."""

    source: _Text = "embedded:color"
    """A file (``.txt`` with a prompt a line, ``.jsonl``, ``.json``, ``.csv``, ``.tsv``), ``datasets:<name or folder>``,
    ``module:function``, ``embedded:<category>``, or ``t2i-compbench:<folder>:<category>``."""


class RewardConfig(_Section):
    """One term of the reward."""

    name: _Text
    """A reward of the package, or ``module:function``."""
    label: _RunName | None = None
    """What it is called in metrics and messages; null: its name. Two terms of one name need one."""
    weight: float = 1.0
    """Factor in the sum that is trained on; 0: measured and recorded only."""
    normalize: Literal["none", "range", "std"] = "none"
    """What is done to its values before they are weighted. range: a straight line takes the key range's two numbers to
    0 and 1. std: in training, the mean over the iteration's images is subtracted and their standard deviation divided
    by; evaluations and reward_mean take the values as they are. Each reward's own metrics always do."""
    range: Annotated[
        tuple[float, ...] | None, Field(strict=False, json_schema_extra={"minItems": 2, "maxItems": 2})
    ] = None
    """Two values, the lower first, that become 0 and 1 with normalize: range; others are not cut off."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the reward."""

    @property
    def title(self) -> str:
        """What the term is called."""
        return self.label or self.name


class AdvantageConfig(_Section):
    """What is done to the advantage before it enters the loss."""

    normalize: Literal["auto", "std", "none"] = "auto"
    """Divide by the standard deviation (std) or not (none); auto: as the algorithm does."""
    clip: _Positive | None = 5.0
    """Largest absolute value; null: no bound."""


class AlgorithmConfig(_Section):
    """How rewards become a loss."""

    name: Literal["loop", "ppo", "rloo", "reinforce", "reinforce_plain", "grpo"] = "loop"
    """The algorithm."""
    samples_per_prompt: _Count = 4
    """K, the number of images drawn for each prompt."""
    clip_range: Annotated[float, Field(gt=0, lt=1)] | None = None
    """The ratio is clipped to 1 ± clip_range; null: the algorithm's own value."""
    logprob: Literal["sum", "mean"] = "sum"
    """Reduction of the log-probability over a latent's elements; sum is the density."""
    advantage: AdvantageConfig = AdvantageConfig()
    """Treatment of the advantage."""
    kl_weight: _NotNegative = 0.0
    """Weight of the KL divergence from the model before training."""


class RolloutConfig(_Section):
    """How images are sampled for training."""

    prompts_per_iteration: _Count = 32
    """Prompts drawn an iteration; each gives samples_per_prompt images."""
    steps: Annotated[int, Field(ge=1, le=1000)] = 10
    """Number of denoising steps."""
    eta: Annotated[float, Field(gt=0, le=1)] | None = None
    """Noise of the DDIM sampler, 1 being that of DDPM; null: 1."""
    noise_level: _Positive | None = None
    """Noise of the flow-matching sampler; null: 0.7."""
    guidance_scale: _NotNegative = 1.0
    """Classifier-free guidance; 1: none, and half the cost. A model distilled for guidance (FLUX.1 [dev]) is told this
    number instead, at no cost."""
    microbatch: _Microbatch = "auto"
    """Images per model call. Changes memory and speed; the result by rounding at most."""
    stochastic_steps: _StochasticSteps = "all"
    """Steps that draw noise and are trained on: all, a range START:STOP, or window:W, W of the trained steps in a row,
    drawn anew each iteration. The others are deterministic and cost no gradient; evaluations keep all their noise."""
    cuda_graph: bool = True
    """Capture a denoising step once and replay it; on GPUs only."""
    dtype: _Dtype | None = None
    """Type the sampling model computes in; null: model.dtype, without a second copy of the weights."""
    device: _Device | None = None
    """Device of the sampling model; null: model.device, without a second copy of the weights."""
    replica: Literal["auto", "resident", "gathered", "none"] = "auto"
    """A whole copy of the denoiser to sample from: kept (resident), made for each rollout and given back (gathered), or
    none. auto: none unless dtype, device or merge_lora ask for one, or the weights are sharded (ZeRO-3): then resident
    for an adapter, gathered for a whole model."""
    merge_lora: bool = False
    """Sample from base weights with the adapter merged in: faster, but rounded otherwise."""
    reward_worker: Literal["auto", "none", "inline", "thread", "process"] = "auto"
    """Score each microbatch's images before the next is sampled (inline) or while it is (thread, process), or all
    images of a process afterwards, in one call (none); auto: thread where a GPU samples, inline on the CPU, whose cores
    the sampling already keeps busy."""
    on_bad_reward: Literal["error", "drop_group"] = "error"
    """When a reward gives a NaN, an infinity or another number of values than there are images: stop, with the run's
    state saved, or leave the images of that prompt out of the iteration. A reward that raises always stops the run."""


class TrajectoriesConfig(_Section):
    """Where what was sampled waits to be trained on."""

    device: Literal["policy", "host"] = "policy"
    """On the policy's device, or in the host's memory (pinned where there is a GPU)."""


class TrainConfig(_Section):
    """How the sampled images become updates of the weights."""

    iterations: _Count = 60
    """Rounds of sampling and training."""
    updates_per_iteration: _Count = 4
    """Optimizer steps in each pass over an iteration's (image, step) pairs."""
    inner_epochs: _Count = 1
    """Passes over an iteration's pairs."""
    steps: _Steps = "auto"
    """Denoising steps to train on: all, auto (not those that outweigh the others), or a range START:STOP."""
    learning_rate: _Positive = 1.5e-4
    """Peak learning rate of AdamW."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after warm-up."""
    warmup_updates: _CountOrZero = 10
    """Updates over which the learning rate rises from 0."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of AdamW's first moment."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Decay of AdamW's second moment."""
    weight_decay: _NotNegative = 0.0
    """AdamW's weight decay."""
    max_grad_norm: _Positive = 1.0
    """Gradients are scaled down to this norm."""
    microbatch: _Microbatch = "auto"
    """(Image, step) pairs per model call. Changes memory and speed; the result by rounding at most."""
    step_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of each trajectory's trained steps that is drawn for training, anew in every pass."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """AdamW, or bitsandbytes' with 8-bit moments."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Keep a moving average of the trained weights with at most this decay an update, for evaluations and the export;
    null: none."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more model time."""
    screening: Literal["auto", "on", "off"] = "auto"
    """Find the pairs that the clip or an advantage of 0 leaves without a gradient by a forward pass, and train on the
    others only; gradients are the same up to the rounding of a sum. Never in an iteration's first update, where nothing
    is clipped. auto: where more than 40 % of the pairs of the update before, first ones aside, had none."""
    on_policy_check: Literal["error", "warn", "off"] = "error"
    """What to do when the ratio before an iteration's first update is not 1. Where the same calls are only rounded
    differently, error warns too, once, and the run goes on."""

    def steps_drawn(self, steps: int) -> int:
        """How many of a trajectory's ``steps`` trained steps ``step_fraction`` is: the nearest whole number."""
        return math.floor(self.step_fraction * steps + 0.5)


class EvaluationConfig(_Section):
    """How progress is measured, on fixed prompts and seeds."""

    every: _CountOrZero = 20
    """Iterations between evaluations; 0: only before the first iteration and after the last."""
    prompts: _Text | None = None
    """As prompts.source; null: the training prompts."""
    images_per_prompt: _Count = 4
    """Images drawn for each prompt."""
    limit_prompts: _Count | None = None
    """Use at most this many prompts; null: all."""
    seed: _Seed = 0
    """Seed of the evaluation's noise."""
    preview_images: _CountOrZero = 32
    """Images kept for the before/after grids."""


class CheckpointConfig(_Section):
    """When the run's state is saved and how much of it is kept."""

    every: _Count = 20
    """Iterations between checkpoints; the last iteration always has one."""
    keep: _Count = 3
    """Number of newest checkpoints kept."""
    keep_best: bool = True
    """Also keep the one with the best evaluation reward."""


class DistributedConfig(_Section):
    """How a run is spread over processes. Counts in other sections are of all processes together."""

    zero_stage: Literal[0, 1, 2, 3] = 0
    """What each process holds only a part of, by DeepSpeed's ZeRO: nothing (0), the optimizer's state (1), gradients
    too (2), weights too (3)."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What waits in the host's memory: nothing, the optimizer's state (from stage 1), or weights too (stage 3)."""
    timeout: _Positive = 600.0
    """Seconds after which a collective operation that some process does not join ends the run."""
    deepspeed: _Text | None = None
    """A JSON file with further settings of DeepSpeed; one that contradicts this configuration is an error."""


# pydantic's own min_length counts valid items only, and so adds a second error to that of an item.
_Rewards = Annotated[tuple[RewardConfig, ...], Field(strict=False, json_schema_extra={"minItems": 1})]


class Config(_Section):
    """A whole run. Every key has a default except ``model.pretrained``.

    Counts are global: they mean the same on one device and on many.
    """

    run: RunConfig = RunConfig()
    model: ModelConfig
    prompts: PromptsConfig = PromptsConfig()
    reward: _Rewards = (RewardConfig(name="embedded"),)
    """Terms of the reward; their weighted sum is trained on."""
    algorithm: AlgorithmConfig = AlgorithmConfig()
    rollout: RolloutConfig = RolloutConfig()
    trajectories: TrajectoriesConfig = TrajectoriesConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    distributed: DistributedConfig = DistributedConfig()


def load_config(source: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read, override and validate a configuration.

    Args:
        source: name of a recipe of the package, or path of a YAML file.
        overrides: ``"section.key=value"`` each, the value in YAML; applied in order. Items of a list are
            reached by their number: ``reward.0.weight=2``.

    Raises:
        ConfigError: the source cannot be found or read, or something in it is not allowed. The message lists
            every problem with its key, its line or override, and what is allowed.
    """
    name, text = _read(source)
    return parse_config(text, overrides, name=name)


def parse_config(text: str, overrides: Sequence[str] = (), *, name: str = "configuration") -> Config:
    """As `load_config`, from text; ``name`` is what errors call it."""
    document = _Document.from_yaml(text, name)
    for override in overrides:
        document.override(override)
    try:
        config = Config.model_validate(document.data)
    except ValidationError as error:
        # A value that fits no branch of a union has one error for each branch, all explained alike.
        details = error.errors(include_url=False)
        problems = list(dict.fromkeys(_explain(detail, document) for detail in details))
    else:
        problems = list(_conflicts(config))
        if not problems:
            return config
    lines = [f"{document.place(path)}: {message}" for path, message in problems]
    raise ConfigError(lines[0] if len(lines) == 1 else "\n  ".join([f"{len(lines)} problems", *lines]))


def config_to_yaml(config: Config, *, defaults: bool = True) -> str:
    """A configuration as YAML that `load_config` reads back to an equal one.

    Args:
        config: the configuration.
        defaults: write keys that have their default value, too.
    """
    values = config.model_dump(exclude_defaults=not defaults)
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of the YAML file, with a description for every key."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}


def recipes() -> list[str]:
    """Names of the configurations that come with the package."""
    names = (entry.name for entry in _RECIPES.iterdir())
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


_RECIPES = resources.files("loopfast") / "recipes"

_Path = tuple[str | int, ...]

# Deeper than any key, so that no document can exhaust the stack.
_MAX_DEPTH = 16


def _read(source: str | Path) -> tuple[str, str]:
    if isinstance(source, str) and source in recipes():
        return f"recipe {source}", (_RECIPES / f"{source}.yaml").read_text("utf-8")
    try:
        return str(source), read_settings(Path(source), "utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"no configuration {str(source)!r}: neither a file nor a recipe ({', '.join(recipes())})"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read configuration {str(source)!r}: {error}") from None


# YAML 1.1, PyYAML's dialect, reads ``off`` as false, ``1:30`` as ninety and ``1e-4`` as text.
_CORE_SCHEMA: list[tuple[str, str, list[str]]] = [
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
]
_TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """Resolves plain scalars by the core schema of YAML 1.2."""


class _Dumper(yaml.SafeDumper):
    """Quotes text that either version of YAML would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


# Without those of PyYAML; of the class's own, so that PyYAML's loader keeps its.
_Loader.yaml_implicit_resolvers = {}

for _tag, _regexp, _first in _CORE_SCHEMA:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_TAG + _tag, re.compile(rf"(?:{_regexp})\Z"), _first)


@dataclass
class _Document:
    """Plain data read from YAML, and where each part of it was written."""

    name: str
    data: dict[str, Any] = field(default_factory=dict)
    places: dict[_Path, str] = field(default_factory=dict)

    @classmethod
    def from_yaml(cls, text: str, name: str) -> _Document:
        document = cls(name)
        data = document._parse(text, lambda line: f"{name}, line {line}", ())
        if data is not None and not isinstance(data, dict):
            raise ConfigError(f"{name}: found {_found(data)}, allowed: a mapping with the keys {_sections()}")
        document.data = data or {}
        return document

    def override(self, assignment: str) -> None:
        """Apply one ``section.key=value``."""
        place = f"--set {one_line(assignment)}"
        key, equals, value = assignment.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts) or len(parts) > _MAX_DEPTH:
            raise ConfigError(f"{place}: allowed: --set section.key=value")
        target: Any = self.data
        path: _Path = ()
        for depth, part in enumerate(parts):
            last = depth == len(parts) - 1
            index: str | int = part
            if isinstance(target, list):
                if not part.isascii() or not part.isdigit() or len(part) > 9 or int(part) >= len(target):
                    raise ConfigError(
                        f"{place}: {_dotted(path)} has {len(target)} item(s), numbered from 0; found {part!r}"
                    )
                index = int(part)
            elif not isinstance(target, dict):
                raise ConfigError(f"{place}: {_dotted(path)} is {_found(target)} and has no keys")
            path = (*path, index)
            if last:
                for known in [known for known in self.places if known[: len(path)] == path]:
                    del self.places[known]
                parsed = self._parse(value, lambda line: place, path)
                # "5:" and "a: b" are text here; a mapping is written in braces.
                is_text = isinstance(parsed, dict) and not value.lstrip().startswith("{")
                target[index] = value.strip() if is_text else parsed
                self.places[path] = place
            else:
                if isinstance(target, dict) and target.get(part) is None:
                    target[part] = {}
                    self.places[path] = place
                target = target[index]

    def value(self, path: _Path) -> Any:
        """The value at ``path``."""
        value: Any = self.data
        for part in path:
            value = value[part]
        return value

    def place(self, path: _Path) -> str:
        """Where the value at ``path``, or the nearest thing around it, was written."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path, self.name)

    def _parse(self, text: str, place: Callable[[int], str], path: _Path) -> Any:
        try:
            root = yaml.compose(text, Loader=_Loader)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            where = place(mark.line + 1) if mark else self.name
            raise ConfigError(f"{where}: not valid YAML: {error.problem or error.context}") from None
        except yaml.YAMLError as error:
            raise ConfigError(f"{place(1)}: not valid YAML: {first_line(error)}") from None
        except RecursionError:
            raise ConfigError(f"{place(1)}: nested too deeply") from None
        except (ValueError, OverflowError) as error:
            # PyYAML lets a malformed escape or version number through to int() and chr().
            raise ConfigError(f"{place(1)}: not valid YAML: {error}") from None
        seen: set[int] = set()

        def plain(node: yaml.Node, path: _Path) -> Any:
            where = place(node.start_mark.line + 1)
            if path:
                self.places[path] = where
            if id(node) in seen:
                raise ConfigError(f"{where}: anchors and aliases are not supported; write the value out")
            seen.add(id(node))
            if len(path) > _MAX_DEPTH:
                raise ConfigError(f"{where}: nested too deeply")
            kind = node.tag.removeprefix(_TAG)
            if isinstance(node, yaml.MappingNode) and kind == "map":
                mapping: dict[str, Any] = {}
                for key_node, value_node in node.value:
                    where = place(key_node.start_mark.line + 1)
                    if not isinstance(key_node, yaml.ScalarNode):
                        raise ConfigError(f"{where}: a key must be text")
                    if key_node.value in mapping:
                        raise ConfigError(f"{where}: key {key_node.value!r} is given twice")
                    mapping[key_node.value] = plain(value_node, (*path, key_node.value))
                    self.places[(*path, key_node.value)] = where
                return mapping
            if isinstance(node, yaml.SequenceNode) and kind == "seq":
                return [plain(item, (*path, index)) for index, item in enumerate(node.value)]
            if isinstance(node, yaml.ScalarNode) and kind in _SCALARS:
                try:
                    return _SCALARS[kind](node.value)
                except ValueError:
                    raise ConfigError(f"{where}: {short(node.value)!r} is not of type {kind}") from None
            raise ConfigError(f"{where}: YAML tag {node.tag!r} is not supported")

        return None if root is None else plain(root, path)


_SCALARS: dict[str, Callable[[str], Any]] = {
    "str": str,
    "null": lambda text: None,
    "bool": lambda text: text.lower() == "true",
    "int": int,
    "float": lambda text: float(text.lower().replace(".inf", "inf").replace(".nan", "nan")),
}


def _problem(path: _Path, found: object, allowed: str) -> tuple[_Path, str]:
    return path, f"{_dotted(path)}: found {_found(found)}, allowed: {allowed}"


def _explain(error: ErrorDetails, document: _Document) -> tuple[_Path, str]:
    """The key that a pydantic error is about, and the error in words."""
    if error["type"] == "extra_forbidden":
        path = error["loc"]
        return path, f"unknown key {_dotted(path)!r}; nearest known key: {_nearest(path)!r}"
    path, schema = _schema_at(error["loc"])
    if error["type"] == "missing":
        while schema.get("required"):
            path, schema = _schema_at((*path, schema["required"][0]))
        return path, f"{_dotted(path)} is missing: {schema.get('description') or _allowed(schema)}"
    return _problem(path, document.value(path), _allowed(schema))


def _conflicts(config: Config) -> Iterator[tuple[_Path, str]]:
    """What is wrong between keys that are each right."""
    algorithm = ALGORITHMS[config.algorithm.name]
    samples = config.algorithm.samples_per_prompt
    rollout, train = config.rollout, config.train
    if config.model.tune == "full" and config.model.lora.from_ is not None:
        allowed = (
            "null with model.tune: full; `loopfast export --merge` writes the base model with a LoRA in it"
        )
        yield _problem(("model", "lora", "from"), config.model.lora.from_, allowed)
    if algorithm.needs_group and samples < 2:
        allowed = f"2 or more with {algorithm.name}, which compares the images of a prompt with each other"
        yield _problem(("algorithm", "samples_per_prompt"), samples, allowed)
    if algorithm.single_epoch and train.inner_epochs > 1:
        allowed = f"1 with {algorithm.name}, which has no bound on how far a second pass would go"
        yield _problem(("train", "inner_epochs"), train.inner_epochs, allowed)
    if algorithm.clip_range is None and config.algorithm.clip_range is not None:
        allowed = f"null with {algorithm.name}, which does not clip"
        yield _problem(("algorithm", "clip_range"), config.algorithm.clip_range, allowed)
    if rollout.eta is not None and rollout.noise_level is not None:
        allowed = "null beside rollout.eta: that is for a DDIM scheduler, this for a flow-matching one"
        yield _problem(("rollout", "noise_level"), rollout.noise_level, allowed)
    trained = rollout.steps
    if ":" in train.steps:
        start, stop = train.steps.split(":")
        trained = int(stop or rollout.steps) - int(start or 0)
        if trained < 1 or int(stop or 0) > rollout.steps:
            allowed = f"a range with START < STOP inside 0:{rollout.steps} (rollout.steps)"
            yield _problem(("train", "steps"), train.steps, allowed)
            trained = rollout.steps
    trained = min(trained, _stochastic(rollout, train)[1])
    for message in _stochastic(rollout, train)[0]:
        yield _problem(("rollout", "stochastic_steps"), rollout.stochastic_steps, message)
    wanted = [
        key
        for key, value in (
            ("dtype", rollout.dtype),
            ("device", rollout.device),
            ("merge_lora", rollout.merge_lora),
        )
        if value not in (None, False)
    ]
    if rollout.replica == "none" and wanted:
        allowed = f"auto, resident or gathered beside rollout.{wanted[0]}, which needs a copy of the denoiser"
        yield _problem(("rollout", "replica"), "none", allowed)
    if rollout.replica == "gathered" and rollout.merge_lora:
        allowed = "auto or resident with rollout.merge_lora, which changes a copy that is there"
        yield _problem(("rollout", "replica"), "gathered", allowed)
    yield from _distributed(config)
    if config.model.lora.text_encoder and config.model.free_text_encoder:
        allowed = "false with model.lora.text_encoder: an encoder that is trained is needed to the end"
        yield _problem(("model", "free_text_encoder"), True, allowed)
    if rollout.merge_lora and config.model.lora.dora:
        yield _problem(
            ("rollout", "merge_lora"), True, "false with model.lora.dora, which is no sum of weights"
        )
    if rollout.merge_lora and config.model.tune != "lora":
        yield _problem(("rollout", "merge_lora"), True, "false with model.tune: full, which has no adapter")
    drawn = train.steps_drawn(trained)
    if drawn < 1:
        allowed = f"at least {0.5 / trained:.3g}, with which one of {trained} trained steps is drawn"
        yield _problem(("train", "step_fraction"), train.step_fraction, allowed)
    pairs = rollout.prompts_per_iteration * samples * max(1, drawn)
    if pairs < train.updates_per_iteration:
        allowed = f"at most {pairs}, the number of (image, step) pairs in an iteration"
        yield _problem(("train", "updates_per_iteration"), train.updates_per_iteration, allowed)
    if config.model.channels_last == "on" and config.model.tune == "full" and train.optimizer == "adamw_8bit":
        allowed = "adamw with model.channels_last: bitsandbytes would lay the weights out anew"
        yield _problem(("train", "optimizer"), train.optimizer, allowed)
    if config.model.decoder_precision == "float32" and config.model.tf32:
        allowed = "auto, tf32 or model with model.tf32, which is for all of a process"
        yield _problem(("model", "decoder_precision"), "float32", allowed)
    if train.screening == "on" and config.algorithm.kl_weight > 0:
        allowed = "auto or off with algorithm.kl_weight above 0, which gives every pair a gradient"
        yield _problem(("train", "screening"), "on", allowed)
    if train.screening == "on" and algorithm.clip_range is None:
        allowed = f"auto or off with algorithm.name {algorithm.name}, which does not clip"
        yield _problem(("train", "screening"), "on", allowed)
    yield from _reward_terms(config)
    if not config.reward:
        yield _problem(("reward",), [], _allowed(_schema_at(("reward",))[1]))
    elif not any(term.weight for term in config.reward):
        yield _problem(("reward", 0, "weight"), 0, "a weight other than 0 for at least one reward")


def _reward_terms(config: Config) -> Iterator[tuple[_Path, str]]:
    """What is wrong within and between the terms of the reward."""
    titles = [term.title for term in config.reward]
    for index, term in enumerate(config.reward):
        key = "name" if term.label is None else "label"
        if term.title in titles[:index]:
            allowed = "each reward once; a second one of that name needs a label of its own"
            yield _problem(("reward", index, key), term.title, allowed)
        if term.title in _TAKEN:
            allowed = f"none of {', '.join(_TAKEN)}, which metrics have"
            yield _problem(("reward", index, key), term.title, allowed)
        if term.normalize == "range" and term.range is None:
            allowed = "two numbers, the lower first, with normalize: range"
            yield _problem(("reward", index, "range"), None, allowed)
        elif term.range is not None and not (len(term.range) == 2 and term.range[0] < term.range[1]):
            yield _problem(("reward", index, "range"), list(term.range), "two numbers, the lower first")
        elif term.range is not None and term.normalize != "range":
            yield _problem(("reward", index, "range"), list(term.range), "null without normalize: range")


# ``reward_mean`` and the like are metrics of the sum.
_TAKEN = ("mean", "std", "reward", "dropped_images")


def _distributed(config: Config) -> Iterator[tuple[_Path, str]]:
    """What is wrong between ``distributed`` and other keys."""
    distributed = config.distributed
    least = {"none": 0, "optimizer": 1, "all": 3}[distributed.offload]
    if distributed.zero_stage < least:
        allowed = f"{least} or more with distributed.offload: {distributed.offload}"
        yield _problem(("distributed", "zero_stage"), distributed.zero_stage, allowed)
    if distributed.zero_stage and config.train.optimizer != "adamw":
        allowed = "adamw with distributed.zero_stage above 0, whose parts of moments have no 8-bit blocks"
        yield _problem(("train", "optimizer"), config.train.optimizer, allowed)
    if distributed.zero_stage and config.train.ema_decay is not None:
        allowed = (
            "null with distributed.zero_stage above 0, where no process has all the weights it would follow"
        )
        yield _problem(("train", "ema_decay"), config.train.ema_decay, allowed)
    for key in ("dora", "text_encoder"):
        if distributed.zero_stage == 3 and config.model.tune == "lora" and getattr(config.model.lora, key):
            allowed = (
                "false with distributed.zero_stage: 3, which gathers the weights of one network's layers"
            )
            yield _problem(("model", "lora", key), True, allowed)
    if distributed.zero_stage == 3 and config.model.compile != "off":
        allowed = "off with distributed.zero_stage: 3, which gathers weights between layers"
        yield _problem(("model", "compile"), config.model.compile, allowed)


def _stochastic(rollout: RolloutConfig, train: TrainConfig) -> tuple[list[str], int]:
    """What is wrong with ``rollout.stochastic_steps``, and at most how many steps it leaves to train on."""
    steps, spec = rollout.steps, rollout.stochastic_steps
    start, stop = _range(train.steps, steps)
    if spec == "all":
        return [], steps
    if spec.startswith("window:"):
        width, room = int(spec.removeprefix("window:")), stop - start
        if width > room:
            key = "rollout.steps" if room == steps else "train.steps"
            return [f"a window of at most {room} steps, the number that {key} selects"], steps
        return [], width
    first, last = _range(spec, steps)
    if not 0 <= first < last <= steps:
        return [f"a range with START < STOP inside 0:{steps} (rollout.steps)"], steps
    common = min(last, stop) - max(first, start)
    if common < 1:
        return [
            f"a range that shares a step with train.steps, {train.steps}: others are not trained on"
        ], steps
    return [], common


def _range(spec: str, steps: int) -> tuple[int, int]:
    """``START:STOP`` as numbers; all steps where it names none."""
    start, _, stop = spec.partition(":") if ":" in spec else ("", "", "")
    return int(start or 0), int(stop or steps)


@cache
def _root_schema() -> dict[str, Any]:
    return Config.model_json_schema()


def _resolved(schema: dict[str, Any]) -> dict[str, Any]:
    reference = schema.get("$ref")
    return _root_schema()["$defs"][reference.rpartition("/")[2]] if reference else schema


def _schema_at(location: Sequence[str | int]) -> tuple[_Path, dict[str, Any]]:
    """Follow ``location`` into the schema, up to a part that names a branch of a union and not a key."""
    schema = _root_schema()
    path: _Path = ()
    for part in location:
        inner = schema.get("items") if isinstance(part, int) else schema.get("properties", {}).get(part)
        if inner is None:
            break
        schema = _resolved(inner)
        path = (*path, part)
    return path, schema


def _known_paths(schema: dict[str, Any], path: _Path = ()) -> Iterator[_Path]:
    for key, inner in schema.get("properties", {}).items():
        yield (*path, key)
        yield from _known_paths(_resolved(inner), (*path, key))
    if "items" in schema:
        yield from _known_paths(_resolved(schema["items"]), (*path, 0))


def _nearest(path: Sequence[str | int]) -> str:
    """The known key most like the unknown one at ``path``; one of the same section is preferred."""
    section = tuple(0 if isinstance(part, int) else part for part in path[:-1])
    written = str(path[-1])[:64].lower().replace("-", "_")

    def likeness(known: Sequence[str | int]) -> float:
        name = str(known[-1])
        initials = "".join(word[0] for word in name.split("_"))
        likeness = 0.9 if written == initials else difflib.SequenceMatcher(None, written, name).ratio()
        return likeness + (0.2 if tuple(known[:-1]) == section else 0.0)

    return _dotted(max(_known_paths(_root_schema()), key=likeness))


def _allowed(schema: dict[str, Any]) -> str:
    """A value's JSON schema in words."""
    schema = _resolved(schema)
    if "anyOf" in schema:
        return " or ".join(sorted((_allowed(branch) for branch in schema["anyOf"]), key="null".__ne__))
    if "const" in schema or "enum" in schema:
        return " or ".join(str(value) for value in schema.get("enum", [schema.get("const")]))
    if "patternErrorMessage" in schema:
        return str(schema["patternErrorMessage"])
    kind = schema.get("type")
    if kind == "object":
        keys = ", ".join(schema.get("properties", ()))
        return f"a mapping with the keys {keys}" if keys else "a mapping"
    if kind == "array":
        at_least = " with at least one item" if schema.get("minItems") else ""
        return f"a list{at_least}, each {_allowed(schema['items'])}"
    words = {"integer": "a whole number", "number": "a number", "boolean": "true or false", "string": "text"}
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = " and ".join(f"{sign} {schema[bound]:.16g}" for bound, sign in bounds.items() if bound in schema)
    return f"{words.get(str(kind), str(kind))} {limits}".rstrip()


def _sections() -> str:
    return ", ".join(Config.model_fields)


def _dotted(path: Sequence[str | int]) -> str:
    return ".".join(str(part) for part in path)


def _found(value: object) -> str:
    """A value as its author would recognize it."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, str):
        return repr(short(value))
    return short(yaml.dump(value, Dumper=_Dumper).splitlines()[0])
