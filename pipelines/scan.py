"""Scans: what index and manifest need of each finished shard, and the two made from the scans of all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.errors import first_line
from pipelines.files import as_text, jsonl, replacing, sha256, write_atomically
from pipelines.manifest import Manifest, ShardError
from pipelines.parallel import tick
from pipelines.rows import HEADER, NAME, SAMPLE, checksum, sides, top_label
from pipelines.shards import IMAGES, INDEX, QUARANTINE
from pipelines.sources import upright_rgb
from pipelines.tars import tar_samples

WORK = ".pack"  # inside a set while it is being made: the plan, and the scan of each finished shard
REJECTED = "rejected.jsonl"
# What DALI decodes on the CPU and on the GPU, whatever the extension says.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP")
LARGEST = 65535  # pixels per side: what SAMPLE holds


def scan_shard(path: Path, rejected: list[dict[str, str]], *, count: bool) -> None:
    """Decode every sample of a shard and keep its scan: what index and manifest need of it.

    Args:
        rejected: files that were left out when the shard was written; those that it holds and that cannot be used are
            added.
        count: `tick` for each sample.
    """
    rows = []
    pixels, total, products = 0, np.zeros(3), np.zeros((3, 3))
    with open(path, "rb") as file:
        for key, members in tar_samples(path):
            try:
                row, image = read_sample(file, members)
            except Exception as error:  # whatever a decoder makes of garbage
                rejected.append({"file": f"{path.name}/{key}", "reason": first_line(error)})
            else:
                rows.append(row)
                flat = np.asarray(image, np.float64).reshape(-1, 3)  # sums of integers below 2^53: exact in any order
                pixels += len(flat)
                total += flat.sum(0)
                products += flat.T @ flat
            if count:
                tick()
    data = BytesIO()
    np.save(data, np.array(rows, SAMPLE))
    write_atomically(_rows_file(path), data.getvalue())
    scan = {
        "shard": {
            "name": as_text(path.name),
            "samples": len(rows),
            "bytes": path.stat().st_size,
            "sha256": sha256(path),
        },
        "pixels": pixels,
        "total": [int(v) for v in total],
        "products": [[int(v) for v in row] for row in products],
        "rejected": rejected,
    }
    write_atomically(scan_file(path), json.dumps(scan, ensure_ascii=False).encode(errors="backslashreplace"))


def scan_file(path: Path) -> Path:
    """Where the scan of a shard is kept while its set is unfinished. Written last: if it is there, so is the shard."""
    return path.parent / WORK / f"{path.name}.json"


def _rows_file(path: Path) -> Path:
    return path.parent / WORK / f"{path.name}.npy"


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
    if max(image.size) > LARGEST:
        raise ValueError(f"is {image.width}x{image.height} pixels: at most {LARGEST} a side")
    image.load()
    return (member.offset_data, member.size, *image.size, label, crc32(header[:NAME]), crc32(data)), upright_rgb(image)


def finish(
    directory: Path,
    tars: list[Path],
    classes: Sequence[str] | None,
    split: str,
    stored: dict[str, Any],
    fingerprint: str,
    rejected: list[dict[str, str]],
) -> Manifest:
    """Write the list of rejected files, the index, and last the manifest, from the scans of all shards.

    Args:
        classes: names, in the order of their labels; None: the numbers themselves.
        stored, fingerprint: as in the manifest.
        rejected: files that never reached a shard.

    Raises ShardError if no image is left, or if a label has no name.
    """
    scans = [json.loads(scan_file(tar).read_bytes()) for tar in tars]
    rejected = rejected + [line for scan in scans for line in scan["rejected"]]
    write_atomically(directory / REJECTED, jsonl(rejected))
    if not any(scan["shard"]["samples"] for scan in scans):
        raise ShardError(f"no usable image in {directory}: {len(rejected)} were rejected, see {directory / REJECTED}")
    # A look at all rows before any is written: there may be more of them than memory holds.
    looks = [_look(_rows_file(tar)) for tar in tars]
    top = max(look.top for look in looks)
    names = list(classes) if classes is not None else [str(k) for k in range(top + 1)]
    if top >= len(names):
        raise ShardError(
            f"{directory}: label {top} is out of range for {len(names)} classes: name all of them in --classes"
        )
    mean, std, values, vectors = _statistics(scans)
    shards = [scan["shard"] | {"rows": look.checksum} for scan, look in zip(scans, looks, strict=True)]
    samples = sum(shard["samples"] for shard in shards)
    manifest = Manifest(
        split=split,
        samples=samples,
        classes=names,
        shards=shards,
        index_sha256=_write_index(directory / INDEX, samples, tars),
        mean=_digits(mean),
        std=_digits(std),
        eigenvalues=_digits(values),
        eigenvectors=[_digits(row) for row in vectors],
        stored=stored,
        source=fingerprint,
        sides=[min(look.least for look in looks), max(look.largest for look in looks)],
    )
    _write_manifest(directory, manifest)
    return manifest


def _write_manifest(directory: Path, manifest: Manifest) -> None:
    """A quarantine stays only if the index is that of the manifest before: its rows are numbered by it."""
    try:
        same = Manifest.read(directory).index_sha256 == manifest.index_sha256
    except ShardError:
        same = False
    if not same:
        (directory / QUARANTINE).unlink(missing_ok=True)
    manifest.write(directory)


class _Look(NamedTuple):
    """At the rows of a shard: their checksum, the largest label (-1 if there is none), the shorter sides' extremes."""

    checksum: int
    top: int = -1
    least: int = LARGEST
    largest: int = 0


def _look(path: Path) -> _Look:
    rows = np.load(path)
    return _Look(checksum(rows), top_label(rows), *sides(rows)) if len(rows) else _Look(checksum(rows))


def _write_index(path: Path, samples: int, tars: list[Path]) -> str:
    """Write the rows of all shards, one shard after the other, as numpy would all together. Returns the SHA-256."""
    header = BytesIO()
    descr = np.lib.format.dtype_to_descr(SAMPLE)
    np.lib.format.write_array_header_1_0(header, {"descr": descr, "fortran_order": False, "shape": (samples,)})
    digest = hashlib.sha256()
    with replacing(path) as file:
        for piece in chain([header.getvalue()], (np.load(_rows_file(tar)).tobytes() for tar in tars)):
            file.write(piece)
            digest.update(piece)
    return digest.hexdigest()


def _statistics(scans: list[dict[str, Any]]) -> tuple[NDArray[np.float64], ...]:
    """Mean, standard deviation, and eigenvalues and eigenvectors (columns) of the RGB covariance, pixels in [0, 1]."""
    # Sums over a large set do not fit into 64 bits: object arrays hold Python's integers.
    pixels = sum(scan["pixels"] for scan in scans)
    total = sum(np.array(scan["total"], object) for scan in scans)
    products = sum(np.array(scan["products"], object) for scan in scans)
    mean = np.array(total / pixels, np.float64) / 255
    # In integers to the end: of a channel that never varies nothing is left, and not a rounding error below zero.
    scatter = products * pixels - np.outer(total, total)
    covariance = np.array(scatter / pixels**2, np.float64) / 255**2
    values, vectors = np.linalg.eigh(covariance)
    values, vectors = values[::-1].clip(0), vectors[:, ::-1]
    vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(0), range(3)])  # the sign of an eigenvector is free
    return mean, np.sqrt(np.diag(covariance)), values, vectors


def _digits(values: NDArray[np.float64]) -> list[float]:
    return [float(f"{v:.9g}") for v in values]
