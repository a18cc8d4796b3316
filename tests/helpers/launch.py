"""Start the trainer as a user does: real processes, small model, small data."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

SMALL = [
    "--data.resize=72",
    "--data.crop=67",
    "--model.hidden=32",
    "--model.width=0.25",
    "--train.compile=off",
    "--train.device=cpu",
    "--train.global_batch=24",
    "--train.epochs=2",
    "--monitor.log_every=1",
    "--checkpoint.minutes=0",
]
STEPS = 10  # an epoch: 240 images in batches of 24
EMPTY = Path(__file__).parent / "empty.yaml"


def command(
    data: Path, run: Path, *extra: str, ranks: int = 2, module: str = "dist_train", agent: str = ""
) -> list[str]:
    """The command line of a run; `ranks` 0 starts one process without torchrun. `agent`: options for torchrun."""
    launcher = [sys.executable, "-m"]
    if ranks:
        launcher += ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *agent.split(), "-m"]
    sets = [f"--data.train={data / 'train'}", f"--data.val={data / 'val'}", f"--run.dir={run}"]
    return [*launcher, module, f"--config={EMPTY}", *SMALL, *sets, *extra]


def start(*args: Any, env: dict[str, str] | None = None, **options: Any) -> subprocess.Popen[str]:
    """Start it in a process group of its own."""
    return subprocess.Popen(
        command(*args, **options),
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], timeout: float = 180) -> subprocess.CompletedProcess[str]:
    """Wait for it; what hangs is killed, with the workers that torchrun put into sessions of their own."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for pid in (process.pid, *map(int, workers)):
            os.kill(pid, signal.SIGKILL)
        process.communicate()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def launch(*args: Any, timeout: float = 180, **options: Any) -> subprocess.CompletedProcess[str]:
    """Start a run and wait for its end."""
    return finish(start(*args, **options), timeout)


def status(run: Path) -> dict[str, Any]:
    body: dict[str, Any] = json.loads((run / "status.json").read_text())
    return body


def records(run: Path, kind: str = "") -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without times and rates, which alone may differ between equal runs."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [line for line in lines if kind in ("", line["kind"])]
    return [{k: v for k, v in line.items() if k not in ("images_per_s", "data_wait")} for line in kept]


def newest(run: Path) -> dict[str, Any]:
    """The state in the newest checkpoint."""
    path = max((run / "checkpoints").glob("step-*"))
    state: dict[str, Any] = torch.load(path / "state.pt", weights_only=True)
    return state


def equal(a: Any, b: Any) -> bool:
    """Whether two states are equal bit for bit."""
    if torch.is_tensor(a):
        return torch.is_tensor(b) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)
