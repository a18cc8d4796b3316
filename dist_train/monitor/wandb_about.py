"""What wandb is told of a run besides its record: whether and where it is shown, what it is, how its numbers are."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from dist_train.config import Config

Mode = Literal["disabled", "offline", "online"]
X = "images"  # the axis of all charts, by which runs with batches of different sizes can be compared
EPOCH = "progress/epoch"  # with its fraction; `wandb leet` shows hidden ones too, in the order of their names
LONGEST = 64  # characters of a tag, and of the title of an alert
# What of a metric is in the summary of the run, by its name or the beginning of it.
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
    """Whether, and how, wandb is to show the run: by the configuration, otherwise by wandb's own variables."""
    if config.monitor.wandb is not None:
        return config.monitor.wandb
    if chosen := os.environ.get("WANDB_MODE"):
        known: dict[str, Mode] = {"disabled": "disabled", "offline": "offline", "dryrun": "offline"}
        return known.get(chosen, "online")
    anywhere = any(os.environ.get(f"WANDB_{name}") for name in ("PROJECT", "ENTITY", "DIR"))
    return "online" if anywhere else "disabled"


def about(config: Config) -> dict[str, Any]:
    """The arguments of `wandb.init` that say what run this is. None: wandb's own variable counts, if there is one."""
    monitor, run = config.monitor, config.run
    sweep, _, _ = run.name.rpartition("/")  # a member of one is named SWEEP/1-optim.lr=0.02
    data = config.data.source or Path(config.data.train).absolute().parent.name
    tags = [*monitor.wandb_tags, *os.environ.get("WANDB_TAGS", "").split(","), config.model.name, data]
    return {
        "project": monitor.wandb_project or os.environ.get("WANDB_PROJECT") or "dist_train",
        "entity": monitor.wandb_entity,
        # One name for all members would make them one another's like.
        "name": run.name if sweep else os.environ.get("WANDB_NAME") or run.name or Path(run.dir).name,
        "group": sweep or None,
        "job_type": os.environ.get("WANDB_JOB_TYPE") or "train",
        "tags": list(dict.fromkeys(tag.strip()[:LONGEST] for tag in tags if tag.strip())),
        "notes": monitor.wandb_notes,
    }
