"""Resuming on GPUs: the same bits on the same number of GPUs. (For another number see test_runs.py.)"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from tests.gpu.conftest import STANDARDIZED
from tests.helpers.compare import assert_same_run, newest, status
from tests.helpers.gpu import MARKS, REHEARSED, assert_close, needs_gpus, on_gpus, run_on_gpus
from tests.helpers.launch import STEPS, at
from tests.test_evaluate import untrained

pytestmark = MARKS

PAIRS = ("--model.name=alexnet_two_tower", "--train.tower_parallel=true")


def cut(data: Path, run: Path, *extra: str, ranks: int, **fault: Any) -> None:
    """Go on with a run until a stop signal comes to its last rank. Its steps are so slow that the signal is heard at
    the next one or two."""
    fault = at(do="SIGTERM", rank=ranks - 1, **fault)
    result = run_on_gpus(data, run, *extra, ranks=ranks, fault=fault, env={"STEP_SECONDS": "0.1"})
    assert status(run)["state"] == "stopped", result.stderr
    (run / f"fault-{ranks - 1}").unlink()


def end(data: Path, run: Path, *extra: str, ranks: int) -> None:
    """Go on with a run, or begin it, to its end."""
    result = run_on_gpus(data, run, *extra, ranks=ranks)
    assert result.returncode == 0, result.stderr
    assert status(run)["state"] == "done"


@on_gpus(1, 2, 4, 8)
def test_resume_compiled(shard_sets: Path, learning: tuple[str, ...], tmp_path: Path, ranks: int) -> None:
    """bf16, compiled (not in a rehearsal): cut inside an epoch, with one rank in validation too, against a run never
    cut."""
    extra = (*learning, "--train.precision=bf16", f"--train.compile={'off' if REHEARSED else 'on'}")
    whole, run = tmp_path / "whole", tmp_path / "cut"
    end(shard_sets, whole, *extra, ranks=ranks)
    cut(shard_sets, run, *extra, ranks=ranks, moment="step", n=4)
    assert newest(run)["state"]["step"] < STEPS
    if ranks == 1:  # each start costs the time of the report, a dozen seconds
        cut(shard_sets, run, *extra, ranks=ranks, moment="validation", n=1)
        assert STEPS <= newest(run)["state"]["step"] < STEPS + 4
    end(shard_sets, run, *extra, ranks=ranks)
    assert_same_run(run, whole)


def test_resume_fp16(shard_sets: Path, learning: tuple[str, ...], tmp_path: Path) -> None:
    """Eager, with a scaler, whose scale and count of good steps are compared, too."""
    extra = (*learning, "--train.precision=fp16")
    whole, run = tmp_path / "whole", tmp_path / "cut"
    end(shard_sets, whole, *extra, ranks=1)
    cut(shard_sets, run, *extra, ranks=1, moment="step", n=STEPS + 4)
    end(shard_sets, run, *extra, ranks=1)
    assert_same_run(run, whole)
    assert newest(run)["scaler"]["_growth_tracker"] > STEPS + 4


@needs_gpus(2)
def test_resume_of_towers_on_two_gpus(shard_sets: Path, tmp_path: Path) -> None:
    """They do what one process does that has both, up to rounding; stopped and continued, the same bits."""
    net = untrained(tmp_path / "net", shard_sets, STANDARDIZED, PAIRS[0], seed=2)
    weights: dict[str, Tensor] = newest(net)["model"]
    extra = (PAIRS[0], f"--model.init_from={net}", STANDARDIZED, "--train.precision=off", "--train.epochs=1")
    alone, pair, run = tmp_path / "alone", tmp_path / "pair", tmp_path / "cut"
    end(shard_sets, alone, *extra, ranks=1)
    end(shard_sets, pair, *extra, PAIRS[1], ranks=2)
    assert_close(pair, alone, weights, losses=1e-3, updates=2e-2)
    cut(shard_sets, run, *extra, PAIRS[1], ranks=2, moment="step", n=4)
    end(shard_sets, run, *extra, PAIRS[1], ranks=2)
    assert_same_run(run, pair)
