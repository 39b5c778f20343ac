"""The training objective with its gradient."""

from .op import LoopLoss, clipped_loss, loop_loss

__all__ = ["LoopLoss", "clipped_loss", "loop_loss"]
