"""The page of a run, RUN/report.html: a reader of the record. A process beside the run rewrites it every minute; the
last time, after training, this process does."""

from __future__ import annotations

import subprocess
import tempfile
import time
from contextlib import suppress
from typing import IO, Any

from dist_train.monitor import drawings, page_process
from dist_train.monitor.reader import Shown
from dist_train.outcomes import Done
from dist_train.ranks import beside
from dist_train.rundir.lease import Lease

# Seconds of a start without drawings, unless another reader wants them: a short run is not slowed by them.
QUIET = 180.0
LONG = 600.0  # seconds of a start after which its last pictures are worth half a minute
LEAVING = 0.5  # seconds for the process to remove a file that it has not finished


class PageRun:
    """The page of one start. Training shares nothing with the process but the CPUs, of which it takes what is idle."""

    def __init__(self, shown: Shown) -> None:
        self._shown = shown
        self._began = self._tried = time.monotonic()
        self._process: subprocess.Popen[bytes] | None = None
        self._said: IO[bytes] | None = None  # its output
        self._told, self._done, self._abandoned = False, False, False

    @classmethod
    def wanted(cls, shown: Shown) -> PageRun | None:
        return cls(shown) if shown.config.monitor.page else None

    def begin(self) -> int:
        return self._shown.record_bytes

    def take(self, line: dict[str, Any]) -> None:
        if "event" in line:  # lines of the record may come behind the end: they are another file's
            self._done = line["event"] == "end" and line["state"] == Done.state
        if self._abandoned:
            return
        self._write_beside()
        pictures = self._shown.pictures
        if line.get("kind") == "validation":
            pictures.validated(line["step"])
        elif "kind" in line and time.monotonic() - self._began > QUIET:
            if not (self._shown.run / "pictures" / "inputs.png").exists():
                pictures.draw_inputs()
            pictures.draw()  # behind a validation the state is saved

    def close(self) -> None:
        self._end_process()
        if self._done and time.monotonic() - self._began > LONG:
            self._shown.pictures.draw(last=True)
            self._shown.pictures.wait(drawings.patience(self._shown.config.run.stop_timeout))
        lease = Lease(self._shown.run)
        lease.token = self._shown.token
        page_process.rewrite(lease)

    def hurry(self, *, last: bool) -> None:
        self._abandoned = last
        if last and (process := self._process):
            process.kill()

    def _write_beside(self) -> None:
        """Starts the process once a minute is over; if it has failed, another one after a minute."""
        if self._process and (code := self._process.poll()) is not None:
            why = self._end_process() or f"its process has ended with {code}"
            if code and not self._told:  # without an error, the run is another start's by now
                self._shown.say(f"the page is not rewritten ({why}): training goes on")
                self._told = True
        now = time.monotonic()
        if self._process is None and now - self._tried >= page_process.PERIOD:
            self._tried = now
            self._said = tempfile.TemporaryFile()  # noqa: SIM115, closed when it is over
            words = (str(self._shown.run), self._shown.token, str(page_process.PERIOD))
            self._process = beside.start(page_process.__name__, words, self._said)

    def _end_process(self) -> str:
        """Ends the process, if there is one. Returns the last line of what it said."""
        process, said, self._process, self._said = self._process, self._said, None, None
        if process:
            for end in (process.terminate, process.kill):
                end()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(LEAVING)
        if not said:
            return ""
        said.seek(0)
        lines = said.read().decode(errors="replace").split("\n")
        said.close()
        return next((line.removeprefix("error: ") for line in reversed(lines) if line.strip()), "")
