"""The float32 arithmetic of rewards on GPUs."""

from __future__ import annotations

import torch

__all__ = ["set_tf32"]


def set_tf32(tf32: bool) -> None:
    """Makes this process's GPUs multiply and convolve float32 in TF32, or in IEEE float32.

    For processes of rewards alone. In a run the policy's configuration decides for all that computes in its process
    (``model.tf32``), as PyTorch knows no setting for a thread or a model; and PyTorch's default is to convolve in TF32,
    with which a reward would have other scores alone than in a run.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
