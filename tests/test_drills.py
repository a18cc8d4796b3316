"""Fault drills: a table of faults, when they strike, and the required outcome. `make drills` prints it.

Each drill runs two real processes under torchrun with one fault in them, then starts the same command again where that
is the remedy, and compares with a run that was never disturbed: weights, optimizer, schedule and records, bit for bit.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.compare import records, status
from tests.helpers.drills import EVERY, TABLE, all_gone, same, table, undisturbed, until
from tests.helpers.launch import STEPS, Run, at, finish, launch, start

__all__ = ["table", "undisturbed"]  # fixtures
pytestmark = pytest.mark.integration


@dataclass(frozen=True)
class Drill:
    """A fault, and what is expected: `ends` as status.json has it after the fault, then a restart where `again`."""

    name: str
    fault: dict[str, Any]
    ends: str = "dead"  # status.json says running, or failed where a rank outlived its peer long enough to say so
    again: bool = True
    extra: tuple[str, ...] = ()
    agent: str = ""
    says: str = ""
    slow: bool = False  # has a sibling that is not: `make drills` and `make test MARK=slow` run it


DRILLS = [
    Drill("SIGKILL of one rank", at("step", 7, "kill", 1)),
    Drill("SIGKILL of all ranks", at("step", 14, "kill all"), slow=True),
    Drill("SIGKILL during validation", at("validation", 2, "kill", 1)),
    Drill("SIGKILL when the state is written", at("save:written", 2, "kill"), slow=True),
    Drill("SIGKILL when it is flushed", at("save:flushed", 3, "kill"), slow=True),
    Drill("SIGKILL before the rename", at("save:renaming", 2, "kill")),
    Drill("SIGKILL after the rename", at("save:renamed", 2, "kill"), slow=True),
    Drill("SIGKILL while pruning", at("save:pruning", 1, "kill")),
    Drill("SIGKILL under --max-restarts", at("step", 10, "kill", 1), "done", again=False, agent="--max-restarts=3"),
    Drill("SIGTERM to one rank", at("step", 6, "SIGTERM", 1), "stopped", slow=True),
    Drill("SIGINT to all ranks", at("step", 6, "SIGINT", -1), "stopped", slow=True),
    Drill("SIGUSR2 to one rank at an epoch's last step", at("step", 10, "SIGUSR2"), "stopped"),
    Drill("SIGHUP to one rank", at("step", 6, "SIGHUP", 1), "stopped", slow=True),
    Drill("SIGTERM to torchrun", at("step", 6, "launcher SIGTERM", 1), "stopped", slow=True),
    Drill("SIGTERM during validation", at("validation", 1, "SIGTERM", 1), "stopped"),
    Drill("SIGTERM during a save", at("save:written", 1, "SIGTERM"), "stopped", slow=True),
    Drill("SIGTERM twice", at("step", 6, "SIGTERM SIGTERM", 1), "failed", says="second stop signal: leaving without"),
    Drill(
        "a save that hangs",
        at("save:written", 2, "hang"),
        "failed",
        extra=("--run.step_timeout=4",),
        says="no progress for 4 s",
    ),
    Drill(
        "SIGSTOP of one rank",
        at("step", 7, "pause", 1),
        "failed",
        extra=("--run.step_timeout=4",),
        says="rank 1 gives no answer",
        slow=True,
    ),
    Drill("full disk at one save", at("save:written", 1, "disk full"), "done", again=False, says="No space left"),
    Drill(
        "full disk for the record, once", at("record", 5, "disk full"), "done", again=False, says="cannot be written"
    ),
]


def time_lost(run: Path) -> str:
    """From the fault until the run was beyond the step at which it struck."""
    marks = list(run.glob("fault-*"))
    if not marks or not (run / "samples-0.jsonl").exists():
        return "-"
    struck = min(mark.stat().st_mtime for mark in marks)
    steps = [json.loads(line) for line in (run / "samples-0.jsonl").read_text().splitlines()]
    reached = max([s["step"] for s in steps if s["time"] <= struck], default=-1)
    beyond = [s["time"] for s in steps if s["step"] > reached and s["time"] > struck]
    return f"{min(beyond) - struck:.1f} s" if beyond else "-"


@pytest.mark.parametrize(
    "drill",
    [pytest.param(d, id=d.name, marks=[pytest.mark.slow] * d.slow) for d in DRILLS],
)
def test_drill(drill: Drill, shard_sets: Path, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    # If they are forked, ranks that stop for torchrun wait for each other, and a silent one is not known by its number.
    how = "exec" if drill.fault["do"] in ("launcher SIGTERM", "pause") else "fork"
    first = launch(shard_sets, run, EVERY, *drill.extra, agent=drill.agent, fault=drill.fault, how=how)
    assert list(run.glob("fault-*")), f"the fault did not strike\n{first.stderr}"
    assert status(run)["state"] in {"dead": ("running", "failed")}.get(drill.ends, (drill.ends,)), first.stderr
    assert drill.says in first.stderr
    well = drill.ends in ("done", "stopped") and "launcher" not in drill.fault["do"]  # SIGTERM gets torchrun a code
    assert (first.returncode == 0) == well, first.returncode
    if drill.ends == "stopped" and "launcher" not in drill.fault["do"]:  # torchrun itself prints one
        assert "Traceback" not in first.stderr
    outcome = drill.ends
    if drill.again:
        second = launch(shard_sets, run, EVERY, fault={})
        assert second.returncode == 0, second.stderr
        assert "continuing from step-" in second.stderr
        outcome += ", continued"
    same(run, undisturbed)
    TABLE.append((drill.name, outcome + ", same bits", time_lost(run)))


def test_nan_in_one_rank_stops_all_and_harms_nothing(shard_sets: Path, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    fault = at("step", 7, "nan", 1)
    result = launch(shard_sets, run, EVERY, "--checkpoint.keep=9", fault=fault, agent="--max-restarts=3")
    assert result.returncode == 1, "torchrun's own, whatever its ranks say"
    assert "gradient is not finite at step 7" in report(result.stderr)
    assert result.stderr.count("1 of 10 steps of epoch 1/2:") == 1, "a restart would not mend it, and begins nothing"
    end = status(run)
    assert end["state"] == "diverged"
    for word in ("gradient is not finite at step 7", "epoch 1", "lr 0.01", "shard-0"):
        assert word in end["reason"], end["reason"]
    shown = [json.loads(line) for r in (0, 1) for line in (run / f"samples-{r}.jsonl").read_text().splitlines()]
    keys = json.loads((run / "diverged.json").read_text())["keys"]
    assert len(keys) == 24 == sum(len(s["samples"]) for s in shown if s["step"] == 6)
    assert all(f.is_file() for f in (run / "checkpoints" / "step-00000004").iterdir())
    assert [r["loss"] for r in records(run, "step")] == [r["loss"] for r in records(undisturbed, "step")][:6]
    again = launch(shard_sets, run, EVERY)
    assert again.returncode == 0
    same(run, undisturbed)
    TABLE.append(("NaN in one rank", "diverged, all ranks stop; lower lr", time_lost(run)))


def test_a_disk_that_stays_full(shard_sets: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    fault = at("save:flushed", 3, "disk full", always=True)  # the first save has two flushes
    result = launch(shard_sets, run, EVERY, fault=fault)
    assert result.returncode != 0
    assert "the last save failed" in result.stderr
    assert "No space left" in status(run)["reason"]
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-00000004"], "the older one stands whole"
    TABLE.append(("a disk that stays full", "failed, says why; older checkpoint whole", "-"))


def test_an_error_in_the_midst_of_training_is_a_failure(shard_sets: Path, tmp_path: Path) -> None:
    """Not a refusal, whatever its kind: a restart may mend it, so torchrun hears of it."""
    for ranks in (0, 1):
        run = tmp_path / str(ranks)
        result = launch(shard_sets, run, EVERY, fault=at("step", 7, "shard error"), ranks=ranks)
        assert result.returncode == 1
        assert "Traceback" in result.stderr
        assert (status(run)["state"], status(run)["step"]) == ("failed", 5)
        assert status(run)["reason"] == "ShardError: the tar is not the one that was indexed"
    TABLE.append(("an error in the midst of training", "failed, says why", "-"))


@pytest.mark.parametrize(
    ("n", "step"),
    [(8, "step-00000007"), pytest.param(12, "step-00000010", marks=pytest.mark.slow)],
    ids=["training", "validation"],
)
def test_a_tar_that_cannot_be_read(n: int, step: str, shard_sets: Path, undisturbed: Path, tmp_path: Path) -> None:
    """By one rank, which has tried for long: all save what was trained until then, and leave by the same sentence."""
    run = tmp_path / "run"
    result = launch(shard_sets, run, EVERY, fault=at("loader", n, "unread", 1))
    assert result.returncode == 1
    assert "raise ReadError" not in result.stderr, "no traceback of ours"
    assert (status(run)["state"], status(run)["step"]) == ("failed", int(step[-2:]))
    assert status(run)["reason"] == "shard-000002.tar could not be read for 60 s"
    assert "shard-000002.tar could not be read for 60 s" in report(result.stderr)
    again = launch(shard_sets, run, EVERY)
    assert again.returncode == 0, again.stderr
    assert f"continuing from {step}:" in again.stderr
    same(run, undisturbed)
    TABLE.append(("a tar that cannot be read", "failed, saved, same bits", time_lost(run)))


@pytest.mark.slow
def test_a_stop_while_a_tar_cannot_be_read(shard_sets: Path, undisturbed: Path, tmp_path: Path) -> None:
    """It is a stop, which nothing has to mend, and saved."""
    run = tmp_path / "run"
    result = launch(shard_sets, run, EVERY, fault=at("loader", 8, "SIGTERM, unread", 1))
    assert result.returncode == 0, result.stderr
    assert status(run)["state"] == "stopped"
    saved = f"step-{status(run)['step']:08d}"
    again = launch(shard_sets, run, EVERY)
    assert f"continuing from {saved}:" in again.stderr
    same(run, undisturbed)
    TABLE.append(("a stop while a tar cannot be read", "stopped, saved, same bits", time_lost(run)))


def test_a_vanished_directory(shard_sets: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    fault = at("step", 7, "vanish")
    result = launch(shard_sets, run, EVERY, fault=fault, ranks=1)
    assert result.returncode != 0
    assert "could not be saved" in result.stdout + result.stderr
    assert not (run / "checkpoints").exists()
    TABLE.append(("a vanished directory", "failed, says why", "-"))


@pytest.mark.slow
def test_no_endless_restarts(shard_sets: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    fault = at("step", 2, "kill", 1, always=True)
    result = launch(shard_sets, run, EVERY, fault=fault, agent="--max-restarts=9")
    assert result.returncode == 1
    assert "3 automatic restarts began at the beginning without progress" in status(run)["reason"]
    assert "3 automatic restarts began at the beginning without progress" in report(result.stderr)
    assert len(re.findall(r"2 x cpu, .*, 240 images", result.stderr)) == 3, "the first start and two restarts"
    assert status(run)["state"] == "failed"
    TABLE.append(("a crash at every start", "failed after three restarts", "-"))


def report(stderr: str) -> str:
    """torchrun's own, at the end."""
    return stderr.partition("ChildFailedError")[2]


def under_way(shard_sets: Path, run: Path) -> Run:
    """A slow run that has made its first checkpoint."""
    process = start(shard_sets, run, EVERY, fault={}, env={"STEP_SECONDS": "1"})
    until((run / "checkpoints" / "step-00000004").exists)
    return process


def test_double_start(shard_sets: Path, undisturbed: Path, tmp_path: Path) -> None:
    """The later start takes over; the earlier one finds another's token and leaves without touching anything."""
    run = tmp_path / "run"
    early = under_way(shard_sets, run)
    late = launch(shard_sets, run, EVERY)
    assert late.returncode == 0, late.stderr
    left = finish(early)
    assert left.returncode == 0, left.stderr
    assert "another start has taken over" in left.stderr
    same(run, undisturbed)
    TABLE.append(("double start", "the later one takes over", "-"))


def test_an_orphan_leaves(shard_sets: Path, undisturbed: Path, tmp_path: Path) -> None:
    """The launcher is killed; its workers go with it, and without a save: that is no stop that anybody asked for."""
    run = tmp_path / "run"
    early = under_way(shard_sets, run)
    assert len(early.processes()) >= 3
    early.kill()
    took = all_gone(early)
    finish(early)
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-00000004"]
    late = launch(shard_sets, run, EVERY)
    assert late.returncode == 0, late.stderr
    assert "continuing from step-00000004" in late.stderr
    same(run, undisturbed)
    TABLE.append(("orphans of a killed launcher", f"they leave in {took:.1f} s, continued, same bits", "-"))


def test_saving_does_not_stop_the_steps(shard_sets: Path, undisturbed: Path, tmp_path: Path) -> None:
    """While a save takes 3 s, steps go on; the next save waits for it."""
    run = tmp_path / "run"
    fault = at("save:written", 1, "slow")
    result = launch(shard_sets, run, EVERY, fault=fault)
    assert result.returncode == 0, result.stderr
    struck = (run / "fault-0").stat().st_mtime
    steps = [json.loads(line) for line in (run / "samples-0.jsonl").read_text().splitlines()]
    assert sum(struck < s["time"] < struck + 3 for s in steps) >= 3
    same(run, undisturbed)


def test_settings_that_cannot_change(shard_sets: Path, undisturbed: Path) -> None:
    """Another model, seed, batch, augmentation or data set is refused with the difference, and nothing is touched."""
    before = {p: p.stat().st_mtime_ns for p in undisturbed.rglob("*") if p.is_file()}
    cases = {
        "model.hidden": ("16", "model.hidden was 32, now 16"),
        "train.seed": ("1", "train.seed was 0, now 1"),
        "train.global_batch": ("12", "train.global_batch was 24, now 12"),
        "data.lighting": ("0", "data.lighting was 0.1, now 0"),
        "data.train": (str(shard_sets / "val"), "training set was"),
    }
    for key, (value, message) in cases.items():
        result = launch(shard_sets, undisturbed, f"--{key}={value}", ranks=0)
        assert result.returncode == 2
        line = next(line for line in result.stderr.splitlines() if line.startswith("error: "))
        assert "was begun with other settings" in line
        assert message in line
    assert before == {p: p.stat().st_mtime_ns for p in undisturbed.rglob("*") if p.is_file()}


def test_settings_that_may_change_are_logged(shard_sets: Path, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    launch(shard_sets, run, "--train.epochs=1")
    result = launch(shard_sets, run, "--train.epochs=2", "--optim.lr=0.005")
    assert result.returncode == 0, result.stderr
    assert "optim.lr = 0.005" in result.stderr
    assert records(run, "changed") == [{"kind": "changed", "step": STEPS, "optim.lr": 0.005, "train.epochs": 2}]
    assert records(run, "step")[-1]["lr"] == 0.005
