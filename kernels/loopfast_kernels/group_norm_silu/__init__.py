"""Group normalization and SiLU in one pass over an image."""

from .op import group_norm_silu

__all__ = ["group_norm_silu"]
