"""The loader that drives the DALI graph.

The index drives everything: for each step the loader knows which samples it needs and how each is to be shown. A few
threads read the bytes ahead in that order, one thread feeds them to DALI and collects its output, so neither
files nor decoding stop the training loop. DALI holds no random state.
"""

from __future__ import annotations

import os
import queue
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from threading import Event, Thread
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.augment import Augment, Views, fixed_views, random_views
from pipelines.dali import Device, Feed, Inputs, Pipeline, collect, graph, scale
from pipelines.order import REPLACE, Ints, Order, even_split, philox
from pipelines.shards import BadSample, Manifest, ShardError, ShardSet


class Batch(NamedTuple):
    """A rank's part of a global batch.

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


class Loader:
    """One rank's batches of a shard set.

    Training visits each sample at most once an epoch, in the order of `order.py`, and drops the incomplete tail.
    Otherwise every sample comes exactly once, in the order of the index, in equal numbers of batches on all ranks, some
    of them short or empty.

    Args:
        shards: the data.
        statistics: the manifest of the *training* set, for mean, deviation and lighting.
        batch: the global batch, in samples.
        rank, size: this data-parallel rank, and how many there are.
        device: where DALI decodes; "gpu" needs `device_id`.
        inputs: mean_subtracted as the paper, minus_one_to_one, or standardized (divided by the standard deviation too).
        threads: DALI's decoding threads; 0: the CPUs of this process.
        readers: threads that read files ahead.
        ahead: batches that are read ahead.
        read: reads the bytes of a sample; another one is given to inject faults.
    """

    def __init__(
        self,
        shards: ShardSet,
        augment: Augment,
        statistics: Manifest,
        *,
        batch: int,
        training: bool,
        seed: int = 0,
        shuffle_shards: int = 16,
        rank: int = 0,
        size: int = 1,
        device: Device = "cpu",
        device_id: int | None = None,
        inputs: Inputs = "mean_subtracted",
        threads: int = 0,
        readers: int = 32,
        ahead: int = 4,
        read: Callable[[int], NDArray[np.uint8]] | None = None,
    ) -> None:
        self.shards, self.augment, self.training, self.seed = shards, augment, training, seed
        self.batch, self.rank, self.size = batch, rank, size
        self.device: Device = device
        self.device_id = device_id
        self.order = Order(shards.shard_samples, seed, shuffle_shards)
        self.chosen: Ints | None = None
        self.steps = len(shards) // batch if training else -(-len(shards) // batch)
        self.mean, self.std = scale(inputs, statistics)
        self.components = np.array(statistics.eigenvectors) * np.array(statistics.eigenvalues)
        self.threads = threads or len(os.sched_getaffinity(0))
        self.readers, self.ahead = readers, ahead
        self.read = read or shards.read
        self.resizing = shards.shorter_side != augment.resize
        self.waited = 0.0  # seconds that the consumer has waited for data
        self.bad: set[int] = set()  # samples that cannot be decoded

    def choose(self, samples: Ints) -> None:
        """From now on an epoch is all of these `samples`, int64 [n], in this order."""
        self.chosen, self.steps = samples, -(-len(samples) // self.batch)

    def samples(self, epoch: int, step: int) -> tuple[Ints, int]:
        """The sample numbers of this rank at a step of an epoch, and the position of the first."""
        first = step * self.batch
        total = len(self.shards) if self.chosen is None else len(self.chosen)
        low, high = even_split(min(self.batch, total - first), self.rank, self.size)
        start, stop = first + low, first + high
        if self.chosen is not None:
            return self.chosen[start:stop].copy(), start
        return self.order.samples(epoch, start, stop) if self.training else np.arange(start, stop), start

    def usable(self, epoch: int, step: int) -> tuple[Ints, int]:
        """As `samples`, another in the place of each bad one: which follows from (seed, epoch, position) alone, so
        that all world sizes choose the same."""
        samples, start = self.samples(epoch, step)
        if len(self.bad) == len(self.shards):
            raise ShardError(f"no sample of {self.shards.directory} can be decoded: pack it anew")
        for i in np.flatnonzero(np.isin(samples, list(self.bad))) if self.bad else ():
            bits = philox(self.seed, epoch, REPLACE, start + int(i))
            while int(samples[i]) in self.bad:
                samples[i] = bits.random_raw() % len(self.shards)
        return samples, start

    def views(self, epoch: int, samples: Ints, start: int) -> Views:
        """How these samples are shown at positions `start` ... of an epoch. Without training the number of the epoch is
        that of the fixed view: 0 the centre, up to 9."""
        sizes = self._sizes(samples)
        if self.training:
            return random_views(sizes, self.augment, self.components, seed=self.seed, epoch=epoch, start=start)
        return fixed_views(sizes, self.augment, view=epoch)

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """The batches of steps `start` ... of an epoch. Raises ShardError where a tar is not what was indexed."""
        stop = Event()
        ready: queue.Queue[Batch | Exception | None] = queue.Queue(2)
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
        try:
            while step < self.steps and not stop.is_set():
                feed = self._feed(epoch, range(step, self.steps))
                try:
                    pipeline = self._build(feed)
                    while step < self.steps and not stop.is_set():
                        ready.put(self._batch(pipeline, epoch, step))
                        step += 1
                except RuntimeError:  # DALI's: a sample of the next few steps cannot be decoded; the pipeline is lost
                    if not self._find_bad(epoch, range(step, min(step + 4, self.steps))):
                        raise
                finally:
                    feed.close()
            ready.put(None)
        except Exception as error:
            ready.put(error)

    def _batch(self, pipeline: Pipeline, epoch: int, step: int) -> Batch:
        wanted, _ = self.samples(epoch, step)
        inputs = collect(pipeline) if len(wanted) else self._empty()
        samples, first = self.usable(epoch, step)  # after that: reading may have found some to be damaged
        labels = torch.from_numpy(self.shards.index["label"][samples].astype(np.int64)).to(inputs.device)
        return Batch(inputs, labels, samples, first, replaced=int((wanted != samples).sum()))

    def _find_bad(self, epoch: int, steps: range) -> bool:
        """Decode the samples of these steps one by one, the way they failed together; name those that fail again."""
        todo = [
            (int(s), start + i)
            for samples, start in (self.usable(epoch, step) for step in steps)
            for i, s in enumerate(samples)
        ]
        known = len(self.bad)
        while todo:
            pipeline = self._build((self._one(epoch, *one) for one in todo), alone=True)
            for i, (sample, _) in enumerate(todo):
                try:
                    pipeline.run()
                except RuntimeError:
                    self._blame(sample, f"{self.shards.name(sample)} cannot be decoded")
                    todo = todo[i + 1 :]
                    break
            else:
                break
        return len(self.bad) > known

    def _one(self, epoch: int, sample: int, position: int) -> Feed:
        samples = np.array([sample])
        return self._arguments([self.read(sample)], samples, self.views(epoch, samples, position))

    def _sizes(self, samples: Ints) -> Ints:
        return self.shards.sizes[samples].astype(np.int64)

    def _build(self, feed: Iterator[Feed], *, alone: bool = False) -> Pipeline:
        pipeline = graph(
            lambda: next(feed),
            batch=1 if alone else -(-self.batch // self.size),
            depth=1 if alone else 2,
            crop=self.augment.crop,
            resize=self.resizing,
            std=self.std.tolist(),
            device=self.device,
            device_id=self.device_id,
            threads=self.threads,
        )
        pipeline.build()
        return pipeline

    def _feed(self, epoch: int, steps: range) -> Generator[Feed, None, None]:
        """What DALI's external source returns at each step, with the files of the next steps already being read."""
        with ThreadPoolExecutor(self.readers, "read") as pool:
            ahead: deque[tuple[Ints, int, list[Future[list[NDArray[np.uint8] | None]]]]] = deque()
            plan = (self.usable(epoch, step) for step in steps)
            try:
                while True:
                    for samples, first in plan:
                        if len(samples):
                            pieces = np.array_split(samples, min(self.readers, len(samples)))
                            ahead.append((samples, first, [pool.submit(self._read, piece) for piece in pieces]))
                        if len(ahead) > self.ahead:
                            break
                    if not ahead:
                        return
                    samples, first, futures = ahead.popleft()
                    encoded = [data for future in futures for data in future.result()]
                    while any(data is None for data in encoded):  # damaged on the disk
                        samples, first = self.usable(epoch, first // self.batch)
                        encoded = self._read(samples)
                    yield self._arguments(encoded, samples, self.views(epoch, samples, first))
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _read(self, samples: Ints) -> list[NDArray[np.uint8] | None]:
        """The encoded images; None in the place of a damaged one, which is then known as bad."""
        encoded: list[NDArray[np.uint8] | None] = []
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

    def _arguments(self, encoded: Sequence[NDArray[np.uint8] | None], samples: Ints, views: Views) -> Feed:
        begin: NDArray[Any] = views.corner
        end: NDArray[Any] = np.full_like(begin, self.augment.crop)
        if self.resizing:
            ratio = self.shards.sizes[samples] / views.size.astype(np.float64)
            begin, end = (
                np.ascontiguousarray((at * ratio)[:, ::-1], np.float32) for at in (begin, begin + self.augment.crop)
            )
        return encoded, begin, end, views.mirror.astype(np.int32), self.mean - views.shift

    def _empty(self) -> Tensor:
        side = self.augment.crop
        return torch.empty(0, 3, side, side, device="cpu" if self.device == "cpu" else f"cuda:{self.device_id}")
