"""wandb's own process, a child of the trainer's: how it is left, and ended; and whom wandb may ask
and tell."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

NAME = "wandb-core"


def forget() -> None:
    """One that belongs to a process above this one is not shared: it may be gone, or have this run's id in use."""
    os.environ.pop("WANDB_SERVICE", None)


def teardown() -> None:
    """Wait for it to write all, and to end. Raises ConnectionError where it has died."""
    import wandb

    try:
        wandb.teardown()
    except SystemExit as error:  # wandb's way to tell
        raise ConnectionError(f"{NAME} has ended with {error.code}") from error


def kill() -> None:
    """Kill it: it would go on trying to reach a server for hours. What waits for it raises an error."""
    for listed in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError):  # they come and go
            for child in listed.read_text(encoding="utf-8").split():
                if Path(f"/proc/{child}/comm").read_text(encoding="utf-8").strip() == NAME:
                    os.kill(int(child), signal.SIGKILL)


@contextmanager
def nobody_is_asked() -> Iterator[None]:
    """Without a key wandb asks for one where stdin is a terminal, and waits; where it is none, it raises an error."""
    usual = sys.stdin
    with open(os.devnull, encoding="utf-8") as sys.stdin:
        try:
            yield
        finally:
            sys.stdin = usual


@contextmanager
def mute() -> Iterator[None]:
    """While wandb begins. Its log may be on a full disk, and each line that has no room would be shown as a traceback:
    not then, and not later from the log that there is behind the body."""
    usual, logging.raiseExceptions = logging.raiseExceptions, False
    try:
        yield
    finally:
        logging.raiseExceptions = usual
    for handler in logging.getLogger("wandb").handlers:
        handler.handleError = lambda record: None  # type: ignore[method-assign]
