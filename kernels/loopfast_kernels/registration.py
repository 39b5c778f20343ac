"""Registration of opaque operators in torch's namespace ``loopfast``, and the way to them.

To `torch.compile`, fake tensors, `torch.library.opcheck` and the like they are what `torch.library.custom_op` makes.
But through that an operator with a gradient costs 160 us of Python a call (torch 2.13), more than many kernels. So in
plain eager code, where nothing else would see the call, it goes straight to the kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

_LIBRARY = torch.library.Library("loopfast", "FRAGMENT")


def dispatched(tensor: Tensor) -> bool:
    """Whether something but a kernel handles operators on a tensor now.

    A compiler, a subclass such as a fake tensor, a dispatch mode, a function transform, the profiler.
    """
    return (
        torch.compiler.is_compiling()
        or type(tensor) not in (Tensor, Parameter)
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._autograd._profiler_enabled()
    )


class Operator:
    """An operator of torch; calling it calls the kernel as directly as possible.

    Args:
        schema: its name and signature, such as ``"leave_one_out(Tensor rewards) -> Tensor"``; the first argument
            is a tensor.
        kernel: computes it, on any device; it receives every argument by position.
        fake: makes outputs of the right shape, dtype and device without computing them.
        gradient: records it for autograd. Its ``forward`` receives the arguments and computes by
            `below_autograd`.
    """

    def __init__(
        self,
        schema: str,
        kernel: Callable[..., Any],
        fake: Callable[..., Any],
        gradient: type[torch.autograd.Function] | None = None,
    ) -> None:
        name = schema.partition("(")[0]
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"loopfast::{name}", fake, lib=_LIBRARY)
        self._operator: Callable[..., Any] = getattr(torch.ops.loopfast, name).default
        self._kernel = kernel
        self._apply = None if gradient is None else gradient.apply
        if gradient is not None:
            _LIBRARY.impl(name, self._with_gradient, "Autograd")

    def __call__(self, *arguments: Any) -> Any:
        """Compute it, recording its gradient."""
        if dispatched(arguments[0]):
            return self._operator(*arguments)
        return self._with_gradient(*arguments)

    def _with_gradient(self, *arguments: Any) -> Any:
        if self._apply is not None and torch.is_grad_enabled():
            return self._apply(*arguments)
        return self.below_autograd(*arguments)

    def below_autograd(self, *arguments: Any) -> Any:
        """Compute it past its gradient."""
        if not dispatched(arguments[0]):
            return self.directly(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return self._operator(*arguments)

    def directly(self, *arguments: Any) -> Any:
        """Compute it past its gradient, of tensors that are not `dispatched`."""
        with torch._C._AutoDispatchBelowAutograd():
            return self._kernel(*arguments)
