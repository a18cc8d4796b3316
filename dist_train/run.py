"""One start of a run, from its configuration to its end."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dist_train import data
from dist_train.config import Config, as_dict
from dist_train.monitor.terminal import Terminal
from dist_train.monitor.wandb import WandbRun
from dist_train.outcomes import Done, Ended, NotBegun, Refused
from dist_train.pictures.curves import draw_curves
from dist_train.ranks import launcher
from dist_train.ranks.watch import Watch
from dist_train.ranks.world import World, join
from dist_train.rundir import record, resume
from dist_train.rundir.directory import RunDirectory
from dist_train.rundir.resume import Resumed
from dist_train.rundir.state import Progress
from dist_train.train import Trainer
from pipelines.cli import refuse
from pipelines.errors import UserError
from pipelines.shards import ShardSet

TOLD_BEFORE = ("numerics", "accelerator")  # whose change `restore` has told


def start(config: Config, name: str) -> int:
    """Train, from the beginning or from where the run stands, and show how it ended.

    Args:
        name: of the run, if the configuration gives none.

    Returns the exit code, see `outcomes`. To a launcher non-zero means "restart me", so there only a failure is
    non-zero, and status.json tells the other ends apart. An error that nobody foresaw is raised.
    """
    watch = Watch(config.run.start_timeout, config.run.stop_timeout)
    try:
        world = join(config.train.device)
    except UserError as error:
        return launcher.exit_code(refuse(error, speaks=launcher.rank() == 0))
    try:
        end = _run(config, name, world, watch)
        dist.barrier()  # leave together
    finally:
        watch.close()
        dist.destroy_process_group()
    return launcher.exit_code(end.code)


def _run(config: Config, name: str, world: World, watch: Watch) -> Ended:
    """How the run ended, after saying so."""
    try:
        sets = _open_sets(config, world)
        if config.train.tower_parallel:
            world = world.in_pairs()
        config = _placed(config, name, world)
        terminal = Terminal(is_first=world.rank == 0)
        path = Path(config.run.dir)
        run = RunDirectory(path, terminal.say, keep=config.checkpoint.keep, writes=world.rank == 0)
        wandb = WandbRun(path, config.monitor)
        try:  # before anything is claimed
            trainer = Trainer(config, world, watch, run, sets, terminal, wandb)
            resumed = resume.restore(trainer.state, config, world, sets[0], run, asdict(trainer.settled))
        except ValueError as error:  # ours, and torch's for sizes that do not fit
            raise Refused(str(error)) from error
        _claim(config, world, run, trainer.progress, resumed.bad)
    except (Refused, NotBegun) as refusal:  # the same on all ranks
        if world.rank == 0:
            print(f"error: {refusal}", file=sys.stderr)
        return refusal
    watch.on_exit = lambda why: run.status.set("failed", why)
    if world.rank == 0:
        run.record.open(resumed.record_bytes)
        wandb.open(as_dict(config))
        wandb.publish(run.record.size())
    _announce(
        run,
        trainer.progress,
        resumed,
        asdict(trainer.settled),
        f"{world.size} x {world.device.type}, {len(sets[0])} images",
    )
    if advice := data.small_share(config, world.size, world.device.type):
        run.say(advice)
    end = _end_of(trainer.fit, run)
    terminal.end_epoch()
    if not end.state:  # the run is another start's now
        run.say(str(end))
        return end
    run.status.set(end.state, str(end), step=trainer.progress.step, epoch=trainer.progress.epoch)
    wandb.publish(run.record.size())
    wandb.close()
    run.record.close()
    if world.rank == 0:
        print(summary(path, end, trainer.progress))
    return end


def _open_sets(config: Config, world: World) -> tuple[ShardSet, ShardSet]:
    """The training and the validation set; rank 0 packs them first if they are not there and the configuration names a
    source. Raises Refused on all ranks."""
    world.together(lambda: data.check_batch(config, world.size))
    if world.share(data.to_pack(config)):
        world.together(lambda: data.pack_source(config), on=[0])
    # A file system that fails for a moment is no refusal: that may be mended by a restart.
    sets = world.together(lambda: data.open_sets(config), catch=(UserError,))
    assert sets is not None
    world.together(lambda: data.check_tars(sets), on=[0])
    return sets


def _placed(config: Config, name: str, world: World) -> Config:
    """The configuration with the name and the directory of the run, the same on all ranks."""
    name = world.share(config.run.name or Path(config.run.dir).name or name)
    path = Path(config.run.dir or Path(config.run.root) / name)
    return replace(config, run=replace(config.run, name=name, dir=str(path)))


def _claim(config: Config, world: World, run: RunDirectory, progress: Progress, bad: list[str]) -> None:
    """Take the run directory over. Raises NotBegun on all ranks, after status.json says so."""
    try:
        world.together(lambda: run.claim(config, progress.step, bad), on=[0], failure=NotBegun)
    except NotBegun as end:
        run.status.set(end.state, str(end), step=progress.step, epoch=progress.epoch)
        raise


def _announce(run: RunDirectory, progress: Progress, resumed: Resumed, settled: dict[str, Any], size: str) -> None:
    """Say, and record, that training begins or goes on."""
    if not resumed.found:
        run.record.append("begun", step=progress.step, **settled)
    if told := [f"{k} = {v}" for k, v in resumed.changed.items() if k not in TOLD_BEFORE]:
        run.say("changed since the checkpoint: " + ", ".join(told))
    if resumed.changed:
        run.record.append("changed", step=progress.step, **resumed.changed)
    run.status.set("running", step=progress.step, epoch=progress.epoch)
    how = settled["deterministic"]
    deterministic = "not deterministic" if how == "no" else f"deterministic {how}"
    run.say(f"{run.path}: {size}, {deterministic}, epoch {progress.epoch + 1}")


def _end_of(training: Callable[[], None], run: RunDirectory) -> Ended:
    """How training ended. An error that nobody foresaw is written to status.json and raised again."""
    try:
        training()
    except Ended as end:
        return end
    except BaseException as error:
        run.status.set("failed", f"{type(error).__name__}: {error}")
        raise
    return Done()


def summary(path: Path, end: Ended, progress: Progress) -> str:
    """What is printed at the end of a run."""
    lines = record.read(path)
    checks = [line for line in lines if line["kind"] == "validation"]
    rates = [line["images_per_s"] for line in lines if line["kind"] == "step"]
    reason = f": {end}" if str(end) else ""
    rows = [("outcome", end.state + reason), ("epochs", f"{progress.epoch} ({progress.step} steps)")]
    if checks:
        best = min(checks, key=lambda line: line["top1_error"])
        for label, line in (("best", best), ("last", checks[-1])):
            top1, top5 = 1 - line["top1_error"], 1 - line["top5_error"]
            rows.append((f"{label} accuracy", f"top-1 {top1:.2%}, top-5 {top5:.2%} (epoch {line['epoch'] + 1})"))
    if rates:
        rows.append(("images/s", f"{sorted(rates)[len(rates) // 2]:.0f} (median)"))
    if picture := draw_curves(path):
        rows.append(("curves", str(picture)))
    rows.append(("run", str(path)))
    return "\n".join(f"{label:>14}  {text}" for label, text in rows)
