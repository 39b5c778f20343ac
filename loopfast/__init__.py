"""Reinforcement learning for diffusion models: LOOP, PPO, RLOO, REINFORCE and GRPO in one small trainer.

Importing the package imports nothing else. `loopfast.schedules` needs torch; training and the command line
need the extra ``train`` (``pip install 'loopfast[train]'``).
"""

from loopfast.version import __version__

__all__ = ["__version__"]
