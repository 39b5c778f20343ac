"""Every key of a configuration: its type, its default and its meaning."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


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
    """Base of all sections: immutable, no unknown keys, no conversion of types, docstrings as descriptions."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        validate_default=True,
        protected_namespaces=(),
        serialize_by_alias=True,  # `from` is a keyword of Python, so that field has another name
    )

    @model_validator(mode="before")
    @classmethod
    def _empty_section_is_all_defaults(cls, value: Any) -> Any:
        # A section whose keys are all commented out reads as null.
        return {} if value is None else value


class RunConfig(_Section):
    """The run as a whole: its name, its seed and its files."""

    name: _RunName = "run"
    """Name of the run and its folder."""
    seed: _Seed = 0
    """Seed of all randomness: prompts, noise, order of updates, new weights."""
    directory: _Text = "runs"
    """Folder for the runs' folders, relative to the current directory."""
    trackers: Annotated[tuple[Literal["tensorboard", "wandb"], ...], Field(strict=False)] = ("tensorboard",)
    """Trackers that receive metrics and images, besides metrics.jsonl."""


class LoraConfig(_Section):
    """The low-rank adapter that is trained with ``model.tune: lora``."""

    rank: _Count = 16
    """Rank of the factors A and B."""
    alpha: _Positive = 16.0
    """Scale: the adapter's output is multiplied by alpha / rank."""
    targets: Annotated[tuple[_Text, ...] | None, Field(strict=False)] = None
    """Names of the modules with an adapter; null: the attention projections."""
    init: Literal["kaiming", "gaussian"] = "kaiming"
    """Initial values of A: peft's default (kaiming) or normal (gaussian). B is 0: training starts at the base model."""
    dora: bool = False
    """Also train the norms of the weights' columns (DoRA)."""
    text_encoder: bool = False
    """Also train an adapter of the text encoder's attention; only for Stable Diffusion 1.x and 2.x."""
    from_: _Text | None = Field(default=None, alias="from")
    """LoRA to continue training: a folder, a file, a hub name, or a run's folder; null: start at the base model. The
    base model remains the reference of the KL divergence."""


class ModelConfig(_Section):
    """The model to train, and how it computes."""

    pretrained: _Text
    """Diffusers pipeline (a directory, a hub name, or ``embedded``, the package's own), or a single file of weights."""
    config: _Text | None = None
    """Pipeline that describes a single file of weights, a directory or hub name; null: the one that diffusers
    recognizes, from the hub."""
    allow_pickle: bool = False
    """Also read pickled weights (.bin, .ckpt); nothing but tensors is loaded from them."""
    revision: _Text | None = None
    """Branch, tag or commit of a hub repository."""
    variant: _Text | None = None
    """Variant of the weight files, such as fp16."""
    scheduler: _Text | dict[str, Any] | None = None
    """Scheduler in place of the model's: a folder with scheduler_config.json; a class such as DDIMScheduler, with the
    options of the model's scheduler; or a mapping of options that differ from those. null: the model's scheduler."""
    height: _Count | None = None
    """Height of the images in pixels; null: the model's default."""
    width: _Count | None = None
    """Width of the images in pixels; null: the model's default."""
    max_sequence_length: _Count | None = None
    """Largest number of a prompt's tokens for a T5 encoder; null: the pipeline's default."""
    dtype: _Dtype = "float32"
    """Data type of the model's weights and computation."""
    device: _Device = "auto"
    """Device of the model; auto: the first GPU, or the CPU if there is none."""
    tune: Literal["full", "lora"] = "full"
    """Train all weights of the denoiser (full), or a low-rank adapter (lora)."""
    lora: LoraConfig = LoraConfig()
    """The adapter; used only with tune: lora."""
    attention: Literal["auto", "sdpa", "matmul", "xformers", "flash"] = "auto"
    """Implementation of attention; auto: the fastest that works on this machine."""
    fast_layers: Literal["auto", "on", "off"] = "auto"
    """Compute residual blocks and upsampling with fewer operations, equal up to rounding; auto: on for the CPU."""
    channels_last: Literal["auto", "on", "off"] = "auto"
    """Memory format channels_last for the denoiser's images; auto: on for the CPU with fast layers."""
    shared_trunk: bool = True
    """With guidance, compute what does not depend on the prompt once, not for both halves of the batch."""
    compile: Literal["off", "blocks", "whole"] = "off"
    """Compile the denoiser with torch.compile: its repeated blocks (compiles quickly), or the whole (faster calls, but
    a minute or more to compile)."""
    tf32: bool = False
    """Multiply float32 matrices in TF32 on GPUs that support it: faster, with 10 bits of mantissa."""
    decoder_precision: Literal["auto", "float32", "tf32", "model"] = "auto"
    """Arithmetic of the VAE's decoder: float32 (IEEE), tf32 (float32 convolutions in TF32, on GPUs that support it), or
    model (model.dtype); auto: tf32 on GPUs that support it, else float32. It does not affect the denoiser or the
    ratio."""
    deterministic: bool = False
    """Use deterministic algorithms on GPUs, in backward passes too; slower. An operation without one ends the run."""
    vae_tiling: bool = False
    """Decode large images in overlapping tiles: less memory, but faint seams."""
    free_text_encoder: bool = False
    """Encode every prompt at the start, then release the text encoder."""


class PromptsConfig(_Section):
    """The prompts to train on."""

    source: _Text = "embedded:color"
    """Prompts: a file (``.txt`` with one prompt per line, ``.jsonl``, ``.json``, ``.csv``, ``.tsv``), ``datasets:<name
    or folder>``, ``module:function``, ``embedded:<category>``, or ``t2i-compbench:<folder>:<category>``."""


class RewardConfig(_Section):
    """One term of the reward."""

    name: _Text
    """A reward of the package, or ``module:function``."""
    label: _RunName | None = None
    """Name of the term in metrics and messages; null: the reward's name. Two terms of one reward need labels."""
    weight: float = 1.0
    """Factor in the total reward; 0: the reward is measured and recorded, but not trained on."""
    normalize: Literal["none", "range", "std"] = "none"
    """Normalization of the values before they are weighted. range: linear, so that the two numbers of the key range
    become 0 and 1. std: in training, subtract the mean over the iteration's images and divide by their standard
    deviation; evaluations and reward_mean use the unchanged values. The metrics of single rewards are never
    normalized."""
    range: Annotated[
        tuple[float, ...] | None, Field(strict=False, json_schema_extra={"minItems": 2, "maxItems": 2})
    ] = None
    """Two values, the lower first, that become 0 and 1 with normalize: range. Values outside are not clipped."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the reward."""

    @property
    def title(self) -> str:
        """The term's name in metrics and messages."""
        return self.label or self.name


class AdvantageConfig(_Section):
    """Normalization and clipping of the advantage before the loss."""

    normalize: Literal["auto", "std", "none"] = "auto"
    """Divide by the standard deviation (std) or not (none); auto: as the algorithm defines."""
    clip: _Positive | None = 5.0
    """Largest absolute value of the advantage; null: no limit."""


class AlgorithmConfig(_Section):
    """The algorithm that turns rewards into a loss."""

    name: Literal["loop", "ppo", "rloo", "reinforce", "reinforce_plain", "grpo"] = "loop"
    """The algorithm."""
    samples_per_prompt: _Count = 4
    """K, the group size: the number of images sampled for each prompt."""
    clip_range: Annotated[float, Field(gt=0, lt=1)] | None = None
    """The ratio is clipped to 1 ± clip_range; null: the algorithm's default."""
    logprob: Literal["sum", "mean"] = "sum"
    """Reduction of the log-probability over a latent's elements; sum gives the density."""
    advantage: AdvantageConfig = AdvantageConfig()
    """Normalization and clipping of the advantage."""
    kl_weight: _NotNegative = 0.0
    """Weight of the KL divergence from the reference model, the model before training."""


class RolloutConfig(_Section):
    """Sampling of the images to train on."""

    prompts_per_iteration: _Count = 32
    """Prompts per iteration; samples_per_prompt images are sampled for each."""
    steps: Annotated[int, Field(ge=1, le=1000)] = 10
    """Number of denoising steps of a trajectory (num_inference_steps in diffusers)."""
    eta: Annotated[float, Field(gt=0, le=1)] | None = None
    """Noise of the DDIM sampler; 1 is the noise of DDPM; null: 1."""
    noise_level: _Positive | None = None
    """Noise of the flow-matching sampler; null: 0.7."""
    guidance_scale: _NotNegative = 1.0
    """Scale of classifier-free guidance; 1: no guidance, at half the cost. A guidance-distilled model (FLUX.1 [dev])
    receives this number as an input, at no cost."""
    microbatch: _Microbatch = "auto"
    """Images per model call. Affects memory and speed, and the result only by rounding."""
    stochastic_steps: _StochasticSteps = "all"
    """Denoising steps with noise, which alone can be trained on: all, a range START:STOP, or window:W, which draws a
    window of W consecutive trained steps for each iteration. Other steps are deterministic and need no gradient.
    Evaluations use noise in all steps."""
    cuda_graph: bool = True
    """Capture a denoising step as a CUDA graph and replay it; only on GPUs."""
    dtype: _Dtype | None = None
    """Data type of the denoiser in sampling; null: model.dtype, without a second copy of the weights."""
    device: _Device | None = None
    """Device of the denoiser in sampling; null: model.device, without a second copy of the weights."""
    replica: Literal["auto", "resident", "gathered", "none"] = "auto"
    """Separate full copy of the denoiser for sampling: kept during the whole run (resident), made for each rollout and
    freed after it (gathered), or none. auto: none, unless dtype, device or merge_lora needs one or the weights are
    sharded (ZeRO-3); then resident for an adapter and gathered for a full model."""
    merge_lora: bool = False
    """Sample from base weights with the adapter merged in: faster, but rounded differently."""
    reward_worker: Literal["auto", "none", "inline", "thread", "process"] = "auto"
    """Score each microbatch of images before the next one is sampled (inline) or meanwhile (thread, process), or score
    all images of a process after sampling, in one call (none). auto: thread if a GPU samples; inline on the CPU, where
    sampling already uses all cores."""
    on_bad_reward: Literal["error", "drop_group"] = "error"
    """If a reward returns NaN, infinity or the wrong number of values: save the run's state and stop (error), or drop
    the prompt's images from the iteration (drop_group). A reward that raises an error always stops the run."""


class TrajectoriesConfig(_Section):
    """Storage of the sampled trajectories."""

    device: Literal["policy", "host"] = "policy"
    """Keep trajectories on the policy's device, or in host memory (pinned if there is a GPU)."""


class TrainConfig(_Section):
    """Updates of the weights on the sampled trajectories."""

    iterations: _Count = 60
    """Number of iterations: rounds of sampling and training."""
    updates_per_iteration: _Count = 4
    """Optimizer steps per pass over an iteration's (image, step) pairs."""
    inner_epochs: _Count = 1
    """Passes over an iteration's pairs (PPO epochs)."""
    steps: _Steps = "auto"
    """Which denoising steps are trained on, not how many updates: all, auto (without steps whose gradients would
    dominate), or a range START:STOP."""
    learning_rate: _Positive = 1.5e-4
    """Peak learning rate."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Schedule of the learning rate after warm-up."""
    warmup_updates: _CountOrZero = 10
    """Updates in which the learning rate rises from 0 to its peak."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay rate of AdamW's first moment."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Decay rate of AdamW's second moment."""
    weight_decay: _NotNegative = 0.0
    """Weight decay of AdamW."""
    max_grad_norm: _Positive = 1.0
    """Gradients are clipped to this norm."""
    microbatch: _Microbatch = "auto"
    """(Image, step) pairs per model call. Affects memory and speed, and the result only by rounding."""
    step_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of each trajectory's trained steps to use, drawn at random for every pass."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """AdamW, or the AdamW of bitsandbytes with 8-bit moments."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Largest decay per update of an exponential moving average (EMA) of the trained weights, which evaluations and the
    export use; null: no EMA."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, but a third more model time."""
    screening: Literal["auto", "on", "off"] = "auto"
    """Find the pairs without a gradient (clipped, or advantage 0) by a forward pass, and train only on the others.
    Gradients are the same up to the rounding of a sum. An iteration's first update clips nothing and is not screened.
    auto: if more than 40 % of the pairs had no gradient in the latest update that was not an iteration's first."""
    on_policy_check: Literal["error", "warn", "off"] = "error"
    """Reaction if the ratio before an iteration's first update is not 1. If the difference is only rounding of the same
    model calls, error only warns, once, and the run continues."""

    def trained_per_trajectory(self, steps: int) -> int:
        """Returns ``step_fraction`` of a trajectory's ``steps`` trained steps, as the nearest whole number."""
        return math.floor(self.step_fraction * steps + 0.5)


class EvaluationConfig(_Section):
    """Evaluation of progress on fixed prompts and seeds."""

    every: _CountOrZero = 20
    """Iterations between evaluations; 0: only before the first iteration and after the last."""
    prompts: _Text | None = None
    """Evaluation prompts, in the form of prompts.source; null: the training prompts."""
    images_per_prompt: _Count = 4
    """Images per prompt."""
    limit_prompts: _Count | None = None
    """Use at most this many prompts; null: all."""
    seed: _Seed = 0
    """Seed of the evaluation's noise."""
    preview_images: _CountOrZero = 32
    """Images stored for the before/after grids."""


class CheckpointConfig(_Section):
    """Checkpoints of the run's state."""

    every: _Count = 20
    """Iterations between checkpoints; one is always written after the last iteration."""
    keep: _Count = 3
    """Number of newest checkpoints to keep."""
    keep_best: bool = True
    """Also keep the one with the best evaluation reward."""


class DistributedConfig(_Section):
    """Processes of a run. Counts in the other sections mean all processes together."""

    zero_stage: Literal[0, 1, 2, 3] = 0
    """ZeRO stage of DeepSpeed, which shards over processes: nothing (0), the optimizer's state (1), gradients too (2),
    weights too (3)."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """Offload to host memory: nothing (none), the optimizer's state (optimizer, from stage 1), or weights too (all,
    stage 3)."""
    timeout: _Positive = 600.0
    """Seconds until a collective operation ends the run if a process does not join it."""
    deepspeed: _Text | None = None
    """JSON file with more settings of DeepSpeed. A setting that contradicts this configuration is an error."""

    def needs_deepspeed(self, processes: int) -> bool:
        """Returns whether a run needs DeepSpeed: several processes, a ZeRO stage, or a file of its settings."""
        return processes > 1 or self.zero_stage > 0 or self.deepspeed is not None


# pydantic's min_length counts only valid items, so an invalid item would cause a second error.
_Rewards = Annotated[tuple[RewardConfig, ...], Field(strict=False, json_schema_extra={"minItems": 1})]


class Config(_Section):
    """A whole run. Every key has a default except ``model.pretrained``.

    Counts are global: they mean the same on one device and on several.
    """

    run: RunConfig = RunConfig()
    model: ModelConfig
    prompts: PromptsConfig = PromptsConfig()
    reward: _Rewards = (RewardConfig(name="embedded"),)
    """Terms of the reward; the total reward is their weighted sum."""
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
