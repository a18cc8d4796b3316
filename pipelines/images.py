"""The loader in a training script of one's own: `from pipelines import ImageLoader` (docs/loader.md)."""

from __future__ import annotations

import atexit
import os
from collections.abc import Generator, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, get_args
from weakref import WeakSet, finalize

import torch
import torch.distributed as dist
from torch import Tensor

from pipelines.augment import Augment, Inputs
from pipelines.bounds import broken, least, within
from pipelines.dali import Decode
from pipelines.errors import UserError
from pipelines.loader import Batch, Loader, Read
from pipelines.manifest import ShardError
from pipelines.misc import cpu_share
from pipelines.plan import FixedPlan, TrainingPlan
from pipelines.remote.ahead import Ahead
from pipelines.remote.sets import open_set
from pipelines.words import nearest


@dataclass(frozen=True)
class ImageOptions(Augment):
    """Options of an `ImageLoader`, beside those of the augmentation."""

    inputs: Inputs = "standardized"
    """Scale of the inputs: standardized (mean 0 and deviation 1 per channel over the training set), mean_subtracted (in
    levels of 255, as in the paper), or minus_one_to_one."""
    seed: int = within(0, 1 << 64, 0)
    """Seed of the order and of the augmentation."""
    shuffle_shards: int = least(1, 16)
    """Shards per block; samples are shuffled within a block."""
    threads: int = least(0, 0)
    """DALI's decoding threads per rank; 0: the rank's share of the CPUs of its node."""
    readers: int = least(1, 32)
    """Read-ahead threads per rank."""
    ahead: int = least(1, 4)
    """Batches to read ahead."""
    cache: str = ""
    """Directory of the shards that this node keeps of sets elsewhere; $VARIABLES in it are the node's."""
    cache_gb: float = least(0, 0.0)
    """GB (10^9 bytes) that shards take there, at most; 0: what the disk has."""


FREE = ("threads", "readers", "ahead", "cache", "cache_gb")  # options that change nothing in a batch
OPEN = WeakSet[Generator[Batch, None, None]]()  # loops that are under way
OPTIONS = {option.name: option.default for option in fields(ImageOptions)}


class ImageLoader:
    """Shuffled and augmented training images: a `for` loop yields the batches from (`epoch`, `step`) to the end of the
    epoch, each as images, float32 [n, 3, crop, crop], channels_last, and labels, int64 [n], on the device.

    A batch is this rank's share of a *global* batch, which is the same at any world size and after any restart. A new
    `for` continues after a `break`.

    Args:
        directory: the shard set; with the option `cache`, also an fsspec URL, or one on a slow file system.
        batch: images per global batch, over all ranks.
        device: where the net is. For a GPU, images are decoded there.
        rank, world_size: which share of a batch this rank takes, and their number; None: those of torch.distributed.
        options: fields of `ImageOptions`: crop, resize, mirror, lighting, seed, ...

    Raises UserError for a value that is impossible, ShardError for a shard set that cannot be used, and TypeError for
    an unknown option. A loop raises ShardError or ReadError if a tar is another one or cannot be read.

    Attributes:
        epoch, step: those of the next batch. After the last batch of epoch e they are e + 1 and 0.
        classes: class names; the position in the list is the label.
        loader: the loader underneath, with the sample numbers of a step, and those found undecodable.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        batch: int,
        device: torch.device | str = "cpu",
        rank: int | None = None,
        world_size: int | None = None,
        **options: Any,
    ) -> None:
        self.options = _checked(options)
        self.batch = batch = _plain("batch", batch, int)
        self.epoch = self.step = 0
        dp_rank, dp_size = _share(rank, world_size)
        if batch < 1:
            raise UserError(f"batch is {batch}: it must be at least 1")
        if batch < dp_size:
            raise UserError(
                f"batch is {batch} for {dp_size} ranks: it is the global batch, of which each rank gets a share, so "
                f"multiply that of one rank by {dp_size}"
            )
        self._open = partial(open_set, cache=self.options.cache, cache_gb=self.options.cache_gb)
        shards = self._open(directory)
        if batch > len(shards):
            raise UserError(f"batch {batch} is larger than the {len(shards)} images of {directory}: lower it")
        reading = Read(readers=self.options.readers, ahead=self.options.ahead)
        self._loader = partial(
            Loader,
            statistics=shards.manifest,
            dp_rank=dp_rank,
            dp_size=dp_size,
            decode=decoding(torch.device(device), self.options),
            reading=reading,
        )
        plan = TrainingPlan(shards, self.options, shards.manifest, self.options.seed, self.options.shuffle_shards)
        self.loader = self._loader(plan, batch=batch)
        self.classes = shards.classes
        what = {name: value for name, value in asdict(self.options).items() if name not in FREE}
        self._same = {"set": shards.fingerprint, "batch": batch, **what}  # what a state must agree with
        self._running: object = None  # the loop that is under way
        self._validation: Loader | None = None  # the one made last
        self._ahead: Ahead | None = None
        if self.options.cache and os.environ.get("LOCAL_RANK", "0") == "0":
            self._ahead = Ahead()
            finalize(self, self._ahead.close)

    def __len__(self) -> int:
        """Steps per epoch: full global batches. The images left over are others in each epoch."""
        return self.loader.steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if not 0 <= self.step < len(self):
            raise UserError(f"step is {self.step}, and an epoch has {len(self)}: set epoch and step by load_state_dict")
        self._running = this = object()
        self._follow()
        for batch in _followed(self.loader.epoch(self.epoch, self.step)):
            if self._running is not this:
                raise RuntimeError(
                    "another loop over this ImageLoader, or load_state_dict, was begun inside this one: leave a loop "
                    "by break before its state is changed"
                )
            # Before the batch is handed out, so that a state saved in the loop's body counts it as done.
            last = self.step + 1 == len(self)
            self.epoch, self.step = (self.epoch + 1, 0) if last else (self.epoch, self.step + 1)
            yield batch.inputs, batch.labels

    def validation(self, directory: str | Path, batch: int = 0) -> ValidationLoader:
        """Returns the loader of a validation set, with this one's crop, scale, training set's statistics, device and
        ranks. `batch`: images per global batch; 0: as many as here. Raises ShardError if the classes differ, UserError
        for a negative batch."""
        shards = self._open(directory)
        if shards.classes != self.classes:
            raise ShardError(
                f"{directory} and {self.loader.shards.place} have different classes: labels would not mean the "
                f"same, pack both from folders of the same names"
            )
        batch = _plain("batch", batch, int)
        if batch < 0:
            raise UserError(f"batch is {batch}: it must be at least 1")
        plan = FixedPlan(shards, self.options, seed=self.options.seed)
        self._validation = self._loader(plan, batch=batch or self.batch)
        return ValidationLoader(self._validation)

    def _follow(self) -> None:
        """Has shards fetched ahead: of this epoch from here, of the validation set, and of the next epoch."""
        if self._ahead:
            train, val = self.loader, self._validation
            coming = [(train.shards, train.upcoming(self.epoch, self.step))]
            coming += [(val.shards, val.upcoming(0, 0))] if val else []
            self._ahead.follow([*coming, (train.shards, train.upcoming(self.epoch + 1, 0))])

    def state_dict(self) -> dict[str, Any]:
        """State to resume from, the same on all ranks, of numbers, strings and booleans: the next batch, and the
        settings that determine its images."""
        return {"epoch": self.epoch, "step": self.step, **self._same}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a state, at any world size. Raises UserError if the loader that it was saved by shows other
        images, or shows them differently, and for what is no state."""
        known = isinstance(state, Mapping)
        epoch, step = (state.get("epoch"), state.get("step")) if known else (None, None)
        if not (type(epoch) is int and type(step) is int and {"set", "batch"} <= state.keys()):
            raise UserError("this is no state of an ImageLoader: give what its state_dict() has returned")
        if state["set"] != self._same["set"]:
            raise UserError(
                f"the state is of another shard set than {self.loader.shards.place}, or this one was packed anew: "
                f"give the same set"
            )
        ours = {**OPTIONS, **self._same}  # an option that a state does not know has its default there
        for name, value in {**OPTIONS, **state}.items():
            if name not in ("epoch", "step", *FREE) and (name not in ours or value != ours[name]):
                raise UserError(
                    f"the state was saved with {name} {value!r}, and this loader has {ours.get(name)!r}: the images "
                    f"would not be the same, make them agree"
                )
        if not (epoch >= 0 and 0 <= step < len(self)):
            raise UserError(f"the state is at epoch {epoch}, step {step}, and an epoch has {len(self)} steps")
        self.epoch, self.step, self._running = epoch, step, None


class ValidationLoader:
    """Every good image of a set exactly once over all ranks, in its central crop: see `ImageLoader.validation`.

    Each `for` begins at the beginning and yields, on every rank, the same number of batches, of the kind that an
    ImageLoader yields. The last one may be short, and empty on some ranks.
    """

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def __len__(self) -> int:
        """Number of batches."""
        return self.loader.steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return ((batch.inputs, batch.labels) for batch in _followed(self.loader.epoch()))


def decoding(device: torch.device, options: ImageOptions) -> Decode:
    """Decoding settings for a net on this device: on the GPU if it is one, with this rank's share of the CPUs."""
    on_gpu = device.type == "cuda"
    if device == torch.device("cuda"):  # tensors say which one
        device = torch.device("cuda", torch.cuda.current_device())
    return Decode(
        device="gpu" if on_gpu else "cpu",
        device_id=device.index if on_gpu else None,
        threads=options.threads or cpu_share().threads,
        inputs=options.inputs,
        wanted=device,
    )


def _followed(batches: Generator[Batch, None, None]) -> Iterator[Batch]:
    OPEN.add(batches)
    return batches


@atexit.register  # later than DALI's function, and so called before it, which aborts the process if a pipeline runs
def _close() -> None:
    """Ends the loops that a program has left open at its end."""
    for batches in tuple(OPEN):
        with suppress(ValueError):  # another thread is in it
            batches.close()


def _checked(options: dict[str, Any]) -> ImageOptions:
    for name in options.keys() - OPTIONS.keys():
        near = nearest(name, OPTIONS)
        known = f"did you mean {near}?" if near else f"it has {', '.join(OPTIONS)}"
        raise TypeError(f"ImageLoader has no option {name}: {known}")
    made = ImageOptions(**{name: _plain(name, value, type(OPTIONS[name])) for name, value in options.items()})
    if found := broken(made):
        raise UserError(" ".join(found))
    scales = get_args(Inputs)
    if made.inputs not in scales:
        raise UserError(f"inputs is {made.inputs}: it must be one of {', '.join(scales)}")
    if made.crop > made.resize:
        raise UserError(f"crop {made.crop} is larger than resize {made.resize}: it is cut from that, so raise resize")
    return made


def _plain(name: str, value: Any, kind: type) -> Any:
    """The value as Python's own type, not numpy's, which torch.load(weights_only=True) refuses."""
    with suppress(TypeError, ValueError, OverflowError):
        if (same := kind(value)) == value:
            return same
    raise UserError(f"{name} is {value!r}: it must be of type {kind.__name__}")


def _share(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """This rank and their number."""
    if rank is not None and world_size is not None:
        rank, world_size = _plain("rank", rank, int), _plain("world_size", world_size, int)
        if not 0 <= rank < world_size:
            raise UserError(f"rank is {rank} and world_size {world_size}: ranks are 0 to world_size - 1")
        return rank, world_size
    if (rank, world_size) != (None, None):
        raise UserError("rank and world_size belong together: give both, or neither for those of torch.distributed")
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    if os.environ.get("WORLD_SIZE", "1") != "1":  # each rank would be shown all of every batch
        raise UserError(
            f"this is one of {os.environ['WORLD_SIZE']} ranks, and torch.distributed does not know yet: call "
            f"init_process_group before ImageLoader, or give rank and world_size"
        )
    return 0, 1
