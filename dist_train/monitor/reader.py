"""The interface of a reader of the record; readers.py calls it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from dist_train.config import Config
from dist_train.monitor.drawings import Pictures
from pipelines.files import regular
from pipelines.valid import Invalid, object_of

LONGEST = 300  # characters of an error's message


@dataclass(frozen=True)
class Shown:
    """The run that a reader shows, as claimed by this start.

    Attributes:
        run: its directory.
        config: the configuration in force.
        say: prints a line for the user.
        record_bytes: size of the record when this start began; it appends behind.
        events_bytes: the same of the events.
        step: the step that this start resumes from.
        token: name of this start, which the run's lease holds as long as it is the start's.
        pictures: of the run, for all readers.
    """

    run: Path
    config: Config
    say: Callable[[str], None]
    record_bytes: int = 0
    events_bytes: int = 0
    step: int = 0
    token: str = ""
    pictures: Pictures = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "pictures", Pictures(self.run, self.say))


class Anew(Exception):
    """Raised by a reader that has lost the lines it was given: `begin` is called again, and lines follow from there."""


class RecordReader(Protocol):
    """Shows a run. `begin` is called first, `close` last, all by one thread. `take` and `close` may raise Anew."""

    def begin(self) -> int:
        """Returns the byte of the record from which it wants the lines."""

    def take(self, line: dict[str, Any]) -> None:
        """Takes a line of the record, or an event of this start. If it raises, the line comes again."""

    def close(self) -> None:
        """Called after training, when all lines are taken or one could not be. The last event tells the end."""


@runtime_checkable
class Hurried(Protocol):
    """A reader that can cut short a `close` that does not return, or has started a process that would outlive it."""

    def hurry(self, *, last: bool) -> None:
        """Called by another thread if `close` has not returned.

        Args:
            last: the process leaves now, without waiting any longer; otherwise half of the time is over.
        """


def one_line(error: BaseException) -> str:
    """The error in one line, to be part of a sentence."""
    try:
        text = " ".join(str(error).split())
    except Exception:  # from the error's own code
        text = ""
    text = text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def lines(path: Path, kind: type[Any], place: int = 0) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """The whole lines of a file from a byte on, each with the byte behind it; None for one that does not have the
    format `kind`. Empty if there is no such file."""
    if not path.exists():
        return
    with open(path, "rb", opener=regular) as file:
        file.seek(place)
        for line in file:
            if not line.endswith(b"\n"):
                return
            place += len(line)
            try:
                values = object_of(kind, line)
            except Invalid:
                values = None
            yield place, values
