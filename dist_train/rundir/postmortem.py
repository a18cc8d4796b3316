"""Report on a run that diverged."""

from __future__ import annotations

import json
import math
from pathlib import Path

from dist_train.rundir.state import Step
from pipelines.files import write_atomically

FILE = "diverged.json"


def diverged(run: Path, step: Step, loss: float, keys: list[str], *, writes: bool) -> str:
    """Returns the sentence for status.json, and writes all keys of the batch to diverged.json.

    Args:
        keys: of the samples in the global batch.
        writes: whether this is rank 0.
    """
    what, where = "gradient" if math.isfinite(loss) else "loss", f"all keys in {FILE}"
    if writes:
        report = {"what": what, "step": step.number, "epoch": step.epoch, "lr": step.lr, "keys": keys}
        try:
            write_atomically(run / FILE, json.dumps(report, indent=1).encode())
        except OSError as error:  # this does not change how the run ends
            where = f"{FILE} cannot be written: {error}"
    return (
        f"the {what} is not finite at step {step.number} (epoch {step.epoch + 1}, lr {step.lr:g}), batch {keys[0]} ... "
        f"{keys[-1]} ({where}): lower optim.lr; the last checkpoint is good"
    )
