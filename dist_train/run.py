"""One start of a run, from its configuration to its end."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from dist_train import data
from dist_train.config import Config, as_dict
from dist_train.monitor.terminal import Terminal
from dist_train.monitor.wandb import WandbRun
from dist_train.outcomes import Done, Ended, NotBegun, NotHere, Refused
from dist_train.pictures.curves import draw_curves
from dist_train.ranks import launcher
from dist_train.ranks.watch import Watch
from dist_train.ranks.world import World, flight_record, join
from dist_train.rundir import record, resume
from dist_train.rundir.directory import RunDirectory
from dist_train.rundir.last_words import LastWords
from dist_train.rundir.resume import Resumed
from dist_train.rundir.state import Progress
from dist_train.rundir.status import Announcement
from dist_train.train import Trainer
from pipelines.errors import UserError
from pipelines.files import readable_jsonl
from pipelines.shards import ShardSet
from pipelines.speech import say, show

TOLD_BEFORE = ("numerics", "accelerator")  # whose change `restore` has told


def start(config: Config, name: str, watch: Watch, words: LastWords, announcement: Announcement) -> int:
    """Train, from the beginning or from where the run stands, and show how it ended.

    Args:
        name: of the run, if the configuration gives none.
        announcement: of this start, which is waited for.

    Returns the exit code, see `outcomes` and `launcher.end`. An error that nobody foresaw ends the process.
    """
    try:
        size = launcher.size()
        announcement.say(f"{size} ranks are waited for" if size > 1 else "the run is looked at")
        try:
            world = join(config.train.device)
        except UserError as error:
            end = _missing(error, announcement)
        else:
            end = _run(config, name, world, watch, words, announcement)
            if not isinstance(end, Refused | NotBegun):  # which may be one rank's alone
                world.leave()
    except BaseException as error:
        words.fail(error)
    watch.close()
    return launcher.end(end.code, str(end))


def _missing(error: UserError, announcement: Announcement) -> Ended:
    """How a start ends whose rank has no device, or no launcher. By hand that is refused. What has run before can run
    on another node, so it is a failure there, which brings the job back."""
    end = NotHere(str(error)) if launcher.restarted() else Refused(str(error))
    if launcher.rank() == 0 or not launcher.attended():
        _tell(end, announcement)
    return end


def _tell(end: Ended, announcement: Announcement) -> None:
    """Say why the run does not begin, in status.json too where nobody is there to read it, or the run has suffered."""
    say(f"error: {end}")
    if end.state or not launcher.attended():
        announcement.fail(str(end), rank=launcher.rank(), node=socket.gethostname(), error=type(end).__name__)
    else:
        announcement.retract()


def _run(config: Config, name: str, world: World, watch: Watch, words: LastWords, announcement: Announcement) -> Ended:
    """How the run ended, after saying so."""
    try:
        sets = _open_sets(config, world, watch, announcement)
        if config.train.tower_parallel:
            world = world.in_pairs()
        config = _placed(config, name, world)
        terminal = Terminal(is_first=world.rank == 0)
        path = Path(config.run.dir)
        run = RunDirectory(path, terminal.say, keep=config.checkpoint.keep, writes=world.rank == 0)
        wandb = WandbRun(path, config.monitor, terminal.say)
        compiled = config.train.compile == "on" or (config.train.compile == "auto" and world.device.type == "cuda")
        announcement.say("the net is compiled" if compiled else "the net is built")
        try:  # before anything is claimed
            trainer = Trainer(config, world, watch, run, sets, terminal, wandb)
            resumed = resume.restore(trainer.state, config, world, sets[0], run, asdict(trainer.settled))
            config = replace(config, model=replace(config.model, init_from=resumed.init_from))
            trainer.saver.meta["config"] = as_dict(config)
        except ValueError as error:  # ours, and torch's for sizes that do not fit
            raise Refused(str(error)) from error
        _claim(config, world, run, resumed)
    except (Refused, NotBegun) as refusal:  # the same on all ranks, or else the launcher ends the others
        if world.rank == 0:
            _tell(refusal, announcement)
        return refusal
    words.claimed(run.path, run.status, world.size)
    if world.device.type == "cuda":
        words.record = flight_record
    if world.rank == 0:
        wandb.open(as_dict(config))
        wandb.publish(resumed.record_bytes)
        words.close = [run.close, wandb.close]
    size = f"{world.size} x {world.device.type}, {len(sets[0])} images"
    _announce(run, trainer.progress, resumed, asdict(trainer.settled), size)
    if advice := data.small_share(config, world.size, world.device.type):
        run.say(advice)
    end = _end_of(trainer.fit)
    terminal.end_epoch()
    if not end.state:  # the run is another start's now
        run.say(str(end))
        return end
    run.status.set(end.state, str(end), step=trainer.progress.step, epoch=trainer.progress.epoch)
    _put_away(run, run.close, lambda: wandb.publish(run.record.size), wandb.close)
    if world.rank == 0:
        show(summary(path, end, trainer.progress))
    return end


def _open_sets(config: Config, world: World, watch: Watch, announcement: Announcement) -> tuple[ShardSet, ShardSet]:
    """The training and the validation set; rank 0 packs them first if they are not there and the configuration names a
    source. Raises Refused on all ranks."""
    world.together(lambda: data.check_batch(config, world.size))
    if world.share(data.to_pack(config)):
        _pack(config, world, watch, announcement)
    # A file system that fails for a moment is no refusal: that may be mended by a restart.
    sets = world.together(lambda: data.open_sets(config), catch=(UserError,))
    assert sets is not None
    # A list that is just being written is the same to all.
    for shards, rows in zip(sets, world.share([shards.quarantined for shards in sets]), strict=True):
        shards.quarantined = rows
    world.together(lambda: data.check_tars(sets), on=[0])
    announcement.say("the run is looked at")
    return sets


def _pack(config: Config, world: World, watch: Watch, announcement: Announcement) -> None:
    """Let rank 0 pack the source, however long that takes: as long as it goes on, all ranks are alive. Raises Refused
    on all ranks."""
    announcement.say(f"{config.data.source} is packed")
    packing = data.Packing(config) if world.rank == 0 else None
    before = 0
    while written := world.share(packing.look() if packing else 0):
        if written != before:
            watch.wait()
            announcement.say(f"{config.data.source} is packed")
        before = written
    world.together(lambda: packing.finish() if packing else None, on=[0])


def _placed(config: Config, name: str, world: World) -> Config:
    """The configuration with the name and the directory of the run, the same on all ranks."""
    name = world.share(config.run.name or Path(config.run.dir).name or name)
    path = config.run.path(name)
    return replace(config, run=replace(config.run, name=name, dir=str(path)))


def _claim(config: Config, world: World, run: RunDirectory, resumed: Resumed) -> None:
    """Take the run directory over, for all ranks. Raises NotBegun on all ranks."""
    world.together(lambda: None)  # a rank that has refused is not here

    def claim() -> str:
        return run.claim(config, resumed.bad, resumed.record_bytes, resumed.newest)

    token = world.together(claim, on=[0], failure=NotBegun)
    run.lease.token = world.share(token)


def _announce(run: RunDirectory, progress: Progress, resumed: Resumed, settled: dict[str, Any], size: str) -> None:
    """Say, and record, that training begins or goes on."""
    if not resumed.found:
        run.record.append("begun", step=progress.step, **settled)
    if told := [f"{k} = {v}" for k, v in resumed.changed.items() if k not in TOLD_BEFORE]:
        run.say("changed since the checkpoint: " + ", ".join(told))
    if resumed.changed:
        run.record.append("changed", step=progress.step, **resumed.changed)
    run.status.set("starting", "the first step is under way", step=progress.step, epoch=progress.epoch)
    how = settled["deterministic"]
    deterministic = "not deterministic" if how == "no" else f"deterministic {how}"
    run.say(f"{run.path}: {size}, {deterministic}, epoch {progress.epoch + 1}")


def _end_of(training: Callable[[], None]) -> Ended:
    try:
        training()
    except Ended as end:
        return end
    return Done()


def _put_away(run: RunDirectory, *works: Callable[[], None]) -> None:
    """The run has come to its end whether or not all can be put away."""
    for work in works:
        try:
            work()
        except Exception as error:
            run.say(f"at the end of {run.path}: {type(error).__name__}: {error}")


def summary(path: Path, end: Ended, progress: Progress) -> str:
    """What is shown at the end of a run, as far as it can be: that it has come to its end is not in doubt."""
    reason = f": {end}" if str(end) else ""
    rows = [("outcome", end.state + reason), ("epochs", f"{progress.epoch} ({progress.step} steps)")]
    lines: list[dict[str, Any]] = []

    def readable() -> list[tuple[str, str]]:
        found, damaged = readable_jsonl(path / record.FILE)
        lines.extend(found)
        numbers = ", ".join(map(str, damaged[:8]))
        return [("record", f"damaged in line {numbers} of {path / record.FILE}, left out here")] if damaged else []

    def curves() -> list[tuple[str, str]]:
        picture = draw_curves(path, lines)
        return [("curves", str(picture))] if picture else []

    for label, work in (
        ("record", readable),
        ("accuracy", lambda: _accuracies(lines)),
        ("images/s", lambda: _rate(lines)),
        ("curves", curves),
    ):
        try:
            rows += work()
        except Exception as error:
            rows.append((label, f"cannot be shown ({type(error).__name__}: {' '.join(str(error).split())})"))
    rows.append(("run", str(path)))
    return "\n".join(f"{label:>14}  {text}" for label, text in rows)


def _accuracies(lines: list[dict[str, Any]]) -> list[tuple[str, str]]:
    checks = [line for line in lines if line.get("kind") == "validation"]
    rows = []
    if checks:
        best = min(checks, key=lambda line: float(line["top1_error"]))
        for label, line in (("best", best), ("last", checks[-1])):
            top1, top5 = 1 - line["top1_error"], 1 - line["top5_error"]
            rows.append((f"{label} accuracy", f"top-1 {top1:.2%}, top-5 {top5:.2%} (epoch {line['epoch'] + 1})"))
    return rows


def _rate(lines: list[dict[str, Any]]) -> list[tuple[str, str]]:
    rates = [line["images_per_s"] for line in lines if line.get("kind") == "step"]
    return [("images/s", f"{sorted(rates)[len(rates) // 2]:.0f} (median)")] if rates else []
