"""The program, and the options before its commands."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from loopfast.errors import Interrupted
from loopfast.version import __version__

__all__ = ["app", "config_app"]


class _Commands(TyperGroup):
    """The group of commands. Ctrl-C ends them with the exit code that shells expect; training saves first."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Interrupted("interrupted") from None


_EXAMPLES = """
**Examples**

* `loopfast train --config tiny`

* `loopfast train --config tiny --set run.seed=1 --set run.name=tiny-1`

* `loopfast train --config runs/tiny/config.yaml --resume auto`

* `loopfast sample runs/tiny "a red circle and a blue square"`

* `loopfast config show tiny > mine.yaml`
"""

app = typer.Typer(
    cls=_Commands,
    help="Reinforcement learning for diffusion models: LOOP, PPO and their relatives.",
    epilog=_EXAMPLES,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
config_app = typer.Typer(
    help="Print, check and document configurations.", no_args_is_help=True, rich_markup_mode="markdown"
)
app.add_typer(config_app, name="config")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"loopfast {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    # the launcher `deepspeed` adds this option before a program's arguments; the environment has the same number
    local_rank: Annotated[int | None, typer.Option("--local_rank", "--local-rank", hidden=True)] = None,
) -> None:
    """Reads the options before the command."""
