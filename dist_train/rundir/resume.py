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
from dist_train.ranks.world import World
from dist_train.rundir.checkpoint import FOLDER, META, Checkpoint, CheckpointError, find, newest_name, verified
from dist_train.rundir.directory import CONFIG, RunDirectory
from dist_train.rundir.named import no_run
from dist_train.rundir.state import TrainState
from dist_train.rundir.store import load_state
from pipelines.quarantine import QUARANTINE
from pipelines.shards import ShardSet

# Keys of `data` that may change
FREE = ("train", "val", "source", "raw", "device", "threads", "hw_decoder_load", "readers", "ahead", "max_bad")
# Keys whose change is recorded
TOLD = ("optim.", "schedule.", "train.epochs", "data.hw_decoder_load")
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
    ours = identity(config, training_set) | earlier_set(found, run.path, training_set)
    _refuse_other_settings(found, run.path, ours)
    resumed.init_from = _begun_from(found, run.path, config.model.init_from)
    saved = load_state(found.path, world.device)
    if found.meta["config"].get("schedule.name", ScheduleConfig.name) != config.schedule.name:
        del saved["schedule"]  # another schedule begins with a state of its own
    state.load_state_dict(saved)
    progress = state.progress
    if found.meta.get(QUARANTINED, 0) != quarantined(training_set):  # unknown which of them still count
        progress.bad_samples = 0
    run.say(f"continuing from {found.path.name}: epoch {progress.epoch + 1}, step {progress.step}")
    resumed.found, resumed.checkpoint, resumed.record_bytes = True, found.path.name, int(saved["record"])
    resumed.ledger = saved.get("ledger", {})  # older versions saved none
    resumed.changed = _unlike(found, settled, run.say) | _changed(found.meta["config"], as_dict(config))
    return resumed


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
    theirs, ours = load_state(found.path, device)["model"], model.state_dict()
    taken = [name for name, value in ours.items() if name in theirs and theirs[name].shape == value.shape]
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
            different.append(f"{key} was {was!r}, now {value!r}")
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
            f"{run} was begun by an older version, whose order leaves out the samples in {training_set.directory}/"
            f"{QUARANTINE}; this version has no such order: finish the run with that version, or begin another with "
            f"its weights (--model.init_from {run}, and another run.name)"
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
    then = {"precision": settled["precision"]} | found.meta.get("process", settled | {"numerics": 1})
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
