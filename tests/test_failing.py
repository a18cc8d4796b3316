"""Drills on failing runs: the first cause is reported on stderr, in errors/, in status.json and in torchrun's report,
and all processes are gone within seconds."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Any

import pytest

from dist_train.rundir.last_words import BACK, LIMIT, TELLING
from tests.helpers.compare import status
from tests.helpers.drills import EVERY, TABLE, all_gone, same, table, undisturbed, until
from tests.helpers.launch import Run, at, finish, launch, start

__all__ = ["table", "undisturbed"]  # fixtures
pytestmark = pytest.mark.integration

SILENCE = "--run.step_timeout=4"
AWAY = 10.0  # seconds after an exception


def struck(run: Path) -> float:
    """When the fault struck."""
    marks: list[Path] = []

    def found() -> bool:
        marks.extend(run.glob("fault-*"))
        return bool(marks)

    until(found)
    return min(mark.stat().st_mtime for mark in marks)


def told(run: Path, rank: int) -> str:
    """What a rank has written to errors/ in the last start."""
    return (run / "errors" / status(run)["start"] / f"rank-{rank}.txt").read_text()


def report(failed: Run) -> str:
    """torchrun's own."""
    return (failed.folder / "stderr.log").read_text().partition("ChildFailedError")[2]


def assert_failed(failed: Run, run: Path, rank: int, error: str) -> dict[str, Any]:
    """All have left with the code of a failure, for the reason of this rank. Returns status.json."""
    assert finish(failed).returncode == 1
    end = status(run)
    wanted = {"state": "failed", "rank": rank, "node": socket.gethostname(), "error": error}
    assert {key: end.get(key) for key in wanted} == wanted, end
    assert f"rank {rank} on {socket.gethostname()}: {end['reason']}" in report(failed)
    return end


@pytest.mark.parametrize(
    ("moment", "n", "rank"),
    [("loader", 8, 1), ("step", 7, 1), ("validation", 2, 1), ("save:written", 2, 0)],
    ids=["loader", "step", "validation", "save thread"],
)
def test_an_exception(moment: str, n: int, rank: int, shard_sets: Path, undisturbed: Path, tmp_path: Path) -> None:
    """In one rank, while leaving the process group blocks for ever, as NCCL's does: the others are in a collective."""
    run = tmp_path / "run"
    failed = start(shard_sets, run, EVERY, fault=at(moment, n, "error", rank, destroy="blocks"))
    began = struck(run)
    all_gone(failed, AWAY)
    took = time.time() - began
    assert took < AWAY
    end = assert_failed(failed, run, rank, "RuntimeError")
    assert end["reason"] == "RuntimeError: a fault of the drill"
    for text in (told(run, rank), failed.said("stderr")):
        assert "Traceback (most recent call last)" in text
        assert 'raise RuntimeError("a fault of the drill")' in text
    assert launch(shard_sets, run, EVERY).returncode == 0
    same(run, undisturbed)
    TABLE.append((f"an exception: {moment} of rank {rank}", f"all leave in {took:.1f} s, first reason told", "-"))


@pytest.mark.parametrize("late", [False, True], ids=["in time", "rank 0 late"])
def test_an_exception_before_the_run_is_claimed(
    late: bool, shard_sets: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """There is no errors/ of this start yet: the traceback is on stderr only, and status.json has the reason."""
    run = tmp_path / "run"
    failed = start(shard_sets, run, EVERY, fault=at("meeting", 1, "error", 1, destroy="blocks", late=late))
    began = struck(run)
    all_gone(failed, AWAY)
    took = time.time() - began
    assert_failed(failed, run, 1, "RuntimeError")
    assert 'raise RuntimeError("a fault of the drill")' in failed.said("stderr")
    assert sorted(path.name for path in run.iterdir()) == [*["fault-0"] * late, "fault-1", "status.json"]
    assert launch(shard_sets, run, EVERY).returncode == 0
    same(run, undisturbed)
    TABLE.append(("an exception before the claim", f"all leave in {took:.1f} s, first reason told", "-"))


@pytest.mark.slow
def test_a_rank_that_goes_round_in_a_step(shard_sets: Path, undisturbed: Path, tmp_path: Path) -> None:
    """The sentence says which one is behind, and where."""
    run = tmp_path / "run"
    failed = start(shard_sets, run, EVERY, SILENCE, fault=at("step", 7, "loop", 1))
    finish(failed)
    end = assert_failed(failed, run, status(run)["rank"], "Hang")
    here = f"rank 1 on {socket.gethostname()} is at step 6, in do (tests/helpers/faults.py:"
    assert end["reason"].startswith(f"no progress for 4 s: {here}")
    assert end["reason"].endswith("which is behind: others are at step 7")
    for rank in (0, 1):  # not what a rank meets when the other one has left
        assert "most recent call first" in told(run, rank)
    assert "in do" in told(run, 1)
    assert failed.said("stderr").count("most recent call first") >= 4, "main thread, watch and more of both ranks"
    assert launch(shard_sets, run, EVERY).returncode == 0
    same(run, undisturbed)
    TABLE.append(("a rank in an endless loop", "failed, named as behind, same bits", "-"))


@pytest.mark.slow
def test_a_call_that_keeps_the_lock(shard_sets: Path, undisturbed: Path, tmp_path: Path) -> None:
    """It stops the watch of its process too: faulthandler is what ends that one, ten seconds later."""
    run = tmp_path / "run"
    alone = start(shard_sets, run, EVERY, SILENCE, fault=at("step", 7, "keep the lock"), ranks=0)
    began = struck(run)
    assert finish(alone).returncode == 1
    assert 13 < time.time() - began < 18
    assert "Timeout (0:00:14)!\n" in alone.said("stderr")
    assert "in do" in alone.said("stderr")
    assert launch(shard_sets, run, EVERY, ranks=0).returncode == 0

    run = tmp_path / "two"
    failed = start(shard_sets, run, EVERY, SILENCE, fault=at("step", 7, "keep the lock", 1), how="exec")
    began = struck(run)
    all_gone(failed, 20)
    took = time.time() - began
    assert took < 4 + 5 + 2, "the other rank ends it"
    assert "Fatal Python error: Aborted" in failed.said("stderr")
    assert failed.said("stderr").count("in do\n") == 1
    end = assert_failed(failed, run, 0, "Hang")
    assert "rank 1 gives no answer: behind, or stopped" in end["reason"]
    assert launch(shard_sets, run, EVERY).returncode == 0
    same(run, undisturbed)
    TABLE.append(("a C call that keeps Python's lock", f"all gone in {took:.1f} s, same bits", "-"))


@pytest.mark.slow
def test_a_directory_that_answers_no_more(shard_sets: Path, undisturbed: Path, tmp_path: Path) -> None:
    """The last words cannot be written; that does not hold the exit."""
    run = tmp_path / "run"
    failed = start(shard_sets, run, EVERY, SILENCE, fault=at("step", 7, "freeze", -1))
    began = struck(run)
    all_gone(failed, 4 + LIMIT + BACK + TELLING + 4)  # silence, last words, and what is slow here
    took = time.time() - began
    assert finish(failed).returncode == 1
    said = failed.said("stderr")
    assert "no progress for 4 s: a rank or a file system hangs; rank 0" in said
    assert "most recent call first" in said
    assert "in frozen" in said
    assert "no progress for 4 s" in report(failed)
    assert status(run)["state"] == "running", "nobody could write"
    assert launch(shard_sets, run, EVERY).returncode == 0
    same(run, undisturbed)
    TABLE.append(("a directory that answers no more", f"all gone in {took:.1f} s, same bits", "-"))
