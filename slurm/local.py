"""A sweep on this machine: `python -m slurm.local`, started by `submit --local --array`, starts its runs in turn.

It is told the directories of the runs and their parameters on stdin, as JSON; its argument is the folder of their
files, by which `cluster` knows it. A run that waits has the job `<process>_<number>`, and is left out if the file
`.over` of that job is there.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

from slurm import cluster
from slurm.submissions import SlurmError, Submission, SubmittedRun
from slurm.submit import launch

PERIOD = 0.5  # seconds between two looks at what runs


def run_in_turn(runs: list[SubmittedRun], folder: Path, wanted: dict[str, Any]) -> None:
    """Starts waiting runs, and returns once the last one has started. Those that run at once have GPUs of their own."""
    running: dict[int, Submission] = {}  # by place
    gpus = wanted.get("gpus_per_node", 0)
    for number, run in enumerate(runs):
        waiting = Submission(f"{os.getpid()}_{number}", str(folder), wanted["ntasks_per_node"], local=True)
        while len(running) >= wanted.get("array_parallelism", 1):
            time.sleep(PERIOD)
            running = {place: submission for place, submission in running.items() if not cluster.ended(submission)}
        if waiting.no_requeue.exists() or not _is_last(run, waiting):
            continue
        place = next(place for place in count() if place not in running)
        visible = {"visible_gpus": list(range(place * gpus, (place + 1) * gpus))}
        (running[place],) = launch([run], folder, wanted | visible, local=True)
        if waiting.no_requeue.exists():  # cancelled meanwhile
            running[place].cancel()
            cluster.stop(running[place])


def _is_last(run: SubmittedRun, submission: Submission) -> bool:
    with suppress(OSError, SlurmError):
        return run.submission() == submission
    return False  # somebody has damaged its file: the others shall have their turn


def main() -> int:
    """The queue of one sweep."""
    if told := sys.stdin.read():  # else whoever started it has failed
        found = json.loads(told)
        run_in_turn([SubmittedRun(Path(directory)) for directory in found["runs"]], Path(sys.argv[1]), found["wanted"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
