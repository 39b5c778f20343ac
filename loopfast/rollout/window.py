"""The steps of an iteration that draw noise, and those that it trains on."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from loopfast.errors import ConfigError
from loopfast.policies import trained_steps
from loopfast.schedules import TransitionSchedule
from loopfast.seeds import derive


@dataclass(frozen=True)
class StochasticSteps:
    """The steps that draw noise: all, a range, or a window that is drawn for each iteration.

    The other steps are deterministic (DDIM with eta = 0, the flow's ODE): they have no density, and so no gradient. A
    window lies where every step in it is one to train on, so that each iteration has the same number of pairs.

    Attributes:
        schedule: the T transitions, on any device. With a window, every step has its noise in it.
        trained_steps: the steps that may be trained on, ascending.
        window: W, the number of consecutive steps that an iteration trains on. None takes all.
        starts: the steps at which a window may begin.
    """

    schedule: TransitionSchedule
    trained_steps: tuple[int, ...]
    window: int | None = None
    starts: tuple[int, ...] = ()

    @property
    def count(self) -> int:
        """The number of steps of each trajectory that an iteration trains on."""
        return len(self.trained_steps) if self.window is None else self.window

    def for_iteration(self, seed: int, iteration: int) -> tuple[TransitionSchedule, tuple[int, ...]]:
        """Returns an iteration's transitions and its trained steps, a function of the run's seed and the iteration."""
        if self.window is None:
            return self.schedule, self.trained_steps
        start = self.starts[derive(seed, "window", iteration) % len(self.starts)]
        stop = start + self.window
        return self.schedule.stochastic_in(start, stop), tuple(range(start, stop))

    def to(self, device: torch.device) -> StochasticSteps:
        """Returns a copy with the schedule on a device."""
        return replace(self, schedule=self.schedule.to(device))


def stochastic_steps(schedule: TransitionSchedule, stochastic: str, trained: str) -> StochasticSteps:
    """Returns the steps that ``rollout.stochastic_steps`` and ``train.steps`` select.

    Args:
        schedule: the sampler's T transitions, each with its noise.
        stochastic: ``all``, ``START:STOP`` or ``window:W``.
        trained: ``all``, ``auto`` or ``START:STOP``, of those that draw noise.

    Raises:
        ConfigError: they leave no step to train on, or no room for the window.
    """
    if stochastic == "all":
        return StochasticSteps(schedule, trained_steps(schedule, trained))
    first, _, last = stochastic.partition(":")
    if first != "window":
        start, stop = int(first or 0), int(last or len(schedule))
        try:
            inside = schedule.stochastic_in(start, stop)
        except ValueError as error:
            raise ConfigError(f"rollout.stochastic_steps: {error}") from error
        return StochasticSteps(inside, trained_steps(inside, trained))
    width, steps = int(last), trained_steps(schedule, trained)
    starts = tuple(step for step in steps if set(range(step, step + width)) <= set(steps))
    if not starts:
        chosen = ", ".join(map(str, steps))
        raise ConfigError(
            f"rollout.stochastic_steps: found {stochastic}, allowed: a window that fits into the steps that "
            f"train.steps ({trained}) selects: {chosen}"
        )
    return StochasticSteps(schedule, steps, width, starts)
