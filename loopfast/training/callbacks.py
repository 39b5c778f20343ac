"""Calls the user's functions after every iteration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from loopfast.errors import CallbackError, first_line
from loopfast.prompts import Prompt
from loopfast.rollout.trajectories import Trajectories
from loopfast.training.batch import draw_prompts
from loopfast.training.run import Run
from loopfast.training.state import TrainState


@dataclass(frozen=True)
class Iteration:
    """A complete iteration, as callbacks get it. With several processes, only the first one calls callbacks.

    Attributes:
        number: number of the iteration, from 1.
        metrics: its metrics, named as in ``metrics.jsonl``; those of an evaluation too, if it was evaluated.
        prompts: the G prompts.
        rewards: float32 ``[G, K]``; NaN for all images of a prompt that was left out. None if the run was resumed after
            the iteration and before its evaluation: its images are gone.
        trajectories: the sampled trajectories, N = G · K, with the latents of this process. None if ``rewards`` is.
    """

    number: int
    metrics: Mapping[str, Any]
    prompts: list[Prompt]
    rewards: Tensor | None
    trajectories: Trajectories | None
    _decode: Callable[[Tensor], Tensor] = field(repr=False)
    _stops: list[bool] = field(default_factory=list, repr=False)

    def images(self) -> Tensor:
        """Decodes the images of this process's trajectories: float32 ``[n, 3, H, W]`` in [0, 1].

        Raises:
            ValueError: they are gone, see ``trajectories``.
        """
        if self.trajectories is None:
            raise ValueError(
                "the images of this iteration are gone: the run was stopped after it, and resumed"
            )
        return self._decode(self.trajectories.final)

    def stop(self) -> None:
        """Ends the run with this iteration: it is evaluated, saved and exported as its last one."""
        self._stops.append(True)


Callback = Callable[[Iteration], object]


def call_back(run: Run, state: TrainState, metrics: Mapping[str, Any]) -> bool:
    """Calls the run's callbacks for the latest iteration; returns in every process whether one asks to stop.

    Raises:
        CallbackError: a callback raised.
    """
    if not run.callbacks or state.iteration == 0:
        return False
    return run.world.on_main(lambda: _called(run, state, metrics))


def _called(run: Run, state: TrainState, metrics: Mapping[str, Any]) -> bool:
    policy, rollout = run.sampler.policy, state.latest
    iteration = Iteration(
        number=state.iteration,
        metrics=dict(metrics),
        prompts=draw_prompts(run, state.iteration - 1),
        rewards=None if rollout is None else rollout.rewards.clone(),
        trajectories=None if rollout is None else rollout.trajectories,
        _decode=lambda latents: run.sampler.decode(latents.to(policy.device)),
    )
    for callback in run.callbacks:
        try:
            callback(iteration)
        except Exception as error:
            name = getattr(callback, "__qualname__", type(callback).__name__)
            raise CallbackError(
                f"iteration {state.iteration}: callback {name} raised {type(error).__name__}: {first_line(error)}"
            ) from error
    return bool(iteration._stops)
