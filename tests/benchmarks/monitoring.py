"""Whether showing a run slows it: images/s before, during and after faults of a W&B server and of wandb's process."""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from dist_train.rundir import record
from tests.helpers.wandb_server import Part, WandbServer, cores

STOP = "--run.stop_timeout=20"
NET = ["--model.width=0.5", "--model.hidden=512", "--data.resize=256", "--data.crop=227", "--train.global_batch=24"]
LOOP = ["--train.epochs=1", "--train.compile=off", "--train.device=cpu", "--monitor.log_every=1", STOP]
STEPS = 130  # the first are not counted; the fault is there in the middle third of the others
WARM_UP = 25
ROUNDS = 2
NO_WANDB, WELL = "no wandb", "the server is well"
FAULTS: dict[str, Part | signal.Signals] = {
    NO_WANDB: "well",
    WELL: "well",
    "refuses connections": "refuse",
    "dies in the midst": "die",
    "takes requests, never answers": "hang",
    "answers after 60 s": "slow",
    "429, try again in 60 s": "429",
    "wrong key (401)": "wrong key",
    "wandb's process is killed": signal.SIGKILL,
    "wandb's process is stopped": signal.SIGSTOP,
}


def measure(shards: Path, fault: str) -> tuple[list[float], float]:
    """Images/s, the median of the steps before, during and after the fault; seconds from the last validation
    to the end."""
    with ExitStack() as stack:
        server = stack.enter_context(WandbServer(delay=60))
        run = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))) / "run"
        wandb = "disabled" if fault == NO_WANDB else "online"
        options = [*NET, *LOOP, f"--train.max_steps={STEPS}", f"--monitor.wandb={wandb}"]
        places = [f"--data.train={shards}", f"--data.val={shards}", "--data.source=", f"--run.dir={run}"]
        command = [sys.executable, "-m", "dist_train", *options, *places]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(command, env=os.environ | server.environment, **quiet)  # type: ignore[call-overload]
        stack.callback(process.kill)
        third = (STEPS - WARM_UP) // 3
        if wandb == "online":
            server.until(lambda: server.backend.runs)
        _wait(run, WARM_UP + third)
        part = FAULTS[fault]
        if isinstance(part, signal.Signals):
            for pid in cores(process.pid):
                os.kill(pid, part)
        else:
            server.play(part)
        _wait(run, WARM_UP + 2 * third)
        server.play("well")
        _wait(run, STEPS, "validation")
        began = time.monotonic()
        assert process.wait() == 0, f"{fault}: the run has failed"
        waited = time.monotonic() - began
        rates = [rate for line in record.read(run) if line["kind"] == "step" and (rate := record.rate(line))]
        starts = [WARM_UP + part * third for part in range(3)]
        return [statistics.median(rates[start : start + third]) for start in starts], waited


def _wait(run: Path, step: int, kind: str = "step") -> None:
    """Until it is recorded."""
    while not any(line["kind"] == kind and line["step"] >= step for line in record.read(run)):
        time.sleep(0.05)


def table(shards: Path) -> None:
    third = (STEPS - WARM_UP) // 3
    print(f"\nimages/s of a small net in one process before, during and after a fault of {third} steps (the best of")
    print(f"{ROUNDS} rounds), and seconds from the last validation to the end")
    found: dict[str, list[tuple[list[float], float]]] = {fault: [] for fault in FAULTS}
    for _ in range(ROUNDS):
        for fault, rounds in found.items():
            rounds.append(measure(shards, fault))
    for fault, rounds in found.items():
        before, during, after = (max(rates[part] for rates, _ in rounds) for part in range(3))
        print(f"  {fault:<32}{before:6.0f} {during:6.0f} {after:6.0f} {min(waited for _, waited in rounds):6.1f} s")
