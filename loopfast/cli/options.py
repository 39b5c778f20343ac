"""Options and first steps that several commands share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from loopfast.errors import ConfigError, one_line

if TYPE_CHECKING:
    from loopfast.config import Config

_CONFIG_HELP = "A recipe's name, such as tiny, or a YAML file."
# eager, so that the callback of the option finds it
ConfigArgument = Annotated[str | None, typer.Argument(metavar="NAME|FILE", help=_CONFIG_HELP, is_eager=True)]


def _one_config(context: typer.Context, option: str) -> str:
    """Returns the configuration's name, which is the argument or the option."""
    argument = context.params.get("config")
    if argument is not None and option:
        if "=" in argument:
            raise ConfigError(f"found {one_line(argument)!r}, allowed: one KEY=VALUE after each --set")
        raise ConfigError(
            f"the configuration is given twice, as {one_line(argument)!r} and as --config {one_line(option)!r}"
        )
    if argument is None and not option:
        raise typer.BadParameter(
            "give a recipe's name, such as tiny, or a YAML file, with or without --config"
        )
    return option if argument is None else str(argument)


ConfigOption = Annotated[
    str,
    typer.Option(
        "--config",
        "-c",
        metavar="NAME|FILE",
        help="The configuration, as an option.",
        callback=_one_config,
        show_default=False,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        "-s",
        metavar="KEY=VALUE",
        help="Change one key, such as train.learning_rate=1e-4. May be given several times.",
    ),
]
Seed = Annotated[
    int,
    typer.Option(
        "--seed", metavar="N", min=0, help="Seed of the noise; the same seed draws the same images."
    ),
]
Resume = Annotated[
    str | None,
    typer.Option(
        metavar="auto|PATH",
        help="Resume from the checkpoint at PATH, or from the newest undamaged one (auto; a new run if there is none).",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show warnings and errors only.")]


def load(source: str, overrides: list[str] | None) -> Config:
    """Loads the configuration of a command."""
    from loopfast.config import load_config

    return load_config(source, overrides or [])
