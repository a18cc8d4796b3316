"""What may end a process from outside: signals, silence, and another rank's failure. Imports no torch."""

from __future__ import annotations

import faulthandler
import os
import select
import signal
import sys
import time
from pathlib import Path
from threading import Thread, main_thread
from types import FrameType
from typing import Protocol

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP)
POLL = 0.2  # seconds between checks of the clock
ECHO = 2.0  # seconds within which a second signal repeats the first: Ctrl-C comes from both terminal and torchrun
QUIET = 1.0  # seconds without a heartbeat between checks whether another rank has failed
MARGIN = 10.0  # seconds by which faulthandler fires later than the watch
STDERR = 2  # of this process, or the null device: see `speech.begin`
LONGEST = 1e9  # seconds: faulthandler rejects more
ROOT = Path(__file__).parents[2]


class Speaker(Protocol):
    """Reports for a process that the watch ends, and ends it; see `rundir.last_words`."""

    def force(self, why: str, *, begun: bool) -> None:
        """End the process after a stop, without a save.

        Args:
            begun: whether there was something to save.
        """

    def hang(self, seconds: float, step: int, place: str, stacks: str) -> None:
        """End the process after so many seconds without a heartbeat.

        Args:
            step: current step, counted from 1; 0 before the first.
            place: where the main thread is.
            stacks: of all threads.
        """

    def follow(self, *, signalled: bool, begun: bool) -> bool:
        """End the process if another rank has failed; else return whether another rank has reported a hang.

        Args:
            signalled: whether a stop signal has arrived, which may be the launcher's reaction to a killed rank.
            begun: whether there is something to save.
        """

    def waits(self) -> bool:
        """Whether something has arrived, since the last call, that some rank waits for outside the steps."""


class Watch:
    """A thread that receives signals and notices missing heartbeats.

    A Python signal handler does not run while the main thread is inside a collective, so the thread reads signals from
    `signal.set_wakeup_fd`. The first stop signal sets `stop`, which the ranks agree on at a step boundary; before the
    first step there is nothing to save, and it ends the process. So does a second signal, a stop that takes longer than
    `grace`, or no heartbeat of the main thread for `patience`, unless something arrives that a rank waits for. If the
    thread itself is blocked, by a call that holds the GIL, faulthandler ends the process.

    Args:
        patience: seconds allowed between heartbeats until the first step; `heartbeat` then sets the shorter one.
        grace: seconds from a stop signal to the end of the process.
        words: ends the process.

    Attributes:
        stop: whether a stop signal has arrived.
        step: current step, counted from 1.
    """

    def __init__(self, patience: float, grace: float, words: Speaker) -> None:
        self.stop, self.step = False, 0
        self.grace = grace
        self._words = words
        self._open, self._begun = True, False
        self._patience, self._armed, self._stopped = 0.0, 0.0, float("inf")
        faulthandler.enable(STDERR)  # shows where a signal such as SIGSEGV occurred
        self._hear(patience)
        self._reader, writer = os.pipe()
        os.set_blocking(writer, False)
        for number in STOPS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # ignored under nohup
                signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        Thread(target=self._run, name="watch", daemon=True).start()

    def heartbeat(self, patience: float) -> None:
        """Note that the main thread is alive and training; the next call is due within `patience` seconds."""
        self._begun = True
        self._hear(patience)

    def wait(self) -> None:
        """Note that the main thread is alive, and that what it waits for outside the steps makes progress."""
        self._hear(self._patience)

    def left(self) -> float:
        """Seconds left for a stop; `grace` if none has been requested."""
        return self.grace - max(0.0, time.monotonic() - self._stopped)

    def close(self) -> None:
        """Stop watching: training is over."""
        self._open = False
        faulthandler.cancel_dump_traceback_later()
        signal.set_wakeup_fd(-1)

    def _hear(self, patience: float) -> None:
        before, self._patience, self._heard = self._patience, patience, time.monotonic()
        if patience != before or self._heard - self._armed > 1:  # not each time: it starts a thread
            faulthandler.dump_traceback_later(min(patience + MARGIN, LONGEST), exit=True, file=STDERR)
            self._armed = self._heard

    def _run(self) -> None:
        asked = 0.0
        while self._open:
            ready, _, _ = select.select([self._reader], [], [], POLL)
            now = time.monotonic()
            if ready and any(number in STOPS for number in os.read(self._reader, 64)):
                self._words.follow(signalled=True, begun=self._begun)
                if not self._begun:
                    self._words.force("stopped before the first step", begun=False)
                if not self.stop:
                    self._stopped, self.stop = now, True
                elif now - self._stopped > ECHO:
                    self._words.force("second stop signal: leaving without a save", begun=True)
            if now - self._stopped > self.grace:
                self._words.force(f"the stop took longer than {self.grace:g} s: leaving without a save", begun=True)
            hangs = now - self._heard > self._patience
            if now - max(self._heard, asked) > QUIET:
                asked = now
                if self._words.waits():
                    self.wait()
                    hangs = False
                hangs = self._words.follow(signalled=False, begun=self._begun) or hangs
            if hangs:
                self._words.hang(now - self._heard, self.step, place(), stacks())


def stacks() -> str:
    """Stacks of all threads, innermost call first. Reads no file, not even the program's source."""
    memory = os.memfd_create("stacks")
    try:
        faulthandler.dump_traceback(memory, all_threads=True)
        return os.pread(memory, 1 << 20, 0).decode(errors="replace")
    finally:
        os.close(memory)


def place() -> str:
    """Place in the program where the main thread is: `read (dist_train/ranks/vote.py:66)`."""
    ident = main_thread().ident
    frame: FrameType | None = sys._current_frames().get(ident) if ident is not None else None
    while frame is not None and not _ours(frame):
        frame = frame.f_back
    if frame is None:
        return "an unknown place"
    code = frame.f_code
    return f"{code.co_name} ({os.path.relpath(code.co_filename, ROOT)}:{frame.f_lineno})"


def _ours(frame: FrameType) -> bool:
    path = os.path.relpath(frame.f_code.co_filename, ROOT)
    return path.split(os.sep)[0] in ("dist_train", "pipelines", "slurm", "tests")
