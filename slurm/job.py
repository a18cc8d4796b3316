"""Callables that submitit pickles and runs on the nodes. They hold a directory and little else, so that last month's
pickles still run."""

from __future__ import annotations

import atexit
import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from submitit import JobEnvironment
from submitit.core.utils import UncompletedJobError
from submitit.helpers import Checkpointable, DelayedSubmission, TorchDistributedEnvironment

from dist_train.monitor.notify import tell_now
from dist_train.outcomes import DIVERGED, FAILED, STOPPED
from dist_train.ranks.kin import bind
from dist_train.ranks.launcher import FINAL, OVER, SUBMITTED, leave
from dist_train.rundir import events, restarts, status
from dist_train.rundir.announcement import Announcement
from dist_train.rundir.checkpoint import newest_name
from dist_train.rundir.last_words import LastWords
from pipelines import kinds
from pipelines.cli import refuse
from pipelines.files import appended
from pipelines.misc import cpus
from pipelines.resolve import FLAG, trust
from pipelines.speech import begin, say
from slurm.cluster import entry
from slurm.snapshot import stranger
from slurm.submissions import Submission, SubmittedRun

PORTS = range(20000, 32000)  # below the ephemeral ports of Linux


class Job(Checkpointable):  # type: ignore[misc]  # submitit's helpers carry no types
    """One rank of a run.

    submitit's SIGUSR2 handler requeues at an arbitrary bytecode. The trainer replaces it with one that only sets a
    flag; the ranks save and leave `train` together, and only then is the old handler called.
    """

    # Of pickles from before there were such things.
    trusting = False
    code: Path | None = None
    link = (0, 0)

    def __init__(self, directory: Path, code: Path | None = None, link: tuple[int, int] = (0, 0)) -> None:
        """
        Args:
            code: the copy from which everything is imported; None: what is there when the job starts.
            link: number in its chain, and length of that; the length is 0 without a chain.
        """
        self.directory, self.code, self.link = directory, code, link
        self.trusting = True  # whoever submitted this has typed the configuration, or trusts its author

    def __call__(self) -> None:
        begin()
        here, announcement = JobEnvironment(), Announcement(self.directory, writes=False)
        _bind(here)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # submitit ignores it, and the trainer's watch is not running yet
        if self.code and (wrong := stranger(self.code)):
            _refuse(wrong, here, announcement, self.directory)
        try:
            self._start(here)
        except UncompletedJobError:  # raised by submitit's handler, before the trainer replaced it: cancelled
            raise
        except Exception as error:  # too early for the trainer to catch: the node may have lost the program
            words, name = LastWords(self.directory, announcement), SubmittedRun(self.directory).name
            words.tellers = [partial(events.tell, self.directory), partial(tell_now, name, self.directory)]
            words.fail(error)

    def _start(self, here: JobEnvironment) -> None:
        requeue: Any = signal.getsignal(signal.SIGUSR2)
        run = SubmittedRun(self.directory)
        # Neighbouring job numbers give different ports, so that jobs on one node do not collide.
        os.environ["MASTER_PORT"] = str(PORTS[int(here.raw_job_id) % len(PORTS)])
        rank = TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True).rank
        submission, (number, length) = _submission(here), self.link
        over = submission.no_requeue
        if number:
            os.environ["SLURM_RESTART_COUNT"] = str(number)  # to the run it is a restart
        if not length or number < length - 1:  # else nothing comes after it
            os.environ[OVER] = str(over)
        _remove_stale(here)
        if rank == 0 and not _begin(run, here):
            os._exit(DIVERGED)  # like a run that diverged, it must not be tried again
        from dist_train.cli import train  # only once this start is recorded: the import may fail

        code = train(["--config", str(run.config_file), "--run.dir", str(self.directory), *[FLAG] * self.trusting])
        if code == STOPPED:  # a chain goes on with its next job
            leave(0 if length and not over.exists() else _come_back(here, rank, requeue, STOPPED))
        if code in FINAL or (length and not code):  # a retry would end the same way
            submission.forbid_requeue()
        if code:
            leave(code)
        atexit.register(leave, 0)  # once submitit has written the result

    def checkpoint(self) -> DelayedSubmission | None:
        """The same job, for submitit to requeue; None if the run is over, or another job of its chain goes on."""
        over = self.link[1] or _submission(JobEnvironment()).no_requeue.exists()
        return None if over else DelayedSubmission(self)


class Pack(Checkpointable):  # type: ignore[misc]
    """Task of a packing array: packs its part of the shards of a source; with `part` None, packs what is missing and
    writes the manifest."""

    # Of pickles from before other sources were packed, which have one path.
    kind: str = kinds.IMAGEFOLDER
    train: bool | None = None

    def __init__(
        self,
        source: Path | Sequence[Path],
        directory: Path,
        options: dict[str, Any],
        part: tuple[int, int] | None,
        kind: str = kinds.IMAGEFOLDER,
        train: bool | None = None,
    ) -> None:
        self.source, self.directory, self.options, self.part = source, directory, options, part
        self.kind, self.train = kind, train

    def __call__(self) -> None:
        begin()
        bind()
        from pipelines.pack import Options, pack, pack_share

        trust(self.kind)  # whoever submitted this has typed it
        paths = [self.source] if isinstance(self.source, Path) else self.source
        source = kinds.kind("submit pack", self.kind).source(kinds.SetPlan(paths, self.train, self.directory))
        # Pickles from before `keep_small` existed have begun sets in which small images are kept.
        task = (source, self.directory, Options(**{"keep_small": True, **self.options}))
        split, workers = self.directory.name, cpus()
        if self.part:
            pack_share(*task, self.part, split=split, workers=workers)
        else:
            pack(*task, split=split, workers=workers)


def _refuse(why: str, here: JobEnvironment, announcement: Announcement, directory: Path) -> NoReturn:
    """Ends a job whose code is not the one that it was submitted with; another try would end the same way."""
    code = refuse(why)
    with suppress(OSError):
        _submission(here).forbid_requeue()
    who = {"rank": here.global_rank, "node": here.hostname, "error": "Refused"}
    if announcement.fail(why, **who):
        with suppress(OSError):
            events.tell(directory, "end", state="failed", reason=why, code=code, requeued=False, **who)
        tell_now(SubmittedRun(directory).name, directory, "end", state="failed", reason=why, code=code, **who)
    leave(code)


def _bind(here: JobEnvironment) -> None:
    """Ties this process to the one that started it; exits at once if that one is gone."""
    bind()
    if here.cluster == "local" and os.getppid() != int(here.job_id):
        leave(FAILED)


def _submission(here: JobEnvironment) -> Submission:
    return Submission(here.job_id, str(here.paths.folder), here.num_tasks, here.cluster == "local")


def _remove_stale(here: JobEnvironment) -> None:
    """Removes files of an earlier start; each rank removes its own. An old result would make a running job look
    finished, and a half-written pickle (`.save_tmp`) would make every later requeue fail."""
    stale = [here.paths.result_pickle]
    if here.global_rank == 0:
        stale.append(here.paths.submitted_pickle)
    for path in stale:
        path.with_name(path.name + ".save_tmp").unlink(missing_ok=True)
    here.paths.result_pickle.unlink(missing_ok=True)


def _begin(run: SubmittedRun, here: JobEnvironment) -> bool:
    """Records this start. Returns False, and says why in status.json, if the last three starts made no progress."""
    history, newest, submission = run.history(), newest_name(run.directory), _submission(here)
    found = status.known(run.directory)
    where = {key: found[key] for key in status.STAYS if key in found}
    failed = str(found["reason"]) if found.get("state") == "failed" else ""
    if crash := run.crash(found):
        failed = crash
        # The start that crashed, if it had claimed the run.
        claimed = {"start": found["start"]} if "start" in found and status.CRASH not in found else {}
        status.write(run.directory, "failed", crash, **where, **claimed, **{status.CRASH: True})
    for link in replace(run.last, folder=submission.folder).links:  # the file may be anybody's
        link.crash.unlink(missing_ok=True)
    last = max((i for i, line in enumerate(history) if "submitted" in line), default=-1)
    starts = history[last + 1 :]
    if restarts.stuck([start["checkpoint"] for start in starts], newest):
        nodes = ", ".join(sorted({node for start in starts[-restarts.LIMIT :] for node in start["nodes"]}))
        nodes += f"; the last one failed: {failed}" if failed else ""
        reason = (
            f"no progress in {restarts.LIMIT} starts (on {nodes}): read the log, fix the cause, then "
            f"`python -m slurm requeue`"
        )
        say(f"error: {reason}")
        for write in (  # most important first; failures on a full disk are ignored
            submission.forbid_requeue,
            partial(status.write, run.directory, "failed", reason, **where),
            partial(events.tell, run.directory, "given_up", reason=reason),
        ):
            with suppress(OSError):
                write()
        tell_now(run.name, run.directory, "given_up", reason=reason)
        return False
    first = last >= 0 and not starts
    os.environ[SUBMITTED] = str(int(history[last]["time"])) if first else ""
    run.append(start=here.job_id, checkpoint=newest, nodes=list(here.hostnames))
    appended(submission.started).close()
    return True


def _come_back(here: JobEnvironment, rank: int, requeue: Any, code: int) -> int:
    """Called once the state is saved. Rank 0 has the job requeued, the others wait to be ended: a rank that returned
    would write a result, and the job would look finished. Returns the exit code, which ends the others."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)
    submission = _submission(here)
    wanted = not submission.no_requeue.exists()
    if rank == 0:
        # SIGTERM precedes a preemption, but also comes with `scancel` and `scontrol requeue`. Slurm knows which: if it
        # is already ending the job, it handles the rest itself.
        if wanted and entry(submission).state == "RUNNING":
            try:
                requeue(signal.SIGUSR2, None)
            except SystemExit as end:
                code = int(end.code or 0) % 256  # tells submitit's local controller to start the job again
        elif not wanted and not submission.local:
            with suppress(OSError):  # an image without Slurm's commands: `cancel` ends the job then
                os.execlp("scancel", "scancel", here.job_id)
    elif not submission.local:
        time.sleep(600)
    return code
