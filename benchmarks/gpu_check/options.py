"""The options of every stage that has its own module."""

from __future__ import annotations

import argparse
from typing import NamedTuple

import torch


class Options(NamedTuple):
    """The device that a stage measures, and whether it measures at full size."""

    device: torch.device
    small: bool


def parse(description: str | None, *flags: str) -> Options | argparse.Namespace:
    """Reads the command line; further flags are the stage's own."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--small", action="store_true")
    for flag in flags:
        parser.add_argument(flag, action="store_true")
    return parser.parse_args()
