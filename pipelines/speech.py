"""All output of the three packages to stdout and stderr, so that nobody who has stopped reading can end a run.

The reader of a pipe leaves, a terminal is closed, a disk is full, there never was a stderr: what cannot be written is
dropped, and the work goes on.
"""

from __future__ import annotations

import codecs
import errno
import io
import os
import re
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Timer
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from tqdm import tqdm

STREAMS = ("stdin", "stdout", "stderr")  # by file descriptor
CLEAR = "\033[H\033[2J"  # ECMA-48: cursor to the first line, and erase the screen
COLUMNS = 79  # of a terminal that does not tell its size
PLAIN = "{desc}: {n_fmt} of {total_fmt}, {rate_noinv_fmt}, {remaining} left"  # a bar without a terminal
LIVE = "{desc} |{bar}| {n_fmt}/{total_fmt}, {rate_noinv_fmt}, {remaining} left"  # and with one
SILENCE = 2.0  # seconds after which is said what is being done
PATIENCE = 1.0  # seconds that training waits for a reader that does not read (Ctrl-S, `less`)
# Control characters (C0, DEL, C1: ECMA-48), and those of Unicode that turn the direction of text round.
UNPRINTED = re.compile("[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u2028-\\u202e\\u2066-\\u2069]")
_bars: type[tqdm[Any]] | None = None  # once there has been one


class _Stream(io.FileIO):
    """stdout or stderr, beneath Python's own buffers; raises no error.

    Attributes:
        lost: the first error.
        patience: seconds to wait for a reader that does not read; None: for ever.
    """

    lost: OSError | None = None
    patience: float | None = None
    _waits: bool = True

    def write(self, data: Any) -> int:
        piece = memoryview(data).cast("B")[: select.PIPE_BUF]  # so much never blocks after poll has found room
        poll = select.poll()
        poll.register(self.fileno(), select.POLLOUT)
        try:
            wait = self.patience if self._waits else 0
            while poll.poll(None if wait is None else 1000 * wait):
                self._waits = True
                if written := super().write(piece):  # 0: another process was faster, and it is non-blocking
                    return written
        except OSError as error:
            self.lost = self.lost or OSError(error.errno, error.strerror)  # without the frames of its callers
            return len(data)
        self._waits = False  # the next lines do not wait: each would pay for it
        return len(data)


class _Errors:
    """The current stderr as a file for tqdm, whose own guard catches two errors only. Without a terminal each state of
    a bar becomes a line."""

    def write(self, text: str) -> None:
        if not watched():
            text = f"{text.strip()}\n" if text.strip() else ""
        _put(sys.stderr, text, flush=False)

    def flush(self) -> None:
        _put(sys.stderr, "")

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


_errors = _Errors()


def begin() -> None:
    """Guards the streams; to be called first in a process. From here on stdout and stderr raise no error, whoever
    writes to them, and escape what their encoding lacks. Closed streams are opened on the null device; otherwise
    the next file opened would get the descriptor of stderr, and be written to."""
    for number, name in enumerate(STREAMS):
        stream: TextIO | None = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__"):  # guarded already, or a test's
            continue
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets this number, the lowest free one
        else:
            if stream is None:  # closed when Python began, and taken by another file since
                number = os.open(os.devnull, os.O_RDWR)
        if name != "stdin":
            setattr(sys, name, _guarded(number, stream))
        elif stream is None:
            sys.stdin = open(number, closefd=False, encoding="utf-8")  # noqa: SIM115  (open as long as the process)


def train_on() -> None:
    """From here on a reader that does not read is waited for PATIENCE seconds at most."""
    for name in STREAMS[1:]:
        if stream := _stream(name):
            stream.patience = PATIENCE


def in_line(text: str) -> str:
    """Text of a stranger, such as a file's name, as part of a line: what would move a terminal's cursor, hide text or
    begin another line is escaped."""
    return printed(text).replace("\t", "\\t").replace("\n", "\\n")


def printed(text: str) -> str:
    """Lines of text without control characters: these are escaped."""
    return UNPRINTED.sub(lambda found: ascii(found[0])[1:-1], text)


def say(text: str, end: str = "\n") -> None:
    """Prints a line on stderr, above a progress bar if there is one. Control characters are escaped. Never raises."""
    text = printed(text)
    if _bars is None or not watched():
        _put(sys.stderr, text + end)
    else:
        _bars.write(text, file=_errors, end=end)
        _errors.flush()


@contextmanager
def telling(what: str) -> Iterator[None]:
    """Says what is being done if the body takes longer than `SILENCE`."""
    timer = Timer(SILENCE, say, (f"{what} ...",))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def cry(text: str) -> None:
    """`say` for a process that is about to end: does not wait for a bar, whose thread may hang. Never raises."""
    _put(sys.stderr, printed(text) + "\n")


def show(text: str, end: str = "\n", *, drawn: bool = False) -> None:
    """Prints a line of a command's result on stdout. Control characters are escaped. Never raises: see `unheard`.

    Args:
        drawn: the text has colours, and what it holds of strangers is escaped already.
    """
    _put(sys.stdout, (text if drawn else printed(text)) + end)


def show_bytes(data: bytes) -> None:
    """`show` of these very bytes."""
    with suppress(AttributeError, OSError, ValueError, RuntimeError):
        sys.stdout.flush()
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()


def show_anew(text: str) -> None:
    """`show` of a drawn text on a cleared terminal; if stdout is none, below what was shown before. Never raises."""
    show(CLEAR if columns() else "", "", drawn=True)
    show(text, drawn=True)


def columns() -> int:
    """Columns of stdout if it is a terminal, else 0."""
    with suppress(AttributeError, OSError, ValueError):
        if sys.stdout.isatty():
            return os.get_terminal_size(sys.stdout.fileno()).columns or COLUMNS
    return 0


def unheard() -> OSError | None:
    """Why output to stdout was lost, or None. A pipe whose reader has left (`| head`) counts too; see `left`."""
    flush()
    stream = _stream("stdout")
    return stream.lost if stream else None


def left(error: OSError | None) -> bool:
    """Whether the reader of a pipe has left, which is no failure."""
    return error is not None and error.errno == errno.EPIPE


def flush() -> None:
    """Writes what is still buffered. Never raises."""
    _put(sys.stdout, "")
    _put(sys.stderr, "")


def watched(name: str = "stderr") -> bool:
    """Whether this stream is a terminal."""
    with suppress(AttributeError, OSError, ValueError):
        return bool(getattr(sys, name).isatty())
    return False


def bar(
    total: int | None,
    label: str,
    unit: str,
    *,
    initial: int = 0,
    speaks: bool = True,
    lines: bool = False,
    live: str = "",
) -> tqdm[Any]:
    """A progress bar on stderr; never raises for want of a reader.

    Args:
        total: units when it is full; None if unknown.
        speaks: whether this process shows it; one of several ranks does.
        lines: without a terminal, show it as a line every ten seconds.
        live: tqdm's format of a line that is removed at its end.
    """
    global _bars
    from tqdm import tqdm  # here, since most commands need none

    _bars, known = tqdm, False
    with suppress(AttributeError, OSError, ValueError):
        known = 0 not in os.get_terminal_size(sys.stderr.fileno())  # else tqdm would show nothing
    return tqdm(
        total=total,
        initial=initial,
        desc=in_line(label),
        unit=unit,
        file=_errors,
        mininterval=0.1 if watched() else 10,
        miniters=None if watched() else 1,  # else tqdm may show it at other times, too
        dynamic_ncols=known,
        ncols=None if known else COLUMNS,
        leave=not live,
        bar_format=live or (None if total is None or not lines else LIVE if watched() else PLAIN),
        disable=not (speaks and (watched() or lines)),
    )


def _guarded(number: int, stream: TextIO | None) -> TextIO:
    """A text stream over this file descriptor, with the encoding and buffering of the one that it replaces."""
    manner: dict[str, Any] = {"encoding": "utf-8", "line_buffering": number == 2}
    if isinstance(stream, io.TextIOWrapper):
        with suppress(OSError):
            stream.flush()
        manner = {"encoding": stream.encoding, "line_buffering": stream.line_buffering or stream.write_through}
    raw = _Stream(number, "w", closefd=False)
    codecs.register_error("escaped", _escaped)
    return io.TextIOWrapper(io.BufferedWriter(raw), errors="escaped", **manner)


def _escaped(error: UnicodeError) -> tuple[str | bytes, int]:
    """Escapes what an encoding lacks; but if the locale is ASCII, a file's name is written as it was read."""
    if isinstance(error, UnicodeEncodeError) and error.encoding == "ascii":
        with suppress(UnicodeEncodeError):
            return error.object[error.start : error.end].encode("ascii", "surrogateescape"), error.end
    return codecs.backslashreplace_errors(error)


def _stream(name: str) -> _Stream | None:
    """The guard that `begin` has put beneath a stream, or None."""
    raw = getattr(getattr(getattr(sys, name), "buffer", None), "raw", None)
    return raw if isinstance(raw, _Stream) else None


def _put(stream: TextIO | None, text: str, *, flush: bool = True) -> None:
    if stream is None:
        return
    # No reader; a closed stream; a signal in the middle of a write.
    with suppress(OSError, ValueError, RuntimeError):
        try:
            stream.write(text)
        except UnicodeEncodeError:  # only without `begin`
            stream.write(text.encode(stream.encoding, "backslashreplace").decode(stream.encoding))
        if flush:
            stream.flush()
