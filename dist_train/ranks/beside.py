"""A process beside a rank: it ends with the rank, uses only idle CPU time, and sees no GPU.

Imports no torch.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from dist_train.outcomes import FAILED
from dist_train.ranks.kin import PR_SET_PDEATHSIG
from dist_train.ranks.launcher import leave

PARENT = "DIST_TRAIN_BESIDE"  # environment variable with the pid of the process that it ends with
LEAST = 19  # niceness
ROOT = Path(__file__).parents[2]
# `python -m`, but of the packages that this process runs: in the current directory there may be others.
PROGRAM = "import runpy, sys; sys.path.insert(0, {root!r}); runpy.run_module({module!r}, None, '__main__', True)"
# Variables of launchers and readers that are meant for the rank alone; the last of the prefixes include secrets.
RANKS = ("RANK", "WORLD_SIZE")
KEPT = ("SLURM_TMPDIR", "SLURM_JOB_ID", "SLURM_JOBID", "SLURM_JOB_USER")  # by which a site names a job's scratch
PREFIXES = ("MASTER_", "TORCHELASTIC_", "SUBMITIT_", "SLURM_", "DIST_TRAIN_", "WANDB_")


def start(module: str, words: Sequence[str], output: IO[bytes]) -> subprocess.Popen[bytes]:
    """Start `python -m MODULE WORDS`, which must call `settle` first. It ends no later than the calling thread. Raises
    OSError.

    Args:
        output: file for its stdout and stderr.
    """
    own = {k for k in os.environ if k.endswith(RANKS) or k.startswith(PREFIXES)} - set(KEPT)
    kept = {k: v for k, v in os.environ.items() if k not in own}
    told = {PARENT: str(os.getpid()), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    # No preexec_fn: it could deadlock, since a trainer has threads.
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(root=str(ROOT), module=module), *words],
        env=kept | told,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
    )


def settle() -> None:
    """Set this process up as one beside a rank, if `start` started it. To be called before torch is imported."""
    if not (parent := os.environ.pop(PARENT, "")):
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if str(os.getppid()) != parent:  # the parent is already gone
        leave(FAILED)
    os.setpgrp()  # Ctrl-C is for the run. No new session: the kernel may divide the CPU by session
    os.nice(LEAST)
    with suppress(OSError):  # first to be killed if memory runs out
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
