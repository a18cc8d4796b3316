"""Effect of each setting of `dist_train.process`: a step of the paper's net at 227, one process per setting."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time

import numpy as np
import torch
from torch.nn import functional as F

from dist_train import optim, process
from dist_train.config import OptimConfig
from dist_train.models.alexnet import AlexNet
from dist_train.models.dropout import mask_keys

BATCH, WARM_UP, STEPS, ROUNDS = 32, 2, 5, 2
CPU = torch.device("cpu")
WAYS = {
    "as shipped": ("kept",),
    "and torch's flag": ("kept", "flag"),
    "freed memory given back": (),
    "and torch's flag, uninitialised memory filled": ("flag", "fill"),
}


def measure(way: str) -> dict[str, float]:
    """CPU milliseconds and page faults per image; peak memory in MB."""
    if "kept" in WAYS[way]:
        process.keep_freed_memory(CPU)
    torch.use_deterministic_algorithms("flag" in WAYS[way], warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = "fill" in WAYS[way]  # type: ignore[attr-defined]
    net = AlexNet(1000)
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer, scaler = optim.build(OptimConfig(), net), torch.amp.GradScaler("cpu", enabled=False)
    images = (torch.randn(BATCH, 3, 227, 227) * 60).to(memory_format=torch.channels_last)
    labels, keys = torch.randint(0, 1000, (BATCH,)), mask_keys(0, 0, np.arange(BATCH))
    for step in range(WARM_UP + STEPS):
        if step == WARM_UP:
            began, faults = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        optimizer.zero_grad()
        F.cross_entropy(net(images, keys), labels).backward()  # type: ignore[no-untyped-call]
        optim.update(optimizer, scaler)
    used = resource.getrusage(resource.RUSAGE_SELF)
    milliseconds, faults = 1000 * (time.process_time() - began), used.ru_minflt - faults
    return {"ms": milliseconds / (STEPS * BATCH), "faults": faults / (STEPS * BATCH), "mb": used.ru_maxrss / 1000}


def table() -> None:
    """Print them, the least of a few rounds."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(process.MALLOC_VARIABLES)}
    env |= {"OMP_WAIT_POLICY": "PASSIVE"}
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(ROUNDS):
        for way, results in found.items():
            words = [sys.executable, "-m", "tests.benchmarks.settings", way]
            done = subprocess.run(words, env=env, capture_output=True, text=True, check=True)
            results.append(json.loads(done.stdout))
    least = {way: min(results, key=lambda result: result["ms"]) for way, results in found.items()}
    print(f"\na step at 227, batch {BATCH}, one process: CPU per image")
    for way, result in least.items():
        ms, faults, mb = result.values()
        ratio = ms / least["as shipped"]["ms"]
        print(f"  {way:<48}{ms:7.1f} ms {ratio:5.2f} x {faults:8.0f} page faults {mb:6.0f} MB at most")


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
