"""The competitors: the same functions in `ours`, `eager` and `trl`, and ``torch.compile`` of `eager`."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from ..cases import OPS, Inputs, device

# Inductor's own random numbers are ten times slower than torch's on a CPU (they have no vector code) and fast
# on a GPU. So the compiled function is fastest with torch's on a CPU and with its own on a GPU.
_COMPILE_OPTIONS = {"cpu": {"fallback_random": True}, "cuda": {}}

Run = Callable[[Inputs], tuple[Tensor, ...]]


class MissingCompetitorError(Exception):
    """A competitor is not installed here, or has no such op."""


def runner(op: str, competitor: str) -> Run:
    """Returns the function to time: a call of a competitor's function, with its gradients if they belong to the op.

    Args:
        op: a key of `OPS`.
        competitor: one of `COMPETITORS`.

    Returns:
        A function of the inputs; it returns the op's results, then the gradients of the model outputs.

    Raises:
        MissingCompetitorError: the competitor cannot take part.
    """
    name, arguments, backward = OPS[op].function, OPS[op].arguments, OPS[op].backward
    module = importlib.import_module(f".{'eager' if competitor == 'compile' else competitor}", __package__)
    function = getattr(module, name, None)
    if function is None:
        raise MissingCompetitorError(f"{competitor} has no {name}")
    if competitor == "compile":
        torch.compiler.reset()  # or else earlier shapes count against the limit of recompilations
        function = torch.compile(
            function, fullgraph=True, dynamic=False, options=_COMPILE_OPTIONS[device().type]
        )

    def run(inputs: Inputs) -> tuple[Tensor, ...]:
        if not backward:
            with torch.no_grad():
                result = function(*arguments(inputs))
            return result if isinstance(result, tuple) else (result,)
        result = function(*arguments(inputs))
        outputs = (inputs.model_output, inputs.uncond_output)[: 1 + OPS[op].guided]
        return result.detach(), *torch.autograd.grad(
            result, outputs, inputs.advantage if result.dim() else None
        )

    return run
