"""A shard set on disk: plain WebDataset tars, a manifest and a memory-mapped index that is bound to them.

DIR/shard-000000.tar ...   `<key>.jpg` (or .jpeg .png .webp) and `<key>.cls`, the class number in ASCII
DIR/index.npy              one SAMPLE record per sample
DIR/quarantine.jsonl       samples that `verify` found bad, if any; they are left out
DIR/manifest.json          describes the set; written last, so a directory without one is an unfinished pack
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from io import FileIO
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import UserError
from pipelines.files import sha256, write_atomically

VERSION = 1
MANIFEST = "manifest.json"
INDEX = "index.npy"
QUARANTINE = "quarantine.jsonl"
IMAGES = ("jpg", "jpeg", "png", "webp")
HEADER = tarfile.BLOCKSIZE  # the ustar header directly before each member's data
NAME = 100  # its first field: the name
SIZE = slice(124, 136)  # another: the size in octal

# A sample: its image's place in the shard, size and label, and the CRC-32 of its member name and of its bytes.
SAMPLE = np.dtype(
    [
        ("offset", "<u8"),
        ("size", "<u4"),
        ("width", "<u2"),
        ("height", "<u2"),
        ("label", "<i4"),
        ("name", "<u4"),
        ("crc", "<u4"),
    ]
)


class BadSample(UserError):
    """The bytes of a sample are not those that were indexed."""


class ShardError(UserError):
    """A shard set that cannot be used; the message names the file and the remedy."""


@dataclass(frozen=True)
class Manifest:
    """Description of a shard set.

    Attributes:
        classes: class names; the place in the list is the label.
        shards: for each shard its `name`, number of `samples`, `bytes` and `sha256`.
        index_sha256: of `index.npy`.
        mean, std: per RGB channel, pixels scaled to [0, 1].
        eigenvalues, eigenvectors: of the 3x3 covariance of RGB values scaled to [0, 1], largest first;
            eigenvectors are columns.
        stored: how the images were stored (shorter side, quality, seed).
        source: fingerprint of what was packed, so that a repeated pack knows its own work.
    """

    split: str
    samples: int
    classes: list[str]
    shards: list[dict[str, Any]]
    index_sha256: str
    mean: list[float]
    std: list[float]
    eigenvalues: list[float]
    eigenvectors: list[list[float]]
    stored: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    version: int = VERSION

    def write(self, directory: Path) -> None:
        """Write atomically, with a checksum over everything else."""
        body = asdict(self)
        body["checksum"] = _checksum(body)
        write_atomically(directory / MANIFEST, json.dumps(body, indent=1, ensure_ascii=False).encode())

    @staticmethod
    def read(directory: Path) -> Manifest:
        """The manifest of a set. Raises ShardError with the remedy if there is no usable one."""
        path = directory / MANIFEST
        if not path.exists():
            if not any(directory.glob("*.tar")):
                raise ShardError(f"no shards in {directory}: make them with `python -m pipelines pack ... {directory}`")
            raise ShardError(
                f"{directory} has shards but no {MANIFEST}: repeat the pack command to finish an interrupted pack, "
                f"or run `python -m pipelines index {directory}` on shards of another tool"
            )
        try:
            body = json.loads(path.read_bytes())
            if body.pop("checksum") != _checksum(body):
                raise ValueError("its checksum does not match")
            version = body["version"]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            remedy = f"run `python -m pipelines index {directory}` to make it anew"
            raise ShardError(f"{path} is damaged ({error}): {remedy}") from error
        if version != VERSION:  # before its fields are looked at: another version has others
            raise ShardError(f"{path} has format version {version}, this program reads {VERSION}: pack anew")
        return Manifest(**body)


class _Tar(FileIO):
    """A tar opened for reading; closed when neither the cache nor a reading thread holds it."""

    def __del__(self) -> None:
        self.close()


class ShardSet:
    """A shard set opened for reading. Raises ShardError if tars, index and manifest do not belong together."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.manifest = Manifest.read(self.directory)
        self.names: list[str] = [shard["name"] for shard in self.manifest.shards]
        self.shard_samples = np.array([shard["samples"] for shard in self.manifest.shards], np.int64)
        self._ends = np.cumsum(self.shard_samples)
        self.index = self._open_index()
        self._check_tars()
        self._leave_out_quarantined()
        self._file = lru_cache(256)(self._open_file)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def classes(self) -> list[str]:
        return self.manifest.classes

    def rows(self, samples: NDArray[np.int64]) -> NDArray[Any]:
        """The index's records of these samples, SAMPLE [n]."""
        rows: NDArray[Any] = self.index[samples]
        return rows

    def sizes(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Width and height of these samples, int64 [n, 2]."""
        rows = self.rows(samples)
        return np.stack([rows["width"], rows["height"]], axis=1).astype(np.int64)

    def labels(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Class numbers of these samples, int64 [n]."""
        return self.rows(samples)["label"].astype(np.int64)

    @cached_property
    def sides(self) -> tuple[int, int]:
        """The least and the largest shorter side of all samples, in pixels."""
        side = np.minimum(self.index["width"], self.index["height"])
        return int(side.min()), int(side.max())

    def read(self, sample: int) -> NDArray[np.uint8]:
        """The encoded image of a sample, uint8 [size].

        The tar header before the data is read with it and compared with the index, so a tar that was exchanged
        after the set was opened is an error as well.
        """
        (row,) = self.rows(np.array([sample]))
        shard, size = self.shard_of(sample), int(row["size"])
        file = self._file(shard)  # held, since another thread may drop it from the cache and so close it
        raw = os.pread(file.fileno(), HEADER + size, int(row["offset"]) - HEADER)
        if len(raw) != HEADER + size or not is_header(raw[:HEADER], row["name"], size):
            raise self._mismatch(shard)
        data = memoryview(raw)[HEADER:]
        if crc32(data) != row["crc"]:
            raise BadSample(f"{self.name(sample)} is damaged")
        return np.frombuffer(data, np.uint8)

    def cached(self, samples: NDArray[np.int64]) -> list[NDArray[np.uint8] | None]:
        """The encoded images of these samples that the kernel holds in memory, uint8 [size] each.

        None stands for all others, since this waits for no disk, and for one that is not as indexed: `read` says why.
        """
        found: list[NDArray[np.uint8] | None] = [None] * len(samples)
        rows = self.rows(samples)
        columns = (rows[name].tolist() for name in ("offset", "size", "name", "crc"))
        shards = np.searchsorted(self._ends, samples, side="right").tolist()
        for i, (shard, offset, size, name, crc) in enumerate(zip(shards, *columns, strict=True)):
            raw = np.empty(HEADER + size, np.uint8).data
            file = self._file(shard)
            try:
                got = os.preadv(file.fileno(), [raw], offset - HEADER, os.RWF_NOWAIT)
            except OSError:  # not in memory, or a file system that cannot say
                continue
            if got == len(raw) and is_header(bytes(raw[:HEADER]), name, size) and crc32(raw[HEADER:]) == crc:
                found[i] = np.frombuffer(raw[HEADER:], np.uint8)
        return found

    def shard_of(self, sample: int) -> int:
        """Number of the shard that holds a sample."""
        return int(np.searchsorted(self._ends, sample, side="right"))

    def name(self, sample: int) -> str:
        """`shard-000000.tar/<key>.jpg`: where a person finds the sample."""
        shard = self.shard_of(sample)
        file = self._file(shard)
        raw = os.pread(file.fileno(), NAME, int(self.index[sample]["offset"]) - HEADER)
        return f"{self.names[shard]}/{raw.rstrip(bytes(1)).decode(errors='replace')}"

    def _open_file(self, shard: int) -> _Tar:
        return _Tar(self.directory / self.names[shard])

    def _open_index(self) -> NDArray[Any]:
        path = self.directory / INDEX
        remedy = f"run `python -m pipelines index {self.directory}`"
        if not path.exists():
            raise ShardError(f"{path} is missing: {remedy}")
        if sha256(path) != self.manifest.index_sha256:
            raise ShardError(f"{path} is damaged or of another shard set (sha256 differs): {remedy}")
        index: NDArray[Any] = np.load(path, mmap_mode="r")
        if not len(index):
            raise ShardError(f"{self.directory} holds no samples: pack it from a source that has images")
        top = int(index["label"].max())
        if top >= len(self.classes):
            raise ShardError(f"{self.directory}: label {top} is out of range for {len(self.classes)} classes: {remedy}")
        return index

    def _leave_out_quarantined(self) -> None:
        """Drop the samples that `verify` listed; the tars stay as they are."""
        path = self.directory / QUARANTINE
        self.fingerprint = self.manifest.index_sha256
        if not path.exists():
            return
        starts = dict(zip(self.names, self._ends - self.shard_samples, strict=True))
        kept = np.ones(len(self.index), np.bool_)
        try:
            lines = [json.loads(line) for line in path.read_bytes().splitlines()]
            kept[[starts[line["shard"]] + line["row"] for line in lines if "row" in line]] = False
        except (ValueError, TypeError, LookupError) as error:
            raise ShardError(
                f"{path} is damaged ({error}): run `python -m pipelines verify {self.directory}`"
            ) from error
        shard = np.searchsorted(self._ends, np.arange(len(self.index)), side="right")
        self.shard_samples = np.bincount(shard[kept], minlength=len(self.names))
        self._ends = np.cumsum(self.shard_samples)
        self.index = self.index[kept]
        self.fingerprint = hashlib.sha256(self.fingerprint.encode() + path.read_bytes()).hexdigest()
        if not len(self.index):
            raise ShardError(f"{path} leaves no sample of {self.directory}: pack it anew")

    def _check_tars(self) -> None:
        """Compare each tar's size, and the headers of its first and last sample, with the index."""
        starts = self._ends - self.shard_samples
        for i, shard in enumerate(self.manifest.shards):
            path = self.directory / shard["name"]
            if not path.exists():
                raise ShardError(f"{path} is missing: put it back or pack {self.directory} anew")
            if path.stat().st_size != shard["bytes"]:
                raise self._mismatch(i)
            with open(path, "rb", buffering=0) as file:
                for row in self.index[[starts[i], self._ends[i] - 1]] if shard["samples"] else []:
                    header = os.pread(file.fileno(), HEADER, int(row["offset"]) - HEADER)
                    if not is_header(header, row["name"], row["size"]):
                        raise self._mismatch(i)

    def _mismatch(self, shard: int) -> ShardError:
        return ShardError(
            f"{self.directory / self.names[shard]} is not the tar that was indexed: put the right one back, or run "
            f"`python -m pipelines index {self.directory}`"
        )


def tar_samples(path: Path) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Samples of a tar, grouped as WebDataset does: neighbours whose names agree up to the first dot of the file name.

    Yields (key, {extension: member}). Raises ShardError if the tar is truncated, damaged or compressed.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            key, members = "", dict[str, tarfile.TarInfo]()
            for member in tar:
                folder, _, base = member.name.rpartition("/")
                stem, _, extension = base.partition(".")
                if not member.isreg() or not extension:
                    continue
                if (name := f"{folder}/{stem}" if folder else stem) != key:
                    if members:
                        yield key, members
                    key, members = name, {}
                members[extension.lower()] = member
            if members:
                yield key, members
            with open(path, "rb") as file:
                file.seek(tar.offset)
                if file.read(HEADER) != bytes(HEADER):  # tarfile takes a damaged header for the end and says nothing
                    raise tarfile.ReadError(f"it breaks off at byte {tar.offset}")
    except tarfile.TarError as error:
        raise ShardError(f"{path} is not a whole, uncompressed tar ({error}): copy or make it anew") from error


def is_header(header: bytes, name: int, size: int) -> bool:
    """True if a tar header is that of the indexed sample, by the checksum of its name field and the member's size."""
    if len(header) != HEADER or crc32(header[:NAME]) != name:
        return False
    try:
        return int(header[SIZE].strip(b" \0"), 8) == size
    except ValueError:
        return False


def _checksum(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
