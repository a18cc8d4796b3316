"""Soak test: kills at random moments cost a run some steps and nothing else."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from tests.helpers.compare import newest
from tests.helpers.drills import EVERY, TABLE, all_gone, kill, ranks_of, same, table, undisturbed
from tests.helpers.launch import finish, launch, start

__all__ = ["table", "undisturbed"]  # fixtures
pytestmark = pytest.mark.integration


@pytest.mark.slow
def test_soak(shard_sets: Path, undisturbed: Path, tmp_path: Path) -> None:
    """Twenty cuts at random moments in time, from the very start on, in one run after another: SIGKILL of one rank, of
    all, or of torchrun. Nothing is left of any, and all come to the same end."""
    rng = random.Random(0)
    began = time.monotonic()
    assert launch(shard_sets, tmp_path / "whole", EVERY, how="exec").returncode == 0
    whole = time.monotonic() - began
    cuts, slowest = 0, 0.0
    for i in range(100):
        run = tmp_path / str(i)
        while True:
            before = progress(run)
            one = start(shard_sets, run, EVERY, how="exec")
            time.sleep(rng.uniform(0, 1.1 * whole))
            target = rng.choice(["one rank", "all ranks", "torchrun"])
            found = ranks_of(one)
            if target != "torchrun" and found:
                found = found if target == "all ranks" else [rng.choice(found)]
            else:
                found = [one.pid]
            for pid in found:
                kill(pid)
            slowest = max(slowest, all_gone(one))
            if finish(one).returncode == 0:
                break
            cuts += 1
            assert progress(run) >= before
            if cuts >= 20:
                assert launch(shard_sets, run, EVERY).returncode == 0
                same(run, undisturbed)
                TABLE.append((f"{cuts} cuts at random", f"gone in {slowest:.1f} s at most, same bits", "-"))
                return
        same(run, undisturbed)


def progress(run: Path) -> int:
    """Steps that are saved."""
    return newest(run)["state"]["step"] if list(run.glob("checkpoints/step-*")) else 0
