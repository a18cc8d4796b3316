"""How the ranks of a run share the CPUs of their nodes. Imports no torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence

from pipelines.misc import CpuShare, cpu_shares


def by_host(hosts: Sequence[Hashable], masks: Sequence[frozenset[int]]) -> list[CpuShare]:
    """Share of each rank, by rank. Ranks of one host count together, whichever launcher started them."""
    ranks = defaultdict[Hashable, list[int]](list)
    for rank, host in enumerate(hosts):
        ranks[host].append(rank)
    found: dict[int, CpuShare] = {}
    for there in ranks.values():
        found |= dict(zip(there, cpu_shares([masks[rank] for rank in there]), strict=True))
    return [found[rank] for rank in range(len(hosts))]


def in_words(shares: Sequence[CpuShare]) -> str:
    """`2 CPUs`; of several ranks `1 CPU per rank (its own)`, or `(shared)` if one has a CPU that another may use."""
    if len(shares) == 1:
        return _counted(shares)
    own = all(share.own for share in shares)
    return f"{_counted(shares)} per rank ({'its own' if own else 'shared'})"


def fewest(shares: Iterable[CpuShare]) -> float:
    """CPUs of the rank that has the fewest."""
    return float(min(share.cpus for share in shares))


def _counted(shares: Sequence[CpuShare]) -> str:
    low, high = (f"{float(of(share.cpus for share in shares)):.3g}" for of in (min, max))
    number = low if low == high else f"{low} to {high}"
    return f"{number} CPU{'' if number == '1' else 's'}"
