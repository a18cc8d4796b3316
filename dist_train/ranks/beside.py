"""A process that works beside a rank: it ends with it, takes only what nobody else wants of the CPU, and sees no GPU.

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

PARENT = "DIST_TRAIN_BESIDE"  # in its environment: the number of the process that it ends with
LEAST = 19  # niceness
# What a launcher, or whoever shows a run, has said to the rank alone; the last of the prefixes are secrets.
RANKS = ("RANK", "WORLD_SIZE")
PREFIXES = ("MASTER_", "TORCHELASTIC_", "SUBMITIT_", "SLURM_", "DIST_TRAIN_", "WANDB_")


def start(module: str, words: Sequence[str], output: IO[bytes]) -> subprocess.Popen[bytes]:
    """Start `python -m MODULE WORDS`, where `settle` is called first. It ends at the latest with the thread that starts
    it. Raises OSError.

    Args:
        output: a file for what it writes.
    """
    kept = {k: v for k, v in os.environ.items() if not k.endswith(RANKS) and not k.startswith(PREFIXES)}
    told = {PARENT: str(os.getpid()), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    # No preexec_fn: it could hang among the threads of a trainer.
    return subprocess.Popen(
        [sys.executable, "-m", module, *words],
        env=kept | told,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
    )


def settle() -> None:
    """Let this process be such a one, if it was started so. To be called before torch is imported."""
    if not (parent := os.environ.pop(PARENT, "")):
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if str(os.getppid()) != parent:  # it was gone before
        leave(FAILED)
    os.setpgrp()  # a Ctrl-C is for the run. No session of its own: the kernel may share the CPU out among sessions
    os.nice(LEAST)
    with suppress(OSError):  # who wants too much memory is ended first
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
