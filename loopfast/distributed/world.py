"""The processes that train one run together, and how they exchange tensors, text and errors.

A single process is a world of size 1. Every method here then returns at once.

Tensors travel by collective operations of ``torch.distributed``. All ranks call them in the same order. Tensors on a
GPU go through NCCL. Tensors on the host, such as flags and rewards, go through gloo, so that the host never waits for
a GPU. Work that rank 0 does while the other ranks wait, such as writing a checkpoint, is announced through a
key-value store instead: no rank waits for a disk inside a collective operation.
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

from loopfast.distributed.heartbeat import Heartbeat
from loopfast.distributed.launcher import LaunchEnvironment
from loopfast.errors import LoopfastError, PeerError, first_line

dist: Any = torch.distributed

Result = TypeVar("Result")

# Seconds. A dead rank shows up first as a broken connection; the heartbeat needs this much longer to name the rank.
DIAGNOSIS_GRACE = 50.0
_POLL = 0.05


class World:
    """The processes of a run; see the module.

    Attributes:
        rank: the number of this process, from 0.
        size: the number of processes.
        device: the device of tensors that the default process group of ``torch.distributed`` takes.

    Args:
        launch_env: the rank and the size that the launcher gave this process.
        store: a key-value store of ``torch.distributed``; None for a single process.
        device: see above. None is the CPU.
        heartbeat: the thread that notices when another rank dies. None notices nothing.
        host: a process group of ``torch.distributed`` for tensors on the host. None uses the default process group.
    """

    def __init__(
        self,
        launch_env: LaunchEnvironment,
        store: Any = None,
        device: torch.device | None = None,
        heartbeat: Heartbeat | None = None,
        host: Any = None,
    ) -> None:
        self.rank, self.size = launch_env.rank, launch_env.size
        self.device = device or torch.device("cpu")
        self._store, self._heartbeat, self._host = store, heartbeat, host
        self._turns = 0

    @property
    def is_main(self) -> bool:
        """True on rank 0, which writes the files and prints."""
        return self.rank == 0

    def shards(self, count: int) -> list[slice]:
        """Splits ``count`` rows over the ranks: consecutive rows, whose numbers differ by one at most."""
        edges = [count * rank // self.size for rank in range(self.size + 1)]
        return [slice(start, stop) for start, stop in pairwise(edges)]

    def shard(self, count: int) -> slice:
        """Returns this rank's rows of ``count``."""
        return self.shards(count)[self.rank]

    def calls(self, count: int, rows: int) -> int:
        """Returns the number of model calls of ``rows`` rows each that the largest shard of ``count`` rows takes."""
        return max(-(-(shard.stop - shard.start) // rows) for shard in self.shards(count))

    def rank_of(self, rows: Tensor, count: int) -> Tensor:
        """Returns the rank that holds each row: int64 with the shape of ``rows``, on the CPU."""
        stops = torch.tensor([shard.stop for shard in self.shards(count)])
        return torch.bucketize(rows.cpu(), stops, right=True)

    def gather(self, values: Tensor, ids: Tensor, count: int) -> Tensor:
        """Gathers the rows of all ranks on every rank, each row at the position of its id.

        Args:
            values: ``[n, ...]`` of any type, this rank's rows. n may differ between ranks, the rest of the shape not.
            ids: int64 ``[n]``, the positions of these rows in ``range(count)``. They travel as 64-bit integers.
            count: the number of all rows. Each row comes from exactly one rank.

        Returns:
            ``[count, ...]`` on the device of ``values``.

        Raises:
            LoopfastError: rows are missing or come twice.
        """
        if self.size > 1:
            most = int(self._max(torch.tensor([len(values)]))[0])
            ids, values = self._all(_padded(ids.cpu(), most, -1)), self._all(_padded(values, most, 0))
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
        """Returns the sum over all ranks, on the device of ``values``."""
        return self._reduced(values, "SUM")

    def _max(self, values: Tensor) -> Tensor:
        return self._reduced(values, "MAX")

    def max(self, value: float) -> float:
        """Returns the largest value of all ranks."""
        return float(self._max(torch.tensor([value], dtype=torch.float64))[0])

    def any(self, flag: bool) -> bool:
        """Returns whether the flag is set on any rank."""
        return bool(self._max(torch.tensor([int(flag)]))[0])

    def gather_texts(self, text: str) -> list[str]:
        """Gathers one text of each rank on every rank, in the order of ranks."""
        if self.size == 1:
            return [text]
        encoded = torch.frombuffer(bytearray(text.encode() or b"\0"), dtype=torch.uint8)
        most = int(self.max(len(encoded)))
        rows = self.gather(_padded(encoded, most, 0)[None], torch.tensor([self.rank]), self.size)
        return [bytes(row.tolist()).rstrip(b"\0").decode() for row in rows]

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Copies rank 0's values into the tensor of every rank, and returns it."""
        if self.size > 1:
            # Whole models travel so, too, from the host: a GPU's connections are faster than gloo.
            sent = tensor.to(self.device).contiguous()
            dist.broadcast(sent, 0)
            if sent.data_ptr() != tensor.data_ptr():
                tensor.copy_(sent)
        return tensor

    def _reduced(self, values: Tensor, operation: str) -> Tensor:
        if self.size == 1:
            return values
        device, group = self._way(values)
        result = values.to(device, copy=True)
        dist.all_reduce(result, getattr(dist.ReduceOp, operation), group=group)
        return result.to(values.device)

    def _way(self, values: Tensor) -> tuple[torch.device, Any]:
        """Returns the device that values are sent from, and the process group that sends them."""
        if self._host is not None and values.device.type == "cpu":
            return values.device, self._host
        return self.device, None

    def _all(self, values: Tensor) -> Tensor:
        """Concatenates the rows of all ranks, which have the same number of rows."""
        # Neither gloo nor NCCL supports every dtype, but both support bytes.
        device, group = self._way(values)
        flat = values.to(device).contiguous().view(len(values), -1)
        sent = flat.view(torch.uint8) if flat.numel() else flat.new_empty(flat.shape, dtype=torch.uint8)
        parts = [torch.empty_like(sent) for _ in range(self.size)]
        dist.all_gather(parts, sent, group=group)
        return torch.cat(parts).view(values.dtype).view(-1, *values.shape[1:]).to(values.device)

    def on_main(self, function: Callable[[], Result]) -> Result:
        """Calls the function on rank 0, and returns its result on every rank.

        The other ranks wait at the store, however long it takes. The result must be picklable.

        Raises:
            LoopfastError: the function raised it. Every rank raises the same error.
            PeerError: rank 0 has ended meanwhile.
        """
        if self.size == 1:
            return function()
        self._turns += 1
        key = f"turn/{self._turns}"
        if self.is_main:
            try:
                result = function()
            except LoopfastError as error:
                error.on_all_ranks = True
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

    def stop_heartbeat(self) -> None:
        """Announces that this rank is done and may end without an error."""
        if self._heartbeat is not None:
            self._heartbeat.stop()

    def _raise_if_broken(self) -> None:
        if self._heartbeat is not None and self._heartbeat.reason is not None:
            raise self._peer_error(self._heartbeat.reason)

    def _peer_error(self, reason: str) -> PeerError:
        error = PeerError(reason)
        error.printed_elsewhere = self._heartbeat is not None and self._heartbeat.reporting_rank != self.rank
        return error

    @contextmanager
    def explained(self, hurried: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """Context that reports this rank's error to the other ranks, and replaces a broken connection by its cause.

        Args:
            hurried: returns whether the launcher already ends this process, so that there is no time to wait.

        Raises:
            PeerError: another rank has ended or does not answer.
        """
        if self.size == 1 or self._heartbeat is None:
            yield
            return
        try:
            yield
        except PeerError:
            raise
        except LoopfastError as error:
            if error.on_all_ranks:
                error.printed_elsewhere = not self.is_main
            else:
                self._heartbeat.fail(str(error))
            raise
        except BaseException as error:
            if not _broken(error):
                self._heartbeat.fail(f"{type(error).__name__}: {error}")
                raise
            end = time.monotonic() + DIAGNOSIS_GRACE
            while self._heartbeat.reason is None and time.monotonic() < end and not hurried():
                time.sleep(_POLL)
            unknown = (
                f"the connection to another process broke, or it did not answer in time ({first_line(error)})"
            )
            raise self._peer_error(self._heartbeat.reason or unknown) from None


SINGLE_PROCESS = World(LaunchEnvironment())
"""The world of a process that was started alone."""


def _padded(values: Tensor, rows: int, value: int) -> Tensor:
    """Appends rows of ``value`` until there are ``rows``."""
    missing = rows - len(values)
    return torch.cat([values, values.new_full((missing, *values.shape[1:]), value)]) if missing else values


def _broken(error: BaseException) -> bool:
    """Returns whether the error is a broken connection, and not what broke it."""
    if isinstance(error, dist.DistError):
        return True
    # gloo's errors have no class of their own, but each message begins with one of gloo's files.
    return isinstance(error, RuntimeError) and "gloo" in str(error)
