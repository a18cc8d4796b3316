"""What a run directory holds of the cluster.

<run>/slurm/config.yaml          the configuration that was checked; what is edited later does not reach a queued job
<run>/slurm/job.json             the newest submission
<run>/slurm/starts.jsonl         one line a submission, one a start
<folder>/<job>_<rank>_log.out    what a rank said, over all restarts; `folder` is <run>/slurm, or the sweep's
<folder>/<job>.started           this start reached the trainer: a crash is worth another try
<folder>/<job>.over              never put this job back into the queue
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pipelines.files import write_atomically

ROOT = Path("runs")


class SlurmError(ValueError):
    """What was asked for cannot be done; the message names it and the remedy."""


@dataclass(frozen=True)
class Submission:
    """One submission of a run.

    Attributes:
        job: Slurm's number, `12` or `12_3` in an array; the process number of submitit's controller where `local`.
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
    def over(self) -> Path:
        """The mark that forbids a requeue."""
        return mark(self.folder, self.job, "over")

    def log(self, rank: int) -> Path:
        """What a rank said."""
        return Path(self.folder) / f"{self.job}_{rank}_log.out"


def mark(folder: str | Path, job: str, what: str) -> Path:
    """`started` or `over`."""
    return Path(folder) / f"{job}.{what}"


@dataclass(frozen=True)
class Run:
    """A run directory, seen from the cluster."""

    directory: Path

    @property
    def name(self) -> str:
        """As `find` takes it: relative to `runs/` where it lies there."""
        try:
            return str(self.directory.relative_to(ROOT.absolute()))
        except ValueError:
            return str(self.directory)

    @property
    def folder(self) -> Path:
        return self.directory / "slurm"

    @property
    def config_file(self) -> Path:
        return self.folder / "config.yaml"

    def config(self) -> dict[str, Any]:
        """The configuration as nested dicts."""
        config: dict[str, Any] = yaml.safe_load(self.config_file.read_text())
        return config

    def submission(self) -> Submission | None:
        """The newest one."""
        path = self.folder / "job.json"
        return Submission(**json.loads(path.read_bytes())) if path.exists() else None

    @property
    def last(self) -> Submission:
        """The newest one of a run that `find` gave."""
        submission = self.submission()
        assert submission
        return submission

    def submitted(self, submission: Submission) -> None:
        """Keep a new submission. It gets its own three starts to make progress."""
        write_atomically(self.folder / "job.json", json.dumps(asdict(submission), indent=1).encode())
        self.tell(submitted=submission.job)

    def tell(self, **values: Any) -> None:
        """Append a line to starts.jsonl."""
        with open(self.folder / "starts.jsonl", "a") as file:
            file.write(json.dumps({"time": time.time(), **values}) + "\n")

    def story(self) -> list[dict[str, Any]]:
        """The lines of starts.jsonl."""
        path = self.folder / "starts.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def newest_checkpoint(self) -> str:
        """Its name, which sorts by progress; empty where there is none."""
        return max((path.name for path in (self.directory / "checkpoints").glob("step-*")), default="")

    def status(self) -> dict[str, Any]:
        """status.json; empty before the first start."""
        path = self.directory / "status.json"
        status: dict[str, Any] = json.loads(path.read_bytes()) if path.exists() else {}
        return status


def find(text: str) -> list[Run]:
    """The run of that path, or of that name under `runs/`; or the members of that sweep. Raises SlurmError."""
    for path in (Path(text).absolute(), (ROOT / text).absolute()):
        if Run(path).submission():
            return [Run(path)]
        if members := sorted(path.glob("*/slurm/job.json")):
            return [Run(record.parent.parent) for record in members]
    known = ", ".join(run.name for run in all_runs()) or "none"
    raise SlurmError(f"no submitted run {text!r}: give its directory, or its name under {ROOT}/ (there: {known})")


def all_runs() -> list[Run]:
    """The submitted runs under `runs/`, members of sweeps included, oldest first."""
    records = [*ROOT.glob("*/slurm/job.json"), *ROOT.glob("*/*/slurm/job.json")]
    return [Run(path.parent.parent.absolute()) for path in sorted(records, key=lambda path: path.stat().st_mtime)]
