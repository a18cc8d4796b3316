"""The shard sets of a run, and whether they fit it. Imports no torch."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from threading import Thread

from dist_train.config import Config, ConfigError
from pipelines import kinds
from pipelines.augment import scale
from pipelines.limits import Limits, limited
from pipelines.manifest import MANIFEST, ShardError
from pipelines.misc import cpus
from pipelines.opened import PATIENCE
from pipelines.remote.elsewhere import Elsewhere
from pipelines.remote.places import expanded, is_url
from pipelines.remote.sets import open_set
from pipelines.shards import ShardSet
from pipelines.speech import say

LOOK = 5.0  # seconds between two looks at what is packed
MANY = 1000  # files in a folder
SHARE = 32  # samples of a batch on a GPU that keep it busy, about (docs/performance.md)


def to_pack(config: Config) -> bool:
    """True if the sets do not exist yet but can be made from `data.source`."""
    if not config.data.source or elsewhere(config):
        return False
    return not all((Path(path) / MANIFEST).exists() for path in (config.data.train, config.data.val))


def elsewhere(config: Config) -> bool:
    """True if one of the sets is a URL: nothing packs it, and only the nodes need to reach it."""
    return is_url(config.data.train) or is_url(config.data.val)


def pack_source(config: Config) -> None:
    """Pack training and validation set from `data.source`. Raises SourceError, ShardError, OSError."""
    from pipelines import origin
    from pipelines.pack import Options, estimates, pack_told  # webdataset imports torch

    if Path(config.data.train) == Path(config.data.val):
        raise ConfigError(f"data.train and data.val are both {config.data.val}: a source has two sets")
    train, val = Path(config.data.train), Path(config.data.val)
    raw = Path(config.data.raw) if config.data.raw else None
    missing = [path for path in (train, val) if not (path / MANIFEST).exists()]
    try:
        for path in (train, val):  # before anything is fetched
            origin.refuse_strangers(path)
        kind = kinds.kind("data.source", config.data.source)
        sources = [(kind.source(one), one.directory) for one in kind.of_raw(raw, train, val)]
        say(f"packing {config.data.source} into {train.resolve().parent}")
        options = Options(shorter_side=kind.shorter_side)
        for (source, path), guess in zip(sources, estimates(sources, options), strict=True):
            pack_told(source, path, options, split=path.name, workers=cpus(), guess=guess)
    except ShardError as error:
        raise ShardError(
            f"data.source {config.data.source} is not packed, though there is no set in "
            f"{' and '.join(map(str, missing))}: {error}; or, for sets of your own, leave out data.source"
        ) from error


class Packing:
    """`pack_source` in a thread, so that the caller can see that it goes on."""

    def __init__(self, config: Config) -> None:
        self._config, self._error = config, list[BaseException]()
        self._thread = Thread(target=self._pack, name="pack", daemon=True)
        self._thread.start()

    def look(self) -> int:
        """Waits some seconds. Returns a number above 0 that changes as files are fetched and sets packed; 0 at the
        end."""
        self._thread.join(LOOK)
        if not self._thread.is_alive():
            return 0
        data = self._config.data
        roots = [Path(data.train), Path(data.val)]
        if not data.raw or kinds.of_torchvision(data.source):  # a user's own files do not grow, and may be millions
            roots.append(Path(data.raw or Path(data.train).parent / kinds.RAW))
        return 1 + sum(map(_written, roots))

    def finish(self) -> None:
        """Raises what `pack_source` has raised."""
        self._thread.join()
        for error in self._error:
            raise error

    def _pack(self) -> None:
        try:
            pack_source(self._config)
        except BaseException as error:
            self._error.append(error)


def _written(root: Path) -> int:
    """Number of files below a folder, plus the bytes of those that do not share a folder with very many."""
    total = 0
    for folder, _, files in os.walk(root):
        total += len(files)
        for file in files if len(files) < MANY else ():
            with suppress(OSError):  # it is written, so it may have another name by now
                total += os.lstat(os.path.join(folder, file)).st_size
    return total


def check_batch(config: Config, ranks: int) -> None:
    """Raises ConfigError if a rank would get no sample of a batch, or no partner for the other tower."""
    batch, pieces = config.train.global_batch, config.train.accumulate
    if config.train.tower_parallel:
        if ranks % 2:
            raise ConfigError(
                f"train.tower_parallel puts each net on two ranks, and {ranks} cannot be paired: start an even number"
            )
        ranks //= 2
    if batch < ranks * pieces:
        raise ConfigError(
            f"train.global_batch {batch} is smaller than ranks ({ranks}) x train.accumulate ({pieces}): raise it, or "
            f"start fewer ranks"
        )


def small_share(config: Config, ranks: int, device: str) -> str:
    """Warning if a GPU gets so few samples of a batch that it waits for its host; empty otherwise."""
    share = config.train.global_batch * (2 if config.train.tower_parallel else 1) // ranks // config.train.accumulate
    if device == "cpu" or share >= SHARE:
        return ""
    return (
        f"a GPU gets {share} images of a batch, and below {SHARE} or so it waits for its host: start fewer ranks, or "
        f"raise train.global_batch as configs/alexnet_8gpu.yaml does"
    )


def open_sets(config: Config, *, cached: bool = True) -> tuple[ShardSet, ShardSet]:
    """The training and the validation set. Raises UserError if they do not fit together, or the settings.

    Args:
        cached: whether they are read through `data.cache`, if there is one; otherwise neither may be a URL.
    """
    data, batch = config.data, config.train.global_batch
    cache = data.cache if cached else ""
    patience = min(PATIENCE, config.run.step_timeout / 2)  # before the watch calls it a hang
    with limited(Limits(pixels=data.max_pixels)):
        train, val = (
            open_set(place, cache=cache, cache_gb=data.cache_gb, patience=patience) for place in (data.train, data.val)
        )
    scale(data.inputs, train.manifest)
    if train.classes != val.classes:
        raise ShardError(
            f"{data.train} has {len(train.classes)} classes and {data.val} has {len(val.classes)}, which differ "
            f"{difference(train.classes, val.classes)}: labels would not mean the same, {_remedy(train, val)}"
        )
    _check_room(config, train)
    if batch > len(train):
        raise ConfigError(
            f"train.global_batch {batch} is larger than the {len(train)} images of {data.train}: lower it"
        )
    return train, val


def _check_room(config: Config, train: ShardSet) -> None:
    """Raises ConfigError if the cache cannot hold two blocks of shards: the one in use, and the next."""
    data = config.data
    largest = sorted((shard["bytes"] for shard in train.manifest.shards), reverse=True)[: 2 * data.shuffle_shards]
    if data.cache and 0 < data.cache_gb < (least := sum(largest) / 1e9):
        raise ConfigError(
            f"data.cache_gb is {data.cache_gb:g}, and two blocks of data.shuffle_shards {data.shuffle_shards} of "
            f"{data.train} may take {_up(least)}: raise it to that, or lower data.shuffle_shards"
        )


def _up(gigabytes: float) -> str:
    """Rounded up to three digits, which as `data.cache_gb` is enough."""
    scale = 10 ** (2 - math.floor(math.log10(gigabytes)))
    return f"{math.ceil(gigabytes * scale) / scale:g}"


def traffic(config: Config, sets: tuple[ShardSet, ShardSet]) -> str:
    """What each node fetches, and how often; empty without a cache."""
    data = config.data
    if not data.cache:
        return ""
    sizes = [sum(shard["bytes"] for shard in shards.manifest.shards) for shards in sets]
    total = " and ".join(f"{_size(n)} of {shards.place}" for n, shards in zip(sizes, sets, strict=True))
    folder = expanded(data.cache)
    room = data.cache_gb * 1e9 or shutil.disk_usage(folder).free + sum(map(_held, sets))
    if sum(sizes) <= room:
        return f"each node reads all {total} once, then it is in the cache {folder}"
    return f"each node reads all {total} every epoch; the cache {folder} holds {_size(room)} of it"


def _held(shards: ShardSet) -> int:
    """Bytes of a set that are in the cache already."""
    here = shards.here
    assert isinstance(here, Elsewhere)  # there is a cache
    return sum(shard["bytes"] for shard in shards.manifest.shards if here.cache.holds(here.wanted(shard)))


def _size(n: float) -> str:
    return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"


def _remedy(*sets: ShardSet) -> str:
    foreign = [shards for shards in sets if not shards.manifest.source]
    if not foreign:
        return "pack both from folders of the same names"
    return (
        f"name all classes in one file, in the order of their labels, and index with it what was not packed here "
        f"({foreign[-1].here.command('index --classes FILE')})"
    )


def check_tars(sets: tuple[ShardSet, ShardSet]) -> None:
    """Raises ShardError for damage that would otherwise show only during training: a missing tar, or a tar of the
    validation set of another size."""
    train, val = sets
    train.check_tars(sizes=False)
    val.check_tars(sizes=True)


def difference(classes: Sequence[str], others: Sequence[str]) -> str:
    """How two lists of classes differ, to follow that word: `in blue, green`, of which three are named, or `in their
    order`."""
    odd = sorted(set(classes) ^ set(others))[:3]
    return f"in {', '.join(odd)}" if odd else "in their order"
