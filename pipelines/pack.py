"""Writing shard sets: pack a source, or index tars of other tools. A killed run is continued by the next."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import Any, NamedTuple

import webdataset

from pipelines import origin
from pipelines.errors import SourceError, first_line
from pipelines.files import as_text, new_file
from pipelines.limits import USUAL, Limits, limited
from pipelines.manifest import MANIFEST, Manifest
from pipelines.order import even_split
from pipelines.parallel import parallel, tick
from pipelines.room import SizeEstimate, estimate, packing_order, refuse_full
from pipelines.scan import finish, scan_shard
from pipelines.scanned import WORK, scan_file
from pipelines.sent import Sent, received, sent
from pipelines.sources import Item, Source, inventory, jpeg_of
from pipelines.unfinished import Work, working_folder


class Packed(NamedTuple):
    """A set that is packed; how many images this start had to pack, and an earlier one had; seconds that they took."""

    manifest: Manifest
    images: int
    before: int
    seconds: float


@dataclass(frozen=True)
class Options:
    """Settings of the images and shards to write.

    Attributes:
        shorter_side: images are scaled to this shorter side, in pixels; 0 keeps their size.
        quality: JPEG quality for images that cannot keep their bytes, 1 to 95.
        shard_mb: target size of a shard, in 10^6 bytes.
        seed: seed of the order in which samples are packed.
        keep_small: images with a smaller shorter side keep their size.
        max_pixels, max_bytes: as in `Limits`.
    """

    shorter_side: int = 256
    quality: int = 90
    shard_mb: float = 64.0
    seed: int = 0
    keep_small: bool = False
    max_pixels: int = USUAL.pixels
    max_bytes: int = USUAL.bytes

    def __post_init__(self) -> None:
        for name, low, high in (("shorter_side", 0, 65535), ("quality", 1, 95), ("shard_mb", 0.01, 1e6)):
            if not low <= getattr(self, name) <= high:
                option = name.replace("_", "-")
                raise SourceError(f"--{option} is {getattr(self, name)}: it must lie between {low} and {high:g}")

    @property
    def image(self) -> tuple[int, int, bool]:
        """What `to_jpeg` is given."""
        return self.shorter_side, self.quality, self.keep_small

    @property
    def limits(self) -> Limits:
        """How large an image may be."""
        return Limits(self.max_pixels, self.max_bytes)

    @property
    def stored(self) -> dict[str, Any]:
        """What determines the bytes of a set, for its manifest: limits only if they are not the usual ones, so that
        sets of versions without them count as finished."""
        usual = USUAL.as_options()
        return {name: value for name, value in vars(self).items() if value != usual.get(name)}


def pack(source: Source, directory: Path, options: Options, *, split: str, workers: int) -> Manifest:
    """`pack_told` by itself."""
    return pack_told(source, directory, options, split=split, workers=workers).manifest


def estimates(sets: Sequence[tuple[Source, Path]], options: Options) -> list[SizeEstimate | None]:
    """How large sets will be; None for those that are finished, or empty. Raises SourceError, or if there is no room
    for all of them. Nothing is written."""
    guesses = list[SizeEstimate | None]()
    with limited(options.limits):
        for source, directory in sets:
            items = [] if (directory / MANIFEST).exists() else inventory(source)[1]
            origin.refuse_incomparable(items[:1])
            guesses.append(estimate(source, options.seed, options.shard_mb, options.image) if items else None)
    refuse_full([(directory, guess) for (_, directory), guess in zip(sets, guesses, strict=True) if guess])
    return guesses


def pack_told(
    source: Source,
    directory: Path,
    options: Options,
    *,
    split: str,
    workers: int,
    guess: SizeEstimate | None = None,
) -> Packed:
    """Packs a source into `directory`.

    The same source and options give the same bytes, for any number of workers and interruptions. Images that cannot be
    decoded are listed in `rejected.jsonl`. Raises SourceError or ShardError.

    Args:
        guess: what `estimates` says of this set, if it was asked.
    """
    if manifest := finished(source, directory, options, split=split):
        shutil.rmtree(directory / WORK, ignore_errors=True)  # left by a run that was killed after its last write
        return Packed(manifest, 0, 0, 0.0)
    origin.refuse_strangers(directory, source)
    split = as_text(split)
    plan = origin.fingerprints(source, directory, options.stored, split)
    origin.refuse_inside(directory, source)
    guess = guess or estimates([(source, directory)], options)[0]
    with limited(options.limits), working_folder(directory, plan, Work.PACK):
        if manifest := finished(source, directory, options, split=split):  # by another process in the meantime
            return Packed(manifest, 0, 0, 0.0)
        assert guess is not None
        tasks = _tasks(source, directory, options, guess.shards)
        began = time.monotonic()
        images, before = _pack_shards(source, tasks, workers, f"pack {split}")
        seconds = time.monotonic() - began
        if source.files:
            origin.write_files(directory, source.files.found)
        tars = [task.path for task in tasks]
        classes, rejected = list(source.classes), list(source.rejected)
        manifest = finish(directory, tars, classes, split, options.stored, plan.fingerprint, rejected)
        return Packed(manifest, images, before, seconds)


def finished(source: Source, directory: Path, options: Options, *, split: str) -> Manifest | None:
    """The manifest if `pack` with these arguments has nothing left to do; None if there is no manifest yet.

    A set packed by an earlier version of this program counts as finished if it had the same names; if that version
    always kept small images, with and without `keep_small`. Raises SourceError, or ShardError if the
    directory holds another set.
    """
    if not (directory / MANIFEST).exists():
        return None
    manifest, stored, split = Manifest.read(directory), options.stored, as_text(split)
    known = manifest.source in origin.fingerprints(source, directory, stored, split).counts
    if not known and not origin.packed_earlier(source, manifest, stored, split):
        raise origin.another(source, directory, manifest, stored)
    return manifest


def pack_share(
    source: Source, directory: Path, options: Options, share: tuple[int, int], *, split: str, workers: int
) -> None:
    """Packs the shards of `share` = (i, n), the i-th of n ranges, while other processes pack theirs. `pack` with the
    same arguments then packs what is missing and writes the manifest. Raises SourceError or ShardError."""
    if finished(source, directory, options, split=split):
        return
    origin.refuse_strangers(directory, source)
    plan = origin.fingerprints(source, directory, options.stored, as_text(split))
    origin.refuse_inside(directory, source)
    (guess,) = estimates([(source, directory)], options)
    if not guess:  # finished by another process in the meantime
        return
    with limited(options.limits), working_folder(directory, plan, Work.SHARE):
        tasks = _tasks(source, directory, options, guess.shards)
        low, high = even_split(len(tasks), *share)
        _pack_shards(source, tasks[low:high], workers, f"pack {split} {share[0] + 1}/{share[1]}")


@dataclass
class _Shard:
    """Task of one worker: a shard and the samples to write to it."""

    path: Path
    samples: list[tuple[str, Item]]
    options: Options


def _tasks(source: Source, directory: Path, options: Options, shards: int) -> list[_Shard]:
    """One task per shard of the set, in the order of the shards."""
    _, items = inventory(source)
    order = packing_order(source, items, options.seed)
    tasks = []
    for i in range(shards):
        low, high = even_split(len(items), i, shards)
        numbers = [int(k) for k in order[low:high]]
        shard = directory / f"shard-{i:06d}.tar"
        tasks.append(_Shard(shard, [(_key(k, items[k].name), items[k]) for k in numbers], options))
    return tasks


def _pack_shards(source: Source, tasks: list[_Shard], workers: int, label: str) -> tuple[int, int]:
    """Packs those that are not done yet. Returns the number of their images, and of those that are done."""
    first, others = sent(source)
    todo = [task for task in tasks if not scan_file(task.path).exists()]
    images, total = (sum(len(task.samples) for task in some) for some in (todo, tasks))
    packed = [(others if i else first, task) for i, task in enumerate(todo)]
    if todo:
        parallel(_pack_shard, packed, workers=workers, images=total, label=label, done=total - images)
    return images, total - images


def _pack_shard(job: tuple[Sent, _Shard]) -> None:
    packet, task = job
    source, rejected, how = received(packet), list[dict[str, str]](), Counter[str]()
    temporary = task.path.parent / WORK / f"{task.path.name}.{token_hex(8)}"
    with _named(temporary), new_file(temporary) as file:
        with webdataset.TarWriter(file, mtime=0) as tar:  # an integer: a float would add a PAX header to each member
            for key, item in task.samples:
                try:
                    image = jpeg_of(source, item, *task.options.image)
                except SourceError:
                    raise
                except Exception as error:  # decoders raise anything on garbage
                    rejected.append({"file": item.name, "reason": first_line(error)})
                else:
                    how.update(enlarged=int(image.enlarged), unchanged=int(image.unchanged))
                    tar.write({"__key__": key, "jpg": image.jpeg, "cls": str(int(item.label)).encode()})
                tick()
        os.fsync(file.fileno())
    os.replace(temporary, task.path)
    scan_shard(task.path, rejected, count=False, how=how)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Adds the file name to errors that lack one, such as of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno and not error.filename:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def _key(number: int, name: str) -> str:
    """A unique WebDataset key that still tells the image's origin: ASCII, no dots, short enough for ustar."""
    stem = name.rsplit(".", 1)[0] if "/" in name else name
    return f"{number:09d}-{re.sub('[^A-Za-z0-9_-]+', '-', stem)[-80:]}"
