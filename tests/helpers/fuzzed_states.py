"""What the fuzz test damages of a run, and how it is read: as by another start, up to its first step, and as by
`evaluate`, but in one process."""

from __future__ import annotations

import hashlib
import io
import json
import math
import zipfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from dist_train import build, optim, process, schedules
from dist_train.analysis import trained
from dist_train.cli import parse
from dist_train.models.dropout import keys_of_epoch
from dist_train.ranks.world import World
from dist_train.rundir import resume
from dist_train.rundir.checkpoint import FOLDER, META, STATE
from dist_train.rundir.directory import RunDirectory
from dist_train.rundir.state import Progress, TrainState, Window
from pipelines.shards import ShardSet
from tests.helpers.damage import PLACES, VALUES, Change, as_json, changed, linked, of_bytes, of_values, spoiled
from tests.helpers.fuzz import Damage, Subject

CPU = torch.device("cpu")
TENSORS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "of one": lambda t: torch.zeros(1),
    "of none": lambda t: torch.zeros(0),
    "scalar": lambda t: torch.zeros(()),
    "nan": lambda t: torch.full(t.shape, math.nan),
    "double": lambda t: t.double(),
    "half": lambda t: t.half(),
    "integers": lambda t: torch.zeros(t.shape, dtype=torch.int64),
    "complex": lambda t: t.to(torch.complex64),
    "flat": lambda t: t.reshape(-1),
    "transposed": lambda t: t.T if t.dim() == 2 else t.flip(0) if t.dim() else t,
    "expanded": lambda t: torch.zeros(1).expand(t.shape),
    "endless": lambda t: torch.zeros(1).expand(1 << 40),
    "sparse": lambda t: torch.zeros(t.shape).to_sparse(),
    "meta": lambda t: torch.empty(t.shape, device="meta"),
    "parameter": lambda t: torch.nn.Parameter(t.detach().float().clone()),
}


def of_tensors() -> st.SearchStrategy[list[Change]]:
    """One to three changes of a tree, most of its tensors."""
    tensor = st.builds(Change, st.just("other"), PLACES, st.sampled_from(sorted(TENSORS)))
    value = st.builds(Change, st.sampled_from(("put", "delete", "swap")), PLACES, VALUES)
    return st.lists(tensor | tensor | value, min_size=1, max_size=3)


class Alone(World):
    """A world that needs no process group, whose threads a fork would lose."""

    def share(self, value: Any) -> Any:
        return value


def states(base: Path) -> Subject:
    """The newest checkpoint of a run, with the hash that belongs to it: values of meta.json, of the state, tensors,
    bytes of the pickle inside and of the whole."""
    run = base / "run"
    torch.set_num_threads(1)  # no threads before a fork
    (step,) = (run / FOLDER).glob("step-*")
    config = parse(["--config", str(run / "config.yaml")])[0]
    world, train = Alone.single(CPU), ShardSet(config.data.train)
    model = build.model(config, world, len(train.classes), compiled=False)
    scaler, schedule = torch.amp.GradScaler("cpu", enabled=False), schedules.build(config)
    moments = optim.build(config.optim, model)
    state = TrainState(model, moments, scaler, schedule, Progress(), Window())
    about, data = json.loads((step / META).read_bytes()), (step / STATE).read_bytes()
    saved = torch.load(step / STATE, weights_only=True)
    settled = replace(process.Settled(False, "", ""), precision="off")

    def make(folder: Path, damage: Damage) -> list[str]:
        kind, changes = damage
        target = folder / FOLDER / step.name
        target.mkdir(parents=True)
        linked(run, folder, "metrics.jsonl", "events.jsonl", "config.yaml")
        meta, told, new = {"it": about}, [str(change) for change in changes], data
        if kind == "meta":
            meta, told = changed(meta, changes)
        elif kind == "bytes":
            new = spoiled(data, changes, head=4096)
        elif kind == "pickle":
            new = repickled(data, changes)
        else:
            tree, told = changed({"it": saved}, changes, TENSORS)
            written = io.BytesIO()
            torch.save(tree.get("it"), written)
            new = written.getvalue()
        if kind != "meta":
            meta["it"] = about | {"bytes": len(new), "sha256": hashlib.sha256(new).hexdigest()}
        (target / STATE).write_bytes(new)
        (target / META).write_bytes(as_json(meta.get("it")))
        return [kind, *told]

    def read(folder: Path) -> None:
        """As another start does, up to its first step, and as `evaluate` does, up to its first image."""
        directory = RunDirectory(folder, lambda _: None, keep=2, writes=True)
        resumed = resume.restore(state, config, world, train, directory, asdict(settled))
        directory.ledger.go_on({}, resumed.ledger)
        directory.claim(config, resumed.bad, resumed.record_bytes, resumed.newest)
        _go_on(state, config.train.seed)
        directory.close()
        trained._opened(folder, config, CPU, "last", (train, train)).model(torch.zeros(1, 3, 67, 67))

    kinds = st.tuples(st.sampled_from(("meta", "state")), of_values())
    kinds |= st.tuples(st.just("tensors"), of_tensors()) | st.tuples(st.sampled_from(("bytes", "pickle")), of_bytes())
    return Subject(kinds, make, read)


def _go_on(state: TrainState, seed: int) -> None:
    """A step, a record, the end of an epoch, and what the next checkpoint stores."""
    progress, window = state.progress, state.window
    keys_of_epoch(seed, progress.step - progress.step_in_epoch)(0, np.arange(4))
    lr = state.schedule.lr(progress.epoch, progress.step_in_epoch, 15)
    for group in state.optimizer.param_groups:
        group["lr"] = lr
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    state.optimizer.step()
    progress.advance()
    progress.average(0.5, progress.step)
    window.add(1.0, 1.0, 1.0)
    window.means(4), window.epoch_means(4)
    state.schedule.ended(0.5, window.epoch_loss, progress.epoch, 15)
    progress.next_epoch(0.5)
    state.state_dict()


def repickled(data: bytes, changes: list[Change]) -> bytes:
    """A state whose pickle is damaged, though the file is whole."""
    written = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(written, "w", zipfile.ZIP_STORED) as new:
        for info in old.infolist():
            inside = old.read(info)
            new.writestr(info.filename, spoiled(inside, changes) if info.filename.endswith("data.pkl") else inside)
    return written.getvalue()


SUBJECTS = {"state": states}
