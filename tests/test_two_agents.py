"""torchrun on two nodes, without Slurm: two agents with two ranks each, here on one machine."""

from __future__ import annotations

import os
import signal
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.compare import assert_same_run, status
from tests.helpers.drills import EVERY, all_gone, ranks_of, until
from tests.helpers.launch import Run, alive, command, finish, launch, spawn

pytestmark = [pytest.mark.integration, pytest.mark.slow]

ONE_EPOCH = (EVERY, "--train.epochs=1")


def agents(data: Path, run: Path, **options: Any) -> list[Run]:
    """Both torchruns; the first has the rendezvous, on a port of its own. `options`: of `spawn`."""
    with socket.create_server(("127.0.0.1", 0)) as holder:
        place = f"localhost:{holder.getsockname()[1]}"
    words = command(data, run, *ONE_EPOCH, module="tests.helpers.faults")
    at = words.index("--standalone")
    words[at : at + 1] = ["--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint={place}", "--rdzv-id=two"]
    first = spawn(words, how="exec", **options)
    until(lambda: answers(place))
    return [first, spawn(words, how="exec", **options)]


def answers(place: str) -> bool:
    host, _, port = place.partition(":")
    with suppress(OSError):
        socket.create_connection((host, int(port)), timeout=1).close()
        return True
    return False


@pytest.fixture(scope="module")
def one_agent(shard_sets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four ranks of one torchrun, never stopped."""
    run = tmp_path_factory.mktemp("one_agent") / "run"
    result = launch(shard_sets, run, *ONE_EPOCH, ranks=4)
    assert result.returncode == 0, result.stderr
    return run


@pytest.mark.parametrize("stopped", [0, 1], ids=["the one with the rendezvous", "the other"])
def test_one_agent_is_stopped_and_the_same_lines_go_on(
    stopped: int, shard_sets: Path, tmp_path: Path, one_agent: Path
) -> None:
    """As if its node were taken away: all ranks save and leave, and the run ends like one of a single torchrun. The
    torchrun with the rendezvous waits five minutes for another that was stopped, deaf to all but SIGKILL."""
    run = tmp_path / "run"
    both = agents(shard_sets, run, env={"STEP_SECONDS": "0.5"})
    until(lambda: list((run / "checkpoints").glob("step-*")))
    ranks = [rank for agent in both for rank in ranks_of(agent)]
    assert len(ranks) == 4
    os.kill(both[stopped].pid, signal.SIGTERM)
    assert finish(both[stopped]).returncode != 0
    until(lambda: not any(map(alive, ranks)), 10)
    assert status(run)["state"] == "stopped"
    if stopped == 1:
        both[0].kill()
    for agent in both:
        finish(agent, 60)
        all_gone(agent)
    again = agents(shard_sets, run)
    assert [finish(agent).returncode for agent in again] == [0, 0]
    assert (run / "events.jsonl").read_text().count('"event": "start"') == 2
    assert_same_run(run, one_agent)
