"""Files left by a run, and whether two runs left the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from dist_train.rundir.record import MACHINE

TIMES = ("record", "ledger")  # in a checkpoint, with the times, all in which equal runs may differ


def status(run: Path) -> dict[str, Any]:
    body: dict[str, Any] = json.loads((run / "status.json").read_text())
    return body


def records(run: Path, kind: str = "") -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what depends on the machine."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [line for line in lines if kind in ("", line["kind"])]
    return [{k: v for k, v in line.items() if k != MACHINE} for line in kept]


def newest(run: Path) -> dict[str, Any]:
    """The state in the newest checkpoint."""
    path = max((run / "checkpoints").glob("step-*"))
    state: dict[str, Any] = torch.load(path / "state.pt", weights_only=True)
    return state


def equal(a: Any, b: Any) -> bool:
    """Whether two states are equal bit for bit."""
    if torch.is_tensor(a):
        return torch.is_tensor(b) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


def assert_same_run(run: Path, other: Path) -> None:
    """Two finished runs have the same state and the same record, bit for bit."""
    assert records(run) == records(other)
    ours, theirs = newest(run), newest(other)
    for state in (ours, theirs):
        for key in TIMES:
            del state[key]
    assert equal(ours, theirs), "the same record, but another state"
