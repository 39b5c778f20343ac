"""The display of a run in a terminal or a log.

A terminal shows a header, a progress bar with the time left and the latest rewards, and a line for each evaluation. A
pipe or a log file gets the same facts as plain lines without control codes, at most one per iteration.
"""

from __future__ import annotations

import io
import time
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

__all__ = ["Display"]


class Display:
    """Writes a run's header, progress, messages and summary to stdout, and its warnings to stderr.

    As a context manager it removes the progress bar at the end, and so does `finish`.

    Args:
        quiet: show nothing but warnings.
        console: used in place of stdout.
        errors: used for warnings in place of stderr.
    """

    def __init__(
        self, quiet: bool = False, *, console: Console | None = None, errors: Console | None = None
    ) -> None:
        self._quiet = quiet
        self._console = console or Console(highlight=False)
        self._errors = errors or Console(stderr=True, highlight=False)
        self._live: Live | None = None
        self._total = 0
        self._completed = 0
        self._resumed_at = 0
        self._began = self._advanced = time.monotonic()
        self._phase = ""
        self._last: dict[str, float] = {}

    @staticmethod
    def silent() -> Display:
        """Returns a display that shows nothing, for a process whose run another process shows."""
        nowhere = Console(file=io.StringIO())
        return Display(quiet=True, console=nowhere, errors=nowhere)

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()

    def header(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Describes the run that starts: a title, then a line for each (name, value)."""
        if self._quiet:
            return
        if self._interactive:
            table = Table.grid(padding=(0, 2))
            table.add_column(style="dim", no_wrap=True)
            table.add_column(overflow="fold")
            for name, value in rows:
                table.add_row(Text(name), Text(value))
            heading = Text(title, style="bold") if title else None
            self._console.print(Panel.fit(table, title=heading, title_align="left", border_style="dim"))
            return
        if title:
            self.message(title)
        width = max((len(name) for name, _ in rows), default=0)
        for name, value in rows:
            self.message(f"  {name:<{width}}  {value}")

    def start(self, total_iterations: int, completed: int = 0) -> None:
        """Begins to show progress.

        Args:
            total_iterations: the number of iterations of the whole run.
            completed: the number of iterations that a resumed run has done before.
        """
        self._total, self._completed, self._resumed_at = total_iterations, completed, completed
        self._began = self._advanced = time.monotonic()
        if self._interactive and not self._quiet:
            self._live = Live(
                console=self._console,
                get_renderable=self._progress,
                refresh_per_second=4,
                transient=True,
                redirect_stderr=self._errors.is_terminal,
            )
            self._live.start()

    def phase(self, name: str) -> None:
        """Shows the run's current phase beside the bar: rollout, reward, replay, evaluation or checkpoint."""
        self._phase = name

    def advance(self, metrics: Mapping[str, Any]) -> None:
        """Reports an iteration: its numbers by the names of `loopfast.run.tracking.METRICS`, with ``iteration``."""
        self._note(metrics)
        if self._live is None or metrics.get("eval_reward") is not None:
            self.message(self._summary(metrics))

    def image(self, image: Image.Image) -> None:
        """Shows the images of an evaluation, if the display can."""

    def message(self, text: str) -> None:
        """Shows a message on its own line."""
        if not self._quiet:
            self._console.print(Text(text), soft_wrap=True)

    def warning(self, text: str) -> None:
        """Shows a warning on stderr, in quiet runs too."""
        # If both are one terminal, the line has to go above the bar, which would be drawn over it.
        console = self._console if self._live and self._errors.is_terminal else self._errors
        console.print(Text.assemble(("warning: ", "bold yellow"), text), soft_wrap=True)

    def finish(self, rows: Sequence[tuple[str, str]]) -> None:
        """Ends the progress and shows a summary: a line for each (name, value)."""
        self._stop()
        self.header("", rows)

    def _note(self, metrics: Mapping[str, Any]) -> None:
        """Stores the number of complete iterations and the latest rewards."""
        iteration = int(metrics["iteration"])
        if iteration > self._completed:
            self._completed = iteration
            self._advanced = time.monotonic()
        for name in ("reward_mean", "reward_std", "eval_reward"):
            if metrics.get(name) is not None:
                self._last[name] = float(metrics[name])

    def _summary(self, metrics: Mapping[str, Any]) -> str:
        """Describes an iteration in one line."""
        width = len(str(self._total))
        parts = [f"iteration {int(metrics['iteration']):{width}d}/{self._total}"]
        if metrics.get("reward_mean") is not None:
            parts.append(f"reward {_spread(metrics)}")
        if metrics.get("eval_reward") is not None:
            parts.append(f"held-out {float(metrics['eval_reward']):.3f}")
        if self._live is None and (left := self._seconds_left()) is not None:
            parts.append(f"{clock(left)} left")
        return "  ".join(parts)

    @property
    def _interactive(self) -> bool:
        return self._console.is_terminal and not self._console.is_dumb_terminal

    def _progress(self) -> RenderableType:
        left = self._seconds_left()
        elapsed = time.monotonic() - self._began
        bar = Table.grid(padding=(0, 2), expand=True)
        bar.add_column(no_wrap=True)
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True, justify="right")
        bar.add_row(
            Text(f"{self._completed}/{self._total}", style="bold"),
            ProgressBar(total=max(self._total, 1), completed=self._completed, complete_style="cyan"),
            Text(f"{clock(elapsed)} so far" if left is None else f"{clock(left)} left"),
        )
        status = Text(no_wrap=True, overflow="ellipsis")
        status.append(f"{self._phase or 'starting':<10}", style="cyan")
        if "reward_mean" in self._last:
            status.append("  reward ", style="dim").append(_spread(self._last))
        if "eval_reward" in self._last:
            status.append("  held-out ", style="dim").append(f"{self._last['eval_reward']:.3f}", style="bold")
        return Group(bar, status)

    def _seconds_left(self) -> float | None:
        done = self._completed - self._resumed_at
        if done <= 0:
            return None
        each = (self._advanced - self._began) / done
        since = time.monotonic() - self._advanced
        return max(0.0, each * (self._total - self._completed) - since)

    def _stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def _spread(metrics: Mapping[str, Any]) -> str:
    mean = f"{float(metrics['reward_mean']):.3f}"
    std = metrics.get("reward_std")
    return mean if std is None else f"{mean} ± {float(std):.3f}"


def clock(seconds: float, *, hours: bool = False) -> str:
    """A duration as ``minutes:seconds``, with the hours in front if there are any, or always with ``hours``."""
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02d}:{second:02d}" if hour or hours else f"{minute}:{second:02d}"
