"""Rewards to leave-one-out advantages."""

from .op import leave_one_out

__all__ = ["leave_one_out"]
