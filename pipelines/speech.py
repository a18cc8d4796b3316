"""What the three packages say: one place for every line, so that nobody who has stopped listening can end a run."""

from __future__ import annotations

import sys

from tqdm import tqdm


def say(text: str) -> None:
    """A line for the user, on stderr, above a progress bar if there is one."""
    tqdm.write(text, file=sys.stderr)


def show(text: str) -> None:
    """A line of what a command was asked for, on stdout."""
    print(text, flush=True)
