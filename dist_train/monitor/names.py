"""Names of the record's numbers in wandb and TensorBoard."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dist_train.rundir.record import MACHINE

# By kind of line. The group before the slash is a section of the page in both.
NAMES = {
    "step": {
        "loss": "loss/training",
        "train_error": "error/training",
        "lr": "lr",
        "grad_norm": "grad_norm",
        "skipped": "machine/skipped",
        "bad_samples": "machine/bad_samples",
    },
    "validation": {
        "top1_error": "error/validation_top1",
        "top5_error": "error/validation_top5",
        "loss": "loss/validation",
        "train_error": "error/training_epoch",
        "train_loss": "loss/training_epoch",
    },
}
RATES = ("images_per_s", "data_wait")  # earlier versions recorded them beside the loss
HIDDEN = ("worst_rank",)  # a number, but no measurement


def named(line: dict[str, Any]) -> dict[str, float]:
    """The numbers of a line, by the names under which they are shown: loss/training, error/validation_top1, lr,
    machine/images_per_s, machine/gpu-07/watts, probe/conv1/dead, numbers/fc7_max, ... The line's position (step, epoch,
    images, progress, samples) is left out; a list, such as the reasons for throttling, counts by its length. Empty for
    other kinds of lines."""
    kind = line.get("kind", "")
    if kind == "probe":
        layers = line.get("layers", {})
        return dict(_flat("probe", {"loss": line.get("loss"), "curvature": line.get("curvature"), **layers}))
    names = NAMES.get(kind, {})
    found = {name: float(line[key]) for key, name in names.items() if _is_number(line.get(key))}
    found |= _flat("numbers", line.get("numbers", {}))
    machine = dict(line.get(MACHINE, {}))
    if kind == "step":
        machine |= {key: line[key] for key in RATES if key in line}
    elif kind == "validation":
        machine = {f"validation_{key}": value for key, value in machine.items()}
    nodes = machine.pop("nodes", {})
    return found | dict(_flat(MACHINE, machine | nodes)) if names else {}


def _flat(name: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if key not in HIDDEN:
                yield from _flat(f"{name}/{key}", inner)
    elif isinstance(value, list):
        yield name, float(len(value))
    elif _is_number(value):
        yield name, float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
