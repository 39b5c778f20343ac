"""Registration of opaque operators in torch's namespace ``loopfast``, and the way to them.

For `torch.compile`, fake tensors, `torch.library.opcheck` and similar tools they are like the operators that
`torch.library.custom_op` makes. But such an operator with a gradient costs 160 us of Python a call (torch 2.13), more
than many kernels. So in plain eager code, where nothing else would see the call, a call goes straight to the kernel.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

_LIBRARY = torch.library.Library("loopfast", "FRAGMENT")

Fields = TypeVar("Fields", bound=NamedTuple)


def dispatched(tensor: Tensor) -> bool:
    """Returns whether something but a kernel handles operators on a tensor now.

    That is a compiler, a subclass such as a fake tensor, a dispatch mode, a function transform or the profiler.
    """
    return (
        torch.compiler.is_compiling()
        or type(tensor) not in (Tensor, Parameter)
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._autograd._profiler_enabled()
    )


def select(kind: type[Fields], arguments: Any) -> Fields:
    """Returns the named arguments that a NamedTuple has fields for."""
    return kind(*[getattr(arguments, name) for name in kind._fields])


class Operator:
    """An operator of torch; calling it calls the kernel as directly as possible.

    Args:
        schema: its name and signature, such as ``"leave_one_out(Tensor rewards) -> Tensor"``; the first argument
            is a tensor.
        kernel: computes it, on any device. It receives one tuple of all arguments, with the names of the schema.
        fake: makes outputs of the right shape, dtype and device without computing them, from the same tuple.
        gradient: records it for autograd. Its class attribute ``operator`` is set to this operator; its ``forward``
            receives the arguments by position and computes by `below_autograd`.

    Attributes:
        named: makes the tuple with the schema's names from all arguments by position.
    """

    def __init__(
        self,
        schema: str,
        kernel: Callable[[Any], Any],
        fake: Callable[[Any], Any],
        gradient: type[torch.autograd.Function] | None = None,
    ) -> None:
        name = schema.partition("(")[0]
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        self._operator: Any = getattr(torch.ops.loopfast, name).default
        parameters = [argument.name for argument in self._operator._schema.arguments]
        self.named: Callable[..., Any] = namedtuple(name, parameters)  # type: ignore[misc]
        self._kernel = kernel
        self._apply: Callable[..., Any] | None = None
        _LIBRARY.impl(name, lambda *arguments: kernel(self.named(*arguments)), "CompositeExplicitAutograd")
        torch.library.register_fake(
            f"loopfast::{name}", lambda *arguments: fake(self.named(*arguments)), lib=_LIBRARY
        )
        if gradient is not None:

            class Recorded(gradient):  # type: ignore[misc, valid-type]
                operator = self

            self._apply = Recorded.apply
            _LIBRARY.impl(name, self._with_gradient, "Autograd")

    def __call__(self, *arguments: Any) -> Any:
        """Computes it and records its gradient."""
        if dispatched(arguments[0]):
            return self._operator(*arguments)
        return self._with_gradient(*arguments)

    def _with_gradient(self, *arguments: Any) -> Any:
        if self._apply is not None and torch.is_grad_enabled():
            return self._apply(*arguments)
        return self.below_autograd(*arguments)

    def below_autograd(self, *arguments: Any) -> Any:
        """Computes it past its gradient."""
        if not dispatched(arguments[0]):
            return self.directly(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return self._operator(*arguments)

    def directly(self, *arguments: Any) -> Any:
        """Computes it past its gradient, for tensors that are not `dispatched`."""
        with torch._C._AutoDispatchBelowAutograd():
            return self._kernel(self.named(*arguments))
