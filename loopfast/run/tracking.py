"""The record of a run: ``metrics.jsonl``, and TensorBoard or Weights & Biases if they are configured.

``metrics.jsonl`` is always written: one JSON object per iteration, flushed at once, with no names but those of
`METRICS`. The first object, iteration 0, holds the evaluation before training. A number that is not finite is written
as null, so that every line is standard JSON.
"""

from __future__ import annotations

import functools
import json
import math
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from loopfast.errors import LoopfastError, MissingExtraError, first_line
from loopfast.system.files import write_file, writing

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["METRICS", "Metric", "Tracker", "describe", "read_metrics"]


class Metric(NamedTuple):
    """The meaning of a number in ``metrics.jsonl``, its unit, and its section in trackers."""

    description: str
    unit: str
    section: str


METRICS: dict[str, Metric] = {
    "iteration": Metric("complete iterations; 0 is before training", "count", "run"),
    "images": Metric("images sampled for training so far", "count", "run"),
    "seconds": Metric("time since the run began, with evaluations and earlier sessions", "s", "time"),
    "reward_mean": Metric(
        "mean total reward of the iteration's images, computed as in evaluations", "reward", "reward"
    ),
    "reward_std": Metric(
        "standard deviation of the total reward over the iteration's images", "reward", "reward"
    ),
    "group_spread": Metric(
        "mean standard deviation of the total reward within a group, a prompt's K samples", "reward", "reward"
    ),
    "dropped_groups": Metric(
        "groups dropped because a reward of one of their images was not finite (rollout.on_bad_reward: drop_group)",
        "count",
        "reward",
    ),
    "eval_dropped_images": Metric(
        "evaluation images dropped because a reward was not finite (rollout.on_bad_reward: drop_group)",
        "count",
        "evaluation",
    ),
    "eval_reward": Metric("mean total reward of the evaluation's images", "reward", "evaluation"),
    "ratio_max_deviation": Metric("max |ratio - 1| before the iteration's first update", "1", "policy"),
    "on_policy_outside_clip": Metric(
        "share of pairs with a ratio outside the clip range before the iteration's first update",
        "1",
        "policy",
    ),
    "ratio_outside_clip": Metric(
        "share of pairs with a ratio outside the clip range (Stable-Baselines3: clip_fraction)", "1", "policy"
    ),
    "clip_fraction": Metric(
        "share of pairs with a clipped, flat surrogate, so without a policy gradient (verl: pg_clipfrac); "
        "Stable-Baselines3's clip_fraction is ratio_outside_clip here",
        "1",
        "policy",
    ),
    "zero_gradient": Metric(
        "share of pairs without a gradient: clipped or with advantage 0, and no KL penalty", "1", "policy"
    ),
    "kl": Metric("KL divergence from the sampling policy: mean(ratio - 1 - log ratio)", "nat", "policy"),
    "kl_reference": Metric(
        "mean KL divergence from the model before training; only with algorithm.kl_weight", "nat", "policy"
    ),
    "logprob_change": Metric("mean |log-probability - log-probability at sampling|", "nat", "policy"),
    "loss": Metric("mean loss of the iteration's updates", "1", "optimization"),
    "screened_out": Metric(
        "share of pairs whose backward pass was skipped because they have no gradient", "1", "optimization"
    ),
    "grad_norm": Metric("mean gradient norm of the updates, before clipping", "1", "optimization"),
    "learning_rate": Metric("learning rate of the last update", "1", "optimization"),
    "overflows": Metric(
        "float16 gradient overflows; each update was repeated with half the loss scale (model.dtype: float16)",
        "count",
        "optimization",
    ),
    "seconds_iteration": Metric("iteration time without evaluation and checkpoint", "s", "time"),
    "seconds_rollout": Metric("iteration time in sampling", "s", "time"),
    "seconds_reward": Metric(
        "iteration time in decoding and scoring images, as far as sampling did not continue meanwhile",
        "s",
        "time",
    ),
    "seconds_replay": Metric("iteration time in the update's forward and backward passes", "s", "time"),
    "seconds_optimizer": Metric("iteration time in gradient clipping and optimizer steps", "s", "time"),
    "seconds_model": Metric(
        "iteration time in which the denoiser, the VAE or a reward was at work", "s", "time"
    ),
    "seconds_eval": Metric("time of the evaluation after the iteration", "s", "time"),
    "seconds_checkpoint": Metric("time of writing the checkpoint before the iteration", "s", "time"),
    "images_per_second": Metric(
        "the iteration's images divided by its time, training included", "image/s", "speed"
    ),
    "model_calls": Metric("forward calls of the denoiser", "count", "speed"),
    "model_calls_per_second": Metric(
        "forward calls of the denoiser divided by the iteration time", "call/s", "speed"
    ),
    "outside_model_share": Metric(
        "share of the iteration time in which no model was at work: the overhead of the loop", "1", "speed"
    ),
    "peak_memory_bytes": Metric(
        "peak memory so far of torch's tensors on the device, or of the process on a CPU; the largest of all processes",
        "byte",
        "run",
    ),
    "peak_reserved_bytes": Metric(
        "peak memory reserved so far by torch's allocator on a GPU: tensors, the pools of CUDA graphs, and gaps; the "
        "largest of all processes",
        "byte",
        "run",
    ),
    "device_memory_bytes": Metric(
        "memory in use on the GPU now: also the CUDA context, libraries' workspaces and other processes; the largest "
        "of all processes",
        "byte",
        "run",
    ),
}
"""Every name in ``metrics.jsonl`` except those of single rewards, which `describe` recognizes by their prefix."""

_PREFIXES = {
    "reward_": Metric("mean of this reward over the iteration's images", "reward", "reward"),
    "eval_": Metric("mean of this reward over the evaluation's images", "reward", "evaluation"),
}


def describe(name: str) -> Metric:
    """Describes the metric ``name``, which may be ``reward_<name>`` or ``eval_<name>`` of a single reward.

    Raises:
        KeyError: there is no metric of that name.
    """
    if name in METRICS:
        return METRICS[name]
    for prefix, metric in _PREFIXES.items():
        if name.startswith(prefix) and name != prefix:
            return metric
    raise KeyError(f"no metric is called {name!r}")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Reads a ``metrics.jsonl``: one dict per line, and none if there is no file.

    A half-written last line is skipped: the process was killed, or is writing now.

    Raises:
        LoopfastError: a line before the last is not a JSON object; the message names it.
    """
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    result = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError:
            if number == len(lines):  # no newline after it
                break
            raise LoopfastError(f"{path} is damaged: line {number} is not JSON") from None
        if not isinstance(entry, dict) or not isinstance(entry.get("iteration"), int):
            raise LoopfastError(f"{path} is damaged: line {number} is not an object with an iteration")
        result.append(entry)
    return result


class Tracker:
    """Writes a run's metrics and images.

    A failure to write ``metrics.jsonl`` is an error. Any other tracker that fails during a run is dropped, with a
    warning.

    Args:
        directory: the run's folder, which is created if it does not exist.
        trackers: any of ``tensorboard`` and ``wandb``, besides ``metrics.jsonl``.
        resume_at: the number of complete iterations to continue from. Records of later iterations are removed. None
            begins a new record and removes an old one.
        warn: called with a line for each tracker that is dropped.

    Raises:
        MissingExtraError: a tracker's package is not installed.
        WriteError: the disk is full or cannot be written.
        LoopfastError: the record to continue is damaged, or a tracker of a new run cannot start.
        ValueError: a tracker's name is unknown.
    """

    def __init__(
        self,
        directory: Path,
        trackers: Sequence[str],
        *,
        resume_at: int | None,
        warn: Callable[[str], None] = warnings.warn,
    ) -> None:
        directory = Path(directory)
        for name in trackers:
            if name not in _SINKS:
                raise ValueError(f"trackers: no tracker is called {name!r}; there are {', '.join(_SINKS)}")
        self._path = directory / "metrics.jsonl"
        self._warn = warn
        with writing(self._path.parent, "the metrics "):
            directory.mkdir(parents=True, exist_ok=True)
            lines = [] if resume_at is None else read_metrics(self._path)
            kept = [line for line in lines if line["iteration"] <= (resume_at or 0)]
            write_file(self._path, "".join(json.dumps(line) + "\n" for line in kept).encode())
            self._file = self._path.open("a", encoding="utf-8")
        self._sinks: dict[str, _Sink] = {}
        for name in trackers:
            try:
                self._sinks[name] = _SINKS[name](directory, resume_at)
            except LoopfastError:
                raise
            except Exception as error:
                problem = f"the tracker {name!r} cannot start: {_described(error)}"
                if resume_at is None:
                    raise LoopfastError(f"{problem}; without it in run.trackers the run can start") from error
                self._warn(f"{problem}; the run goes on without it")

    def record(self, metrics: Mapping[str, Any]) -> None:
        """Records one iteration.

        The metrics are numbers, or tensors of one element, by the names of `METRICS`. ``iteration`` is required; a
        value of None is skipped.

        Raises:
            KeyError: a name is not in `METRICS`, or ``iteration`` is missing.
            WriteError: the disk is full or cannot be written.
        """
        numbers = {name: _number(value) for name, value in metrics.items() if value is not None}
        iteration = int(metrics["iteration"])
        titled = {f"{describe(name).section}/{name}": value for name, value in numbers.items()}
        finite = {name: value for name, value in titled.items() if value is not None}
        del finite["run/iteration"]
        with writing(self._path.parent, "the metrics "):
            self._file.write(json.dumps(numbers) + "\n")
            self._file.flush()
        self._each(lambda sink: sink.scalars(iteration, finite))

    def image(self, tag: str, iteration: int, image: Image.Image) -> None:
        """Shows an image in every tracker but ``metrics.jsonl``, which holds numbers only."""
        self._each(lambda sink: sink.image(tag, iteration, image))

    def close(self) -> None:
        """Writes what is buffered and ends the record.

        Raises:
            WriteError: the disk is full or cannot be written.
        """
        try:
            with writing(self._path.parent, "the metrics "):
                self._file.close()
        finally:
            self._each(lambda sink: sink.close())
            self._sinks = {}

    def _each(self, use: Callable[[_Sink], None]) -> None:
        """Applies a function to every tracker, and drops those that fail."""
        for name, sink in list(self._sinks.items()):
            try:
                use(sink)
            except Exception as error:
                del self._sinks[name]
                self._warn(
                    f"the tracker {name!r} has failed: {_described(error)}; the run goes on without it"
                )


def _described(error: Exception) -> str:
    """Returns an error in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}: {first_line(error)}" if str(error).strip() else type(error).__name__


class _TensorBoard:
    def __init__(self, directory: Path, resume_at: int | None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtraError("the tracker 'tensorboard'", "train", error.name) from error
        _quiet_tensorboards_thread()
        purge = None if resume_at is None else resume_at + 1
        self._writer = SummaryWriter(str(directory / "tensorboard"), purge_step=purge)

    def scalars(self, iteration: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, iteration)
        self._writer.flush()

    def image(self, tag: str, iteration: int, image: Image.Image) -> None:
        import numpy as np

        self._writer.add_image(tag, np.asarray(image.convert("RGB")), iteration, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


@functools.cache
def _quiet_tensorboards_thread() -> None:
    """Hides the traceback of TensorBoard's writing thread: the next call raises the same error."""
    show = threading.excepthook

    def hook(arguments: threading.ExceptHookArgs) -> None:
        if not type(arguments.thread).__module__.startswith("tensorboard."):
            show(arguments)

    threading.excepthook = hook


class _WandB:
    def __init__(self, directory: Path, resume_at: int | None) -> None:
        try:
            import wandb
        except ImportError as error:
            raise MissingExtraError("the tracker 'wandb'", "wandb", error.name) from error
        self._wandb = wandb
        marker = directory / "wandb-run-id"
        resumed = resume_at is not None and marker.exists()
        known = marker.read_text(encoding="utf-8") if resumed else None
        self._run = self._wandb.init(
            project="loopfast", name=directory.name, dir=str(directory), id=known, resume="allow"
        )
        self._run.define_metric("*", step_metric="iteration")
        marker.write_text(self._run.id, encoding="utf-8")

    def scalars(self, iteration: int, values: Mapping[str, float]) -> None:
        self._run.log({"iteration": iteration, **values})

    def image(self, tag: str, iteration: int, image: Image.Image) -> None:
        self._run.log({"iteration": iteration, tag: self._wandb.Image(image)})

    def close(self) -> None:
        self._run.finish()


_Sink = _TensorBoard | _WandB
_SINKS: dict[str, type[_Sink]] = {"tensorboard": _TensorBoard, "wandb": _WandB}


def _number(value: Any) -> float | int | None:
    number = value if isinstance(value, (int, float)) else value.item()
    return number if math.isfinite(number) else None
