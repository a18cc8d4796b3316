"""Finds good checkpoints, for all programs. Imports no torch.

    checkpoints/step-00012000/state.pt    loads with torch.load(weights_only=True)
    checkpoints/step-00012000/meta.json   its sha256 and size, step, epoch, identity of the run
    checkpoints/best                      link to the best one, for people; programs read every meta.json

A checkpoint is good only if its hash matches.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from pipelines.errors import UserError
from pipelines.files import read_file, sha256
from pipelines.valid import MOST, Count, Invalid, parsed

FOLDER, STATE, META = "checkpoints", "state.pt", "meta.json"
LARGEST = 1 << 22  # bytes of meta.json, which has some 5000
NAME = re.compile(r"step-\d{8,}(-validated)?")  # sorting by name sorts by progress


class CheckpointError(UserError):
    """A run cannot resume from a checkpoint; the message says what differs and the remedy."""


@dataclass(frozen=True)
class About:
    """What meta.json says that programs go by; beside it stand the settings that a run cannot change. Older versions
    wrote fewer keys."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    bytes: Count
    epoch: Count
    step: Count
    validated: bool = False
    best_error: Annotated[float, Field(ge=0, le=1)] = 1.0
    best_epoch: Annotated[int, Field(ge=-1, lt=MOST)] = -1
    config: dict[str, Any] | None = None
    process: dict[str, Any] | None = None
    training: Annotated[str, Field(alias="training set")] = ""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose hash matched when it was found, and its meta.json."""

    path: Path
    meta: dict[str, Any]


def listed(folder: Path) -> list[Path]:
    """Checkpoints in a folder, going by their names, oldest first; files and copies made by the user do not count.
    Raises OSError."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if NAME.fullmatch(path.name) and path.is_dir())


def find(run: Path, which: str = "last", bad: Callable[[str, str], None] = lambda *_: None) -> Checkpoint | None:
    """Returns a good checkpoint, or None if there is none.

    Args:
        run: a run directory.
        which: "last", the newest good one; "best", the one with the lowest validation error; or a name.
        bad: called with the name of each checkpoint that is not good, and why.

    Raises CheckpointError if the best one was lost: the best of those that are left is not it.
    """
    folder = run / FOLDER
    if which == "last":
        candidates = listed(folder)[::-1]
    elif which == "best":
        best, still = best_of(folder)
        candidates = [folder / best] if best else []
        if not still:
            raise CheckpointError(f"the best checkpoint was not saved, or is not in {folder} any more: choose last")
    else:
        candidates = [folder / which] if which and (folder / which).is_dir() else []
    for path in candidates:
        try:
            return verified(path)
        except CheckpointError as error:
            bad(path.name, str(error))
    return None


def is_best(meta: dict[str, Any]) -> bool:
    """Whether a state follows the epoch with the lowest validation error so far."""
    return bool(meta.get("validated")) and meta.get("best_epoch") == meta.get("epoch", 0) - 1


def best_of(folder: Path) -> tuple[str, bool]:
    """Name of the newest checkpoint that was the best when it was saved, good or not, and whether it still is the best:
    not if a better one was never saved, or is gone. Reads only meta.json. Raises OSError."""
    name, its, newest = "", -1, -1
    for path in listed(folder):
        with suppress(CheckpointError, FileNotFoundError):  # a damaged one does not count
            meta = _meta(path)
            newest = meta.get("best_epoch", -1)
            if is_best(meta):
                name, its = path.name, newest
    return name, its == newest


def newest_about(run: Path) -> About | None:
    """What the newest checkpoint whose meta.json is whole says; None if there is none. Raises OSError."""
    for path in reversed(listed(run / FOLDER)):
        with suppress(Invalid, FileNotFoundError):
            return parsed(About, read_file(path / META, LARGEST))
    return None


def _meta(path: Path) -> dict[str, Any]:
    """Content of meta.json, of whose keys those of `About` are of its types. Raises CheckpointError, OSError."""
    text = read_file(path / META, LARGEST)
    try:
        parsed(About, text)
    except Invalid as error:
        raise CheckpointError(f"{META} is damaged ({error})") from error
    meta: dict[str, Any] = json.loads(text)
    return meta


def newest_name(run: Path) -> str:
    """Name of the newest checkpoint, good or not: how far a run has come. Empty if there is none."""
    return max((path.name for path in listed(run / FOLDER)), default="")


def verified(path: Path) -> Checkpoint:
    """Returns the checkpoint in this directory. Raises CheckpointError, with the reason, if it is not good."""
    try:
        meta = _meta(path)
        size = (path / STATE).stat().st_size
        if size != meta["bytes"]:
            raise CheckpointError(f"{STATE} has {size} bytes instead of {meta['bytes']}")
        if sha256(path / STATE) != meta["sha256"]:
            raise CheckpointError(f"the sha256 of {STATE} differs")
        return Checkpoint(path, meta)
    except FileNotFoundError as error:
        raise CheckpointError(f"{Path(error.filename).name} is missing") from error
    except OSError as error:
        raise CheckpointError(f"it cannot be read ({error})") from error
