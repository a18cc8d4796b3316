"""A sweep on this machine: `python -m slurm.local`, started by `submit --local --array`, starts its runs in turn.

It is told the directories of the runs on stdin, as JSON. A run that waits has the job `<process>_<number>`, and is left
out if the file `.over` of that job is there.
"""

from __future__ import annotations

import json
import sys
import time
from itertools import count
from pathlib import Path

from slurm import cluster
from slurm.submissions import Submission, SubmittedRun
from slurm.submit import launch

PERIOD = 0.5  # seconds between two looks at what runs


def run_in_turn(runs: list[SubmittedRun]) -> None:
    """Starts waiting runs, and returns once the last one has started. Those that run at once have GPUs of their own."""
    running: dict[int, Submission] = {}  # by place
    for run in runs:
        waiting = run.last
        wanted = waiting.parameters
        while len(running) >= wanted.get("array_parallelism", 1):
            time.sleep(PERIOD)
            running = {place: submission for place, submission in running.items() if not cluster.ended(submission)}
        if waiting.no_requeue.exists() or run.last != waiting:
            continue
        place = next(place for place in count() if place not in running)
        gpus = wanted.get("gpus_per_node", 0)
        wanted = wanted | {"visible_gpus": list(range(place * gpus, (place + 1) * gpus))}
        (running[place],) = launch([run], Path(waiting.folder), wanted, local=True)
        if waiting.no_requeue.exists():  # cancelled meanwhile
            running[place].cancel()
            cluster.stop(running[place])


def main() -> int:
    """The queue of one sweep."""
    directories: list[str] = json.loads(sys.stdin.read() or "[]")
    run_in_turn([SubmittedRun(Path(directory)) for directory in directories])
    return 0


if __name__ == "__main__":
    sys.exit(main())
