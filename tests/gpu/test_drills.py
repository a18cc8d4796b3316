"""Drills on GPUs with one and two ranks: the end of runs that are stopped or killed, hang, or lose a rank."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tests.helpers.compare import assert_same_run, newest, status
from tests.helpers.gpu import MARKS, REHEARSED, TIMEOUT, on_gpus, run_on_gpus, start_on_gpus
from tests.helpers.launch import alive, at, children, finish

pytestmark = MARKS

EVERY = "--checkpoint.steps=4"


@on_gpus(1, 2)
def test_drill_sigterm_to_one_rank(shard_sets: Path, tmp_path: Path, ranks: int) -> None:
    """All leave at the same step, and its state is saved."""
    result = run_on_gpus(shard_sets, tmp_path, ranks=ranks, fault=at("step", 6, "SIGTERM", ranks - 1))
    assert status(tmp_path)["state"] == "stopped", result.stderr
    assert "Traceback" not in result.stderr
    shown = [(tmp_path / f"samples-{rank}.jsonl").read_text().splitlines() for rank in range(ranks)]
    (last,) = {json.loads(lines[-1])["step"] for lines in shown}
    assert last >= 5
    assert newest(tmp_path)["state"]["step"] == last + 1


@on_gpus(1, 2)
def test_drill_sigkill_of_one_rank(
    shard_sets: Path, learning: tuple[str, ...], trained: Callable[[int], Path], tmp_path: Path, ranks: int
) -> None:
    """torchrun starts the ranks once more, and the run ends with the bits of one that was not disturbed."""
    fault = at("step", 10, "kill", ranks - 1)  # the second save has begun, so the first one is whole
    extra = (*learning, "--train.precision=off", EVERY)
    result = run_on_gpus(shard_sets, tmp_path, *extra, ranks=ranks, fault=fault, agent="--max-restarts=1")
    assert status(tmp_path)["state"] == "done", result.stderr
    assert (tmp_path / f"fault-{ranks - 1}").exists()
    assert "continuing from step-0000000" in result.stderr
    assert_same_run(tmp_path, trained(ranks))


@on_gpus(1, 2)
def test_drill_a_rank_that_hangs(shard_sets: Path, tmp_path: Path, ranks: int) -> None:
    """The others wait in a collective, and each process ends itself. What NCCL has recorded is kept."""
    limit = f"--run.step_timeout={6 if REHEARSED else 20}"
    result = run_on_gpus(shard_sets, tmp_path, limit, ranks=ranks, fault=at("step", 7, "hang", ranks - 1))
    assert (tmp_path / f"fault-{ranks - 1}").exists(), result.stderr
    assert result.returncode != 0
    assert "no progress for" in result.stderr
    assert status(tmp_path)["state"] == "failed"
    kept = {path.name for path in tmp_path.glob("errors/*/*")}
    assert kept >= {f"rank-{rank}.txt" for rank in range(ranks)}
    assert REHEARSED or kept >= {f"nccl-rank-{rank}" for rank in range(ranks)}


@on_gpus(1, 2)
def test_drill_an_exception_in_one_rank(shard_sets: Path, tmp_path: Path, ranks: int) -> None:
    """It is shown, and ten seconds later nobody is left, although NCCL's kernels wait for a rank that is gone."""
    torchrun = start_on_gpus(shard_sets, tmp_path, ranks=ranks, fault=at("step", 7, "shard error", ranks - 1))
    try:
        wait_for(lambda: len(children(torchrun.pid)) == ranks, TIMEOUT)
        workers = children(torchrun.pid)
        wait_for((tmp_path / f"fault-{ranks - 1}").exists, TIMEOUT)
        wait_for(lambda: not any(alive(pid) for pid in workers), 10)
        assert finish(torchrun, timeout=30).returncode != 0
    finally:
        with suppress(subprocess.TimeoutExpired):
            finish(torchrun, timeout=0.1)
    assert "ShardError: the tar is not the one" in torchrun.said("stderr").partition("ChildFailedError")[0]
    end = status(tmp_path)
    assert (end["rank"], end["error"]) == (ranks - 1, "ShardError")


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
