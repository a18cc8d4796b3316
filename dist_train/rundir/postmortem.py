"""What is left to read after a value that is not finite."""

from __future__ import annotations

import json
import math
from pathlib import Path

from dist_train.rundir.state import Step

FILE = "diverged.json"


def diverged(run: Path, step: Step, loss: float, keys: list[str], *, writes: bool) -> str:
    """Name what led to it: the sentence for status.json. All keys of the batch go to diverged.json.

    Args:
        keys: of the samples of the global batch.
        writes: whether this is rank 0.
    """
    what = "gradient" if math.isfinite(loss) else "loss"
    if writes:
        report = {"what": what, "step": step.number, "epoch": step.epoch, "lr": step.lr, "keys": keys}
        (run / FILE).write_text(json.dumps(report, indent=1), encoding="utf-8")
    return (
        f"the {what} is not finite at step {step.number} (epoch {step.epoch + 1}, lr {step.lr:g}), batch {keys[0]} ... "
        f"{keys[-1]} (all keys in {FILE}): lower optim.lr; the last checkpoint is good"
    )
