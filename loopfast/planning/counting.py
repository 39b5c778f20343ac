"""Counts the memory and the operations of a computation on the device ``meta``, which computes nothing."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from typing_extensions import override

# Batch sizes to trace with. A prime that divides no dimension of the model distinguishes the tensors that grow with the
# rows from those that do not.
_PRIMES = (13, 17, 19, 23, 29, 31, 37, 41, 43, 47)

_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Trace:
    """The memory and the operations of a computation, as functions of its rows.

    Attributes:
        moments: ``(bytes, bytes per row)`` at the moments that are the peak for some number of rows.
        flops: floating-point operations per row; a multiplication and an addition are two.
    """

    moments: tuple[tuple[int, int], ...]
    flops: int

    def peak(self, rows: int) -> int:
        """Returns the most bytes that are allocated at a time with a number of rows."""
        return max(constant + rows * per_row for constant, per_row in self.moments)


class Recorder(TorchDispatchMode):
    """A mode that follows every allocation and counts the operations of products, convolutions and attention.

    Args:
        rows: the batch size of the computation.
        present: tensors that exist before and after, which are not counted.
    """

    def __init__(self, rows: int, present: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._rows = rows
        self._constant = self._per_row = 0
        self._moments: set[tuple[int, int]] = {(0, 0)}
        self._live: dict[int, Any] = {}
        self.flops = 0
        for tensor in present:
            self._live[tensor.untyped_storage()._cdata] = tensor

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output, flops = _results.of(func, args, kwargs or {})
        self.flops += flops
        grown = False
        for result in output if isinstance(output, list | tuple) else (output,):
            if isinstance(result, Tensor):
                grown = self._add(result) or grown
        if grown:
            self._moments.add(self.held)
        return output

    @classmethod
    @override
    def _should_skip_dynamo(cls) -> bool:
        """Skips torch's check for compilation, which would double the time of a dispatch."""
        return False

    def _add(self, tensor: Tensor) -> bool:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return False
        size = storage.nbytes()
        constant, per_row = (size, 0) if size % self._rows else (0, size // self._rows)
        self._constant += constant
        self._per_row += per_row

        def freed(reference: Any) -> None:
            del self._live[key]
            self._constant -= constant
            self._per_row -= per_row

        self._live[key] = weakref.ref(storage, freed)
        return True

    @property
    def held(self) -> tuple[int, int]:
        """``(bytes, bytes per row)`` that are allocated now."""
        return self._constant, self._per_row

    def trace(self) -> Trace:
        """Returns the counts, without the moments that another one exceeds at every number of rows."""
        moments: list[tuple[int, int]] = []
        for moment in sorted(self._moments, reverse=True):  # by falling constants
            if not moments or moment[1] > moments[-1][1]:
                moments.append(moment)
        return Trace(tuple(moments), self.flops // self._rows)


class _Results:
    """A cache of the results of operators on ``meta``, and of their operations, by their arguments' shapes.

    Torch computes shapes in Python, 50,000 times for a large model, whose blocks repeat the same operators on the same
    shapes.
    """

    def __init__(self) -> None:
        self._known: dict[Any, tuple[Any, int]] = {}

    def of(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, int]:
        """Returns the operator's result, with the shapes, strides and types that it has, and its operations."""
        kind = _kind(func)
        if kind == "in place":
            return args[0], 0
        if kind == "view":
            return func(*args, **kwargs), 0
        key = func, _signature(args), *((name, _signature(value)) for name, value in kwargs.items())
        known = self._known.get(key)
        if known is None:
            output = func(*args, **kwargs)
            flops = _flops(func, args, kwargs, output)
            self._known[key] = _signature(output), flops
            return output, flops
        return _made(known[0]), known[1]


@cache
def _kind(func: Any) -> Literal["pure", "in place", "view"]:
    """Returns whether an operator's result is new tensors, its first argument, or another view of its inputs."""
    arguments, returns = func._schema.arguments, func._schema.returns
    if all(part.alias_info is None for part in (*arguments, *returns)):
        return "pure"
    first, result = (parts[0].alias_info if len(parts) else None for parts in (arguments, returns))
    if first is None or result is None or len(returns) > 1 or torch.Tag.inplace_view in func.tags:
        return "view"
    return "in place" if first.is_write and first.before_set == result.before_set else "view"


def _flops(func: Any, args: Any, kwargs: Any, output: Any) -> int:
    """Returns the operations of a product, a convolution or attention, and 0 for other operators."""
    packet = func._overloadpacket
    if packet is _ATTENTION:
        return int(sdpa_flop_count(*(tensor.shape for tensor in args[:3])))
    if packet is _ATTENTION_BACKWARD:
        return int(sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4])))
    return int(flop_registry[packet](*args, **kwargs, out_val=output)) if packet in flop_registry else 0


def _signature(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _Shape(value.shape, value.stride(), value.dtype)
    if isinstance(value, list | tuple):
        return tuple([_signature(part) for part in value])
    return value


class _Shape(NamedTuple):
    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


def _made(signature: Any) -> Any:
    if isinstance(signature, _Shape):
        return torch.empty_strided(signature.size, signature.stride, dtype=signature.dtype, device="meta")
    return tuple(map(_made, signature)) if isinstance(signature, tuple) else signature


_results = _Results()


class Precision(TorchFunctionMode):
    """A mode that gives tensors on ``meta`` the attention and the autocast of a device.

    On ``meta`` itself attention is decomposed and autocast has no effect. Here attention is the operator that keeps its
    inputs, its output and one float32 number a query and head, as the kernels of CPUs and GPUs do. Under autocast,
    products, convolutions and attention get inputs of its type; on a GPU, normalizations get float32 inputs.

    Args:
        autocast: the type to compute in. None takes that of the tensors.
        on_gpu: whether the device is a GPU, whose autocast has other rules than a CPU's.
    """

    def __init__(self, autocast: torch.dtype | None = None, *, on_gpu: bool = False) -> None:
        super().__init__()
        self._autocast, self._on_gpu = autocast, on_gpu

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._autocast is not None:
            if func in _LOWERED:
                args, kwargs = _cast((args, kwargs), self._autocast)
            elif self._on_gpu and func in _RAISED:
                args, kwargs = _cast((args, kwargs), torch.float32)
        if func is F.scaled_dot_product_attention:
            query, key, value = args[:3] if len(args) >= 3 else (kwargs[n] for n in ("query", "key", "value"))
            mask = kwargs.get("attn_mask", args[3] if len(args) > 3 else None)
            return _ATTENTION(query, key, value, 0.0, False, attn_mask=mask, scale=kwargs.get("scale"))[0]
        return func(*args, **kwargs)


def _cast(values: Any, dtype: torch.dtype) -> Any:
    return tree_map_only(
        Tensor, lambda value: value.to(dtype) if value.is_floating_point() else value, values
    )


_LOWERED = {
    F.linear,
    F.conv2d,
    F.conv_transpose2d,
    F.scaled_dot_product_attention,
    torch.bmm,
    torch.baddbmm,
    torch.matmul,
    Tensor.matmul,
    Tensor.__matmul__,
    Tensor.bmm,
}
_RAISED = {F.group_norm, F.layer_norm, F.softmax, torch.softmax, Tensor.softmax}


def rows_to_trace(model: torch.nn.Module, *sizes: int) -> int:
    """Returns a prime number of rows that divides no dimension of the model's weights and none of ``sizes``."""
    dimensions = {size for parameter in model.parameters() for size in parameter.shape} | set(sizes)
    return next((p for p in _PRIMES if all(size % p for size in dimensions)), 53)
