"""Counter-based normal noise; the README of this folder defines it."""

from .reference import philox_4x32, philox_normal

__all__ = ["philox_4x32", "philox_normal"]
