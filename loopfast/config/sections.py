"""Every key of a configuration: its type, its default and what it means."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_serializer, model_validator


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

    def trained_per_trajectory(self, steps: int) -> int:
        """Returns ``step_fraction`` of a trajectory's ``steps`` trained steps, as the nearest whole number."""
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

    def needs_deepspeed(self, processes: int) -> bool:
        """Whether a run needs DeepSpeed: many processes, anything sharded or offloaded, or a file of its settings."""
        return processes > 1 or self.zero_stage > 0 or self.deepspeed is not None


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

    @property
    def images_per_iteration(self) -> int:
        """N = G · K, the number of images that an iteration samples."""
        return self.rollout.prompts_per_iteration * self.algorithm.samples_per_prompt
