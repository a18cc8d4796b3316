"""Loader: reads, decodes and delivers this rank's share of a plan.

For each step, the plan gives the samples and their views. Several threads read files ahead in that order; one thread
feeds them to the DALI graph and collects its output, so neither files nor decoding block the training loop. DALI holds
no random state.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from threading import Event, Thread
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipelines.augment import scale
from pipelines.dali import DEPTH, Decode, DecodeError, Feed, collect, feed_of, graph
from pipelines.handover import HandOver
from pipelines.manifest import Manifest, ShardError
from pipelines.misc import ceil_div
from pipelines.opened import ReadError
from pipelines.order import Ints, even_split
from pipelines.plan import Plan
from pipelines.reading import Encoded, Fetch, Reader
from pipelines.search import undecodable
from pipelines.speech import say

if TYPE_CHECKING:
    from nvidia.dali import Pipeline

READY = 2  # finished batches queued for the consumer
SUSPECTS = DEPTH + 2  # steps, from the one being collected, that may have caused an error DALI reports now
Unreadable = list[ReadError | ShardError]  # why a rank cannot read its samples: empty, or of one error
Keys = Callable[[int, Ints], Ints]  # (step of the epoch, positions in it) -> one number per position, int64 [n]


class Batch(NamedTuple):
    """A rank's share of a global batch.

    Attributes:
        inputs: pixels in levels plus lighting minus the mean, float32 [n, 3, crop, crop], channels_last.
        labels: int64 [n].
        samples: sample numbers in the shard set, int64 [n].
        start: position in the epoch of the first sample.
        keys: numbers from the `keys` of `Loader.epoch`, int64 [n]; zeros without them.
        replaced: number of samples that replace an undecodable sample missing from the quarantine.
    """

    inputs: Tensor
    labels: Tensor
    samples: Ints
    start: int
    keys: Tensor
    replaced: int = 0


@dataclass(frozen=True)
class Read:
    """Reading settings.

    Attributes:
        readers: number of threads that read files ahead.
        ahead: number of batches read ahead.
        read: returns the bytes of a sample, uint8 [size]; None: the shard set's. Replaced to inject faults and delays.
    """

    readers: int = 32
    ahead: int = 4
    read: Fetch | None = None


DECODE, READING = Decode(), Read()  # as in the paper, on this machine's CPUs


class Loader:
    """One rank's batches of a plan, the same number on every rank; the last of a fixed plan may be short or empty.

    Args:
        statistics: the manifest of the *training* set, for mean and standard deviation.
        batch: the global batch, in samples.
        dp_rank, dp_size: this data-parallel rank, and their number.

    Attributes:
        steps: batches per epoch.
        mean: mean subtracted from each channel, in levels, float32 [3].
        waited: seconds that the consumer has waited for data.
        bad: samples that are not shown: the quarantined ones, and those found undecodable since.
        told: called with a message about each of the latter.
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
        self.reader = Reader(plan.shards, threads=reading.readers, fetch=reading.read, blame=self._blame)
        self.resizing = plan.shards.sides != (plan.augment.resize, plan.augment.resize)
        self._graph = partial(
            graph, augment=plan.augment, resize=self.resizing, turn=plan.shards.turned, std=std.tolist(), decode=decode
        )
        self._hand_over = HandOver(decode.place, std)
        self.waited = 0.0
        self._quarantined = frozenset(plan.shards.quarantined.tolist())
        self.bad = set(self._quarantined)
        self.told: Callable[[str], None] = lambda why: say(f"{why}: another sample takes its place")

    def samples(self, epoch: int, step: int) -> tuple[Ints, int]:
        """Sample numbers of this rank at a step of an epoch, and the position of the first."""
        first = step * self.batch
        low, high = even_split(min(self.batch, len(self.plan) - first), self.dp_rank, self.dp_size)
        return self.plan.samples(epoch, first + low, first + high), first + low

    def usable(self, epoch: int, step: int) -> tuple[Ints, int]:
        """Like `samples`, with bad samples replaced."""
        samples, start = self.samples(epoch, step)
        return self._substituted(epoch, samples, start), start

    def names(self, epoch: int, step: int) -> list[str]:
        """Tar and member of each sample of the whole global batch of a step. A sample that only another rank knows to
        be bad has its own name, not its substitute's."""
        first = step * self.batch
        samples = self.plan.samples(epoch, first, min(first + self.batch, len(self.plan)))
        samples = self._substituted(epoch, samples, first)
        return [self.shards.name(int(sample)) for sample in samples]

    def upcoming(self, epoch: int, step: int) -> Ints:
        """Numbers of the shards that are needed from a step of an epoch on, in that order, int64 [n]."""
        return self.plan.tars(epoch, step * self.batch, len(self.plan))

    def _substituted(self, epoch: int, samples: Ints, start: int) -> Ints:
        """Replaces the bad ones of these samples, which start at position `start`, in place."""
        for i, sample in enumerate(samples.tolist()) if self.bad else ():
            if sample in self.bad:
                samples[i] = self.plan.substitute(epoch, start + i, self.bad)
        return samples

    def epoch(
        self, epoch: int = 0, start: int = 0, keys: Keys | None = None, unread: Unreadable | None = None
    ) -> Generator[Batch, None, None]:
        """Yields the batches of an epoch from step `start` on, with a number per sample if `keys` is given.

        Raises ShardError if a tar is not the indexed one, and ReadError if it cannot be read. With `unread`, the
        error is appended to it instead and all later batches are NaN, so that a rank stays with the others until
        all of them know.
        """
        stop = Event()
        ready: queue.Queue[Batch | BaseException | None] = queue.Queue(READY)
        driver = Thread(
            target=self._drive, args=(epoch, start, keys or _no_keys, ready, stop), name="loader", daemon=True
        )
        driver.start()
        try:
            while True:
                began = time.perf_counter()
                item = ready.get()
                self.waited += time.perf_counter() - began
                if item is None:
                    return
                if isinstance(item, ReadError | ShardError) and unread is not None:
                    unread.append(item)
                    yield from (self._blank(epoch, step) for step in range(start, self.steps))
                    return
                if isinstance(item, BaseException):
                    raise item
                yield item
                start += 1
        finally:
            stop.set()
            while driver.is_alive():  # it may be blocked on a full queue
                with suppress(queue.Empty):
                    ready.get(timeout=0.01)
            driver.join()
            self.shards.keep(np.empty(0, np.int64))

    def _drive(
        self, epoch: int, step: int, keys: Keys, ready: queue.Queue[Batch | BaseException | None], stop: Event
    ) -> None:
        """Puts the batches from `step` on into `ready`, then None, or the error that ended them."""
        try:
            self._hand_over.enter_thread()
            while step < self.steps and not stop.is_set():
                # One pipeline per epoch: building, filling and destroying it costs 30 ms on the CPU, for training and
                # validation together 0.1 % of an epoch of one minute; more on a GPU, where it was not measured. A
                # failed pipeline cannot be run again.
                feeds = self.feeds(epoch, range(step, self.steps))
                try:
                    pipeline = self._build(feeds, batch=ceil_div(self.batch, self.dp_size))
                    while step < self.steps and not stop.is_set():
                        ready.put(self._batch(pipeline, epoch, step, keys))
                        step += 1
                except DecodeError:  # the pipeline is lost: restart this step
                    if not self._find_bad(epoch, range(step, min(step + SUSPECTS, self.steps))):
                        raise
                finally:
                    feeds.close()
            ready.put(None)
        except BaseException as error:  # any error: otherwise the consumer would wait for ever
            ready.put(error)

    def _batch(self, pipeline: Pipeline, epoch: int, step: int, keys: Keys) -> Batch:
        wanted, start = self.samples(epoch, step)
        side = self.augment.crop
        shown = collect(pipeline) if len(wanted) else [torch.empty(0, side, side, 3)]
        samples = self._substituted(epoch, wanted.copy(), start)  # only now: reading may have found bad ones
        numbers = (self.shards.labels(samples), keys(step, start + np.arange(len(samples))))
        inputs, labels, keyed = self._hand_over(shown, *map(torch.from_numpy, numbers))
        replaced = sum(sample not in self._quarantined for sample in wanted[wanted != samples].tolist())
        return Batch(inputs, labels, samples, start, keyed, replaced)

    def _blank(self, epoch: int, step: int) -> Batch:
        """A batch of the usual shapes with NaN inputs, for a step that was not read."""
        samples, start = self.samples(epoch, step)
        n, side, place = len(samples), self.augment.crop, self.decode.place
        inputs = torch.full((n, 3, side, side), torch.nan, device=place).to(memory_format=torch.channels_last)
        numbers = torch.zeros(2, n, dtype=torch.int64, device=place)
        return Batch(inputs, numbers[0], samples, start, numbers[1])

    def feeds(self, epoch: int, steps: range) -> Generator[Feed, None, None]:
        """Yields the graph's inputs for each step while the files of later steps are being read.

        Steps without samples for this rank are skipped: DALI takes no empty batch.
        """
        # Lazy: a sample found bad before its step begins is replaced without being read.
        planned = (self.usable(epoch, step) for step in steps)
        with closing(self.reader.ahead((share for share in planned if len(share[0])), self.reading.ahead)) as read:
            for samples, start, encoded in read:
                until = start + (self.reading.ahead + 2) * self.batch  # what may be being read by now
                self.shards.keep(self.plan.tars(epoch, start, min(until, len(self.plan))))
                # Some were damaged on disk and are now known to be bad: read the step again with substitutes, which
                # may be damaged as well. This is rare enough to reread all of its samples.
                while any(data is None for data in encoded):
                    samples, start = self.usable(epoch, start // self.batch)
                    encoded = self.reader.read(samples)
                yield self._feed(epoch, encoded, samples, start)

    def _blame(self, sample: int, why: str) -> None:
        if sample not in self.bad:
            self.bad.add(sample)
            self.told(why)

    def _feed(self, epoch: int, encoded: Encoded, samples: Ints, start: int) -> Feed:
        return feed_of(encoded, self.plan.views(epoch, samples, start), self.augment.crop, self.mean)

    def _find_bad(self, epoch: int, steps: range) -> bool:
        """Decodes the samples of these steps one by one, as they failed together, and marks as bad those that fail
        again. Returns True if there are any."""
        known = len(self.bad)
        for step in steps:
            samples, start = self.usable(epoch, step)
            read = [(i, data) for i, data in enumerate(self.reader.read(samples)) if data is not None]
            suspects = [self._feed(epoch, [data], samples[i : i + 1], start + i) for i, data in read]
            for place in undecodable(suspects, partial(self._build, batch=1, depth=1)):
                sample = int(samples[read[place][0]])
                self._blame(sample, f"{self.shards.name(sample)} cannot be decoded")
        return len(self.bad) > known

    def _build(self, feeds: Iterator[Feed], *, batch: int, depth: int = DEPTH) -> Pipeline:
        pipeline = self._graph(lambda: next(feeds), batch=batch, depth=depth)
        pipeline.build()
        return pipeline


def _no_keys(step: int, positions: Ints) -> Ints:
    return np.zeros_like(positions)
