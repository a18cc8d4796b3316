"""Shard set on disk: plain WebDataset tars, a manifest, and a memory-mapped index bound to the tars.

DIR/shard-000000.tar ...   `<key>.jpg` (or .jpeg .png .webp) and `<key>.cls`, the class number in ASCII
DIR/index.npy              one SAMPLE record per sample
DIR/quarantine.jsonl       samples that `verify` found bad, if any; others are shown in their place
DIR/manifest.json          describes the set; written last, so a directory without one is an unfinished pack
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from pipelines import quarantine
from pipelines.errors import UserError
from pipelines.files import HeldFile
from pipelines.here import Here, Waiting
from pipelines.indexed import IndexedRows
from pipelines.limits import limits
from pipelines.manifest import Manifest, ShardError
from pipelines.opened import PATIENCE, Absent, OpenTars
from pipelines.pillow import claims
from pipelines.rows import HEADER, NAME, inside, is_header
from pipelines.speech import in_line

INDEX = "index.npy"
IMAGES = ("jpg", "jpeg", "png", "webp")
TURNED = "turned"  # in a manifest's `stored`: number of images of a foreign set that need turning


class BadSample(UserError):
    """A sample whose bytes are not the indexed ones."""


class ShardSet:
    """A shard set opened for reading.

    Opening costs no system call per shard and nothing per sample, except for older sets without checksums of rows,
    whose index is read whole. A tar is compared with index and manifest when it is first opened, the rows of a shard
    when one of them is first requested. Every method raises ShardError if the parts do not match; so does opening, for
    manifest, quarantine and the length of the index. Methods that read a tar raise ReadError if that fails for more
    than `patience` seconds.

    No image may have more pixels than the `limits` allow where the set is opened.

    Args:
        listed: whether to read the quarantine list.
        here: where the tars lie; None: in the directory.

    Attributes:
        names: names of the tars.
        shard_samples: number of samples per tar, int64 [shards].
        fingerprint: SHA-256 of the index, in hex.
        quarantined: samples that `verify` found bad, sorted, int64 [n]. They count as samples, so that order and
            fingerprint are those of the whole set whether or not they are known, but they are never shown.
        earlier_fingerprint: fingerprint in earlier versions of this program, if there is a quarantine; else empty.
        hurried: returns True if unreadable tars are not waited for any more, since the process is to stop.
        waiting: called about once a second while a tar is fetched from elsewhere, from a thread that needs it, with a
            text and whether some of the tar has come since the last call.
        reached: called with the number of a tar whenever that is opened, from any thread.
        here: where the tars lie.
        place: the path or URL of the set, in messages.
    """

    hurried: Callable[[], bool] = staticmethod(lambda: False)
    waiting: Waiting | None = None
    reached: Callable[[int], None] = staticmethod(lambda _: None)

    def __init__(
        self, directory: str | Path, patience: float = PATIENCE, *, listed: bool = True, here: Here | None = None
    ) -> None:
        self.directory = Path(directory)
        self.here = here or Here(self.directory)
        self.place = self.here.name
        self.manifest = Manifest.read(self.directory)
        self.names: list[str] = [shard["name"] for shard in self.manifest.shards]
        shards = self.manifest.shards
        self.shard_samples = np.array([shard["samples"] for shard in shards], np.int64)
        self._index = IndexedRows(self.directory / INDEX, self.manifest, self.here, limits().pixels)
        self.fingerprint = self.manifest.index_sha256
        self.quarantined, self.earlier_fingerprint = np.empty(0, np.int64), ""
        if listed and (bad := quarantine.read(self.directory, self.manifest, self._index.ends, self.here)):
            self.quarantined, self.earlier_fingerprint = bad
        if len(self.quarantined) == len(self):
            path = self.here.path(quarantine.QUARANTINE)
            raise ShardError(f"{path} leaves no sample of {self.place}: pack it again")
        self._looked_at = np.zeros(len(shards), np.bool_)  # shards whose tar was checked
        self._tars = OpenTars(
            self._open_file,
            self.place,
            lambda shard: self.here.path(self.names[shard]),
            patience,
            lambda: self.hurried(),
        )
        self._nowait: int = getattr(os, "RWF_NOWAIT", 0)  # 0: no way to tell what is cached, as with an old libc

    def __len__(self) -> int:
        return len(self._index.rows)

    @cached_property
    def classes(self) -> list[str]:
        """Names of the classes, of printable characters: they are shown in lines, tables and pictures."""
        names, together = self.manifest.classes, "".join(self.manifest.classes)
        return names if in_line(together) == together else [in_line(name) for name in names]

    @property
    def turned(self) -> bool:
        """True if images are turned by their EXIF orientation when shown; those of a packed set are stored upright."""
        return TURNED in self.manifest.stored

    @property
    def firsts(self) -> NDArray[np.int64]:
        """Number of the first sample of each shard, int64 [shards]."""
        return self._index.ends - self.shard_samples

    @property
    def good(self) -> NDArray[np.int64]:
        """All samples except the quarantined ones, int64 [n]; for small sets."""
        return np.delete(np.arange(len(self)), self.quarantined)

    @cached_property
    def index(self) -> NDArray[Any]:
        """Index records of all samples, SAMPLE [n]; for small sets. A billion of them take 28 GB."""
        return self.rows(np.arange(len(self)))

    def rows(self, samples: NDArray[np.int64]) -> NDArray[Any]:
        """Index records of these samples, SAMPLE [n]."""
        return self._index.take(samples)

    def sizes(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Width and height of these samples, int64 [n, 2]."""
        rows = self.rows(samples)
        return np.stack([rows["width"], rows["height"]], axis=1).astype(np.int64)

    def labels(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Class numbers of these samples, int64 [n]."""
        return self.rows(samples)["label"].astype(np.int64)

    @cached_property
    def sides(self) -> tuple[int, int]:
        """Least and largest shorter side of all samples, in pixels."""
        return self._index.sides(self.quarantined)

    def read(self, sample: int) -> NDArray[np.uint8]:
        """Encoded image of a sample, uint8 [size].

        The tar header before the data is read along and compared with the index, so replacing a tar after the set was
        opened is an error as well.
        """
        (read,) = self.reads(np.array([sample]))
        return read()

    def reads(self, samples: NDArray[np.int64]) -> Iterator[Callable[[], NDArray[np.uint8]]]:
        """Yields one function per sample that does what `read` does. All rows are looked up at once."""
        return (partial(self._read, *place) for place in self._places(samples))

    def cached(self, samples: NDArray[np.int64]) -> list[NDArray[np.uint8] | None]:
        """Encoded images of the samples that are in the page cache, uint8 [size] each; None for all others.

        None also stands for a sample whose bytes are not the indexed ones: `read` tells whether they are damaged or of
        another tar. This never waits for an image nor opens a tar for the first time; it may wait for the index, or for
        a tar that was closed in favour of others.
        """
        found: list[NDArray[np.uint8] | None] = [None] * len(samples)
        places = self._places(samples) if self._nowait else iter(())
        for i, (shard, offset, size, _, crc, shape) in enumerate(places):
            if not self._looked_at[shard]:
                continue
            data = np.empty(size, np.uint8)
            try:
                file = self._tars.get(shard)
                got = os.preadv(file.fileno(), [data.data], offset, self._nowait)
            except (OSError, NotImplementedError) as error:
                if getattr(error, "errno", errno.EOPNOTSUPP) == errno.EOPNOTSUPP:  # unlike EAGAIN: not in memory
                    self._nowait = 0  # not supported by the file system or the system
                    break
                continue
            if got == size and crc32(data.data) == crc and claims(data.data, shape):
                found[i] = data
        return found

    def check_tars(self, *, sizes: bool) -> None:
        """Raises ShardError if a tar is missing, as far as that can be said at once; with `sizes`, if one has another
        size, too."""
        self.here.check(self.manifest.shards, sizes=sizes)

    def keep(self, shards: NDArray[np.int64]) -> None:
        """Closes all tars but these, if open ones take up room that others need."""
        if self.here.scarce:
            self._tars.keep(shards.tolist())

    def shard_of(self, sample: int) -> int:
        """Number of the shard that holds a sample."""
        return int(np.searchsorted(self._index.ends, sample, side="right"))

    def shards_of(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Numbers of the shards that hold these samples, int64 [n]."""
        return self._index.shards_of(samples)

    def name(self, sample: int) -> str:
        """Readable name of a sample: `shard-000000.tar/<key>.jpg`."""
        ((shard, offset, *_),) = self._places(np.array([sample]))
        return self._name(shard, offset)

    def _name(self, shard: int, offset: int) -> str:
        raw = self._tars.read(shard, lambda file: os.pread(file.fileno(), NAME, offset - HEADER))
        return f"{self.names[shard]}/{in_line(raw.rstrip(bytes(1)).decode(errors='replace'))}"

    def _places(self, samples: NDArray[np.int64]) -> Iterator[tuple[int, int, int, int, int, tuple[int, int]]]:
        """Place of each sample: shard, offset, size, the CRC-32 of its name and bytes, and its sides."""
        rows = self.rows(samples)
        columns = [rows[name].tolist() for name in ("offset", "size", "name", "crc")]
        columns.append(list(zip(rows["width"].tolist(), rows["height"].tolist(), strict=True)))
        return zip(self.shards_of(samples).tolist(), *columns, strict=True)

    def _read(self, *place: Any) -> NDArray[np.uint8]:
        try:
            return self._read_once(*place)
        except (BadSample, ShardError):
            if not self.here.mended(self.manifest.shards[place[0]]):
                raise
        self._tars.drop(place[0])
        return self._read_once(*place)

    def _read_once(
        self, shard: int, offset: int, size: int, name: int, crc: int, shape: tuple[int, int]
    ) -> NDArray[np.uint8]:
        raw = self._tars.read(shard, lambda file: os.pread(file.fileno(), HEADER + size, offset - HEADER))
        if len(raw) != HEADER + size or not is_header(raw[:HEADER], name, size):
            raise self._mismatch(shard)
        data = memoryview(raw)[HEADER:]
        if crc32(data) != crc:
            raise BadSample(f"{self._name(shard, offset)} is damaged")
        if not claims(data, shape):
            raise BadSample(f"{self._name(shard, offset)} has other sides than the index says")
        return np.frombuffer(data, np.uint8)

    def _open_file(self, shard: int) -> HeldFile:
        """Opens a tar. The first time, checks its size and the headers of its first and last sample by the index."""
        try:
            file = self.here.open(self.manifest.shards[shard], self._meanwhile)
        except FileNotFoundError as error:
            if self._looked_at[shard]:  # it existed before: its file system may be gone for a while
                raise
            raise self.here.missing(self.names[shard]) from error
        if not self._looked_at[shard]:
            if os.fstat(file.fileno()).st_size != self.manifest.shards[shard]["bytes"]:
                raise self._mismatch(shard)
            ends = self._index.of(shard)[[0, -1]]
            if not inside(ends, self._index.tar_bytes[shard]).all():
                raise self._mismatch(shard)
            for row in ends:
                header = os.pread(file.fileno(), HEADER, int(row["offset"]) - HEADER)
                if not is_header(header, row["name"], row["size"]):
                    raise self._mismatch(shard)
            self._looked_at[shard] = True
        self.reached(shard)
        return file

    def _meanwhile(self, text: str, moved: bool) -> None:
        """Whoever waits for a tar calls this at intervals."""
        if self.hurried():
            raise Absent("the process is to stop", passing=False)
        if text and self.waiting:
            self.waiting(text, moved)

    def _mismatch(self, shard: int) -> ShardError:
        return self.here.mismatch(self.names[shard])
