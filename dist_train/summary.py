"""The summary of a run, printed at its end."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dist_train.outcomes import Ended
from dist_train.pictures.curves import draw_curves
from dist_train.rundir import confusion, record
from dist_train.rundir.ledger import accounted
from dist_train.rundir.state import Progress


def summary(path: Path, end: Ended, progress: Progress, seconds: Mapping[str, float]) -> str:
    """The lines printed at the end of a run. What cannot be shown gives way to the reason."""
    reason = f": {end}" if str(end) else ""
    rows = [("outcome", end.state + reason), ("epochs", f"{progress.epoch} ({progress.step} steps)")]
    lines: list[dict[str, Any]] = []

    def readable() -> list[tuple[str, str]]:
        found, damaged = record.readable(path)
        lines.extend(found)
        numbers = ", ".join(map(str, list(damaged)[:8]))
        return [("record", f"damaged in line {numbers} of {path / record.FILE}, left out here")] if damaged else []

    def curves() -> list[tuple[str, str]]:
        picture = draw_curves(path, lines, _chance(path))
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
    if not checks:
        return []
    best, last = min(checks, key=lambda line: float(line["top1_error"])), checks[-1]
    chosen = [("accuracy", last)] if best is last else [("best accuracy", best), ("last accuracy", last)]
    return [(label, _accuracy(line)) for label, line in chosen]


def _accuracy(line: dict[str, Any]) -> str:
    return f"top-1 {1 - line['top1_error']:.2%}, top-5 {1 - line['top5_error']:.2%} (epoch {line['epoch'] + 1})"


def _chance(path: Path) -> float | None:
    """Error of always naming the most common class of the validation set; None if the run was never validated."""
    with suppress(confusion.ConfusionError):
        samples = confusion.read(path)[0].samples
        return 1 - int(samples.max()) / max(1, int(samples.sum()))
    return None


def _rate(lines: list[dict[str, Any]]) -> list[tuple[str, str]]:
    found = [record.rate(line) for line in lines if line.get("kind") == "step"]
    rates = [rate for rate in found if rate is not None]
    return [("images/s", f"{sorted(rates)[len(rates) // 2]:.0f} (median)")] if rates else []
