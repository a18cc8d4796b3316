"""What runs on the nodes: the callables that submitit pickles. They hold a directory and little else, so that a pickle
of last month still runs."""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from submitit import JobEnvironment
from submitit.helpers import Checkpointable, DelayedSubmission, TorchDistributedEnvironment

from pipelines.files import write_atomically
from slurm.cluster import entry
from slurm.submissions import Run, Submission, mark

PORTS = range(20000, 32000)  # below those that Linux hands out by itself
GIVEN_UP = 70  # as the trainer's code for what must not be tried again
STARTS = 3  # without a newer checkpoint, after which a run is given up


class Job(Checkpointable):  # type: ignore[misc]  # submitit's helpers carry no types
    """One rank of a run.

    submitit's handler of SIGUSR2 requeues at an arbitrary bytecode. The trainer replaces it by one that only sets a
    flag, the ranks save and leave `main` together, and only then is the old handler called.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __call__(self) -> None:
        requeue: Any = signal.getsignal(signal.SIGUSR2)
        run, here = Run(self.directory), JobEnvironment()
        # Neighbouring job numbers give different ports, so that jobs on one node do not meet.
        os.environ["MASTER_PORT"] = str(PORTS[int(here.raw_job_id) % len(PORTS)])
        rank = TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True).rank
        _remove_stale(here)
        if rank == 0 and not _begin(run, here):
            os._exit(GIVEN_UP)
        from dist_train.__main__ import leave, main
        from dist_train.ranks.world import DIVERGED, STOPPED, USAGE

        code = main(["--config", str(run.config_file), "--run.dir", str(self.directory)])
        if code == STOPPED:
            leave(_come_back(here, rank, requeue, STOPPED))
        if code in (DIVERGED, USAGE):  # trying again would end in the same way
            _over(here).touch()
        if code:
            leave(code)
        atexit.register(leave, 0)  # once submitit has written the result

    def checkpoint(self) -> DelayedSubmission | None:
        """submitit's question on what to run next: the same, unless the run is over."""
        return None if _over(JobEnvironment()).exists() else DelayedSubmission(self)


class Pack(Checkpointable):  # type: ignore[misc]
    """A task of a packing array: its part of the shards of an image folder, or with `part` None what is missing, and
    the manifest."""

    def __init__(self, source: Path, directory: Path, options: dict[str, Any], part: tuple[int, int] | None) -> None:
        self.source, self.directory, self.options, self.part = source, directory, options, part

    def __call__(self) -> None:
        from pipelines.pack import Options, pack, pack_share
        from pipelines.sources import ImageFolder

        task = (ImageFolder(self.source), self.directory, Options(**self.options))
        split, workers = self.directory.name, len(os.sched_getaffinity(0))
        if self.part:
            pack_share(*task, self.part, split=split, workers=workers)
        else:
            pack(*task, split=split, workers=workers)


def _over(here: JobEnvironment) -> Path:
    return mark(here.paths.folder, here.job_id, "over")


def _remove_stale(here: JobEnvironment) -> None:
    """An earlier start's result makes a running job look finished, and its half-written pickle (`.save_tmp`) makes
    every later requeue fail. Each rank removes its own."""
    stale = [here.paths.result_pickle] + ([here.paths.submitted_pickle] if here.global_rank == 0 else [])
    for path in stale:
        path.with_name(path.name + ".save_tmp").unlink(missing_ok=True)
    here.paths.result_pickle.unlink(missing_ok=True)


def _begin(run: Run, here: JobEnvironment) -> bool:
    """Note this start. False where the last ones brought nothing, after saying so in status.json."""
    story, newest = run.story(), run.newest_checkpoint()
    last = max((i for i, line in enumerate(story) if "submitted" in line), default=-1)
    starts = story[last + 1 :]
    if len(starts) >= STARTS and all(start["checkpoint"] == newest for start in starts[-STARTS:]):
        nodes = ", ".join(sorted({node for start in starts[-STARTS:] for node in start["nodes"]}))
        reason = f"no progress in {STARTS} starts (on {nodes}): read the log, mend it, then `python -m slurm requeue`"
        print(f"error: {reason}", file=sys.stderr)
        status = run.status() | {"state": "failed", "reason": reason, "heartbeat": time.time()}
        write_atomically(run.directory / "status.json", json.dumps(status, indent=1).encode())
        _over(here).touch()
        return False
    run.tell(start=here.job_id, checkpoint=newest, nodes=list(here.hostnames))
    mark(here.paths.folder, here.job_id, "started").touch()
    return True


def _come_back(here: JobEnvironment, rank: int, requeue: Any, code: int) -> int:
    """The state is saved. Rank 0 sees to it that the job comes back, the others wait to be ended: a rank that returned
    would leave a result, and the job would look finished. Returns the exit code, which ends the others."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)
    local = here.cluster == "local"
    over = _over(here).exists()
    if rank == 0:
        # SIGTERM comes before a preemption, but also with `scancel` and `scontrol requeue`. Slurm knows which: of a job
        # that it is ending already it takes care itself.
        ours = Submission(here.job_id, str(here.paths.folder), here.num_tasks, local)
        if not over and entry(ours).state == "RUNNING":
            try:
                requeue(signal.SIGUSR2, None)
            except SystemExit as end:
                code = int(end.code or 0) % 256  # to submitit's local controller it means "start me again"
        elif over and not local:
            os.execlp("scancel", "scancel", here.job_id)
    elif not local:
        time.sleep(600)
    return code
