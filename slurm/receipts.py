"""What this user submitted, kept outside the run directories.

A run directory may be a stranger's: what lies in it is data. What its jobs run (the lines and options of their script,
the code that they import) is taken from here, where only this user's `submit` writes.

<state>/dist_train/submissions/<hash>.json    one file per run directory; <state> is XDG_STATE_HOME, ~/.local/state
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import stat
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipelines.files import read_file, sha256, write_atomically
from pipelines.valid import Count, Invalid, parsed
from slurm import snapshot
from slurm.submissions import SlurmError, Submission, SubmittedRun


@dataclass(frozen=True)
class Parameters:
    """submitit's parameters as `script.parameters` makes them; None: not given."""

    job_name: str | None = None
    time: Count | None = None
    nodes: Count | None = None
    ntasks_per_node: Count | None = None
    gpus_per_node: Count | None = None
    visible_gpus: list[Count] | None = None
    cpus_per_task: Count | None = None
    signal_delay_s: Count | None = None
    array_parallelism: Count | None = None
    stderr_to_stdout: bool | None = None
    srun_args: list[str] | None = None
    additional_parameters: dict[str, str | bool] | None = None
    setup: list[str] | None = None
    teardown: list[str] | None = None
    python: str | None = None
    srun: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    mem: str | None = None
    comment: str | None = None


@dataclass(frozen=True)
class Receipt:
    """What the last submission of a run decided.

    Attributes:
        submission: as in `slurm/job.json`.
        config: SHA-256 of `slurm/config.yaml`.
        code: digest of the copy of the code; empty without one.
        parameters: of the script.
    """

    submission: Submission
    config: str
    code: str
    parameters: Parameters

    @property
    def wanted(self) -> dict[str, Any]:
        """The parameters, as `script.parameters` returns them."""
        return {key: value for key, value in asdict(self.parameters).items() if value is not None} | {"wckey": None}


def keep(run: SubmittedRun, wanted: dict[str, Any], code: str) -> None:
    """Records what a submission of this run decided, in place of what an earlier one did. Raises OSError.

    Args:
        wanted: parameters of the script.
        code: digest of the copy of the code.
    """
    path = _path(run.directory)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    facts = {"config": sha256(run.config_file), "code": code, "parameters": wanted}
    text = json.dumps({"directory": str(run.directory), "submission": asdict(run.last), **facts}, indent=1)
    write_atomically(path, text.encode())


def check(run: SubmittedRun) -> Receipt:
    """The receipt of a run. Raises SlurmError unless this user submitted it, and what its next job would believe is as
    it was then; OSError."""
    receipt, copy = _of(run), snapshot.beside(Path(run.last.folder))
    for path, same in (
        (run.job_file, run.last == receipt.submission),
        (run.config_file, sha256(run.config_file) == receipt.config),
        (copy, not copy.is_symlink() and snapshot.digest(copy) == receipt.code),
    ):
        if not same:
            raise SlurmError(f"{path} is not as you submitted it: {_anew(run)}")
    return receipt


def _of(run: SubmittedRun) -> Receipt:
    path = _path(run.directory)
    if not path.exists():
        raise SlurmError(f"{run.name} was not submitted by you, as far as {path.parent} tells: {_anew(run)}")
    found = path.parent.stat()
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise SlurmError(f"others may write {path.parent}, which is no place for receipts: {_anew(run)}")
    try:
        return parsed(Receipt, read_file(path))
    except Invalid as error:  # also that of an earlier version
        raise SlurmError(f"the receipt {path} of {run.name} cannot be used ({error}): {_anew(run)}") from error


def _anew(run: SubmittedRun) -> str:
    """How a run is submitted that cannot be requeued."""
    words = shlex.join(["--config", str(run.config_file), "--run.dir", str(run.directory)])
    how = "--local" if run.last.local else "--time 12:00:00"
    return f"look at its configuration, then `python -m slurm submit {how} {words}` continues it with the present code"


def _path(directory: Path) -> Path:
    state = Path(os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state"))
    name = hashlib.sha256(os.fsencode(os.path.realpath(directory))).hexdigest()[:24]
    return state / "dist_train" / "submissions" / f"{name}.json"
