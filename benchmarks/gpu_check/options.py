"""The options that every stage with a module of its own takes."""

from __future__ import annotations

import argparse
from typing import NamedTuple

import torch


class Options(NamedTuple):
    """Where a stage measures, and whether at full size."""

    device: torch.device
    small: bool


def parse(description: str | None, *flags: str) -> Options | argparse.Namespace:
    """Read the command line; further flags are those of the stage."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--small", action="store_true")
    for flag in flags:
        parser.add_argument(flag, action="store_true")
    return parser.parse_args()
