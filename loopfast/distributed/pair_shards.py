"""Splits the pairs of an update over the ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loopfast.distributed.world import World
from loopfast.rollout.trajectories import Trajectories


@dataclass(frozen=True)
class Microbatch:
    """The pairs of one model call.

    Attributes:
        rows, steps: int64 ``[m]`` on the policy's device.
        transitions: their ``(sample, prev_sample, logprob)``, see `Trajectories.pairs`.
        count: the number of pairs that count: m, or 0 in a call that is made only because other ranks make one.
    """

    rows: Tensor
    steps: Tensor
    transitions: tuple[Tensor, Tensor, Tensor]
    count: int


class PairShard:
    """This rank's shard of an update's M pairs. The ranks' shards differ by one pair at most.

    A pair stays on the rank that sampled its trajectory. If that rank would have more than its shard, the transitions
    of the surplus pairs, and nothing else, are sent to ranks that have fewer.

    Args:
        world: the processes.
        trajectories: the sampled trajectories; each rank holds some rows.
        pairs: ``(rows [M], steps [M])`` of the update, the same on every rank.

    Attributes:
        positions: int64 on the CPU, the positions of the shard's pairs among the M.
        most: the size of the largest shard.
    """

    def __init__(self, world: World, trajectories: Trajectories, pairs: tuple[Tensor, Tensor]) -> None:
        self._trajectories, self._device = trajectories, trajectories.logprob.device
        rows, steps = (index.cpu() for index in pairs)
        self._any = (torch.tensor([trajectories.first_row]), steps[:1])
        self.most = -(-len(rows) // world.size)
        self._received: tuple[Tensor, ...] = ()
        if world.size == 1:
            self.positions = torch.arange(len(rows))
            self._kept = len(rows)
        else:
            sampled_by = world.rank_of(rows, trajectories.count)
            trained_by = balanced(sampled_by, world.size)
            local, stored = trained_by == world.rank, sampled_by == world.rank
            kept, received = (local & stored).nonzero()[:, 0], (local & ~stored).nonzero()[:, 0]
            self.positions, self._kept = torch.cat([kept, received]), len(kept)
            self._exchange(world, rows, steps, sampled_by, trained_by)
        # Indices of the stored latents, which may be on the host. They move there once, not in every call.
        self._rows, self._steps = rows[self.positions], steps[self.positions]
        home = trajectories.latents.device
        self._stored = self._rows.to(home), self._steps.to(home)
        self._indices = self._rows.to(self._device), self._steps.to(self._device)

    def _exchange(
        self, world: World, rows: Tensor, steps: Tensor, sampled_by: Tensor, trained_by: Tensor
    ) -> None:
        moved = (sampled_by != trained_by).nonzero()[:, 0]
        if not len(moved):
            return
        sent = (sampled_by[moved] == world.rank).nonzero()[:, 0]
        local = moved[sent]
        gathered = [
            world.gather(values, sent, len(moved))
            for values in self._trajectories.pairs(rows[local], steps[local])
        ]
        received = (trained_by[moved] == world.rank).nonzero()[:, 0].to(self._device)
        self._received = tuple(values[received] for values in gathered)

    def microbatch(self, pairs: slice) -> Microbatch:
        """Returns the shard's pairs at a slice. An empty slice gives any one pair, which does not count."""
        count = pairs.stop - pairs.start
        if not count:
            rows, steps = self._any
            transitions = self._trajectories.pairs(rows, steps)
            return Microbatch(rows.to(self._device), steps.to(self._device), transitions, 0)
        rows, steps = (index[pairs] for index in self._indices)
        kept = slice(pairs.start, min(pairs.stop, self._kept))
        received = slice(max(pairs.start - self._kept, 0), pairs.stop - self._kept)
        parts: list[tuple[Tensor, ...]] = []
        if kept.start < kept.stop:
            parts.append(self._trajectories.pairs(self._stored[0][kept], self._stored[1][kept]))
        if received.start < received.stop:
            parts.append(tuple(values[received] for values in self._received))
        sample, prev_sample, logprob = (
            torch.cat(values) if len(values) > 1 else values[0] for values in zip(*parts, strict=True)
        )
        return Microbatch(rows, steps, (sample, prev_sample, logprob), count)


def balanced(sampled_by: Tensor, size: int) -> Tensor:
    """Balances the load: each pair stays on its rank as far as all ranks get as many pairs, or one more.

    Args:
        sampled_by: int64 ``[M]``, the rank that holds each pair's trajectory.
        size: the number of processes.

    Returns:
        int64 ``[M]``, the rank that trains on each pair. The first pairs of a rank stay. The surplus goes, in order,
        to the ranks in order.
    """
    quota = torch.tensor(
        [len(sampled_by) * (rank + 1) // size - len(sampled_by) * rank // size for rank in range(size)]
    )
    position = torch.zeros_like(sampled_by)
    for rank in range(size):
        local = sampled_by == rank
        position[local] = torch.arange(int(local.sum()))
    stays = position < quota[sampled_by]
    missing = quota - torch.bincount(sampled_by[stays], minlength=size)
    trained_by = sampled_by.clone()
    trained_by[~stays] = torch.arange(size).repeat_interleave(missing)
    return trained_by
