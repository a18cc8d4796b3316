"""`submit --chain N`: a run as N jobs, one after another, where Slurm requeues no job.

They have one name, which no other run has, and `--dependency=singleton` lets one job of a name run at a time. A job
that its time limit stops, or that crashes, just ends, and the next one continues the run. The job in which the run
ends marks that (`<job>.over`), as `cancel` does, and cancels the rest; what it cannot cancel leaves before Python is
started.
"""

from __future__ import annotations

import hashlib
import os
import shlex
from pathlib import Path
from typing import Any

SETUP = """\
# What is left of a chain whose run has ended, or was cancelled, has nothing to do.
if [ -n "$(find FOLDER -maxdepth 1 -name '*.over')" ]; then
  echo "this run has ended before: nothing is left to do for job $SLURM_JOB_ID of its chain"
  REST
  exit 0
fi"""
TEARDOWN = """\
[ -e "$job".over ] && REST"""
REST = 'scancel --state=PENDING --user="$SLURM_JOB_USER" --name="$SLURM_JOB_NAME"'


def chained(wanted: dict[str, Any], folder: Path) -> dict[str, Any]:
    """submitit's parameters for the jobs of a chain, made from those of a job that is requeued.

    Args:
        folder: of the run's Slurm files. The name of the jobs holds a hash of it, since another run, elsewhere, may
            have the same name.
    """
    options = {key: value for key, value in wanted["additional_parameters"].items() if key != "requeue"}
    dependency = ",".join(filter(None, (options.get("dependency"), "singleton")))
    teardown = [line for line in wanted["teardown"] if "scontrol requeue" not in line]
    teardown[-1:] = [TEARDOWN.replace("REST", REST), teardown[-1]]  # before its exit
    setup = SETUP.replace("REST", REST).replace("FOLDER", shlex.quote(str(folder))).splitlines()
    return wanted | {
        "job_name": f"{wanted['job_name']}-{hashlib.sha256(os.fsencode(folder)).hexdigest()[:8]}",
        "additional_parameters": options | {"no-requeue": True, "dependency": dependency},
        "setup": setup + wanted.get("setup", []),
        "teardown": teardown,
    }


def forget_ends(folder: Path) -> None:
    """Removes the marks of earlier submissions, any of which would end a new chain."""
    for mark in folder.glob("*.over"):
        mark.unlink()
