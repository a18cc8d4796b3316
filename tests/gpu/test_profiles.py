"""`--profile.steps` on a GPU: what its streams did, from a trace of real steps."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from tests.helpers.gpu import MARKS, REHEARSED, on_gpus, run_on_gpus

pytestmark = MARKS


@on_gpus(1, 2)
def test_a_trace_of_real_steps(shard_sets: Path, tmp_path: Path, ranks: int) -> None:
    """The shares sum to 1, and the kernels are there. The CPU, in a rehearsal, has operators instead."""
    result = run_on_gpus(shard_sets, tmp_path, "--profile.steps=5", "--profile.at=4", ranks=ranks)
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "profile"
    assert len(list(folder.glob("rank-*.json.gz"))) == ranks
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["first"], summary["last"]) == (4, 8)
    assert sum(summary["host"].values()) == pytest.approx(1)
    assert len(summary["most"]) == 10
    events = json.loads(gzip.decompress((folder / "rank-0.json.gz").read_bytes()))["traceEvents"]
    kernels = [event for event in events if event.get("cat") == "kernel"]
    if REHEARSED:
        assert summary["gpu"] is None
        assert not kernels
        return
    assert sum(summary["gpu"].values()) == pytest.approx(1)
    assert summary["gpu"]["compute"] > 0
    assert min(summary["gpu"].values()) >= 0
    assert {row["name"] for row in summary["most"]} & {event["name"][:400] for event in kernels}
    if ranks > 1:
        assert any("nccl" in event["name"] for event in kernels), "which is how communication is known"
