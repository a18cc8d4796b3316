"""`python -m tests.helpers.peak COMMAND ...`: runs it, and prints as JSON its exit code, the seconds of CPUs
that it and all that descend from it took, and the most memory, in MB, that one of these processes had."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import subprocess
import sys
from typing import NamedTuple

SUBREAPER = 36  # prctl(2): orphans below this process become its children, so that it hears of their memory


class Peak(NamedTuple):
    code: int
    seconds: float
    mb: float
    text: str


def peak(*command: str, timeout: float = 300) -> Peak:
    """Runs a command. `text`: what it printed."""
    words = [sys.executable, "-m", "tests.helpers.peak", *command]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=timeout)
    *_, last = done.stdout.splitlines()
    return Peak(*json.loads(last), done.stdout + done.stderr)


def main() -> None:
    ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)
    code = subprocess.run(sys.argv[1:], check=False).returncode
    while True:
        try:
            os.wait()
        except ChildProcessError:
            break
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(json.dumps([code, used.ru_utime + used.ru_stime, used.ru_maxrss / 1000]), flush=True)


if __name__ == "__main__":
    main()
