"""Nothing that shows a run can stop it: faults of a W&B server and of wandb's own process, in the middle of a run."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.compare import records, status
from tests.helpers.drills import until
from tests.helpers.launch import STEPS, Run, finish, start
from tests.helpers.wandb_server import Part, WandbServer, cores

pytestmark = pytest.mark.integration

ALL = list(range(1, 2 * STEPS + 1))
STOP = 8  # seconds that a run may take to stop: a server that does not answer is waited for no longer
STEP = 0.25  # seconds that a step takes at least: the server gets rows each second
PARTS: list[Part] = ["refuse", "die", "hang", "slow", "429"]


def one_of(first: str, *all_parts: str) -> list[Any]:
    """All cases; without the slow tests the first one alone."""
    return [first, *(pytest.param(part, marks=pytest.mark.slow) for part in all_parts if part != first)]


@pytest.fixture
def server() -> Iterator[WandbServer]:
    with WandbServer() as server:
        yield server
        assert server.backend.unknown == []


def begin(server: WandbServer, data: Path, run: Path, stop: int = STOP) -> Run:
    """Start a run that is shown by the server, and wait until some of it has arrived."""
    env = server.environment | {"STEP_SECONDS": str(STEP)}
    words = ("--monitor.wandb=online", f"--run.stop_timeout={stop}")
    process = start(data, run, *words, ranks=0, fault={}, env=env)
    until(lambda: server.backend.runs and len(server.run.steps) > 2)
    return process


def ended(process: Run, run: Path, code: int = 0) -> str:
    """What it said, and that it has ended as it does without wandb, with all steps."""
    result = finish(process)
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    if code == 0:
        assert (status(run)["state"], [line["step"] for line in records(run, "step")]) == ("done", ALL)
    until(lambda: process.processes() == [], 10)
    return result.stdout + result.stderr


def arrived(server: WandbServer) -> list[int]:
    """The steps of training that the server has."""
    return [row["_step"] for row in server.run.history if "loss/training" in row]


def warnings(said: str) -> list[str]:
    return [line for line in said.splitlines() if re.match(r"wandb (has|is|does|online)\b", line)]


def type_it(said: str, server: WandbServer, run: Path) -> None:
    """Run the line that it said is to be typed."""
    (line,) = [line for line in said.splitlines() if line.startswith("wandb sync ")]
    command = [sys.executable, "-m", *shlex.split(line)]
    env = os.environ | server.environment
    done = subprocess.run(command, env=env, cwd=run.parent, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("part", one_of("hang", *PARTS))
@pytest.mark.slow
def test_a_fault_that_passes(server: WandbServer, shard_sets: Path, tmp_path: Path, part: Part) -> None:
    """What was missed is sent when the server is back, and nobody needs to be told."""
    run = tmp_path / "run"
    process = begin(server, shard_sets, run, stop=120)
    server.delay = 1 if part == "429" else 60
    server.play(part)
    until(lambda: len(records(run, "step")) > STEPS)
    server.play("well")
    said = ended(process, run)
    assert (arrived(server), server.run.state, warnings(said)) == (ALL, "finished", [])
    assert f"wandb leet {run / 'wandb'}" in said


@pytest.mark.parametrize("part", one_of("refuse", *PARTS, "wrong key"))
def test_a_fault_that_lasts(server: WandbServer, shard_sets: Path, tmp_path: Path, part: Part) -> None:
    """It is told once, with the line that sends what was missed."""
    run = tmp_path / "run"
    process = begin(server, shard_sets, run)
    server.play(part)
    said = ended(process, run)
    (warning,) = warnings(said)
    assert ("the server does not answer" in warning) == (part != "wrong key")
    assert arrived(server) != ALL
    server.play("well")
    type_it(said, server, run)
    assert arrived(server) == ALL


@pytest.mark.slow
def test_the_next_start_sends_what_was_missed(server: WandbServer, shard_sets: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = begin(server, shard_sets, run)
    server.play("hang")
    until(lambda: len(records(run, "step")) > STEPS)
    os.kill(process.pid, signal.SIGTERM)
    ended(process, run, 75)
    assert arrived(server) != ALL[: len(records(run, "step"))]
    server.play("well")
    ended(begin(server, shard_sets, run), run)
    assert (arrived(server), server.run.dropped, server.run.starts) == (ALL, 0, 2)


@pytest.mark.parametrize("how", one_of("SIGKILL", "SIGSTOP"))
def test_its_own_process_is_struck(server: WandbServer, shard_sets: Path, tmp_path: Path, how: str) -> None:
    """wandb's, which the trainer starts: if it is killed `log` raises, if it is stopped `log` and `finish` wait."""
    run = tmp_path / "run"
    process = begin(server, shard_sets, run)
    (core,) = cores(process.pid)
    os.kill(core, signal.Signals[how])
    said = ended(process, run)
    assert len(warnings(said)) == 1, said
    type_it(said, server, run)
    assert arrived(server) == ALL


@pytest.mark.parametrize("part", one_of("wrong key", "hang"))
def test_a_fault_from_the_beginning(server: WandbServer, shard_sets: Path, tmp_path: Path, part: Part) -> None:
    """The run is shown offline, and can be sent later."""
    run = tmp_path / "run"
    server.play(part)
    words = ("--monitor.wandb=online", f"--run.stop_timeout={STOP}")
    said = ended(start(shard_sets, run, *words, ranks=0, env=server.environment), run)
    (warning,) = warnings(said)
    assert ("the server does not answer" in warning) == (part == "hang")
    assert server.backend.runs == {}
    server.play("well")
    type_it(said, server, run)
    assert arrived(server) == ALL
