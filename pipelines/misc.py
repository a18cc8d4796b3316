"""Small functions shared by several modules."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple


class CpuShare(NamedTuple):
    """A process's share of the CPUs of its node.

    Attributes:
        cpus: their number, in which a CPU that k processes may use counts 1/k.
        own: whether no other process may use any of them.
    """

    cpus: Fraction
    own: bool

    @property
    def threads(self) -> int:
        """Threads that suit it, at least one."""
        return max(1, int(self.cpus))


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def cpus() -> int:
    """Number of CPUs this process may use."""
    return len(os.sched_getaffinity(0))


def cpu_shares(masks: Sequence[Collection[int]]) -> list[CpuShare]:
    """Share of each process of a node.

    Args:
        masks: for each process, the CPUs that it may use. torchrun's processes share those of torchrun, unless
            `--numa-binding` is given; srun gives each task its own.
    """
    users = Counter(cpu for mask in masks for cpu in mask)
    return [
        CpuShare(sum((Fraction(1, users[cpu]) for cpu in mask), Fraction()), all(users[cpu] == 1 for cpu in mask))
        for mask in masks
    ]


def cpu_share() -> CpuShare:
    """This process's share, found without asking the others that its launcher started on this node: the masks are those
    of its siblings. If these are not the ranks that the launcher speaks of, they are taken to have the same mask."""
    mine, count = os.sched_getaffinity(0), _launched()
    parent, others = os.getppid(), list[set[int]]()
    with suppress(OSError):  # hidden, or gone in this moment
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text(encoding="ascii").split()
        others = [os.sched_getaffinity(pid) for pid in map(int, children) if pid != os.getpid()]
    if len(others) != count - 1:
        others = [mine] * (count - 1)
    return cpu_shares([mine, *others])[0]


def _launched() -> int:
    """Processes of the launcher on this node; 1 without a launcher, or if it does not say a number."""
    text = os.environ.get("LOCAL_WORLD_SIZE", "")
    return int(text) if text.isdecimal() else 1
