"""Counter-based normal noise; the README of this folder defines it."""

from .op import philox_normal
from .reference import philox_4x32

__all__ = ["philox_4x32", "philox_normal"]
