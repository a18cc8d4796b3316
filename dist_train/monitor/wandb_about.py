"""How a run is shown in wandb: mode, project, name, tags and the definition of its metrics."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from urllib.parse import urlsplit

from dist_train.config import Config
from pipelines.remote.places import is_url

Mode = Literal["disabled", "offline", "online"]
X = "images"  # x axis of all charts, so that runs of different batch sizes can be compared
EPOCH = "progress/epoch"  # with its fraction; `wandb leet` shows hidden ones too, in the order of their names
LONGEST = 64  # characters of a tag, and of the title of an alert
# Summary of each metric, by its name or prefix.
SUMMARIES = {
    "error/*": "min,last",
    "loss/*": "min,last",
    "lr": "last",
    "grad_norm": "max,last",
    "machine/*": "last",
    "machine/images_per_s": "max,last",
    "machine/memory_mb": "max,last",
    "probe/*": "last",
}


def definitions() -> Iterator[dict[str, Any]]:
    """The arguments of `define_metric`, for all metrics."""
    for name in (X, EPOCH):
        yield {"name": name, "hidden": True}
    for name, summary in SUMMARIES.items():
        yield {"name": name, "step_metric": X, "summary": summary}
    yield {"name": "pictures/*", "step_metric": X}


def mode(config: Config) -> Mode:
    """wandb's mode: from the configuration, otherwise from wandb's own variables."""
    if config.monitor.wandb is not None:
        return config.monitor.wandb
    if chosen := os.environ.get("WANDB_MODE"):
        known: dict[str, Mode] = {"disabled": "disabled", "offline": "offline", "dryrun": "offline"}
        return known.get(chosen, "online")
    anywhere = any(os.environ.get(f"WANDB_{name}") for name in ("PROJECT", "ENTITY", "DIR"))
    return "online" if anywhere else "disabled"


def about(config: Config) -> dict[str, Any]:
    """Arguments of `wandb.init` that identify the run. None leaves the choice to wandb's own variable."""
    monitor, run = config.monitor, config.run
    sweep, _, _ = run.name.rpartition("/")  # runs of a sweep are named SWEEP/1-optim.lr=0.02
    data = config.data.source or _parent(config.data.train)
    tags = [*monitor.wandb_tags, *os.environ.get("WANDB_TAGS", "").split(","), config.model.name, data]
    return {
        "project": monitor.wandb_project or os.environ.get("WANDB_PROJECT") or "dist_train",
        "entity": monitor.wandb_entity,
        # WANDB_NAME would give all runs of a sweep the same name.
        "name": run.name if sweep else os.environ.get("WANDB_NAME") or run.name or Path(run.dir).name,
        "group": sweep or None,
        "job_type": os.environ.get("WANDB_JOB_TYPE") or "train",
        "tags": list(dict.fromkeys(tag.strip()[:LONGEST] for tag in tags if tag.strip())),
        "notes": monitor.wandb_notes,
    }


def _parent(place: str) -> str:
    """Name of the folder that holds a set, or of the server or bucket."""
    if not is_url(place):
        return Path(place).absolute().parent.name
    url = urlsplit(place)
    return PurePosixPath(url.path.rstrip("/")).parent.name or url.hostname or ""
