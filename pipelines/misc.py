"""Small functions shared by several modules."""

from __future__ import annotations

import os


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def cpus() -> int:
    """Number of CPUs this process may use."""
    return len(os.sched_getaffinity(0))
