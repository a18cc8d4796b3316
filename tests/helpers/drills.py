"""Shared code of the drills: an undisturbed run, the table of outcomes, and waiting."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.helpers.compare import assert_same_run, status
from tests.helpers.launch import Run, children, launch

EVERY = "--checkpoint.steps=4"
GONE = 5.0  # seconds in which nothing is left of a run whose launcher is killed
TABLE: list[tuple[str, str, str]] = []


@pytest.fixture(scope="module")
def undisturbed(shard_sets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    result = launch(shard_sets, run, EVERY)
    assert result.returncode == 0, result.stderr
    return run


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[None]:
    yield
    if TABLE:
        print("\n" + "\n".join(f"{name:<46} {outcome:<44} {lost:>10}" for name, outcome, lost in TABLE))
        TABLE.clear()


def same(run: Path, undisturbed: Path) -> None:
    assert_same_run(run, undisturbed)
    assert not list((run / "checkpoints").glob(".*"))
    assert len(list((run / "checkpoints").glob("step-*"))) <= 3


def until(condition: Callable[[], object], seconds: float = 60) -> float:
    """Wait for it; how long that took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, "waited in vain"
        time.sleep(0.05)
    return time.monotonic() - began


def until_status(run: Path, words: str) -> None:
    """Wait until status.json says what."""

    def says() -> bool:
        with suppress(OSError, ValueError):
            return words in "{state}: {reason}".format(**status(run))
        return False

    until(says)


def ranks_of(run: Run) -> list[int]:
    """The processes of a torchrun's ranks, those that are there by now."""
    try:
        return children(run.pid)
    except OSError:
        return []


def listens(pid: int) -> bool:
    """Whether a process meets SIGTERM in a way of its own, as from its first moments on."""
    with suppress(OSError):
        found = re.search(r"SigCgt:\s+(\w+)", Path(f"/proc/{pid}/status").read_text(encoding="utf-8"))
        return bool(found and int(found[1], 16) >> (signal.SIGTERM - 1) & 1)
    return False


def kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def all_gone(run: Run, seconds: float = GONE) -> float:
    """After how many seconds nothing was left. What is left after `seconds` is killed, and an error."""
    began = time.monotonic()
    while left := run.processes():
        if time.monotonic() - began > seconds:
            names = {pid: Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")[-300:] for pid in left}
            for pid in left:
                kill(pid)
            raise AssertionError(f"left after {seconds:g} s: {names}")
        time.sleep(0.05)
    return time.monotonic() - began
