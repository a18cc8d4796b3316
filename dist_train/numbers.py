"""Numbers of your own in the record: `log`, called by a net or by the loop."""

from __future__ import annotations

import math
import re
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipelines.errors import UserError

Over = Literal["max", "min", "mean", "sum"]
_sum = partial(torch.sum, dtype=torch.float64)
REDUCE: dict[str, Any] = {"max": torch.amax, "min": torch.amin, "mean": _sum, "sum": _sum}  # a mean is divided last
NAME = re.compile(r"\w[\w./-]*", re.ASCII)


class Number(NamedTuple):
    """Maximum, minimum or sum of `elements` elements, as a float or as a float64 scalar on the device."""

    over: str
    value: Any
    elements: int

    @property
    def result(self) -> float | None:
        """The number for the record; None if it is not finite."""
        value = self.value / self.elements if self.over == "mean" else self.value
        return value if math.isfinite(value) else None


def combined(numbers: list[Number]) -> Number:
    """Combines numbers of one kind, all floats or all scalars on one device, in the order given. NaN prevails."""
    over, values = numbers[0].over, [number.value for number in numbers]
    scalars = isinstance(values[0], Tensor)
    value = REDUCE[over](torch.stack(values) if scalars else torch.tensor(values, dtype=torch.float64))
    return Number(over, value if scalars else value.item(), sum(number.elements for number in numbers))


class _Step:
    """The numbers of the step under way, by name and kind; `device` is None between steps."""

    def __init__(self) -> None:
        self.device: torch.device | None = None
        self.found: dict[tuple[str, str], list[Number]] = {}


_step = _Step()


def log(name: str, value: Tensor | float, over: Over = "mean") -> None:
    """Adds a number to the record: `numbers.<name>` of the lines of steps, numbers/<name> in wandb and TensorBoard.

    It is the mean (or maximum, minimum, sum) of all elements that were logged under this name since the previous line:
    by all calls in a step, in all `train.accumulate` pieces, on all ranks that make such a call. Two ranks with the
    towers of one net see the same samples, so a sum over samples counts each twice.

    Does nothing outside a training step: in validation, probes, evaluation. Does not wait for the device.

    Args:
        name: letters, digits, and _ . - /
        value: a number, or a tensor of any shape and real dtype; it is detached.

    Raises UserError for another name or `over`.
    """
    if torch.compiler.is_exporting():
        return
    if torch.compiler.is_dynamo_compiling():  # a break in the graph: compiled, it would be so for each state of `_step`
        # Not as a decorator, which would import the compiler before `process.prepare_compiler` has set it up.
        torch.compiler.disable(_log)(name, value, over)  # type: ignore[no-untyped-call]
    else:
        _log(name, value, over)


def _log(name: str, value: Tensor | float, over: str) -> None:
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise UserError(f"the name of a logged number has letters, digits, and _ . - / only: not {name!r}")
    if over not in REDUCE:
        raise UserError(f"number {name!r} is logged over {over!r}: choose {', '.join(REDUCE)}")
    if _step.device is None:
        return
    if isinstance(value, np.generic):
        value = value.item()
    if not (isinstance(value, float | int) or (isinstance(value, Tensor) and not value.is_complex())):
        raise UserError(f"number {name!r} is logged as {type(value).__name__}: give a real number or a tensor")
    if isinstance(value, Tensor):
        values = value.detach().to(_step.device, non_blocking=True)
    else:
        values = torch.full((), value, dtype=torch.float64, device=_step.device)
    if values.numel():
        number = Number(over, REDUCE[over](values).double(), values.numel())
        _step.found.setdefault((name, over), []).append(number)


def open_step(device: torch.device) -> None:
    """Begins a training step on this device: from here on `log` counts."""
    _step.device, _step.found = device, {}


def close_step() -> dict[tuple[str, str], Number]:
    """Ends the step. Returns its numbers on this rank, scalars on the device, by name and kind."""
    found, _step.device, _step.found = _step.found, None, {}
    return {key: combined(numbers) for key, numbers in found.items()}
