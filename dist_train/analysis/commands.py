"""Commands with a time limit, which leave no process behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

PAUSE = 0.1  # seconds between two looks at a command that runs
PATIENCE = 10.0  # seconds for killed processes to end; those in a hanging driver do not
# "error: ..." as we write it, and "ValueError: ..." as Python does, also behind torchrun's "[rank1]: ".
ERROR = re.compile(r"^(?:\[\w+\]: )?((?:error|[\w.]*(?:Error|Exception|Interrupt|Exit|Refused)): \S.*)$")
REPORTED = re.compile(r"^  traceback : (?!Signal |To enable traceback)(\S.*)$")  # at its end, of the root cause


def run(
    command: Sequence[str],
    seconds: float,
    output: Path,
    *,
    said: Path | None = None,
    variables: Mapping[str, str] | None = None,
    meanwhile: Callable[[], None] = lambda: None,
) -> int | None:
    """Exit code of a command; None if it has not ended within `seconds`. In any case all of its processes are ended
    then, including those in sessions of their own and those whose parent is gone.

    Args:
        output: file to create for its output.
        said: file to create for its stdout alone.
        variables: added to our environment.
        meanwhile: called every PAUSE while it runs.
    """
    mark = f"DIST_TRAIN_{uuid4().hex}"  # all processes that come of it inherit it, whatever becomes of their parents
    environment = {**os.environ, **(variables or {}), mark: "1"}
    with open(output, "wb") as errors, open(said or os.devnull, "wb") as stdout:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stdout if said else errors,
            stderr=errors,
            start_new_session=True,
        )
    deadline = time.monotonic() + seconds
    try:
        while process.poll() is None and time.monotonic() < deadline:
            meanwhile()
            time.sleep(PAUSE)
        return process.poll()
    finally:
        _end(mark)
        with suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)
        meanwhile()


def _end(mark: str) -> None:
    """Kill all processes with this variable, and those that they have started in the meantime."""
    deadline = time.monotonic() + PATIENCE
    while (pids := _marked(mark.encode())) and time.monotonic() < deadline:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def _marked(mark: bytes) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):  # gone, or another user's
                if b"\0" + mark + b"=" in b"\0" + (entry / "environ").read_bytes():
                    found.append(int(entry.name))
    return found


def last_lines(output: Path, many: int = 30) -> list[str]:
    """The last lines of a command's output."""
    return output.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()[-many:]


def what_failed(lines: Sequence[str]) -> str:
    """The most telling of the lines: torchrun's report, else the last error, else the last line."""
    reported = [found[1] for found in map(REPORTED.match, lines) if found]
    errors = [found[1] for found in map(ERROR.match, lines) if found]
    return [*lines[-1:], *errors, *reported][-1].strip() if lines else "it wrote nothing"
