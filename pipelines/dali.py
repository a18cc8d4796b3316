"""The DALI graph and the loader that drives it.

The index drives everything: for each step the loader knows which samples it needs and how each is to be shown. A few
threads read the bytes ahead in that order, one thread feeds them to DALI and collects its output, so neither
files nor decoding stop the training loop. DALI holds no random state.
"""

from __future__ import annotations

import os
import queue
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from threading import Event, Thread
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.augment import Augment, Views, fixed_views, random_views
from pipelines.order import REPLACE, Ints, Order, part, philox
from pipelines.shards import BadSample, Manifest, ShardError, ShardSet

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from nvidia.dali import Pipeline, fn, types

Device = Literal["cpu", "gpu"]
Inputs = Literal["mean_subtracted", "minus_one_to_one", "standardized"]
Feed = tuple[Sequence[NDArray[np.uint8] | None], NDArray[Any], NDArray[Any], NDArray[np.int32], NDArray[np.float32]]


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


def graph(
    source: Callable[[], Feed],
    *,
    batch: int,
    crop: int,
    resize: bool,
    std: Sequence[float],
    device: Device,
    device_id: int | None,
    threads: int,
    depth: int = 2,
) -> Pipeline:
    """decode -> resize of the region that the crop needs (or crop alone) -> mirror and normalise.

    `source` returns, for the n <= `batch` samples of a step: encoded images; where the region begins and where it ends
    as (y, x) in the original image, float32 [n, 2] (with `resize`), or the left top corner and the size as (x, y),
    int32 [n, 2] (without); mirror, int32 [n]; what to subtract from each channel, float32 [n, 3].

    Output: float32 NHWC. On the GPU the whole image is decoded: decoders of a region were seen to crash there
    (nvImageCodec issue 55).
    """
    pipeline = Pipeline(batch, threads, device_id, prefetch_queue_depth=depth)
    with pipeline:
        encoded, begin, end, mirror, mean = fn.external_source(source=source, num_outputs=5, batch=True)
        upright = {"output_type": types.RGB, "adjust_orientation": False}  # settled when the set was packed
        if not resize and device == "cpu":
            image = fn.decoders.image_slice(encoded, start=begin, shape=end, **upright)
        else:
            image = fn.decoders.image(encoded, device="mixed" if device == "gpu" else "cpu", **upright)
            if resize:
                image = fn.resize(
                    image,
                    resize_x=crop,
                    resize_y=crop,
                    roi_start=begin,
                    roi_end=end,
                    interp_type=types.INTERP_LINEAR,
                    subpixel_scale=False,  # nearest to torchvision and Pillow
                )
            else:
                image = fn.slice(image, start=begin, shape=end, axis_names="WH")
        image = fn.crop_mirror_normalize(
            image, mirror=mirror, mean=mean, std=list(std), dtype=types.FLOAT, output_layout="HWC"
        )
        pipeline.set_outputs(image)
    return pipeline


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
        self.steps = len(shards) // batch if training else -(-len(shards) // batch)
        self.mean, self.std = _scale(inputs, statistics)
        self.components = np.array(statistics.eigenvectors) * np.array(statistics.eigenvalues)
        self.threads = threads or len(os.sched_getaffinity(0))
        self.readers, self.ahead = readers, ahead
        self.read = read or shards.read
        self.resizing = shards.shorter_side != augment.resize
        self.waited = 0.0  # seconds that the consumer has waited for data
        self.bad: set[int] = set()  # samples that cannot be decoded

    def samples(self, epoch: int, step: int) -> tuple[Ints, int]:
        """The sample numbers of this rank at a step of an epoch, and the position of the first."""
        first = step * self.batch
        low, high = part(min(self.batch, len(self.shards) - first), self.rank, self.size)
        start, stop = first + low, first + high
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
        inputs = self._collect(pipeline) if len(wanted) else self._empty()
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
            scale = self.shards.sizes[samples] / views.size.astype(np.float64)
            begin, end = (
                np.ascontiguousarray((at * scale)[:, ::-1], np.float32) for at in (begin, begin + self.augment.crop)
            )
        return encoded, begin, end, views.mirror.astype(np.int32), self.mean - views.shift

    def _collect(self, pipeline: Pipeline) -> Tensor:
        (output,) = pipeline.run()
        pixels: Tensor = torch.utils.dlpack.from_dlpack(output.as_tensor())
        if pixels.is_cuda:  # DALI reuses its memory on its own stream; a copy of ours outlives that
            with torch.cuda.stream(torch.cuda.Stream(pixels.device)):  # type: ignore[no-untyped-call]
                pixels = pixels.clone()
                torch.cuda.current_stream().synchronize()
            pixels.record_stream(torch.cuda.default_stream(pixels.device))
        return pixels.permute(0, 3, 1, 2)

    def _empty(self) -> Tensor:
        side = self.augment.crop
        return torch.empty(0, 3, side, side, device="cpu" if self.device == "cpu" else f"cuda:{self.device_id}")


def _scale(inputs: Inputs, statistics: Manifest) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """What is subtracted from each channel, and what it is then divided by, in levels: float32 [3] each."""
    if inputs == "minus_one_to_one":
        return np.full(3, 127.5, np.float32), np.full(3, 127.5, np.float32)
    mean, std = (255 * np.array(values, np.float32) for values in (statistics.mean, statistics.std))
    return mean, std if inputs == "standardized" else np.ones(3, np.float32)
