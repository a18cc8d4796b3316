"""Search for samples that DALI cannot decode: a single one kills the whole pipeline, and DALI does not say which."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from pipelines.dali import Feed

if TYPE_CHECKING:
    from nvidia.dali import Pipeline


def undecodable(feeds: Sequence[Feed], build: Callable[[Iterator[Feed]], Pipeline]) -> Iterator[int]:
    """Decodes one by one the feeds that failed together. Yields the positions of those that fail again.

    Args:
        feeds: one sample each.
        build: builds a pipeline of batch size and depth 1 from feeds. Each failure costs one pipeline.
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
