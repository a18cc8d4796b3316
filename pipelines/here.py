"""Where the tars of a set lie: beside its manifest. Sets that lie elsewhere have `remote.elsewhere` in its place."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from pipelines.files import HeldFile, lost, regular
from pipelines.manifest import Shard, ShardError

Waiting = Callable[[str, bool], None]  # what is waited for, and whether some of it has come since the last call


class Here:
    """The directory of a set.

    Attributes:
        name: of the set, in messages.
        scarce: whether open tars take up room that others need.
    """

    scarce = False

    def __init__(self, directory: Path, name: str = "") -> None:
        self.name, self._directory = name or str(directory), directory

    def command(self, verb: str, options: str = "") -> str:
        """A verb for the set, in messages."""
        return f"`python -m pipelines {verb} {self.name}{options}`"

    @property
    def remedy(self) -> str:
        """For an index that is not that of the tars."""
        return f"run {self.command('index')}"

    def path(self, name: str) -> str:
        """A file of the set, in messages."""
        return str(self._directory / name)

    def open(self, shard: Shard, waiting: Waiting) -> HeldFile:
        """Opens a tar for reading. Raises OSError. `waiting` is called at short intervals while that takes time, at
        times with a text; what it raises ends it."""
        return HeldFile(self._directory / shard["name"], opener=regular)

    def mended(self, shard: Shard) -> bool:
        """Called for a tar that was found damaged. True if it was a copy: opened again, it may be another one."""
        return False

    def missing(self, name: str) -> ShardError:
        gone = lost(self._directory / name)
        return ShardError(gone or f"{self.path(name)} is missing: put it back or pack {self.name} anew")

    def mismatch(self, name: str) -> ShardError:
        return ShardError(
            f"{self.path(name)} is not the tar that was indexed: put the right one back, or {self.remedy}"
        )

    def check(self, shards: Sequence[Shard], *, sizes: bool) -> None:
        """Raises ShardError if a tar is missing. Lists the folder once; with `sizes`, checks each tar's size too."""
        there = set(os.listdir(self._directory))
        for number, shard in enumerate(shards):
            path = self._directory / shard["name"]
            if path.name not in there or ((sizes or not number) and not path.exists()):  # a link may lead nowhere
                raise self.missing(shard["name"])
            if sizes and path.stat().st_size != shard["bytes"]:
                raise self.mismatch(shard["name"])
