"""When to give up a run that is restarted again and again. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from dist_train.ranks import launcher
from pipelines.errors import UserError
from pipelines.files import read_json, write_atomically

FILE = "starts.json"
LIMIT = 3  # starts at one place; one more would end as they did


class NoProgress(UserError):
    """The run was restarted again and again at the same step."""


def stuck(places: Sequence[str], now: str) -> bool:
    """Whether the last LIMIT starts all began where this one does.

    Args:
        places: where each earlier start began, oldest first.
        now: where this one begins.
    """
    return len(places) >= LIMIT and all(place == now for place in places[-LIMIT:])


def count(run: Path, step: int) -> None:
    """Note that a start begins at `step`. Raises NoProgress if it is the third restart in a row to begin there.

    torchrun's restarts count; a start by hand begins anew. Under Slurm `slurm.job` counts, since there a start may fail
    before this.
    """
    path = run / FILE
    before = read_json(path) if path.exists() else {}
    restarted = launcher.restarts() > 0
    number = before["count"] + 1 if restarted and before.get("step") == step else int(restarted)
    write_atomically(path, json.dumps({"step": step, "count": number}).encode())
    if number >= LIMIT:
        raise NoProgress(f"{number} automatic restarts began at step {step} without progress: see the log")
