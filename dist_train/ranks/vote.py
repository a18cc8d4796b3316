"""What the ranks agree on, and tell of themselves, at a step: one small all-reduce, read one step later."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dist_train.ranks.world import World


class Vote(NamedTuple):
    """What the ranks say at a step, summed over all of them. What a rank does not say counts as 0.

    Attributes:
        loss: sum of the samples' cross-entropy, nats.
        wrong: samples whose most probable class is not the right one.
        refused: ranks that found a gradient that is not finite, and left the weights as they are.
        stop: ranks that a stop signal has come to.
        save: 1 if a save is due by the clock, which rank 0 looks at for all.
        lost: as in `rundir.lease.Lease`: whether, and how, the run directory is lost, which rank 0 finds out.
        bad: samples that could not be decoded, and were replaced.
        unread: ranks that cannot read their samples; what they show the net is NaN, so that all refuse the step.
        square: of the gradient's norm, of those parts of the net that a rank tells of.
        rows: what each rank says of itself, by rank: none where nothing was asked for.
    """

    loss: float = 0.0
    wrong: float = 0.0
    refused: float = 0.0
    stop: float = 0.0
    save: float = 0.0
    lost: float = 0.0
    bad: float = 0.0
    unread: float = 0.0
    square: float = 0.0
    rows: tuple[tuple[float, ...], ...] = ()

    @staticmethod
    def cast(world: World, row: Sequence[float] = (), /, **says: float | Tensor) -> PendingVote:
        """Begin the all-reduce of what this rank says, by the names above: numbers, or scalars on the device.
        Raises TypeError for another name.

        Args:
            row: numbers about this rank, as many on all ranks, which are not summed: each has a place of its own.
        """
        # One copy carries the plain numbers to the device, where the scalars take their places: nothing is waited for.
        if unknown := says.keys() - set(SUMS):
            raise TypeError(f"a vote has no {', '.join(unknown)}")
        numbers = np.zeros(len(SUMS) + world.size * len(row))
        numbers[: len(SUMS)] = [0.0 if isinstance(says.get(name), Tensor) else says.get(name, 0.0) for name in SUMS]
        mine = len(SUMS) + world.rank * len(row)
        numbers[mine : mine + len(row)] = row
        pinned = world.device.type == "cuda"
        values = torch.tensor(numbers, pin_memory=pinned).to(world.device, non_blocking=True)
        for name, value in says.items():
            if isinstance(value, Tensor):
                values[SUMS.index(name)] = value
        work = world.reduce(values)
        if pinned:
            values, there = _returning(values, work)
            return PendingVote(values, there, len(row))
        return PendingVote(values, work, len(row))


SUMS = Vote._fields[:-1]  # all but `rows`


class PendingVote(NamedTuple):
    """A vote under way.

    Attributes:
        values: the sums, once they are there: in host memory.
        there: what to wait for.
        columns: of `rows`.
    """

    values: Tensor
    there: dist.Work | torch.cuda.Event | None
    columns: int = 0

    def read(self) -> Vote:
        """Wait for the sums."""
        if isinstance(self.there, torch.cuda.Event):
            self.there.synchronize()
        elif self.there:
            self.there.wait()
        numbers, n = self.values.tolist(), self.columns
        rows = tuple(tuple(numbers[i : i + n]) for i in range(len(SUMS), len(numbers), n)) if n else ()
        return Vote(*numbers[: len(SUMS)])._replace(rows=rows)


def _returning(values: Tensor, work: dist.Work | None) -> tuple[Tensor, torch.cuda.Event]:
    """Let a vote on a GPU come back to the host beside the stream of the net: on that, whoever reads it a step later
    would wait for the step that was begun in between."""
    side = _side_stream(values.device)
    side.wait_stream(torch.cuda.current_stream(values.device))
    with torch.cuda.stream(side):
        if work:
            work.wait()  # of this stream, not of the host
        # Pinned memory is used again once its copy is done: torch keeps a few blocks for all steps.
        host = torch.empty_like(values, device="cpu", pin_memory=True)
        host.copy_(values, non_blocking=True)
        values.record_stream(side)
        return host, side.record_event()


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
