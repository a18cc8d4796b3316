"""Cost of OpenMP threads that spin while they wait (OMP_WAIT_POLICY), alone and beside other work."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from dist_train.rundir import record
from pipelines.misc import cpus

NET = ["--model.width=0.25", "--model.hidden=32", "--data.resize=72", "--data.crop=67", "--train.global_batch=24"]
LOOP = ["--train.epochs=1", "--train.compile=off", "--train.device=cpu", "--monitor.log_every=1"]


def images_per_s(shards: Path, policy: str, busy: int) -> float:
    """Of a small net in one process, beside `busy` processes that never rest."""
    with tempfile.TemporaryDirectory() as run, ExitStack() as stack:
        for _ in range(busy):
            neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            stack.callback(neighbour.wait)
            stack.callback(neighbour.kill)
        command = [sys.executable, "-m", "dist_train", *NET, *LOOP, f"--run.dir={run}"]
        command += [f"--data.train={shards}", f"--data.val={shards}", "--data.source="]
        env = os.environ | {"OMP_WAIT_POLICY": policy}
        subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return record.rate(record.read(Path(run))[-2]) or 0.0


def table(shards: Path) -> None:
    print("\nimages/s of a small net in one process, by what waiting threads do")
    for busy in (0, cpus()):
        rates = {policy: images_per_s(shards, policy, busy) for policy in ("ACTIVE", "PASSIVE")}
        told = ", ".join(f"{policy.lower()} {rate:.0f}" for policy, rate in rates.items())
        print(f"  beside {busy} busy processes: {told}")
