"""Logged numbers of a step (`dist_train.numbers`), from all ranks."""

from __future__ import annotations

from typing import NamedTuple

import torch.distributed as dist

from dist_train import numbers
from dist_train.numbers import Number
from dist_train.outcomes import BadNumbers
from dist_train.ranks.vote import PendingVote, Vote
from dist_train.ranks.world import World

MOST = 64  # numbers of a run: each has two places per rank in what each rank receives at each step
Key = tuple[str, str]  # name, kind


class PendingNumbers(NamedTuple):
    """The numbers of a step under way.

    Attributes:
        known: those that have places, the same on all ranks.
        places: what was sent in them; None if there are none.
        new: this rank's numbers that have none yet. The vote says how many.
    """

    known: tuple[Key, ...]
    places: PendingVote | None
    new: dict[Key, Number]


class Logged:
    """Exchanges the numbers of each step. Ranks may log different ones, and not at every step.

    Numbers that all ranks know have places in a small all-reduce of their own, beside the vote: the vote's length, and
    with it the order in which NCCL sums the loss, must not depend on when a start heard of a number. A number that is
    new to the ranks is announced in the vote. When that is read they exchange it as an object, which waits for the
    device, and from the next step but one it has places. So no step's number is missing, and nothing needs to be saved.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._known: tuple[Key, ...] = ()

    def cast(self) -> PendingNumbers:
        """Ends the step for `numbers.log`, and begins the all-reduce of its numbers; before the step's vote."""
        logged, known = numbers.close_step(), self._known
        new = {key: number for key, number in logged.items() if key not in known}
        if not known:
            return PendingNumbers((), None, new)
        row = [place for key in known for place in (logged[key][1:] if key in logged else (0.0, 0))]
        return PendingNumbers(known, Vote.cast(self._world, row), new)

    def read(self, pending: PendingNumbers, new: float) -> dict[str, Number]:
        """The numbers of a step, from all ranks, by name. Raises BadNumbers on all ranks if there are too many, or one
        name is logged in two ways.

        Args:
            new: how many the ranks have announced in the vote.
        """
        if not (pending.places or new):
            return {}
        ranks: list[dict[Key, Number]] = [{} for _ in range(self._world.size)]
        if pending.places:
            for mine, row in zip(ranks, pending.places.read().rows, strict=True):
                of_each = zip(pending.known, row[::2], row[1::2], strict=True)
                mine |= {key: Number(key[1], value, int(count)) for key, value, count in of_each if count}
        if new:
            told: list[dict[Key, Number]] = [{}] * self._world.size
            dist.all_gather_object(told, {key: n._replace(value=n.value.item()) for key, n in pending.new.items()})
            for mine, others in zip(ranks, told, strict=True):
                mine |= others
            self._place({key for others in told for key in others})
        keys = sorted({key for mine in ranks for key in mine})
        return {key[0]: numbers.combined([mine[key] for mine in ranks if key in mine]) for key in keys}

    def _place(self, keys: set[Key]) -> None:
        """Gives places to those that have none."""
        self._known = tuple(sorted({*self._known, *keys}))
        names = [name for name, _ in self._known]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            kinds = " and ".join(kind for name, kind in self._known if name == twice[0])
            raise BadNumbers(f"the number {twice[0]!r} is logged as {kinds}: give each a name of its own")
        if len(names) > MOST:
            raise BadNumbers(
                f"{len(names)} numbers are logged, more than {MOST}: log fewer ({', '.join(names[:3])}, ...)"
            )
