"""The trainer with one fault in it: `python -m tests.helpers.faults ...` is `python -m dist_train ...` and $FAULT.

FAULT is JSON: {"at": moment, "n": which occurrence, "rank": rank or -1 for all, "do": what}. Moments: step (before a
step), validation (at a batch of it), save:written, save:flushed, save:renaming, save:renamed, save:pruning, record. It
step), validation (at a batch), save:written, save:flushed, save:renaming, save:renamed, save:pruning, record. It
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from dist_train import __main__, train, validate
from dist_train.rundir import checkpoint, lease

FAULT: dict[str, Any] = json.loads(os.environ.get("FAULT", "{}"))
RANK = int(os.environ.get("RANK", 0))
DIRECTORY = Path(next(a.partition("=")[2] for a in sys.argv if a.startswith("--run.dir=")))
SEEN: Counter[str] = Counter()
LOOP: list[train.Trainer] = []


def kin() -> list[int]:
    """The processes of this run: the children of this one's parent, its launcher."""
    children = Path(f"/proc/{os.getppid()}/task/{os.getppid()}/children").read_text().split()
    return [int(child) for child in children]


def reach(moment: str) -> None:
    """The program has come to a moment; the fault strikes where it is due."""
    SEEN[moment] += 1
    if moment != FAULT.get("at") or FAULT.get("rank", 0) not in (-1, RANK):
        return
    mark = DIRECTORY / f"fault-{RANK}"
    if FAULT.get("always"):
        due = SEEN[moment] >= FAULT.get("n", 1)
    else:
        due = SEEN[moment] == FAULT.get("n", 1) and not mark.exists()
    if due:
        if DIRECTORY.exists():
            mark.touch()
        strike(FAULT["do"])


def strike(what: str) -> None:
    me = os.getpid()
    if what == "kill":
        os.kill(me, signal.SIGKILL)
    elif what == "kill all":
        for pid in sorted(kin(), key=lambda pid: pid == me):
            os.kill(pid, signal.SIGKILL)
    elif what == "pause":
        os.kill(me, signal.SIGSTOP)
    elif what.startswith("launcher "):
        os.kill(os.getppid(), signal.Signals[what.split()[1]])
    elif what.startswith("SIG"):
        for name in what.split():  # several: one after the other
            os.kill(me, signal.Signals[name])
            time.sleep(2.5 if len(what.split()) > 1 else 0)
    elif what == "hang":
        time.sleep(3600)
    elif what == "slow":
        time.sleep(3)
    elif what == "disk full":
        raise OSError(28, "No space left on device")
    elif what == "vanish":
        DIRECTORY.rename(DIRECTORY.with_name("moved away"))
    elif what == "nan":
        for parameter in LOOP[0].model.parameters():
            parameter.register_hook(lambda g: g * float("nan"))
    else:
        raise AssertionError(what)


def around(place: Any, name: str, moment: str, *, after: bool = False) -> None:
    """Pass through `moment` before (or after) each call of `place.name`."""
    original = getattr(place, name)

    def wrapped(*args: Any, **options: Any) -> Any:
        if not after:
            reach(moment)
        result = original(*args, **options)
        if after:
            reach(moment)
        return result

    setattr(place, name, wrapped)


def logged_step(self: train.Trainer, batch: Any, lr: float, original: Any = train.Trainer.train_step) -> Any:
    """Note which samples a rank was shown, then take the step."""
    LOOP[:] = [self]
    with open(DIRECTORY / f"samples-{RANK}.jsonl", "a") if DIRECTORY.exists() else open(os.devnull, "w") as file:
        where = {"epoch": self.state.epoch, "step": self.state.step, "start": batch.start}
        line = where | {"samples": batch.samples.tolist(), "time": time.time()}
        file.write(json.dumps(line) + "\n")
    reach("step")
    time.sleep(float(os.environ.get("STEP_SECONDS", 0)))
    return original(self, batch, lr)


def main() -> int:
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    train.Trainer.train_step = logged_step  # type: ignore[method-assign]
    around(validate, "_correct", "validation")
    around(torch, "save", "save:written", after=True)
    around(checkpoint, "_flush", "save:flushed", after=True)
    around(checkpoint, "_place", "save:renaming")
    around(checkpoint, "_place", "save:renamed", after=True)
    around(checkpoint, "_remove", "save:pruning")
    around(lease.Owner, "check", "record")  # what stands before every write of the run directory
    return __main__.main()


if __name__ == "__main__":
    __main__.leave(main())
