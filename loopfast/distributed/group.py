"""The processes that train one run together, and what they tell each other.

A process that was started alone is a group of one, for which everything here is free.

Tensors travel by collective operations of ``torch.distributed``, which all processes take part in, in the same order.
Those on a GPU go through NCCL, those on the host, such as flags and rewards, through gloo, so that the host never waits
for a GPU to learn what another host knows. What one process does alone while others wait, such as writing a checkpoint,
goes through the group's store instead: nobody waits for a disk inside a collective operation.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, TypeVar, cast

import torch
import torch.distributed
from torch import Tensor

from loopfast.distributed.heartbeat import Watch
from loopfast.distributed.launcher import Place
from loopfast.errors import LoopfastError, PeerError, first_line

dist: Any = torch.distributed

Result = TypeVar("Result")

# A peer's end reaches those who wait for it by a broken connection first; by name, the watch knows it this much later.
NAMING = 50.0
_POLL = 0.05


class Group:
    """The processes of a run; see the module.

    Attributes:
        rank, size: this process's number, and how many there are.
        device: of the tensors that the default group of ``torch.distributed`` takes.

    Args:
        place: where the launcher has put this process.
        store: of the group; None alone.
        device: see above; None for the CPU.
        watch: None: nobody notices when a process dies.
        host: a group of ``torch.distributed`` for tensors on the host; None: the default group takes them.
    """

    def __init__(
        self,
        place: Place,
        store: Any = None,
        device: torch.device | None = None,
        watch: Watch | None = None,
        host: Any = None,
    ) -> None:
        self.rank, self.size = place.rank, place.size
        self.device = device or torch.device("cpu")
        self._store, self._watch, self._host = store, watch, host
        self._turns = 0

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and talks to the user."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether there is no other process."""
        return self.size == 1

    def parts(self, count: int) -> list[slice]:
        """Which of ``count`` rows each process has: consecutive ones, in number equal or one apart."""
        edges = [count * rank // self.size for rank in range(self.size + 1)]
        return [slice(start, stop) for start, stop in pairwise(edges)]

    def part(self, count: int) -> slice:
        """Which of ``count`` rows this process has."""
        return self.parts(count)[self.rank]

    def owner(self, rows: Tensor, count: int) -> Tensor:
        """The process that has each row: int64 like ``rows``, on the CPU."""
        stops = torch.tensor([part.stop for part in self.parts(count)])
        return torch.bucketize(rows.cpu(), stops, right=True)

    def gather(self, values: Tensor, ids: Tensor, count: int) -> Tensor:
        """The rows of all processes, each where its id says, in every process.

        Args:
            values: ``[n, ...]`` of any type, this process's rows; n may differ, the rest of the shape may not.
            ids: int64 ``[n]``, their places in ``range(count)``. They travel as 64-bit integers.
            count: of all rows; each has to come from one process.

        Returns:
            ``[count, ...]`` on the device of ``values``.

        Raises:
            LoopfastError: rows are missing or come twice.
        """
        if not self.alone:
            most = int(self._largest(torch.tensor([len(values)]))[0])
            ids, values = self._all(_filled(ids.cpu(), most, -1)), self._all(_filled(values, most, 0))
            present = ids >= 0
            ids, values = ids[present], values[present.to(values.device)]
        if not torch.equal(ids.cpu().sort().values, torch.arange(count)):
            raise LoopfastError(
                f"of {count} rows the processes have sent {len(ids)}, {len(ids.unique())} of them different"
            )
        result = torch.empty_like(values)
        result[ids.to(values.device)] = values
        return result

    def sum(self, values: Tensor) -> Tensor:
        """The sum over processes, on the device of ``values``."""
        return self._reduced(values, "SUM")

    def _largest(self, values: Tensor) -> Tensor:
        return self._reduced(values, "MAX")

    def largest(self, value: float) -> float:
        """The largest of the processes' numbers."""
        return float(self._largest(torch.tensor([value], dtype=torch.float64))[0])

    def any(self, flag: bool) -> bool:
        """Whether it is so in any process."""
        return bool(self._largest(torch.tensor([int(flag)]))[0])

    def texts(self, text: str) -> list[str]:
        """What each process says, by rank, in all of them."""
        if self.alone:
            return [text]
        said = torch.frombuffer(bytearray(text.encode() or b"\0"), dtype=torch.uint8)
        most = int(self.largest(len(said)))
        rows = self.gather(_filled(said, most, 0)[None], torch.tensor([self.rank]), self.size)
        return [bytes(row.tolist()).rstrip(b"\0").decode() for row in rows]

    def broadcast(self, tensor: Tensor) -> Tensor:
        """The first process's values, written into every process's tensor."""
        if not self.alone:
            # whole models come from the host so, too: for them a GPU's connections are the faster ones
            sent = tensor.to(self.device).contiguous()
            dist.broadcast(sent, 0)
            if sent.data_ptr() != tensor.data_ptr():
                tensor.copy_(sent)
        return tensor

    def _reduced(self, values: Tensor, operation: str) -> Tensor:
        if self.alone:
            return values
        device, group = self._way(values)
        result = values.to(device, copy=True)
        dist.all_reduce(result, getattr(dist.ReduceOp, operation), group=group)
        return result.to(values.device)

    def _way(self, values: Tensor) -> tuple[torch.device, Any]:
        """The device that values travel from, and the group of ``torch.distributed`` that takes them there."""
        if self._host is not None and values.device.type == "cpu":
            return values.device, self._host
        return self.device, None

    def _all(self, values: Tensor) -> Tensor:
        """Equally many rows of every process, one after the other."""
        # neither gloo nor NCCL has every type; bytes they do have
        device, group = self._way(values)
        flat = values.to(device).contiguous().view(len(values), -1)
        sent = flat.view(torch.uint8) if flat.numel() else flat.new_empty(flat.shape, dtype=torch.uint8)
        parts = [torch.empty_like(sent) for _ in range(self.size)]
        dist.all_gather(parts, sent, group=group)
        return torch.cat(parts).view(values.dtype).view(-1, *values.shape[1:]).to(values.device)

    def on_first(self, function: Callable[[], Result]) -> Result:
        """What the function returns in the first process, in all of them.

        The others wait at the store, however long it takes. What is returned has to be picklable.

        Raises:
            LoopfastError: the function raised it; the same in every process.
            PeerError: the first process has ended meanwhile.
        """
        if self.alone:
            return function()
        self._turns += 1
        key = f"turn/{self._turns}"
        if self.first:
            try:
                result = function()
            except LoopfastError as error:
                error.shared = True
                self._store.set(key, pickle.dumps((False, error)))
                raise
            self._store.set(key, pickle.dumps((True, result)))
            return result
        while not self._store.check([key]):
            self._raise_if_broken()
            time.sleep(_POLL)
        good, answer = pickle.loads(self._store.get(key))
        if not good:
            raise answer
        return cast(Result, answer)

    def end_watch(self) -> None:
        """Says that this process needs the others no more."""
        if self._watch is not None:
            self._watch.done()

    def _raise_if_broken(self) -> None:
        if self._watch is not None and self._watch.reason is not None:
            raise self._peer_error(self._watch.reason)

    def _peer_error(self, reason: str) -> PeerError:
        error = PeerError(reason)
        error.silent = self._watch is not None and self._watch.speaker != self.rank
        return error

    @contextmanager
    def explained(self, hurried: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """Tells the others of an error that ends this process, and turns a broken connection into what broke it.

        Args:
            hurried: whether the launcher is already ending this process, so that there is no time to find out.

        Raises:
            PeerError: another process has ended or does not answer.
        """
        if self.alone or self._watch is None:
            yield
            return
        try:
            yield
        except PeerError:
            raise
        except LoopfastError as error:
            if error.shared:
                error.silent = not self.first
            else:
                self._watch.fail(str(error))
            raise
        except BaseException as error:
            if not _broken(error):
                self._watch.fail(f"{type(error).__name__}: {error}")
                raise
            end = time.monotonic() + NAMING
            while self._watch.reason is None and time.monotonic() < end and not hurried():
                time.sleep(_POLL)
            unknown = (
                f"the connection to another process broke, or it did not answer in time ({first_line(error)})"
            )
            raise self._peer_error(self._watch.reason or unknown) from None


ALONE = Group(Place())
"""The group of a process that was started alone."""


def _filled(values: Tensor, rows: int, value: int) -> Tensor:
    """With rows of ``value`` added at the end until there are ``rows``."""
    missing = rows - len(values)
    return torch.cat([values, values.new_full((missing, *values.shape[1:]), value)]) if missing else values


def _broken(error: BaseException) -> bool:
    """Whether it is the end of a connection that was raised, and not what ended it."""
    if isinstance(error, dist.DistError):
        return True
    # gloo's own errors have no type of their own, but all begin with the file they come from
    return isinstance(error, RuntimeError) and "gloo" in str(error)
