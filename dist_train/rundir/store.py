"""Writes checkpoints beside training: flushed, renamed, pruned. `checkpoint.py` finds them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import IO, Any

import torch
from torch import Tensor

from dist_train.rundir.checkpoint import FOLDER, META, STATE, best_of, is_best, listed
from dist_train.rundir.lease import Lease
from pipelines.files import folder, new_file

LINKING = "best.new"  # the link before it is renamed to `best`


class Store:
    """Writes the checkpoints of one run.

    Args:
        lease: of the run directory; checked before every rename.
        keep: number of newest checkpoints to keep, besides the best.
        say: shows the user a line.
        settle: called before a checkpoint gets its name; brings the record it covers to the disk, or raises OSError.
        moment: called at each point of a save at which a fault would hurt (written, flushed, renaming, renamed,
            pruning), for fault injection by the drills.

    Attributes:
        error: of the last save, until one succeeds.
    """

    def __init__(
        self,
        lease: Lease,
        keep: int,
        say: Callable[[str], None] = lambda _: None,
        settle: Callable[[], None] = lambda: None,
        moment: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.directory, self.keep = lease.run / FOLDER, keep
        self.error: BaseException | None = None
        self._took: float | None = None
        self._lease, self._say, self._settle, self._moment = lease, say, settle, moment
        self._writer: Thread | None = None
        self._missed: tuple[dict[str, Any], dict[str, Any]] | None = None  # the best state, if it could not be saved
        self._linked, self._told = "", False  # intended target of `best`; whether a failure was reported

    def save(self, state: dict[str, Any], meta: dict[str, Any]) -> None:
        """Copy `state` to host memory and write it beside training. At most one save is in flight. A failed save sets
        `error` and leaves the older checkpoints intact. If it was of the best state, that is kept in memory and saved
        with the next one, unless that is better.

        Args:
            meta: `step`, `epoch` and `validated` order the checkpoints; for the best one see `is_best`.
        """
        self.join()
        host = _to_host(state)
        self._writer = Thread(target=self._write, args=(host, meta), name="save")
        self._writer.start()

    def join(self) -> None:
        """Wait for the save in flight."""
        if self._writer:
            self._writer.join()
            self._writer = None

    def took(self) -> float | None:
        """Duration in seconds of the last save completed beside training; None if there was none since the previous
        call."""
        took, self._took = self._took, None
        return took

    def clean(self, bad: list[str]) -> None:
        """Remove leftovers of killed saves, rename the checkpoints known to be bad to `bad-*`, and do what a save that
        was killed after its rename did not come to: link the best one, remove those beyond `keep`."""
        folder(self.directory)
        for stale in (*self.directory.glob(".step-*.tmp"), self.directory / LINKING):
            _remove(stale)
        for name in bad:
            aside = self.directory / f"bad-{name}"
            _remove(aside)
            (self.directory / name).rename(aside)
        self._link()
        self._prune()

    def _write(self, state: dict[str, Any], meta: dict[str, Any]) -> None:
        began = time.monotonic()
        try:
            if self._keep(state, meta):
                if self._missed and not is_best(meta):
                    self._keep(*self._missed)
                self._missed = None
                self._link()
                self._prune()
            self.error = None
            self._took = time.monotonic() - began
        except BaseException as error:  # full disk, deleted directory: the run decides what to do
            self.error = error
            if is_best(meta):
                self._missed = (state, meta)

    def _keep(self, state: dict[str, Any], meta: dict[str, Any]) -> bool:
        """Write a checkpoint. Returns whether this start still holds the lease. Raises the error of the disk."""
        # The checkpoints before and after an epoch's validation have the same step; the suffix sorts them.
        name = f"step-{meta['step']:08d}" + ("-validated" if meta["validated"] else "")
        temporary = self.directory / f".{name}.tmp"
        try:
            if holds := self._lease.holds():
                self._fill(temporary, state, meta)
            if holds := holds and self._lease.holds():
                self._place(temporary, self.directory / name)
            return holds
        finally:
            with suppress(OSError):
                _remove(temporary)

    def _fill(self, temporary: Path, state: dict[str, Any], meta: dict[str, Any]) -> None:
        """Write state and meta to the disk, under a name that readers ignore."""
        _remove(temporary)
        temporary.mkdir()  # without parents: a deleted run directory is not recreated
        with new_file(temporary / STATE) as file, new_file(temporary / META) as text:
            hashed = _Hashed(file)
            try:
                torch.save(state, hashed)  # type: ignore[arg-type]
            except RuntimeError:
                if hashed.error:  # torch's own error does not mention the disk
                    raise hashed.error from None
                raise
            self._moment("written")
            about = meta | {"sha256": hashed.digest.hexdigest(), "bytes": hashed.size}
            text.write(json.dumps(about, indent=1).encode())
            # Each flush may take seconds on a busy file system, so all run at once.
            with ThreadPoolExecutor(2) as pool:
                flushed = [pool.submit(_flush, opened) for opened in (file, text)]
                self._settle()
            for flush in flushed:
                flush.result()
                self._moment("flushed")

    def _place(self, temporary: Path, final: Path) -> None:
        """Give a written checkpoint its name, durably."""
        self._moment("renaming")
        if final.is_symlink() and not final.exists():  # a user's dangling link
            final.unlink()
        if not final.exists():  # if it does, it is the same state
            os.rename(temporary, final)
        handle = os.open(final.parent, os.O_RDONLY)
        try:
            os.fsync(handle)  # the rename is an entry of the folder
        finally:
            os.close(handle)
        self._moment("renamed")

    def _link(self) -> None:
        """Point `best` to the best checkpoint, atomically. A convenience only: not all file systems have links."""
        best, still = best_of(self.directory)
        if not (best and still) or best == self._linked:
            return
        self._linked = best
        link, linking = self.directory / "best", self.directory / LINKING
        try:
            linking.unlink(missing_ok=True)
            linking.symlink_to(best)
            os.replace(linking, link)
        except OSError as error:
            if not self._told:
                self._say(f"{link} cannot be a link to {best}, the best one ({error}): `--checkpoint best` finds it")
            self._told = True
            with suppress(OSError):
                if link.is_symlink():  # to an older checkpoint
                    link.unlink()

    def _prune(self) -> None:
        best, _ = best_of(self.directory)
        for path in listed(self.directory)[: -self.keep]:
            if path.name != best:
                hidden = self.directory / f".{path.name}.tmp"
                os.rename(path, hidden)  # never a half-deleted directory under a good name
                self._moment("pruning")
                _remove(hidden)


def _flush(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _remove(path: Path) -> None:
    """Remove a file, a directory, or a user's link but not its target. Raises OSError."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def _to_host(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {k: _to_host(v) for k, v in value.items()}
    return [_to_host(v) for v in value] if isinstance(value, list) else value


class _Hashed:
    """File for torch.save that hashes the data as passed to `write`, not as the disk stores it."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest, self.size = file, hashlib.sha256(), 0
        self.error: OSError | None = None  # of the disk

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.size += len(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()
