"""How large a set will be, from a sample of its images, and whether there is room for it: a full disk would end the
pack hours later."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipelines.errors import SourceError, first_line
from pipelines.misc import ceil_div
from pipelines.order import PACK, Ints, permutation
from pipelines.rows import HEADER, SAMPLE
from pipelines.sources import Item, Source, called, inventory, jpeg_of
from pipelines.speech import telling

TRIAL = 64  # images encoded to estimate the mean stored size
OVERHEAD = 4 * HEADER  # bytes per sample besides its image: two headers, the label's block, padding
FEWEST = 8  # least number of shards, unless that leaves fewer than 100 images per shard
RECORD = 10240  # bytes of which a tar has a multiple: `tarfile.RECORDSIZE`


class SizeEstimate(NamedTuple):
    """What a set will be, from a sample of its images.

    Attributes:
        shards: their number.
        bytes: of all its files.
        error: standard error of that.
    """

    shards: int
    bytes: float
    error: float


def packing_order(source: Source, items: Sequence[Item], seed: int) -> Ints:
    """The numbers of the items in the order in which they are packed. Raises SourceError."""
    if source.groups is None:
        return permutation(len(items), seed, 0, PACK)
    groups = np.asarray(source.groups)
    if groups.shape != (len(items),) or not np.issubdtype(groups.dtype, np.integer):
        raise SourceError(f"{called(source)}.groups should hold a number for each of the {len(items)} items")
    _, groups = np.unique(groups, return_inverse=True)
    place = np.argsort(permutation(int(groups.max(initial=-1)) + 1, seed, 0, PACK))
    return np.argsort(place[groups], kind="stable")


def estimate(source: Source, seed: int, shard_mb: float, image: tuple[int, int, bool]) -> SizeEstimate:
    """Encodes a few images of a source, always the same ones. Raises SourceError.

    Args:
        image: what `to_jpeg` is given.
    """
    items = inventory(source)[1]
    trial = _trial(source, items, seed)
    sizes, last = list[int](), ""
    with telling(f"encoding {len(trial)} of {len(items)} images to estimate the size of the set"):
        for item in trial:
            try:
                sizes.append(len(jpeg_of(source, item, *image).jpeg))
            except SourceError:  # a guess without it could give a later start another number of shards
                raise
            except Exception as error:  # it is rejected and reported when it is packed
                last = f"{item.name} ({first_line(error)})"
    if not sizes and len(trial) >= TRIAL:
        raise SourceError(
            f"none of the {len(trial)} images that were tried can be read, such as {last}: look at them, or at the "
            f"`load` of a source of your own"
        )
    mean = float(np.mean(sizes)) if sizes else 0.0
    for_size = round(len(items) * (mean + OVERHEAD) / (shard_mb * 1e6))
    # A worker packs a whole shard: small sets are split too, so that several workers have something to do.
    for_workers = min(FEWEST, len(items) // 100)
    shards = min(len(items), max(1, for_size, for_workers))
    # In the tar a header and the image, a header and the label, each filled up to a block; a row in the index, and a
    # copy of that while the set is packed.
    each = [HEADER * (3 + ceil_div(size, HEADER)) + 2 * SAMPLE.itemsize for size in sizes]
    each += [0] * (len(trial) - len(sizes))
    doubt = float(np.std(each)) * (1 / len(trial) - 1 / len(items)) ** 0.5 * len(items)
    return SizeEstimate(shards, float(np.mean(each)) * len(items) + shards * RECORD / 2, doubt)


def refuse_full(wanted: Sequence[tuple[Path, SizeEstimate]]) -> None:
    """Raises SourceError if sets, less what is there of them already, will certainly not fit on their file systems (by
    two standard errors). A file system that does not tell its size is not judged."""
    disks: dict[int, list[tuple[Path, SizeEstimate]]] = {}
    for directory, guess in wanted:
        disks.setdefault(_above(directory).stat().st_dev, []).append((directory, guess))
    for sets in disks.values():
        place = _above(sets[0][0])
        disk = os.statvfs(place)
        free = disk.f_bavail * disk.f_frsize
        needed = sum(guess.bytes - _there(directory) for directory, guess in sets)
        if disk.f_blocks and needed - 2 * sum(guess.error for _, guess in sets) > free:
            names = " and ".join(str(directory) for directory, _ in sets)
            raise SourceError(
                f"{names} would take about {_size(needed)} more, and {_size(free)} are free on the file system of "
                f"{place}: make room there, or pack into a directory on another disk"
            )


def _trial(source: Source, items: list[Item], seed: int) -> list[Item]:
    """The images to try: of a source with groups the first ones of up to `TRIAL` groups."""
    order = packing_order(source, items, seed)
    if source.groups is None:
        return [items[k] for k in order[:: max(1, len(order) // TRIAL)]]
    groups = np.asarray(source.groups)[order]
    starts = np.flatnonzero(np.diff(groups, prepend=groups[:1] - 1))
    starts = starts[:: max(1, len(starts) // TRIAL)]
    first = np.unique(starts[:, None] + np.arange(ceil_div(TRIAL, max(1, len(starts)))))
    return [items[k] for k in order[first[first < len(order)]]]


def _above(path: Path) -> Path:
    """The path, or the folder in which it would be made."""
    return next(one for one in (path, *path.absolute().parents) if one.exists())


def _there(directory: Path) -> int:
    """Bytes of the files of an unfinished set."""
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            with suppress(OSError):  # another process has finished it
                total += os.lstat(os.path.join(folder, name)).st_size
    return total


def _size(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
