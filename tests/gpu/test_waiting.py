"""Neither a step nor the loader waits for the device; each process uses its own GPU only.

As a module this is the trainer, of which a few steps are watched: one line of JSON a rank.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_train import __main__, train
from dist_train.ranks import launcher
from tests.helpers.compare import newest, status
from tests.helpers.gpu import MARKS, REHEARSED, needs_cuda, needs_gpus, run_on_gpus

pytestmark = MARKS

FIRST, LAST = 4, 6  # the steps that are watched; what is built at first use has been by then, the loader has not ended


def watched(data: Path, run: Path, *extra: str, ranks: int) -> list[dict[str, Any]]:
    """What each rank printed, in their order."""
    extra = ("--train.epochs=1", "--monitor.log_every=1000", *extra)
    result = run_on_gpus(data, run, *extra, ranks=ranks, module="tests.gpu.test_waiting")
    assert status(run)["state"] == "done", result.stderr
    assert newest(run)["state"]["bad_samples"] == 0, "the loader waits, and takes the error for a sample's"
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    lines.sort(key=lambda line: line["rank"])
    assert [line["rank"] for line in lines] == list(range(ranks))
    return lines


@pytest.mark.parametrize(
    ("ranks", "precision", "compiled"),
    [
        (1, "bf16", "off"),
        (1, "fp16", "off"),
        pytest.param(1, "bf16", "on", marks=needs_cuda("compiling takes a minute")),
        pytest.param(2, "bf16", "off", marks=needs_gpus(2)),
    ],
)
def test_nothing_waits_for_the_device(
    shard_sets: Path, tmp_path: Path, ranks: int, precision: str, compiled: str
) -> None:
    """Three steps in which torch raises an error where it would wait, in whatever thread of the process. It does so
    for a copy that blocks and for the end of a stream, not for an event. In a rehearsal it does not, and nothing is
    found."""
    extra = (f"--train.precision={precision}", f"--train.compile={compiled}")
    for line in watched(shard_sets, tmp_path, *extra, ranks=ranks):
        assert line["watched"] == LAST - FIRST + 1
        assert line["finds"] == (not REHEARSED)


@needs_cuda("contexts are CUDA's")
@needs_gpus(2)
def test_each_process_is_on_its_own_gpu(shard_sets: Path, tmp_path: Path) -> None:
    """It holds no context on another, which would take half a gigabyte there: neither in the step nor in the loader,
    in training or in validation."""
    for rank, line in enumerate(watched(shard_sets, tmp_path, ranks=2)):
        assert line["contexts"] == [rank]


def set_mode(mode: str) -> None:
    if not REHEARSED:
        torch.cuda.set_sync_debug_mode(mode)


def finds(device: torch.device) -> bool:
    """Whether it is noticed that something waits."""
    number = torch.ones(1, device=device)
    try:
        number.item()
    except RuntimeError:
        return True
    return False


def contexts() -> list[int]:
    """The GPUs on which this process has a context."""
    return [i for i in range(torch.cuda.device_count()) if torch._C._cuda_hasPrimaryContext(i)]


def main() -> int:
    """The trainer, some of whose steps are watched, with what follows each until the next one."""
    plain, steps = train.Trainer.train_step, 0
    line: dict[str, Any] = {"rank": launcher.rank(), "watched": 0}

    def step(self: train.Trainer, *args: Any) -> train.Pending:
        nonlocal steps
        steps += 1
        if steps == FIRST:
            set_mode("error")
            line["finds"] = finds(self.world.device)
        if steps == LAST + 1:
            set_mode("default")
        line["watched"] += FIRST <= steps <= LAST
        return plain(self, *args)

    train.Trainer.train_step = step  # type: ignore[method-assign]
    code = __main__.main()
    print(json.dumps(line | {"contexts": contexts()}), flush=True)
    return code


if __name__ == "__main__":
    launcher.leave(main())
