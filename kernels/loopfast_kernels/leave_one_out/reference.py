"""Leave-one-out advantages in plain torch."""

from __future__ import annotations

from torch import Tensor

from ..reduction import row_sum


def leave_one_out(rewards: Tensor) -> Tensor:
    """Subtracts from each reward the mean of the others of its group.

    Args:
        rewards: ``[..., K]``, ``K >= 2``.

    Returns:
        Advantages, like `rewards`. Equal rewards give exactly 0.
    """
    samples = rewards.shape[-1]
    rows = rewards.reshape(-1, samples)
    # The result does not depend on a common offset; without it nothing is lost to rounding.
    rows = rows - rows[:, :1]
    mean = (row_sum(rows.double()) / samples).to(rows.dtype)
    return ((rows - mean[:, None]) * (samples / (samples - 1))).reshape(rewards.shape)
