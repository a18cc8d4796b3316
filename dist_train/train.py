"""The loop and the step."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from dist_train import build, models, numbers, optim, probe, process, schedules
from dist_train.config import Config
from dist_train.fetch import Fetching
from dist_train.flat import as_dict
from dist_train.models.dropout import keys_of_epoch, rank_seed
from dist_train.monitor.reporter import Reporter
from dist_train.monitor.terminal import Terminal
from dist_train.outcomes import BadData, Diverged, Stopped
from dist_train.profiling import Profile, profile_as
from dist_train.ranks.logged import Logged, PendingNumbers
from dist_train.ranks.tower_parallel import told_of
from dist_train.ranks.vote import PendingVote, Vote
from dist_train.ranks.watch import Watch
from dist_train.ranks.world import World
from dist_train.rundir import postmortem
from dist_train.rundir.directory import RunDirectory
from dist_train.rundir.resume import QUARANTINED, identity, quarantined
from dist_train.rundir.saver import Saver
from dist_train.rundir.state import MEMORY, Progress, Step, TrainState, Window
from dist_train.validate import chance_error, validate
from pipelines.loader import Batch, Loader, Unreadable
from pipelines.order import even_split
from pipelines.shards import ShardSet


class Pending(NamedTuple):
    """A step, its vote and its logged numbers, which are still under way."""

    step: Step
    vote: PendingVote
    numbers: PendingNumbers


class Trainer:
    """One rank of a run. `fit` is the loop, `train_step` the step; the other methods follow one of these."""

    # What is trained, and on what
    config: Config
    train_loader: Loader
    val_loader: Loader
    fetching: Fetching
    model: nn.Module
    net: nn.Module  # the model, in DDP if there are several data-parallel ranks
    autocast: torch.autocast
    settled: process.Settled
    state: TrainState  # all that a checkpoint holds, model and progress among it
    progress: Progress
    # The ranks
    world: World
    watch: Watch
    logged: Logged
    pending: Pending | None  # the last step, until the next one is under way
    unread: Unreadable  # why this rank can no longer read its samples
    # What is written and shown
    run: RunDirectory
    saver: Saver
    report: Reporter
    profile: Profile

    def __init__(
        self,
        config: Config,
        world: World,
        watch: Watch,
        run: RunDirectory,
        sets: tuple[ShardSet, ShardSet],
        terminal: Terminal,
    ) -> None:
        training_set, val_set = sets
        self.config, self.world, self.watch, self.run = config, world, watch, run
        self.settled = replace(process.prepare(config, world, run.say), precision=build.precision(config, world))
        self.train_loader = build.train_loader(config, world, training_set)
        batch = max(world.dp_size, config.train.global_batch // config.train.accumulate)
        self.val_loader = build.fixed_loader(config, world, val_set, training_set, batch=batch)
        self.fetching = Fetching(config, world, watch, run, (self.train_loader, self.val_loader))
        compiled = self.settled.compiled
        self.model = build.model(config, world, len(training_set.classes), compiled=compiled)
        with run.ledger.during("compiling" if compiled else "startup"):
            self.net = build.distribute(self.model, config, world, compiled=compiled)
        self.autocast = build.autocast(config, world)
        scaler = torch.amp.GradScaler(world.device.type, enabled=self.settled.precision == "fp16")
        schedule = schedules.build(config)
        self.progress = Progress()
        optimizer = optim.build(config.optim, self.model)
        self.state = TrainState(self.model, optimizer, scaler, schedule, self.progress, Window())
        self.logged, self.pending, self.unread = Logged(world), None, []
        meta: dict[str, Any] = identity(config, training_set) | {"config": as_dict(config)}
        meta |= {"torch": torch.__version__, "world_size": world.size, "process": asdict(self.settled)}
        meta |= {QUARANTINED: quarantined(training_set)}
        self.saver = Saver(config.checkpoint, world, run, self.state, meta)
        self.report = Reporter(config, world, run, terminal, self.train_loader)
        self.profile = profile_as(config.profile, world, run)

    def fit(self) -> None:
        """Trains from the current state to the last epoch. Raises Ended if the run ends earlier."""
        progress, schedule, steps = self.progress, self.state.schedule, self.train_loader.steps
        ledger, stepping = self.run.ledger, "compiling" if self.settled.compiled else "training"
        # Section 5: "roughly 90 cycles". An epoch that was begun is validated, whatever ended it.
        while progress.epoch < self.config.train.epochs and (progress.step_in_epoch or not self.enough()):
            ledger.enter("training")
            self.report.begin_epoch(progress)
            self.fetching.follow(progress.epoch, progress.step_in_epoch)
            keys = keys_of_epoch(self.config.train.seed, first=progress.step - progress.step_in_epoch)
            epoch = self.train_loader.epoch(progress.epoch, progress.step_in_epoch, keys, self.unread)
            for batch in () if self.enough() else self.profile.batches(epoch, progress, steps):
                lr = schedule.lr(progress.epoch, progress.step_in_epoch, steps)
                if progress.step in self.config.monitor.probes and not self.unread:
                    self.probe(batch, lr)
                # Finish the previous step while this one is under way, so that nothing waits for the device.
                before = self.pending
                ledger.enter(stepping)  # the first step compiles
                with self.profile.span("step"):
                    self.pending, stepping = self.train_step(batch, lr), "training"
                ledger.enter("training")
                progress.advance()
                self.finish_step(before)
                if self.enough():
                    under_way, self.pending = self.pending, None
                    self.finish_step(under_way)
                    if self.enough():  # after the step that was under way, too
                        break
            self.profile.end()
            last, self.pending = self.pending, None
            self.finish_step(last)
            error = self.validate()
            # "divide the learning rate by 10 when the validation error rate stopped improving"
            divisor = schedule.ended(error, self.state.window.epoch_loss, progress.epoch, steps)
            if divisor != 1:
                chance = chance_error(self.val_loader.shards.labels(self.val_loader.shards.good))
                lr, advice = schedule.lr(progress.epoch + 1, 0, steps), schedules.remedy(self.config, schedule, steps)
                self.report.division(divisor, error, chance, lr, progress, advice)
            self.state.window.clear_epoch()
            progress.next_epoch(error)  # before the save: a restart must not repeat the epoch
            self.saver.save()
        self.profile.close(progress.step)
        self.saver.finish()

    def enough(self) -> bool:
        """Whether the run is to end before its last epoch: the learning rate is exhausted, or the training error or the
        number of steps is what was asked for."""
        progress, config = self.progress, self.config
        return (
            (config.schedule.stop_early and self.state.schedule.exhausted)
            or (progress.step > MEMORY and progress.train_error < config.train.until_error)
            or 0 < config.train.max_steps <= progress.step
        )

    def train_step(self, batch: Batch, lr: float) -> Pending:
        """Forward, backward, update; then asks the other ranks, without waiting for their answers."""
        config, world, progress, scaler = self.config, self.world, self.progress, self.state.scaler
        optimizer = self.state.optimizer
        self.watch.step = progress.step + 1
        optim.set_lr(optimizer, lr)
        optimizer.zero_grad()
        numbers.open_step(world.device)
        if models.draws_numbers(self.model):  # from torch's generators, which are slow to seed
            torch.manual_seed(rank_seed(config.train.seed, progress.step, world.dp_rank))
        inputs, labels, keys = batch.inputs, batch.labels, batch.keys
        total = torch.zeros((), dtype=torch.float64, device=world.device)
        wrong = torch.zeros((), dtype=torch.float64, device=world.device)
        pieces = config.train.accumulate
        for i in range(pieces):
            low, high = even_split(len(labels), i, pieces)
            # DDP averages the gradients after the last piece; until then, each rank accumulates its own.
            sync_now = i == pieces - 1 or self.net is self.model
            with nullcontext() if sync_now else self.net.no_sync():  # type: ignore[operator]
                with self.autocast:
                    logits = self.net(inputs[low:high], keys[low:high])
                loss = F.cross_entropy(logits.float(), labels[low:high], reduction="sum")
                # DDP's average over ranks of (sum x ranks / global batch) is the mean over the global batch, however
                # many samples each rank has.
                scaled = scaler.scale(loss * (world.dp_size / config.train.global_batch))
                scaled.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
            wrong += (logits.argmax(1) != labels[low:high]).sum()
        updated = optim.update(optimizer, scaler, world.agree, told_of(self.model))
        logged = self.logged.cast()
        said: dict[str, Any] = {"refused": updated.refused, "stop": self.watch.stop, "lost": self.run.lease.lost}
        said |= {"save": self.saver.due_by_clock(), "unread": len(self.unread), "new": len(logged.new)}
        if world.counted:  # not by the second tower of a net, which saw the same samples as the first
            said |= {"loss": total, "wrong": wrong, "bad": batch.replaced}
        if world.dp_rank == 0:  # the gradients are the same on all, but for towers
            said["square"] = updated.square
        step = Step(progress.epoch, progress.step_in_epoch, progress.step, lr)
        return Pending(step, Vote.cast(world, self.report.row(step), **said), logged)

    def finish_step(self, pending: Pending | None) -> None:
        """Records a step, saves if due, and stops if any rank was asked to. Raises Ended."""
        vote = self.observe(pending)
        stop = vote.stop > 0
        if stop or vote.save or self.saver.due(self.progress.step):
            # The step under way is already in the weights and in `progress.step`: it must be known to be good before
            # the state is saved.
            last, self.pending = self.pending, None
            stop = self.observe(last).stop > 0 or stop
            with self.profile.span("save"):
                self.saver.save(unless=lambda: self.watch.stop and not stop)  # then the next step stops, and saves
        if stop:
            self.saver.finish()
            raise Stopped

    def observe(self, pending: Pending | None) -> Vote:
        """Waits for a step's vote and records it. Raises LeaseLost, Unread, Diverged, BadData or BadNumbers on all
        ranks alike."""
        self.watch.heartbeat(self.config.run.step_timeout)
        if pending is None:
            return Vote()
        step, batch, progress = pending.step, self.config.train.global_batch, self.progress
        vote = pending.vote.read()
        self.saver.check()
        loss = vote.loss / batch
        if vote.lost:
            raise self.run.lease.loss(int(vote.lost))
        if vote.unread:  # NaN on one rank: no rank has taken this step, nor the one under way
            if self.pending:
                self.pending.vote.read()
            progress.go_back(step)
            # But both have lowered the scale of fp16, and have entered the running means of a net that has some: such a
            # run continues from its last checkpoint.
            as_before = not self.state.scaler.is_enabled() and not list(self.model.buffers())
            self.saver.give_up(self.unread, saves=as_before, stop=vote.stop > 0)
        if vote.refused or not math.isfinite(loss):
            keys = self.train_loader.names(step.epoch, step.step_in_epoch)
            raise Diverged(postmortem.diverged(self.run.path, step, loss, keys, writes=self.world.rank == 0))
        progress.bad_samples += int(vote.bad)
        if vote.bad and progress.bad_samples > self.config.data.max_bad:  # not for those in quarantine by now
            raise BadData(
                f"{progress.bad_samples} samples could not be decoded, more than data.max_bad: "
                f"run {self.train_loader.shards.here.command('verify')}, or raise it; the same command continues"
            )
        progress.average(vote.wrong / batch, step.number)
        logged = self.logged.read(pending.numbers, vote.new)
        self.state.window.add(vote.loss, vote.wrong, math.sqrt(vote.square), logged)
        self.report.step(step, vote.rows, self.state, last=self.pending is None and self.enough())
        return vote

    def validate(self) -> float:
        """Exact top-1 validation error of the epoch. The ranks agree on a stop after each batch. Raises Ended."""
        progress, config = self.progress, self.config

        def after_batch() -> None:
            self.watch.heartbeat(config.run.step_timeout)
            self.report.validated()
            said = {"stop": self.watch.stop, "lost": self.run.lease.lost, "unread": len(self.unread)}
            vote = Vote.cast(self.world, **said).read()
            if vote.lost:
                raise self.run.lease.loss(int(vote.lost))
            if vote.unread:
                self.saver.give_up(self.unread, saves=True, stop=vote.stop > 0)
            if vote.stop:
                self.saver.save()  # the epoch is trained, not yet validated
                self.saver.finish()
                raise Stopped

        self.report.begin_validation(progress, self.val_loader.steps)
        with self.run.ledger.during("validation"):
            scores, taken = validate(self.model, self.val_loader, self.world, self.autocast, after_batch, self.unread)
        self.run.confusion.put(taken, self.val_loader.shards.classes, progress.step, progress.epoch)
        lr = self.state.schedule.lr(progress.epoch, self.train_loader.steps - 1, self.train_loader.steps)
        self.report.validation(scores, self.state, lr)
        return scores.top1_error

    def probe(self, batch: Batch, lr: float) -> None:
        """Records what `dist_train.probe` measures on a batch, without changing the state of training."""
        values = probe.measure(self.model, batch.inputs, batch.labels, batch.keys)
        self.report.probe(values, self.progress, lr)
