"""What torchrun (or submitit) tells a process in its environment. Imports no torch."""

from __future__ import annotations

import os
import sys
from datetime import datetime
from pathlib import Path
from typing import NoReturn

from dist_train.outcomes import FAILED


def launched() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def rank() -> int:
    """The rank, before there is a process group."""
    return int(os.environ.get("RANK", 0))


def restarts() -> int:
    """How often torchrun has restarted the run by itself."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def exit_code(code: int) -> int:
    """What a process is to return: to torchrun a non-zero code means "restart me", which mends a failure alone."""
    return 0 if launched() and code != FAILED else code


def began() -> datetime:
    """When the launcher of this process began, which its restarts do not change; without one, now."""
    if not launched():
        return datetime.now()
    lines = Path("/proc/stat").read_text().splitlines()
    boot = next(int(line.split()[1]) for line in lines if line.startswith("btime"))
    ticks = int(Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[19])
    return datetime.fromtimestamp(boot + ticks // os.sysconf("SC_CLK_TCK"))


def leave(code: int) -> NoReturn:
    """End the process. All is written by now; threads of libraries were seen to abort it while Python unloads them."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
