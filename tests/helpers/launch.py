"""Starts the trainer as a user does: real processes, small model, small data."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.helpers import server

SMALL = [
    "--data.resize=72",
    "--data.crop=67",
    "--model.hidden=32",
    "--model.width=0.25",
    "--train.compile=off",
    "--train.device=cpu",
    "--train.global_batch=24",
    "--train.epochs=2",
    "--monitor.log_every=1",
    "--checkpoint.minutes=0",
    "--monitor.page=false",  # a tenth of a second of each run; see tests/test_page_live.py
]
PLAIN = ("--model.hidden=4096", "--model.width=1")  # for torchvision's nets, which are not made smaller
STEPS = 10  # an epoch: 240 images in batches of 24
EMPTY = Path(__file__).parent / "empty.yaml"
MARK = "RUN_OF_A_TEST"  # a variable in the environment of all that a run starts
STARTED: list[Run] = []  # of the test that is running; tests/helpers/plugin.py reads and empties it


@dataclass(frozen=True)
class Run:
    """A command that was started, and the folder that its output goes to."""

    process: subprocess.Popen[bytes] | server.Forked
    folder: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    def kill(self) -> None:
        self.process.kill()

    def processes(self) -> list[int]:
        """All that it has started, and what these have, and so on, and that runs still: in whatever session, and
        whoever its parent is by now. They are known by their environment, or where they were forked by their output."""
        mark = f"{MARK}={self.folder}".encode()
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has gone
                said = [os.readlink(process / "fd" / number).startswith(str(self.folder)) for number in "12"]
                if alive(int(process.name)) and (any(said) or mark in (process / "environ").read_bytes().split(b"\0")):
                    found.append(int(process.name))
        return found

    def said(self, stream: str) -> str:
        """What it wrote to stdout or stderr: each rank, start after start, then what started them."""
        return "".join(path.read_text(errors="replace") for path in self._files(stream))

    def tails(self, lines: int = 30) -> str:
        """The end of what each rank wrote, under a heading."""
        parts = []
        for stream in ("stdout", "stderr"):
            for path in self._files(stream):
                if text := path.read_text(errors="replace").rstrip():
                    where = "/".join(path.relative_to(self.folder).parts[-3:])
                    parts.append("\n".join([f"--- {where}", *text.splitlines()[-lines:]]))
        return "\n".join(parts)

    def _files(self, stream: str) -> list[Path]:
        """Those of torchrun's workers lie in <run>/attempt_<n>/<rank>/."""
        return [*sorted(self.folder.glob(f"*/*/*/{stream}.log")), self.folder / f"{stream}.log"]


def command(
    data: Path, run: Path, *extra: str, ranks: int = 2, module: str = "dist_train", agent: str = ""
) -> list[str]:
    """The command line of a run; `ranks` 0 starts one process without torchrun. `agent`: options for torchrun."""
    sets = [f"--data.train={data / 'train'}", f"--data.val={data / 'val'}", f"--run.dir={run}"]
    return python(module, f"--config={EMPTY}", *SMALL, *sets, *extra, ranks=ranks, agent=agent)


def python(module: str, *words: str, ranks: int = 0, agent: str = "") -> list[str]:
    """The command line `python -m MODULE ...`, or that of torchrun with so many ranks of it."""
    launcher = [sys.executable, "-m"]
    if ranks:
        launcher += ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *agent.split(), "-m"]
    return [*launcher, module, *words]


def spawn(args: list[str], *, env: dict[str, str] | None = None, how: str = "fork") -> Run:
    """Start a command line in a session of its own.

    Args:
        how: "fork" from a process that has torch already (see server.py), which saves more than half the time; "exec"
            for the literal command: where it is struck while it imports, where ranks return 0 to a torchrun that has
            been told to stop, where the environment matters when a library is loaded or is looked up in /proc, and now
            and then, since that is what users type.
    """
    folder = Path(tempfile.mkdtemp(prefix="run-"))
    if args[2] == server.TORCHRUN:
        args = [*args[:3], f"--log-dir={folder}", "--redirects=3", *args[3:]]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", MARK: str(folder), **(env or {})}
    out, err = folder / "stdout.log", folder / "stderr.log"
    process: subprocess.Popen[bytes] | server.Forked
    if how == "fork":
        process = server.fork(args, variables, Path.cwd(), out, err)
    else:
        with open(out, "wb") as stdout, open(err, "wb") as stderr:
            process = subprocess.Popen(args, env=variables, stdout=stdout, stderr=stderr, start_new_session=True)
    STARTED.append(Run(process, folder))
    return STARTED[-1]


def start(
    *args: Any,
    fault: dict[str, Any] | None = None,
    env: dict[str, str] | None = None,
    how: str = "fork",
    **options: Any,
) -> Run:
    """Start a run; for the other arguments see `command` and `spawn`.

    Args:
        fault: of `at`, in whose place the trainer is `tests.helpers.faults`; {} for one that only notes its steps.
    """
    if fault is not None:
        options["module"], env = "tests.helpers.faults", {"FAULT": json.dumps(fault), **(env or {})}
    return spawn(command(*args, **options), env=env, how=how)


def at(moment: str, n: int, do: str, rank: int = 0, **more: Any) -> dict[str, Any]:
    """The fault that a rank does something at the n-th time that it comes to a moment; see `tests.helpers.faults`."""
    return {"at": moment, "n": n, "do": do, "rank": rank, **more}


def finish(run: Run, timeout: float = 180) -> subprocess.CompletedProcess[str]:
    """Wait for it; what hangs is killed, with the workers that torchrun put into sessions of their own."""
    try:
        code = run.process.wait(timeout)
    except subprocess.TimeoutExpired:
        for pid in (run.pid, *children(run.pid)):
            os.kill(pid, signal.SIGKILL)
        run.process.wait()
        raise
    return subprocess.CompletedProcess(run.process.args, code, run.said("stdout"), run.said("stderr"))


def children(pid: int) -> list[int]:
    """The processes that a launcher has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    """Whether it runs: neither gone nor a zombie that nobody has reaped."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def launch(*args: Any, timeout: float = 180, **options: Any) -> subprocess.CompletedProcess[str]:
    """Start a run and wait for its end."""
    return finish(start(*args, **options), timeout)
