"""Related processes: the launcher, without which this process exits, and the other ranks on its node.

Imports no torch. Reads /proc (proc(5)); processes hidden there are taken to be well.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import time
from collections.abc import Collection
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from threading import Thread
from typing import NamedTuple
from zlib import crc32

from dist_train.outcomes import FAILED
from dist_train.ranks.launcher import launched, leave, rank, restarts, submitted
from pipelines.speech import say

TORCHRUN, STEP = ("torchrun", "pt_elastic"), "slurmstepd"  # process names; torch renames torchrun to the second one
REAPERS = ("systemd", "init")  # processes that adopt orphans
PR_SET_PDEATHSIG = 1  # of linux/prctl.h
POLL = 0.5  # seconds between checks of a launcher that is not the parent


class Process(NamedTuple):
    """A live process; `began`, in clock ticks since boot, tells it from a later one with the same pid."""

    pid: int
    name: str
    parent: int
    began: int


def bind() -> None:
    """Make this process end with its launcher, at once and whatever it is doing. To be called before torch is imported.

    The kernel does this (prctl(2), PR_SET_PDEATHSIG: bound to the thread that started this process, which for torchrun
    and slurmstepd is the longest-lived one), and a thread if another process, such as a script, is in between. A
    process without a launcher, such as `nohup python -m dist_train &`, outlives its shell.
    """
    if not launched() and not submitted() and not _is_step(os.getppid()):
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent or _taken_in(parent):
        say(f"rank {rank()}: the launcher of this process is gone: leaving")
        leave(FAILED)
    above = _launcher()
    if above is not None and above.pid != parent:
        Thread(target=_leave_with, args=(above,), name="launcher", daemon=True).start()


def gone(*, begun: bool) -> bool:
    """Whether another rank on this node is gone without having given a reason: it was killed.

    Args:
        begun: whether training has begun; before that a rank may exit at any time, and under torchrun its error file is
            checked for a reason.
    """
    key = "LOCAL_RANK" if launched() else "SLURM_LOCALID"
    count, mine = os.environ.get("LOCAL_WORLD_SIZE", ""), os.environ.get(key, "")
    if not (launched() or (submitted() and begun)) or not count.isdigit() or not mine.isdigit():
        return False
    there = {variables.get(key, "") for _, variables in _siblings()}
    missing = {str(i) for i in range(int(count))} - there
    if launched() and (file := os.environ.get("TORCHELASTIC_ERROR_FILE")):
        folder = Path(file).parents[1]  # attempt_<n>/<local rank>/error.json
        missing = {i for i in missing if not (folder / i / "error.json").exists()}
    return mine in there and bool(missing)


def abort(ranks: Collection[int]) -> None:
    """Abort other ranks on this node that do not answer; faulthandler shows where they are, even if one was
    stopped."""
    for pid, variables in _siblings():
        if variables.get("RANK", variables.get("SLURM_PROCID", "")) in {str(rank) for rank in ranks}:
            with suppress(OSError):
                os.kill(pid, signal.SIGABRT)
                os.kill(pid, signal.SIGCONT)


def stamp() -> str:
    """Start time of the launcher (or of this process, without one), the same after its restarts, and four digits that
    tell it from others started in the same second: `20260102-030405-9c1f`."""
    found, when = _process(os.getppid() if launched() else os.getpid()), datetime.now()
    which = f"{socket.gethostname()} {os.getpid()} {when}"
    if found:
        lines = Path("/proc/stat").read_text(encoding="utf-8").splitlines()
        boot = next(int(line.split()[1]) for line in lines if line.startswith("btime"))
        when = datetime.fromtimestamp(boot + found.began // os.sysconf("SC_CLK_TCK"))
        which = f"{socket.gethostname()} {found.pid} {found.began}"
    return f"{when:%Y%m%d-%H%M%S}-{crc32(which.encode()) % 0x10000:04x}"


def began() -> float:
    """Start time, Unix time in seconds: of the launcher, or of this process if it was restarted or has no launcher."""
    found = _process(os.getppid() if launched() and not restarts() else os.getpid())
    if found is None:
        return time.time()
    up = float(Path("/proc/uptime").read_text(encoding="utf-8").split()[0])
    return time.time() - max(0.0, up - found.began / os.sysconf("SC_CLK_TCK"))  # a container may have its own clock


def _siblings() -> list[tuple[int, dict[str, str]]]:
    """Live children of the launcher, this process included, with the environments it gave them."""
    found = []
    with suppress(OSError):
        children = Path(f"/proc/{os.getppid()}/task/{os.getppid()}/children").read_bytes()
        for pid in map(int, children.split()):
            with suppress(OSError):
                words = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
                if _process(pid) is not None:
                    found.append((pid, {key: value for key, _, value in (word.partition("=") for word in words)}))
    return found


def _leave_with(launcher: Process) -> None:
    while (now := _process(launcher.pid)) and now.began == launcher.began:  # this process's parent may be gone already
        time.sleep(POLL)
    os._exit(FAILED)


def _launcher() -> Process | None:
    """Nearest ancestor of this process with a launcher's name."""
    names = TORCHRUN if launched() else (STEP,)
    found = _process(os.getppid())
    while found and not found.name.startswith(names):
        found = _process(found.parent)
    return found


def _is_step(pid: int) -> bool:
    found = _process(pid)
    return found is not None and found.name.startswith(STEP)


def _taken_in(parent: int) -> bool:
    """Whether the launcher was gone before this process was bound to it."""
    found = _process(parent)
    if found is None:  # outside the container, or hidden
        return False
    if found.name in REAPERS:
        return True
    if launched():  # the launcher may have another name, or be process 1; then it answers
        return _launcher() is None and not _torchrun_answers()
    # A process started by the step itself, not through a script or container, has the pid in SLURM_TASK_PID.
    return os.environ.get("SLURM_TASK_PID") == str(os.getpid()) and not found.name.startswith(STEP)


def _torchrun_answers() -> bool:
    """Whether torchrun's rendezvous store is reachable."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True  # it has no such store: unknown
    try:
        place = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        socket.create_connection(place, timeout=2).close()
    except ConnectionRefusedError:
        return False
    except (OSError, KeyError, ValueError):  # a slow network proves nothing
        return True
    return True


def _process(pid: int) -> Process | None:
    """The process with this pid; None if it is gone, reaped or not."""
    try:
        before, _, after = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")
    except OSError:
        return None
    fields = after.split()
    if fields[0] in "ZX":
        return None
    return Process(pid, before.partition("(")[2], int(fields[1]), int(fields[19]))
