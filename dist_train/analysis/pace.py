"""One rank of `speed`: times the trainer of a run and its loader. Nothing is written, and no weight changes."""

from __future__ import annotations

import resource
import socket
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import asdict
from itertools import count, islice, repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional as F

from dist_train import build
from dist_train.config import Config
from dist_train.models.dropout import keys_of_epoch, mask_keys
from dist_train.monitor.terminal import Terminal
from dist_train.outcomes import Diverged, Refused
from dist_train.ranks.vote import Vote
from dist_train.ranks.watch import Watch
from dist_train.ranks.world import World
from dist_train.rundir.directory import RunDirectory
from dist_train.train import Pending, Trainer
from pipelines.dali import DEPTH
from pipelines.loader import READY, Batch
from pipelines.manifest import Manifest
from pipelines.order import even_split
from pipelines.shards import ShardSet

SECONDS = 5.0  # limit of a measurement
MOST = 2000  # steps of a measurement, however short they are; it has one at least
# Steps that are not measured: what the first ones compile, allocate or try out. On a GPU DDP waits for the device in
# its first ten, to measure itself (and in every hundredth).
WARM_UP = {"cpu": 2, "cuda": 12}
COMPUTED = 5  # forward and backward passes without the other ranks, at most
BUCKET = 25 * 2**20  # bytes of gradients that DDP sends at a time


class Stretch(NamedTuple):
    """Duration of a number of steps on this rank. CPU seconds are those of all threads of the process."""

    steps: int
    images: int
    seconds: float
    cpu_seconds: float
    waited_seconds: float

    @property
    def step_seconds(self) -> float:
        return self.seconds / self.steps


class Nothing(ShardSet):
    """Stand-in for the data of a trainer that loads nothing: a number of samples and classes, and no file."""

    def __init__(self, images: int, classes: int) -> None:
        names, grey, none = [str(i) for i in range(classes)], [0.5] * 3, [0.0] * 3
        self.manifest = Manifest("train", images, names, [], "", grey, grey, none, [none] * 3)
        self.sides = (1, 1)
        self.directory, self.names, self.fingerprint = Path("nowhere"), [], ""
        self.shard_samples, self.quarantined = np.array([images]), np.empty(0, np.int64)

    def __len__(self) -> int:
        return self.manifest.samples

    def name(self, sample: int) -> str:
        return f"random image {sample}"


def without_data(config: Config) -> ShardSet:
    """Set for a trainer that takes its steps on random images; it has 1000 classes if the model gives no number."""
    return Nothing(config.train.global_batch, config.model.outputs or 1000)


class Pace:
    """The trainer that a run of this configuration would have, on this rank.

    Its run directory is never claimed, and so never written.

    Args:
        scratch: path of the run directory; a folder for what names a batch that diverged.
        loads: whether `shards` are the data, or stand in for it.

    Attributes:
        build_seconds: time to build net, optimizer, DDP and loader; with several ranks it includes DDP's two throw-away
            steps, and so compiling.
        warm_up_seconds: time of the first steps, which are not measured; with one rank it includes compiling.
    """

    def __init__(
        self, config: Config, world: World, watch: Watch, shards: ShardSet, scratch: Path, *, loads: bool
    ) -> None:
        self._config, self._world, self._watch, self._loads = config, world, watch, loads
        self.warm_up_seconds = 0.0
        began = time.perf_counter()
        terminal = Terminal(is_first=world.rank == 0)
        directory = RunDirectory(scratch, terminal.say, keep=2, writes=False)
        silent = Terminal(is_first=False)
        self._trainer = Trainer(config, world, watch, directory, (shards, shards), silent)
        self._synchronize()
        self.build_seconds = time.perf_counter() - began

    def measure(self, steps: int) -> dict[str, Any]:
        """The row of this rank in profile.json's `ranks`, with the Stretches `step`, `loader` and `both` (the last two
        None without data), and `all_reduce` as (MB, ms), None if there is none.

        Args:
            steps: of each measurement; 0 for as many as take a few seconds.
        """
        batch = self._first_batch()
        warm = self._steps(repeat(batch), 1)
        paced = self._steps(repeat(batch), WARM_UP[self._world.device.type] - 1)
        self.warm_up_seconds = warm.seconds + paced.seconds
        row: dict[str, Any] = {"rank": self._world.rank, "host": socket.gethostname(), "loader": None, "both": None}
        row["step"] = step = self._steps(repeat(batch), steps or self._enough(paced.step_seconds))
        if self._loads:
            row["loader"] = loader = self._loader(steps)
            # On the CPU the two take turns: what both take together is the longest that a step can.
            row["both"] = self._with_data(steps or self._enough(step.step_seconds + loader.step_seconds))
        row["peak_host_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
        cuda = self._world.device.type == "cuda"
        row["peak_device_mb"] = torch.cuda.max_memory_reserved() / 1e6 if cuda else None
        # After the peaks, which are those of training.
        row["forward_backward_ms"] = None
        if self._world.size > 1:
            row["forward_backward_ms"] = self._computing(batch, min(steps or COMPUTED, self._enough(step.step_seconds)))
        row["all_reduce"] = self._all_reduce()
        return row

    def facts(self) -> dict[str, Any]:
        """Settings in force, for profile.json."""
        model = self._trainer.model
        return {
            "model": self._config.model.name,
            "parameters": sum(p.numel() for p in model.parameters()),
            "precision": build.precision(self._config, self._world),
            "process": asdict(self._trainer.settled),
            "threads": torch.get_num_threads(),
        }

    def _enough(self, seconds: float) -> int:
        """Number of steps that fit into SECONDS, from the time of one on this rank; the same on all ranks."""
        slowest = torch.tensor(seconds, dtype=torch.float64, device=self._world.device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        return max(1, min(MOST, int(SECONDS / float(slowest))))

    def _first_batch(self) -> Batch:
        if self._loads:
            with closing(self._batches()) as batches:
                return next(batches)._replace(replaced=0)  # or it would be counted at each repetition
        world, side = self._world, self._config.data.crop
        low, high = even_split(self._config.train.global_batch, world.dp_rank, world.dp_size)
        torch.manual_seed(low)
        inputs = 60 * torch.randn(high - low, 3, side, side, device=world.device)  # as far apart as pixels in levels
        labels = torch.arange(high - low, device=world.device) % (self._config.model.outputs or 1000)
        keys = mask_keys(self._config.train.seed, 0, np.arange(low, high)).to(world.device)
        return Batch(inputs.to(memory_format=torch.channels_last), labels, np.arange(low, high), low, keys)

    def _batches(self) -> Generator[Batch, None, None]:
        for epoch in count():  # a set may be shorter than a measurement
            self._trainer.fetching.follow(epoch)
            for batch in self._trainer.train_loader.epoch(epoch, keys=keys_of_epoch(self._config.train.seed, 0)):
                yield batch if epoch == 0 else batch._replace(replaced=0)  # what is bad is counted once

    def _steps(self, batches: Iterable[Batch], many: int) -> Stretch:
        """Times steps, taken as by `Trainer.fit`. On all ranks alike, raises KeyboardInterrupt after a stop signal,
        Refused for a loss that is not finite, and BadData."""
        pending: Pending | None = None
        images, stop, loader = 0, 0.0, self._trainer.train_loader
        self._synchronize()
        began, cpu, waited = time.perf_counter(), time.process_time(), loader.waited
        for batch in islice(batches, many):
            # At a rate of 0 all is computed, and no batch is learnt by heart: gradients stay as large as a run's.
            before, pending = pending, self._trainer.train_step(batch, 0.0)
            self._trainer.progress.step += 1  # of an epoch without end: a measurement may be longer than one
            images += len(batch.labels)
            if stop := self._observe(before).stop:
                break
        _heed(stop + self._observe(pending).stop)
        self._synchronize()
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        return Stretch(many, images, seconds, cpu, loader.waited - waited)

    def _observe(self, pending: Pending | None) -> Vote:
        try:
            return self._trainer.observe(pending)
        except Diverged as error:
            raise Refused(
                "the loss or a gradient is not finite although no weight has moved, so a run would diverge at once: "
                "look at data.inputs, train.precision and the net"
            ) from error

    def _loader(self, steps: int) -> Stretch:
        ahead = self._config.data.ahead + READY + DEPTH  # what the loader does before it delivers
        with closing(self._batches()) as batches:
            first = self._take(batches, 1)
            paced = self._take(batches, min(ahead, self._enough(first.step_seconds)))
            return self._take(batches, steps or self._enough(paced.step_seconds))

    def _take(self, batches: Iterator[Batch], many: int) -> Stretch:
        """Times batches that nothing is done with."""
        _heed(Vote.cast(self._world, stop=self._watch.stop).read().stop)
        images = 0
        began, cpu = time.perf_counter(), time.process_time()
        for batch in islice(batches, many):
            self._watch.heartbeat(self._config.run.step_timeout)
            images += len(batch.labels)
        self._synchronize()
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        return Stretch(many, images, seconds, cpu, seconds)

    def _with_data(self, many: int) -> Stretch:
        with closing(self._batches()) as batches:
            self._steps(batches, WARM_UP["cpu"])
            return self._steps(batches, many)

    def _computing(self, batch: Batch, many: int) -> float:
        """Milliseconds of forward and backward of a step on this rank, in the pieces of a step and without waiting for
        other ranks. (A tower on two ranks waits for its other half.)"""
        trainer, pieces = self._trainer, self._config.train.accumulate
        inputs, labels, keys = batch.inputs, batch.labels, batch.keys
        dist.barrier()
        self._synchronize()
        began = time.perf_counter()
        for _ in range(many):
            trainer.state.optimizer.zero_grad()
            for i in range(pieces):
                low, high = even_split(len(labels), i, pieces)
                with trainer.autocast:
                    logits = trainer.model(inputs[low:high], keys[low:high])  # not `net`: DDP sends nothing then
                F.cross_entropy(logits.float(), labels[low:high]).backward()  # type: ignore[no-untyped-call]
        self._synchronize()
        return 1000 * (time.perf_counter() - began) / many

    def _all_reduce(self) -> tuple[float, float] | None:
        """MB of the gradients, and milliseconds of their all-reduce over the data-parallel ranks, alone."""
        world = self._world
        if world.dp_size == 1:
            return None
        size = sum(p.numel() * p.element_size() for p in self._trainer.model.parameters() if p.requires_grad)
        buckets = torch.zeros(size // 4, device=world.device).split(BUCKET // 4)  # type: ignore[no-untyped-call]

        def seconds() -> float:
            dist.barrier()
            self._synchronize()
            began = time.perf_counter()
            for work in [dist.all_reduce(bucket, group=world.group("data"), async_op=True) for bucket in buckets]:
                if work:
                    work.wait()
            self._synchronize()
            return time.perf_counter() - began

        many = min(COMPUTED, self._enough(seconds()))
        return size / 1e6, 1000 * sum(seconds() for _ in range(many)) / many

    def _synchronize(self) -> None:
        """Wait for the device to finish its work, before a clock is read."""
        if self._world.device.type == "cuda":
            torch.cuda.synchronize()


def _heed(stop: float) -> None:
    """Raises KeyboardInterrupt on all ranks alike if they voted that a stop signal came to one."""
    if stop:
        raise KeyboardInterrupt
