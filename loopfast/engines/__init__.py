"""Engines own the trained weights and the optimizer."""

from loopfast.engines.local import LocalEngine

__all__ = ["LocalEngine"]
