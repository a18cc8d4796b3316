"""The loop."""

from __future__ import annotations

import json
import math
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from dist_train import models, optim
from dist_train.checkpoint import CheckpointError, Store, load
from dist_train.config import Config, as_dict
from dist_train.distributed import Watch, World
from dist_train.evaluate import validate
from dist_train.models.dropout import mask_keys
from dist_train.monitor import Monitor
from pipelines.dali import Batch, Loader
from pipelines.order import part
from pipelines.shards import ShardSet

PRECISIONS = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Stopped(Exception):
    """A stop was asked for, and the state is saved."""


class Diverged(Exception):
    """A loss or a gradient is not finite; the weights were not touched by it."""


@dataclass
class State:
    """Where a run stands: `step_in_epoch` steps of `epoch` are done, `step` in all.

    `validated` is true between an epoch's validation and the first step of the next epoch.
    """

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    validated: bool = False
    best_error: float = 1.0
    best_epoch: int = -1

    def advance(self) -> None:
        self.step, self.step_in_epoch, self.validated = self.step + 1, self.step_in_epoch + 1, False

    def next_epoch(self, error: float) -> bool:
        """Take the epoch's validation error; returns whether it is the best."""
        best = self.best_epoch < 0 or error < self.best_error
        if best:
            self.best_error, self.best_epoch = error, self.epoch
        self.epoch, self.step_in_epoch, self.validated = self.epoch + 1, 0, True
        return best


@dataclass
class Flags:
    """What one small all-reduce carries, and the step it belongs to."""

    values: Tensor
    work: Any
    epoch: int
    step_in_epoch: int
    step: int
    lr: float

    def read(self) -> tuple[float, bool, bool, bool]:
        """Sum of the losses, whether an update was refused, whether to stop, whether to save."""
        if self.work:
            self.work.wait()
        loss, refused, stop, due = self.values.tolist()
        return loss, bool(refused), bool(stop), bool(due)


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
        self.shards = data[0]
        batch = config.train.global_batch
        self.train_loader = _loader(config, world, data[0], data[0], batch=batch, training=True)
        check = max(world.size, batch // config.train.accumulate)
        self.val_loader = _loader(config, world, data[1], data[0], batch=check, training=False)

        torch.manual_seed(config.train.seed)
        self.model = models.build(
            config.model.name,
            classes=len(data[0].classes),
            crop=config.data.crop,
            hidden=config.model.hidden,
            dropout=config.model.dropout,
        )
        self.model.to(world.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        precision = _precision(config, world)
        self.autocast = torch.autocast(world.device.type, PRECISIONS[precision], enabled=precision != "off")
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=precision == "fp16")
        if _compiles(config, monitor):
            self.model.compile(dynamic=False)  # a size has one kernel, whatever sizes came before
        self.net: nn.Module = self.model
        if world.size > 1:
            self.net = DistributedDataParallel(self.model, gradient_as_bucket_view=True)
            self._settle_buckets()
        self.optimizer = optim.build(config.optim, self.model)
        self.schedule = optim.Schedule(config.schedule, config.optim.lr)
        self.state = State()
        self._saved_at = time.monotonic()
        self._began, self._images = time.monotonic(), 0  # of this epoch, for the rates
        self._covered = 0  # bytes of the record that the save in flight covers
        self._pending: Flags | None = None
        self.changed: dict[str, Any] = {}  # settings that differ from those that the checkpoint was made with

    def fit(self) -> State:
        """Train from the state that is there to the last epoch. Raises Stopped and Diverged."""
        state, config, steps = self.state, self.config, self.train_loader.steps
        while state.epoch < config.train.epochs and not self.exhausted():
            self.monitor.begin_epoch(state.epoch, config.train.epochs, state.step_in_epoch, steps)
            self._began, self._images, self.train_loader.waited = time.monotonic(), 0, 0.0
            for batch in self.train_loader.epoch(state.epoch, start=state.step_in_epoch):
                lr = self.schedule.lr(state.epoch, state.step_in_epoch, steps)
                flags = self.train_step(batch, lr)
                state.advance()
                before, self._pending = self._pending, flags
                self.settle(before)  # a step late, so that the device is never waited for
            self.settle(self._drain())
            error = self.validate()
            if self.schedule.step(error, state.epoch):
                self.monitor.say(f"the error stopped improving: learning rate divided by {config.schedule.factor:g}")
            best = state.next_epoch(error)  # before the save: a restart must not repeat the epoch
            self.save(best=best)
        self.store.join()
        return state

    def exhausted(self) -> bool:
        """Whether the error stopped improving after the last division, and the run is to stop then."""
        return self.config.schedule.stop_early and self.schedule.exhausted

    def train_step(self, batch: Batch, lr: float) -> Flags:
        """Forward, backward, update. The rank's loss is its sum times ranks / global batch, so that DDP's average over
        ranks is the mean over the global batch, however the samples are spread."""
        config, world, state = self.config, self.world, self.state
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad()
        positions = batch.start + np.arange(len(batch.labels))
        keys = mask_keys(config.train.seed, state.step, positions).to(world.device)
        torch.manual_seed(_torch_seed(config.train.seed, state.step, world.rank))  # for models with their own dropout
        inputs, labels = batch.inputs.to(world.device, non_blocking=True), batch.labels.to(world.device)
        total = torch.zeros((), dtype=torch.float64, device=world.device)
        pieces = config.train.accumulate
        for i in range(pieces):
            low, high = part(len(labels), i, pieces)
            last = i == pieces - 1
            with nullcontext() if last or world.size == 1 else self.net.no_sync():  # type: ignore[operator]
                with self.autocast:
                    logits = self.net(inputs[low:high], keys[low:high])
                loss = F.cross_entropy(logits.float(), labels[low:high], reduction="sum")
                scaled = self.scaler.scale(loss * (world.size / config.train.global_batch))
                scaled.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        refused = optim.update(self.optimizer, self.scaler)
        due = world.rank == 0 and self._due()
        values = torch.stack([total, refused.double(), total.new_tensor(self.watch.stop), total.new_tensor(due)])
        return Flags(values, world.reduce(values), state.epoch, state.step_in_epoch, state.step, lr)

    def settle(self, flags: Flags | None) -> None:
        """Do what the ranks agreed on at a step: record it, save, stop."""
        stop, due = self.observe(flags) if flags else (False, False)
        every = self.config.checkpoint.steps
        if stop or due or (every and self.state.step % every == 0):
            if rest := self._drain():  # a state is saved only when its last step is known to be good
                stop = self.observe(rest)[0] or stop
            self.save(best=False)
        if stop:
            self.stop()

    def observe(self, flags: Flags) -> tuple[bool, bool]:
        """Record a step. Returns whether to stop and whether to save. Raises Diverged."""
        self.watch.beat(self.config.run.step_timeout)
        loss, refused, stop, due = flags.read()
        batch, step = self.config.train.global_batch, flags.step + 1
        loss /= batch
        if refused or not math.isfinite(loss):
            raise Diverged(self._post_mortem(flags, loss))
        self._images += batch
        if step % self.config.monitor.log_every == 0:
            progress = flags.epoch + (flags.step_in_epoch + 1) / self.train_loader.steps
            where = {"step": step, "epoch": flags.epoch, "progress": progress, "images": step * batch}
            self.monitor.record("step", **where, loss=loss, lr=flags.lr, **self._rates())
        self.monitor.progress(step, flags.epoch, lambda: self._line(loss, flags))
        return stop, due

    def stop(self) -> None:
        """Wait for the save, and leave."""
        self.store.join()
        if self.store.error:
            raise OSError(f"the state could not be saved before the stop: {self.store.error}")
        raise Stopped

    def validate(self) -> float:
        """The top-1 validation error of the epoch, exact. Agrees on a stop at each batch."""

        def each(batch: int) -> None:
            self.watch.beat(self.config.run.step_timeout)
            flag = torch.tensor([float(self.watch.stop)], device=self.world.device)
            if work := self.world.reduce(flag):
                work.wait()
            if flag.item():
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
        if self.world.rank:
            return
        self.store.join()
        if self.store.error:
            self.monitor.say(f"the last save failed ({self.store.error}): older checkpoints stand, trying again now")
        else:
            self.monitor.publish(self._covered)
        size = self.monitor.size()
        tensors = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "schedule": self.schedule.state_dict(),
            "state": asdict(self.state),
            "record": size,
        }
        where = {k: getattr(self.state, k) for k in ("step", "epoch", "step_in_epoch", "validated")}
        identity = self._identity() | {"config": as_dict(self.config)}
        versions = {"torch": torch.__version__, "world_size": self.world.size}
        self.store.save(tensors, {**where, **identity, **versions}, best=best)
        self._covered = size

    def restore(self) -> int:
        """Take over the newest good checkpoint, if there is one. Rank 0 chooses.

        Returns how many bytes of the record it covers. Raises CheckpointError where it is of another model, data set,
        seed or batch.
        """
        found = self.store.newest(self.monitor.say) if self.world.rank == 0 else None
        if (chosen := self.world.share(found)) is None:
            return 0
        path, meta = chosen
        identity = json.loads(json.dumps(self._identity()))
        different = [f"{k} {meta.get(k)!r} -> {v!r}" for k, v in identity.items() if meta.get(k) != v]
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

    def _identity(self) -> dict[str, Any]:
        """What a run cannot change: where one of these differs, its checkpoints are another run's."""
        flat = as_dict(self.config)
        free = {"data.train", "data.val", "data.source", "data.device", "data.threads", "data.readers", "data.ahead"}
        kept = {k: v for k, v in flat.items() if k.split(".")[0] in ("model", "data") and k not in free}
        kept |= {k: flat[k] for k in ("train.seed", "train.global_batch", "optim.name")}
        return kept | {"classes": len(self.shards.classes), "training set": self.shards.manifest.index_sha256[:16]}

    def _due(self) -> bool:
        minutes = self.config.checkpoint.minutes
        return minutes > 0 and time.monotonic() - self._saved_at > 60 * minutes

    def _drain(self) -> Flags | None:
        flags, self._pending = self._pending, None
        return flags

    def _settle_buckets(self) -> None:
        """DDP rebuilds its buckets after its first step, and gloo then sums in another order. Two throw-away steps put
        that behind us, so that a resumed run sums as one that never stopped."""
        before = {k: v.clone() for k, v in self.model.state_dict().items()}
        side, (low, high) = (
            self.config.data.crop,
            part(self.config.train.global_batch, self.world.rank, self.world.size),
        )
        low, high = part(high - low, 0, self.config.train.accumulate)
        inputs = torch.zeros(high - low, 3, side, side, device=self.world.device).to(memory_format=torch.channels_last)
        keys = torch.zeros(high - low, dtype=torch.int64, device=self.world.device)
        for _ in range(2):
            with self.autocast:
                logits = self.net(inputs, keys)
            logits.float().sum().backward()
        self.net.zero_grad()
        self.model.load_state_dict(before)

    def _rates(self) -> dict[str, float]:
        elapsed = max(1e-9, time.monotonic() - self._began)
        return {"images_per_s": self._images / elapsed, "data_wait": self.train_loader.waited / elapsed}

    def _line(self, loss: float, flags: Flags) -> str:
        rates, steps = self._rates(), self.train_loader.steps
        left = (self.config.train.epochs * steps - flags.step) * self.config.train.global_batch / rates["images_per_s"]
        clock = f"{int(left // 3600)}:{int(left // 60 % 60):02d}:{int(left % 60):02d}"
        return (
            f"loss {loss:.3f}, lr {flags.lr:g}, {rates['images_per_s']:.0f} images/s, "
            f"data wait {rates['data_wait']:.0%}, {clock} left"
        )

    def _post_mortem(self, flags: Flags, loss: float) -> str:
        """Name what led to a non-finite loss; all keys of the batch go to diverged.json."""
        first = flags.step_in_epoch * self.config.train.global_batch
        samples = self.train_loader.order.samples(flags.epoch, first, first + self.config.train.global_batch)
        names = [self.shards.name(int(s)) for s in samples]
        if self.world.rank == 0:
            report = {"step": flags.step + 1, "epoch": flags.epoch, "lr": flags.lr, "loss": str(loss), "keys": names}
            (self.monitor.directory / "diverged.json").write_text(json.dumps(report, indent=1))
        what = "loss" if not math.isfinite(loss) else "gradient"
        return (
            f"the {what} is not finite at step {flags.step + 1} (epoch {flags.epoch + 1}, lr {flags.lr:g}, batch "
            f"{names[0]} ... {names[-1]}, all in diverged.json): lower optim.lr; the last checkpoint is good"
        )


def _loader(
    config: Config, world: World, shards: ShardSet, statistics: ShardSet, *, batch: int, training: bool
) -> Loader:
    data = config.data
    on_gpu = data.device == "gpu" or (data.device == "auto" and world.device.type == "cuda")
    return Loader(
        shards,
        data,
        statistics.manifest,
        batch=batch,
        training=training,
        seed=config.train.seed,
        shuffle_shards=data.shuffle_shards,
        rank=world.rank,
        size=world.size,
        device="gpu" if on_gpu else "cpu",
        device_id=world.local_rank if on_gpu else None,
        divide_by_std=data.divide_by_std,
        threads=data.threads or max(1, torch.get_num_threads()),
        readers=data.readers,
        ahead=data.ahead,
    )


def _precision(config: Config, world: World) -> str:
    """`auto`: off on the CPU, where bfloat16 was measured to be slower; on a GPU bf16 where it has it, else fp16."""
    if config.train.precision != "auto":
        return config.train.precision
    if world.device.type == "cpu":
        return "off"
    return "bf16" if torch.cuda.is_bf16_supported() else "fp16"


def _torch_seed(seed: int, step: int, rank: int) -> int:
    return int(mask_keys(seed, step, np.array([rank]))[0])


def _compiles(config: Config, monitor: Monitor) -> bool:
    """Whether to compile; `auto` tries a small function, since a missing compiler shows only then."""
    if config.train.compile != "auto":
        return config.train.compile == "on"
    try:
        torch.compile(lambda x: x.relu() + 1)(torch.ones(8))
        return True
    except Exception as error:
        monitor.say(f"torch.compile is off: no working compiler ({str(error).splitlines()[0][:100]})")
        return False
