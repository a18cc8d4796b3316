"""Slurm's files in a run directory: submissions and starts.

<run>/slurm/config.yaml          the checked configuration; later edits elsewhere do not reach a queued job
<run>/slurm/job.json             the newest submission
<run>/slurm/starts.jsonl         one line per submission and per start
<folder>/<job>_<rank>_log.out    log of one rank over all restarts; `folder` is <run>/slurm, or the sweep's
<folder>/<job>.started           this start reached the trainer: a crash is worth a retry
<folder>/<job>.over              never requeue this job
<folder>/<job>.crash             how the last start ended, as seen by its batch script
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dist_train.rundir import status
from dist_train.rundir.named import RUNS, run_named
from pipelines.errors import UserError, first_line
from pipelines.files import read_json, read_jsonl, read_text, write_atomically
from pipelines.words import nearest


class SlurmError(UserError):
    """A request that cannot be met; its message names the request and the remedy."""


@dataclass(frozen=True)
class Submission:
    """One submission of a run.

    Attributes:
        job: Slurm's job number, `12`, or `12_3` in an array; the process ID of submitit's controller if `local`.
        folder: folder of submitit's files and the logs.
        tasks: number of ranks.
        parameters: submitit's parameters, to submit the same again.
    """

    job: str
    folder: str
    tasks: int
    local: bool
    parameters: dict[str, Any] = field(default_factory=dict)

    @property
    def started(self) -> Path:
        """Marker file of a start that reached the trainer."""
        return Path(self.folder) / f"{self.job}.started"

    @property
    def no_requeue(self) -> Path:
        """Marker file that forbids a requeue."""
        return Path(self.folder) / f"{self.job}.over"  # queued jobs have this name in their teardown

    @property
    def crash(self) -> Path:
        """File in which the batch script recorded a failed start: the time, the most seconds it can have run, its
        exit code, the last error in the logs."""
        return Path(self.folder) / f"{self.job}.crash"

    def log(self, rank: int) -> Path:
        """Log file of one rank."""
        return Path(self.folder) / f"{self.job}_{rank}_log.out"


@dataclass(frozen=True)
class SubmittedRun:
    """A run directory with its Slurm files."""

    directory: Path

    @property
    def name(self) -> str:
        """Name that `find_runs` accepts: relative to `runs/` if the run lies there."""
        try:
            return str(self.directory.relative_to(RUNS.absolute()))
        except ValueError:
            return str(self.directory)

    @property
    def folder(self) -> Path:
        """Folder of the files listed above."""
        return self.directory / "slurm"

    @property
    def config_file(self) -> Path:
        """File of the checked configuration."""
        return self.folder / "config.yaml"

    def config(self) -> dict[str, Any]:
        """The configuration as nested dicts."""
        try:
            config: dict[str, Any] = yaml.safe_load(read_text(self.config_file))
        except yaml.YAMLError as error:
            raise SlurmError(f"{self.config_file} is damaged ({first_line(error)}): restore it") from error
        return config

    def submission(self) -> Submission | None:
        """Latest submission; None before the first."""
        path = self.folder / "job.json"
        return Submission(**read_json(path)) if path.exists() else None

    @property
    def last(self) -> Submission:
        """Latest submission of a run found by `find_runs`."""
        submission = self.submission()
        assert submission
        return submission

    def crash(self, told: Mapping[str, Any]) -> str:
        """How the last start failed, if it could not say so itself because its environment was missing or all its
        processes were killed. Empty if it could, or did not fail.

        Args:
            told: content of status.json.
        """
        try:
            text = self.last.crash.read_text(encoding="utf-8", errors="replace")
            end, seconds, code, error = text.rstrip("\n").split(" ", 3)
            ended, began = float(end), float(end) - float(seconds)
        except (OSError, ValueError):  # missing or half written
            return ""
        heartbeat = told.get("heartbeat", 0)
        said = told.get("state") in status.OVER and status.CRASH not in told  # else it is of the start before that one
        if heartbeat > ended or (heartbeat >= began and said):
            return ""
        return f"exit code {code}: {error or 'see the log'}"

    def submitted(self, submission: Submission) -> None:
        """Records a new submission. It gets three starts of its own to make progress."""
        write_atomically(self.folder / "job.json", json.dumps(asdict(submission), indent=1).encode())
        self.append(submitted=submission.job)

    def append(self, **values: Any) -> None:
        """Appends a line to starts.jsonl."""
        with open(self.folder / "starts.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"time": time.time(), **values}) + "\n")

    def history(self) -> list[dict[str, Any]]:
        """Lines of starts.jsonl, oldest first."""
        return read_jsonl(self.folder / "starts.jsonl")


def find_runs(text: str) -> list[SubmittedRun]:
    """The run at this path or of this name under `runs/`, or the members of this sweep. Raises SlurmError."""
    for path in (Path(text).absolute(), (RUNS / text).absolute()):
        if SubmittedRun(path).submission():
            return [SubmittedRun(path)]
        if members := sorted(path.glob("*/slurm/job.json")):
            return [SubmittedRun(record.parent.parent) for record in members]
    if (run := run_named(text)).is_dir():
        raise SlurmError(f"{run} was never submitted, so it has no job: `python -m slurm submit` submits a run")
    names = [run.name for run in all_runs()]
    if meant := nearest(text, names):
        raise SlurmError(f"no submitted run {text!r}: did you mean {meant}?")
    known = ", ".join(names) or "none"
    raise SlurmError(f"no submitted run {text!r}: give its directory, or its name under {RUNS}/ (there: {known})")


def all_runs() -> list[SubmittedRun]:
    """Submitted runs under `runs/`, including members of sweeps, oldest first."""
    records = [*RUNS.glob("*/slurm/job.json"), *RUNS.glob("*/*/slurm/job.json")]
    records.sort(key=lambda path: path.stat().st_mtime)
    return [SubmittedRun(path.parent.parent.absolute()) for path in records]
