"""What several commands share: options, and steps before the work."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from loopfast.errors import ConfigError, one_line

if TYPE_CHECKING:
    from loopfast.config import Config

_CONFIG_HELP = "A recipe's name, such as tiny, or a YAML file."
ConfigArgument = Annotated[str | None, typer.Argument(metavar="NAME|FILE", help=_CONFIG_HELP)]


def _require_config(context: typer.Context, option: str | None) -> str | None:
    """Called for the option, after an argument that is given."""
    if option is None and context.params.get("config") is None:
        raise typer.BadParameter(
            "give a recipe's name, such as tiny, or a YAML file, with or without --config"
        )
    return option


ConfigOption = Annotated[
    str | None,
    typer.Option(
        "--config", "-c", metavar="NAME|FILE", help="The same, as an option.", callback=_require_config
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
    int, typer.Option("--seed", metavar="N", min=0, help="Seed of the noise; the same seed, the same images.")
]
Resume = Annotated[
    str | None,
    typer.Option(
        metavar="auto|PATH",
        help="Go on from a checkpoint: the newest good one (auto; none yet: start), or that at PATH.",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show warnings and errors only.")]


def one_config(argument: str | None, option: str | None) -> str:
    """The configuration's name, which a command takes as an argument or as an option.

    Raises:
        ConfigError: it is given twice.
    """
    if argument is not None and option is not None:
        raise ConfigError(
            f"the configuration is given twice, as {one_line(argument)!r} and as --config {one_line(option)!r}"
        )
    return str(option if argument is None else argument)


def load(source: str, overrides: list[str] | None) -> Config:
    """The configuration that a command was given."""
    from loopfast.config import load_config

    return load_config(source, overrides or [])
