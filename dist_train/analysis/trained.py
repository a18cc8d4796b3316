"""Finished and unfinished runs, opened for reading: nothing in them is claimed, written or changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from dist_train import build
from dist_train.cli import parse
from dist_train.config import Config, ConfigError, idle_fields
from dist_train.data import open_sets
from dist_train.process import keep_freed_memory
from dist_train.ranks.world import World
from dist_train.rundir import stored
from dist_train.rundir.checkpoint import FOLDER, Checkpoint, CheckpointError, find, newest_name
from dist_train.rundir.fitting import check_weights
from dist_train.rundir.named import RUNS, no_run
from pipelines import yamls
from pipelines.errors import UsageError, UserError
from pipelines.manifest import MANIFEST, Manifest
from pipelines.remote.places import is_url
from pipelines.resolve import FLAG
from pipelines.shards import ShardSet
from pipelines.speech import say

TRIES = 3  # to open a run, whose checkpoint may vanish while it is read


class RunError(UserError):
    """A run that cannot be opened; the message names the reason and the remedy."""


class VanishedError(RunError):
    """One checkpoint, or all of them, vanished: a run in training keeps only the newest."""


@dataclass(frozen=True)
class Trained:
    """A run with its weights.

    Attributes:
        model: in evaluation mode, on the device, channels_last; not compiled.
        classes: class names, in the order of their labels. The model may have more outputs.
        step, epoch: number of steps and epochs done at the checkpoint.
        checkpoint: name of its directory.
        train: the training set, whose statistics normalise all inputs.
        val: the validation set, or the split given in its place.
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

    def output_name(self, output: int) -> str:
        """Name of the class of an output of the model, or its number if it has no class."""
        return self.classes[output] if output < len(self.classes) else f"class #{output}"


@contextmanager
def device_option() -> Iterator[None]:
    """Reports errors about a device as errors of --device, which the user gave, not of the trainer's key."""
    try:
        yield
    except UserError as error:
        raise UsageError(
            str(error).replace("--train.device", "--device").replace("train.device", "--device")
        ) from error


def open_run(
    directory: Path, device: torch.device, which: str = "last", split: str = "", *, trusting: bool = False
) -> Trained:
    """Model, configuration and data of a run. From now on this process keeps the memory that it frees (`process`).

    Args:
        which: "last", the newest checkpoint that is whole; "best", the one of the lowest validation error; or a
            checkpoint's name. Its hash is verified.
        split: a shard set in place of the validation set.
        trusting: see `read_config`.

    Raises RunError, ConfigError or ShardError, all UserErrors, if there is no such run, if it has no good checkpoint,
    or if its sets are gone or are not those that it was trained on.
    """
    config = read_config(directory, trusting=trusting)
    keep_freed_memory(device)
    val = split or config.data.val
    config = replace(config, data=replace(config.data, val=val, device="auto"))  # this machine may have no GPU
    _check_paths(directory, config, split)
    sets = open_sets(config)
    for _ in range(TRIES - 1):
        try:
            return _opened(directory, config, device, which, sets)
        except VanishedError:
            if which not in ("last", "best") or not newest_name(directory):
                raise
    return _opened(directory, config, device, which, sets)


def _opened(
    directory: Path, config: Config, device: torch.device, which: str, sets: tuple[ShardSet, ShardSet]
) -> Trained:
    """The run with the weights of a checkpoint. Raises RunError."""
    train, test = sets
    checkpoint = _checkpoint(directory, which)
    trained_on = checkpoint.meta.get("training set")
    if trained_on not in (train.fingerprint[:16], train.earlier_fingerprint[:16]):
        raise RunError(
            f"{config.data.train} is not the training set that {directory} was trained on (its index has fingerprint "
            f"{train.fingerprint[:16]} instead of {trained_on}): put the right one back"
        )
    model = _model(directory, config, device, len(train.classes), checkpoint)
    step, epoch = int(checkpoint.meta["step"]), int(checkpoint.meta["epoch"])
    return Trained(directory, config, model, train.classes, step, epoch, checkpoint.path.name, train, test)


def read_config(directory: Path, *, trusting: bool = False) -> Config:
    """The validated configuration of a run. Raises RunError.

    Args:
        trusting: code that it names as `module:name` may be imported.
    """
    file = directory / "config.yaml"
    if not directory.is_dir():
        raise RunError(no_run(directory))
    if not file.exists():
        other = f"{RUNS / directory} is one" if (RUNS / directory / file.name).exists() else "name that of a run"
        raise RunError(f"{directory} has no config.yaml, so it is no directory of a run: {other}")
    try:
        return parse(["--config", str(file), *_without_idle(file), *[FLAG] * trusting], strange=True)[0]
    except ConfigError as error:
        raise RunError(f"{file}: {error}") from error


def _without_idle(file: Path) -> list[str]:
    """Options that undo what earlier versions accepted: settings of our nets for one of torchvision's."""
    try:
        found = yamls.load(yamls.read(file))
    except yamls.NoYaml:  # the parser will tell
        return []
    model = found.get("model", {}) if isinstance(found, dict) else {}
    name = str(model.get("name", "")) if isinstance(model, dict) else ""
    return [f"--model.{key}={default}" for key, default in idle_fields(name).items()]


def _check_paths(directory: Path, config: Config, split: str) -> None:
    """Raises RunError or ShardError if a shard set is not there."""
    for role, text in (("training", config.data.train), ("validation", config.data.val)):
        path = Path(text)
        if is_url(text) or (path / MANIFEST).exists():
            continue
        if role == "validation" and split:
            Manifest.read(path)
        remedy = "put it back"
        if not path.is_absolute():
            remedy = f"start in the directory that the run was started in (this is {Path.cwd()}), or put it back"
        raise RunError(f"the {role} set of {directory}, {path}, is not there: {remedy}")


def _checkpoint(directory: Path, which: str) -> Checkpoint:
    """A good checkpoint of a run; names the bad ones that were skipped. Raises RunError."""
    bad: dict[str, str] = {}
    try:
        found = find(directory, which, lambda name, why: bad.update({name: why}))
    except CheckpointError as error:
        raise RunError(str(error)) from error
    reasons = ", ".join(f"{name}: {why}" for name, why in bad.items())
    if found is None:
        if bad and not any((directory / FOLDER / name).exists() for name in bad):
            raise VanishedError(f"{directory} has lost its checkpoints while it was read, as it goes on: try again")
        if bad:
            remedy = "put a good one back" if which == "last" else "choose last"
            raise RunError(f"{directory} has no good checkpoint ({reasons}): {remedy}")
        if newest_name(directory):
            raise RunError(f"{directory} has no checkpoint {which or 'of an empty name'}: choose last")
        raise RunError(f"{directory} has no checkpoint yet: train on, the first comes after an epoch at the latest")
    if bad:
        say(f"{directory}: bad checkpoints are passed over ({reasons})")
    return found


def _model(directory: Path, config: Config, device: torch.device, classes: int, checkpoint: Checkpoint) -> nn.Module:
    """The model with the weights of a checkpoint, ready to predict. Raises RunError if they do not fit."""
    with torch.random.fork_rng(devices=[]):  # the weights are drawn, and then replaced
        model = build.model(config, World.single(device), classes, compiled=False)
    path = checkpoint.path
    try:
        most = stored.needed(model, config.optim.name)
        weights = stored.load_state(path, torch.device("cpu"), most)["model"]
        check_weights(model, weights)
        model.load_state_dict(weights)
    except (OSError, *stored.WRONG) as error:
        if not path.exists():
            raise VanishedError(f"{path} vanished while it was read, the run goes on: try again") from error
        reason = " ".join(str(error).split())[:200]
        raise RunError(
            f"{path} does not fit the model of {directory / 'config.yaml'} ({reason}): restore the file"
        ) from error
    return model.eval()
