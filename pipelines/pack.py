"""Write shard sets: pack a source, or index tars that other tools made. Continues where a killed run stopped."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import webdataset
from numpy.typing import NDArray
from PIL import Image

from pipelines.order import PACK, part, permutation
from pipelines.parallel import parallel, tick
from pipelines.shards import (
    HEADER,
    IMAGES,
    INDEX,
    MANIFEST,
    NAME,
    SAMPLE,
    Manifest,
    ShardError,
    sha256,
    tar_samples,
    write_atomically,
)
from pipelines.sources import Item, Source, SourceError, to_jpeg, upright_rgb

WORK = ".pack"  # inside a set while it is being made: the plan, and what is known of each finished shard
REJECTED = "rejected.jsonl"
FORMATS = (
    "JPEG",
    "MPO",
    "PNG",
    "WEBP",
    "BMP",
)  # that DALI decodes on the CPU and on the GPU, whatever the extension says


@dataclass(frozen=True)
class Options:
    """How a source is stored.

    Attributes:
        shorter_side: larger images are scaled down to this shorter side, in pixels; 0 keeps their size.
        quality: of the JPEG that is written where an image cannot keep its bytes, 1 to 95.
        shard_mb: aimed size of a shard, in 10^6 bytes.
        seed: of the order in which samples are packed.
    """

    shorter_side: int = 256
    quality: int = 90
    shard_mb: float = 64.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (("shorter_side", 0, 65535), ("quality", 1, 95), ("shard_mb", 0.01, 1e6)):
            if not low <= getattr(self, name) <= high:
                option = name.replace("_", "-")
                raise SourceError(f"--{option} is {getattr(self, name)}: it must lie between {low} and {high:g}")


def pack(source: Source, directory: Path, options: Options, *, split: str, workers: int) -> Manifest:
    """Pack a source into `directory`.

    The same source and options give the same bytes, for any number of workers and however often the work was
    interrupted. Images that cannot be read are listed in `rejected.jsonl`. Raises SourceError or ShardError.
    """
    fingerprint = _fingerprint(source, directory, options, split)
    if manifest := _packed(directory, fingerprint):
        shutil.rmtree(directory / WORK, ignore_errors=True)  # of a run that was killed after its last write
        return manifest
    with _unfinished(directory, fingerprint):
        tasks = _tasks(source, directory, options)
        parallel(_pack_shard, tasks, workers=workers, images=len(source.items), label=f"pack {split}")
        return _finish(
            directory, [task.path for task in tasks], source.classes, split, vars(options), fingerprint, source.rejected
        )


def pack_share(
    source: Source, directory: Path, options: Options, share: tuple[int, int], *, split: str, workers: int
) -> None:
    """Pack the shards of `share` = (i, n), the i-th of n ranges, while other processes pack theirs. `pack` with the
    same arguments then does what is missing, and writes the manifest. Raises SourceError or ShardError."""
    fingerprint = _fingerprint(source, directory, options, split)
    if _packed(directory, fingerprint):
        return
    with _unfinished(directory, fingerprint, shared=True):
        tasks = _tasks(source, directory, options)
        tasks = tasks[slice(*part(len(tasks), *share))]
        images = sum(len(task.samples) for task in tasks)
        parallel(_pack_shard, tasks, workers=workers, images=images, label=f"pack {split} {share[0] + 1}/{share[1]}")


def index(directory: Path, *, classes: Sequence[str] | None, split: str, workers: int) -> Manifest:
    """Make manifest and index for tars that another tool made, or anew for a set of ours.

    Args:
        classes: the class names in the order of their labels; where None, those of the manifest that is there, or the
            numbers themselves.
    """
    tars = sorted(directory.glob("*.tar"))
    if not tars:
        raise ShardError(f"no shards in {directory}: expected uncompressed *.tar files of WebDataset samples")
    if classes is None:
        classes = _known_names(directory)
    plan = json.dumps([[tar.name, tar.stat().st_size, tar.stat().st_mtime_ns] for tar in tars])
    with _unfinished(directory, hashlib.sha256(plan.encode()).hexdigest(), foreign=True):
        parallel(_index_shard, tars, workers=workers, images=None, label=f"index {split}")
        return _finish(directory, tars, classes, split, {}, "", [])


@dataclass
class _Shard:
    """The work of one process: a shard and what goes into it."""

    path: Path
    source: Source
    samples: list[tuple[str, Item]]
    options: Options


def _fingerprint(source: Source, directory: Path, options: Options, split: str) -> str:
    """Of all that decides the bytes of a set."""
    if not source.items:
        raise SourceError(f"no images to pack into {directory}: expected SRC/<class>/<image>")
    plan = json.dumps([source.items, source.classes, split, vars(options)], default=str, ensure_ascii=False)
    return hashlib.sha256(plan.encode(errors="surrogateescape")).hexdigest()


def _packed(directory: Path, fingerprint: str) -> Manifest | None:
    """The manifest, where the set is finished."""
    if not (directory / MANIFEST).exists():
        return None
    if (manifest := Manifest.read(directory)).source != fingerprint:
        raise ShardError(f"{directory} already holds another shard set: choose another directory or delete it")
    return manifest


def _tasks(source: Source, directory: Path, options: Options) -> list[_Shard]:
    """What goes into each shard."""
    items = source.items
    order = permutation(len(items), options.seed, 0, PACK)
    shards = _shard_count(source, [items[k] for k in order[:: max(1, len(order) // 64)]], len(items), options)
    tasks = []
    for i in range(shards):
        numbers = [int(k) for k in order[slice(*part(len(items), i, shards))]]
        shard = directory / f"shard-{i:06d}.tar"
        tasks.append(_Shard(shard, source, [(_key(k, items[k].name), items[k]) for k in numbers], options))
    return tasks


def _pack_shard(task: _Shard) -> None:
    if _part(task.path).exists():
        for _ in task.samples:
            tick()
        return
    rejected = []
    temporary = task.path.parent / WORK / f"{task.path.name}.{os.getpid()}"
    with open(temporary, "wb") as file:
        with webdataset.TarWriter(file, mtime=0) as tar:  # an integer: a float adds a PAX header to each member
            for key, item in task.samples:
                try:
                    jpeg = to_jpeg(task.source.load(item.reference), task.options.shorter_side, task.options.quality)
                except Exception as error:  # whatever a decoder makes of garbage
                    rejected.append({"file": item.name, "reason": _reason(error)})
                else:
                    tar.write({"__key__": key, "jpg": jpeg, "cls": str(item.label).encode()})
                tick()
        os.fsync(file.fileno())
    os.replace(temporary, task.path)
    _write_part(task.path, rejected, count=False)


def _index_shard(path: Path) -> None:
    if not _part(path).exists():
        _write_part(path, [], count=True)


def _write_part(path: Path, rejected: list[dict[str, str]], *, count: bool) -> None:
    """Decode every sample of a shard and keep what index and manifest need of it."""
    rows = []
    pixels, total, products = 0, np.zeros(3), np.zeros((3, 3))
    with open(path, "rb") as file:
        for key, members in tar_samples(path):
            try:
                row, image = read_sample(file, members)
            except Exception as error:  # whatever a decoder makes of garbage
                rejected.append({"file": f"{path.name}/{key}", "reason": _reason(error)})
            else:
                rows.append(row)
                flat = np.asarray(image, np.float64).reshape(-1, 3)  # sums of integers below 2^53: exact in any order
                pixels += len(flat)
                total += flat.sum(0)
                products += flat.T @ flat
            if count:
                tick()
    _save(path.parent / WORK / f"{path.name}.npy", np.array(rows, SAMPLE))
    part = {
        "shard": {"name": path.name, "samples": len(rows), "bytes": path.stat().st_size, "sha256": sha256(path)},
        "pixels": pixels,
        "total": [int(v) for v in total],
        "products": [[int(v) for v in row] for row in products],
        "rejected": rejected,
    }
    write_atomically(_part(path), json.dumps(part, ensure_ascii=False).encode(errors="backslashreplace"))


def read_sample(file: Any, members: dict[str, Any]) -> tuple[tuple[int, ...], Image.Image]:
    """The SAMPLE record and the decoded image of one sample. Raises ValueError and Pillow's errors."""
    member = next((members[ext] for ext in IMAGES if ext in members), None)
    if member is None or "cls" not in members:
        raise ValueError(f"needs one of {', '.join(IMAGES)} and cls, has {', '.join(members)}")
    file.seek(members["cls"].offset_data)
    label = int(file.read(members["cls"].size))
    if not 0 <= label < 1 << 31:
        raise ValueError(f"label {label} is not a class number")
    file.seek(member.offset_data - HEADER)
    header, data = file.read(HEADER), file.read(member.size)
    image = Image.open(BytesIO(data))
    if image.format not in FORMATS:
        raise ValueError(f"is a {image.format} image: pack it from a folder, or write it as JPEG, PNG or WebP")
    if max(image.size) > 65535:
        raise ValueError(f"is {image.width}x{image.height} pixels: at most 65535 a side")
    image.load()
    return (member.offset_data, member.size, *image.size, label, crc32(header[:NAME]), crc32(data)), upright_rgb(image)


def _finish(
    directory: Path,
    tars: list[Path],
    classes: Sequence[str] | None,
    split: str,
    stored: dict[str, Any],
    fingerprint: str,
    rejected: list[dict[str, str]],
) -> Manifest:
    parts = [json.loads(_part(tar).read_bytes()) for tar in tars]
    rows = np.concatenate([np.load(directory / WORK / f"{tar.name}.npy") for tar in tars])
    rejected = rejected + [line for part in parts for line in part["rejected"]]
    lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in rejected)
    write_atomically(directory / REJECTED, lines.encode(errors="backslashreplace"))
    if not len(rows):
        raise ShardError(f"no usable image in {directory}: {len(rejected)} were rejected, see {directory / REJECTED}")
    top = int(rows["label"].max())
    names = list(classes) if classes is not None else [str(k) for k in range(top + 1)]
    if top >= len(names):
        raise ShardError(
            f"{directory}: label {top} is out of range for {len(names)} classes: name all of them in --classes"
        )
    mean, std, values, vectors = _statistics(parts)
    _save(directory / INDEX, rows)
    manifest = Manifest(
        split=split,
        samples=len(rows),
        classes=names,
        shards=[part["shard"] for part in parts],
        index_sha256=sha256(directory / INDEX),
        mean=_digits(mean),
        std=_digits(std),
        eigenvalues=_digits(values),
        eigenvectors=[_digits(row) for row in vectors],
        stored=stored,
        source=fingerprint,
    )
    manifest.write(directory)
    return manifest


def _statistics(parts: list[dict[str, Any]]) -> tuple[NDArray[np.float64], ...]:
    """Mean, standard deviation, and eigenvalues and eigenvectors (columns) of the RGB covariance, pixels in [0, 1]."""
    pixels = sum(part["pixels"] for part in parts)
    total, products = (sum(np.array(part[k], object) for part in parts) for k in ("total", "products"))
    mean = np.array(total / pixels, np.float64) / 255
    covariance = np.array(products / pixels, np.float64) / 255**2 - np.outer(mean, mean)
    values, vectors = np.linalg.eigh(covariance)
    values, vectors = values[::-1].clip(0), vectors[:, ::-1]
    vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(0), range(3)])  # the sign of an eigenvector is free
    return mean, np.sqrt(np.diag(covariance)), values, vectors


def _save(path: Path, rows: NDArray[Any]) -> None:
    data = BytesIO()
    np.save(data, rows)
    write_atomically(path, data.getvalue())


def _known_names(directory: Path) -> list[str] | None:
    """The class names of the manifest that is there; None without one, or where it holds numbers in their place."""
    try:
        names = Manifest.read(directory).classes
    except ShardError:
        return None
    return None if names == [str(k) for k in range(len(names))] else names


def _digits(values: NDArray[np.float64]) -> list[float]:
    return [float(f"{v:.9g}") for v in values]


@contextmanager
def _unfinished(directory: Path, fingerprint: str, *, foreign: bool = False, shared: bool = False) -> Iterator[None]:
    """Hold the set's working folder: alone or with the packers of other shares, and only for the plan it was begun
    with; removed when all is done."""
    work = directory / WORK
    if not foreign and not work.exists() and any(directory.glob("*.tar")):
        raise ShardError(f"{directory} holds tars of something else: choose another directory")
    work.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.open(work / "plan", os.O_RDWR | os.O_CREAT, 0o666), "r+") as plan:
        try:
            fcntl.flock(plan, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ShardError(f"{directory} is being packed by another process: wait for it") from error
        begun, line = plan.read(), f"{'index' if foreign else 'pack'} {fingerprint}"
        if begun not in ("", line) and not (foreign and begun.startswith("index ")):
            raise ShardError(
                f"{directory} holds an unfinished pack with another source or other options: repeat that command, or "
                f"delete {directory} and begin anew"
            )
        if begun != line:
            for old in work.glob("*.json") if begun else ():  # of tars that have changed since
                old.unlink()
            plan.seek(0)  # two shares that begin at once write the same
            plan.write(line)
            plan.truncate()
        yield
    if not shared:
        shutil.rmtree(work)


def _part(path: Path) -> Path:
    return path.parent / WORK / f"{path.name}.json"


def _key(number: int, name: str) -> str:
    """A unique WebDataset key, still telling where the image came from: no dots, ASCII, short enough for ustar."""
    stem = name.rsplit(".", 1)[0] if "/" in name else name
    return f"{number:09d}-{re.sub('[^A-Za-z0-9_-]+', '-', stem)[-80:]}"


def _shard_count(source: Source, trial: list[Item], total: int, options: Options) -> int:
    """How many shards of about `shard_mb` the source needs, from the stored size of a few samples."""
    sizes = []
    for item in trial:
        try:
            sizes.append(len(to_jpeg(source.load(item.reference), options.shorter_side, options.quality)))
        except Exception:  # it is rejected, and named, when it is packed
            continue
    sample = float(np.mean(sizes)) if sizes else 0.0
    wanted = round(total * (sample + 4 * HEADER) / (options.shard_mb * 1e6))
    few = min(8, total // 100)  # even of a small set: a worker packs a whole shard
    return min(total, max(1, wanted, few))


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
