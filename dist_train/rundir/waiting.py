"""waiting: what a rank waits for outside the steps, a shard that is still on its way. Imports no torch.

    the start, the rank, how often something has arrived so far, and a sentence, each on a line

A rank rewrites the file every few seconds while it waits. The others, which meanwhile stand in an all-reduce, find that
the number has grown: it is no hang. Clocks of different nodes are not compared.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from threading import Lock

from dist_train.rundir.lease import Lease
from pipelines.files import read_file, write_atomically

FILE = "waiting"
EVERY = 5.0  # seconds between two writes, at most
LINES = 30.0  # seconds between two lines for the user, at least
MOST = 1 << 12  # bytes of the file


class Waiting:
    """The file of one start, as one of its ranks writes and reads it.

    Args:
        lease: checked before every write.
        show: called with each new sentence that a look finds.
        say: the same, now and then: shows the user a line.
    """

    def __init__(self, lease: Lease, show: Callable[[str], None], say: Callable[[str], None]) -> None:
        self._lease, self._show, self._say = lease, show, say
        self._lock, self._said = Lock(), float("-inf")
        self._count, self._written = 0, float("-inf")
        self._known: dict[str, str] = {}  # the number of each rank at the last look
        self._sentence = ""

    def write(self, rank: int, sentence: str, *, moved: bool, every: float = EVERY) -> None:
        """Notes what a rank waits for, unless it did so less than `every` seconds ago. From any thread; never raises.

        Args:
            moved: whether something has arrived since the last call.
        """
        with self._lock:
            self._count += moved
            if time.monotonic() - self._written < min(every, EVERY):
                return
            self._written, count = time.monotonic(), self._count
        body = f"{self._lease.token}\n{rank}\n{count}\n{sentence}"
        with suppress(OSError):  # the disk may be full, and training goes on
            if self._lease.token and self._lease.holds():
                write_atomically(self._lease.run / FILE, body.encode(errors="replace")[:MOST], durable=False)

    def look(self) -> bool:
        """Whether something has arrived at a rank of this start since the last call. Raises OSError."""
        try:
            lines = read_file(self._lease.run / FILE, MOST).decode(errors="replace").split("\n", 3)
        except FileNotFoundError:
            return False
        if len(lines) < 4 or not self._lease.token or lines[0] != self._lease.token:
            return False
        _, rank, count, sentence = lines
        before, self._known[rank] = self._known.get(rank, "0"), count
        if sentence != self._sentence:
            self._sentence = sentence
            self._show(sentence)
            if (now := time.monotonic()) - self._said > LINES:
                self._say(sentence)
                self._said = now
        return count != before
