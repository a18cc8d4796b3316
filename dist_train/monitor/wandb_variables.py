"""wandb's own variables: what it would refuse is left out, so that it does not refuse the run."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

# What is passed on to wandb by arguments, or settled: its variables do not count beside them.
SETTLED = ("TAGS", "MODE", "RUN_ID", "RESUME", "RESUME_FROM", "FORK_FROM", "SILENT", "CONSOLE", "INIT_TIMEOUT")
OURS = tuple(f"WANDB_{name}" for name in SETTLED)
CLEANED = "WANDB_TAGS"  # an empty tag, or one that is too long, is no error here


def odd() -> list[str]:
    """Names of those that wandb refuses. Their values are not told: one of them is a key."""
    import wandb

    found = []
    for name, value in sorted(os.environ.items()):
        if name.startswith("WANDB_") and name != CLEANED:
            try:
                wandb.Settings().update_from_env_vars({name: value})
            except (ValueError, wandb.Error):
                found.append(name)
    return found


@contextmanager
def hidden(names: Iterable[str]) -> Iterator[None]:
    """Variables that are not there meanwhile."""
    taken = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(taken)
