"""Bytes that each process of a run holds, by what they are for and by phase of an iteration."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from loopfast.config import Config, RolloutConfig
from loopfast.engines.deepspeed_config import buffer_sizes
from loopfast.planning.architectures import Architecture
from loopfast.planning.networks import (
    Device,
    Form,
    Weights,
    decoder_type,
    decoding_call,
    form_of,
    sampling_call,
    training_call,
    weights_of,
)
from loopfast.policies.resolution import decoder_rows
from loopfast.training.microbatch import start_size

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

# What a process holds beside tensors. On a GPU an assumption: the CUDA context, the libraries' code and their
# workspaces. On a CPU the interpreter, the libraries (460 MiB here) and what oneDNN keeps for each convolution; fitted
# to two measured runs, see docs/scaling.md.
RUNTIME: dict[Device, int] = {"cuda": 768 * 2**20, "cpu": 710 * 2**20}

# What DeepSpeed and torch's compiler, which it imports, take of a process more; measured here.
DEEPSPEED = 200 * 2**20

# Of the bytes that come and go, what an allocator loses in pieces that fit nothing. On a GPU an assumption; on a CPU
# measured with glibc's, set as loopfast sets it: 0.3 to 0.5 after some calls, see docs/scaling.md.
FRAGMENTATION: dict[Device, float] = {"cuda": 0.05, "cpu": 0.45}

# Moments of 8 bits, a scale for each block of 256, and tables: two bytes a weight and a little.
EIGHT_BIT_MOMENTS = 2 * (1 + 4 / 256)

# Bytes an image that the embedded world's detector holds at its peak; measured on 256 pictures of the embedded model.
DETECTOR = 125_000

# Images that wait to be scored, or are, while others are sampled: two microbatches and the one in work.
WAITING = 3


@dataclass(frozen=True)
class Resources:
    """What a run is given.

    Attributes:
        device: kind of the devices.
        memory: bytes of each; on a CPU, of the machine.
        gpus: W, processes with a device each.
        per_node: processes that share one host.
    """

    device: Device
    memory: int
    gpus: int = 1
    per_node: int = 8

    @property
    def usable(self) -> int:
        """Bytes of a device; processes on a CPU share theirs."""
        return self.memory // (min(self.gpus, self.per_node) if self.device == "cpu" else 1)


@dataclass(frozen=True)
class Batch:
    """Rows of one process: images an iteration, rows per model call, pairs an iteration and calls an update."""

    images: int
    rollout: int
    replay: int
    pairs: int
    calls: int


@dataclass(frozen=True)
class Footprint:
    """Memory of one process.

    Attributes:
        stage: of ZeRO.
        batch: what it works on.
        held: bytes on the device from start to end, by purpose.
        phases: bytes beside them, by phase of an iteration and purpose.
        host: bytes in the host's memory, of all processes of a node together, by purpose.
    """

    stage: int
    batch: Batch
    held: dict[str, int]
    phases: dict[str, dict[str, int]]
    host: dict[str, int] = field(default_factory=dict)

    @property
    def peak_phase(self) -> str:
        """The phase with the most memory."""
        return max(self.phases, key=self.in_phase)

    def in_phase(self, phase: str) -> int:
        """Bytes on the device in a phase."""
        return sum(self.held.values()) + sum(self.phases[phase].values())

    @property
    def total(self) -> int:
        """Most bytes on the device at a time."""
        return self.in_phase(self.peak_phase)


Replica = Literal["resident", "gathered"] | None


def replica_of(config: RolloutConfig, stage: int, tune: str) -> Replica:
    """How a whole copy of the denoiser is held to sample from, if so."""
    if config.replica in ("resident", "gathered"):
        return "resident" if config.replica == "resident" else "gathered"
    wanted = config.dtype is not None or config.device is not None or config.merge_lora
    if config.replica == "none" or not (wanted or stage == 3):
        return None
    return "gathered" if stage == 3 and tune == "full" else "resident"


def trained_steps(config: Config) -> int:
    """Steps of a trajectory that each pass trains on; ``auto`` counts as all."""
    steps, spec = config.rollout.steps, config.train.steps
    start, _, stop = spec.partition(":") if ":" in spec else ("", "", "")
    first, last = int(start or 0), int(stop or steps)
    noisy = config.rollout.stochastic_steps
    if noisy.startswith("window:"):
        count = min(int(noisy.removeprefix("window:")), last - first)
    elif ":" in noisy:
        start, _, stop = noisy.partition(":")
        count = min(last, int(stop or steps)) - max(first, int(start or 0))
    else:
        count = last - first
    return max(1, config.train.trained_per_trajectory(count))


def batch_of(config: Config, architecture: Architecture, resources: Resources, halvings: int = 0) -> Batch:
    """Rows of one process.

    Args:
        config: the run.
        architecture: its model.
        resources: where it runs.
        halvings: how often a microbatch that is ``auto`` has been halved.
    """
    images = config.images_per_iteration
    each = math.ceil(images / resources.gpus)
    given = (config.rollout.microbatch, config.train.microbatch)
    numbers = [size for size in given if size != "auto"]
    start = (
        numbers[0] if numbers else start_size(each, architecture.latent_shape, torch.device(resources.device))
    )
    automatic = max(1, int(start) // 2**halvings)
    rollout, replay = (automatic if size == "auto" else int(size) for size in given)
    pairs = each * trained_steps(config)
    calls = math.ceil(math.ceil(pairs / config.train.updates_per_iteration) / replay)
    return Batch(each, rollout, replay, pairs, calls)


def with_sizes(
    config: Config,
    *,
    microbatch: tuple[int, int] | None = None,
    samples: int | None = None,
    prompts: int | None = None,
) -> Config:
    """The configuration with other rows per model call (rollout, replay), K or prompts; not validated."""
    rollout, train, algorithm = {}, {}, {}
    if microbatch is not None:
        rollout["microbatch"], train["microbatch"] = microbatch
    if prompts is not None:
        rollout["prompts_per_iteration"] = prompts
    if samples is not None:
        algorithm["samples_per_prompt"] = samples
    return config.model_copy(
        update={
            "rollout": config.rollout.model_copy(update=rollout),
            "train": config.train.model_copy(update=train),
            "algorithm": config.algorithm.model_copy(update=algorithm),
        }
    )


def footprint(
    config: Config, architecture: Architecture, resources: Resources, stage: int | None = None
) -> Footprint:
    """The memory of one process of a run.

    A microbatch that is ``auto`` is halved until the run fits, as a run of one process on a GPU does.

    Args:
        config: the run.
        architecture: its model.
        resources: where it runs.
        stage: of ZeRO; None: the configuration's.

    Raises:
        ConfigError: the model or its adapter cannot be made from the configuration.
    """
    stage = config.distributed.zero_stage if stage is None else stage
    automatic = "auto" in (config.rollout.microbatch, config.train.microbatch)
    halvings = 0
    while True:
        batch = batch_of(config, architecture, resources, halvings)
        found = _footprint(config, architecture, resources, stage, batch)
        smaller = batch_of(config, architecture, resources, halvings + 1)
        alone = resources.gpus == 1 and stage == 0 and config.distributed.deepspeed is None
        can_halve = automatic and alone and resources.device == "cuda" and smaller != batch
        if found.total <= resources.usable or not can_halve:
            return found
        halvings += 1


def _footprint(
    config: Config, architecture: Architecture, resources: Resources, stage: int, batch: Batch
) -> Footprint:
    device = resources.device
    form = form_of(config, device, sharded=stage > 0)
    weights = weights_of(architecture, form)
    held, host = _weights(config, architecture, resources, stage, weights, form)
    replica = replica_of(config.rollout, stage, config.model.tune)
    sampled = sampled_form(config, form, replica)
    copy = weights.parameters * BYTES[sampled.weights]
    if replica is not None and not (config.rollout.merge_lora or config.model.tune == "full"):
        copy += weights.trained * BYTES[sampled.adapter_weights]
    elsewhere = config.rollout.device == "cpu" and device == "cuda"
    if replica == "resident" or (replica and elsewhere):
        (host if elsewhere else held)["rollout replica"] = copy

    latent = math.prod(architecture.latent_shape) * BYTES[sampled.compute]
    steps = config.rollout.steps
    stored = (steps + 1) * batch.images * latent + 4 * steps * batch.images
    store = (steps + 1) * batch.rollout * latent
    held["sampling buffers"] = store + batch.rollout * architecture.text_tokens * architecture.text_width * 4
    sampling = sampling_call(architecture, sampled).peak(batch.rollout)
    if stage == 3 and replica is None:
        sampling += _gathered(weights, form)

    rollout = {"trajectories": stored, "sampling call": sampling}
    if replica == "gathered" and not elsewhere:
        rollout["rollout replica"] = copy
    graph = device == "cuda" and config.rollout.cuda_graph and (stage < 3 or replica is not None)
    phases = {"rollout": rollout}
    phases |= _scoring(config, architecture, device, batch, rollout)
    phases["replay"] = _replay(config, architecture, resources, stage, batch, form, weights)
    if config.trajectories.device == "policy" or device == "cpu":
        phases["replay"]["trajectories"] = stored
    else:
        host["trajectories"] = stored * min(resources.gpus, resources.per_node)
    if graph and replica != "gathered":
        # a recorded step keeps its working memory for the next time
        for name in phases.keys() - {"rollout"}:
            phases[name]["recorded step"] = sampling
    if device == "cpu":
        phases["checkpoint"] = _checkpoint(weights, form, stage)
    if config.model.free_text_encoder:
        phases["encoding"] = {"text encoders": _text_encoders(config, architecture)}
    for parts in phases.values():
        parts["fragmentation"] = round(FRAGMENTATION[device] * sum(parts.values()))
    return Footprint(stage, batch, held, phases, host)


def _weights(
    config: Config,
    architecture: Architecture,
    resources: Resources,
    stage: int,
    weights: Weights,
    form: Form,
) -> tuple[dict[str, int], dict[str, int]]:
    """What stays on the device, and in the host's memory: networks, optimizer, the process itself."""
    total, trained, width, ranks = (
        weights.parameters,
        weights.trained,
        BYTES[config.model.dtype],
        resources.gpus,
    )
    shards = ranks if stage == 3 else 1
    lora = config.model.tune == "lora"
    held = {"denoiser": total * BYTES[form.weights] // shards + weights.buffers}
    if lora:
        held["adapter"] = trained * BYTES[form.adapter_weights] // shards
    optimizer = {}
    if stage > 0:
        optimizer["float32 weights"] = 4 * trained // ranks
    moments = 8 if config.train.optimizer == "adamw" else EIGHT_BIT_MOMENTS
    optimizer["optimizer"] = round(moments * trained) // (ranks if stage > 0 else 1)
    processes = min(ranks, resources.per_node)
    host: dict[str, int] = {}
    on_host = resources.device == "cuda"
    if config.distributed.offload != "none" and stage > 0 and on_host:
        for name, size in optimizer.items():
            host[name] = size * processes
        host["gradients"] = 4 * trained // ranks * processes
    else:
        held |= optimizer
    if config.distributed.offload == "all" and stage == 3 and on_host:
        for name in ("denoiser", "adapter"):
            if name in held:
                host[name] = held.pop(name) * processes
    if config.train.ema_decay is not None:
        held["average of the weights"] = 4 * trained
    if config.algorithm.kl_weight > 0 and not lora:
        held["reference"] = total * width // shards
    encoders = sum(encoder.parameters() for encoder in architecture.text_encoders)
    if not config.model.free_text_encoder:
        held["text encoders"] = _text_encoders(config, architecture)
    held["autoencoder"] = BYTES[decoder_type(config.model)] * architecture.vae.parameters()
    held["runtime"] = RUNTIME[resources.device]
    if resources.device == "cpu" and (stage > 0 or ranks > 1):
        held["runtime"] += DEEPSPEED
    if on_host:
        # an adapter's base is read in the type it is held in, weights that are all trained in float32
        each = BYTES[config.model.dtype] if lora else 4
        read = each * total + BYTES[config.model.dtype] * encoders + 4 * architecture.vae.parameters()
        host["loading"] = read * processes
        host["writing a checkpoint"] = 12 * trained
    return held, host


def _text_encoders(config: Config, architecture: Architecture) -> int:
    """Bytes of them all; they are there at the start even where they are released then."""
    return BYTES[config.model.dtype] * sum(encoder.parameters() for encoder in architecture.text_encoders)


def _gathered(weights: Weights, form: Form) -> int:
    """Bytes of the weights that stage 3 has together at a time: those in use and those that come next."""
    bucket, live = buffer_sizes(weights.parameters)
    numbers = min(weights.parameters, max(live, weights.largest) + bucket)
    return numbers * BYTES[form.weights]


def sampled_form(config: Config, form: Form, replica: Replica) -> Form:
    """The form of the denoiser that is sampled from."""
    if replica is None:
        return form
    dtype = config.rollout.dtype or config.model.dtype
    merged = config.rollout.merge_lora
    return replace(form, weights=dtype, compute=dtype, adapter=None if merged else form.adapter)


def _scoring(
    config: Config, architecture: Architecture, device: Device, batch: Batch, rollout: dict[str, int]
) -> dict[str, dict[str, int]]:
    """The phases of decoding and scoring."""
    image = 4 * math.prod(architecture.image_shape)
    decoder = decoding_call(architecture, config.model, device)
    worker = config.rollout.reward_worker
    if worker == "auto":
        worker = "thread" if device == "cuda" else "inline"
    rows = min(batch.rollout, batch.images)
    at_a_time = min(rows, decoder_rows(architecture.vae.config, architecture.size))
    if worker == "none":
        stored = {"trajectories": rollout["trajectories"]}
        waiting = scored = batch.images * image
        decoded = waiting - at_a_time * image
    else:
        # decoded as soon as a microbatch is sampled: the replica is still there, what a call worked with is not
        stored = {name: size for name, size in rollout.items() if name != "sampling call"}
        scored = rows * image
        waiting = scored if worker == "inline" else min(batch.images, WAITING * batch.rollout) * image
        decoded = scored - at_a_time * image if worker == "inline" else waiting
    phases = {"decoding": {**stored, "images": decoded, "decoder": decoder.peak(at_a_time)}}
    if worker in ("none", "inline"):
        # the parts and the whole of what is scored are there at once; a reward makes copies of the whole
        copies = 2 if any(term.name.startswith("jpeg") for term in config.reward) and device == "cpu" else 1
        extra = copies * scored
        if device == "cpu" and any(term.name.startswith("embedded") for term in config.reward):
            extra = max(extra, DETECTOR * scored // image)
        phases["reward"] = {**stored, "images": waiting, "images, copied": extra}
    return phases


def _replay(
    config: Config,
    architecture: Architecture,
    resources: Resources,
    stage: int,
    batch: Batch,
    form: Form,
    weights: Weights,
) -> dict[str, int]:
    trained, ranks, width = weights.trained, resources.gpus, BYTES[form.weights]
    offloaded = config.distributed.offload != "none" and resources.device == "cuda"
    sums = 0 if offloaded else 4 * trained // ranks
    bucket, _ = buffer_sizes(weights.parameters)
    if stage == 0:
        call = training_call(architecture, form, accumulating=batch.calls > 1).peak(batch.replay)
        if batch.calls > 1:
            return {"gradients": 4 * trained, "activations": call}
        gradients = min(4 * trained, call)
        return {"gradients": gradients, "activations": call - gradients}
    call = training_call(architecture, form, accumulating=True).peak(batch.replay)
    parts = {"gradients": sums, "activations": call}
    if stage == 1:
        parts["gradients"] += width * trained
    parts["communication"] = 2 * min(bucket, trained) * width
    if stage == 3:
        parts["gathered weights"] = _gathered(weights, form)
    return parts


def _checkpoint(weights: Weights, form: Form, stage: int) -> dict[str, int]:
    """On a CPU: the copies of weights and moments in the layout of files, where memory has another."""
    last = form.channels_last == "on" or (form.channels_last == "auto" and form.fast_layers != "off")
    return {"copies for the file": 12 * weights.images if last and stage == 0 else 0}
