"""Files of the cluster in a run directory: what was submitted, and what became of it.

<run>/slurm/config.yaml          the configuration that was checked; what is edited later does not reach a queued job
<run>/slurm/job.json             the newest submission
<run>/slurm/starts.jsonl         one line per submission, one per start
<folder>/<job>_<rank>_log.out    log of one rank over all restarts; `folder` is <run>/slurm, or the sweep's
<folder>/<job>.started           this start reached the trainer: a crash is worth another try
<folder>/<job>.over              never put this job back into the queue
<folder>/<job>.crash             how the last start ended, as its batch script saw it
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
from pipelines.errors import UserError, first_line
from pipelines.files import read_json, read_jsonl, read_text, write_atomically

ROOT = Path("runs")


class SlurmError(UserError):
    """A request that cannot be met; the message names it and the remedy."""


@dataclass(frozen=True)
class Submission:
    """One submission of a run.

    Attributes:
        job: Slurm's number, `12` or `12_3` in an array; the process number of submitit's controller if `local`.
        folder: of submitit's files and the logs.
        tasks: number of ranks.
        parameters: submitit's, to submit the same again.
    """

    job: str
    folder: str
    tasks: int
    local: bool
    parameters: dict[str, Any] = field(default_factory=dict)

    @property
    def started(self) -> Path:
        """Mark of a start that reached the trainer."""
        return Path(self.folder) / f"{self.job}.started"

    @property
    def no_requeue(self) -> Path:
        """Mark that forbids a requeue."""
        return Path(self.folder) / f"{self.job}.over"  # the name that the teardown of queued jobs knows

    @property
    def crash(self) -> Path:
        """What the batch script noted when a start failed: the time, for how many seconds it had run at most, its
        exit code, the last error in the logs."""
        return Path(self.folder) / f"{self.job}.crash"

    def log(self, rank: int) -> Path:
        """Log file of one rank."""
        return Path(self.folder) / f"{self.job}_{rank}_log.out"


@dataclass(frozen=True)
class SubmittedRun:
    """A run directory, seen from the cluster."""

    directory: Path

    @property
    def name(self) -> str:
        """Name that `find_runs` takes: relative to `runs/` if the run lies there."""
        try:
            return str(self.directory.relative_to(ROOT.absolute()))
        except ValueError:
            return str(self.directory)

    @property
    def folder(self) -> Path:
        """Directory of the files above."""
        return self.directory / "slurm"

    @property
    def config_file(self) -> Path:
        """The checked configuration."""
        return self.folder / "config.yaml"

    def config(self) -> dict[str, Any]:
        """The configuration as nested dicts."""
        try:
            config: dict[str, Any] = yaml.safe_load(read_text(self.config_file))
        except yaml.YAMLError as error:
            raise SlurmError(f"{self.config_file} is damaged ({first_line(error)}): restore it") from error
        return config

    def submission(self) -> Submission | None:
        """The newest submission; None before the first."""
        path = self.folder / "job.json"
        return Submission(**read_json(path)) if path.exists() else None

    @property
    def last(self) -> Submission:
        """The newest submission of a run that `find_runs` gave."""
        submission = self.submission()
        assert submission
        return submission

    def crash(self, told: Mapping[str, Any]) -> str:
        """How the last start failed, where it could not say so itself: the environment was not there, or all its
        processes were killed. Empty where it could, or has not failed.

        Args:
            told: what status.json says.
        """
        try:
            text = self.last.crash.read_text(encoding="utf-8", errors="replace")
            end, seconds, code, error = text.rstrip("\n").split(" ", 3)
            ended, began = float(end), float(end) - float(seconds)
        except (OSError, ValueError):  # nothing is there, or half of it
            return ""
        heartbeat = told.get("heartbeat", 0)
        said = told.get("state") in status.OVER and status.CRASH not in told  # else it is of the start before that one
        if heartbeat > ended or (heartbeat >= began and said):
            return ""
        return f"exit code {code}: {error or 'see the log'}"

    def submitted(self, submission: Submission) -> None:
        """Keep a new submission. It gets its own three starts to make progress."""
        write_atomically(self.folder / "job.json", json.dumps(asdict(submission), indent=1).encode())
        self.append(submitted=submission.job)

    def append(self, **values: Any) -> None:
        """Add a line to starts.jsonl."""
        with open(self.folder / "starts.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"time": time.time(), **values}) + "\n")

    def history(self) -> list[dict[str, Any]]:
        """The lines of starts.jsonl, oldest first."""
        return read_jsonl(self.folder / "starts.jsonl")


def find_runs(text: str) -> list[SubmittedRun]:
    """The run of that path, or of that name under `runs/`; or the members of that sweep. Raises SlurmError."""
    for path in (Path(text).absolute(), (ROOT / text).absolute()):
        if SubmittedRun(path).submission():
            return [SubmittedRun(path)]
        if members := sorted(path.glob("*/slurm/job.json")):
            return [SubmittedRun(record.parent.parent) for record in members]
    known = ", ".join(run.name for run in all_runs()) or "none"
    raise SlurmError(f"no submitted run {text!r}: give its directory, or its name under {ROOT}/ (there: {known})")


def all_runs() -> list[SubmittedRun]:
    """The submitted runs under `runs/`, members of sweeps included, oldest first."""
    records = [*ROOT.glob("*/slurm/job.json"), *ROOT.glob("*/*/slurm/job.json")]
    records.sort(key=lambda path: path.stat().st_mtime)
    return [SubmittedRun(path.parent.parent.absolute()) for path in records]
