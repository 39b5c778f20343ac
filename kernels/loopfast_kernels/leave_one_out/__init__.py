"""Leave-one-out advantages from rewards."""

from .op import leave_one_out

__all__ = ["leave_one_out"]
