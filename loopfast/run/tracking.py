"""The record of a run: ``metrics.jsonl``, TensorBoard and, if asked for, Weights & Biases.

``metrics.jsonl`` is the run's own record and is always written: one JSON object an iteration, flushed as it
is written, with the names of `METRICS` and nothing else. The first object, iteration 0, holds the evaluation
before any training. A number that is not finite is written as null, so that every line is plain JSON.
"""

from __future__ import annotations

import functools
import json
import math
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from loopfast.errors import LoopfastError, MissingExtraError, WriteError, first_line
from loopfast.system.files import write_file

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["METRICS", "Metric", "Tracker", "describe", "read_metrics"]


class Metric(NamedTuple):
    """What a number in ``metrics.jsonl`` means, its unit, and the section that trackers show it under."""

    description: str
    unit: str
    section: str


METRICS: dict[str, Metric] = {
    "iteration": Metric("complete iterations; 0 is before any training", "count", "run"),
    "images": Metric("images sampled for training so far", "count", "run"),
    "seconds": Metric("time since the run began, evaluation and earlier sessions included", "s", "time"),
    "reward_mean": Metric(
        "mean over the iteration's images of the total reward, as evaluations work it out", "reward", "reward"
    ),
    "reward_std": Metric(
        "standard deviation over the iteration's images of the total reward", "reward", "reward"
    ),
    "group_spread": Metric(
        "standard deviation among one prompt's images, mean over prompts", "reward", "reward"
    ),
    "dropped_groups": Metric(
        "prompts left out of the iteration, as a reward gave no finite score for an image of theirs; only with "
        "rollout.on_bad_reward: drop_group",
        "count",
        "reward",
    ),
    "eval_dropped_images": Metric(
        "images left out of the evaluation, as a reward gave no finite score for them; likewise",
        "count",
        "evaluation",
    ),
    "eval_reward": Metric("mean over the evaluation's images of the total reward", "reward", "evaluation"),
    "ratio_max_deviation": Metric("max |ratio - 1| over the first update's pairs, before it", "1", "policy"),
    "on_policy_outside_clip": Metric(
        "share of the first update's pairs whose ratio is outside the clip range before it", "1", "policy"
    ),
    "ratio_outside_clip": Metric("share of pairs whose ratio is outside the clip range", "1", "policy"),
    "clip_fraction": Metric("share of pairs that the clip leaves without a gradient", "1", "policy"),
    "zero_gradient": Metric(
        "share of pairs without a gradient: clipped, or of advantage 0, where no divergence is penalized",
        "1",
        "policy",
    ),
    "kl": Metric(
        "estimate of the divergence from the policy that sampled: mean of ratio - 1 - log ratio",
        "nat",
        "policy",
    ),
    "kl_reference": Metric(
        "mean divergence of the transitions from those of the model before training, where it is penalized",
        "nat",
        "policy",
    ),
    "logprob_change": Metric("mean |log-probability - the one at sampling| over the pairs", "nat", "policy"),
    "loss": Metric("mean loss over the iteration's updates", "1", "optimization"),
    "screened_out": Metric(
        "share of pairs whose backward pass was left out, as they have no gradient", "1", "optimization"
    ),
    "grad_norm": Metric("mean norm of the gradient over the updates, before clipping", "1", "optimization"),
    "learning_rate": Metric("learning rate of the last update", "1", "optimization"),
    "overflows": Metric(
        "how often a gradient overflowed float16, after which its update was repeated with half of the loss scale; "
        "only with model.dtype: float16",
        "count",
        "optimization",
    ),
    "seconds_iteration": Metric(
        "time the iteration took, evaluation and checkpoint not included", "s", "time"
    ),
    "seconds_rollout": Metric("time of it spent sampling", "s", "time"),
    "seconds_reward": Metric(
        "time of it spent decoding and scoring images, as far as sampling did not go on meanwhile",
        "s",
        "time",
    ),
    "seconds_replay": Metric("time of it spent replaying trajectories, forward and backward", "s", "time"),
    "seconds_optimizer": Metric("time of it spent clipping gradients and updating weights", "s", "time"),
    "seconds_model": Metric(
        "time of it in which the denoiser, the autoencoder or a reward was at work", "s", "time"
    ),
    "seconds_eval": Metric("time spent evaluating after the iteration", "s", "time"),
    "seconds_checkpoint": Metric("time spent writing the checkpoint before the iteration", "s", "time"),
    "images_per_second": Metric(
        "images of the iteration by its time, training on them included", "image/s", "speed"
    ),
    "model_calls": Metric("forward calls of the denoiser in the iteration", "count", "speed"),
    "model_calls_per_second": Metric("those calls by the iteration's time", "call/s", "speed"),
    "outside_model_share": Metric(
        "share of the iteration's time in which no model was at work: what the loop itself costs",
        "1",
        "speed",
    ),
    "peak_memory_bytes": Metric(
        "most memory held so far: by torch's tensors on the device, or on a CPU by the process; of all processes the "
        "largest, as with the two below",
        "byte",
        "run",
    ),
    "peak_reserved_bytes": Metric(
        "most memory that torch's allocator has reserved so far, on a GPU: tensors, the graphs' pools, and gaps",
        "byte",
        "run",
    ),
    "device_memory_bytes": Metric(
        "memory taken from the GPU at the time of the record: all of it, also the CUDA context, libraries' workspaces "
        "and what other processes hold",
        "byte",
        "run",
    ),
}
"""Every name of ``metrics.jsonl`` but those of single rewards, which `describe` knows by their prefix."""

_PREFIXES = {
    "reward_": Metric("mean over the iteration's images of the reward of that name", "reward", "reward"),
    "eval_": Metric("mean over the evaluation's images of the reward of that name", "reward", "evaluation"),
}


def describe(name: str) -> Metric:
    """What the metric ``name`` is, ``reward_<name>`` and ``eval_<name>`` of single rewards included.

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
    """Read a ``metrics.jsonl``.

    A last line that is half written, because the process was killed or is writing now, is left out.

    Returns:
        One dict a line, in the order of the file. Empty when there is no file.

    Raises:
        LoopfastError: a line other than the last is not a JSON object; the message says which.
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
            if number == len(lines):  # what follows the last newline
                break
            raise LoopfastError(f"{path} is damaged: line {number} is not JSON") from None
        if not isinstance(entry, dict) or not isinstance(entry.get("iteration"), int):
            raise LoopfastError(f"{path} is damaged: line {number} is not an object with an iteration")
        result.append(entry)
    return result


class Tracker:
    """Writes a run's metrics and images.

    ``metrics.jsonl`` has to be written. Another tracker that fails in the middle of a run is left out from then on,
    with a warning.

    Args:
        directory: the run's folder; created if need be.
        trackers: any of ``tensorboard`` and ``wandb``, besides ``metrics.jsonl``.
        resume_at: the number of complete iterations the run goes on from: what was recorded for later ones is
            removed. None begins a new record in place of any that was there.
        warn: called with a line for each tracker that is left out.

    Raises:
        MissingExtraError: a tracker's package is not installed.
        WriteError: the disk is full or cannot be written.
        LoopfastError: the record to go on from is damaged, or a tracker of a new run cannot start.
        ValueError: a tracker's name is not known.
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
        with self._writing():
            directory.mkdir(parents=True, exist_ok=True)
            kept = []
            if resume_at is not None:
                kept = [line for line in read_metrics(self._path) if line["iteration"] <= resume_at]
            write_file(self._path, "".join(json.dumps(line) + "\n" for line in kept).encode())
            self._file = self._path.open("a", encoding="utf-8")
        self._sinks: dict[str, _Sink] = {}
        for name in trackers:
            self._start(name, directory, resume_at)

    def record(self, metrics: Mapping[str, Any]) -> None:
        """Record one iteration.

        Args:
            metrics: numbers, or tensors of one element, by the names of `METRICS`; None is left out.
                ``iteration`` must be there.

        Raises:
            KeyError: a name is not documented in `METRICS`, or ``iteration`` is missing.
            WriteError: the disk is full or cannot be written.
        """
        numbers = {name: _number(value) for name, value in metrics.items() if value is not None}
        iteration = int(metrics["iteration"])
        for name in numbers:
            describe(name)
        finite = {name: value for name, value in numbers.items() if value is not None and name != "iteration"}
        with self._writing():
            self._file.write(json.dumps(numbers) + "\n")
            self._file.flush()
        self._each(lambda sink: sink.scalars(iteration, finite))

    def image(self, tag: str, iteration: int, image: Image.Image) -> None:
        """Show an image in the trackers that can; ``metrics.jsonl`` holds numbers only."""
        self._each(lambda sink: sink.image(tag, iteration, image))

    def close(self) -> None:
        """Write out what is buffered. Nothing can be recorded after that.

        Raises:
            WriteError: the disk is full or cannot be written.
        """
        try:
            with self._writing():
                self._file.close()
        finally:
            self._each(lambda sink: sink.close())
            self._sinks = {}

    def _start(self, name: str, directory: Path, resume_at: int | None) -> None:
        """Adds a tracker. A new run needs all of them; one that goes on rather loses one than its time."""
        try:
            self._sinks[name] = _SINKS[name](directory, resume_at)
        except LoopfastError:
            raise
        except Exception as error:
            problem = f"the tracker {name!r} cannot start: {_described(error)}"
            if resume_at is None:
                raise LoopfastError(f"{problem}; without it in run.trackers the run can start") from error
            self._warn(f"{problem}; the run goes on without it")

    def _each(self, use: Callable[[_Sink], None]) -> None:
        """Uses every tracker but those that fail, which are left out from now on."""
        for name, sink in list(self._sinks.items()):
            try:
                use(sink)
            except Exception as error:
                del self._sinks[name]
                self._warn(
                    f"the tracker {name!r} has failed: {_described(error)}; the run goes on without it"
                )

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            folder = self._path.parent
            raise WriteError(f"cannot write the metrics in {folder}: {error.strerror or error}") from error


def _described(error: Exception) -> str:
    """What went wrong, in a line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}: {first_line(error)}" if str(error).strip() else type(error).__name__


class _Sink(Protocol):
    def __init__(self, directory: Path, resume_at: int | None) -> None: ...
    def scalars(self, iteration: int, values: Mapping[str, float]) -> None: ...
    def image(self, tag: str, iteration: int, image: Image.Image) -> None: ...
    def close(self) -> None: ...


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
            self._writer.add_scalar(f"{describe(name).section}/{name}", value, iteration)
        self._writer.flush()

    def image(self, tag: str, iteration: int, image: Image.Image) -> None:
        import numpy as np

        self._writer.add_image(tag, np.asarray(image.convert("RGB")), iteration, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


@functools.cache
def _quiet_tensorboards_thread() -> None:
    """Its error comes to us with the next call; the thread would print a traceback as well."""
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
        known = None
        if resume_at is not None and marker.exists():
            known = marker.read_text(encoding="utf-8")
        self._run = self._wandb.init(
            project="loopfast", name=directory.name, dir=str(directory), id=known, resume="allow"
        )
        self._run.define_metric("*", step_metric="iteration")
        marker.write_text(self._run.id, encoding="utf-8")

    def scalars(self, iteration: int, values: Mapping[str, float]) -> None:
        named = {f"{describe(name).section}/{name}": value for name, value in values.items()}
        self._run.log({"iteration": iteration, **named})

    def image(self, tag: str, iteration: int, image: Image.Image) -> None:
        self._run.log({"iteration": iteration, tag: self._wandb.Image(image)})

    def close(self) -> None:
        self._run.finish()


_SINKS: dict[str, type[_Sink]] = {"tensorboard": _TensorBoard, "wandb": _WandB}


def _number(value: Any) -> float | int | None:
    number = value if isinstance(value, (int, float)) else value.item()
    return number if math.isfinite(number) else None
