"""Checkpoints: write beside training, verify, find the newest good one, prune.

    checkpoints/step-00012000/state.pt    loads with torch.load(weights_only=True)
    checkpoints/step-00012000/meta.json   sha256 and size of it, step, epoch, what the run is
    checkpoints/best                      a link to the one with the lowest validation error

A directory counts only when its hash matches. It is written beside, flushed to the disk and renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from threading import Thread
from typing import IO, Any

import torch
from torch import Tensor

from dist_train.rundir.lease import Owner

STATE, META = "state.pt", "meta.json"


class CheckpointError(ValueError):
    """A checkpoint that cannot be continued from; the message says what differs and the remedy."""


class Store:
    """The checkpoints of one run.

    Args:
        directory: `checkpoints/` of the run.
        keep: how many of the newest stay, besides the best.
        owner: of the run directory; checked before every rename.
    """

    def __init__(self, directory: Path, keep: int, owner: Owner) -> None:
        self.directory, self.keep, self.owner = directory, keep, owner
        self.error: Exception | None = None  # of the last save, until one succeeds
        self._writer: Thread | None = None
        self.bad: list[str] = []  # names of the checkpoints that `newest` found to be damaged

    def save(self, state: dict[str, Any], meta: dict[str, Any], *, best: bool) -> None:
        """Copy `state` to host memory and write it beside training. At most one save is in flight. A save that fails
        sets `error`; the older checkpoints stand.

        Args:
            meta: `step`, `epoch` and `validated` order the checkpoints; the rest is for `newest` to show.
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

    def newest(self, complain: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint whose hash matches, and its meta. Bad ones are named, with the reason."""

        def bad(path: Path, why: str) -> None:
            complain(f"checkpoint {path.name} is bad ({why}): looking for an older one")
            self.bad.append(path.name)

        self.bad = []
        path = newest(self.directory.glob("step-*"), bad)
        return (path, json.loads((path / META).read_bytes())) if path else None

    def clean(self) -> None:
        """Remove what killed saves left, and set the bad checkpoints that `newest` met aside as `bad-*`."""
        self.directory.mkdir(parents=True, exist_ok=True)
        for stale in self.directory.glob(".*.tmp"):
            shutil.rmtree(stale)
        for name in self.bad:
            aside = self.directory / f"bad-{name}"
            shutil.rmtree(aside, ignore_errors=True)
            (self.directory / name).rename(aside)

    def _write(self, state: dict[str, Any], meta: dict[str, Any], best: bool) -> None:
        # A checkpoint before an epoch's validation and one after it stand at the same step; the name sorts them.
        name = f"step-{meta['step']:08d}" + ("-validated" if meta["validated"] else "")
        temporary, final = self.directory / f".{name}.tmp", self.directory / name
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()  # a vanished directory is not made anew
            with open(temporary / STATE, "wb") as file:
                hashed = _Hashed(file)
                torch.save(state, hashed)  # type: ignore[arg-type]
                _flush(file)
            meta = meta | {"sha256": hashed.digest.hexdigest(), "bytes": hashed.size}
            with open(temporary / META, "w") as text:
                json.dump(meta, text, indent=1)
                _flush(text)
            self.owner.check()
            _place(temporary, final)
            if best:
                link = self.directory / "best.new"
                link.unlink(missing_ok=True)
                link.symlink_to(name)
                os.replace(link, self.directory / "best")
            self._prune()
            self.error = None
        except Exception as error:  # a full disk, a vanished directory, a successor: the run decides what to do
            self.error = error
            shutil.rmtree(temporary, ignore_errors=True)

    def _prune(self) -> None:
        best = os.path.realpath(self.directory / "best")
        for path in sorted(self.directory.glob("step-*"))[: -self.keep]:
            if os.path.realpath(path) != best:
                hidden = self.directory / f".{path.name}.tmp"
                os.rename(path, hidden)  # never a half-deleted directory under a good name
                _remove(hidden)


def newest(paths: Iterable[Path], bad: Callable[[Path, str], None] = lambda *_: None) -> Path | None:
    """The last, by name, whose hash matches. `bad` hears of those that do not count, and why."""
    for path in sorted(paths, reverse=True):
        if (why := _fault(path)) is None:
            return path
        bad(path, why)
    return None


def load(path: Path, device: torch.device) -> dict[str, Any]:
    """The state of a checkpoint."""
    state: dict[str, Any] = torch.load(path / STATE, map_location=device, weights_only=True)
    return state


def _fault(path: Path) -> str | None:
    """Why a checkpoint does not count, or None."""
    try:
        meta = json.loads((path / META).read_bytes())
        size = (path / STATE).stat().st_size
        if size != meta["bytes"]:
            return f"{STATE} has {size} bytes instead of {meta['bytes']}"
        with open(path / STATE, "rb") as file:
            digest = hashlib.sha256()
            while chunk := file.read(1 << 22):
                digest.update(chunk)
        return None if digest.hexdigest() == meta["sha256"] else f"the sha256 of {STATE} differs"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{META} is damaged ({type(error).__name__})"


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

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.size += len(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def _flush(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _place(temporary: Path, final: Path) -> None:
    """Give a written checkpoint its name, for good."""
    if final.exists():  # the same state, saved for two reasons
        shutil.rmtree(temporary)
    else:
        os.rename(temporary, final)
    handle = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    shutil.rmtree(path)
