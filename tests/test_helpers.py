"""A run forked from a process with imported modules equals the run started from the command line."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import launch as helpers
from tests.helpers.compare import assert_same_run, records
from tests.helpers.launch import alive, at, children, finish, launch, start

pytestmark = pytest.mark.integration

FULL = at("save:written", 1, "disk full", always=True)
HOWS = pytest.mark.parametrize("how", ["fork", pytest.param("exec", marks=pytest.mark.slow)])

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_same_bits_and_words(shard_sets: Path, tmp_path: Path) -> None:
    words = {}
    for how in ("fork", "exec"):
        result = launch(shard_sets, tmp_path / how, how=how)
        assert result.returncode == 0
        said = (result.stdout + result.stderr).replace(str(tmp_path / how), "RUN")
        lines = [line for line in said.splitlines() if "images/s" not in line]
        words[how] = [re.sub(r"\d:\d\d:\d\d.*", "TIME", line) for line in lines]
    assert_same_run(tmp_path / "fork", tmp_path / "exec")
    assert len(records(tmp_path / "fork", "step")) == 20
    assert words["fork"] == words["exec"]
    assert len(words["fork"]) > 5


@HOWS
@pytest.mark.parametrize(
    ("fault", "extra", "code"),
    [
        ({}, ("--train.max_steps=1",), 0),
        (FULL, ("--train.max_steps=1",), 1),
        ({}, ("--optim.lrr=1",), 2),
        (at("step", 2, "nan"), (), 70),
        (at("step", 2, "SIGTERM"), (), 75),
        (at("step", 2, "kill"), (), -9),
    ],
    ids=["done", "failed", "usage", "diverged", "stopped", "killed"],
)
def test_exit_codes(
    shard_sets: Path, tmp_path: Path, how: str, fault: dict[str, Any], extra: tuple[str, ...], code: int
) -> None:
    result = launch(shard_sets, tmp_path / "r", *extra, ranks=0, fault=fault, how=how)
    assert result.returncode == code, result.stderr


@HOWS
def test_torchrun_restarts_and_reports(shard_sets: Path, tmp_path: Path, how: str) -> None:
    """Both ranks say why they leave with code 1, twice; so does torchrun."""
    options = {"fault": FULL, "agent": "--max-restarts=1", "how": how}
    result = launch(shard_sets, tmp_path / "r", "--train.max_steps=1", **options)
    assert result.returncode == 1
    assert result.stderr.count("the last save failed") == 2
    assert "exitcode  : 1 (pid: " in result.stderr
    assert "ChildFailedError" in result.stderr


@HOWS
def test_what_hangs_is_killed(shard_sets: Path, tmp_path: Path, how: str) -> None:
    """And a failing test shows the last words of its ranks."""
    run = start(shard_sets, tmp_path / "r", fault=at("step", 2, "hang", 1), how=how)
    deadline = time.monotonic() + 60
    while not (tmp_path / "r" / "fault-1").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    workers = children(run.pid)
    assert len(workers) == 2
    with pytest.raises(subprocess.TimeoutExpired):
        finish(run, timeout=0.5)
    time.sleep(0.2)
    assert not any(map(alive, (run.pid, *workers)))
    assert helpers.STARTED[-1] is run
    assert "/0/stderr.log\n" in run.tails()
    assert re.search(r"2 x cpu, .*, 240 images, deterministic by construction, epoch 1", run.tails())


def test_a_failing_test_shows_what_its_runs_wrote(tmp_path: Path) -> None:
    (tmp_path / "test_x.py").write_text(
        "from tests.helpers.launch import finish, python, spawn\n"
        "def test_x():\n"
        "    assert finish(spawn(python('pipelines', 'nope'), how='exec')).returncode == 0\n"
    )
    words = ["-p", "tests.helpers.plugin", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "1 failed" in done.stdout
    assert "stderr.log\nerror: unknown verb nope: the verbs are pack, " in done.stdout
