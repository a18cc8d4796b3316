"""How a run resumes from its newest good checkpoint, or begins with the weights of another run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import nn

from dist_train.config import Config, ScheduleConfig, idle_fields
from dist_train.flat import as_dict
from dist_train.outcomes import NoRate
from dist_train.ranks.world import World
from dist_train.rundir.checkpoint import FOLDER, META, STATE, Checkpoint, CheckpointError, find, newest_name, verified
from dist_train.rundir.directory import CONFIG, RunDirectory
from dist_train.rundir.fitting import alike
from dist_train.rundir.named import no_run
from dist_train.rundir.state import TrainState
from dist_train.rundir.stored import WRONG, load_state, needed
from pipelines.errors import first_line
from pipelines.quarantine import QUARANTINE
from pipelines.shards import ShardSet
from pipelines.valid import Count, made_of

BOUNDS = ("max_bad", "max_pixels")
SPEED = ("device", "threads", "hw_decoder_load", "readers", "ahead")
# Keys of `data` that may change
FREE = ("train", "val", "cache", "cache_gb", "source", "raw", *SPEED, *BOUNDS)
# Keys whose change is recorded
TOLD = ("optim.", "schedule.", "train.epochs", "data.hw_decoder_load")
LARGEST = 1 << 31  # bytes of the state of another run, whose net may be larger than ours
SET, QUARANTINED = "training set", "quarantined"


@dataclass
class Resumed:
    """What a run was resumed from.

    Attributes:
        found: whether there was a checkpoint.
        checkpoint: its name.
        newest: name of the newest checkpoint, good or not, at the time of the search (rank 0).
        record_bytes: size of the record that the checkpoint covers.
        changed: settings that differ from the checkpoint's.
        bad: names of damaged checkpoints (rank 0).
        init_from: `model.init_from` that the run was begun with.
        ledger: the time ledger as saved.
    """

    found: bool = False
    checkpoint: str = ""
    newest: str = ""
    record_bytes: int = 0
    changed: dict[str, Any] = field(default_factory=dict)
    bad: list[str] = field(default_factory=list)
    init_from: str = ""
    ledger: dict[str, Any] = field(default_factory=dict)


def restore(
    state: TrainState,
    config: Config,
    world: World,
    training_set: ShardSet,
    run: RunDirectory,
    settled: dict[str, Any],
) -> Resumed:
    """Load the newest good checkpoint of the run, if there is one; otherwise the weights of `model.init_from`, if
    given. Rank 0 searches, and all ranks load the same.

    Args:
        settled: the present `process.Settled`, to compare with the checkpoint's.

    Raises CheckpointError if the checkpoint has another model, data set, seed or batch, if `model.init_from` is given
    and is not what the run was begun with, or if there are checkpoints but none is good.
    """
    resumed = Resumed(init_from=config.model.init_from)

    def bad(name: str, why: str) -> None:
        run.say(f"checkpoint {name} is bad ({why}): looking for an older one")
        resumed.bad.append(name)

    found: Checkpoint | None = None
    if world.rank == 0:
        resumed.newest, found = newest_name(run.path), find(run.path, bad=bad)
    found = world.share(found)
    if found is None:
        if world.share(resumed.bad):
            remedy = "put a good one back, or begin anew under another run.name"
            raise CheckpointError(f"no checkpoint in {run.path / FOLDER} is good: {remedy}")
        if config.model.init_from:
            each = " for each tower" if config.train.tower_parallel else ""
            init_from(state.model, Path(config.model.init_from), world.device, each, run.say)
        return resumed
    if found.meta.get("config") is None:
        raise CheckpointError(f"{found.path / META} has no config: put the right one back")
    ours = identity(config, training_set) | earlier_set(found, run.path, training_set)
    _refuse_other_settings(found, run.path, ours)
    resumed.init_from = _begun_from(found, run.path, config.model.init_from)
    steps = len(training_set) // config.train.global_batch
    resumed.record_bytes, resumed.ledger = _load(state, found, config, steps, world.device)
    progress = state.progress
    if found.meta.get(QUARANTINED, 0) != quarantined(training_set):  # unknown which of them still count
        progress.bad_samples = 0
    run.say(f"continuing from {found.path.name}: epoch {progress.epoch + 1}, step {progress.step}")
    resumed.found, resumed.checkpoint = True, found.path.name
    resumed.changed = _unlike(found, settled, run.say) | _changed(found.meta["config"], as_dict(config))
    return resumed


def _load(
    state: TrainState, found: Checkpoint, config: Config, steps: int, device: torch.device
) -> tuple[int, dict[str, Any]]:
    """Loads a checkpoint of a run with so many steps an epoch. Returns the size of the record that it covers, and the
    time ledger. Raises CheckpointError for a state that is not this run's, though its hash is right."""
    most = needed(state.model, config.optim.name) * (2 if config.train.tower_parallel else 1)  # of both towers
    saved = load_state(found.path, device, most)
    try:
        if found.meta["config"].get("schedule.name", ScheduleConfig.name) != config.schedule.name:
            del saved["schedule"]  # another schedule begins with a state of its own
        state.load_state_dict(saved)
        progress = state.progress
        if progress.step_in_epoch > steps or progress.best_epoch >= max(1, progress.epoch):
            raise ValueError(f"step {progress.step_in_epoch} of epoch {progress.epoch + 1} is beyond it")
        state.schedule.lr(progress.epoch, progress.step_in_epoch, steps)  # tried, whatever it has loaded
        return made_of(Count, saved["record"]), made_of(dict[str, Any], saved.get("ledger", {}))  # older: none
    except (*WRONG, NoRate) as error:
        raise CheckpointError(
            f"{found.path / STATE} does not fit this run ({first_line(error)}): put the right one back, or begin anew "
            f"under another run.name"
        ) from error


def identity(config: Config, training_set: ShardSet) -> dict[str, Any]:
    """Settings that a run cannot change: if one of them differs, the checkpoints belong to another run."""
    return _fixed_keys(config) | {
        "classes": len(training_set.classes),
        SET: training_set.fingerprint[:16],
    }


def quarantined(training_set: ShardSet) -> int:
    """Checksum of the samples known to be bad; 0 if there are none."""
    return crc32(training_set.quarantined.tobytes())


def init_from(model: nn.Module, path: Path, device: torch.device, each: str, say: Callable[[str], None]) -> None:
    """Load the weights of a checkpoint, or of a run's newest good one, whose name and shape match, and say which.

    Raises CheckpointError if there is no good checkpoint, or nothing matches.
    """
    if not path.exists():
        raise CheckpointError(f"model.init_from: {no_run(path)}")
    if not (path / FOLDER).exists() and not (path / META).exists():
        raise CheckpointError(f"model.init_from is {path}, which is neither a run nor a checkpoint of one")
    why: list[str] = []
    if (path / META).exists():
        try:
            found: Checkpoint | None = verified(path)
        except CheckpointError as error:
            found, why = None, [str(error)]
    else:
        found = find(path, bad=lambda name, reason: why.append(f"{name}: {reason}"))
    if found is None:
        raise CheckpointError(f"model.init_from: no checkpoint in {path} is good ({'; '.join(why) or 'there is none'})")
    ours = model.state_dict()
    theirs = load_state(found.path, device, max(needed(model, ""), LARGEST))["model"]
    taken = [name for name, value in ours.items() if name in theirs and alike(theirs[name], value)]
    if odd := [name for name, _ in model.named_parameters() if name in taken and not theirs[name].isfinite().all()]:
        raise CheckpointError(f"model.init_from: {odd[0]} of {found.path} is not finite: choose another checkpoint")
    if not taken:
        raise CheckpointError(f"model.init_from: no layer of {found.path} fits model.name: is it another kind of net?")
    model.load_state_dict(ours | {name: theirs[name] for name in taken})
    new = [name for name in ours if name not in taken]
    say(f"{len(taken)} tensors{each} from {path}; new: {', '.join(new) or 'none'}")


def _fixed_keys(config: Config) -> dict[str, Any]:
    """Settings that decide what a run computes."""
    flat = as_dict(config)
    kept = {k: v for k, v in flat.items() if k.startswith("data.") and k.removeprefix("data.") not in FREE}
    unused = {f"model.{key}" for key in ("init_from", *idle_fields(config.model.name))}
    kept |= {k: v for k, v in flat.items() if k.startswith("model.") and k not in unused}
    return kept | {k: flat[k] for k in ("train.seed", "train.global_batch", "optim.name")}


def _refuse_other_settings(found: Checkpoint, run: Path, ours: dict[str, Any]) -> None:
    """Raises CheckpointError if a setting differs. A key missing from an older checkpoint counts as its default."""
    defaults = _plain(_fixed_keys(Config()))
    different = []
    for key, value in _plain(ours).items():
        was = found.meta.get(key, defaults.get(key))
        if was != value:
            different.append(f"{key} was {was!r:.99}, now {value!r}")
    if different:
        raise CheckpointError(
            f"{run} was begun with other settings ({'; '.join(different)}): restore them, as --config {run / CONFIG} "
            f"does, or choose another run.name or run.dir"
        )


def earlier_set(found: Checkpoint, run: Path, training_set: ShardSet) -> dict[str, Any]:
    """The set's fingerprint as computed by the older version that began the run, if no sample is in quarantine.
    Raises CheckpointError if some are, since that version's order left those samples out."""
    if found.meta.get(SET) != training_set.earlier_fingerprint[:16]:
        return {}
    if len(training_set.quarantined):
        raise CheckpointError(
            f"{run} was begun by an older version, whose order leaves out the samples in "
            f"{training_set.here.path(QUARANTINE)}; this version has no such order: finish the run with that version, "
            f"or begin another with its weights (--model.init_from {run}, and another run.name)"
        )
    return {SET: found.meta[SET]}


def _begun_from(found: Checkpoint, run: Path, given: str) -> str:
    """`model.init_from` that the run was begun with. Raises CheckpointError if a different one is given."""
    begun = str(found.meta["config"].get("model.init_from", ""))
    if given and (not begun or os.path.realpath(given) != os.path.realpath(begun)):
        raise CheckpointError(
            f"model.init_from is {given}, but {run} was begun {f'from {begun}' if begun else 'without it'} and goes on "
            f"from its own {found.path.name}: leave it out, or choose another run.name"
        )
    return begun


def _unlike(found: Checkpoint, settled: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    """Process settings that differ from those of the process that saved. Says if the bits may differ for it."""
    # Older versions saved none of them, or not all.
    then = {"precision": settled["precision"]} | (found.meta.get("process") or settled | {"numerics": 1})
    if then.get("numerics") != settled["numerics"]:
        say("the checkpoint is from a version that rounds differently: from here on the bits may differ from its own")
    unlike = {k: v for k, v in settled.items() if then.get(k, "") != v}
    if "accelerator" in unlike:
        was, now = (where.get("accelerator", "an unknown device") or "no GPU" for where in (then, settled))
        say(f"the checkpoint was saved on {was}, this is {now}: from here on the bits may differ")
    return unlike


def _changed(then: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """New values of changed settings whose changes are recorded."""
    defaults = _plain(as_dict(Config()))
    told = {k: v for k, v in _plain(now).items() if k.startswith(TOLD)}
    return {k: v for k, v in told.items() if then.get(k, defaults[k]) != v}


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """`values` after a round trip through JSON: tuples become lists."""
    plain: dict[str, Any] = json.loads(json.dumps(values))
    return plain
