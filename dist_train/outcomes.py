"""How a run can end: the exception that ends it, its exit code, and the state in status.json. Imports no torch."""

from __future__ import annotations

from typing import ClassVar

from pipelines.cli import USAGE

DONE, FAILED, DIVERGED, STOPPED = 0, 1, 70, 75  # exit codes, with USAGE; torchrun hears 0 for STOPPED


class Ended(Exception):
    """End of a run, raised on all ranks alike; the message is the reason in status.json.

    Attributes:
        code: exit code of the process.
        state: state in status.json; empty if nothing may be written there.
    """

    code: ClassVar[int] = FAILED
    state: ClassVar[str] = "failed"


class Done(Ended):
    """The last epoch is validated and saved."""

    code, state = DONE, "done"


class Stopped(Ended):
    """A stop was asked for, and the state is saved."""

    code, state = STOPPED, "stopped"

    def __init__(self, reason: str = "a stop signal; the same command continues") -> None:
        super().__init__(reason)


class Diverged(Ended):
    """A loss or a gradient is not finite; the weights were not changed. Another try would end the same way."""

    code, state = DIVERGED, "diverged"


class BadData(Ended):
    """More samples than allowed cannot be decoded, or a shard set cannot be used."""

    code, state = USAGE, "failed"


class BadNumbers(Ended):
    """The numbers that the ranks log cannot all be recorded."""

    code, state = USAGE, "failed"


class NoRate(Ended):
    """The schedule gives no learning rate. Another try would end the same way."""

    code, state = USAGE, "failed"


class Unread(Ended):
    """A rank has been unable to read its samples for longer than a file system may fail. Another try, or node, may."""

    code, state = FAILED, "failed"


class NotSaved(Ended):
    """The last save failed, and so did a second try."""

    code, state = FAILED, "failed"


class NotBegun(Ended):
    """The run directory cannot be written."""

    code, state = USAGE, "failed"


class NotHere(Ended):
    """A restarted run finds no device on this node; on another one it may."""

    code, state = FAILED, "failed"


class Refused(Ended):
    """The command cannot be run; the run directory, if there is one, stays as it is."""

    code, state = USAGE, ""


class LeaseLost(Ended):
    """A later start has taken over the run directory and writes to it from now on. The run itself is fine, so the exit
    code is that of success."""

    code, state = DONE, ""
