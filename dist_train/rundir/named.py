"""Runs by name: `demo` is runs/demo. Imports no torch."""

from __future__ import annotations

import os
from pathlib import Path

from dist_train.rundir import checkpoint, events, lease, record, status
from pipelines.files import as_text
from pipelines.words import nearest

RUNS = Path("runs")
LISTED = 3  # names per sentence
MARKS = (  # files of which only a run has two
    *("config.yaml", checkpoint.FOLDER, status.FILE, record.FILE, events.FILE, lease.FILE),
    *("slurm/config.yaml", "slurm/job.json", "code/copied.json"),
)


def run_named(text: str, root: Path = RUNS) -> Path:
    """Path of a run given by path or name: `text` or `root`/`text`, the first that is a run, or a checkpoint, or else
    the first that exists. Expands `~`."""
    path = Path(os.path.expanduser(text))
    places = (path, root / path)
    runs = (p for p in places if any(os.path.exists(p / file) for file in ("config.yaml", "meta.json")))
    return next(runs, None) or next((p for p in places if os.path.exists(p)), path)  # not Path.exists: it may raise


def relative_name(run: Path) -> str:
    """The name of a run: relative to `runs/` if it lies there, else its path."""
    try:
        return str(run.absolute().relative_to(RUNS.absolute()))
    except ValueError:
        return str(run)


def shown_name(run: Path) -> str:
    """The same as text."""
    return as_text(relative_name(run))


def is_of_run(file: Path) -> bool:
    """Whether a file, as named or where links lead, lies somewhere in the directory of a run: somebody else may have
    chosen what it says."""
    for place in (Path(os.path.abspath(file)), Path(os.path.realpath(file))):
        if place.parent.name == "slurm" and place.name == "config.yaml":
            return True
        for folder in place.parents:
            if sum(os.path.exists(folder / name) for name in MARKS) > 1:
                return True
    return False


def no_run(path: Path, root: Path = RUNS) -> str:
    """Sentence for a run found neither at `path` nor in `root`; names the closest runs in `root`."""
    places = " or ".join(map(str, dict.fromkeys((path, root / path))))
    found = sorted((*root.glob("*/config.yaml"), *root.glob("*/*/config.yaml")), key=os.path.getmtime, reverse=True)
    names = [str(file.parent.relative_to(root)) for file in found if file.parent.name != "slurm"]
    if meant := nearest(path.name, names):
        return f"there is no run {places}: did you mean {meant}?"
    known = f" (the newest in {root}/: {', '.join(names[:LISTED])})" if names else ""
    return f"there is no run {places}: name the directory of a run, or its name in {root}/{known}"
