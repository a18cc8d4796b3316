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
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import UserError, first_line
from pipelines.files import HeldFile, sha256, write_atomically
from pipelines.rows import HEADER, fault, mapped, quarantined, sides, top_label

VERSION = 1
MANIFEST = "manifest.json"
INDEX = "index.npy"
QUARANTINE = "quarantine.jsonl"
IMAGES = ("jpg", "jpeg", "png", "webp")
NAME = 100  # the first field of a tar header: the name
SIZE = slice(124, 136)  # another: the size in octal


class BadSample(UserError):
    """The bytes of a sample are not those that were indexed."""


class ShardError(UserError):
    """A shard set that cannot be used; the message names the file and the remedy."""


@dataclass(frozen=True)
class Manifest:
    """Description of a shard set.

    Attributes:
        classes: class names; the place in the list is the label.
        shards: for each shard its `name`, number of `samples`, `bytes` and `sha256`, and the checksum of its `rows` of
            the index. Sets of an earlier day lack the last, and the sides.
        index_sha256: of `index.npy`.
        mean, std: per RGB channel, pixels scaled to [0, 1].
        eigenvalues, eigenvectors: of the 3x3 covariance of RGB values scaled to [0, 1], largest first;
            eigenvectors are columns.
        stored: how the images were stored (shorter side, quality, seed).
        source: fingerprint of what was packed, so that a repeated pack knows its own work.
        sides: the least and the largest shorter side of the images, in pixels.
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
    sides: list[int] = field(default_factory=list)
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
            if (version := body["version"]) == VERSION:  # else its fields are others
                known = {f.name for f in fields(Manifest)}
                return Manifest(**{name: value for name, value in body.items() if name in known})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            remedy = f"run `python -m pipelines index {directory}` to make it anew"
            raise ShardError(f"{path} is damaged ({error}): {remedy}") from error
        raise ShardError(f"{path} has format version {version}, this program reads {VERSION}: pack anew")


class ShardSet:
    """A shard set opened for reading.

    Opening costs nothing per sample and no system call per shard: a tar is compared with index and manifest when it is
    first opened, the rows of a shard when one of them is first asked for. Every method raises ShardError for what does
    not belong together; so does opening, for manifest, quarantine and the length of the index.

    Attributes:
        names: of the tars.
        shard_samples: number of samples of each, without the quarantined ones, int64 [shards].
        fingerprint: of index and quarantine, in hex.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.manifest = Manifest.read(self.directory)
        self.names: list[str] = [shard["name"] for shard in self.manifest.shards]
        rows = np.array([shard["samples"] for shard in self.manifest.shards], np.int64)
        self._row_ends = np.cumsum(rows)
        self._rows = self._open_index()
        bad, self.fingerprint = self._quarantine()
        self._before = bad - np.arange(len(bad))  # samples before each bad row
        shards = np.searchsorted(self._row_ends, bad, side="right")
        self.shard_samples = rows - np.bincount(shards, minlength=len(rows))
        self._ends = np.cumsum(self.shard_samples)
        if not len(self):
            raise ShardError(f"{self.directory / QUARANTINE} leaves no sample of {self.directory}: pack it anew")
        self._checked = np.zeros(len(rows), np.bool_)  # shards whose rows were found to be right
        self._looked_at = np.zeros(len(rows), np.bool_)  # and whose tar
        self._file = lru_cache(256)(self._open_file)

    def __len__(self) -> int:
        return len(self._rows) - len(self._before)

    @property
    def classes(self) -> list[str]:
        return self.manifest.classes

    @cached_property
    def index(self) -> NDArray[Any]:
        """The records of all samples, SAMPLE [n]: for small sets. Those of a billion have 28 GB."""
        return self.rows(np.arange(len(self)))

    def rows(self, samples: NDArray[np.int64]) -> NDArray[Any]:
        """The index's records of these samples, SAMPLE [n]."""
        rows = samples + np.searchsorted(self._before, samples, side="right") if len(self._before) else samples
        shards = np.searchsorted(self._row_ends, rows, side="right")
        for shard in np.unique(shards[~self._checked[shards]]):  # two threads may do it at once, and lose but time
            if reason := fault(self._rows_of(shard), self.manifest.shards[shard], len(self.classes)):
                raise self._damaged(reason)
            self._checked[shard] = True
        taken: NDArray[Any] = self._rows[rows]
        return taken

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
        # Of a set of an earlier day without its quarantined samples, as then: whether to resize follows from it.
        least, largest = self.manifest.sides or sides(self.index if len(self._before) else self._rows)
        return least, largest

    def read(self, sample: int) -> NDArray[np.uint8]:
        """The encoded image of a sample, uint8 [size].

        The tar header before the data is read with it and compared with the index, so a tar that was exchanged
        after the set was opened is an error as well.
        """
        row = self.rows(np.array([sample]))[0]
        shard = self.shard_of(sample)
        file = self._file(shard)  # held, since another thread may drop it from the cache and so close it
        raw = os.pread(file.fileno(), HEADER + int(row["size"]), int(row["offset"]) - HEADER)
        if not is_header(raw[:HEADER], row) or len(raw) != HEADER + row["size"]:
            raise self._mismatch(shard)
        data = np.frombuffer(raw, np.uint8)[HEADER:]
        if crc32(raw[HEADER:]) != row["crc"]:
            raise BadSample(f"{self.name(sample)} is damaged")
        return data

    def shard_of(self, sample: int) -> int:
        """Number of the shard that holds a sample."""
        return int(np.searchsorted(self._ends, sample, side="right"))

    def name(self, sample: int) -> str:
        """`shard-000000.tar/<key>.jpg`: where a person finds the sample."""
        shard = self.shard_of(sample)
        file = self._file(shard)
        raw = os.pread(file.fileno(), NAME, int(self.rows(np.array([sample]))["offset"][0]) - HEADER)
        return f"{self.names[shard]}/{raw.rstrip(bytes(1)).decode(errors='replace')}"

    def _open_file(self, shard: int) -> HeldFile:
        """A tar. The first time its size, and the headers of its first and last sample, are compared with the index."""
        path = self.directory / self.names[shard]
        try:
            file = HeldFile(path)
        except FileNotFoundError as error:
            raise ShardError(f"{path} is missing: put it back or pack {self.directory} anew") from error
        if not self._looked_at[shard]:
            if os.fstat(file.fileno()).st_size != self.manifest.shards[shard]["bytes"]:
                raise self._mismatch(shard)
            for row in self._rows_of(shard)[[0, -1]]:
                if not is_header(os.pread(file.fileno(), HEADER, int(row["offset"]) - HEADER), row):
                    raise self._mismatch(shard)
            self._looked_at[shard] = True
        return file

    def _open_index(self) -> NDArray[Any]:
        """The rows of the index, mapped: nothing of them is read, unless the manifest is too old to have their sums."""
        path, manifest = self.directory / INDEX, self.manifest
        if not path.exists():
            raise ShardError(f"{path} is missing: {self._remedy}")
        if not (manifest.samples and self.names):
            raise ShardError(f"{self.directory} holds no samples: pack it from a source that has images")
        old = not all("rows" in shard for shard in manifest.shards)
        if old and sha256(path) != manifest.index_sha256:
            raise self._damaged("sha256 differs")
        try:
            index = mapped(path)
        except Exception as error:  # whatever numpy makes of garbage
            raise self._damaged(first_line(error)) from error
        if not index.shape == (manifest.samples,) == (self._row_ends[-1],):
            raise self._damaged("it has other rows than the manifest says")
        if old and (top := top_label(index)) >= len(self.classes):
            raise self._damaged(f"label {top} is out of range for {len(self.classes)} classes")
        return index

    def _rows_of(self, shard: int) -> NDArray[Any]:
        """All rows of a shard, quarantined ones too."""
        end = int(self._row_ends[shard])
        return self._rows[end - self.manifest.shards[shard]["samples"] : end]

    def _quarantine(self) -> tuple[NDArray[np.int64], str]:
        """The rows that `verify` found to be bad, sorted, and the fingerprint of what is left."""
        path, whole = self.directory / QUARANTINE, self.manifest.index_sha256
        if not path.exists():
            return np.empty(0, np.int64), whole
        text = path.read_bytes()
        try:
            bad = quarantined([json.loads(line) for line in text.splitlines()], self.names, self._row_ends)
        except (ValueError, TypeError, LookupError) as error:
            remedy = f"run `python -m pipelines verify {self.directory}`"
            raise ShardError(f"{path} is damaged ({error}): {remedy}") from error
        return bad, hashlib.sha256(whole.encode() + text).hexdigest()

    @property
    def _remedy(self) -> str:
        return f"run `python -m pipelines index {self.directory}`"

    def _damaged(self, reason: str) -> ShardError:
        return ShardError(f"{self.directory / INDEX} is damaged or of another shard set ({reason}): {self._remedy}")

    def _mismatch(self, shard: int) -> ShardError:
        path = self.directory / self.names[shard]
        return ShardError(f"{path} is not the tar that was indexed: put the right one back, or {self._remedy}")


def is_header(header: bytes, row: Any) -> bool:
    """True if a tar header is that of the indexed sample, by its name field and its size."""
    if len(header) != HEADER or crc32(header[:NAME]) != row["name"]:
        return False
    try:
        return bool(int(header[SIZE].strip(b" \0"), 8) == row["size"])
    except ValueError:
        return False


def _checksum(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
