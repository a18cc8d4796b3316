"""`torchrun --nproc_per_node=N -m dist_train [--config FILE] [--key value ...]`; `python -m dist_train` for one.

`python -m dist_train VERB ...` does something else than train; see VERBS.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from dist_train.cli import default_name, parse
from dist_train.config import Config, ConfigError, as_dict, dump
from dist_train.data import check_batch, open_sets, pack_source, to_pack
from dist_train.monitor.terminal import Monitor, read_records
from dist_train.pictures.curves import draw_curves
from dist_train.ranks.vote import BadData, Diverged, NotSaved, Stopped
from dist_train.ranks.world import DIVERGED, FAILED, STOPPED, USAGE, Watch, World, join, rank_of_launcher
from dist_train.rundir.checkpoint import CheckpointError, Store
from dist_train.rundir.lease import NoProgress, Owner, Superseded, check_progress
from dist_train.rundir.state import State
from dist_train.train import Trainer
from pipelines.files import write_atomically
from pipelines.shards import ShardError, ShardSet
from pipelines.sources import SourceError

# Each module has a `main(argv) -> exit code`.
VERBS = {
    "evaluate": "dist_train.analysis.evaluate",
    "figures": "dist_train.analysis.figures",
    "experiments": "dist_train.analysis.experiments",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 75 stopped, 70 diverged, 2 usage, 1 not saved. Under a launcher non-zero means
    "restart me", so there all but the last are 0, and `status.json` tells them apart."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in VERBS:
        return int(importlib.import_module(VERBS[argv[0]]).main(argv[1:]))
    launched = "TORCHELASTIC_RUN_ID" in os.environ
    try:
        if argv and not argv[0].startswith("-"):
            nearest = difflib.get_close_matches(argv[0], VERBS, 1, cutoff=0)[0]
            raise ConfigError(f"unknown verb {argv[0]}: did you mean {nearest}? Without a verb a net is trained")
        config, file = parse(argv)
        watch = Watch(config.run.start_timeout, config.run.stop_timeout)
        world = join(config.train.device)
    except ValueError as error:
        if rank_of_launcher() == 0:
            print(f"error: {error}", file=sys.stderr)
        return 0 if launched else USAGE
    try:
        code = _run(config, file, world, watch)
        dist.barrier()  # leave together
    finally:
        watch.close()
        dist.destroy_process_group()
    return 0 if launched and code != FAILED else code


def _run(config: Config, file: str, world: World, watch: Watch) -> int:
    refused: Exception | None = None
    try:
        data = _open(config, world)
    except (ShardError, SourceError, ConfigError) as error:
        refused = error
    if message := world.first_error(refused):
        if world.rank == 0:
            print(f"error: {message}", file=sys.stderr)
        return USAGE
    if config.train.tower_parallel:
        world = world.in_pairs()
    name = world.share(config.run.name or Path(config.run.dir).name or default_name(file))
    directory = Path(config.run.dir or Path(config.run.root) / name)
    config = replace(config, run=replace(config.run, name=name, dir=str(directory)))
    _reproducible(config)
    owner = Owner(directory)
    monitor = Monitor(directory, config.monitor, owner, speaks=world.rank == 0)
    store = Store(directory / "checkpoints", config.checkpoint.keep, owner)
    try:
        trainer = Trainer(config, world, watch, monitor, store, data)
        size = trainer.restore()
    except (CheckpointError, ValueError) as error:
        monitor.say(f"error: {error}")
        return USAGE
    state = trainer.state
    failure: Exception | None = None
    if world.rank == 0:
        try:
            _begin(directory, config, owner, store, state.step)
        except (OSError, NoProgress) as error:
            monitor.status("failed", str(error), step=state.step, epoch=state.epoch)
            failure = error
    if message := world.first_error(failure):
        monitor.say(f"error: {message}")
        return USAGE
    watch.last_words = lambda why: monitor.status("failed", why)
    monitor.open(size, as_dict(config))
    if trainer.changed:
        monitor.say("changed since the checkpoint: " + ", ".join(f"{k} = {v}" for k, v in trainer.changed.items()))
        monitor.record("changed", step=state.step, **trainer.changed)
    monitor.status("running", step=state.step, epoch=state.epoch)
    monitor.say(f"{directory}: {world.size} x {world.device.type}, {len(data[0])} images, epoch {state.epoch + 1}")
    try:
        trainer.fit()
        code, outcome, reason = 0, "done", ""
    except Stopped:
        code, outcome, reason = STOPPED, "stopped", "a stop signal; the same command continues"
    except Diverged as error:
        code, outcome, reason = DIVERGED, "diverged", str(error)
    except BadData as error:
        code, outcome, reason = USAGE, "failed", str(error)
    except NotSaved as error:
        code, outcome, reason = FAILED, "failed", str(error)
    except Superseded as error:
        monitor.say(str(error))
        return 0
    except BaseException as error:
        monitor.status("failed", f"{type(error).__name__}: {error}")
        raise
    monitor.status(outcome, reason, step=state.step, epoch=state.epoch)
    monitor.publish(monitor.size())
    monitor.close()
    if world.rank == 0:
        print(_summary(directory, outcome, reason, state))
    return code


def _begin(directory: Path, config: Config, owner: Owner, store: Store, step: int) -> None:
    """Claim the run directory and tidy it. Raises OSError where it cannot be written, and NoProgress."""
    directory.mkdir(parents=True, exist_ok=True)
    owner.claim()
    store.clean()
    write_atomically(directory / "config.yaml", dump(config).encode())
    check_progress(directory, step)


def _open(config: Config, world: World) -> tuple[ShardSet, ShardSet]:
    """The training and the validation set. Packs them first where the configuration names a source; rank 0 does."""
    check_batch(config, world.size)
    if world.share(to_pack(config)):
        error: Exception | None = None
        if world.rank == 0:
            try:
                pack_source(config)
            except (SourceError, ShardError, OSError) as failure:
                error = failure
        if message := world.first_error(error):
            raise SourceError(message)
    return open_sets(config)


def _reproducible(config: Config) -> None:
    torch.backends.cudnn.benchmark = not config.train.deterministic
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)


def _summary(directory: Path, outcome: str, reason: str, state: State) -> str:
    """What a person wants to know at the end."""
    records = read_records(directory)
    checks = [r for r in records if r["kind"] == "validation"]
    rates = [r["images_per_s"] for r in records if r["kind"] == "step"]
    rows = [
        ("outcome", f"{outcome}{': ' + reason if reason else ''}"),
        ("epochs", f"{state.epoch} ({state.step} steps)"),
    ]
    if checks:
        best = min(checks, key=lambda r: r["top1_error"])
        for label, r in (("best", best), ("last", checks[-1])):
            accuracy = f"top-1 {1 - r['top1_error']:.2%}, top-5 {1 - r['top5_error']:.2%} (epoch {r['epoch'] + 1})"
            rows.append((f"{label} accuracy", accuracy))
    if rates:
        rows.append(("images/s", f"{sorted(rates)[len(rates) // 2]:.0f} (median)"))
    if picture := draw_curves(directory):
        rows.append(("curves", str(picture)))
    rows.append(("run", str(directory)))
    return "\n".join(f"{label:>14}  {text}" for label, text in rows)


def leave(code: int) -> NoReturn:
    """End the process. All is written by now; threads of libraries were seen to abort it while Python unloads them."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main())
