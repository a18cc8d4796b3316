"""Sources on their way to worker processes."""

from __future__ import annotations

import pickle
from functools import lru_cache
from typing import NamedTuple

from pipelines import origin
from pipelines.errors import SourceError, first_line
from pipelines.resolve import failed
from pipelines.sources import Source, called, inventory


class Sent(NamedTuple):
    """A pickled source.

    Attributes:
        listing: hash of its classes and items, if the receiver is to compare it with its own; else empty.
    """

    pickled: bytes
    listing: str = ""


def sent(source: Source) -> tuple[Sent, Sent]:
    """What the first receiver and all others get: one comparison is enough. Raises SourceError."""
    try:
        pickled, _ = pickle.dumps(source), pickle.dumps(inventory(source)[1][:1])
    except Exception as error:
        raise SourceError(
            f"{called(source)} cannot be sent to worker processes ({first_line(error)}): open files and the like in "
            f"load, or in a cached property"
        ) from error
    return Sent(pickled, "" if source.stands else origin.listing(source)), Sent(pickled)


@lru_cache(1)  # a worker packs many shards of one source
def received(packet: Sent) -> Source:
    """The source, in a worker. Raises SourceError if it has changed on its way."""
    try:
        source: Source = pickle.loads(packet.pickled)
    except Exception as error:
        raise failed("the source", "of this pack", error, "cannot be made in a worker process") from error
    if packet.listing and origin.listing(source) != packet.listing:
        raise SourceError(
            f"{called(source)} lists other classes or items in another process: they must be the same each time, in "
            f"the same order, so sort what comes from a set or a folder"
        )
    return source
