"""Keeps libraries quiet during a run, and restores the process's settings after it."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from operator import setitem
from typing import Any

VERBOSITY = {"diffusers": "DIFFUSERS_VERBOSITY", "transformers": "TRANSFORMERS_VERBOSITY"}


def quiet_libraries() -> None:
    """Hides the libraries' warnings and loading bars. Python's option ``-W`` keeps the warnings."""
    for variable in VERBOSITY.values():
        os.environ.setdefault(variable, "error")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    import torch

    if not torch.cuda.is_available():
        # other libraries import DeepSpeed if it is installed, and it prints at length which accelerator it found
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for library, variable in VERBOSITY.items():
        log = import_module(f"{library}.utils.logging")
        log.disable_progress_bar()
        if os.environ[variable] == "error":  # the library reads the variable only when it is imported
            log.set_verbosity_error()


@contextmanager
def undisturbed() -> Iterator[None]:
    """Context in which libraries are quiet. At its end the process has its earlier settings again.

    These are the environment variables, ``sys.path``, the warning filters, the verbosity and loading bars of diffusers
    and transformers, the root logger, and PyTorch's arithmetic (TF32, determinism).
    """
    with ExitStack() as after:
        after.enter_context(warnings.catch_warnings())
        after.callback(_restore_environment, dict(os.environ))
        root = logging.getLogger()
        after.callback(root.setLevel, root.level)
        lists: tuple[list[Any], ...] = (root.handlers, sys.path)
        for settings in lists:
            after.callback(setitem, settings, slice(None), list(settings))
        for library, variable in VERBOSITY.items():
            if f"{library}.utils.logging" in sys.modules:
                log = sys.modules[f"{library}.utils.logging"]
                after.callback(_set_verbosity, library, log.get_verbosity(), log.is_progress_bar_enabled())
            elif variable not in os.environ:
                # the library's defaults, as if the user imported it
                after.callback(_set_verbosity, library, logging.WARNING, True)
        _keep_arithmetic(after)
        quiet_libraries()
        yield


def _set_verbosity(library: str, level: int, loading_bars: bool) -> None:
    log = import_module(f"{library}.utils.logging")
    log.set_verbosity(level)
    (log.enable_progress_bar if loading_bars else log.disable_progress_bar)()


def _restore_environment(before: dict[str, str]) -> None:
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


def _keep_arithmetic(after: ExitStack) -> None:
    import torch

    matmul, cudnn, deterministic = torch.backends.cuda.matmul, torch.backends.cudnn, torch.utils.deterministic
    settings: list[tuple[Any, str]] = [
        (matmul, "allow_tf32"),
        *((cudnn, name) for name in ("allow_tf32", "deterministic", "benchmark")),
        (deterministic, "fill_uninitialized_memory"),
    ]
    for owner, name in settings:
        after.callback(setattr, owner, name, getattr(owner, name))
    after.callback(
        torch.use_deterministic_algorithms,
        torch.are_deterministic_algorithms_enabled(),
        warn_only=torch.is_deterministic_algorithms_warn_only_enabled(),
    )
