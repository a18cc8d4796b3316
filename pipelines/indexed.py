"""The rows of a set's index, memory-mapped: they are checked when they are first taken."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pipelines.files import sha256
from pipelines.here import Here
from pipelines.manifest import Manifest, ShardError
from pipelines.order import Ints
from pipelines.rows import TOO_LARGE, Rows, checksum, fault, mapped, sides, top_label


class IndexedRows:
    """Opening it reads nothing, unless the manifest is too old to have checksums of rows. Methods raise ShardError.

    Args:
        here: names the set in messages.
        pixels: of an image, at most.

    Attributes:
        rows: all of them, SAMPLE [n], not checked.
        ends: one past the last row of each shard, int64 [shards].
        tar_bytes: size of each shard, uint64 [shards].
    """

    def __init__(self, path: Path, manifest: Manifest, here: Here, pixels: int) -> None:
        self._manifest, self._here, self._pixels = manifest, here, pixels
        self._path = here.path(path.name)
        self.tar_bytes = np.array([shard["bytes"] for shard in manifest.shards], np.uint64)
        self.ends = np.cumsum(np.array([shard["samples"] for shard in manifest.shards], np.int64))
        self.rows = self._open(path)
        self._checked = np.zeros(len(manifest.shards), np.bool_)  # shards whose rows were checked

    def shards_of(self, samples: Ints) -> Ints:
        """Numbers of the shards that hold these samples, int64 [n]."""
        return np.searchsorted(self.ends, samples, side="right")

    def of(self, shard: int) -> Rows:
        """All rows of a shard, not checked."""
        end = int(self.ends[shard])
        return self.rows[end - self._manifest.shards[shard]["samples"] : end]

    def take(self, samples: Ints) -> Rows:
        """Rows of these samples, SAMPLE [n]."""
        manifest, shards = self._manifest, self.shards_of(samples)
        for shard in np.unique(shards[~self._checked[shards]]):  # two threads may do the same, which only costs time
            entry = manifest.shards[shard]
            if "rows" in entry and checksum(self.of(shard)) != entry["rows"]:  # older sets have none
                raise self._damaged(f"the checksum of the rows of {entry['name']} differs")
            self._checked[shard] = True
        taken: Rows = self.rows[samples]
        if found := fault(taken, self.tar_bytes[shards], len(manifest.classes), manifest.sides, self._pixels):
            at, reason = found
            shard, name = shards[at], manifest.shards[shards[at]]["name"]
            row = samples[at] - (self.ends[shard] - manifest.shards[shard]["samples"])
            if TOO_LARGE in reason:
                raise ShardError(
                    f"row {row} of {name} in {self._path} {reason}: raise it, or leave such images out by "
                    f"{self._here.command('index', f' --max-pixels {self._pixels}')}"
                )
            raise self._damaged(f"row {row} of {name} {reason}")
        return taken

    def sides(self, without: Ints) -> tuple[int, int]:
        """Least and largest shorter side of all samples but these, in pixels."""
        if self._manifest.sides:
            least, largest = self._manifest.sides
        else:  # an older set; a copy of all rows. Those of damaged samples may be damaged too
            least, largest = sides(np.delete(self.rows, without) if len(without) else self.rows)
        return least, largest

    def _open(self, path: Path) -> Rows:
        manifest = self._manifest
        if not path.exists():
            raise ShardError(f"{self._path} is missing: {self._here.remedy}")
        if not (manifest.samples and manifest.shards):
            raise ShardError(f"{self._here.name} holds no samples: pack it from a source that has images")
        old = not all("rows" in shard for shard in manifest.shards)
        if old and sha256(path) != manifest.index_sha256:
            raise self._damaged("sha256 differs")
        try:
            index = mapped(path)
        except ValueError as error:
            raise self._damaged(str(error)) from error
        if not index.shape == (manifest.samples,) == (self.ends[-1],):
            raise self._damaged("its number of rows is not the manifest's")
        if old and (top := top_label(index)) >= len(manifest.classes):
            raise self._damaged(f"label {top} is out of range for {len(manifest.classes)} classes")
        return index

    def _damaged(self, reason: str) -> ShardError:
        return ShardError(f"{self._path} is damaged or of another shard set ({reason}): {self._here.remedy}")
