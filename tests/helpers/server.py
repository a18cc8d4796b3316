"""Starts runs in processes that have torch, DALI and the trainer already: half the time of a small run is imports.

`python -m tests.helpers.server SOCKET` imports them once and then forks a process for each command that comes. The same
command line is read by the same code (torchrun's own, where it is torchrun's), and its processes have the environment,
signals and sessions that they would have; only that torchrun's workers are forked too. They may end by any signal or
exit code but 0, which they have to return; and /proc shows the server's environment for them.

The server itself computes nothing, since threads do not live through a fork. Nobody but the tests starts runs this way.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from dist_train.ranks import launcher

IMPORTS = (
    "dist_train.run",  # first: the package settles how OpenMP waits, before torch loads it
    "tests.helpers.faults",
    "torch.distributed.run",
    "torch._dynamo",  # an optimizer imports it
    "matplotlib.pyplot",
)
TORCHRUN = "torch.distributed.run"
ROOT = Path(__file__).parents[2]


class Forked:
    """A command that the server runs; as `subprocess.Popen` has them `args`, `pid`, `wait` and `kill`."""

    def __init__(self, args: list[str], connection: socket.socket) -> None:
        self.args, self._answers = args, connection
        self.pid = self._answer(60)
        self._code: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, or minus the number of the signal that ended it."""
        if self._code is None:
            try:
                self._code = self._answer(timeout)
            except TimeoutError:
                raise subprocess.TimeoutExpired(self.args, timeout or 0) from None
            self._answers.close()
        return self._code

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def __del__(self) -> None:
        self._answers.close()  # of a test that failed before it waited: no warning in the test that runs by then

    def _answer(self, timeout: float | None) -> int:
        self._answers.settimeout(timeout)
        answer = self._answers.recv(64)
        assert answer, "the server of the tests has ended"
        return int(answer)


@functools.cache
def server() -> Path:
    """The socket of the server, started when it is first asked for."""
    folder = tempfile.TemporaryDirectory(prefix="server-")
    path = Path(folder.name) / "socket"
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.helpers.server", str(path)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,  # ends the server when this process ends, however that is
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    atexit.register(folder.cleanup)
    assert process.stdin
    atexit.register(process.wait)
    atexit.register(process.stdin.close)
    assert process.stdout
    assert process.stdout.readline() == b"ready\n", "the server of the tests did not start"
    return path


def fork(args: list[str], env: dict[str, str], cwd: Path, out: Path, err: Path) -> Forked:
    """Run `python -m MODULE ...` in a process forked from the server; stdout and stderr go into the two files."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(str(server()))
    request = {"args": args, "env": env, "cwd": str(cwd), "out": str(out), "err": str(err)}
    connection.send(json.dumps(request).encode())
    return Forked(args, connection)


def serve(path: str) -> NoReturn:
    """Take commands until standard input ends."""
    for module in IMPORTS:
        importlib.import_module(module)
    assert threading.active_count() == len(os.listdir("/proc/self/task")) == 1, "a library started a thread"
    gc.freeze()  # what a collection touches is copied for each process
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(path)
    listener.listen()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the keepers
    print("ready", flush=True)
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:
            os._exit(0)
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            keep(connection)
        connection.close()


def keep(connection: socket.socket) -> NoReturn:
    """The parent of one command: tells its process, and how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    request = json.loads(connection.recv(1 << 20))
    pid = os.fork()
    if pid == 0:
        connection.close()
        become(request)
    connection.send(str(pid).encode())
    _, status = os.waitpid(pid, 0)
    connection.send(str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


def become(request: dict[str, Any]) -> NoReturn:
    """Be the process that the command line asks for."""
    os.setsid()
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    for place, target in ((os.devnull, 0), (request["out"], 1), (request["err"], 2)):
        file = os.open(place, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, target)
        os.close(file)
    _, _, module, *argv = request["args"]
    launcher.leave(torchrun(argv) if module == TORCHRUN else perform(module, argv))


def torchrun(argv: Sequence[str]) -> int:
    """The exit code of torchrun with these arguments. It starts its workers by a fork."""
    program = importlib.import_module(TORCHRUN)
    launch = program.elastic_launch

    def forking(config: Any, entrypoint: str) -> Any:
        assert entrypoint == sys.executable
        config.start_method = "fork"
        return launch(config, work)

    program.elastic_launch = forking
    return perform(TORCHRUN, argv)


def work(*words: str) -> None:
    """One rank: `python [-u] -m MODULE ...`."""
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):  # as torchrun's are not
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    module = words.index("-m") + 1
    if code := perform(words[module], words[module + 1 :]):
        raise SystemExit(code)


def perform(name: str, argv: Sequence[str]) -> int:
    """The exit code of `python -m NAME ...`, whose `main` returns it."""
    sys.argv = [name, *argv]
    package = importlib.util.find_spec(name).submodule_search_locations is not None
    module = importlib.import_module(f"{name}.__main__" if package else name)
    try:
        return int(module.main() or 0)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(bool(end.code))
    except BaseException:
        traceback.print_exc()
        return 1


if __name__ == "__main__":
    serve(sys.argv[1])
