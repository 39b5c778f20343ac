"""The float32 arithmetic of rewards on GPUs."""

from __future__ import annotations

import torch

__all__ = ["set_tf32"]


def set_tf32(tf32: bool) -> None:
    """Makes this process's GPUs multiply and convolve float32 in TF32, or in IEEE float32.

    PyTorch's default is to convolve in TF32, so that a reward would have other scores where it is alone in a process
    than beside a model whose configuration decides (``model.tf32``). PyTorch knows no setting for a thread or a model:
    whoever computes rewards calls this once, before.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
