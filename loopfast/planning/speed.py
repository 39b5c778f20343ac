"""Seconds of an iteration from counted operations and a card's rates, and what many GPUs add to them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from loopfast.config import Config
from loopfast.planning.architectures import Architecture
from loopfast.planning.cards import NETWORK, NODE, Card
from loopfast.planning.memory import (
    BYTES,
    Footprint,
    Resources,
    batch_of,
    replica_of,
    sampled_form,
    with_sizes,
)
from loopfast.planning.networks import (
    decoder_type,
    decoding_call,
    form_of,
    sampling_call,
    training_call,
    weights_of,
)


@dataclass(frozen=True)
class Work:
    """Operations of one process in an iteration, evaluations and checkpoints aside.

    Attributes:
        rollout, decoding, replay: floating-point operations.
        optimizer: bytes that its updates read and write.
    """

    rollout: float
    decoding: float
    replay: float
    optimizer: float

    def seconds(self, card: Card, config: Config) -> dict[str, float]:
        """By part, at the card's assumed rates."""
        rate = card.rate(config.model.dtype, config.model.tf32)
        sampling = card.rate(config.rollout.dtype or config.model.dtype, config.model.tf32)
        # of the decoder, whose work is convolutions
        in_tf32 = config.model.tf32 or config.model.decoder_precision in ("auto", "tf32")
        return {
            "rollout": self.rollout / sampling,
            "decoding": self.decoding / card.rate(decoder_type(config.model), in_tf32),
            "replay": self.replay / rate,
            "optimizer": self.optimizer / card.bandwidth,
        }


@dataclass(frozen=True)
class Traffic:
    """Bytes that one process sends in an iteration, by purpose."""

    volumes: dict[str, int]

    def seconds(self, card: Card, gpus: int) -> float:
        """At the bandwidth of the slowest link in the ring, without overlap with computation."""
        return sum(self.volumes.values()) / (card.link if gpus <= NODE else NETWORK)


@dataclass(frozen=True)
class Scale:
    """An iteration on W GPUs.

    Attributes:
        gpus: W.
        images: of all GPUs together.
        compute, communication: seconds.
        traffic: bytes that each GPU sends.
        efficiency: images per second and GPU, as a share of those of one GPU.
    """

    gpus: int
    images: int
    compute: float
    communication: float
    traffic: Traffic
    efficiency: float = 1.0

    @property
    def seconds(self) -> float:
        """Of an iteration, if nothing overlaps."""
        return self.compute + self.communication


def work_of(config: Config, architecture: Architecture, resources: Resources, plan: Footprint) -> Work:
    """What each process computes in an iteration."""
    stage, batch = plan.stage, plan.batch
    form = form_of(config, resources.device, sharded=stage > 0)
    replica = replica_of(config.rollout, stage, config.model.tune)
    sampled = sampled_form(config, form, replica)
    sampling = sampling_call(architecture, sampled).flops
    training = training_call(architecture, form, accumulating=stage > 0 or batch.calls > 1).flops
    pairs = batch.pairs * config.train.inner_epochs
    # a call is filled up to its microbatch, in the rollout always
    sampled_rows = math.ceil(batch.images / batch.rollout) * batch.rollout
    reference = sampling if config.algorithm.kl_weight > 0 else 0
    updates = config.train.updates_per_iteration * config.train.inner_epochs
    trained = weights_of(architecture, form).trained / (resources.gpus if stage > 0 else 1)
    moments = 4 if config.train.optimizer == "adamw" else 1
    return Work(
        rollout=sampled_rows * config.rollout.steps * sampling,
        decoding=batch.images * decoding_call(architecture, config.model, resources.device).flops,
        replay=pairs * (training + reference),
        # reads weight, gradient and both moments, writes weight and both moments
        optimizer=updates * trained * (4 + 4 + 4 + 4 * moments),
    )


def traffic_of(config: Config, architecture: Architecture, resources: Resources, plan: Footprint) -> Traffic:
    """What each process sends in an iteration: a ring moves (W - 1) / W of what is gathered or reduced."""
    gpus, stage, batch = resources.gpus, plan.stage, plan.batch
    ring = (gpus - 1) / gpus
    form = form_of(config, resources.device, sharded=stage > 0)
    weights = weights_of(architecture, form)
    width = BYTES[config.model.dtype]
    everything, trained = weights.parameters * width, weights.trained * (width if stage > 0 else 4)
    updates = config.train.updates_per_iteration * config.train.inner_epochs
    calls = updates * batch.calls
    volumes: dict[str, float] = {}
    if stage < 2:
        volumes["reduce gradients"] = 2 * ring * trained * updates
    else:
        volumes["reduce gradients"] = ring * trained * calls
    if stage in (1, 2):
        volumes["gather updated weights"] = ring * trained * updates
    if stage == 3:
        passes = 3 if config.train.gradient_checkpointing else 2
        volumes["gather weights, replay"] = passes * ring * everything * calls
        if replica_of(config.rollout, stage, config.model.tune) is None:
            times = config.rollout.steps * math.ceil(batch.images / batch.rollout)
        else:
            times = 1
        whole = everything if config.model.tune == "full" or times > 1 else trained
        volumes["gather weights, rollout"] = times * ring * whole
    return Traffic({name: round(size) for name, size in volumes.items()})


def scaling(
    config: Config,
    architecture: Architecture,
    card: Card,
    resources: Resources,
    plan: Footprint,
    *,
    weak: bool,
) -> list[Scale]:
    """An iteration on 1, 8, 64 and 512 GPUs.

    Args:
        config: the run.
        architecture: its model.
        card: each GPU.
        resources: what the plan is for.
        plan: its memory; the rows of a model call stay as they are.
        weak: whether images grow with the GPUs (each does the same work) or stay as they are.
    """
    found: list[Scale] = []
    for gpus in (1, 8, 64, 512):
        there = replace(resources, gpus=gpus)
        prompts = config.rollout.prompts_per_iteration
        if weak:
            prompts = math.ceil(prompts * gpus / resources.gpus)
        total = prompts * config.algorithm.samples_per_prompt
        each = math.ceil(total / gpus)
        # a number in the configuration stays; what is automatic is no more than a process has images
        rollout, replay = (
            min(rows, each) if given == "auto" else rows
            for given, rows in (
                (config.rollout.microbatch, plan.batch.rollout),
                (config.train.microbatch, plan.batch.replay),
            )
        )
        many = with_sizes(config, microbatch=(rollout, replay), prompts=prompts)
        # the stages shard over the processes, of which one has nothing to share
        part = replace(plan, batch=batch_of(many, architecture, there))
        compute = sum(work_of(many, architecture, there, part).seconds(card, many).values())
        traffic = traffic_of(many, architecture, there, part)
        found.append(Scale(gpus, total, compute, traffic.seconds(card, gpus), traffic))
    base = found[0].images / found[0].seconds
    return [replace(scale, efficiency=scale.images / scale.seconds / scale.gpus / base) for scale in found]
