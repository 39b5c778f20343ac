"""Reinforcement learning for diffusion models: LOOP, PPO, RLOO, REINFORCE and GRPO in one small trainer.

``loopfast.train`` trains a model, like the command line; see docs/python.md. It needs the extra ``train``
(``pip install 'loopfast[train]'``). Importing the package imports nothing else.
"""

from typing import TYPE_CHECKING, Any

from loopfast.version import __version__

if TYPE_CHECKING:
    from loopfast.api import Iteration, Prompt, TrainedRun, train

__all__ = ["Iteration", "Prompt", "TrainedRun", "__version__", "train"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from loopfast import api

    return getattr(api, name)
