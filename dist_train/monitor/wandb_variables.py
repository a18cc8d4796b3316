"""wandb's environment variables. Those with values that it would refuse are hidden, so that the run is shown."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

# Set by arguments of ours, or fixed: wandb's variables for these are ignored.
SETTLED = ("TAGS", "MODE", "RUN_ID", "RESUME", "RESUME_FROM", "FORK_FROM", "SILENT", "CONSOLE", "INIT_TIMEOUT")
OURS = tuple(f"WANDB_{name}" for name in SETTLED)
CLEANED = "WANDB_TAGS"  # empty and overlong tags are mended here


def odd() -> list[str]:
    """Names of the variables that wandb refuses. Values are not shown: one of them is a key."""
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
    """Removes variables from the environment meanwhile."""
    taken = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(taken)
