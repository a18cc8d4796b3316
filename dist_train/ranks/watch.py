"""What may end a process from outside: signals and silence."""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from collections.abc import Callable
from threading import Thread

from dist_train.outcomes import STOPPED
from dist_train.ranks import launcher

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
POLL = 0.2  # seconds between two looks at the clock
ECHO = 2.0  # seconds within which a second signal is the first one's: Ctrl-C comes from terminal and torchrun


class Watch:
    """A thread that receives signals and misses heartbeats.

    A Python signal handler does not run while the main thread is inside a collective, so the thread reads signals from
    `signal.set_wakeup_fd`. The first stop signal sets `stop`, which the ranks agree on at a step boundary. A second
    one, a stop that takes longer than `grace`, or silence of the main thread for `patience` ends the process.

    Args:
        patience: seconds between two heartbeats, until the first step; `heartbeat` then sets the shorter one.
        grace: seconds from a stop signal to the end of the process.

    Attributes:
        stop: a stop signal has come.
        on_exit: called with the reason before the watch ends the process.
    """

    def __init__(self, patience: float, grace: float) -> None:
        self.stop = False
        self.on_exit: Callable[[str], None] = lambda _: None
        self.grace = grace
        self._open = True
        self.heartbeat(patience)
        self._reader, writer = os.pipe()
        os.set_blocking(writer, False)
        for number in STOPS:
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        Thread(target=self._run, name="watch", daemon=True).start()

    def heartbeat(self, patience: float) -> None:
        """The main thread is alive, and will be heard again within `patience` seconds."""
        self._patience, self._heard = patience, time.monotonic()

    def close(self) -> None:
        """Training is over: watch no more."""
        self._open = False
        signal.set_wakeup_fd(-1)

    def _run(self) -> None:
        first: float | None = None
        while self._open:
            ready, _, _ = select.select([self._reader], [], [], POLL)
            now = time.monotonic()
            if ready and any(number in STOPS for number in os.read(self._reader, 64)):
                if first is None:
                    first, self.stop = now, True
                elif now - first > ECHO:
                    self._leave("second stop signal: leaving without a save")
            if first is not None and now - first > self.grace:
                self._leave(f"the stop took longer than {self.grace:g} s: leaving; the previous checkpoint stands")
            if now - self._heard > self._patience:
                self._leave(f"no progress for {self._patience:g} s: a rank or a file system hangs")

    def _leave(self, why: str) -> None:
        try:
            print(f"rank {launcher.rank()}: {why}", file=sys.stderr, flush=True)
            self.on_exit(why)
        finally:
            os._exit(STOPPED)
