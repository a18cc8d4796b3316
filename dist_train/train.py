"""The loop."""

from __future__ import annotations

import json
import math
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dist_train import build, optim
from dist_train.config import Config, as_dict
from dist_train.models.dropout import mask_keys
from dist_train.monitor.terminal import Monitor
from dist_train.probe import measure
from dist_train.ranks.vote import BadData, Diverged, NotSaved, Pending, Stopped
from dist_train.ranks.world import Watch, World
from dist_train.rundir.checkpoint import Store, load
from dist_train.rundir.lease import Superseded
from dist_train.rundir.state import MEMORY, Parts, State, begin_from, choose
from dist_train.validate import validate
from pipelines.loader import Batch
from pipelines.order import even_split
from pipelines.shards import ShardSet


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
        self.train_loader = build.train_loader(config, world, self.shards)
        check = max(world.dp_size, batch // config.train.accumulate)
        self.val_loader = build.fixed_loader(config, world, val, self.shards, batch=check)
        compiled = config.train.compile != "off"
        if config.train.compile == "auto" and (why := build.compiler_works(world)):
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
        self.parts = Parts(self.model, self.optimizer, self.scaler, self.schedule, self.state)
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
                if state.step in config.monitor.probes:
                    self.probe(batch, lr)
                under_way = self.train_step(batch, lr)
                state.advance()
                before, self._pending = self._pending, under_way
                self.settle(before)  # a step late, so that the device is never waited for
                if self.enough():
                    break
            self.settle(self._drain())
            error = self.validate()
            if self.schedule.step(error, state.epoch):
                self.monitor.say(f"learning rate divided by {config.schedule.factor:g}{self._too_early(error)}")
            best = state.next_epoch(error)  # before the save: a restart must not repeat the epoch
            self.save(best=best)
        self.finish()

    def exhausted(self) -> bool:
        """Whether the run is to stop before its last epoch."""
        return (self.config.schedule.stop_early and self.schedule.exhausted) or self.enough()

    def enough(self) -> bool:
        """Whether the training error is as low, or the steps are as many, as was asked for."""
        state, config = self.state, self.config.train
        return (state.step > MEMORY and state.train_error < config.until_error) or 0 < config.max_steps <= state.step

    def train_step(self, batch: Batch, lr: float) -> Pending:
        """Forward, backward, update. The rank's loss is its sum times data-parallel ranks / global batch, so that DDP's
        average over those is the mean over the global batch, however the samples are spread."""
        config, world, state = self.config, self.world, self.state
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad()
        keys = self.mask_keys(batch)
        own = mask_keys(config.train.seed, state.step, np.array([world.dp_rank]))
        torch.manual_seed(int(own[0]))  # for models that bring their own dropout
        inputs, labels = batch.inputs.to(world.device, non_blocking=True), batch.labels.to(world.device)
        total, wrong = torch.zeros(2, dtype=torch.float64, device=world.device)
        pieces = config.train.accumulate
        for i in range(pieces):
            low, high = even_split(len(labels), i, pieces)
            alone = i == pieces - 1 or world.dp_size == 1
            with nullcontext() if alone else self.net.no_sync():  # type: ignore[operator]
                with self.autocast:
                    logits = self.net(inputs[low:high], keys[low:high])
                loss = F.cross_entropy(logits.float(), labels[low:high], reduction="sum")
                scaled = self.scaler.scale(loss * (world.dp_size / config.train.global_batch))
                scaled.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
            wrong += (logits.argmax(1) != labels[low:high]).sum()
        refused = optim.update(self.optimizer, self.scaler, world.agree)
        due = world.rank == 0 and self._due()
        rest = (self.watch.stop, due, self.monitor.superseded, batch.replaced * world.counts)
        sums = (total * world.counts, wrong * world.counts, refused.double())
        values = torch.stack([*sums, *torch.tensor(rest, dtype=torch.float64).to(world.device)])
        return Pending(values, world.reduce(values), state.epoch, state.step_in_epoch, state.step, lr)

    def mask_keys(self, batch: Batch) -> Tensor:
        """What the dropout masks of a batch follow from at this step, int64 [n]."""
        positions = batch.start + np.arange(len(batch.labels))
        return mask_keys(self.config.train.seed, self.state.step, positions).to(self.world.device)

    def probe(self, batch: Batch, lr: float) -> None:
        """Record what `dist_train.probe` measures on a batch, and leave the state of training as it is."""
        device = self.world.device
        values = measure(self.model, batch.inputs.to(device), batch.labels.to(device), self.mask_keys(batch))
        images = self.state.step * self.config.train.global_batch
        self.monitor.record("probe", step=self.state.step, epoch=self.state.epoch, images=images, lr=lr, **values)

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
        self.state.average(agreed.wrong / batch, step)
        self._images += batch
        if step % self.config.monitor.log_every == 0 or self.enough():
            progress = pending.epoch + (pending.step_in_epoch + 1) / self.train_loader.steps
            where = {"step": step, "epoch": pending.epoch, "progress": progress, "images": step * batch}
            bad = {"bad_samples": self.state.bad_samples} if self.state.bad_samples else {}
            values = {"loss": loss, "train_error": self.state.train_error, "lr": pending.lr}
            self.monitor.record("step", **where, **values, **bad, **self._rates())
        self.monitor.progress(step, pending.epoch, lambda: self._line(loss, pending))
        return bool(agreed.stop), bool(agreed.due)

    def stop(self) -> None:
        """Wait for the save, and leave."""
        self.finish()
        raise Stopped

    def finish(self) -> None:
        """Wait for the last save; try once more where it failed. Raises NotSaved where it fails again, on all ranks."""
        self.store.join()
        if self.world.share(bool(self.store.error) and not self.monitor.superseded):
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
        state = self.parts.state_dict()
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
        versions = {"torch": torch.__version__, "world_size": self.world.size}
        meta = asdict(self.state) | build.identity(self.config, self.shards) | {"config": as_dict(self.config)}
        self.store.save(state | {"record": size}, meta | versions, best=best)
        self._covered = size

    def restore(self) -> int:
        """Take over the newest good checkpoint, if there is one; else `model.init_from`, if that is given.

        Returns how many bytes of the record it covers. Raises CheckpointError.
        """
        config, say = self.config, self.monitor.say
        chosen = choose(self.store, self.world, config, self.shards, say)
        if chosen is None:
            if config.model.init_from:
                taken, fresh = begin_from(self.model, Path(config.model.init_from), self.world.device)
                each = " for each tower" if config.train.tower_parallel else ""
                say(f"{len(taken)} tensors{each} from {config.model.init_from}; new: {', '.join(fresh) or 'none'}")
            return 0
        path, meta = chosen
        saved = load(path, self.world.device)
        self.parts.load_state_dict(saved)
        say(f"continuing from {path.name}: epoch {self.state.epoch + 1}, step {self.state.step}")
        told = {k: v for k, v in as_dict(config).items() if k.startswith(("optim.", "schedule.", "train.epochs"))}
        self.changed = {k: v for k, v in json.loads(json.dumps(told)).items() if meta["config"].get(k) != v}
        return int(saved["record"])

    def _too_early(self, error: float) -> str:
        """What to add where a net of this validation error had better kept its learning rate."""
        labels = self.val_loader.shards.index["label"]
        commonest = 1 - int(np.bincount(labels).max()) / len(labels)
        if error < commonest:
            return ""
        return (
            f", although the net has not begun to learn (always naming the commonest class: {commonest:.2%}): raise "
            f"schedule.patience, or move schedule.milestones"
        )

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
        names = self.train_loader.names(pending.epoch, pending.step_in_epoch)
        where = f"step {pending.step + 1} (epoch {pending.epoch + 1}, lr {pending.lr:g})"
        what = "gradient" if math.isfinite(loss) else "loss"
        if self.world.rank == 0:
            report = {"what": what, "step": pending.step + 1, "epoch": pending.epoch, "lr": pending.lr, "keys": names}
            (self.monitor.directory / "diverged.json").write_text(json.dumps(report, indent=1))
        return (
            f"the {what} is not finite at {where}, batch {names[0]} ... {names[-1]} (all keys in diverged.json): lower "
            f"optim.lr; the last checkpoint is good"
        )
