"""Results live in memory that is used again when they are gone, and never sooner."""

from __future__ import annotations

import ctypes
import gc
import io
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from loopfast_kernels import buffers, denoise_step, group_norm_silu, info, loop_loss, transition_logprob

SHAPE = (16, 64, 64)  # 256 KiB in float32
ROWS, LATENT = 4, (4, 64, 64)  # the same

native = pytest.mark.skipif(info()["cpu"] != "native", reason="the native library is not there")


@pytest.fixture(autouse=True)
def _no_blocks() -> Iterator[None]:
    buffers.clear()
    yield
    buffers.clear()


def new() -> Tensor:
    return buffers.empty(SHAPE, torch.float32)


def held() -> int:
    return sum(block.size for block in buffers._blocks)


class Losses:
    """Losses of the same inputs, for different rewards."""

    def __init__(self) -> None:
        self.output, self.uncond, self.sample, self.prev_sample = torch.randn(4, ROWS, *LATENT)
        self.table, self.step = torch.tensor([[1.02, -0.2, 1.0]]), torch.zeros(ROWS, dtype=torch.int64)

    def __call__(self, output: Tensor, uncond: Tensor | None = None, seed: int = 0) -> Tensor:
        rewards = torch.randn(1, ROWS, generator=torch.Generator().manual_seed(seed))
        guidance = {} if uncond is None else {"uncond_output": uncond, "guidance_scale": 5.0}
        old = transition_logprob(
            output.detach(), self.sample, self.prev_sample, self.table, self.step, **guidance
        )
        transition = (output, self.sample, self.prev_sample, self.table, self.step, old)
        return loop_loss(*transition, rewards, torch.arange(ROWS), clip_range=0.2, **guidance).loss

    def gradients(self, seed: int = 0) -> tuple[Tensor, ...]:
        outputs = self.output.clone().requires_grad_(), self.uncond.clone().requires_grad_()
        return torch.autograd.grad(self(*outputs, seed=seed), outputs)


def test_memory_is_used_again() -> None:
    address = new().data_ptr()
    assert [new().data_ptr() for _ in range(3)] == [address] * 3
    assert buffers.empty(SHAPE[::-1], torch.int32).data_ptr() == address
    assert len(buffers._blocks) == 1


def in_a_cycle(tensor: Tensor) -> list[object]:
    holder: list[object] = [tensor]
    holder.append(holder)
    return holder


HOLDERS: dict[str, Callable[[Tensor], object]] = {
    "tensor": lambda tensor: tensor,
    "view": lambda tensor: tensor[3, 5:7],
    "detached": lambda tensor: tensor.detach(),
    "storage": lambda tensor: tensor.untyped_storage(),
    "numpy": lambda tensor: tensor.numpy(),
    "dlpack": torch.from_dlpack,
    "graph": lambda tensor: torch.ones(SHAPE, requires_grad=True) * tensor,
    "cycle": in_a_cycle,
}


@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS)
def test_memory_is_not_used_again_before(hold: Callable[[Tensor], object]) -> None:
    tensor = new().zero_()
    address = tensor.data_ptr()
    holder = hold(tensor)
    del tensor
    assert new().data_ptr() != address
    del holder
    gc.collect()
    assert address in [tensor.data_ptr() for tensor in (new(), new())]


@native
def test_gradients_that_are_kept_stay_as_they_are() -> None:
    losses = Losses()
    kept, copies = [], []
    for seed in range(50):
        kept += losses.gradients(seed)
        copies += [gradient.clone() for gradient in kept[-2:]]
    assert len({gradient.data_ptr() for gradient in kept}) == 100
    assert all(map(torch.equal, kept, copies))


@native
@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_a_leafs_gradient_is_the_buffer_itself(weight: float) -> None:
    losses = Losses()
    first, second = (losses.output.clone().requires_grad_() for _ in range(2))
    (weight * losses(first, seed=1)).backward()
    assert first.grad is not None
    assert [ctypes.addressof(block.array) for block in buffers._blocks] == [first.grad.data_ptr()]
    expected = first.grad.clone()
    (weight * losses(second, seed=2)).backward()
    assert second.grad is not None
    assert second.grad.data_ptr() != first.grad.data_ptr()
    assert torch.equal(first.grad, expected)
    # Added up in place, as over microbatches; the second gradient's block is free again.
    (weight * losses(first, seed=3)).backward()
    assert not torch.equal(first.grad, expected)
    assert len(buffers._blocks) == 3
    assert sum(block.loan() is None for block in buffers._blocks) == 1


@native
def test_a_graph_that_is_kept_gives_the_same_gradient_again() -> None:
    losses = Losses()
    output = losses.output.clone().requires_grad_()
    loss = losses(output)
    (first,) = torch.autograd.grad(loss, output, torch.tensor(3.0), retain_graph=True)
    copy = first.clone()
    losses.gradients(1)
    (second,) = torch.autograd.grad(loss, output, torch.tensor(3.0))
    assert torch.equal(first, copy)
    assert torch.equal(second, copy)


@native
def test_results_are_the_same_in_used_memory() -> None:
    losses = Losses()
    image = torch.randn(2, 40, 64, 64).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight, bias = torch.randn(2, 40)

    def results() -> list[Tensor]:
        step = losses.step + 0, torch.arange(ROWS)
        y = group_norm_silu(image, weight, bias, 8)
        (grad,) = torch.autograd.grad(y.sum(), image)
        assert y.stride() == grad.stride() == image.stride()
        prev_sample, logprob = denoise_step(losses.output, losses.sample, losses.table, *step)
        return [y, grad, prev_sample, logprob, *losses.gradients()]

    first = [result.clone() for result in results()]
    for block in buffers._blocks:
        ctypes.memset(block.array, 255, block.size)  # NaN
    blocks = len(buffers._blocks)
    assert blocks > 0
    assert all(map(torch.equal, results(), first))
    assert len(buffers._blocks) == blocks


def test_strides_are_those_of_torch() -> None:
    for tensor in (
        torch.zeros(2, 32, 64, 64),
        torch.zeros(2, 32, 64, 64).contiguous(memory_format=torch.channels_last),
        torch.zeros(64, 2, 64, 64, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last),
    ):
        ours, theirs = buffers.empty_like(tensor), torch.empty_like(tensor)
        assert (ours.shape, ours.stride(), ours.dtype) == (theirs.shape, theirs.stride(), theirs.dtype)
    assert held() > 0


def test_small_and_huge_results_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "MOST_BYTES", 2**20)
    for size in (0, 1, buffers.SMALLEST - 1, 2**20 + 1):
        result = buffers.empty((size,), torch.uint8)
        assert result.shape == (size,)
        assert result.untyped_storage().resizable()
    assert held() == 0


@pytest.mark.parametrize("keep", [False, True])
def test_no_more_is_kept_than_the_bound(monkeypatch: pytest.MonkeyPatch, keep: bool) -> None:
    monkeypatch.setattr(buffers, "MOST_BYTES", 2**20)
    monkeypatch.setattr(buffers, "MOST_BLOCKS", 5)
    kept = []
    for index in range(30):
        result = buffers.empty((buffers.SMALLEST + index % 3 * 2**16,), torch.uint8).fill_(index)
        kept += [result] * keep
        assert held() <= 2**20
        assert len(buffers._blocks) <= 5
    # Those whose blocks had to go live on.
    assert all(bool((result == index).all()) for index, result in enumerate(kept))


def test_threads_do_not_share_blocks() -> None:
    wrong: list[int] = []

    def work(name: int) -> None:
        kept: list[Tensor] = []
        for turn in range(200):
            kept.append(buffers.empty((2**16,), torch.int32).fill_(name))
            if turn % 3 == 2:
                wrong.extend(name for tensor in kept if not bool((tensor == name).all()))
                kept.clear()

    threads = [threading.Thread(target=work, args=(name,)) for name in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []
    assert held() <= buffers.MOST_BYTES


@pytest.mark.usefixtures("poisoned")
def test_memory_is_filled_where_torch_is_told_to() -> None:
    for _ in range(2):
        assert new().isnan().all()
        assert buffers.empty_like(torch.zeros(SHAPE)).isnan().all()


def test_torch_can_do_with_a_result_what_it_does_with_others() -> None:
    result = new().fill_(7)
    assert result.resize_(3, 5).shape == (3, 5)
    with pytest.raises(RuntimeError, match="not resizable"):
        result.resize_(2 * new().numel())
    result = new().fill_(7)
    file = io.BytesIO()
    torch.save(result, file)
    file.seek(0)
    assert torch.equal(torch.load(file), result)
    assert torch.equal(result.share_memory_(), torch.full(SHAPE, 7.0))
    assert result.is_shared()
    assert new().data_ptr() != result.data_ptr()


# A plain process: page faults of a warm one, blocks after a fork, and an end with results alive.
PROGRAM = """
import os, resource, torch
from loopfast_kernels import buffers, loop_loss
N, L = 16, (4, 64, 64)
output, uncond, sample, prev_sample = torch.randn(4, N, *L)
outputs = output.requires_grad_(), uncond.requires_grad_()
arguments = sample, prev_sample, torch.tensor([[1.0, -0.2, 1.0]]), torch.zeros(N, dtype=torch.int64)
arguments += torch.zeros(N), torch.randn(4, 4), torch.arange(N)
def call():
    loss = loop_loss(output, *arguments, clip_range=0.2, uncond_output=uncond, guidance_scale=5.0).loss
    return torch.autograd.grad(loss, outputs)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        call()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
buffers.clear()
held = buffers.empty((2**18,), torch.float32).fill_(1)
buffers.empty((2**18,), torch.float32)
child = os.fork()
for _ in range(3):
    buffers.empty((2**18,), torch.float32).fill_(2 if child else 3)
if child == 0:
    held.fill_(3)
    os._exit(len(buffers._blocks))
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), len(buffers._blocks), float(held.max()))
kept = [buffers.empty((2**18,), torch.float32).zero_() for _ in range(3)]
kept.append(kept)
weight = torch.ones(2**18, requires_grad=True)
graph = (weight * kept[0]).sum()
"""


@native
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_in_a_plain_process() -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=clean | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
    )
    faults, fork = process.stdout.splitlines()
    # Both gradients take 512 pages; without blocks to use again there were 158 faults a call.
    assert int(faults) < 20 * 50
    # a child's blocks are its own
    assert fork.split() == ["2", "2", "1.0"]
