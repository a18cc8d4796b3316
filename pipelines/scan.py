"""Scans of finished shards, and the index and manifest made from the scans of all shards."""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO, RawIOBase
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipelines import quarantine
from pipelines.errors import first_line, of_the_system
from pipelines.files import as_text, jsonl, regular, replacing, write_atomically
from pipelines.manifest import Manifest, Shard, ShardError
from pipelines.parallel import tick
from pipelines.quarantine import QUARANTINE
from pipelines.rows import SAMPLE, Rows, checksum, sides, top_label
from pipelines.sample import LARGEST, read_sample
from pipelines.scanned import Scan, read_scan, rows_file, rows_of, scan_file
from pipelines.shards import IMAGES, INDEX, TURNED
from pipelines.speech import in_line, say
from pipelines.statistics import SUMS, Measure, of_all, pixel_sums
from pipelines.tars import tar_samples

REJECTED = "rejected.jsonl"
# Without names, more classes than both limits are not believed: such labels are ids.
MANY, PER_SAMPLE = 1000, 10  # classes; classes per sample
PIECE = 1 << 20  # bytes read at a time
NONE = Counter[str]()
HOW = ("enlarged", "unchanged")  # in a manifest's `stored`: so many images were small, or kept their bytes
REASONS = 3  # reasons listed in a message


def scan_shard(
    path: Path, rejected: list[dict[str, str]], *, count: bool, decode: bool = True, how: Mapping[str, int] = NONE
) -> None:
    """Reads every sample of a shard and stores its scan, from which index and manifest are made.

    Args:
        rejected: files left out when the shard was written; unusable files in the shard are added.
        count: call `tick` for each sample.
        decode: false to believe the headers of the images; the scan then has no sums of pixels.
        how: of the images of a pack, how many are stored in each way of `HOW`.
    """
    rows, sums = list[tuple[int, ...]](), np.zeros(SUMS, np.int64)
    turned, repeats, last, odd = 0, 0, "", list[int]()

    def left(name: str, reason: str) -> None:
        rejected.append({"file": f"{path.name}/{name}", "reason": reason})

    with open(path, "rb", opener=regular) as file, open(path, "rb", 0, opener=regular) as whole:
        hashed = _Hashed(whole)
        for key, members in tar_samples(path, left):
            repeats, last = repeats + (key == last), key
            hashed.read_to(max(member.offset_data + member.size for member in members.values()))
            try:
                row, image, lies, plain = read_sample(file, members, decode=decode)
            except Exception as error:  # decoders raise anything on garbage
                if of_the_system(error):
                    raise
                left(key, first_line(error))
            else:
                odd += [len(rows)] * (not plain)
                rows.append(row)
                turned += lies
                for extension in [e for e in IMAGES if e in members][1:]:
                    left(members[extension].name, "another image of the same key is used")
                sums += pixel_sums(image) if image else [row[2] * row[3], *[0] * (SUMS - 1)]
            if count:
                tick()
        digest = hashed.hexdigest()
    _write_rows(rows_file(path), rows)
    shard = {"name": as_text(path.name), "samples": len(rows), "bytes": path.stat().st_size, "sha256": digest}
    scan = {
        "shard": shard,
        "pixels": int(sums[0]),
        "total": sums[1:4].tolist(),
        "products": sums[4:].reshape(3, 3).tolist(),
        "rejected": rejected,
        **{"turned": turned, "repeats": repeats, "odd": odd, **how},
    }
    write_atomically(scan_file(path), json.dumps(scan, ensure_ascii=False).encode(errors="backslashreplace"))


def _write_rows(path: Path, rows: list[tuple[int, ...]]) -> None:
    data = BytesIO()
    np.save(data, np.array(rows, SAMPLE))
    write_atomically(path, data.getvalue())


class _Hashed:
    """SHA-256 of a file that is read a little ahead of another reader, so that a disk reads it once."""

    def __init__(self, file: RawIOBase) -> None:
        self._file, self._at, self._digest = file, 0, hashlib.sha256()

    def read_to(self, end: int) -> None:
        while self._at < end and (piece := self._file.read(min(PIECE, end - self._at))):
            self._digest.update(piece)
            self._at += len(piece)

    def hexdigest(self) -> str:
        """Of the whole file."""
        self.read_to(sys.maxsize)
        return self._digest.hexdigest()


def odd_samples(tars: Sequence[Path]) -> list[int]:
    """Sample numbers of a set that are not plain, from the scans of its tars."""
    found, first = list[int](), 0
    for scan in map(read_scan, tars):
        found += [first + row for row in scan.odd]
        first += scan.shard["samples"]
    return found


def reasons(rejected: Sequence[dict[str, str]]) -> str:
    """The most frequent reasons with their counts, as text."""
    counts = Counter(line["reason"] for line in rejected).most_common()
    told = [f"{in_line(reason)} ({count})" for reason, count in counts[:REASONS]]
    more = sum(count for _, count in counts[REASONS:])
    return "; ".join(told + [f"other reasons ({more})"] * bool(more))


def finish(
    directory: Path,
    tars: list[Path],
    classes: Sequence[str] | None,
    split: str,
    stored: dict[str, Any],
    fingerprint: str,
    rejected: list[dict[str, str]],
    measure: Measure = of_all,
) -> Manifest:
    """Writes the list of rejected files, the index and last the manifest, from the scans of all shards.

    Args:
        classes: names, in the order of their labels; None: the numbers themselves.
        stored, fingerprint: as in the manifest.
        rejected: files that never reached a shard.
        measure: makes the statistics of tars, given their scans.

    Raises ShardError if no usable image is left, or if a label has no name.
    """
    scans = [read_scan(tar) for tar in tars]
    rejected = rejected + [line for scan in scans for line in scan.rejected]
    write_atomically(directory / REJECTED, jsonl(rejected))
    if not any(scan.shard["samples"] for scan in scans):
        why = f"{len(rejected)} were rejected, see {directory / REJECTED}: {reasons(rejected)}"
        raise ShardError(f"no usable image in {directory}: {why}")
    # All rows are checked before any is written, shard by shard: together they may exceed memory.
    looks = [_look(rows_of(tar, scan)) for tar, scan in zip(tars, scans, strict=True)]
    shards: list[Shard] = [{**scan.shard, "rows": look.checksum} for scan, look in zip(scans, looks, strict=True)]
    samples = sum(shard["samples"] for shard in shards)
    names = _names(directory, classes, max(look.top for look in looks), samples)
    counts = {name: sum(getattr(scan, name) for scan in scans) for name in (TURNED, *HOW)}
    stored = stored | {name: many for name, many in counts.items() if many}
    _tell_repeats(directory, scans)
    manifest = Manifest(
        split=split,
        samples=samples,
        classes=names,
        shards=shards,
        index_sha256=_write_index(directory / INDEX, samples, (rows_of(*of) for of in zip(tars, scans, strict=True))),
        **measure(tars, scans)._asdict(),
        stored=stored,
        source=fingerprint,
        sides=[min(look.least for look in looks), max(look.largest for look in looks)],
    )
    _write_manifest(directory, manifest)
    return manifest


def _names(directory: Path, classes: Sequence[str] | None, top: int, samples: int) -> list[str]:
    """Class names of a set whose largest label is `top`. Raises ShardError."""
    if classes is not None and top >= len(classes):
        raise ShardError(
            f"{directory}: label {top} is out of range for {len(classes)} classes, the first of which has label 0: "
            f"name all of them in --classes"
        )
    if classes is None and top >= max(MANY, PER_SAMPLE * samples):
        raise ShardError(
            f"{directory}: label {top} would make {top + 1} classes of {samples} images, so the labels may be ids of "
            f"something: number the classes from 0 in the cls files, or name all of them in --classes"
        )
    return list(classes) if classes is not None else [str(k) for k in range(top + 1)]


def _tell_repeats(directory: Path, scans: list[Scan]) -> None:
    """Reports samples of the same name, which other tools cannot read."""
    where = [scan.shard["name"] for scan in scans if scan.repeats]
    if where:
        many = sum(scan.repeats for scan in scans)
        tars = ", ".join(where[:REASONS]) + (", ..." if len(where) > REASONS else "")
        say(
            f"{directory}: {many} samples have the same name as the one before them ({tars}): each was taken as a "
            f"sample of its own, but webdataset's reader refuses such a tar"
        )


def _write_manifest(directory: Path, manifest: Manifest) -> None:
    """A quarantine is kept only if it applies to this index: it names rows by number."""
    try:
        before = Manifest.read(directory).index_sha256
    except ShardError:
        before = ""
    if not quarantine.of_index(directory, manifest.index_sha256, before):
        (directory / QUARANTINE).unlink(missing_ok=True)
    manifest.write(directory)


class _Look(NamedTuple):
    """Checksum of a shard's rows, their largest label (-1 without rows) and extremes of the shorter side."""

    checksum: int
    top: int = -1
    least: int = LARGEST
    largest: int = 0


def _look(rows: Rows) -> _Look:
    return _Look(checksum(rows), top_label(rows), *sides(rows)) if len(rows) else _Look(checksum(rows))


def _write_index(path: Path, samples: int, rows: Iterable[Rows]) -> str:
    """Writes the rows of all shards, shard by shard, as one array in numpy's format. Returns its SHA-256."""
    header = BytesIO()
    descr = np.lib.format.dtype_to_descr(SAMPLE)
    np.lib.format.write_array_header_1_0(header, {"descr": descr, "fortran_order": False, "shape": (samples,)})
    digest = hashlib.sha256()
    with replacing(path) as file:
        for piece in chain([header.getvalue()], (of_one.tobytes() for of_one in rows)):
            file.write(piece)
            digest.update(piece)
    return digest.hexdigest()
