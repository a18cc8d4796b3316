"""What is shown of a run at its end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_train.outcomes import Ended
from dist_train.pictures.curves import draw_curves
from dist_train.rundir import record
from dist_train.rundir.ledger import accounted
from dist_train.rundir.state import Progress
from pipelines.files import readable_jsonl


def summary(path: Path, end: Ended, progress: Progress, seconds: Mapping[str, float]) -> str:
    """What is shown at the end of a run, as far as it can be: that it has come to its end is not in doubt."""
    reason = f": {end}" if str(end) else ""
    rows = [("outcome", end.state + reason), ("epochs", f"{progress.epoch} ({progress.step} steps)")]
    lines: list[dict[str, Any]] = []

    def readable() -> list[tuple[str, str]]:
        found, damaged = readable_jsonl(path / record.FILE)
        lines.extend(found)
        numbers = ", ".join(map(str, damaged[:8]))
        return [("record", f"damaged in line {numbers} of {path / record.FILE}, left out here")] if damaged else []

    def curves() -> list[tuple[str, str]]:
        picture = draw_curves(path, lines)
        return [("curves", str(picture))] if picture else []

    for label, work in (
        ("record", readable),
        ("accuracy", lambda: _accuracies(lines)),
        ("images/s", lambda: _rate(lines)),
        ("time", lambda: [("time", accounted(seconds))]),
        ("curves", curves),
    ):
        try:
            rows += work()
        except Exception as error:
            rows.append((label, f"cannot be shown ({type(error).__name__}: {' '.join(str(error).split())})"))
    rows.append(("run", str(path)))
    return "\n".join(f"{label:>14}  {text}" for label, text in rows)


def _accuracies(lines: list[dict[str, Any]]) -> list[tuple[str, str]]:
    checks = [line for line in lines if line.get("kind") == "validation"]
    rows = []
    if checks:
        best = min(checks, key=lambda line: float(line["top1_error"]))
        for label, line in (("best", best), ("last", checks[-1])):
            top1, top5 = 1 - line["top1_error"], 1 - line["top5_error"]
            rows.append((f"{label} accuracy", f"top-1 {top1:.2%}, top-5 {top5:.2%} (epoch {line['epoch'] + 1})"))
    return rows


def _rate(lines: list[dict[str, Any]]) -> list[tuple[str, str]]:
    found = [record.rate(line) for line in lines if line.get("kind") == "step"]
    rates = [rate for rate in found if rate is not None]
    return [("images/s", f"{sorted(rates)[len(rates) // 2]:.0f} (median)")] if rates else []
