"""Shards fetched ahead of need, for all ranks of a node, by a process that ends with the one that started it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import IO, Any

from pipelines.order import Ints
from pipelines.remote.elsewhere import Elsewhere
from pipelines.shards import ShardSet
from pipelines.speech import say

RESTART = 2.0  # seconds between two starts of the process, at least
LEAVE = 2.0  # seconds that it is given to end
ROOT = Path(__file__).parents[2]
MODULE = "pipelines.remote.fetcher"
# `python -m`, but of the packages that this process runs: in the current directory there may be others.
PROGRAM = f"import runpy, sys; sys.path.insert(0, {str(ROOT)!r}); runpy.run_module({MODULE!r}, None, '__main__', True)"


class Ahead:
    """Has shards fetched in the order in which they are needed; only `close` waits. If the process dies, it is started
    again when the next shard is opened; meanwhile whoever needs a shard fetches it."""

    def __init__(self) -> None:
        self._messages = SimpleQueue[dict[str, Any] | None]()
        self._said: list[dict[str, Any]] = []  # since the last order, which is the first of them
        self._process: subprocess.Popen[bytes] | None = None
        self._started = float("-inf")
        self._thread = Thread(target=self._tell, name="ahead", daemon=True)
        self._thread.start()

    def follow(self, order: Sequence[tuple[ShardSet, Ints]]) -> None:
        """Has these shards of these sets fetched from now on, in place of those named before. Sets without a cache are
        left out."""
        sets = []
        for shards, numbers in order:
            if isinstance(here := shards.here, Elsewhere):
                directory = str(shards.directory)
                shards.reached = partial(self._reached, directory)
                about = {"place": here.place.root, "cache": str(here.cache.directory), "budget": here.cache.budget}
                sets.append({**about, "directory": directory, "shards": numbers.tolist()})
        self._messages.put({"follow": sets})

    def close(self) -> None:
        """Ends the process."""
        self._messages.put(None)
        self._thread.join(LEAVE)
        if process := self._process:
            process.kill()  # it has been told to end, unless it does not listen
            self._thread.join()
            process.wait()

    def _reached(self, directory: str, shard: int) -> None:
        self._messages.put({"reached": [directory, shard]})

    def _tell(self) -> None:
        while (message := self._messages.get()) is not None:
            self._said = [message] if "follow" in message else [*self._said, message]
            process = self._process
            if process and process.poll() is None:
                self._send(process, [message])
            elif time.monotonic() - self._started > RESTART:
                self._start()
        if self._process:
            _end(self._process)

    def _start(self) -> None:
        self._started = time.monotonic()
        if self._process:
            _end(self._process)
        try:
            process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        except OSError as error:
            say(f"no shards are fetched ahead of need, which is slower: no process can be started ({error.strerror})")
            return
        self._process = process
        Thread(target=_repeat, args=(process.stdout,), name="ahead-says", daemon=True).start()
        self._send(process, self._said)

    def _send(self, process: subprocess.Popen[bytes], messages: list[dict[str, Any]]) -> None:
        lines = "".join(f"{json.dumps(one)}\n" for one in messages).encode()
        with suppress(OSError):  # it has died
            process.stdin.write(lines)  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(OSError):  # it has died
        process.stdin.close()  # type: ignore[union-attr]
    with suppress(subprocess.TimeoutExpired):
        process.wait(LEAVE / 2)


def _repeat(output: IO[bytes]) -> None:
    """Repeats what the process says."""
    with output:
        for line in output:
            say(line.decode(errors="replace").rstrip("\n"))
