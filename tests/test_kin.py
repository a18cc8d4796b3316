"""A process's knowledge of its launcher and of the other ranks on its node."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

from dist_train.cli import default_name
from dist_train.ranks import kin

RANK = """
import sys
from dist_train.ranks import kin
for line in sys.stdin:
    print(kin.abort([6]) if line == "abort\\n" else kin.gone(begun=line == "begun\\n"), flush=True)
"""


class Launcher:
    """This process as the launcher of three ranks."""

    def __init__(self, folder: Path, **more: str) -> None:
        self.folder = folder
        self.ranks = [self._start(i, more) for i in range(3)]

    def _start(self, i: int, more: dict[str, str]) -> subprocess.Popen[str]:
        (self.folder / str(i)).mkdir()
        told = {"LOCAL_RANK": str(i), "RANK": str(4 + i), "LOCAL_WORLD_SIZE": "3"}
        told |= {"TORCHELASTIC_ERROR_FILE": str(self.folder / str(i) / "error.json")}
        return subprocess.Popen(
            [sys.executable, "-c", RANK], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | told | more, cwd=Path(__file__).parents[1],
        )  # fmt: skip

    def tell(self, i: int, word: str) -> str:
        stdin, stdout = self.ranks[i].stdin, self.ranks[i].stdout
        assert stdin
        assert stdout
        stdin.write(f"{word}\n")
        stdin.flush()
        return stdout.readline()

    def asks(self, i: int, *, begun: bool) -> bool:
        """Whether the rank says that another one is gone."""
        return self.tell(i, "begun" if begun else "not yet") == "True\n"

    def close(self) -> None:
        for rank in self.ranks:
            rank.kill()
            rank.communicate()


def test_a_sibling_that_was_killed(tmp_path: Path) -> None:
    """Reaped or not. One that has said why is no mystery, and who is no rank of torchrun has no siblings."""
    ours = Launcher(tmp_path, TORCHELASTIC_RUN_ID="x")
    try:
        assert not ours.asks(0, begun=True)
        ours.ranks[1].kill()
        os.waitid(os.P_PID, ours.ranks[1].pid, os.WEXITED | os.WNOWAIT)  # a zombie
        assert ours.asks(0, begun=True)
        assert ours.asks(0, begun=False)
        ours.ranks[1].wait()
        assert ours.asks(2, begun=True)
        (tmp_path / "1" / "error.json").touch()
        assert not ours.asks(0, begun=True)
        ours.tell(0, "abort")
        assert ours.ranks[2].wait(5) == -signal.SIGABRT
        assert ours.ranks[0].poll() is None
    finally:
        ours.close()


def test_without_a_launcher_nobody_is_missed(tmp_path: Path) -> None:
    ours = Launcher(tmp_path)
    try:
        ours.ranks[1].kill()
        ours.ranks[1].wait()
        assert not ours.asks(0, begun=True)
    finally:
        ours.close()


def test_a_torchrun_under_another_name_is_known_by_its_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """As process 1 of a container may be."""
    with socket.create_server(("127.0.0.1", 0)) as store:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(store.getsockname()[1]))
        monkeypatch.setattr(kin, "_process", lambda pid: kin.Process(pid, "accelerate", 0, 0) if pid else None)
        assert not kin._taken_in(1)
    assert kin._taken_in(1)
    assert kin._taken_in(77), "a script, behind which nobody is"
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    assert not kin._taken_in(1)
    monkeypatch.setattr(kin, "_process", lambda pid: kin.Process(pid, "systemd", 0, 0) if pid else None)
    assert kin._taken_in(1)
    monkeypatch.setattr(kin, "_process", lambda pid: None)
    assert not kin._taken_in(1), "hidden"


def test_two_starts_in_one_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their default names differ; that of a restart by the same launcher is the same."""
    processes = {pid: kin.Process(pid, "python", 1, 123456) for pid in (71, 72, 80, 81, 82)}
    processes[90] = kin.Process(71, "python", 1, 123457)  # another node's, or another container's
    monkeypatch.setattr(kin, "_process", processes.get)

    def name(pid: int, parent: int) -> str:
        monkeypatch.setattr(os, "getpid", lambda: pid)
        monkeypatch.setattr(os, "getppid", lambda: parent)
        return default_name("quickstart")

    assert name(80, 70) != name(81, 70), "of one shell"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    first = name(80, 71)
    assert re.fullmatch(r"quickstart-\d{8}-\d{6}-[0-9a-f]{4}", first)
    assert name(81, 71) == name(82, 71) == first
    assert len({first, name(80, 72), name(80, 90)}) == 3
    assert first[:-5] == name(80, 72)[:-5]
    monkeypatch.setattr(kin, "_process", lambda pid: None)
    assert name(80, 71)[:-5] >= f"quickstart-{datetime.now():%Y%m%d}", "hidden"
