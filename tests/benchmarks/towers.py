"""Bytes sent per training step: towers on two ranks (train.tower_parallel) against data parallelism.

Under torchrun, with two ranks, this measures and prints JSON; `table` starts that and prints it for people.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional as F

from dist_train import build, models
from dist_train.config import Config, ModelConfig, TrainConfig
from dist_train.data_config import DataConfig
from dist_train.models.dropout import mask_keys
from dist_train.ranks.world import World, join
from pipelines.order import even_split

CASES = ((227, 4096, 1000, 8), (227, 4096, 1000, 32), (67, 512, 10, 128))  # crop, hidden, outputs, global batch
STEPS = 4
FLOAT = 4  # bytes


def by_formula(crop: int, hidden: int, outputs: int, batch: int) -> dict[str, float]:
    """What each of two ranks sends in a step, in bytes.

    Data parallel: a ring all-reduce sends 2 (W - 1) / W of the gradients of all weights, for W = 2 once. Tower
    parallel: for each sample half of the maps that conv 3, fc 6 and fc 7 see, and in the backward pass as much
    gradient; and one part of the logits.
    """
    with torch.device("meta"):
        net = models.build(ModelConfig("alexnet_two_tower", hidden=hidden), classes=outputs, crop=crop)
    weights = sum(p.numel() for p in net.parameters())
    side = (crop - 11) // 4 + 1
    sides = [side := (side - 3) // 2 + 1 for _ in range(3)]  # after each pooling
    halves = 128 * sides[1] ** 2 + 128 * sides[2] ** 2 + hidden // 2
    return {"data": FLOAT * weights, "tower": FLOAT * batch * (2 * halves + outputs)}


def sent() -> int:
    """Bytes that went over the loopback device so far."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return next(int(line.split()[9]) for line in lines if line.strip().startswith("lo:"))


def measured(world: World, crop: int, hidden: int, outputs: int, batch: int) -> float:
    """What each rank of `world` sends in a step, in bytes: the least of some steps, since others may use the device."""
    config = Config(
        model=ModelConfig("alexnet_two_tower", hidden=hidden),
        data=DataConfig(crop=crop),
        train=TrainConfig(global_batch=batch, tower_parallel=world.mesh is not None),
    )
    net = build.distribute(build.model(config, world, outputs, compiled=False), config, world, compiled=False)
    low, high = even_split(batch, world.dp_rank, world.dp_size)
    images = (torch.randn(high - low, 3, crop, crop) * 60).to(memory_format=torch.channels_last)
    keys, labels = mask_keys(0, 0, np.arange(low, high)), torch.arange(high - low) % outputs

    def between(work: bool) -> int:
        dist.barrier()
        before = sent()
        dist.barrier()
        if work:
            F.cross_entropy(net(images, keys), labels).backward()
        dist.barrier()
        return sent() - before

    between(True)
    idle = min(between(False) for _ in range(STEPS))
    return (min(between(True) for _ in range(STEPS)) - idle) / world.size


def main() -> None:
    """A rank."""
    world = join("cpu")
    ways = {"data": world, "tower": world.in_pairs()}
    found = [{way: measured(ranks, *case) for way, ranks in ways.items()} for case in CASES]
    if world.rank == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


def table() -> None:
    """Measure, and print beside the formula."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*launcher, "-m", "tests.benchmarks.towers"], env=env, stdout=subprocess.PIPE, text=True, check=True
    )
    print("\nMB that each of two ranks sends in a step, measured (by formula)")
    print(f"  {'crop, hidden, outputs':<24} batch  {'data parallel':>17}  {'tower parallel':>17}   equal at batch")
    for case, found in zip(CASES, json.loads(result.stdout.splitlines()[-1]), strict=True):
        formula = by_formula(*case)
        cells = [f"{found[way] / 1e6:7.2f} ({formula[way] / 1e6:7.2f})" for way in ("data", "tower")]
        equal = formula["data"] / (formula["tower"] / case[-1])
        print(f"  {', '.join(map(str, case[:3])):<24} {case[-1]:5}  {'  '.join(cells)}  {equal:8.0f}")


if __name__ == "__main__":
    main() if "RANK" in os.environ else table()
