"""Finds the device that a configuration names."""

from __future__ import annotations

import torch

from loopfast.errors import ConfigError

CUBLAS_WORKSPACE, CUBLAS_WORKSPACES = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")
"""The variable that makes cuBLAS sum in one order in every stream, and the values that PyTorch accepts."""


def torch_device(name: str, *, key: str = "model.device") -> torch.device:
    """Returns the device that a configuration's ``key`` names.

    Raises:
        ConfigError: this machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"{key}: {name} is not there; this machine has {torch.cuda.device_count()} CUDA device(s)"
        )
    return device
