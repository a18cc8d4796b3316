"""What a reader of the record is given, and what it is: see readers.py for who calls it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from dist_train.config import Config

LONGEST = 300  # characters of what an error says


@dataclass(frozen=True)
class Shown:
    """The run that a reader shows, as this start has claimed it.

    Attributes:
        run: its directory.
        config: as it is in force.
        say: shows the user a line.
        record_bytes: of the record, which this start has found and goes on behind.
        events_bytes: the same of the story.
        step: that this start goes on from.
    """

    run: Path
    config: Config
    say: Callable[[str], None]
    record_bytes: int = 0
    events_bytes: int = 0
    step: int = 0


class Anew(Exception):
    """Raised by a reader that has lost what it was given: `begin` is to be called again, and what follows is given."""


class RecordReader(Protocol):
    """Shows a run. `begin` is called first, `close` last, all by one thread. `take` and `close` may raise Anew."""

    def begin(self) -> int:
        """Returns the byte of the record from which on it wants the lines."""

    def take(self, line: dict[str, Any]) -> None:
        """A line of the record, or an event of this start. If it raises, the line comes again."""

    def close(self) -> None:
        """Training is over, and all lines are taken, or an earlier line could not be. The last event tells the end."""


@runtime_checkable
class Hurried(Protocol):
    """A reader that can do something about a `close` that does not come back, or has started what would outlive it."""

    def hurry(self, *, last: bool) -> None:
        """`close` has not come back. Called by another thread.

        Args:
            last: nobody waits for it any longer, and the process leaves; otherwise half of the time is over.
        """


def one_line(error: BaseException) -> str:
    """What has gone wrong, as a part of a sentence."""
    try:
        text = " ".join(str(error).split())
    except Exception:  # of whoever wrote that error
        text = ""
    text = text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def lines(path: Path, place: int = 0) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """The whole lines of a file from a byte on, each with the byte behind it; None for what a damaged disk has made of
    one. Nothing if there is no such file."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        file.seek(place)
        for line in file:
            if not line.endswith(b"\n"):
                return
            place += len(line)
            try:
                values = json.loads(line)
            except ValueError:
                values = None
            yield place, values if isinstance(values, dict) else None
