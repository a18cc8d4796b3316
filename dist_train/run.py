"""One start of a run, from configuration to end."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from dist_train import data, process
from dist_train.config import Config
from dist_train.fetch import read_together
from dist_train.flat import as_dict
from dist_train.monitor.notify import tell_now
from dist_train.monitor.reader import Shown
from dist_train.monitor.readers import Readers
from dist_train.monitor.terminal import Terminal
from dist_train.outcomes import FAILED, STOPPED, Done, Ended, NotBegun, NotHere, Refused, Stopped, Unread
from dist_train.ranks import launcher
from dist_train.ranks.share import in_words
from dist_train.ranks.watch import Watch
from dist_train.ranks.world import World, flight_record, join
from dist_train.rundir import environment, resume, story
from dist_train.rundir.announcement import Announcement
from dist_train.rundir.directory import RunDirectory
from dist_train.rundir.errors import Failure
from dist_train.rundir.last_words import LastWords
from dist_train.rundir.resume import Resumed
from dist_train.rundir.state import Progress, TrainState
from dist_train.summary import summary
from dist_train.train import Trainer
from pipelines.errors import UserError
from pipelines.shards import ShardSet
from pipelines.speech import say, show

LAST = 1.5  # seconds for the readers of a run that cannot go on
SHOWING, MARGIN = 20.0, 5.0  # seconds for them after a stop, and seconds to leave unused then
TOLD_BEFORE = ("numerics", "accelerator")  # whose change `restore` has reported


def start(config: Config, name: str, watch: Watch, words: LastWords, announcement: Announcement) -> int:
    """Trains, from the beginning or from where the run stands, and shows how it ended.

    Args:
        name: name of the run if the configuration gives none.
        announcement: this start's entry in status.json until it has claimed the run.

    Returns the exit code; see `outcomes` and `launcher.end`. An unforeseen error ends the process.
    """
    try:
        size = launcher.size()
        announcement.say(f"{size} ranks are waited for" if size > 1 else "the run is looked at")
        try:
            world = join(config.train.device)
        except UserError as error:
            end = _missing(error, words, announcement)
        else:
            end = _run(config, name, world, watch, words, announcement)
            if not isinstance(end, Refused | NotBegun):  # which may be one rank's alone
                world.leave()
    except BaseException as error:
        words.fail(error)
    watch.close()
    return launcher.end(end.code, str(end))


def _missing(error: UserError, words: LastWords, announcement: Announcement) -> Ended:
    """The end of a start whose rank has no device, or no launcher. Started by hand, it is refused. A restarted run can
    run on another node, so for it this is a failure, which brings the job back."""
    end = NotHere(str(error)) if launcher.restarted() else Refused(str(error))
    if launcher.rank() == 0 or not launcher.attended():
        _tell(end, words, announcement)
    return end


def _tell(end: Ended, words: LastWords, announcement: Announcement) -> None:
    """Says why the run does not begin; also in status.json, if nobody is there to read it or the run has suffered."""
    say(f"error: {end}")
    if end.state or not launcher.attended():
        first = Failure(launcher.rank(), socket.gethostname(), type(end).__name__, str(end))
        if announcement.fail(first.reason, rank=first.rank, node=first.node, error=first.kind):
            words.tell(first, end.code)
    else:
        announcement.retract()


def _run(config: Config, name: str, world: World, watch: Watch, words: LastWords, announcement: Announcement) -> Ended:
    """Runs, reports how that ended, and returns it."""
    try:
        sets = _open_sets(config, world, watch, announcement)
        if config.train.tower_parallel:
            world = world.in_pairs()
        config = _placed(config, name, world)
        terminal = Terminal(is_first=world.rank == 0)
        path = Path(config.run.dir)
        run = RunDirectory(path, terminal.say, keep=config.checkpoint.keep, writes=world.rank == 0)
        _tell_building(config, world, announcement, terminal)
        try:  # before anything is claimed
            run.record.told = terminal.take
            trainer = Trainer(config, world, watch, run, sets, terminal)
            resumed = resume.restore(trainer.state, config, world, sets[0], run, asdict(trainer.settled))
            config = replace(config, model=replace(config.model, init_from=resumed.init_from))
            trainer.saver.meta["config"] = as_dict(config)
        except ValueError as error:  # ours, and torch's for sizes that do not fit
            raise Refused(str(error)) from error
        brought_back = launcher.submitted() and launcher.restarted()
        run.ledger.go_on(announcement.before, resumed.ledger, launcher.submitted_at(), requeued=brought_back)
        _claim(config, world, run, resumed)
    except (Refused, NotBegun, Unread) as refusal:  # the same on all ranks, or else the launcher ends the others
        if world.rank == 0:
            _tell(refusal, words, announcement)
        return refusal
    readers = _begin(config, world, run, words, trainer.progress.step)
    place = {"step": trainer.progress.step, "checkpoint": resumed.checkpoint}

    def tell_start() -> None:
        if world.rank == 0:
            about = process.described(world, trainer.settled, config)
            about["environment"] = environment.keep(path, process.surroundings())
            story.tell_start(run, announcement.before, config, **place, **about)

    _attempt(run, tell_start)
    size = f"{world.size} x {world.device.type}, {in_words(world.shares)}, {len(sets[0])} images"
    _announce(run, trainer.progress, resumed, asdict(trainer.settled), size, data.traffic(config, sets))
    for advice in (data.small_share(config, world.size, world.device.type), process.cpu_warning(world)):
        if advice:
            run.say(advice)
    end = _end_of(trainer.fit, trainer.state, config, resumed=resumed.found)
    words.ended(end)
    trainer.fetching.close()
    terminal.end_epoch()
    # The other ranks wait for rank 0, and that for the readers.
    watch.heartbeat(config.run.step_timeout + (config.run.stop_timeout if world.rank else 0))
    _conclude(end, run, trainer.progress, readers, watch)
    return end


def _tell_building(config: Config, world: World, announcement: Announcement, terminal: Terminal) -> None:
    """Says what the run is at now, in status.json and, if that takes long, in its log."""
    compiled = config.train.compile == "on" or (config.train.compile == "auto" and world.device.type == "cuda")
    announcement.say("the net is compiled" if compiled else "the net is built")
    if compiled:
        terminal.say("compiling the net, which may take minutes")


def _open_sets(config: Config, world: World, watch: Watch, announcement: Announcement) -> tuple[ShardSet, ShardSet]:
    """Training and validation set; rank 0 packs them first if they do not exist and the configuration names a source.
    Raises Refused on all ranks."""
    world.together(lambda: data.check_batch(config, world.size))
    if world.share(data.to_pack(config)):
        _pack(config, world, watch, announcement)
    # A file system that fails for a moment is no reason to refuse: a restart may help.
    sets = read_together(world, lambda: data.open_sets(config), catch=(UserError,))
    assert sets is not None
    # All ranks see the same list, even one that is just being written.
    for shards, rows in zip(sets, world.share([shards.quarantined for shards in sets]), strict=True):
        shards.quarantined = rows
    read_together(world, lambda: data.check_tars(sets), on=[0])
    announcement.say("the run is looked at")
    return sets


def _pack(config: Config, world: World, watch: Watch, announcement: Announcement) -> None:
    """Lets rank 0 pack the source, however long it takes: while it makes progress, no rank counts as silent. Raises
    Refused on all ranks."""
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
    """The configuration with name and directory of the run filled in, the same on all ranks."""
    name = world.share(config.run.name or Path(os.path.abspath(config.run.dir or "/")).name or name)
    path = config.run.path(name)
    return replace(config, run=replace(config.run, name=name, dir=str(path)))


def _claim(config: Config, world: World, run: RunDirectory, resumed: Resumed) -> None:
    """Takes over the run directory, for all ranks. Raises NotBegun on all ranks."""
    world.together(lambda: None)  # a rank that has refused is not here

    def claim() -> str:
        return run.claim(config, resumed.bad, resumed.record_bytes, resumed.newest)

    token = world.together(claim, on=[0], failure=NotBegun)
    run.lease.token = world.share(token)


def _begin(config: Config, world: World, run: RunDirectory, words: LastWords, step: int) -> Readers:
    """Starts showing the run, which this start now owns, from this step on; whatever ends it is reported as its end."""
    readers = Readers(Shown(run.path, config, run.say, run.record.size, run.events.size, step, run.lease.token))
    words.claimed(run.path, run.status, world.size)
    if world.device.type == "cuda":
        words.record = flight_record
    words.looks = run.waiting.look
    words.tellers = [run.events.tell, partial(tell_now, config.run.name, run.path)]
    if world.rank == 0:
        readers.open()
        run.record.written = run.events.written = readers.wake
        words.close = [run.close, lambda: readers.close(LAST)]
    return readers


def _announce(
    run: RunDirectory, progress: Progress, resumed: Resumed, settled: dict[str, Any], size: str, traffic: str
) -> None:
    """Says and records that training begins or continues."""
    if not resumed.found:
        run.record.append("begun", step=progress.step, **settled)
    if told := [f"{k} = {v}" for k, v in resumed.changed.items() if k not in TOLD_BEFORE]:
        run.say("changed since the checkpoint: " + ", ".join(told))
    if resumed.changed:
        run.record.append("changed", step=progress.step, **resumed.changed)
    under_way = "the first step is under way" + ("; the net is compiled" if settled["compiled"] else "")
    run.status.set("starting", under_way, step=progress.step, epoch=progress.epoch)
    how = settled["deterministic"]
    deterministic = "not deterministic" if how == "no" else f"deterministic {how}"
    run.say(f"{run.path}: {size}, {deterministic}, epoch {progress.epoch + 1}")
    if traffic:
        run.say(traffic)


def _end_of(training: Callable[[], None], state: TrainState, config: Config, *, resumed: bool) -> Ended:
    began = replace(state.progress)
    try:
        training()
    except Ended as end:
        return end
    return Done(_nothing_left(state, config) if resumed and state.progress == began else "")


def _nothing_left(state: TrainState, config: Config) -> str:
    """The reason of a start that found a finished run, and the option that continues it."""
    progress = state.progress
    if progress.epoch >= config.train.epochs:
        return (
            f"epoch {progress.epoch} was its last and is trained already; --train.epochs {2 * progress.epoch} goes on"
        )
    if 0 < config.train.max_steps <= progress.step:
        return f"step {progress.step} was its last and is trained already; --train.max_steps 0 goes on"
    rule = "--schedule.stop_early false" if state.schedule.exhausted else "--train.until_error 0"
    return f"it had ended early before this start; {rule} goes on"


def _conclude(end: Ended, run: RunDirectory, progress: Progress, readers: Readers, watch: Watch) -> None:
    """Writes and says how the run ended."""
    if not end.state:  # the run belongs to another start now
        run.say(str(end))
        readers.abandon()
        return
    run.status.set(end.state, str(end), step=progress.step, epoch=progress.epoch)
    how = {"state": end.state, "reason": str(end), "code": end.code, "step": progress.step, "epoch": progress.epoch}
    requeued = end.code in (STOPPED, FAILED) and launcher.comes_back()
    spent = run.ledger.state_dict()
    run.events.append("end", **how, requeued=requeued, **spent)
    _attempt(run, run.close)
    if launcher.rank() == 0:
        show(summary(run.path, end, progress, spent["seconds"]))
    before = watch.stop

    def patient() -> bool:
        watch.wait()
        return watch.stop == before

    _attempt(run, lambda: readers.close(_for_readers(end, watch), patient))


def _attempt(run: RunDirectory, *works: Callable[[], None]) -> None:
    """Calls these, and only reports what they raise: no failure here is worth losing a run."""
    for work in works:
        try:
            work()
        except Exception as error:
            run.say(f"{run.path}: {type(error).__name__}: {error}")


def _for_readers(end: Ended, watch: Watch) -> float:
    """Seconds for the readers at the end: as long as a stop may take; after a stop, the time it leaves, but not all
    of it, since whoever stops a run may be less patient than `run.stop_timeout` says."""
    left, stopped = watch.left(), isinstance(end, Stopped)
    if stopped or watch.stop:
        left -= min(MARGIN, watch.grace / 4)
    return max(LAST, min(left, SHOWING) if stopped else left)
