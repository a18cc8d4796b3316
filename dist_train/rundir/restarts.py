"""When to give up on a run that is restarted again and again. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from dist_train.ranks import launcher
from dist_train.rundir import events
from dist_train.rundir.checkpoint import newest_name
from pipelines.errors import UserError
from pipelines.files import read_file, write_atomically
from pipelines.valid import Count, Invalid, parsed

FILE = "starts.json"
LIMIT = 3  # starts at the same place; another would end like them


@dataclass(frozen=True)
class Restarts:
    """The format of the file: how many restarts found this checkpoint as the newest."""

    checkpoint: str
    count: Count


class NoProgress(UserError):
    """The run was restarted again and again at the same step."""


def stuck(places: Sequence[str], now: str) -> bool:
    """Whether the last LIMIT starts all began where this one does.

    Args:
        places: where each earlier start began, oldest first.
        now: where this start begins.
    """
    return len(places) >= LIMIT and all(place == now for place in places[-LIMIT:])


def count(run: Path) -> None:
    """Count a restart by torchrun, before anything in it can fail. Raises NoProgress at the third in a row that finds
    the same checkpoint.

    Under Slurm, `slurm.job` counts. Raises OSError, and UserError for a damaged file.
    """
    if not launcher.restarts() or not run.is_dir():
        return
    path, newest = run / FILE, newest_name(run)
    try:
        before = parsed(Restarts, read_file(path, 1 << 16)) if path.exists() else Restarts(newest, 0)
    except Invalid as wrong:
        raise UserError(f"{path} is damaged ({wrong}): remove it") from wrong
    number = before.count + 1 if before.checkpoint == newest else 1
    if number < LIMIT:
        write_atomically(path, json.dumps(asdict(Restarts(newest, number))).encode())
        return
    place = f"at {newest}" if newest else "at the beginning"
    error = NoProgress(f"{number} automatic restarts began {place} without progress: see the log")
    with suppress(OSError):  # even with a full disk the restarts must end
        events.tell(run, "given_up", reason=str(error))
    raise error


def forget(run: Path) -> None:
    """Reset the count when a start by hand has claimed the run."""
    if not launcher.restarts():
        (run / FILE).unlink(missing_ok=True)
