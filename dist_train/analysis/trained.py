"""Finished and unfinished runs, opened for reading: nothing in them is claimed, written or changed."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dist_train import build
from dist_train.cli import parse
from dist_train.config import Config, ConfigError
from dist_train.data import open_sets
from dist_train.ranks.world import World
from dist_train.rundir.checkpoint import META, load, newest
from pipelines.shards import MANIFEST, ShardSet


class RunError(ValueError):
    """A run that cannot be opened; the message says why, and the remedy."""


@dataclass(frozen=True)
class Trained:
    """A run with its weights.

    Attributes:
        model: in evaluation mode, on the device, channels_last; not compiled.
        classes: their names; the place in the list is the label. The model may have more outputs.
        step, epoch: how many of them were done at the checkpoint.
        checkpoint: the name of its directory.
        train: the training set, whose statistics normalise all inputs.
        val: the validation set, or the split that was asked for in its place.
    """

    directory: Path
    config: Config
    model: nn.Module
    classes: list[str]
    step: int
    epoch: int
    checkpoint: str
    train: ShardSet
    val: ShardSet


def open_run(directory: Path, device: torch.device, which: str = "last", split: Path | None = None) -> Trained:
    """A run's model, configuration and data.

    Args:
        which: "last", the newest checkpoint that is whole; "best", the one of the lowest validation error; or a
            checkpoint's name. Its hash is verified.
        split: a shard set that takes the place of the validation set.

    Raises RunError, ConfigError or ShardError, all ValueErrors of one sentence, where there is no such run, where it
    has no good checkpoint, or where its sets are gone or are not those that it was trained on.
    """
    config = read_config(directory)
    val = str(split or config.data.val)
    config = replace(config, data=replace(config.data, val=val, device="auto"))  # this machine may have no GPU
    _check_paths(directory, config, split)
    train, test = open_sets(config)
    path, meta = _choose(directory, which)
    if (trained_on := meta.get("training set")) != train.fingerprint[:16]:
        raise RunError(
            f"{config.data.train} is not the training set that {directory} was trained on (its index has fingerprint "
            f"{train.fingerprint[:16]} instead of {trained_on}): put the right one back"
        )
    with torch.random.fork_rng(devices=[]):  # the weights are drawn, and then replaced
        model = build.build_model(config, World(0, 1, 0, 1, device), len(train.classes), compiled=False)
    try:
        model.load_state_dict(load(path, torch.device("cpu"))["model"])
    except (OSError, KeyError, RuntimeError) as error:
        if not path.exists():
            raise RunError(f"{path} vanished while it was read, the run goes on: try again") from error
        reason = " ".join(str(error).split())[:200]
        raise RunError(
            f"{path} does not fit the model of {directory / 'config.yaml'} ({reason}): restore the file"
        ) from error
    model.eval()
    return Trained(
        directory, config, model, train.classes, int(meta["step"]), int(meta["epoch"]), path.name, train, test
    )


def read_config(directory: Path) -> Config:
    """What a run was configured with, validated. Raises RunError and ConfigError."""
    file = directory / "config.yaml"
    if not directory.is_dir():
        raise RunError(f"there is no run {directory}: name the directory of a run, runs/<name>")
    if not file.exists():
        raise RunError(f"{directory} has no config.yaml, so it is no run: name the directory of a run, runs/<name>")
    try:
        return parse(["--config", str(file)])[0]
    except ConfigError as error:
        raise RunError(f"{file}: {error}") from error


def _check_paths(directory: Path, config: Config, split: Path | None) -> None:
    """Raises RunError where a shard set is not there."""
    for role, text in (("training", config.data.train), ("validation", config.data.val)):
        path = Path(text)
        if (path / MANIFEST).exists():
            continue
        if role == "validation" and split is not None:
            raise RunError(f"there is no shard set in {path}: name one with --split, or leave it out")
        remedy = "put it back"
        if not path.is_absolute():
            remedy = f"start in the directory that the run was started in (this is {Path.cwd()}), or put it back"
        raise RunError(f"the {role} set of {directory}, {path}, is not there: {remedy}")


def _choose(directory: Path, which: str) -> tuple[Path, dict[str, Any]]:
    """A checkpoint whose hash matches, and its meta. Raises RunError."""
    bad: dict[str, str] = {}
    store = directory / "checkpoints"
    if which == "last":
        path = newest(store.glob("step-*"), lambda path, why: bad.update({path.name: why}))
    elif not (store / which).is_dir():
        raise RunError(f"{directory} has no checkpoint {which}: choose last")
    else:
        path = newest([(store / which).resolve()], lambda path, why: bad.update({path.name: why}))
    reasons = ", ".join(f"{name}: {why}" for name, why in bad.items())
    if path is None:
        if bad:
            remedy = "put a good one back" if which == "last" else "choose last"
            raise RunError(f"{directory} has no good checkpoint ({reasons}): {remedy}")
        raise RunError(f"{directory} has no checkpoint yet: train on, the first comes after an epoch at the latest")
    if bad:
        print(f"{directory}: bad checkpoints are passed over ({reasons})", file=sys.stderr)
    return path, json.loads((path / META).read_bytes())
