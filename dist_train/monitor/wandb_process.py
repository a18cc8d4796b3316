"""wandb-core, wandb's own process and a child of the trainer: how it is ended, and kept from asking and printing."""

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
    """Forgets the process of a parent, which is not shared: it may be gone, or hold this run's id."""
    os.environ.pop("WANDB_SERVICE", None)


def teardown() -> None:
    """Waits until it has written everything and ended. Raises ConnectionError if it has died."""
    import wandb

    try:
        wandb.teardown()
    except SystemExit as error:  # raised by wandb
        raise ConnectionError(f"{NAME} has ended with {error.code}") from error


def kill() -> None:
    """Kills it: it would try to reach a server for hours. Calls that wait for it raise an error."""
    for listed in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError):  # they come and go
            for child in listed.read_text(encoding="utf-8").split():
                if Path(f"/proc/{child}/comm").read_text(encoding="utf-8").strip() == NAME:
                    os.kill(int(child), signal.SIGKILL)


@contextmanager
def nobody_is_asked() -> Iterator[None]:
    """Hides stdin: without a key, wandb asks on a terminal for one and waits; otherwise it raises an error."""
    usual = sys.stdin
    with open(os.devnull, encoding="utf-8") as sys.stdin:
        try:
            yield
        finally:
            sys.stdin = usual


@contextmanager
def mute() -> Iterator[None]:
    """Silences errors of logging while wandb begins, and of wandb's log afterwards. That may be on a full disk, where
    each line would be a traceback."""
    usual, logging.raiseExceptions = logging.raiseExceptions, False
    try:
        yield
    finally:
        logging.raiseExceptions = usual
    for handler in logging.getLogger("wandb").handlers:
        handler.handleError = lambda record: None  # type: ignore[method-assign]
