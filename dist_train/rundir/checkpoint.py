"""Where a good checkpoint is found: the one finder of all programs. Imports no torch.

    checkpoints/step-00012000/state.pt    loads with torch.load(weights_only=True)
    checkpoints/step-00012000/meta.json   sha256 and size of it, step, epoch, what the run is
    checkpoints/best                      a link to the one with the lowest validation error

A directory counts only if its hash matches.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.errors import UserError
from pipelines.files import sha256

FOLDER, STATE, META = "checkpoints", "state.pt", "meta.json"
NAMES = "step-*"  # sorted by name they are sorted by progress


class CheckpointError(UserError):
    """A checkpoint that cannot be continued from; the message says what differs and the remedy."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose hash matched when it was found, and its meta.json."""

    path: Path
    meta: dict[str, Any]


def find(run: Path, which: str = "last", bad: Callable[[str, str], None] = lambda *_: None) -> Checkpoint | None:
    """A good checkpoint; None if there is none.

    Args:
        run: a run directory.
        which: "last", the newest good one; "best", the one of the lowest validation error; or a name.
        bad: hears the name of each checkpoint that does not count, and why.
    """
    folder = run / FOLDER
    if which == "last":
        candidates = sorted(folder.glob(NAMES), reverse=True)
    else:
        candidates = [(folder / which).resolve()] if (folder / which).is_dir() else []
    for path in candidates:
        try:
            return verified(path)
        except CheckpointError as error:
            bad(path.name, str(error))
    return None


def newest_name(run: Path) -> str:
    """The name of the newest checkpoint, good or not, which tells how far a run has come; empty without one."""
    return max((path.name for path in (run / FOLDER).glob(NAMES)), default="")


def verified(path: Path) -> Checkpoint:
    """The checkpoint in this directory. Raises CheckpointError with the reason if it does not count."""
    try:
        meta: dict[str, Any] = json.loads((path / META).read_bytes())
        size = (path / STATE).stat().st_size
        if size != meta["bytes"]:
            raise CheckpointError(f"{STATE} has {size} bytes instead of {meta['bytes']}")
        if sha256(path / STATE) != meta["sha256"]:
            raise CheckpointError(f"the sha256 of {STATE} differs")
        return Checkpoint(path, meta)
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"{Path(error.filename).name} is missing") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{META} is damaged ({type(error).__name__})") from error
