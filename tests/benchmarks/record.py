"""Cost of the record on rank 0's main thread: the exchange of each step with all ranks, and one line."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_train.config import Config, MonitorConfig
from dist_train.monitor.gpus import GpuSample
from dist_train.monitor.reporter import Reporter
from dist_train.monitor.terminal import Terminal
from dist_train.ranks.vote import Vote
from dist_train.ranks.world import World
from dist_train.rundir.directory import RunDirectory
from dist_train.rundir.state import Progress, Step, Window

RANKS, PER_NODE = (1, 8, 64, 512), 8
STEPS, EVERY = 1000, 10
PROMISED = 1.0  # ms a record
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Alone(World):
    """Rank 0 of a world whose other ranks say nothing: what the network takes is another matter."""

    def reduce(self, values: Tensor) -> dist.Work | None:
        return None


def measure(ranks: int, scratch: Path) -> tuple[float, float]:
    """Milliseconds of the main thread's CPU time: of a step, and what a step that is recorded takes above that."""
    config = Config(monitor=MonitorConfig(log_every=EVERY))
    world = Alone(0, ranks, 0, PER_NODE, CPU, nodes=[f"node-{rank // PER_NODE:03d}" for rank in range(ranks)])
    run = RunDirectory(scratch / str(ranks), print, keep=2, writes=True)
    run.claim(config, [], 0, "")
    terminal = Terminal(is_first=False)
    run.record.told = terminal.take
    loader: Any = SimpleNamespace(steps=STEPS, waited=0.0)
    state: Any = SimpleNamespace(progress=Progress(), window=Window())
    report = Reporter(config, world, run, terminal, loader)
    loss, sample = torch.ones((), dtype=torch.float64), GpuSample(0.93, 812.0, 600.5, 61.0, 4.0)
    took: dict[bool, list[float]] = {False: [], True: []}
    for number in range(STEPS):
        step = Step(0, number, number, 0.01)
        began = time.thread_time()
        vote = Vote.cast(world, (*report.row(step), *sample), loss=loss, wrong=loss, square=loss).read()
        state.window.add(vote.loss, vote.wrong, vote.square)
        middle = time.thread_time()
        rows = [(0.001, 812.0, *sample)] * ranks  # what is not heard of them here
        again = time.thread_time()
        report.step(step, rows, state, last=False)
        took[step.number % EVERY == 0].append(time.thread_time() - again + middle - began)
    run.close()
    return 1000 * median(took[False]), 1000 * (median(took[True]) - median(took[False]))


def table() -> None:
    print(f"\nthe record, CPU time of the main thread on rank 0; promised: under {PROMISED:g} ms a record")
    with tempfile.TemporaryDirectory() as scratch:
        for ranks in RANKS:
            step, line = measure(ranks, Path(scratch))
            print(
                f"  {ranks:4d} ranks on {-(-ranks // PER_NODE):2d} nodes: {step:.3f} ms a step, {line:.3f} ms a record"
            )
