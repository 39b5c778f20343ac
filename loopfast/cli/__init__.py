"""The command line. Heavy imports happen inside the commands, so that help and errors are immediate."""

from __future__ import annotations

from loopfast.cli.app import app

# isort: off
# Each module adds its commands, in the order of the help.
from loopfast.cli import training, results, inspection, rewards, configuration
# isort: on

__all__ = ["app", "configuration", "inspection", "results", "rewards", "training"]
