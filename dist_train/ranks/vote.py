"""What the ranks agree on and report at each step: one small all-reduce, read one step later."""

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
    """Values of a step, summed over all ranks. A value that a rank does not give counts as 0.

    Attributes:
        loss: sum of the samples' cross-entropy, nats.
        wrong: samples whose most probable class is not the label.
        refused: ranks that found a non-finite gradient and left the weights unchanged.
        stop: ranks that received a stop signal.
        save: 1 if a save is due by the clock, which rank 0 checks for all.
        lost: whether and how the run directory is lost, found by rank 0; values as in `rundir.lease.Lease`.
        bad: samples that could not be decoded and were replaced.
        unread: ranks that cannot read their samples; they feed NaN to the net, so that all ranks refuse the step.
        square: squared gradient norm, each rank adding the parts of the net that it reports.
        new: logged numbers that have no places yet (`ranks.logged`).
        rows: numbers about each rank, by rank; empty if none were given.
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
    new: float = 0.0
    rows: tuple[tuple[float, ...], ...] = ()

    @staticmethod
    def cast(world: World, row: Sequence[float | Tensor] = (), /, **says: float | Tensor) -> PendingVote:
        """Begin the all-reduce of this rank's values, given by the names above as numbers or scalars on the device.
        Raises TypeError for an unknown name.

        Args:
            row: numbers about this rank, as above, equally many on all ranks; they are gathered, not summed.
        """
        # One copy takes the plain numbers to the device, where the scalars are filled in: nothing waits.
        if unknown := says.keys() - set(SUMS):
            raise TypeError(f"a vote has no {', '.join(unknown)}")
        numbers = np.zeros(len(SUMS) + world.size * len(row))
        numbers[: len(SUMS)] = [0.0 if isinstance(says.get(name), Tensor) else says.get(name, 0.0) for name in SUMS]
        mine = len(SUMS) + world.rank * len(row)
        numbers[mine : mine + len(row)] = [0.0 if isinstance(value, Tensor) else value for value in row]
        pinned = world.device.type == "cuda"
        values = torch.tensor(numbers, pin_memory=pinned).to(world.device, non_blocking=True)
        for name, value in says.items():
            if isinstance(value, Tensor):
                values[SUMS.index(name)] = value
        for place, value in enumerate(row, mine):
            if isinstance(value, Tensor):
                values[place] = value
        work = world.reduce(values)
        if pinned:
            values, there = _returning(values, work)
            return PendingVote(values, there, len(row))
        return PendingVote(values, work, len(row))


SUMS = Vote._fields[:-1]  # all but `rows`


class PendingVote(NamedTuple):
    """A vote under way.

    Attributes:
        values: the sums, in host memory once complete.
        there: what to wait for.
        columns: number of columns of `rows`.
    """

    values: Tensor
    there: dist.Work | torch.cuda.Event | None
    columns: int = 0

    def read(self) -> Vote:
        """Waits for the sums, and returns them."""
        if isinstance(self.there, torch.cuda.Event):
            self.there.synchronize()
        elif self.there:
            self.there.wait()
        numbers, n = self.values.tolist(), self.columns
        rows = tuple(tuple(numbers[i : i + n]) for i in range(len(SUMS), len(numbers), n)) if n else ()
        return Vote(*numbers[: len(SUMS)])._replace(rows=rows)


def _returning(values: Tensor, work: dist.Work | None) -> tuple[Tensor, torch.cuda.Event]:
    """Copy a vote from the GPU to the host on a side stream: on the net's stream, reading it one step later would wait
    for the step begun in between."""
    side = _side_stream(values.device)
    side.wait_stream(torch.cuda.current_stream(values.device))
    with torch.cuda.stream(side):
        if work:
            work.wait()  # blocks this stream, not the host
        # Pinned memory is reused once its copy is done: torch keeps a few blocks for all steps.
        host = torch.empty_like(values, device="cpu", pin_memory=True)
        host.copy_(values, non_blocking=True)
        values.record_stream(side)
        return host, side.record_event()


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
