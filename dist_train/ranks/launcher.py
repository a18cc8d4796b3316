"""What starts a process, torchrun or a step of Slurm's, and what passes between the two. Imports no torch.

What torchrun says is in the environment; what it is told is the exit code, and a file whose sentence stands in its
report (https://docs.pytorch.org/docs/stable/elastic/errors.html).
"""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from dist_train.outcomes import DIVERGED, DONE, FAILED, STOPPED
from pipelines.cli import INTERRUPTED, USAGE, heard, refuse
from pipelines.speech import flush, say

SUBMITTED = "DIST_TRAIN_SUBMITTED"  # the variable in which `slurm.job` says so
OVER = "DIST_TRAIN_OVER"  # names the mark that keeps Slurm from bringing the job back
FINAL = (USAGE, DIVERGED)  # codes of ends that another try would not change


class Said(NamedTuple):
    """What a rank has told torchrun: its code, why, whether another try would be in vain, and what failed first."""

    code: int
    sentence: str
    final: bool
    failure: dict[str, Any] | None


def launched() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def submitted() -> bool:
    """Whether submitit did."""
    return "SUBMITIT_EXECUTOR" in os.environ


def rank() -> int:
    """The rank, before there is a process group."""
    return _number("RANK") or (_number("SLURM_PROCID") if submitted() else 0)


def size() -> int:
    """How many ranks there are, before there is a process group."""
    return _number("WORLD_SIZE") or 1


def submitted_at() -> float:
    """When the job was submitted whose first start this is, in Unix's seconds; 0 if it is not the first, or no job."""
    return float(_number(SUBMITTED))


def comes_back() -> bool:
    """Whether Slurm brings this job back after a stop, or a failure that another try may mend. Not after `scancel`,
    which nothing but Slurm knows of."""
    mark = os.environ.get(OVER)
    return submitted() and mark is not None and not os.path.exists(mark)


def job() -> str:
    """The job that this process is of, as Slurm writes it, `12` or `12_3`, or by submitit's number on this machine;
    empty without one."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    here = os.environ.get("SUBMITIT_LOCAL_JOB_ID", "")
    return here or (f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", ""))


def restarts() -> int:
    """How often torchrun has restarted the run by itself."""
    return _number("TORCHELASTIC_RESTART_COUNT")


def brought_back() -> int:
    """How often Slurm has started the job anew, by itself."""
    return _number("SLURM_RESTART_COUNT") if submitted() else 0


def restarted() -> bool:
    """Whether torchrun or Slurm has started the run anew, by itself."""
    return restarts() + brought_back() > 0


def attended() -> bool:
    """Whether somebody sees what this process prints: not in a job, nor after a restart."""
    return not (submitted() or restarted())


def exit_code(code: int) -> int:
    """What this process returns: to torchrun a non-zero code means "start anew", which is not what a stop asks for."""
    return DONE if launched() and code in (STOPPED, INTERRUPTED) else code


def end(code: int, sentence: str, *, at: float = 0, final: bool = False, failure: dict[str, Any] | None = None) -> int:
    """Tell torchrun how this rank ends. Returns the exit code.

    Args:
        at: when, in Unix's seconds, if not now.
        final: another try is not wanted, although the code says nothing of that.
        failure: the first one, of any rank, for the other ranks of this node.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path and exit_code(code) != DONE:
        about = {"message": sentence, "errorCode": code, "final": final or code in FINAL, "failure": failure}
        about["extraInfo"] = {"timestamp": str(int(at or time.time()))}
        with suppress(OSError):  # whole or not at all: torchrun cannot read half of one
            Path(f"{path}.new").write_text(json.dumps({"message": about}), encoding="utf-8")
            os.replace(f"{path}.new", path)
    return exit_code(code)


def end_before() -> Said | None:
    """How the last attempt ended, if torchrun has restarted what no restart mends: torchrun knows failures only."""
    return next((said for said in _told(restarts() - 1) if said.final), None) if restarts() else None


def others_said() -> Said | None:
    """Why another rank of this node has left, but for a stop."""
    stop = (FAILED, True)
    return next((said for said in _told(restarts()) if (said.code, said.final) != stop), None)


def end_refused(error: Exception) -> int:
    """Print the one sentence from rank 0, or in a job from each rank into its log, and tell torchrun. Returns the exit
    code."""
    return end(refuse(error, speaks=rank() == 0 or submitted()), str(error))


def leave(code: int) -> NoReturn:
    """End the process. All is written by now; threads of libraries were seen to abort it while Python unloads them."""
    flush()
    os._exit(code)


def leave_with(main: Callable[[], int]) -> NoReturn:
    """End the process with what `main` returns, or at once after the traceback of what it raises: Python's own way out
    waits for threads, and for other ranks."""
    try:
        code = main()
    except SystemExit as exiting:  # of --help and --print_config
        code = heard(exiting.code if isinstance(exiting.code, int) else int(bool(exiting.code)))
    except BaseException as error:
        say(traceback.format_exc(), end="")
        code = end(FAILED, f"{type(error).__name__}: {error}")
    leave(code)


def _told(attempt: int) -> Iterator[Said]:
    """By the ranks of this node in one of torchrun's attempts; this one has not said anything yet."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        folder = Path(path).parents[1].with_name(f"attempt_{attempt}")  # attempt_<n>/<local rank>/error.json
        for file in sorted(folder.glob("*/error.json")):
            with suppress(OSError, ValueError, KeyError, TypeError):
                said = json.loads(file.read_text(encoding="utf-8"))["message"]
                yield Said(said["errorCode"], said["message"], said["final"], said["failure"])


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdigit() else 0  # what cannot be read, `join` complains of
