"""The loader: reads, decodes and delivers this rank's share of what a plan says.

For each step the plan tells which samples come and how each is shown. A few threads read the files ahead in that order,
one thread feeds them to the DALI graph and collects its output, so neither files nor decoding stop the training loop.
DALI holds no random state.
"""

from __future__ import annotations

import queue
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.augment import Views
from pipelines.dali import DEPTH, Decode, Feed, collect, graph, scale
from pipelines.misc import ceil_div
from pipelines.order import Ints, even_split
from pipelines.plan import Plan
from pipelines.shards import BadSample, Manifest

if TYPE_CHECKING:
    from nvidia.dali import Pipeline

READY = 2  # batches that wait for the consumer
SUSPECTS = DEPTH + 2  # steps, from the one that is collected, in which DALI may have met what it reports now

Encoded = list[NDArray[np.uint8] | None]  # files' bytes; None in the place of a damaged one


class Batch(NamedTuple):
    """A rank's share of a global batch.

    Attributes:
        inputs: pixels in levels plus lighting minus the mean, float32 [n, 3, crop, crop], channels_last.
        labels: int64 [n].
        samples: sample numbers in the shard set, int64 [n].
        start: position in the epoch of the first of them.
        replaced: how many of them stand for a sample that cannot be decoded.
    """

    inputs: Tensor
    labels: Tensor
    samples: Ints
    start: int
    replaced: int = 0

    @property
    def positions(self) -> Ints:
        """Of its samples in the epoch, int64 [n]."""
        return self.start + np.arange(len(self.labels))


@dataclass(frozen=True)
class Read:
    """Settings of the reading.

    Attributes:
        readers: threads that read files ahead.
        ahead: batches that are read ahead.
        read: returns the bytes of a sample, uint8 [size]; None: ShardSet.read. Another one injects faults and delays.
    """

    readers: int = 32
    ahead: int = 4
    read: Callable[[int], NDArray[np.uint8]] | None = None


DECODE, READING = Decode(), Read()  # as the paper, on this machine's CPUs


class _Reading(NamedTuple):  # a step whose files are being read, in pieces that follow each other
    samples: Ints
    start: int
    pieces: list[Future[Encoded]]


class _Suspect(NamedTuple):
    sample: int
    position: int
    data: NDArray[np.uint8]


class Loader:
    """One rank's batches of a plan: equally many on all ranks; at the end of a fixed plan some are short or empty.

    Args:
        statistics: the manifest of the *training* set, for mean and deviation.
        batch: the global batch, in samples.
        dp_rank, dp_size: this data-parallel rank, and how many there are.

    Attributes:
        steps: batches in an epoch.
        mean: what is subtracted from each channel, in levels, float32 [3].
        waited: seconds that the consumer has waited for data.
        bad: samples that were found to be undecodable.
    """

    def __init__(
        self,
        plan: Plan,
        statistics: Manifest,
        *,
        batch: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        decode: Decode = DECODE,
        reading: Read = READING,
    ) -> None:
        self.plan, self.shards, self.augment = plan, plan.shards, plan.augment
        self.batch, self.dp_rank, self.dp_size = batch, dp_rank, dp_size
        self.steps = plan.steps(batch)
        self.mean, std = scale(decode.inputs, statistics)
        self.decode, self.reading = decode, reading
        self.read = reading.read or plan.shards.read
        self.resizing = plan.shards.sides != (plan.augment.resize, plan.augment.resize)
        crop = plan.augment.crop
        self._graph = partial(graph, crop=crop, resize=self.resizing, std=std.tolist(), decode=decode)
        self.waited = 0.0
        self.bad: set[int] = set()

    def samples(self, epoch: int, step: int) -> tuple[Ints, int]:
        """The sample numbers of this rank at a step of an epoch, and the position of the first."""
        first = step * self.batch
        low, high = even_split(min(self.batch, len(self.plan) - first), self.dp_rank, self.dp_size)
        return self.plan.samples(epoch, first + low, first + high), first + low

    def usable(self, epoch: int, step: int) -> tuple[Ints, int]:
        """Like `samples`, with bad samples replaced."""
        samples, start = self.samples(epoch, step)
        if self.bad:
            for i in np.flatnonzero(np.isin(samples, list(self.bad))):
                samples[i] = self.plan.substitute(epoch, start + int(i), self.bad)
        return samples, start

    def names(self, epoch: int, step: int) -> list[str]:
        """Where a person finds the samples of the whole global batch of a step: tar and member of each."""
        first = step * self.batch
        samples = self.plan.samples(epoch, first, min(first + self.batch, len(self.plan)))
        return [self.shards.name(int(sample)) for sample in samples]

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """The batches of steps `start` ... of an epoch. Raises ShardError if a tar is not what was indexed."""
        stop = Event()
        ready: queue.Queue[Batch | Exception | None] = queue.Queue(READY)
        driver = Thread(target=self._drive, args=(epoch, start, ready, stop), name="loader", daemon=True)
        driver.start()
        try:
            while True:
                began = time.perf_counter()
                item = ready.get()
                self.waited += time.perf_counter() - began
                if item is None:
                    return
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            stop.set()
            while driver.is_alive():  # it may stand at a full queue
                with suppress(queue.Empty):
                    ready.get(timeout=0.01)
            driver.join()

    def _drive(self, epoch: int, step: int, ready: queue.Queue[Batch | Exception | None], stop: Event) -> None:
        """Put the batches from `step` on into `ready`, None after the last one, or the error that ended them."""
        try:
            while step < self.steps and not stop.is_set():
                feeds = self.feeds(epoch, range(step, self.steps))
                try:
                    pipeline = self._build(feeds, batch=ceil_div(self.batch, self.dp_size))
                    while step < self.steps and not stop.is_set():
                        ready.put(self._batch(pipeline, epoch, step))
                        step += 1
                except RuntimeError:  # DALI's: a sample cannot be decoded. The pipeline is lost; begin this step anew
                    if not self._find_bad(epoch, range(step, min(step + SUSPECTS, self.steps))):
                        raise
                finally:
                    feeds.close()
            ready.put(None)
        except Exception as error:
            ready.put(error)

    def _batch(self, pipeline: Pipeline, epoch: int, step: int) -> Batch:
        wanted, _ = self.samples(epoch, step)
        side = self.augment.crop
        inputs = collect(pipeline) if len(wanted) else torch.empty(0, 3, side, side, device=self.decode.output)
        samples, start = self.usable(epoch, step)  # after that: reading may have found some to be damaged
        labels = torch.from_numpy(self.shards.labels(samples)).to(inputs.device)
        return Batch(inputs, labels, samples, start, replaced=int((wanted != samples).sum()))

    def feeds(self, epoch: int, steps: range) -> Generator[Feed, None, None]:
        """The graph's inputs for each of these steps, while the files of the steps after it are being read.

        A step without samples for this rank is left out: DALI takes no empty batch.
        """
        # Lazy: a sample that was found to be bad by the time a step is begun is replaced before it is read in vain.
        planned = (self.usable(epoch, step) for step in steps)
        begun: deque[_Reading] = deque()
        with ThreadPoolExecutor(self.reading.readers, "read") as pool:
            try:
                while True:
                    for samples, start in planned:  # goes on where the last round broke off
                        if len(samples):
                            begun.append(self._begin(pool, samples, start))
                        if len(begun) > self.reading.ahead:  # one to deliver now, and `ahead` behind it
                            break
                    if not begun:
                        return
                    samples, start, pieces = begun.popleft()
                    encoded = [data for piece in pieces for data in piece.result()]
                    # Some were damaged on the disk, and are known as bad now: read the step again with substitutes,
                    # which may be damaged as well. It is rare enough to read all of its samples again.
                    while any(data is None for data in encoded):
                        samples, start = self.usable(epoch, start // self.batch)
                        encoded = self._read(samples)
                    yield self._feed(encoded, samples, self.plan.views(epoch, samples, start))
            finally:  # the consumer may leave in the middle: what is not being read yet is not read at all
                pool.shutdown(wait=False, cancel_futures=True)

    def _begin(self, pool: ThreadPoolExecutor, samples: Ints, start: int) -> _Reading:
        """Begin to read the files of a step, a piece per thread: fewer hand-overs than one per file."""
        pieces = np.array_split(samples, min(self.reading.readers, len(samples)))
        return _Reading(samples, start, [pool.submit(self._read, piece) for piece in pieces])

    def _read(self, samples: Ints) -> Encoded:
        """The encoded images; a damaged one is None, and known as bad from now on."""
        encoded: Encoded = []
        for sample in samples:
            try:
                encoded.append(self.read(int(sample)))
            except BadSample as error:
                self._blame(int(sample), str(error))
                encoded.append(None)
        return encoded

    def _blame(self, sample: int, why: str) -> None:
        if sample not in self.bad:
            self.bad.add(sample)
            print(f"{why}: another sample takes its place", file=sys.stderr)

    def _feed(self, encoded: Encoded, samples: Ints, views: Views) -> Feed:
        begin: NDArray[Any] = views.corner
        end: NDArray[Any] = np.full_like(begin, self.augment.crop)
        if self.resizing:
            # The crop's edges in the original image, as (y, x): DALI resizes that region alone.
            ratio = self.shards.sizes(samples) / views.size.astype(np.float64)
            begin, end = (
                np.ascontiguousarray((edge * ratio)[:, ::-1], np.float32)
                for edge in (views.corner, views.corner + self.augment.crop)
            )
        # Lighting adds the same to all pixels of an image: one subtraction does it and the mean.
        return Feed(encoded, begin, end, views.mirror.astype(np.int32), self.mean - views.shift)

    def _find_bad(self, epoch: int, steps: range) -> bool:
        """Decode the samples of these steps one by one, the way they failed together; blame those that fail again.
        True if there are any."""
        known = len(self.bad)
        for step in steps:
            samples, start = self.usable(epoch, step)
            read = enumerate(zip(samples, self._read(samples), strict=True))
            suspects = [_Suspect(int(sample), start + i, data) for i, (sample, data) in read if data is not None]
            while suspects:
                suspects = suspects[self._decode_until_bad(epoch, suspects) :]
        return len(self.bad) > known

    def _decode_until_bad(self, epoch: int, suspects: Sequence[_Suspect]) -> int:
        """Decode these up to the first bad one, with which the pipeline is lost. Returns how many were looked at."""
        pipeline = self._build((self._one(epoch, suspect) for suspect in suspects), batch=1, depth=1)
        for done, suspect in enumerate(suspects, 1):
            try:
                pipeline.run()
            except RuntimeError:
                self._blame(suspect.sample, f"{self.shards.name(suspect.sample)} cannot be decoded")
                return done
        return len(suspects)

    def _one(self, epoch: int, suspect: _Suspect) -> Feed:
        samples = np.array([suspect.sample])
        return self._feed([suspect.data], samples, self.plan.views(epoch, samples, suspect.position))

    def _build(self, feeds: Iterator[Feed], *, batch: int, depth: int = DEPTH) -> Pipeline:
        pipeline = self._graph(lambda: next(feeds), batch=batch, depth=depth)
        pipeline.build()
        return pipeline
