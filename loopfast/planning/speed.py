"""The seconds of an iteration, from counted operations and a device's rates, and how they scale to many GPUs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from loopfast.config import Config
from loopfast.planning.devices import NETWORK, Device
from loopfast.planning.memory import BYTES, NODE, Batch, Case, with_sizes
from loopfast.planning.networks import decoder_type, decoding_call, sampling_call, training_call


@dataclass(frozen=True)
class Work:
    """The operations of one process in an iteration, without evaluations and checkpoints.

    Attributes:
        rollout, decoding, replay: floating-point operations.
        optimizer: bytes that the updates read and write.
    """

    rollout: float
    decoding: float
    replay: float
    optimizer: float

    def seconds(self, device: Device, config: Config) -> dict[str, float]:
        """Returns the seconds of each part at the device's assumed rates."""
        model = config.model
        # the decoder's work is convolutions
        in_tf32 = model.tf32 or model.decoder_precision in ("auto", "tf32")
        return {
            "rollout": self.rollout / device.rate(config.rollout.dtype or model.dtype, model.tf32),
            "decoding": self.decoding / device.rate(decoder_type(model), in_tf32),
            "replay": self.replay / device.rate(model.dtype, model.tf32),
            "optimizer": self.optimizer / device.bandwidth,
        }


@dataclass(frozen=True)
class Scale:
    """An iteration on W GPUs.

    Attributes:
        gpus: W.
        images: images of all GPUs together.
        compute_seconds, communication_seconds: the parts of an iteration.
        seconds: their sum, as if nothing overlapped.
        efficiency: images per second and GPU, relative to one GPU.
        bytes_sent: bytes that each GPU sends, by purpose.
    """

    gpus: int
    images: int
    compute_seconds: float
    communication_seconds: float
    seconds: float
    efficiency: float
    bytes_sent: dict[str, int]


def work_of(case: Case, batch: Batch) -> Work:
    """Returns the operations of each process in an iteration."""
    config, architecture, device = case.config, case.architecture, case.resources.device
    sampling = sampling_call(architecture, case.sampled).flops
    training = training_call(architecture, case.form, accumulating=case.stage > 0 or batch.calls > 1).flops
    # every call of the rollout is padded to its microbatch
    sampled_rows = math.ceil(batch.images / batch.rollout) * batch.rollout
    reference = sampling if config.algorithm.kl_weight > 0 else 0
    updates = config.train.updates_per_iteration * config.train.inner_epochs
    trained = case.weights.trained / (case.resources.gpus if case.stage > 0 else 1)
    moments = 4 if config.train.optimizer == "adamw" else 1
    return Work(
        rollout=sampled_rows * config.rollout.steps * sampling,
        decoding=batch.images * decoding_call(architecture, config.model, device).flops,
        replay=batch.pairs * config.train.inner_epochs * (training + reference),
        # reads weight, gradient and both moments, writes weight and both moments
        optimizer=updates * trained * (4 + 4 + 4 + 4 * moments),
    )


def traffic_of(case: Case, batch: Batch) -> dict[str, int]:
    """Returns the bytes that each process sends in an iteration, by purpose.

    A ring moves (W - 1) / W of what is gathered or reduced.
    """
    config, stage = case.config, case.stage
    ring = (case.resources.gpus - 1) / case.resources.gpus
    width = BYTES[config.model.dtype]
    everything = case.weights.parameters * width
    trained = case.weights.trained * (width if stage > 0 else 4)
    updates = config.train.updates_per_iteration * config.train.inner_epochs
    calls = updates * batch.calls
    # a stage that shards gradients reduces them at every call
    sent: dict[str, float] = {"reduce gradients": ring * trained * (2 * updates if stage < 2 else calls)}
    if stage in (1, 2):
        sent["gather updated weights"] = ring * trained * updates
    if stage == 3:
        passes = 3 if config.train.gradient_checkpointing else 2
        sent["gather weights, replay"] = passes * ring * everything * calls
        # a copy to sample from is gathered once, and of it only what training changed
        calls = (
            config.rollout.steps * math.ceil(batch.images / batch.rollout) if case.rollout_copy is None else 1
        )
        gathered = everything if not case.lora or calls > 1 else trained
        sent["gather weights, rollout"] = calls * ring * gathered
    return {name: round(size) for name, size in sent.items()}


def scaling(case: Case, batch: Batch, device: Device, *, weak: bool) -> list[Scale]:
    """Returns an iteration on 1, 8, 64 and 512 GPUs, with as many rows in a model call as in ``batch``.

    With ``weak`` the images grow with the GPUs, so that each does the same work. Without it they stay as they are.
    """
    config, found = case.config, list[Scale]()
    for gpus in (1, 8, 64, 512):
        prompts = config.rollout.prompts_per_iteration
        if weak:
            prompts = math.ceil(prompts * gpus / case.resources.gpus)
        images = prompts * config.algorithm.samples_per_prompt
        each = math.ceil(images / gpus)
        # a microbatch that is a number stays; an automatic one is at most a process's images
        rollout = min(batch.rollout, each) if config.rollout.microbatch == "auto" else batch.rollout
        replay = min(batch.replay, each) if config.train.microbatch == "auto" else batch.replay
        many = Case(
            with_sizes(config, microbatch=(rollout, replay), prompts=prompts),
            case.architecture,
            replace(case.resources, gpus=gpus),
            case.stage,
        )
        rows = many.batch()
        sent = traffic_of(many, rows)
        compute = sum(work_of(many, rows).seconds(device, many.config).values())
        # at the bandwidth of the ring's slowest link
        communication = sum(sent.values()) / (device.link if gpus <= NODE else NETWORK)
        seconds = compute + communication
        base = found[0].images / found[0].seconds if found else images / seconds
        efficiency = images / seconds / gpus / base
        found.append(Scale(gpus, images, compute, communication, seconds, efficiency, sent))
    return found
