"""The processes around this one: its launcher, without which it does not go on, and the other ranks of its node.

Imports no torch. Read from /proc (proc(5)); what is hidden there is taken to be well.
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

TORCHRUN, STEP = ("torchrun", "pt_elastic"), "slurmstepd"  # names of the processes; torch gives torchrun the second one
REAPERS = ("systemd", "init")  # who takes in the children of the dead
PR_SET_PDEATHSIG = 1  # of linux/prctl.h
POLL = 0.5  # seconds between two looks at a launcher that is no parent


class Process(NamedTuple):
    """A process that is not gone; `began`, in ticks since the boot, tells it from a later one of the same number."""

    pid: int
    name: str
    parent: int
    began: int


def bind() -> None:
    """Let this process end with its launcher, at once and whatever it is doing. To be called before torch is imported.

    The kernel sees to it (prctl(2), PR_SET_PDEATHSIG: bound to the thread that started this process, which for torchrun
    and slurmstepd is the one that lives longest), and a thread where something stands between the two, as a script
    does. What nobody launched, such as `nohup python -m dist_train &`, outlives its shell.
    """
    if not launched() and not submitted() and not _is_step(os.getppid()):
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent or _taken_in(parent):
        say(f"rank {rank()}: what launched this process is gone: leaving")
        leave(FAILED)
    above = _launcher()
    if above is not None and above.pid != parent:
        Thread(target=_leave_with, args=(above,), name="launcher", daemon=True).start()


def gone(*, begun: bool) -> bool:
    """Whether another rank of this node is gone and has not said why: it was killed.

    Args:
        begun: whether training has; before that each rank may leave when it likes, and torchrun's are asked for what
            they have said.
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
    """End other ranks of this node that give no answer; by faulthandler they show where they are, even one that was
    stopped."""
    for pid, variables in _siblings():
        if variables.get("RANK", variables.get("SLURM_PROCID", "")) in {str(rank) for rank in ranks}:
            with suppress(OSError):
                os.kill(pid, signal.SIGABRT)
                os.kill(pid, signal.SIGCONT)


def stamp() -> str:
    """When the launcher of this process began, which its restarts do not change, or without one this process; and four
    digits that tell it from another that began in the same second, as in `20260102-030405-9c1f`."""
    found, when = _process(os.getppid() if launched() else os.getpid()), datetime.now()
    which = f"{socket.gethostname()} {os.getpid()} {when}"
    if found:
        lines = Path("/proc/stat").read_text(encoding="utf-8").splitlines()
        boot = next(int(line.split()[1]) for line in lines if line.startswith("btime"))
        when = datetime.fromtimestamp(boot + found.began // os.sysconf("SC_CLK_TCK"))
        which = f"{socket.gethostname()} {found.pid} {found.began}"
    return f"{when:%Y%m%d-%H%M%S}-{crc32(which.encode()) % 0x10000:04x}"


def began() -> float:
    """When this start began, in Unix's seconds: its launcher, or after a restart by that, and without one, this
    process."""
    found = _process(os.getppid() if launched() and not restarts() else os.getpid())
    if found is None:
        return time.time()
    up = float(Path("/proc/uptime").read_text(encoding="utf-8").split()[0])
    return time.time() - max(0.0, up - found.began / os.sysconf("SC_CLK_TCK"))  # a container may have its own clock


def _siblings() -> list[tuple[int, dict[str, str]]]:
    """The launcher's children that are not gone, with the environment that it gave them; this process is one."""
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
    while (now := _process(launcher.pid)) and now.began == launcher.began:  # its own parent may have gone
        time.sleep(POLL)
    os._exit(FAILED)


def _launcher() -> Process | None:
    """The nearest process above this one that has a launcher's name."""
    names = TORCHRUN if launched() else (STEP,)
    found = _process(os.getppid())
    while found and not found.name.startswith(names):
        found = _process(found.parent)
    return found


def _is_step(pid: int) -> bool:
    found = _process(pid)
    return found is not None and found.name.startswith(STEP)


def _taken_in(parent: int) -> bool:
    """Whether the launcher was gone before this process could bind itself to it."""
    found = _process(parent)
    if found is None:  # above a container, or hidden
        return False
    if found.name in REAPERS:
        return True
    if launched():  # the launcher may have another name, or be process 1 itself; it answers
        return _launcher() is None and not _torchrun_answers()
    # What a step has started itself, and not by way of a script or a container, has the number that the step told it.
    return os.environ.get("SLURM_TASK_PID") == str(os.getpid()) and not found.name.startswith(STEP)


def _torchrun_answers() -> bool:
    """Whether the store of a torchrun is there, which its ranks would meet in."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True  # there is none, so nobody knows
    try:
        place = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        socket.create_connection(place, timeout=2).close()
    except ConnectionRefusedError:
        return False
    except (OSError, KeyError, ValueError):  # a network that is slow is no sign
        return True
    return True


def _process(pid: int) -> Process | None:
    """None if it is gone, whether or not somebody has taken note of that."""
    try:
        before, _, after = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")
    except OSError:
        return None
    fields = after.split()
    if fields[0] in "ZX":
        return None
    return Process(pid, before.partition("(")[2], int(fields[1]), int(fields[19]))
