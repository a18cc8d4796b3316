"""What the three packages say: one place for every line, so that nobody who has stopped listening can end a run.

The reader of a pipe leaves, a terminal is closed, a disk is full, there never was a stderr: what cannot be written is
let go, and the work goes on.
"""

from __future__ import annotations

import codecs
import errno
import io
import os
import select
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from tqdm import tqdm

STREAMS = ("stdin", "stdout", "stderr")  # by the number of their file descriptor
CLEAR = "\033[H\033[2J"  # cursor to the first line, and nothing is below it; of ECMA-48
PATIENCE = 1.0  # seconds that a training waits for a reader that is there but does not read (Ctrl-S, `less`)
_bars: type[tqdm[Any]] | None = None  # once there has been one


class _Stream(io.FileIO):
    """stdout or stderr, beneath Python's own buffers, which raises no error.

    Attributes:
        lost: why what was written first in vain could not be.
        patience: seconds to wait for one who does not read; None: for ever.
    """

    lost: OSError | None = None
    patience: float | None = None
    _waits: bool = True

    def write(self, data: Any) -> int:
        piece = memoryview(data).cast("B")[: select.PIPE_BUF]  # so much does not block where poll has found room
        poll = select.poll()
        poll.register(self.fileno(), select.POLLOUT)
        try:
            wait = self.patience if self._waits else 0
            while poll.poll(None if wait is None else 1000 * wait):
                self._waits = True
                if written := super().write(piece):  # else somebody else filled it, if it is set not to block
                    return written
        except OSError as error:
            self.lost = self.lost or OSError(error.errno, error.strerror)  # without the frames of all that called
            return len(data)
        self._waits = False  # but for the first time: it would be paid for at each line
        return len(data)


class _Errors:
    """The stderr of the moment as a file for tqdm, whose own guard knows two errors only."""

    def write(self, text: str) -> None:
        _put(sys.stderr, text, flush=False)

    def flush(self) -> None:
        _put(sys.stderr, "")

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


_errors = _Errors()


def begin() -> None:
    """To be called first in a process: from here on stdout and stderr raise no error, whoever writes to them, and show
    what their encoding lacks as escapes. Those of the three that are closed are opened on the null device; otherwise
    the next file that is opened would have the number of stderr, and be written to."""
    for number, name in enumerate(STREAMS):
        stream: TextIO | None = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__"):  # guarded already, or a test's
            continue
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets this number: the lowest one that is free
        else:
            if stream is None:  # Python found none, and now another file has its number
                number = os.open(os.devnull, os.O_RDWR)
        if name != "stdin":
            setattr(sys, name, _guarded(number, stream))
        elif stream is None:
            sys.stdin = open(number, closefd=False, encoding="utf-8")  # noqa: SIM115  (open as long as the process)


def train_on() -> None:
    """From here on nobody is waited for who is there but does not read, for more than a moment."""
    for name in STREAMS[1:]:
        if stream := _stream(name):
            stream.patience = PATIENCE


def say(text: str, end: str = "\n") -> None:
    """A line for the user, on stderr, above a progress bar if there is one. Never raises."""
    if _bars is None:
        _put(sys.stderr, text + end)
    else:
        _bars.write(text, file=_errors, end=end)
        _errors.flush()


def cry(text: str) -> None:
    """`say` for a process that is about to end: it does not wait for a bar, whose thread may hang. Never raises."""
    _put(sys.stderr, text + "\n")


def show(text: str, end: str = "\n") -> None:
    """A line of what a command was asked for, on stdout. Never raises: see `unheard`."""
    _put(sys.stdout, text + end)


def show_anew(text: str) -> None:
    """`show` lines in the place of all that stands on the terminal; where stdout is none, below what was shown before.
    Never raises."""
    stands = False
    with suppress(AttributeError, OSError, ValueError):
        stands = sys.stdout.isatty()
    show(CLEAR + text if stands else text)


def unheard() -> OSError | None:
    """Why not all could be shown. A pipe whose reader has left (`| head`) counts: he has what he wanted."""
    flush()
    stream = _stream("stdout")
    return stream.lost if stream else None


def left(error: OSError | None) -> bool:
    """Whether the reader has left, which is no failure."""
    return error is not None and error.errno == errno.EPIPE


def flush() -> None:
    """Write what is still in buffers. Never raises."""
    _put(sys.stdout, "")
    _put(sys.stderr, "")


def watched() -> bool:
    """Whether stderr is a terminal."""
    with suppress(AttributeError, OSError, ValueError):
        return sys.stderr.isatty()
    return False


def bar(
    total: int | None, label: str, unit: str, *, initial: int = 0, speaks: bool = True, lines: bool = False
) -> tqdm[Any]:
    """A progress bar on stderr, which never raises for want of a reader.

    Args:
        total: what makes it full, in units; None if that is not known.
        speaks: whether this process shows it; of several ranks one does.
        lines: show it where there is no terminal, too, as a line every ten seconds.
    """
    global _bars
    from tqdm import tqdm  # not at each start of a command

    _bars = tqdm
    return tqdm(
        total=total,
        initial=initial,
        desc=label,
        unit=unit,
        file=_errors,
        mininterval=0.1 if watched() else 10,
        dynamic_ncols=True,
        disable=not (speaks and (watched() or lines)),
    )


def _guarded(number: int, stream: TextIO | None) -> TextIO:
    """A text stream over this file descriptor, in the manner of the one that it replaces."""
    manner: dict[str, Any] = {"encoding": "utf-8", "line_buffering": number == 2}
    if isinstance(stream, io.TextIOWrapper):
        with suppress(OSError):
            stream.flush()
        manner = {"encoding": stream.encoding, "line_buffering": stream.line_buffering or stream.write_through}
    raw = _Stream(number, "w", closefd=False)
    codecs.register_error("escaped", _escaped)
    return io.TextIOWrapper(io.BufferedWriter(raw), errors="escaped", **manner)


def _escaped(error: UnicodeError) -> tuple[str | bytes, int]:
    """What an encoding lacks, as escapes; but where the locale is ASCII, a file's name goes out as it came in."""
    if isinstance(error, UnicodeEncodeError) and error.encoding == "ascii":
        with suppress(UnicodeEncodeError):
            return error.object[error.start : error.end].encode("ascii", "surrogateescape"), error.end
    return codecs.backslashreplace_errors(error)


def _stream(name: str) -> _Stream | None:
    """What `begin` has put beneath a stream."""
    raw = getattr(getattr(getattr(sys, name), "buffer", None), "raw", None)
    return raw if isinstance(raw, _Stream) else None


def _put(stream: TextIO | None, text: str, *, flush: bool = True) -> None:
    if stream is None:
        return
    # Nobody takes it; the stream is closed; a signal has struck in the midst of a write.
    with suppress(OSError, ValueError, RuntimeError):
        try:
            stream.write(text)
        except UnicodeEncodeError:  # not where `begin` was called
            stream.write(text.encode(stream.encoding, "backslashreplace").decode(stream.encoding))
        if flush:
            stream.flush()
