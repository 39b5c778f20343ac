"""What several commands share: options, and steps before the work."""

from __future__ import annotations

import os
import sys
import warnings
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from loopfast.config import Config

ConfigOption = Annotated[
    str,
    typer.Option(
        "--config", "-c", metavar="NAME|FILE", help="A recipe's name, such as tiny, or a YAML file."
    ),
]
ConfigArgument = Annotated[
    str, typer.Argument(metavar="NAME|FILE", help="A recipe's name, such as tiny, or a YAML file.")
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


def load(source: str, overrides: list[str] | None) -> Config:
    """The configuration that a command was given."""
    from loopfast.config import load_config

    config = load_config(source, overrides or [])
    if config.model.deterministic:
        # processes of a group start CUDA before the model is loaded
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return config


def quiet_libraries() -> None:
    """Keep the libraries' warnings and loading bars from between our lines, unless asked for by ``-W``."""
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    import torch

    if not torch.cuda.is_available():
        # DeepSpeed, which other libraries import where it is installed, says at length what it found
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
