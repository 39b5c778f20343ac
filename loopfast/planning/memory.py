"""The bytes that each process of a run holds, by purpose and by phase of an iteration."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch

from loopfast.config import Config
from loopfast.engines.deepspeed_config import buffer_sizes
from loopfast.planning.architectures import Architecture
from loopfast.planning.networks import (
    DeviceKind,
    Form,
    Weights,
    decoder_type,
    decoding_call,
    form_of,
    sampling_call,
    training_call,
    weights_of,
)
from loopfast.policies.fast.switches import set_layers
from loopfast.policies.resolution import decoder_rows
from loopfast.training.microbatch import start_size

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

# The number of processes on one host, with a GPU each.
NODE = 8

# Bytes of a process beside its tensors. On a GPU an assumption: the CUDA context, the libraries' code and their
# workspaces. On a CPU the interpreter, the libraries (460 MiB) and oneDNN's caches for each convolution, fitted to two
# measured runs (docs/scaling.md).
RUNTIME: dict[DeviceKind, int] = {"cuda": 768 * 2**20, "cpu": 710 * 2**20}

# Bytes that DeepSpeed and torch's compiler, which it imports, add to a process; measured.
DEEPSPEED = 200 * 2**20

# The share of temporary bytes that an allocator loses to fragmentation. On a GPU an assumption; on a CPU measured with
# glibc's allocator, set as loopfast sets it: 0.3 to 0.5 after some calls (docs/scaling.md).
FRAGMENTATION: dict[DeviceKind, float] = {"cuda": 0.05, "cpu": 0.45}

# Bytes of two 8-bit moments a weight, with a scale for each block of 256.
EIGHT_BIT_MOMENTS = 2 * (1 + 4 / 256)

# Bytes an image that the embedded world's detector holds at its peak; measured on 256 images of the embedded model.
DETECTOR = 125_000

# Microbatches whose images wait for scores while others are sampled: two that wait, and one that is being scored.
WAITING = 3


@dataclass(frozen=True)
class Resources:
    """The devices that a run has.

    Attributes:
        device: the kind of the devices.
        memory: bytes of each device; on a CPU, of the machine.
        gpus: W, the number of processes, each with a device.
    """

    device: DeviceKind
    memory: int
    gpus: int = 1

    @property
    def usable(self) -> int:
        """The bytes that one process can use. Processes on a CPU share its memory."""
        return self.memory // (self.on_host if self.device == "cpu" else 1)

    @property
    def on_host(self) -> int:
        """The number of processes on one host."""
        return min(self.gpus, NODE)


@dataclass(frozen=True)
class Batch:
    """The rows of one process.

    Attributes:
        images: images an iteration.
        rollout, replay: rows per model call.
        pairs: pairs of trajectory and step an iteration.
        calls: calls an update.
    """

    images: int
    rollout: int
    replay: int
    pairs: int
    calls: int


@dataclass(frozen=True)
class Footprint:
    """The memory of one process.

    Attributes:
        stage: the ZeRO stage.
        held: bytes on the device from start to end, by purpose.
        phases: further bytes, by phase of an iteration and purpose.
        host: bytes in the host's memory, of all processes of a node together, by purpose.
        batch: its rows.
    """

    stage: int
    held: dict[str, int]
    phases: dict[str, dict[str, int]]
    host: dict[str, int]
    batch: Batch

    @property
    def peak_phase(self) -> str:
        """The phase with the most memory."""
        return max(self.phases, key=self.in_phase)

    def in_phase(self, phase: str) -> int:
        """Returns the bytes on the device in a phase."""
        return sum(self.held.values()) + sum(self.phases[phase].values())

    @property
    def total(self) -> int:
        """The largest number of bytes on the device at a time."""
        return self.in_phase(self.peak_phase)


@dataclass(frozen=True)
class Case:
    """A run with its model and its devices, planned for a ZeRO stage in place of the configuration's."""

    config: Config
    architecture: Architecture
    resources: Resources
    stage: int

    @cached_property
    def form(self) -> Form:
        """The form of the denoiser that is trained."""
        return form_of(self.config, self.resources.device, sharded=self.stage > 0)

    @cached_property
    def weights(self) -> Weights:
        """The sizes of the denoiser's weights."""
        return weights_of(self.architecture, self.form)

    @cached_property
    def rollout_copy(self) -> Literal["resident", "gathered"] | None:
        """The kind of the denoiser's copy that is sampled from, if there is one."""
        rollout = self.config.rollout
        if rollout.replica != "auto":
            return None if rollout.replica == "none" else rollout.replica
        wanted = rollout.dtype is not None or rollout.device is not None or rollout.merge_lora
        if self.stage == 3:
            return "resident" if self.lora else "gathered"
        return "resident" if wanted else None

    @cached_property
    def sampled(self) -> Form:
        """The form of the denoiser that is sampled from."""
        if self.rollout_copy is None:
            return self.form
        rollout = self.config.rollout
        dtype = rollout.dtype or self.config.model.dtype
        adapter = None if rollout.merge_lora else self.form.adapter
        return replace(self.form, weights=dtype, compute=dtype, adapter=adapter)

    @property
    def lora(self) -> bool:
        """True if an adapter is trained."""
        return self.config.model.tune == "lora"

    @property
    def on_gpu(self) -> bool:
        """True if the devices are GPUs."""
        return self.resources.device == "cuda"

    def gathered(self) -> int:
        """Returns the bytes that stage 3 gathers at a time: the weights in use and the next ones."""
        bucket, live = buffer_sizes(self.weights.parameters)
        numbers = min(self.weights.parameters, max(live, self.weights.largest) + bucket)
        return numbers * BYTES[self.form.weights]

    def batch(self, halvings: int = 0) -> Batch:
        """Returns the rows of one process, with automatic microbatches halved a number of times."""
        config, resources = self.config, self.resources
        images = math.ceil(config.images_per_iteration / resources.gpus)
        sizes = (config.rollout.microbatch, config.train.microbatch)
        numbers = [size for size in sizes if size != "auto"]
        device = torch.device(resources.device)
        start = numbers[0] if numbers else start_size(images, self.architecture.latent_shape, device)
        automatic = max(1, int(start) // 2**halvings)
        rollout, replay = (automatic if size == "auto" else int(size) for size in sizes)
        pairs = images * trained_steps(config)
        calls = math.ceil(math.ceil(pairs / config.train.updates_per_iteration) / replay)
        return Batch(images, rollout, replay, pairs, calls)


def trained_steps(config: Config) -> int:
    """Returns the number of a trajectory's steps that each pass trains on. ``auto`` counts as all."""
    steps, spec, noisy = config.rollout.steps, config.train.steps, config.rollout.stochastic_steps
    start, _, stop = spec.partition(":") if ":" in spec else ("", "", "")
    first, last = int(start or 0), int(stop or steps)
    count = last - first
    start, _, stop = noisy.partition(":")
    if start == "window":
        count = min(int(stop), count)
    elif ":" in noisy:
        count = min(last, int(stop or steps)) - max(first, int(start or 0))
    return max(1, config.train.trained_per_trajectory(count))


def with_sizes(
    config: Config,
    *,
    microbatch: tuple[int, int] | None = None,
    samples: int | None = None,
    prompts: int | None = None,
) -> Config:
    """Returns the configuration with other rows per model call (rollout, replay), K or prompts; not validated."""
    rollout, train, algorithm = config.rollout, config.train, config.algorithm
    sampled, replayed = microbatch or (rollout.microbatch, train.microbatch)
    sizes = {"microbatch": sampled, "prompts_per_iteration": prompts or rollout.prompts_per_iteration}
    sections = {
        "rollout": rollout.model_copy(update=sizes),
        "train": train.model_copy(update={"microbatch": replayed}),
        "algorithm": algorithm.model_copy(
            update={"samples_per_prompt": samples or algorithm.samples_per_prompt}
        ),
    }
    return config.model_copy(update=sections)


def footprint(
    config: Config, architecture: Architecture, resources: Resources, stage: int | None = None
) -> Footprint:
    """Returns the memory of one process of a run.

    An automatic microbatch is halved until the run fits, as in a run of one process on a GPU. The ZeRO stage None is
    the configuration's.

    Raises:
        ConfigError: the model or its adapter cannot be made from the configuration.
    """
    case = Case(config, architecture, resources, config.distributed.zero_stage if stage is None else stage)
    found = _footprint(case, case.batch())
    alone = resources.gpus == 1 and case.stage == 0 and config.distributed.deepspeed is None
    halvings = 1
    while found.total > resources.usable and alone and case.on_gpu:
        smaller = case.batch(halvings)
        if smaller == found.batch:
            break
        found, halvings = _footprint(case, smaller), halvings + 1
    return found


def _footprint(case: Case, batch: Batch) -> Footprint:
    config, architecture, weights = case.config, case.architecture, case.weights
    held, host = _held(case)
    copy = weights.parameters * BYTES[case.sampled.weights]
    if case.rollout_copy is not None and case.lora and not config.rollout.merge_lora:
        copy += weights.trained * BYTES[case.sampled.adapter_weights]
    on_host = config.rollout.device == "cpu" and case.on_gpu
    if case.rollout_copy == "resident" or (case.rollout_copy and on_host):
        (host if on_host else held)["rollout replica"] = copy

    latent = math.prod(architecture.latent_shape) * BYTES[case.sampled.compute]
    steps = config.rollout.steps
    stored = (steps + 1) * batch.images * latent + 4 * steps * batch.images
    store = (steps + 1) * batch.rollout * latent
    held["sampling buffers"] = store + batch.rollout * architecture.text_tokens * architecture.text_width * 4
    sampling = sampling_call(architecture, case.sampled).peak(batch.rollout)
    if case.stage == 3 and case.rollout_copy is None:
        sampling += case.gathered()

    rollout = {"trajectories": stored, "sampling call": sampling}
    if case.rollout_copy == "gathered" and not on_host:
        rollout["rollout replica"] = copy
    phases = {"rollout": rollout, **_scoring(case, batch, rollout), "replay": _replay(case, batch)}
    if config.trajectories.device == "policy" or not case.on_gpu:
        phases["replay"]["trajectories"] = stored
    else:
        host["trajectories"] = stored * case.resources.on_host
    graph = case.on_gpu and config.rollout.cuda_graph and (case.stage < 3 or case.rollout_copy is not None)
    if graph and case.rollout_copy != "gathered":
        # a recorded step keeps its working memory for the next iteration
        for name in phases.keys() - {"rollout"}:
            phases[name]["recorded step"] = sampling
    if not case.on_gpu:
        # weights and moments are copied to the layout of files, if they have another one
        last = set_layers((), config.model.fast_layers, config.model.channels_last, "cpu")["channels last"]
        copied = 12 * weights.images if last and case.stage == 0 else 0
        phases["checkpoint"] = {"copies for the file": copied}
    if config.model.free_text_encoder:
        phases["encoding"] = {"text encoders": BYTES[config.model.dtype] * architecture.text_parameters}
    for parts in phases.values():
        parts["fragmentation"] = round(FRAGMENTATION[case.resources.device] * sum(parts.values()))
    return Footprint(case.stage, held, phases, host, batch)


def _held(case: Case) -> tuple[dict[str, int], dict[str, int]]:
    """Returns the bytes of networks, optimizer and runtime that stay on the device, and in the host's memory."""
    config, form, architecture = case.config, case.form, case.architecture
    total, trained, width = case.weights.parameters, case.weights.trained, BYTES[config.model.dtype]
    ranks, processes = case.resources.gpus, case.resources.on_host
    shards = ranks if case.stage == 3 else 1
    held = {"denoiser": total * BYTES[form.weights] // shards + case.weights.buffers}
    if case.lora:
        held["adapter"] = trained * BYTES[form.adapter_weights] // shards
    optimizer = {}
    if case.stage > 0:
        optimizer["float32 weights"] = 4 * trained // ranks
    moments = 8 if config.train.optimizer == "adamw" else EIGHT_BIT_MOMENTS
    optimizer["optimizer"] = round(moments * trained) // (ranks if case.stage > 0 else 1)
    host: dict[str, int] = {}
    if config.distributed.offload != "none" and case.stage > 0 and case.on_gpu:
        for name, size in optimizer.items():
            host[name] = size * processes
        host["gradients"] = 4 * trained // ranks * processes
    else:
        held |= optimizer
    if config.distributed.offload == "all" and case.stage == 3 and case.on_gpu:
        for name in ("denoiser", "adapter"):
            if name in held:
                host[name] = held.pop(name) * processes
    if config.train.ema_decay is not None:
        held["average of the weights"] = 4 * trained
    if config.algorithm.kl_weight > 0 and not case.lora:
        held["reference"] = total * width // shards
    if not config.model.free_text_encoder:
        held["text encoders"] = width * architecture.text_parameters
    held["autoencoder"] = BYTES[decoder_type(config.model)] * architecture.vae.parameters()
    held["runtime"] = RUNTIME[case.resources.device]
    if case.on_gpu:
        # an adapter's base is loaded in the type that it is held in, weights that are all trained in float32
        loaded = (width if case.lora else 4) * total
        read = loaded + width * architecture.text_parameters + 4 * architecture.vae.parameters()
        host["loading"] = read * processes
        host["writing a checkpoint"] = 12 * trained
    elif case.stage > 0 or ranks > 1:
        held["runtime"] += DEEPSPEED
    return held, host


def _scoring(case: Case, batch: Batch, rollout: dict[str, int]) -> dict[str, dict[str, int]]:
    """Returns the phases of decoding and scoring."""
    config, architecture = case.config, case.architecture
    image = 4 * math.prod(architecture.image_shape)
    decoder = decoding_call(architecture, config.model, case.resources.device)
    worker = config.rollout.reward_worker
    if worker == "auto":
        worker = "thread" if case.on_gpu else "inline"
    rows = min(batch.rollout, batch.images)
    at_a_time = min(rows, decoder_rows(architecture.vae.config, architecture.size))
    if worker == "none":
        stored, scored = {"trajectories": rollout["trajectories"]}, batch.images * image
    else:
        # images are decoded after each microbatch, when the sampling call's memory is free but the replica is not
        stored = {name: size for name, size in rollout.items() if name != "sampling call"}
        scored = rows * image
    here = worker in ("none", "inline")
    decoded = scored - at_a_time * image if here else min(batch.images, WAITING * batch.rollout) * image
    phases = {"decoding": {**stored, "images": decoded, "decoder": decoder.peak(at_a_time)}}
    if here:
        # the microbatches and their concatenation are held at once; some rewards copy the latter
        names = [term.name for term in config.reward] if not case.on_gpu else []
        copies = 2 if any(name.startswith("jpeg") for name in names) else 1
        extra = copies * scored
        if any(name.startswith("embedded") for name in names):
            extra = max(extra, DETECTOR * scored // image)
        phases["reward"] = {**stored, "images": scored, "images, copied": extra}
    return phases


def _replay(case: Case, batch: Batch) -> dict[str, int]:
    """Returns the phase of the updates."""
    config, architecture, form = case.config, case.architecture, case.form
    trained, width = case.weights.trained, BYTES[form.weights]
    accumulating = case.stage > 0 or batch.calls > 1
    call = training_call(architecture, form, accumulating=accumulating).peak(batch.replay)
    if case.stage == 0:
        gradients = 4 * trained if accumulating else min(4 * trained, call)
        return {"gradients": gradients, "activations": call if accumulating else call - gradients}
    offloaded = config.distributed.offload != "none" and case.on_gpu
    parts = {"gradients": 0 if offloaded else 4 * trained // case.resources.gpus, "activations": call}
    if case.stage == 1:
        parts["gradients"] += width * trained
    bucket, _ = buffer_sizes(case.weights.parameters)
    parts["communication"] = 2 * min(bucket, trained) * width
    if case.stage == 3:
        parts["gathered weights"] = case.gathered()
    return parts
