"""The work that the engine is measured on, and its competitors."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from benchmarks.race.settings import Work

Json = dict[str, Any]

WORK = Work(
    model="embedded",
    tune="full",
    images=16,
    steps=10,
    guidance=3.0,
    updates=2,
    reward="embedded",
    trl_batches=(),
    microbatches=(),
)
"""Small enough that every competitor's iteration is of a second or two on two cores."""

MEASURED = 3
"""Iterations timed, after one to warm up."""

PHASES = {"engine_rollout": "sampling", "engine_replay": "training", "engine_iteration": "seconds"}
"""What is timed, and the worker's name for it."""


class Lever(NamedTuple):
    """One configuration key in which a competitor differs from our defaults.

    Attributes:
        config: the changed part of the configuration.
        device: ``cuda`` if the key has no effect or no use on a CPU.
        reason: why the key is skipped on a CPU.
    """

    config: Json
    device: Literal["any", "cuda"] = "any"
    reason: str = ""


LEVERS: dict[str, Lever] = {
    "microbatch-4": Lever({"rollout": {"microbatch": 4}, "train": {"microbatch": 4}}),
    "reward-thread": Lever({"rollout": {"reward_worker": "thread"}}),
    "window-5": Lever({"rollout": {"stochastic_steps": "window:5"}}),
    "step-fraction-0.5": Lever({"train": {"step_fraction": 0.5}}),
    "gradient-checkpointing": Lever({"train": {"gradient_checkpointing": True}}),
    "no-fast-layers": Lever({"model": {"fast_layers": "off"}}),
    "channels-first": Lever({"model": {"channels_last": "off"}}),
    "no-shared-trunk": Lever({"model": {"shared_trunk": False}}),
    "sdpa": Lever({"model": {"attention": "sdpa"}}),
    "bfloat16": Lever({"model": {"dtype": "bfloat16"}}),
    "no-cuda-graph": Lever({"rollout": {"cuda_graph": False}}, "cuda", "there are no CUDA graphs"),
    "tf32": Lever({"model": {"tf32": True}}, "cuda", "there is no TF32"),
    "host-trajectories": Lever({"trajectories": {"device": "host"}}, "cuda", "the device is the host"),
    "compile": Lever({"model": {"compile": "whole"}}, "cuda", "compiling takes longer than all the rest"),
}

COMPETITORS = ("ours", "plain", *LEVERS)
