"""Records a denoising step in a CUDA graph and replays it; takes it eagerly if that is impossible."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable
from functools import cache

import torch

from loopfast.policies import Conditioning, Policy
from loopfast.profiling import model_call, range_
from loopfast.rollout.recording import CannotRecordError, Recorder
from loopfast.rollout.step import DenoisingStep
from loopfast.schedules import TransitionSchedule
from loopfast.system.memory import free_cached_memory

CHECK_ADDRESSES = "LOOPFAST_CHECK_ADDRESSES"
"""Environment variable: 1 compares each tensor's address, before each replay, with that of the recording."""


class CapturedStep:
    """A `DenoisingStep`, recorded in a CUDA graph if asked for and possible.

    If the step cannot be recorded, one warning says why, and it is taken eagerly, with the same results. The
    environment variable `CHECK_ADDRESSES` checks before each replay that nothing has moved since the recording.

    Args:
        step: the step to record.
        recorder: records the step; None takes it eagerly, as on devices without graphs.
        warn: called with the reason why the step cannot be recorded.

    Raises:
        torch.OutOfMemoryError: the recording does not fit into memory.
    """

    def __init__(
        self,
        step: DenoisingStep,
        *,
        recorder: Recorder | None = None,
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.step = step
        self._check = os.environ.get(CHECK_ADDRESSES) == "1"
        self._addresses = step.addresses()
        self._adapter = step.adapter()
        self._graph: torch.cuda.CUDAGraph | None = None
        if recorder is not None:
            try:
                self._graph = recorder.record(step.rewind, step.advance)
            except CannotRecordError as error:
                warn(f"the denoising step cannot be captured in a CUDA graph and runs without one: {error}")

    @property
    def captured(self) -> bool:
        """True if there is a graph to replay."""
        return self._graph is not None

    def is_current(self) -> bool:
        """Returns whether the weights' addresses and the adapter are those of the recording."""
        return self.step.addresses() == self._addresses and self.step.adapter() == self._adapter

    def run(self, steps: int) -> None:
        """Takes the first ``steps`` steps of the loaded transitions.

        Raises:
            RuntimeError: under `CHECK_ADDRESSES`, a tensor has moved.
        """
        device = self.step.trajectory.device
        for index in range(steps):
            if self._check:
                self._require_unmoved()
            if self._graph is None:
                with range_("step", "rollout", index):
                    self.step.advance()
            else:  # almost all of the graph is the denoiser, whose own range does not replay
                with model_call("denoiser", "rollout", index, device):
                    self._graph.replay()

    def release(self) -> None:
        """Frees the graph; the step must not be taken afterwards."""
        if self._graph is not None:
            self._graph.reset()
            self._graph = None

    def _require_unmoved(self) -> None:
        now = self.step.addresses()
        moved = [name for name, address in self._addresses.items() if now.get(name) != address]
        if moved:
            more = f" and {len(moved) - 1} more" if len(moved) > 1 else ""
            raise RuntimeError(
                f"{moved[0]}{more} moved in memory after the denoising step was recorded: a replay would read the "
                "old place. Change tensors in place (copy_), or sample anew"
            )


class StepCache:
    """The recorded steps, each under the key of its arguments.

    Args:
        capture: record steps in CUDA graphs, on devices that have them.
        warn: called with the reason of a failed recording, once for each reason.
    """

    def __init__(self, *, capture: bool = True, warn: Callable[[str], None] = lambda text: None) -> None:
        self._capture, self._warn = capture, cache(warn)
        self._steps: dict[Hashable, CapturedStep] = {}
        self._failed: set[Hashable] = set()
        self._recorders: dict[torch.device, Recorder] = {}

    def __len__(self) -> int:
        return len(self._steps)

    def get(
        self,
        policy: Policy,
        rows: int,
        schedule: TransitionSchedule,
        conditioning: Conditioning,
        guidance_scale: float,
        reduction: str,
    ) -> CapturedStep:
        """Returns the step of these arguments of `DenoisingStep`, recorded anew if weights have moved.

        Arguments share a step if all shapes, types and constants of their calls are equal.
        """
        text = tuple((name, tuple(value.shape[1:]), value.dtype) for name, value in conditioning.items())
        latents = (tuple(policy.latent_shape), policy.dtype, policy.device)
        types = (len(schedule), schedule.timesteps.dtype, schedule.table.dtype)
        key = id(policy), rows, latents, types, text, guidance_scale, reduction
        found = self._steps.get(key)
        if found is not None and found.is_current():
            return found
        if found is not None:
            found.release()
            del self._steps[key]
        capture = self._capture and policy.device.type == "cuda" and key not in self._failed
        made = CapturedStep(
            DenoisingStep(policy, rows, schedule, conditioning, guidance_scale, reduction),
            recorder=self._recorder(policy.device) if capture else None,
            warn=self._warn,
        )
        if capture and not made.captured:
            self._failed.add(key)
        self._steps[key] = made
        return made

    def _recorder(self, device: torch.device) -> Recorder:
        recorder = self._recorders.setdefault(device, Recorder(device))
        if not any(step.captured for step in self._steps.values()):
            # a pool ends with its last graph
            recorder.renew_pool()
        return recorder

    def release(self) -> None:
        """Frees every graph and buffer; the next sampling records its steps anew."""
        for step in self._steps.values():
            step.release()
        self._steps.clear()
        free_cached_memory()
