"""A start of the trainer in a run directory whose files are damaged, or a stranger's: it trains, or says why not."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.compare import status
from tests.helpers.launch import launch

DEEP = "[" * 50_000


def text(body: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(body)


def behind(body: str) -> Callable[[Path], object]:
    return lambda path: path.write_text((path.read_text() if path.exists() else "") + body)


# The next start trains on: what is damaged is replaced, or left out.
PASSED = {
    "no state": ("status.json", text('{"state": ["done"], "heartbeat": NaN}')),
    "a deep state": ("status.json", text(DEEP)),
    "a state without sense": ("status.json", text('{"state": "failed", "seconds": {"training": -1}, "reason": [1]}')),
    "a link to itself": ("status.json", lambda path: path.symlink_to(path.name)),
    "half an event": ("events.jsonl", behind('{"time": 1, "eve')),
    "events of other types": (
        "events.jsonl",
        behind('{"event": "start", "nodes": 5, "code": [1]}\n[1]\n' + DEEP + "\n"),
    ),
    "half a line": ("metrics.jsonl", behind('{"kind": "st')),
    "a line of other types": ("metrics.jsonl", text(DEEP + '\n{"kind": ["step"], "loss": "x"}\n' + "x" * 10_000)),
    "deep settings": ("config.yaml", text(DEEP)),
    "many aliases": ("config.yaml", text("a: &a [x]\noptim: {lr: [*a, *a], 2026-01-01: 1}\n")),
    "other keys": ("config.yaml", text("optim: {lr: {2026-01-01: 1}}\n1: {2: 3}\n")),
    "another owner": ("owner", text("\0\033[2J" * 1000)),
}
# Something else in the place of a file that a start must write: it says so.
REFUSED = ("metrics.jsonl", "events.jsonl", "config.yaml", "owner")


@pytest.fixture(scope="module")
def stopped(shard_sets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("stopped") / "run"
    assert launch(shard_sets, run, "--train.max_steps=1", ranks=0).returncode == 0
    return run


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.parametrize("name", PASSED)
def test_what_is_damaged_stops_no_start(name: str, shard_sets: Path, stopped: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(stopped, run, symlinks=True)
    file, change = PASSED[name]
    if name == "a link to itself":
        (run / file).unlink()
    change(run / file)
    result = launch(shard_sets, run, "--train.max_steps=2", ranks=0)
    assert "Traceback" not in result.stderr
    assert result.returncode == 0, result.stderr[-2000:]
    assert "cannot be shown" not in result.stderr or name == "a line of other types"
    assert (status(run)["state"], status(run)["step"]) == ("done", 2)


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "pipe"])
@pytest.mark.parametrize("file", REFUSED)
def test_what_cannot_be_written_is_one_sentence(
    file: str, kind: str, shard_sets: Path, stopped: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(stopped, run, symlinks=True)
    (run / file).unlink()
    (os.mkfifo if kind == "pipe" else os.mkdir)(run / file)
    result = launch(shard_sets, run, "--train.max_steps=2", ranks=0)
    assert "Traceback" not in result.stderr
    if result.returncode:
        assert result.returncode == 2, result.stderr[-2000:]
        assert "cannot be written (" in result.stderr.splitlines()[-1]


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.parametrize("file", ["status.json", "errors"])
def test_something_else_in_the_place_of_what_tells_the_end(
    file: str, shard_sets: Path, stopped: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(stopped, run, symlinks=True)
    (run / file).unlink(missing_ok=True)
    (run / file).write_text("") if file == "errors" else (run / file).mkdir()
    result = launch(shard_sets, run, "--train.max_steps=2", ranks=0)
    assert "Traceback" not in result.stderr
    assert result.returncode in (0, 1), result.stderr[-2000:]
    if file == "status.json":
        assert "status.json cannot be written" in result.stderr
