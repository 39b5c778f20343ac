"""Which process replays which pairs of an update."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loopfast.distributed.group import Group
from loopfast.rollout.trajectories import Trajectories


@dataclass(frozen=True)
class Part:
    """The pairs of one model call.

    Attributes:
        rows, steps: int64 ``[m]`` on the policy's device.
        transitions: ``(sample, prev_sample, logprob)`` of them, see `Trajectories.pairs`.
        count: how many of them count: m, or none in a call that is made for other processes' sake.
    """

    rows: Tensor
    steps: Tensor
    transitions: tuple[Tensor, Tensor, Tensor]
    count: int


class Share:
    """This process's share of an update's M pairs, equal to the others' or one pair apart.

    A pair is replayed where its trajectory was sampled. Where that would be more than a process's share, the
    transitions of the surplus, and of nothing else, travel to those that have less.

    Args:
        group: the processes.
        trajectories: what was sampled; each process has some rows.
        pairs: ``(rows [M], steps [M])`` of the update, the same in every process.

    Attributes:
        positions: int64 on the CPU, where the share's pairs stand among the M.
        most: the largest share of a process.
    """

    def __init__(self, group: Group, trajectories: Trajectories, pairs: tuple[Tensor, Tensor]) -> None:
        self._trajectories, self._device = trajectories, trajectories.logprob.device
        rows, steps = (index.cpu() for index in pairs)
        self._any = (torch.tensor([trajectories.first_row]), steps[:1])
        self.most = -(-len(rows) // group.size)
        self._received: tuple[Tensor, ...] = ()
        if group.alone:
            self.positions = torch.arange(len(rows))
            self._kept = len(rows)
        else:
            owner = group.owner(rows, trajectories.count)
            chosen = balanced(owner, group.size)
            mine, here = chosen == group.rank, owner == group.rank
            kept, received = (mine & here).nonzero()[:, 0], (mine & ~here).nonzero()[:, 0]
            self.positions, self._kept = torch.cat([kept, received]), len(kept)
            self._exchange(group, rows, steps, owner, chosen)
        # indices of the stored latents, which may be on the host: moved once, not in every call
        self._rows, self._steps = rows[self.positions], steps[self.positions]
        home = trajectories.latents.device
        self._stored = self._rows.to(home), self._steps.to(home)
        self._indices = self._rows.to(self._device), self._steps.to(self._device)

    def _exchange(self, group: Group, rows: Tensor, steps: Tensor, owner: Tensor, chosen: Tensor) -> None:
        moved = (owner != chosen).nonzero()[:, 0]
        if not len(moved):
            return
        sent = (owner[moved] == group.rank).nonzero()[:, 0]
        mine = moved[sent]
        gathered = [
            group.gather(values, sent, len(moved))
            for values in self._trajectories.pairs(rows[mine], steps[mine])
        ]
        received = (chosen[moved] == group.rank).nonzero()[:, 0].to(self._device)
        self._received = tuple(values[received] for values in gathered)

    def part(self, pairs: slice) -> Part:
        """The pairs of the share at a slice; any one, which does not count, where the slice is empty."""
        count = pairs.stop - pairs.start
        if not count:
            rows, steps = self._any
            transitions = self._trajectories.pairs(rows, steps)
            return Part(rows.to(self._device), steps.to(self._device), transitions, 0)
        rows, steps = (index[pairs] for index in self._indices)
        own = slice(pairs.start, min(pairs.stop, self._kept))
        theirs = slice(max(pairs.start - self._kept, 0), pairs.stop - self._kept)
        parts: list[tuple[Tensor, ...]] = []
        if own.start < own.stop:
            parts.append(self._trajectories.pairs(self._stored[0][own], self._stored[1][own]))
        if theirs.start < theirs.stop:
            parts.append(tuple(values[theirs] for values in self._received))
        sample, prev_sample, logprob = (
            torch.cat(values) if len(values) > 1 else values[0] for values in zip(*parts, strict=True)
        )
        return Part(rows, steps, (sample, prev_sample, logprob), count)


def balanced(owner: Tensor, size: int) -> Tensor:
    """The process that replays each pair: its owner, as far as every process gets as many pairs, or one more.

    Args:
        owner: int64 ``[M]``, the process that has each pair's trajectory.
        size: number of processes.

    Returns:
        int64 ``[M]``; the first pairs of a process stay, and the surplus goes, in order, to the processes in order.
    """
    quota = torch.tensor(
        [len(owner) * (rank + 1) // size - len(owner) * rank // size for rank in range(size)]
    )
    place = torch.zeros_like(owner)
    for rank in range(size):
        mine = owner == rank
        place[mine] = torch.arange(int(mine.sum()))
    stays = place < quota[owner]
    missing = quota - torch.bincount(owner[stays], minlength=size)
    chosen = owner.clone()
    chosen[~stays] = torch.arange(size).repeat_interleave(missing)
    return chosen
