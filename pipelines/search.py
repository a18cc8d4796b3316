"""The search for samples that DALI cannot decode: it loses a whole pipeline to one of them and does not say which."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from pipelines.dali import Feed

if TYPE_CHECKING:
    from nvidia.dali import Pipeline


def undecodable(feeds: Sequence[Feed], build: Callable[[Iterator[Feed]], Pipeline]) -> Iterator[int]:
    """Decode one by one what failed together. Yields the places of the feeds that fail again.

    Args:
        feeds: of one sample each.
        build: makes a pipeline of batch size and depth 1 from feeds. A failure costs one.
    """
    done = 0
    while done < len(feeds):
        pipeline = build(iter(feeds[done:]))
        for i in range(done, len(feeds)):
            done = i + 1
            try:
                pipeline.run()
            except RuntimeError:
                yield i
                break
