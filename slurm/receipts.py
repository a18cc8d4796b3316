"""What this user submitted, kept outside the run directories.

A run directory may be a stranger's: what lies in it is data. What its own submission decided (the site, the code that
its jobs import) is believed only if this user's `submit` wrote it here.

<state>/dist_train/submissions/<hash>.json    one file per run directory; <state> is XDG_STATE_HOME, ~/.local/state
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipelines.errors import UserError
from pipelines.files import read_json, sha256, write_atomically
from pipelines.resolve import FLAG
from slurm import snapshot
from slurm.submissions import SlurmError, SubmittedRun


def keep(directory: Path, **facts: Any) -> None:
    """Records what a submission of this run decided, in place of what an earlier one did. Raises OSError."""
    path = _path(directory)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_atomically(path, json.dumps({"directory": str(directory), **facts}, indent=1).encode())


def of(directory: Path) -> dict[str, Any] | None:
    """What this user's last submission of the run decided; None if there was none. Raises ValueError if damaged."""
    path = _path(directory)
    return read_json(path) if path.exists() else None


def facts(run: SubmittedRun, code: str) -> dict[str, str]:
    """Hashes of what the next job of a submitted run would believe; `code`: the copy's digest. Raises OSError."""
    return {"job": sha256(run.job_file), "config": sha256(run.config_file), "code": code}


def check(run: SubmittedRun) -> None:
    """Raises SlurmError unless this user submitted the run, and what its next job would believe is as it was then."""
    found: dict[str, Any] | None = None
    with suppress(OSError, UserError):
        found = of(run.directory)
    if not found:
        raise SlurmError(
            f"{run.name} was not submitted by you, as far as {_path(run.directory).parent} tells, and its next job "
            f"would run what the directory says: if you trust its author, add {FLAG}"
        )
    for key, path in (("job", run.job_file), ("config", run.config_file)):
        if sha256(path) != found.get(key):
            raise _changed(path)
    copy = snapshot.beside(Path(run.last.folder))
    if snapshot.digest(copy) != found.get("code"):
        raise _changed(copy)


def _changed(path: Path) -> SlurmError:
    return SlurmError(
        f"{path} is not as you submitted it: submit the run again, or add {FLAG} if you know what has changed there"
    )


def _path(directory: Path) -> Path:
    state = Path(os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state"))
    name = hashlib.sha256(os.fsencode(os.path.realpath(directory))).hexdigest()[:24]
    return state / "dist_train" / "submissions" / f"{name}.json"
