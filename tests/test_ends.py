"""Drills on the end of a run: no fault during clean-up changes how the run has ended."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from dist_train.outcomes import Done, Ended, Stopped
from dist_train.run import _for_readers
from tests.helpers.compare import status
from tests.helpers.drills import until_status
from tests.helpers.launch import at, finish, launch, start

pytestmark = pytest.mark.integration
STOPPED = 75
SHORT = ("--train.max_steps=6", "--train.epochs=1", "--run.step_timeout=3", "--run.stop_timeout=3")
AFTER = "the run had ended before: "


@pytest.mark.parametrize(
    ("end", "stop", "left", "seconds"),
    [
        (Stopped(), 120, 120, 20),  # the stop signal was another rank's
        (Stopped(), 120, 100, 20),
        (Stopped(), 120, 15, 10),
        (Stopped(), 120, 3, 1.5),
        (Stopped(), 8, 7, 5),
        (Done(), 120, 120, 120),
        (Done(), 120, 60, 55),  # a stop came just too late
    ],
)
def test_how_long_the_readers_are_waited_for(end: Ended, stop: float, left: float, seconds: float) -> None:
    """A stop leaves them what is left of it, and Slurm and torchrun may leave less than the configuration."""
    assert _for_readers(end, Mock(grace=stop, stop=left < stop, left=lambda: left)) == seconds


def ended(run: Path, state: str, result: Any, code: int = 0) -> None:
    """It ended so, and nobody says otherwise."""
    assert (result.returncode, status(run)["state"]) == (code, state), result.stderr
    assert "error" not in status(run)
    assert not (run / "errors").exists()


@pytest.mark.parametrize("ranks", [0, 2])
def test_a_reader_that_hangs_at_the_end(ranks: int, shard_sets: Path, tmp_path: Path) -> None:
    """It is waited for as long as a stop may take, and the main thread is alive meanwhile."""
    run = tmp_path / "run"
    short = (*SHORT[:2], "--run.step_timeout=1.5", "--run.stop_timeout=6")
    result = launch(shard_sets, run, *short, fault=at("showing:end", 1, "hang"), ranks=ranks)
    ended(run, "done", result)
    assert "reader has not ended within" in result.stderr
    assert AFTER not in result.stderr
    assert "outcome  done" in result.stdout


@pytest.mark.parametrize(("ranks", "code"), [(0, STOPPED), (2, 0)])
def test_a_reader_that_hangs_after_a_stop(ranks: int, code: int, shard_sets: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    fault = at("step", 4, "SIGTERM") | {"hangs": "showing:end"}
    result = launch(shard_sets, run, *SHORT, fault=fault, ranks=ranks)
    ended(run, "stopped", result, code)
    assert "reader has not ended within" in result.stderr


@pytest.mark.parametrize(
    ("moment", "do", "rank", "told"),
    [
        pytest.param("summary", "hang", 0, "no progress for 3 s in do", marks=pytest.mark.slow),
        pytest.param("summary", "SIGTERM SIGTERM, hang", 0, "second stop signal", marks=pytest.mark.slow),
        pytest.param("summary", "SIGTERM, hang", 0, "the stop took longer than 3 s", marks=pytest.mark.slow),
        pytest.param("leaving", "hang", 0, "no progress for 3 s in do", marks=pytest.mark.slow),
        pytest.param("leaving", "hang", 1, "no progress for 3 s in leave", marks=pytest.mark.slow),
        pytest.param("leaving", "error", 1, "RuntimeError: a fault of the drill", marks=pytest.mark.slow),
        ("leaving", "kill", 1, ""),
    ],
)
def test_what_strikes_after_the_end(
    moment: str, do: str, rank: int, told: str, shard_sets: Path, tmp_path: Path
) -> None:
    """The watch, signals, errors and lost ranks."""
    run = tmp_path / "run"
    patience = "--run.step_timeout=60" if "SIGTERM" in do else SHORT[2]
    fault = at(moment, 1, do, rank)
    result = launch(shard_sets, run, *SHORT, patience, fault=fault, how="exec")  # its ranks leave with 0
    ended(run, "done", result, code=0 if do != "kill" else 1)  # torchrun's own, of a rank that was killed
    assert f"{AFTER}{told}" in result.stderr
    assert "Traceback" not in result.stderr or do == "kill"  # then torchrun shows its own


def test_a_stop_that_is_struck_is_still_one(shard_sets: Path, tmp_path: Path) -> None:
    """Without a launcher its code says that the same command goes on."""
    run = tmp_path / "run"
    fault = at("step", 4, "SIGTERM") | {"hangs": "summary"}
    early = start(shard_sets, run, *SHORT, fault=fault, ranks=0)
    until_status(run, "stopped: ")
    before = (run / "status.json").read_bytes()
    ended(run, "stopped", finish(early), STOPPED)
    assert (run / "status.json").read_bytes() == before
