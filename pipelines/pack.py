"""Writing shard sets: pack a source, or index tars of other tools. A killed run is continued by the next."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import Any

import numpy as np
import webdataset

from pipelines import origin, quarantine
from pipelines.errors import SourceError, first_line
from pipelines.files import as_text, new_file
from pipelines.folders import is_utf8
from pipelines.limits import USUAL, Limits, limited
from pipelines.manifest import MANIFEST, Manifest, ShardError, refuse_tar
from pipelines.order import PACK, Ints, even_split, permutation
from pipelines.parallel import parallel, tick
from pipelines.rows import HEADER
from pipelines.scan import finish, odd_samples, scan_shard
from pipelines.scanned import WORK, scan_file
from pipelines.sent import Sent, received, sent
from pipelines.shards import ShardSet
from pipelines.sources import Item, Source, inventory, jpeg_of
from pipelines.speech import in_line, say
from pipelines.tars import passed_over
from pipelines.unfinished import Work, working_folder
from pipelines.unpacked import unpacked

TRIAL = 64  # images encoded to estimate the mean stored size
OVERHEAD = 4 * HEADER  # bytes per sample besides its image: two headers, the label's block, padding
FEWEST = 8  # least number of shards, unless that leaves fewer than 100 images per shard


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
    """Packs a source into `directory`.

    The same source and options give the same bytes, for any number of workers and interruptions. Images that cannot be
    decoded are listed in `rejected.jsonl`. Raises SourceError or ShardError.
    """
    if manifest := finished(source, directory, options, split=split):
        shutil.rmtree(directory / WORK, ignore_errors=True)  # left by a run that was killed after its last write
        return manifest
    origin.refuse_strangers(directory, source)
    split = as_text(split)
    plan = origin.fingerprints(source, directory, options.stored, split)
    origin.refuse_inside(directory, source)
    with limited(options.limits), working_folder(directory, plan, Work.PACK):
        if manifest := finished(source, directory, options, split=split):  # by another process in the meantime
            return manifest
        tasks = _tasks(source, directory, options)
        parallel(_pack_shard, tasks, workers=workers, images=len(source.items), label=f"pack {split}")
        if source.files:
            origin.write_files(directory, source.files.found)
        tars = [task.path for task in tasks]
        classes, rejected = list(source.classes), list(source.rejected)
        return finish(directory, tars, classes, split, options.stored, plan.fingerprint, rejected)


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
    with limited(options.limits), working_folder(directory, plan, Work.SHARE):
        tasks = _tasks(source, directory, options)
        low, high = even_split(len(tasks), *share)
        tasks = tasks[low:high]
        images = sum(len(task.samples) for task in tasks)
        parallel(_pack_shard, tasks, workers=workers, images=images, label=f"pack {split} {share[0] + 1}/{share[1]}")


def index(
    directory: Path, *, classes: Sequence[str] | None, split: str, workers: int, allowed: Limits = USUAL
) -> Manifest:
    """Makes manifest and index for tars of another tool, or remakes those of a set of ours.

    Args:
        classes: class names in the order of their labels; None: those of an existing manifest, or the numbers
            themselves.
        allowed: how large an image may be.
    """
    refuse_tar(directory)
    origin.refuse_foreign(directory)
    tars = sorted(tar for tar in directory.glob("*.tar") if tar.is_file() and not tar.name.startswith("."))
    if passed := passed_over(directory, tars):
        say(f"{directory}: only uncompressed *.tar files directly in it are indexed, not {in_line(passed)}")
    if not tars and any(inside.is_dir() for inside in directory.glob("[!.]*")):
        raise ShardError(unpacked(directory))
    if not tars:
        raise ShardError(f"no shards in {directory}: expected uncompressed *.tar files of WebDataset samples")
    if strange := [tar.name for tar in tars if not is_utf8(os.fsencode(tar.name)) or in_line(tar.name) != tar.name]:
        name = os.fsencode(strange[0])
        raise ShardError(f"the tar {name!r} in {directory} has a name that is not UTF-8, or not in one line: rename it")
    if classes is None:
        classes = _known_names(directory)
    # 2: scans of earlier versions did not turn images.
    plan = json.dumps([2] + [[tar.name, tar.stat().st_size, tar.stat().st_mtime_ns] for tar in tars])
    if allowed != USUAL:
        plan += str(tuple(allowed))
    fingerprint = hashlib.sha256(plan.encode()).hexdigest()
    with limited(allowed), working_folder(directory, origin.Fingerprints(fingerprint), Work.INDEX):
        parallel(_index_shard, tars, workers=workers, images=None, label=f"index {split}")
        odd = np.array(odd_samples(tars), np.int64)
        manifest = finish(directory, tars, classes, as_text(split), {}, "", [])
        _list_refused(directory, manifest, odd)
        return manifest


def _list_refused(directory: Path, manifest: Manifest, odd: Ints) -> None:
    """Quarantines the samples that DALI refuses, unless `verify` has written a list for this index."""
    if len(odd) and not (directory / quarantine.QUARANTINE).exists():
        from pipelines.shown import refused  # imports torch

        if problems := refused(ShardSet(directory), odd):
            quarantine.write(directory, manifest.index_sha256, problems)
            say(
                f"{directory}: {len(problems)} samples cannot be decoded by DALI, which feeds the net: they are "
                f"listed in {quarantine.QUARANTINE}, and others are shown in their place"
            )


@dataclass
class _Shard:
    """Task of one worker: a shard and the samples to write to it."""

    path: Path
    source: Sent
    samples: list[tuple[str, Item]]
    options: Options


def _tasks(source: Source, directory: Path, options: Options) -> list[_Shard]:
    """One task per shard of the set, in the order of the shards."""
    _, items = inventory(source)
    first, others = sent(source)
    order = permutation(len(items), options.seed, 0, PACK)
    trial = [items[k] for k in order[:: max(1, len(order) // TRIAL)]]
    shards = _shard_count(source, trial, len(items), options)
    tasks = []
    for i in range(shards):
        low, high = even_split(len(items), i, shards)
        numbers = [int(k) for k in order[low:high]]
        shard = directory / f"shard-{i:06d}.tar"
        tasks.append(_Shard(shard, others, [(_key(k, items[k].name), items[k]) for k in numbers], options))
    tasks[0].source = first
    return tasks


def _pack_shard(task: _Shard) -> None:
    if scan_file(task.path).exists():
        for _ in task.samples:
            tick()
        return
    source, rejected = received(task.source), []
    temporary = task.path.parent / WORK / f"{task.path.name}.{token_hex(8)}"
    with _named(temporary), new_file(temporary) as file:
        with webdataset.TarWriter(file, mtime=0) as tar:  # an integer: a float would add a PAX header to each member
            for key, item in task.samples:
                try:
                    jpeg = jpeg_of(source, item, *task.options.image)
                except SourceError:
                    raise
                except Exception as error:  # decoders raise anything on garbage
                    rejected.append({"file": item.name, "reason": first_line(error)})
                else:
                    tar.write({"__key__": key, "jpg": jpeg, "cls": str(int(item.label)).encode()})
                tick()
        os.fsync(file.fileno())
    os.replace(temporary, task.path)
    scan_shard(task.path, rejected, count=False)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Adds the file name to errors that lack one, such as of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno and not error.filename:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def _index_shard(path: Path) -> None:
    if not scan_file(path).exists():
        scan_shard(path, [], count=True)


def _known_names(directory: Path) -> list[str] | None:
    """Class names of an existing manifest; None if there is none, or if its names are just the numbers."""
    try:
        names = Manifest.read(directory).classes
    except ShardError:
        return None
    return None if names == [str(k) for k in range(len(names))] else names


def _key(number: int, name: str) -> str:
    """A unique WebDataset key that still tells the image's origin: ASCII, no dots, short enough for ustar."""
    stem = name.rsplit(".", 1)[0] if "/" in name else name
    return f"{number:09d}-{re.sub('[^A-Za-z0-9_-]+', '-', stem)[-80:]}"


def _shard_count(source: Source, trial: list[Item], total: int, options: Options) -> int:
    """Number of shards of about `shard_mb` for `total` samples, estimated from the stored size of `trial`."""
    sizes, last = list[int](), ""
    for item in trial:
        try:
            sizes.append(len(jpeg_of(source, item, *options.image)))
        except SourceError:  # a guess without it could give a later start another number of shards, mixing two packs
            raise
        except Exception as error:  # it is rejected and reported when it is packed
            last = f"{item.name} ({first_line(error)})"
    if not sizes and len(trial) >= TRIAL:
        raise SourceError(
            f"none of the {len(trial)} images that were tried can be read, such as {last}: look at them, or at the "
            f"`load` of a source of your own"
        )
    mean = float(np.mean(sizes)) if sizes else 0.0
    for_size = round(total * (mean + OVERHEAD) / (options.shard_mb * 1e6))
    # A worker packs a whole shard: small sets are split too, so that several workers have something to do.
    for_workers = min(FEWEST, total // 100)
    return min(total, max(1, for_size, for_workers))
