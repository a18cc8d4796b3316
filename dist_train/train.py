"""The loop."""

from __future__ import annotations

import json
import math
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from dist_train import build, optim
from dist_train.checkpoint import CheckpointError, Store, load
from dist_train.config import Config, as_dict
from dist_train.distributed import Watch, World
from dist_train.evaluate import validate
from dist_train.models.dropout import mask_keys
from dist_train.monitor import Monitor
from dist_train.owner import Superseded
from pipelines.dali import Batch
from pipelines.order import part
from pipelines.shards import ShardSet


class Stopped(Exception):
    """A stop was asked for, and the state is saved."""


class Diverged(Exception):
    """A loss or a gradient is not finite; the weights were not touched by it."""


class NotSaved(Exception):
    """The last save failed, and so did another try."""


class BadData(Exception):
    """More samples than allowed cannot be decoded."""


@dataclass
class State:
    """Where a run stands: `step_in_epoch` steps of `epoch` are done, `step` in all.

    `validated` is true between an epoch's validation and the first step of the next epoch. `bad_samples` were met, and
    replaced, in all ranks.
    """

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    validated: bool = False
    best_error: float = 1.0
    best_epoch: int = -1
    bad_samples: int = 0

    def advance(self) -> None:
        self.step, self.step_in_epoch, self.validated = self.step + 1, self.step_in_epoch + 1, False

    def next_epoch(self, error: float) -> bool:
        """Take the epoch's validation error; returns whether it is the best."""
        best = self.best_epoch < 0 or error < self.best_error
        if best:
            self.best_error, self.best_epoch = error, self.epoch
        self.epoch, self.step_in_epoch, self.validated = self.epoch + 1, 0, True
        return best


class Agreed(NamedTuple):
    """What one small all-reduce at each step carries; sums over the ranks."""

    loss: float
    refused: float
    stop: float
    due: float
    superseded: float
    bad: float


class Pending(NamedTuple):
    """An all-reduce under way, and the step that it belongs to."""

    values: Tensor
    work: dist.Work | None
    epoch: int
    step_in_epoch: int
    step: int
    lr: float

    def read(self) -> Agreed:
        if self.work:
            self.work.wait()
        return Agreed(*self.values.tolist())


class Trainer:
    """One rank of a run. `fit` is the loop; the rest is what it is made of."""

    def __init__(
        self,
        config: Config,
        world: World,
        watch: Watch,
        monitor: Monitor,
        store: Store,
        data: tuple[ShardSet, ShardSet],
    ) -> None:
        self.config, self.world, self.watch, self.monitor, self.store = config, world, watch, monitor, store
        self.shards, val = data
        batch = config.train.global_batch
        self.train_loader = build.build_loader(config, world, self.shards, self.shards, batch=batch, training=True)
        check = max(world.size, batch // config.train.accumulate)
        self.val_loader = build.build_loader(config, world, val, self.shards, batch=check, training=False)
        compiled = config.train.compile != "off"
        if config.train.compile == "auto" and (why := build.compiler_works(world.device)):
            compiled = False
            monitor.say(f"torch.compile is off, it does not work here: {why}")
        self.model = build.build_model(config, world, len(self.shards.classes), compiled=compiled)
        precision = build.precision(config, world)
        self.autocast = torch.autocast(world.device.type, build.PRECISIONS[precision], enabled=precision != "off")
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=precision == "fp16")
        self.net = build.distribute(self.model, config, world, self.autocast)
        self.optimizer = optim.build(config.optim, self.model)
        self.schedule = optim.Schedule(config.schedule, config.optim.lr)
        self.state = State()
        self.changed: dict[str, Any] = {}  # settings that differ from those that the checkpoint was made with
        self._pending: Pending | None = None
        self._saved_at = time.monotonic()
        self._covered = 0  # bytes of the record that the save in flight covers
        self._began, self._images = time.monotonic(), 0  # of this epoch, for the rates

    def fit(self) -> None:
        """Train from the state that is there to the last epoch. Raises Stopped, Diverged, Superseded."""
        state, config, steps = self.state, self.config, self.train_loader.steps
        while state.epoch < config.train.epochs and not self.exhausted():
            self.monitor.begin_epoch(state.epoch, config.train.epochs, state.step_in_epoch, steps)
            self._began, self._images, self.train_loader.waited = time.monotonic(), 0, 0.0
            for batch in self.train_loader.epoch(state.epoch, start=state.step_in_epoch):
                lr = self.schedule.lr(state.epoch, state.step_in_epoch, steps)
                under_way = self.train_step(batch, lr)
                state.advance()
                before, self._pending = self._pending, under_way
                self.settle(before)  # a step late, so that the device is never waited for
            self.settle(self._drain())
            error = self.validate()
            if self.schedule.step(error, state.epoch):
                self.monitor.say(f"the error stopped improving: learning rate divided by {config.schedule.factor:g}")
            best = state.next_epoch(error)  # before the save: a restart must not repeat the epoch
            self.save(best=best)
        self.finish()

    def exhausted(self) -> bool:
        """Whether the error stopped improving after the last division, and the run is to stop then."""
        return self.config.schedule.stop_early and self.schedule.exhausted

    def train_step(self, batch: Batch, lr: float) -> Pending:
        """Forward, backward, update. The rank's loss is its sum times ranks / global batch, so that DDP's average over
        ranks is the mean over the global batch, however the samples are spread."""
        config, world, state = self.config, self.world, self.state
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad()
        positions = batch.start + np.arange(len(batch.labels))
        keys = mask_keys(config.train.seed, state.step, positions).to(world.device)
        own = mask_keys(config.train.seed, state.step, np.array([world.rank]))
        torch.manual_seed(int(own[0]))  # for models that bring their own dropout
        inputs, labels = batch.inputs.to(world.device, non_blocking=True), batch.labels.to(world.device)
        total = torch.zeros((), dtype=torch.float64, device=world.device)
        pieces = config.train.accumulate
        for i in range(pieces):
            low, high = part(len(labels), i, pieces)
            alone = i == pieces - 1 or world.size == 1
            with nullcontext() if alone else self.net.no_sync():  # type: ignore[operator]
                with self.autocast:
                    logits = self.net(inputs[low:high], keys[low:high])
                loss = F.cross_entropy(logits.float(), labels[low:high], reduction="sum")
                scaled = self.scaler.scale(loss * (world.size / config.train.global_batch))
                scaled.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        refused = optim.update(self.optimizer, self.scaler)
        due = world.rank == 0 and self._due()
        rest = (self.watch.stop, due, self.monitor.superseded, batch.replaced)
        values = torch.stack([total, refused.double(), *torch.tensor(rest, dtype=torch.float64).to(world.device)])
        return Pending(values, world.reduce(values), state.epoch, state.step_in_epoch, state.step, lr)

    def settle(self, pending: Pending | None) -> None:
        """Do what the ranks agreed on at a step: record it, save, stop."""
        stop, due = self.observe(pending) if pending else (False, False)
        every = self.config.checkpoint.steps
        if stop or due or (every and self.state.step % every == 0):
            if rest := self._drain():  # a state is saved only when its last step is known to be good
                stop = self.observe(rest)[0] or stop
            self.save(best=False)
        if stop:
            self.stop()

    def observe(self, pending: Pending) -> tuple[bool, bool]:
        """Record a step. Returns whether to stop and whether to save. Raises Diverged and Superseded."""
        self.watch.beat(self.config.run.step_timeout)
        agreed = pending.read()
        batch, step = self.config.train.global_batch, pending.step + 1
        loss = agreed.loss / batch
        if agreed.superseded:
            raise self._superseded()
        if agreed.refused or not math.isfinite(loss):
            raise Diverged(self._post_mortem(pending, loss))
        self.state.bad_samples += int(agreed.bad)
        if self.state.bad_samples > self.config.data.max_bad:
            raise BadData(
                f"{self.state.bad_samples} samples could not be decoded, more than data.max_bad: run "
                f"`python -m pipelines verify {self.config.data.train}`, or raise it"
            )
        self._images += batch
        if step % self.config.monitor.log_every == 0:
            progress = pending.epoch + (pending.step_in_epoch + 1) / self.train_loader.steps
            where = {"step": step, "epoch": pending.epoch, "progress": progress, "images": step * batch}
            bad = {"bad_samples": self.state.bad_samples} if self.state.bad_samples else {}
            self.monitor.record("step", **where, loss=loss, lr=pending.lr, **bad, **self._rates())
        self.monitor.progress(step, pending.epoch, lambda: self._line(loss, pending))
        return bool(agreed.stop), bool(agreed.due)

    def stop(self) -> None:
        """Wait for the save, and leave."""
        self.finish()
        raise Stopped

    def finish(self) -> None:
        """Wait for the last save; try once more where it failed. Raises NotSaved where it fails again, on all ranks."""
        self.store.join()
        if self.store.error and not self.monitor.superseded:
            self.save(best=False)
            self.store.join()
        if self.world.share(self.monitor.superseded or isinstance(self.store.error, Superseded)):
            raise self._superseded()
        failure = self.store.error or self.monitor.error
        if message := self.world.share(failure and f"{type(failure).__name__}: {failure}"):
            raise NotSaved(f"the last state could not be saved, older checkpoints stand: {message}")

    def validate(self) -> float:
        """The top-1 validation error of the epoch, exact. Agrees on a stop at each batch."""

        def each() -> None:
            self.watch.beat(self.config.run.step_timeout)
            self.monitor.heartbeat()
            flags = torch.tensor([float(self.watch.stop), float(self.monitor.superseded)], device=self.world.device)
            if work := self.world.reduce(flags):
                work.wait()
            stop, superseded = flags.tolist()
            if superseded:
                raise self._superseded()
            if stop:
                self.save(best=False)  # the epoch is trained, not yet validated
                self.stop()

        state = self.state
        scores = validate(self.model, self.val_loader, self.world, self.autocast, each)
        lr = self.schedule.lr(state.epoch, self.train_loader.steps - 1, self.train_loader.steps)
        self.monitor.end_epoch()
        images = state.step * self.config.train.global_batch
        self.monitor.record("validation", step=state.step, epoch=state.epoch, images=images, lr=lr, **asdict(scores))
        self.monitor.say(
            f"epoch {state.epoch + 1}/{self.config.train.epochs}: top-1 error {scores.top1_error:.2%}, "
            f"top-5 error {scores.top5_error:.2%} on {scores.samples} images, lr {lr:g}"
        )
        return scores.top1_error

    def save(self, *, best: bool) -> None:
        """Save the state beside training; rank 0 writes."""
        self._saved_at = time.monotonic()
        if self.world.rank or self.monitor.superseded:
            return
        self.store.join()
        if isinstance(self.store.error, Superseded):
            self.monitor.superseded = True
            return
        if self.store.error:
            self.monitor.say(f"the last save failed ({self.store.error}): older checkpoints stand, trying again")
        else:
            self.monitor.publish(self._covered)
        size = self.monitor.size()
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "schedule": self.schedule.state_dict(),
            "state": asdict(self.state),
            "record": size,
        }
        versions = {"torch": torch.__version__, "world_size": self.world.size}
        meta = asdict(self.state) | build.identity(self.config, self.shards) | {"config": as_dict(self.config)}
        self.store.save(state, meta | versions, best=best)
        self._covered = size

    def restore(self) -> int:
        """Take over the newest good checkpoint, if there is one. Rank 0 chooses.

        Returns how many bytes of the record it covers. Raises CheckpointError where it is of another model, data set,
        seed or batch, or where there are checkpoints and none is good.
        """
        found = self.store.newest(self.monitor.say) if self.world.rank == 0 else None
        if (chosen := self.world.share(found)) is None:
            if self.world.share(self.store.bad):
                raise CheckpointError(
                    f"no checkpoint in {self.store.directory} is good: put a good one back, or delete the directory to "
                    f"begin anew"
                )
            return 0
        path, meta = chosen
        ours = json.loads(json.dumps(build.identity(self.config, self.shards)))
        different = [f"{k} was {meta.get(k)!r}, now {v!r}" for k, v in ours.items() if meta.get(k) != v]
        if different:
            raise CheckpointError(
                f"{path.parent.parent} was begun with other settings ({'; '.join(different)}): restore them, or choose "
                f"another run.name"
            )
        saved = load(path, self.world.device)
        self.model.load_state_dict(saved["model"])
        optim.load_state(self.optimizer, saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])
        self.schedule.load_state_dict(saved["schedule"])
        vars(self.state).update(saved["state"])
        self.monitor.say(f"continuing from {path.name}: epoch {self.state.epoch + 1}, step {self.state.step}")
        told = {k: v for k, v in as_dict(self.config).items() if k.startswith(("optim.", "schedule.", "train.epochs"))}
        self.changed = {k: v for k, v in json.loads(json.dumps(told)).items() if meta["config"].get(k) != v}
        return int(saved["record"])

    def _superseded(self) -> Superseded:
        return Superseded(f"another start has taken over {self.monitor.directory}: this one leaves it alone")

    def _due(self) -> bool:
        minutes = self.config.checkpoint.minutes
        return minutes > 0 and time.monotonic() - self._saved_at > 60 * minutes

    def _drain(self) -> Pending | None:
        pending, self._pending = self._pending, None
        return pending

    def _rates(self) -> dict[str, float]:
        elapsed = max(1e-9, time.monotonic() - self._began)
        return {"images_per_s": self._images / elapsed, "data_wait": self.train_loader.waited / elapsed}

    def _line(self, loss: float, pending: Pending) -> str:
        rates, steps = self._rates(), self.train_loader.steps
        left = (self.config.train.epochs * steps - pending.step) * self.config.train.global_batch
        seconds = int(left / rates["images_per_s"])
        return (
            f"loss {loss:.3f}, lr {pending.lr:g}, {rates['images_per_s']:.0f} images/s, "
            f"data wait {rates['data_wait']:.0%}, {seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d} left"
        )

    def _post_mortem(self, pending: Pending, loss: float) -> str:
        """Name what led to a value that is not finite; all keys of the batch go to diverged.json."""
        first = pending.step_in_epoch * self.config.train.global_batch
        samples = self.train_loader.order.samples(pending.epoch, first, first + self.config.train.global_batch)
        names = [self.shards.name(int(s)) for s in samples]
        where = f"step {pending.step + 1} (epoch {pending.epoch + 1}, lr {pending.lr:g})"
        what = "gradient" if math.isfinite(loss) else "loss"
        if self.world.rank == 0:
            report = {"what": what, "step": pending.step + 1, "epoch": pending.epoch, "lr": pending.lr, "keys": names}
            (self.monitor.directory / "diverged.json").write_text(json.dumps(report, indent=1))
        return (
            f"the {what} is not finite at {where}, batch {names[0]} ... {names[-1]} (all keys in diverged.json): lower "
            f"optim.lr; the last checkpoint is good"
        )
