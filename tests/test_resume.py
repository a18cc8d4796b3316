"""Resuming: the same bits at the same world size, the same samples and masks at another."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.compare import assert_same_run, records, status
from tests.helpers.launch import STEPS, at, command, finish, launch, spawn

pytestmark = pytest.mark.integration


def cut(n: int, moment: str = "step") -> dict[str, Any]:
    """A stop signal at a moment: the state is saved there, whatever the configuration."""
    return at(moment, n, "SIGTERM")


@pytest.mark.parametrize(
    ("ranks", "extra"),
    [
        (0, ("--train.accumulate=3",)),
        pytest.param(4, (), marks=pytest.mark.slow),
        pytest.param(1, ("--train.compile=on",), marks=pytest.mark.slow),
        pytest.param(2, ("--train.compile=on",), marks=pytest.mark.slow),
    ],
    ids=["one rank", "four ranks", "one rank, compiled", "two ranks, compiled"],
)
def test_the_same_bits(shard_sets: Path, tmp_path: Path, ranks: int, extra: tuple[str, ...]) -> None:
    """Cut inside an epoch, at its last step, and during validation, against a run never cut."""
    how = "exec" if "--train.compile=on" in extra else "fork"  # the compiler reads the environment when it is imported
    whole, run = tmp_path / "whole", tmp_path / "cut"
    assert launch(shard_sets, whole, *extra, ranks=ranks, timeout=600, how=how).returncode == 0
    for where in (cut(3), cut(6), cut(1, "validation")):
        (run / "fault-0").unlink(missing_ok=True)
        result = launch(shard_sets, run, *extra, ranks=ranks, fault=where, timeout=600, how=how)
        assert status(run)["state"] == "stopped", result.stderr
    assert status(run)["step"] % STEPS == 0, "in a validation; a busy machine hears of a signal a step later"
    result = launch(shard_sets, run, *extra, ranks=ranks, timeout=600, how=how)
    assert status(run)["state"] == "done", result.stderr
    assert_same_run(run, whole)


def test_right_after_the_division(shard_sets: Path, tmp_path: Path) -> None:
    """A schedule that divides every two epochs: cut at the first step of the next one, and killed there once more."""
    patience = ("--schedule.patience=1", f"--schedule.patience_steps={2 * STEPS}", "--schedule.min_improvement=1")
    extra = (*patience, "--train.epochs=5", "--schedule.stop_early=true")
    whole, run = tmp_path / "whole", tmp_path / "cut"
    assert launch(shard_sets, whole, *extra, ranks=0).returncode == 0
    launch(shard_sets, run, *extra, fault=cut(3 * STEPS + 1), ranks=0)
    assert status(run)["state"] == "stopped"
    (run / "fault-0").unlink()
    kill = at("step", 2, "kill")
    assert launch(shard_sets, run, *extra, fault=kill, ranks=0).returncode != 0
    assert launch(shard_sets, run, *extra, ranks=0).returncode == 0
    assert [round(r["lr"], 9) for r in records(run, "validation")] == [0.01, 0.01, 0.01, 0.001, 0.001]
    assert_same_run(run, whole)


def shown(run: Path) -> dict[int, list[int]]:
    """For each step the samples of the global batch, in the order of their positions."""
    parts: dict[int, dict[int, list[int]]] = {}
    for path in run.glob("samples-*.jsonl"):
        for line in path.read_text().splitlines():
            step: dict[str, Any] = json.loads(line)
            parts.setdefault(step["step"], {})[step["start"]] = step["samples"]
    return {step: [s for start in sorted(p) for s in p[start]] for step, p in parts.items()}


def test_an_epoch_over_three_world_sizes(shard_sets: Path, tmp_path: Path) -> None:
    """Begun with three ranks, continued with one that accumulates, finished with two: each sample at most once, the
    order of a run that never stopped, and its losses up to the order of summation (so the same masks)."""
    extra = ("--train.epochs=1", "--train.global_batch=23")
    whole, run = tmp_path / "whole", tmp_path / "elastic"
    assert launch(shard_sets, whole, *extra, ranks=2, fault={}).returncode == 0
    stages = ((3, 1, cut(4)), (0, 4, cut(3)), (2, 1, {}))
    for ranks, pieces, fault in stages:
        (run / "fault-0").unlink(missing_ok=True)
        result = launch(shard_sets, run, *extra, f"--train.accumulate={pieces}", ranks=ranks, fault=fault)
        assert status(run)["state"] == ("stopped" if fault else "done"), result.stderr
    assert shown(run) == shown(whole)
    assert len(shown(run)) == 240 // 23
    counts = Counter(s for batch in shown(run).values() for s in batch)
    assert max(counts.values()) == 1
    assert sum(counts.values()) == 240 // 23 * 23
    for a, b in zip(records(whole, "step"), records(run, "step"), strict=True):
        assert a["step"] == b["step"]
        assert b["loss"] == pytest.approx(a["loss"], rel=2e-4)


@pytest.mark.slow
def test_the_line_that_everybody_types_first(shard_sets: Path, tmp_path: Path) -> None:
    """`torchrun --nproc_per_node=8 -m dist_train`: five steps, against five that a stop signal to one rank divides."""
    whole, run = tmp_path / "whole", tmp_path / "cut"
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--nproc_per_node=8"]
    five = "--train.max_steps=5"
    for directory in (whole, run):
        if directory == run:
            launch(shard_sets, run, five, ranks=8, fault=at("step", 3, "SIGTERM", 5), how="exec", timeout=300)
            assert status(run)["state"] == "stopped"
            assert 3 <= status(run)["step"] < 5
        words = command(shard_sets, directory, five, ranks=0)
        result = finish(spawn([*torchrun, *words[1:]], how="exec"), timeout=300)
        assert result.returncode == 0, result.stderr
        assert re.search(r"8 x cpu, .+ per rank \(shared\), 240 images", result.stderr)
        assert status(directory) | {"state": "done", "step": 5} == status(directory)
    assert "continuing from step-0000000" in result.stderr
    assert_same_run(run, whole)
