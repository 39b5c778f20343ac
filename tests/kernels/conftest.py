from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from loopfast_kernels import BACKENDS, backend
from loopfast_kernels.backends import triton_interprets


@dataclass(frozen=True)
class Transition:
    """Arguments of the ops for N rows, each at some step of a table of T."""

    model_output: Tensor
    uncond_output: Tensor
    reference_output: Tensor
    sample: Tensor
    prev_sample: Tensor
    table: Tensor
    step: Tensor
    seed: Tensor

    def rows(self, index: Tensor | slice) -> Transition:
        """Returns some of the rows, in their own storage."""
        taken = {
            name: getattr(self, name)[index].clone() for name in self.__dataclass_fields__ if name != "table"
        }
        return replace(self, **taken)

    def to(self, device: torch.device | str | torch.dtype) -> Transition:
        """Returns a copy on another device, or in float64, which is the exact case for the rounded one."""
        moved = {}
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            as_is = isinstance(device, torch.dtype) and not value.is_floating_point()
            moved[name] = value if as_is else value.to(device)
        return replace(self, **moved)


@dataclass(frozen=True)
class Backend:
    """A backend and the device it is tested on."""

    name: str
    device: str

    @property
    def interpreted(self) -> bool:
        """True if programs run one after another in Python, so that tests must use only a few."""
        return self.name == "triton" and self.device == "cpu"

    def active(self) -> AbstractContextManager[None]:
        return backend(self.name)

    def skip_unless_it_takes(self, dtype: torch.dtype) -> None:
        if self.interpreted and dtype == torch.bfloat16:
            pytest.skip("Triton's interpreter does not round bfloat16 to nearest")


@pytest.fixture(scope="session", params=BACKENDS)
def each_backend(request: pytest.FixtureRequest) -> Backend:
    on_gpu = request.param == "triton" and torch.cuda.is_available()
    return Backend(request.param, "cuda" if on_gpu else "cpu")


def once(function: Callable[..., Any], key: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that is called once for each key of its arguments."""
    kept: dict[Any, Any] = {}

    def call(*arguments: Any) -> Any:
        name = key(*arguments)
        if name not in kept:
            kept[name] = function(*arguments)
        return kept[name]

    return call


@pytest.fixture(scope="session", autouse=True)
def _interpreter_is_quick() -> None:
    """Makes Triton's interpreter faster.

    It searches its language at every call, makes types again at every operation, and detects overflows that it does not
    report: two thirds of these tests' time.
    """
    if not triton_interprets() or find_spec("triton") is None:
        return
    from triton.language import core
    from triton.runtime import interpreter

    interpreter._LangPatchScope.restore = lambda scope: None
    interpreter._patch_lang = once(interpreter._patch_lang, lambda function: id(function.__globals__))
    interpreter._get_np_dtype = once(interpreter._get_np_dtype, lambda of: of.name)
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
    core.block_type.to_ir = lambda of, builder: of
    core.block_type.with_element_ty = once(core.block_type.with_element_ty, lambda of, to: (of.name, to.name))
    make = core.tensor.__init__

    def make_quickly(value: Any, handle: Any, of: Any) -> None:
        if "parts" in vars(of):
            value.handle, value.type = handle, of
            value.shape, value.numel, value.dtype = of.parts
        else:
            make(value, handle, of)
            of.parts = value.shape, value.numel, value.dtype

    core.tensor.__init__ = make_quickly


@pytest.fixture
def tile(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """``tile(height, width)`` sets how long rows are cut when programs are interpreted one after another.

    A GPU's tiles, which `test_gpu` tests, would make too many programs for the interpreter.
    """

    def cut(height: int, width: int) -> None:
        if triton_interprets() and find_spec("triton") is not None:
            from loopfast_kernels import triton_common

            monkeypatch.setattr(triton_common, "_TILE", {2**63: (height, width, 8)})

    return cut


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fills every tensor that is allocated and not written with NaN."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


MakeTransition = Callable[..., Transition]


@pytest.fixture(scope="session")
def make_transition() -> MakeTransition:
    def make(
        rows: int = 5,
        shape: tuple[int, ...] = (4, 3, 3),
        steps: int = 4,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> Transition:
        generator = torch.Generator().manual_seed(seed)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, dtype=torch.float64)

        table = torch.stack((1 + 0.1 * normal(steps), normal(steps), 0.3 + normal(steps).abs()), dim=1)
        step = torch.randint(steps, (rows,), generator=generator)
        output, uncond, sample = normal(rows, *shape), normal(rows, *shape), normal(rows, *shape)
        a, b, sigma = (column.reshape(-1, *(1 for _ in shape)) for column in table[step].unbind(1))
        # Near the transition's mean, so that ratios between slightly different outputs stay moderate.
        prev = a * sample + b * output + sigma * normal(rows, *shape)
        return Transition(
            model_output=output.to(dtype),
            uncond_output=uncond.to(dtype),
            reference_output=(output + 0.3 * normal(rows, *shape)).to(dtype),
            sample=sample.to(dtype),
            prev_sample=prev.to(dtype),
            table=table if dtype == torch.float64 else table.to(torch.float32),
            step=step,
            seed=torch.randint(-(2**62), 2**62, (rows,), generator=generator),
        )

    return make


@pytest.fixture
def transition(make_transition: MakeTransition) -> Transition:
    return make_transition()
