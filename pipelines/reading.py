"""Read-ahead: the encoded images of the next steps are fetched while the current ones are decoded."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import numpy as np
from numpy.typing import NDArray

from pipelines.order import Ints
from pipelines.shards import BadSample, ShardSet

Encoded = list[NDArray[np.uint8] | None]  # file contents; None for a damaged file
Fetch = Callable[[int], NDArray[np.uint8]]


class Reader:
    """Reads samples with several threads.

    A single thread takes whatever part of a step is in the page cache: more would only contend for Python's lock. Reads
    from disk are spread over all threads, one outstanding read per thread. The kernel gets no advance notice
    (posix_fadvise): WILLNEED on a whole set of 2,944 images halved the time of a first epoch (168 to 222 ms instead of
    329 to 404), but a rank needs only 1/dp_size of each block of shards and would have all of it read.

    Args:
        threads: number of concurrent reads.
        fetch: returns the bytes of a sample, uint8 [size]; None: read from the shard set.
        blame: called with the number of a damaged sample and what is wrong with it, from any thread.
    """

    def __init__(
        self, shards: ShardSet, *, threads: int, fetch: Fetch | None, blame: Callable[[int, str], None]
    ) -> None:
        self.threads, self.blame = threads, blame
        self.reads = _each(fetch) if fetch else shards.reads
        self.cached = _none if fetch else shards.cached

    def ahead(self, shares: Iterator[tuple[Ints, int]], steps: int) -> Generator[tuple[Ints, int, Encoded], None, None]:
        """Yields shares of samples, each with its start and encoded images, while the next `steps` are being read."""
        begun: deque[tuple[Ints, int, Future[Encoded], list[tuple[Ints, Future[Encoded]]]]] = deque()
        pool = ThreadPoolExecutor(self.threads, "read")
        try:
            while True:
                for samples, start in shares:  # continues where the last round broke off
                    misses: list[tuple[Ints, Future[Encoded]]] = []
                    begun.append((samples, start, pool.submit(self._begin, pool, samples, misses), misses))
                    if len(begun) > steps:  # one to deliver now, `steps` in flight
                        break
                if not begun:
                    return
                samples, start, first, misses = begun.popleft()
                yield samples, start, _filled(first.result(), misses)
        finally:  # the consumer may leave early: cancel what is queued, wait for nothing
            pool.shutdown(wait=False, cancel_futures=True)

    def read(self, samples: Ints) -> Encoded:
        """Encoded images, read one after the other; a damaged one is None and reported to `blame`."""
        encoded: Encoded = []
        for sample, read in zip(samples.tolist(), self.reads(samples), strict=True):
            try:
                encoded.append(read())
            except BadSample as error:
                self.blame(sample, str(error))
                encoded.append(None)
        return encoded

    def _begin(self, pool: ThreadPoolExecutor, samples: Ints, misses: list[tuple[Ints, Future[Encoded]]]) -> Encoded:
        """What is in memory. Starts to read the rest, one piece per thread: fewer hand-overs than one per file."""
        encoded = self.cached(samples)
        missing = np.flatnonzero([data is None for data in encoded])
        pieces = np.array_split(missing, min(self.threads, len(missing))) if len(missing) else []
        misses += [(piece, pool.submit(self.read, samples[piece])) for piece in pieces]
        return encoded


def _filled(encoded: Encoded, misses: list[tuple[Ints, Future[Encoded]]]) -> Encoded:
    for places, piece in misses:
        for place, data in zip(places, piece.result(), strict=True):
            encoded[place] = data
    misses.clear()  # free this step's data while the caller waits for the next one
    return encoded


def _none(samples: Ints) -> Encoded:
    return [None] * len(samples)


def _each(fetch: Fetch) -> Callable[[Ints], Iterator[Callable[[], NDArray[np.uint8]]]]:
    return lambda samples: (partial(fetch, sample) for sample in samples.tolist())
