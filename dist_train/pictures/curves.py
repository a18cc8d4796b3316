"""curves.png: how a run has learned."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from dist_train.pictures.style import CURVES_DPI, plain
from pipelines.files import write_atomically
from pipelines.png import as_png, literal


def draw_curves(run: Path, records: Sequence[dict[str, Any]]) -> Path | None:
    """Write `curves.png` into the directory of a run: training loss, validation errors, and where the learning rate was
    divided. Returns its path; None before the first record. Raises OSError."""
    steps = [r for r in records if r.get("kind") == "step"]
    checks = [r for r in records if r.get("kind") == "validation"]
    if not steps:
        return None
    from matplotlib.figure import Figure  # not while a run starts

    figure = Figure(figsize=(10, 4), dpi=CURVES_DPI, layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot([r["progress"] for r in steps], [r["loss"] for r in steps], lw=0.8)
    left.set(xlabel="epoch", ylabel="training loss (nats)", ylim=(0, None))
    for name, key, marker in (("top-1", "top1_error", "o"), ("top-5", "top5_error", "s")):
        right.plot([r["epoch"] + 1 for r in checks], [100 * r[key] for r in checks], marker=marker, label=name)
    right.set(xlabel="epoch", ylabel="validation error (%)", ylim=(0, None))
    right.xaxis.get_major_locator().set_params(integer=True)
    for before, after in pairwise(checks):
        if after["lr"] < before["lr"]:
            for axes in (left, right):
                axes.axvline(before["epoch"] + 1, color="grey", ls=":", lw=1)
    right.legend()
    plain(left, right)
    figure.suptitle(literal(run.name), parse_math=False)
    path = run / "curves.png"
    write_atomically(path, as_png(figure))
    return path
