"""Slurm's files in a run directory: submissions and starts.

<run>/slurm/config.yaml          the checked configuration; later edits elsewhere do not reach a queued job
<run>/slurm/job.json             the newest submission: for `status`, `logs` and `cancel`; nothing of it is executed
<run>/slurm/starts.jsonl         one line per submission and per start
<folder>/<job>_<rank>_log.out    log of one rank over all restarts; `folder` is <run>/slurm, or the sweep's
<folder>/<job>.started           this start reached the trainer: a crash is worth a retry
<folder>/<job>.over              never requeue this job; it holds a word if that is because the run was cancelled
<folder>/<job>.crash             how the last start ended, as seen by its batch script
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from dist_train.rundir import lines, status
from dist_train.rundir.ledger import Seconds
from dist_train.rundir.named import RUNS, relative_name, run_named
from pipelines import yamls
from pipelines.errors import UserError
from pipelines.files import appended, read_file, write_atomically
from pipelines.valid import Count, Invalid, made_of, parsed
from pipelines.words import nearest

JobNumber = Annotated[str, Field(pattern=r"^[0-9]{1,10}(_[0-9]{1,10})?$")]
AbsolutePath = Annotated[str, Field(pattern=r"^/[^\x00-\x1f]*$")]
MOST = 1 << 22  # bytes of a file; a start takes some 200
CHAIN = 1000  # jobs at most
CANCELLED = "cancelled\n"  # what `cancel` writes into <job>.over


class SlurmError(UserError):
    """A request that cannot be met; its message names the request and the remedy."""


@dataclass(frozen=True)
class Submission:
    """One submission of a run.

    Attributes:
        job: Slurm's job number, `12`, or `12_3` in an array, or the first one of a chain; if `local` the process ID of
            submitit's controller, or `12_3` while the run waits for its turn in the queue of process 12.
        folder: folder of submitit's files and the logs.
        tasks: number of ranks.
        chain: all jobs of a chain, in order; empty without one.
    """

    job: JobNumber
    folder: AbsolutePath
    tasks: Count
    local: bool
    chain: Annotated[list[JobNumber], Field(max_length=CHAIN)] = field(default_factory=list)

    @property
    def links(self) -> list[Submission]:
        """One submission per job of a chain; itself without one."""
        return [replace(self, job=job, chain=[]) for job in self.chain] or [self]

    @property
    def subject(self) -> str:
        """Its jobs as the subject of a sentence, and the verb."""
        jobs = [link.job for link in self.links]
        return f"job {jobs[0]} is" if len(jobs) == 1 else f"jobs {', '.join(jobs)} are"

    @property
    def waits(self) -> bool:
        """True if it is in a queue of this machine (`slurm.local`), not yet started."""
        return self.local and "_" in self.job

    @property
    def started(self) -> Path:
        """Marker file of a start that reached the trainer."""
        return Path(self.folder) / f"{self.job}.started"

    @property
    def no_requeue(self) -> Path:
        """Marker file that forbids a requeue."""
        return Path(self.folder) / f"{self.job}.over"  # queued jobs have this name in their teardown

    def forbid_requeue(self) -> None:
        """Forbids a requeue; what a mark says already stays."""
        appended(self.no_requeue).close()

    def cancel(self) -> None:
        """Forbids a requeue, and notes that it was the user who did."""
        for link in self.links:
            write_atomically(link.no_requeue, CANCELLED.encode())

    @property
    def cancelled(self) -> bool:
        """True if the user has cancelled it."""
        with suppress(OSError, ValueError):
            return read_file(self.links[0].no_requeue, MOST) == CANCELLED.encode()
        return False

    @property
    def crash(self) -> Path:
        """File in which the batch script recorded a failed start: the time, the most seconds it can have run, its
        exit code, the last error in the logs."""
        return Path(self.folder) / f"{self.job}.crash"

    def log(self, rank: int) -> Path:
        """Log file of one rank."""
        return Path(self.folder) / f"{self.job}_{rank}_log.out"


@dataclass
class _Train:
    epochs: Count


@dataclass
class _Config:
    """The format of config.yaml: what is read of it here; the trainer checks the whole."""

    train: _Train


@dataclass
class _Start:
    """The format of a line of starts.jsonl: of a submission, or of a start and what it found."""

    time: Seconds = 0.0
    submitted: str = ""
    start: str = ""
    checkpoint: str = ""
    nodes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class SubmittedRun:
    """A run directory with its Slurm files."""

    directory: Path

    @property
    def name(self) -> str:
        """Name that `find_runs` accepts: relative to `runs/` if the run lies there."""
        return relative_name(self.directory)

    @property
    def folder(self) -> Path:
        """Folder of the files listed above."""
        return self.directory / "slurm"

    @property
    def config_file(self) -> Path:
        """File of the checked configuration."""
        return self.folder / "config.yaml"

    @property
    def job_file(self) -> Path:
        """File of the newest submission."""
        return self.folder / "job.json"

    def config(self) -> dict[str, Any]:
        """The configuration as nested dicts. Raises OSError, and SlurmError for a damaged file."""
        try:
            config = yamls.groups(yamls.load(yamls.read(self.config_file)))
            made_of(_Config, config)
            return config
        except yamls.NoYaml as error:
            raise SlurmError(f"{self.config_file} {error}") from error
        except Invalid as error:
            raise SlurmError(f"{self.config_file} is damaged ({error}): restore it, or submit the run again") from error

    def submission(self) -> Submission | None:
        """Latest submission; None before the first. Raises SlurmError."""
        if not self.job_file.exists():
            return None
        try:
            return parsed(Submission, read_file(self.job_file, MOST))
        except Invalid as error:
            raise SlurmError(
                f"{self.job_file} is damaged ({error}): restore it, or move it away and submit the run again"
            ) from error

    @property
    def last(self) -> Submission:
        """Latest submission of a run found by `find_runs`."""
        submission = self.submission()
        assert submission
        return submission

    def check_folder(self, submission: Submission) -> None:
        """Raises SlurmError unless the files of a submission lie with the run or with its sweep: only there is written
        what the file of a run says."""
        place = Path(os.path.realpath(self.directory))
        own = [folder for folder in (place / "slurm", place.parent / "slurm") if not folder.is_symlink()]
        if Path(os.path.realpath(submission.folder)) not in own:
            raise SlurmError(
                f"{self.job_file} names the folder {submission.folder}, which is not that of this run: submit the run "
                f"again from where it lies now"
            )

    def crash(self, told: Mapping[str, Any]) -> str:
        """How the last start failed, if it could not say so itself because its environment was missing or all its
        processes were killed. Empty if it could, or did not fail.

        Args:
            told: content of status.json.
        """
        try:
            file = next(link.crash for link in reversed(self.last.links) if link.crash.exists())
            text = read_file(file, MOST).decode(errors="replace")
            end, seconds, code, error = text.rstrip("\n").split(" ", 3)
            ended, began = float(end), float(end) - float(seconds)
        except (OSError, StopIteration, ValueError):  # missing or half written
            return ""
        heartbeat = told.get("heartbeat", 0)
        said = told.get("state") in status.OVER and status.CRASH not in told  # else it is of the start before that one
        if heartbeat > ended or (heartbeat >= began and said):
            return ""
        return f"exit code {code}: {error or 'see the log'}"

    def submitted(self, submission: Submission) -> None:
        """Records a new submission. It gets three starts of its own to make progress."""
        before = self.submission()
        self.record(submission)
        if not (before and before.waits and not submission.waits):  # it was submitted when it began to wait
            self.append(submitted=submission.job)

    def record(self, submission: Submission) -> None:
        """Writes the newest submission, or more of it: a job that its chain has got meanwhile."""
        write_atomically(self.job_file, json.dumps(asdict(submission), indent=1).encode())

    def append(self, **values: Any) -> None:
        """Appends a line to starts.jsonl."""
        lines.append(self.folder / "starts.jsonl", {"time": time.time(), **values})

    def history(self) -> list[dict[str, Any]]:
        """Lines of starts.jsonl, oldest first, without those that a kill has torn. Raises OSError, and UserError for a
        damaged file."""
        return lines.read(self.folder / "starts.jsonl", _Start, MOST)


def find_runs(text: str) -> list[SubmittedRun]:
    """The run at this path or of this name under `runs/`, or the members of this sweep; `SWEEP/0` is its first one.
    Raises SlurmError."""
    for path in (Path(text).absolute(), (RUNS / text).absolute()):
        if SubmittedRun(path).job_file.exists():
            return [SubmittedRun(path)]
        if members := _members(path):
            return members
        of_sweep = os.sep in text and path.parent != RUNS.absolute() and path.name.isdecimal()
        if of_sweep and (members := _members(path.parent)):
            found = [run for run in members if run.directory.name.startswith(f"{int(path.name)}-")]
            if not found:
                raise SlurmError(
                    f"{Path(text).parent} has no run {path.name}: its {len(members)} runs are numbered "
                    f"{_number(members[0])} to {_number(members[-1])}"
                )
            return found
    if (run := run_named(text)).is_dir():
        raise SlurmError(f"{run} was never submitted, so it has no job: `python -m slurm submit` submits a run")
    names = [run.name for run in all_runs()]
    if meant := nearest(text, names):
        raise SlurmError(f"no submitted run {text!r}: did you mean {meant}?")
    known = ", ".join(names) or "none"
    raise SlurmError(f"no submitted run {text!r}: give its directory, or its name under {RUNS}/ (there: {known})")


def _members(sweep: Path) -> list[SubmittedRun]:
    """Submitted runs of a sweep, in the order of their numbers."""
    runs = [SubmittedRun(record.parent.parent) for record in sweep.glob("*/slurm/job.json")]
    return sorted(runs, key=lambda run: (_number(run), run.directory))


def _number(run: SubmittedRun) -> int:
    """Number of a run in its sweep: `1-optim.lr=0.02` is 1."""
    found = re.match(r"\d+(?=-)", run.directory.name)
    return int(found[0]) if found else 0


def all_runs() -> list[SubmittedRun]:
    """Submitted runs under `runs/`, including members of sweeps, oldest first."""
    found = [[SubmittedRun(path.parent.parent.absolute())] for path in RUNS.glob("*/slurm/job.json")]
    found += [_members(sweep.absolute()) for sweep in RUNS.glob("*/")]
    found = sorted(filter(None, found), key=lambda runs: min(map(_when, runs)))
    return [run for runs in found for run in runs]


def _when(run: SubmittedRun) -> float:
    """When a run was submitted last, Unix time in seconds; 0 if that cannot be known."""
    with suppress(OSError):
        return run.job_file.stat().st_mtime
    return 0.0
