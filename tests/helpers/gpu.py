"""Devices of the tests marked gpu: this machine's GPUs or, in a rehearsal, its CPU.

With REHEARSE=1 in the environment, and no CUDA, the same tests run on the CPU, which stands for two GPUs. What needs
CUDA itself is skipped, and so is what needs more GPUs than there are; the reason is said.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.compare import newest, records
from tests.helpers.launch import Run, finish, start

REHEARSED = os.environ.get("REHEARSE") == "1" and not torch.cuda.is_available()
GPUS = 2 if REHEARSED else torch.cuda.device_count()
DEVICE = "cpu" if REHEARSED else "cuda"
ON_DEVICE = (f"--train.device={DEVICE}", f"--data.device={'cpu' if REHEARSED else 'gpu'}", "--train.ddp=always")
HOW = "fork" if REHEARSED else "exec"  # CUDA does not live through a fork
TIMEOUT = 180 if REHEARSED else 600  # seconds that a run may take, compiling included


def needs_gpus(n: int) -> pytest.MarkDecorator:
    """Skip where there are fewer GPUs, or fewer are pretended."""
    there = f"the rehearsal pretends {GPUS}" if REHEARSED else f"there {'is' if GPUS == 1 else 'are'} {GPUS}"
    remedy = "" if GPUS else "; REHEARSE=1 runs the tests on the CPU"
    return pytest.mark.skipif(n > GPUS, reason=f"needs {n} GPU{'s' * (n > 1)}, and {there}{remedy}")


def needs_cuda(why: str) -> pytest.MarkDecorator:
    """Skip in a rehearsal, for this reason."""
    return pytest.mark.skipif(REHEARSED, reason=f"not rehearsed: {why}")


def on_gpus(*counts: int) -> pytest.MarkDecorator:
    """The argument `ranks` takes these values, each where there are as many GPUs."""
    return pytest.mark.parametrize("ranks", [pytest.param(n, marks=needs_gpus(n)) for n in counts])


# Of each module. A new driver, or another version of a library, may bring a deprecation inside of it.
MARKS = [
    pytest.mark.gpu,
    needs_gpus(1),
    pytest.mark.filterwarnings(r"default:::(torch|nvidia|pynvml)(\.|$)"),
]


def start_on_gpus(data: Path, run: Path, *extra: str, **options: Any) -> Run:
    """`start` on the device, one rank a GPU, with DDP also around one. For the arguments see `start` and `command`."""
    options = {"ranks": 1, "how": None if REHEARSED else "exec", **options}
    return start(data, run, *ON_DEVICE, *extra, **options)


def run_on_gpus(*args: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    """Start a run on the device and wait for its end."""
    return finish(start_on_gpus(*args, **options), TIMEOUT)


def assert_close(run: Path, other: Path, start: dict[str, Tensor], *, losses: float, updates: float) -> None:
    """Two runs from the same weights have done the same up to rounding.

    Args:
        losses: how far the losses of the first ten steps may be apart, as a fraction of theirs.
        updates: how far what training has changed of the weights may be apart, as one vector, as a fraction of its
            length. It grows with the number of steps: a unit that rounding turns on or off has other gradients.
    """
    ours, theirs = ([r["loss"] for r in records(where, "step")] for where in (run, other))
    assert len(ours) == len(theirs)
    assert ours[:10] == pytest.approx(theirs[:10], rel=losses)
    changes = []
    for where in (run, other):
        weights = newest(where)["model"]
        assert weights.keys() == start.keys()
        changes.append(torch.cat([(weights[name].cpu() - value).double().flatten() for name, value in start.items()]))
    apart = float((changes[0] - changes[1]).norm() / changes[1].norm())
    assert apart <= updates
