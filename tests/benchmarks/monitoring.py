"""Whether showing a run slows it: images/s before, during and after faults of a W&B server and of wandb's process; what
a rewrite of the page costs the main thread."""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from dist_train.config import Config
from dist_train.monitor import page_process
from dist_train.monitor.page import PageRun
from dist_train.monitor.reader import Shown
from dist_train.page.report import FILE
from dist_train.ranks import beside
from dist_train.rundir import lease, record
from tests.helpers.drills import until
from tests.helpers.recorded_runs import healthy, imagenet
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

TURN, TURNS = 2.0, 60  # seconds with a process that rewrites a page, and as many without; how often
PROMISED = 5.0  # ms a rewrite
CALLS = 5000
TOKEN = "mine"
LAST_PAGE = """
import sys, time
from pathlib import Path
import dist_train.run
from dist_train.monitor import page_process
lease = page_process.Lease(Path(sys.argv[1]))
lease.token = sys.argv[2]
began = time.process_time()
assert page_process.rewrite(lease)
print(time.process_time() - began)
"""
SMALLER = ["--model.width=0.25", "--model.hidden=32", "--data.resize=72", "--data.crop=67", "--train.global_batch=24"]


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


def rewriting(shards: Path, recorded: Path) -> tuple[float, float, float]:
    """What a rewrite of a recorded run's page takes: ms of the main thread of a small net that trains on all CPUs, its
    standard error, and ms of CPU of the process, which is stopped and let go on by turns: on, off, off, on, so that
    what other programs do, if it changes slowly, strikes both alike."""
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        shown, run = _claimed(recorded, scratch / "shown"), scratch / "run"
        options = [*SMALLER, *LOOP, "--train.epochs=1000", "--monitor.page=false", "--monitor.wandb=disabled"]
        places = [f"--data.train={shards}", f"--data.val={shards}", "--data.source=", f"--run.dir={run}"]
        command = [sys.executable, "-m", "tests.helpers.faults", *options, *places]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(command, **quiet)  # type: ignore[call-overload]
        stack.callback(process.kill)
        _wait(run, WARM_UP)
        said = stack.enter_context(tempfile.TemporaryFile())
        writer = beside.start(page_process.__name__, (str(shown), TOKEN, "0"), said)
        stack.callback(writer.kill)
        page = shown / FILE
        until(page.exists)
        turns, before, rewrites, began = list[tuple[float, float]](), page.stat().st_ino, 0, _cpu(writer.pid)
        for turn in range(2 * TURNS):
            writer.send_signal(signal.SIGCONT if turn % 4 in (0, 3) else signal.SIGSTOP)
            start = time.time()
            while (now := time.time()) < start + TURN:
                rewrites += (inode := page.stat().st_ino) != before
                before = inode
                time.sleep(0.01)
            turns.append((start, now))
        spent = _cpu(writer.pid) - began
        steps = [json.loads(line)["time"] for line in (run / "samples-0.jsonl").read_text().splitlines()]
    paces = [_pace([step for step in steps if start <= step < end]) for start, end in turns]
    on = [pace for turn, pace in enumerate(paces) if turn % 4 in (0, 3)]
    off = [pace for turn, pace in enumerate(paces) if turn % 4 in (1, 2)]
    lost = [1 - without / with_it for with_it, without in zip(on, off, strict=True) if with_it and without]
    each = 1000 * TURN * TURNS / rewrites
    middle = statistics.median(lost)  # a program that wakes up strikes a single turn
    spread = 1.4826 * statistics.median(abs(part - middle) for part in lost)  # of a normal distribution
    return each * middle, each * 1.25 * spread / len(lost) ** 0.5, 1000 * spent / rewrites


def called(recorded: Path) -> tuple[float, float, float]:
    """What the page takes of the run's own process, whoever has the CPUs: us of CPU for a line of the record, all of
    which may have Python's lock; ms of that for the start of the process, once in a start; and ms of CPU for the page
    at the end of the run."""
    with tempfile.TemporaryDirectory() as scratch:
        run = _claimed(recorded, Path(scratch) / "shown")
        reader = PageRun(Shown(run, Config(), print, token=TOKEN))
        line = {"kind": "step", "step": 1}
        reader._tried = -page_process.PERIOD  # it is due
        began = time.thread_time()
        reader.take(line)
        started = time.thread_time() - began
        began = time.thread_time()
        for _ in range(CALLS):
            reader.take(line)
        each = (time.thread_time() - began) / CALLS
        reader.hurry(last=True)
        words = [sys.executable, "-c", LAST_PAGE, str(run), TOKEN]
        last = subprocess.run(words, check=True, stdout=subprocess.PIPE).stdout
    return 1e6 * each, 1000 * started, 1000 * float(last)


def _claimed(recorded: Path, path: Path) -> Path:
    """A copy of a recorded run, of which a start holds the lease and which has no page."""
    shutil.copytree(recorded, path)
    (path / lease.FILE).write_text(TOKEN)
    (path / FILE).unlink(missing_ok=True)
    return path


def _pace(steps: list[float]) -> float:
    """Seconds of a step, from the times at which some began; 0 if they are too few to tell."""
    return (steps[-1] - steps[0]) / (len(steps) - 1) if len(steps) > 2 else 0.0


def _cpu(pid: int) -> float:
    """Seconds of CPU that a process has taken."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


def page_table(shards: Path) -> None:
    print(f"\nRUN/report.html: ms that a rewrite takes of the main thread (promised: {PROMISED:g}) of a small net that")
    print(
        "trains on all CPUs; ms of CPU of the niced process; and of the run's own process us of CPU for a line of the"
    )
    print("record, ms for the start of the process, once, and ms for the last page")
    with tempfile.TemporaryDirectory() as scratch:
        for what, make in (("6 epochs of Fashion-MNIST", healthy), ("90 epochs of ImageNet", imagenet)):
            run = make(Path(scratch) / what)
            line, start, last = called(run)
            taken, error, cpu = rewriting(shards, run)
            print(
                f"  {what:<26}{taken:6.1f} +- {error:.1f} ms {cpu:6.0f} ms{line:6.0f} us {start:6.1f} ms {last:6.0f} ms"
            )


def table(shards: Path) -> None:
    third, turns = (STEPS - WARM_UP) // 3, int(os.environ.get("ROUNDS", ROUNDS))
    print(f"\nimages/s of a small net in one process before, during and after a fault of {third} steps (the best of")
    print(f"{turns} rounds), and seconds from the last validation to the end")
    found: dict[str, list[tuple[list[float], float]]] = {fault: [] for fault in FAULTS}
    for _ in range(turns):
        for fault, rounds in found.items():
            rounds.append(measure(shards, fault))
    for fault, rounds in found.items():
        before, during, after = (max(rates[part] for rates, _ in rounds) for part in range(3))
        print(f"  {fault:<32}{before:6.0f} {during:6.0f} {after:6.0f} {min(waited for _, waited in rounds):6.1f} s")
