"""Checkpoints: written beside training, flushed, renamed, pruned. Where they are found again: checkpoint.py."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import IO, Any

import torch
from torch import Tensor

from dist_train.rundir.checkpoint import FOLDER, META, NAMES, STATE
from dist_train.rundir.lease import Lease


class Store:
    """Writes the checkpoints of one run.

    Args:
        lease: of the run directory; checked before every rename.
        keep: how many of the newest stay, besides the best.
        moment: called at each moment of a save at which a fault would hurt (written, flushed, renaming, renamed,
            pruning); drills strike there.

    Attributes:
        error: of the last save, until one succeeds.
    """

    def __init__(self, lease: Lease, keep: int, moment: Callable[[str], None] = lambda _: None) -> None:
        self.directory, self.keep = lease.run / FOLDER, keep
        self.error: BaseException | None = None
        self._lease, self._moment = lease, moment
        self._writer: Thread | None = None

    def save(self, state: dict[str, Any], meta: dict[str, Any], *, best: bool) -> None:
        """Copy `state` to host memory and write it beside training. At most one save is in flight. A save that fails
        sets `error`; the older checkpoints stand.

        Args:
            meta: `step`, `epoch` and `validated` order the checkpoints; the rest is for readers.
            best: this one has the lowest validation error.
        """
        self.join()
        host = _to_host(state)
        self._writer = Thread(target=self._write, args=(host, meta, best), name="save")
        self._writer.start()

    def join(self) -> None:
        """Wait for the save in flight."""
        if self._writer:
            self._writer.join()
            self._writer = None

    def clean(self, bad: list[str]) -> None:
        """Remove what killed saves left, and set the checkpoints that are known to be bad aside as `bad-*`."""
        self.directory.mkdir(parents=True, exist_ok=True)
        for stale in self.directory.glob(".*.tmp"):
            shutil.rmtree(stale)
        for name in bad:
            aside = self.directory / f"bad-{name}"
            shutil.rmtree(aside, ignore_errors=True)
            (self.directory / name).rename(aside)

    def _write(self, state: dict[str, Any], meta: dict[str, Any], best: bool) -> None:
        # A checkpoint before an epoch's validation and one after it stand at the same step; the name sorts them.
        name = f"step-{meta['step']:08d}" + ("-validated" if meta["validated"] else "")
        temporary = self.directory / f".{name}.tmp"
        try:
            self._fill(temporary, state, meta)
            if not self._lease.holds():
                shutil.rmtree(temporary)
                return
            self._place(temporary, self.directory / name)
            if best:
                self._link(name)
            self._prune()
            self.error = None
        except BaseException as error:  # a full disk, a vanished directory: the run decides what to do
            self.error = error
            shutil.rmtree(temporary, ignore_errors=True)

    def _fill(self, temporary: Path, state: dict[str, Any], meta: dict[str, Any]) -> None:
        """Write state and meta to the disk, under a name that no reader looks at."""
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()  # not its parents: a vanished directory is not made anew
        with open(temporary / STATE, "wb") as file:
            hashed = _Hashed(file)
            try:
                torch.save(state, hashed)  # type: ignore[arg-type]
            except RuntimeError:
                if hashed.error:  # what torch makes of it does not say so
                    raise hashed.error from None
                raise
            self._moment("written")
            self._flush(file)
        meta = meta | {"sha256": hashed.digest.hexdigest(), "bytes": hashed.size}
        with open(temporary / META, "w", encoding="utf-8") as text:
            json.dump(meta, text, indent=1)
            self._flush(text)

    def _flush(self, file: IO[Any]) -> None:
        file.flush()
        os.fsync(file.fileno())
        self._moment("flushed")

    def _place(self, temporary: Path, final: Path) -> None:
        """Give a written checkpoint its name, for good."""
        self._moment("renaming")
        if final.exists():  # the same state, saved for two reasons
            shutil.rmtree(temporary)
        else:
            os.rename(temporary, final)
        handle = os.open(final.parent, os.O_RDONLY)
        try:
            os.fsync(handle)  # the rename itself, which is the folder's
        finally:
            os.close(handle)
        self._moment("renamed")

    def _link(self, name: str) -> None:
        """Let `best` point to this checkpoint; replaced in one step, so that it always points to one."""
        link = self.directory / "best.new"
        link.unlink(missing_ok=True)
        link.symlink_to(name)
        os.replace(link, self.directory / "best")

    def _prune(self) -> None:
        best = os.path.realpath(self.directory / "best")
        for path in sorted(self.directory.glob(NAMES))[: -self.keep]:
            if os.path.realpath(path) != best:
                hidden = self.directory / f".{path.name}.tmp"
                os.rename(path, hidden)  # never a half-deleted directory under a good name
                self._moment("pruning")
                shutil.rmtree(hidden)


def load_state(checkpoint: Path, device: torch.device) -> dict[str, Any]:
    """The state in a checkpoint's directory."""
    state: dict[str, Any] = torch.load(checkpoint / STATE, map_location=device, weights_only=True)
    return state


def _to_host(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {k: _to_host(v) for k, v in value.items()}
    return [_to_host(v) for v in value] if isinstance(value, list) else value


class _Hashed:
    """A file for torch.save that hashes what was meant to be written, not what the disk made of it."""

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
