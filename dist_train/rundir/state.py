"""What a checkpoint holds, and how a run takes it over."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from dist_train import build, optim
from dist_train.config import Config
from dist_train.ranks.tower_parallel import pair_of
from dist_train.ranks.world import World
from dist_train.rundir.checkpoint import CheckpointError, Store, load, newest
from pipelines.shards import ShardSet

MEMORY = 50  # steps that the running mean of the training error looks back, about


@dataclass
class State:
    """Where a run stands: `step_in_epoch` steps of `epoch` are done, `step` in all.

    `validated` is true between an epoch's validation and the first step of the next epoch. `bad_samples` were met, and
    replaced, in all ranks. `train_error` is a running mean of the top-1 training error, as a fraction of 1.
    """

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    validated: bool = False
    best_error: float = 1.0
    best_epoch: int = -1
    bad_samples: int = 0
    train_error: float = 1.0

    def advance(self) -> None:
        self.step, self.step_in_epoch, self.validated = self.step + 1, self.step_in_epoch + 1, False

    def average(self, error: float, step: int) -> None:
        """Take the training error of the `step`-th step: a plain mean of the first steps, then one that forgets."""
        self.train_error += (error - self.train_error) / min(step, MEMORY)

    def next_epoch(self, error: float) -> bool:
        """Take the epoch's validation error; returns whether it is the best."""
        best = self.best_epoch < 0 or error < self.best_error
        if best:
            self.best_error, self.best_epoch = error, self.epoch
        self.epoch, self.step_in_epoch, self.validated = self.epoch + 1, 0, True
        return best


class Parts(NamedTuple):
    """What training changes: nothing of it per rank, so that the world size may change."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    schedule: optim.Schedule
    state: State

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint, which holds the whole net: complete on rank 0, and all ranks call it at the same point."""
        model, optimizer = self.model.state_dict(), self.optimizer.state_dict()
        if pair := pair_of(self.model):
            model, optimizer = pair.merge(model, optimizer)
        return {
            "model": model,
            "optimizer": optimizer,
            "scaler": self.scaler.state_dict(),
            "schedule": self.schedule.state_dict(),
            "state": asdict(self.state),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        model, optimizer = saved["model"], saved["optimizer"]
        if pair := pair_of(self.model):
            model, optimizer = pair.split(model, optimizer)
        self.model.load_state_dict(model)
        optim.load_state(self.optimizer, optimizer)
        self.scaler.load_state_dict(saved["scaler"])
        self.schedule.load_state_dict(saved["schedule"])
        vars(self.state).update(saved["state"])


def choose(
    store: Store, world: World, config: Config, shards: ShardSet, say: Callable[[str], None]
) -> tuple[Path, dict[str, Any]] | None:
    """The newest good checkpoint of this run and its meta, the same on all ranks; None for a new run. Rank 0 chooses.

    Raises CheckpointError where it is of another model, data set, seed or batch, or where there are checkpoints and
    none is good.
    """
    found = store.newest(say) if world.rank == 0 else None
    chosen: tuple[Path, dict[str, Any]] | None = world.share(found)
    if chosen is None:
        if world.share(store.bad):
            raise CheckpointError(
                f"no checkpoint in {store.directory} is good: put a good one back, or delete it to begin anew"
            )
        return None
    path, meta = chosen
    ours = json.loads(json.dumps(build.identity(config, shards)))
    different = [f"{k} was {meta.get(k)!r}, now {v!r}" for k, v in ours.items() if meta.get(k) != v]
    if different:
        raise CheckpointError(
            f"{path.parent.parent} was begun with other settings ({'; '.join(different)}): restore them, or choose "
            f"another run.name"
        )
    return chosen


def begin_from(model: nn.Module, path: Path, device: torch.device) -> tuple[list[str], list[str]]:
    """Take over the weights of a checkpoint, or of a run's newest good one, wherever name and shape agree.

    Returns the names that were taken, and those that begin anew. Raises CheckpointError where there is no good
    checkpoint, or nothing agrees.
    """
    if not (path / "checkpoints").exists() and not (path / "meta.json").exists():
        raise CheckpointError(f"model.init_from is {path}, which is neither a run nor a checkpoint of one")
    found = newest([path] if (path / "meta.json").exists() else (path / "checkpoints").glob("step-*"))
    if found is None:
        raise CheckpointError(f"model.init_from: no checkpoint in {path} is good")
    theirs, ours = load(found, device)["model"], model.state_dict()
    taken = [name for name, value in ours.items() if name in theirs and theirs[name].shape == value.shape]
    if not taken:
        raise CheckpointError(f"model.init_from: no layer of {found} fits model.name: is it another kind of net?")
    model.load_state_dict(ours | {name: theirs[name] for name in taken})
    return taken, [name for name in ours if name not in taken]
