"""Communication with the launcher of a process, torchrun or a Slurm step. Imports no torch.

torchrun passes information in the environment; it gets the exit code, and an error file whose message appears in its
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
from pipelines.files import write_atomically
from pipelines.speech import flush, say

SUBMITTED = "DIST_TRAIN_SUBMITTED"  # environment variable set by `slurm.job`: when the job was submitted
OVER = "DIST_TRAIN_OVER"  # environment variable: path of the file that keeps the job from being requeued
SPOKEN = 2.0  # seconds in which rank 0 of this node says what all refuse
FINAL = (USAGE, DIVERGED)  # exit codes that a retry would not change


class Said(NamedTuple):
    """A rank's report to torchrun: exit code, reason, whether a retry is useless, and the first failure."""

    code: int
    sentence: str
    final: bool
    failure: dict[str, Any] | None


def launched() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def submitted() -> bool:
    """Whether submitit started this process."""
    return "SUBMITIT_EXECUTOR" in os.environ


def rank() -> int:
    """This process's rank, before there is a process group."""
    return _number("RANK") or (_number("SLURM_PROCID") if submitted() else 0)


def size() -> int:
    """Number of ranks, before there is a process group."""
    return _number("WORLD_SIZE") or 1


def submitted_at() -> float:
    """Submission time of the job, Unix time in seconds; 0 if this is not its first start, or there is no job."""
    return float(_number(SUBMITTED))


def comes_back() -> bool:
    """Whether Slurm requeues this job after a stop, or a failure that a retry may mend. Not after `scancel`, which only
    Slurm knows of."""
    mark = os.environ.get(OVER)
    return submitted() and mark is not None and not os.path.exists(mark)


def job() -> str:
    """Job id as Slurm writes it, `12` or `12_3`, or submitit's number for a local job; empty without a job."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    here = os.environ.get("SUBMITIT_LOCAL_JOB_ID", "")
    return here or (f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", ""))


def restarts() -> int:
    """Number of automatic restarts by torchrun."""
    return _number("TORCHELASTIC_RESTART_COUNT")


def brought_back() -> int:
    """Number of automatic restarts of the job by Slurm."""
    return _number("SLURM_RESTART_COUNT") if submitted() else 0


def restarted() -> bool:
    """Whether torchrun or Slurm has restarted the run automatically."""
    return restarts() + brought_back() > 0


def attended() -> bool:
    """Whether somebody reads what this process prints: not in a job, nor after a restart."""
    return not (submitted() or restarted())


def exit_code(code: int) -> int:
    """Exit code for the launcher: 0 for a stop under torchrun, which would restart on any other code."""
    return DONE if launched() and code in (STOPPED, INTERRUPTED) else code


def end(code: int, sentence: str, *, at: float = 0, final: bool = False, failure: dict[str, Any] | None = None) -> int:
    """Report to torchrun how this rank ends. Returns the exit code.

    Args:
        at: time of the failure, Unix time in seconds; 0: now.
        final: whether no retry is wanted, although the code does not say so.
        failure: first failure of any rank, for the other ranks on this node.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path and exit_code(code) != DONE:
        about = {"message": sentence, "errorCode": code, "final": final or code in FINAL, "failure": failure}
        about["extraInfo"] = {"timestamp": str(int(at or time.time()))}
        with suppress(OSError):  # atomically: torchrun cannot read a partial file
            write_atomically(Path(path), json.dumps({"message": about}).encode(), durable=False)
    return exit_code(code)


def end_before() -> Said | None:
    """End of the last attempt, if torchrun restarted despite an end that no restart mends."""
    return next((said for said in _told(restarts() - 1) if said.final), None) if restarts() else None


def others_said() -> Said | None:
    """Report of another rank on this node that has exited, stops aside."""
    stop = (FAILED, True)
    return next((said for said in _told(restarts()) if (said.code, said.final) != stop), None)


def end_refused(error: Exception) -> int:
    """Print the error sentence, on rank 0 or, in a job, on each rank to its log, and report it to torchrun. Returns the
    exit code."""
    return end_behind(refuse(error, speaks=rank() == 0 or submitted()), str(error))


def end_behind(code: int, sentence: str) -> int:
    """Like `end`, but a rank that leaves the sentence to rank 0 lets that say it first."""
    until = time.monotonic() + SPOKEN
    while launched() and rank() and not submitted() and others_said() is None and time.monotonic() < until:
        time.sleep(0.02)  # torchrun ends rank 0 as soon as this one is gone
    return end(code, sentence)


def leave(code: int) -> NoReturn:
    """End the process once all is written. Skips Python's exit, in which library threads were seen to abort."""
    flush()
    os._exit(code)


def leave_with(main: Callable[[], int]) -> NoReturn:
    """End the process with the exit code of `main`, or at once after the traceback of its exception: Python's own exit
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
    """Reports of the ranks on this node in one of torchrun's attempts."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        folder = Path(path).parents[1].with_name(f"attempt_{attempt}")  # attempt_<n>/<local rank>/error.json
        for file in sorted(folder.glob("*/error.json")):
            with suppress(OSError, ValueError, KeyError, TypeError):
                said = json.loads(file.read_text(encoding="utf-8"))["message"]
                yield Said(said["errorCode"], said["message"], said["final"], said["failure"])


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdigit() else 0  # `join` reports invalid values
