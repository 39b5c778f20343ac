"""The display of a run in a notebook: one line of progress that is updated, and the images of each evaluation."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image
from rich.console import Console

from loopfast.run.console import Display


def in_notebook() -> bool:
    """Returns whether this process is the kernel of a notebook, such as Jupyter's or Colab's."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and type(shell).__module__.split(".")[0] in ("ipykernel", "google")


_TITLES = {"reward_mean": "reward", "eval_reward": "held-out"}


class NotebookDisplay(Display):
    """A display for notebooks, which prints the header and the summary, and shows the progress in one line.

    Args:
        quiet: show nothing but warnings.
    """

    def __init__(self, quiet: bool = False) -> None:
        # plain text: a notebook would show each line of rich's own output as a block
        plain: dict[str, Any] = {"highlight": False, "force_jupyter": False, "force_terminal": False}
        super().__init__(quiet, console=Console(**plain), errors=Console(stderr=True, **plain))
        self._shown: Any = None

    def advance(self, metrics: Mapping[str, Any]) -> None:  # noqa: D102
        self._note(metrics)
        self._show(self._summary(metrics))

    def phase(self, name: str) -> None:  # noqa: D102
        super().phase(name)
        parts = [f"{self._completed}/{self._total}", name]
        parts += [f"{title} {self._last[key]:.3f}" for key, title in _TITLES.items() if key in self._last]
        self._show("  ".join(parts))

    def image(self, image: Image.Image) -> None:  # noqa: D102
        if not self._quiet:
            _display(image)

    def finish(self, rows: Sequence[tuple[str, str]]) -> None:  # noqa: D102
        self._show(f"{self._completed}/{self._total}  done")
        super().finish(rows)

    def _show(self, text: str) -> None:
        """Replaces the line that was shown before."""
        if self._quiet:
            return
        content = {"text/plain": text}
        if self._shown is None:
            self._shown = _display(content, raw=True, display_id=True)
        else:
            self._shown.update(content, raw=True)


def _display(content: object, **options: Any) -> Any:
    from IPython.display import display

    return display(content, **options)
