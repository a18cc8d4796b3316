"""Checkpoints: every kind of damage, what the store keeps, and how a run resumes from one."""

from __future__ import annotations

import json
import random
import resource
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dist_train import optim, schedules
from dist_train.analysis.trained import read_config
from dist_train.config import Config, ModelConfig, OptimConfig
from dist_train.flat import as_dict, dump
from dist_train.process import Settled
from dist_train.ranks.world import World, join
from dist_train.rundir.checkpoint import CheckpointError, find
from dist_train.rundir.directory import RunDirectory
from dist_train.rundir.lease import Lease
from dist_train.rundir.restarts import NoProgress, count, forget
from dist_train.rundir.resume import Resumed, identity, restore
from dist_train.rundir.state import Progress, TrainState, Window
from dist_train.rundir.store import Store
from pipelines.shards import ShardSet


def store(directory: Path, keep: int = 2) -> Store:
    (directory / "checkpoints").mkdir(parents=True, exist_ok=True)
    lease = Lease(directory)
    lease.acquire()
    return Store(lease, keep)


def save(checkpoints: Store, step: int, *, best: int = 0, validated: bool = False) -> None:
    """One step an epoch; `best`: after how many of them the best one was, of those that are validated."""
    state = {"w": torch.full((1000,), float(step))}
    meta = {"step": step, "epoch": step, "validated": validated or best > 0, "best_epoch": best - 1}
    checkpoints.save(state, meta)
    checkpoints.join()
    assert checkpoints.error is None


def names(checkpoints: Store) -> list[str]:
    return sorted(p.name for p in checkpoints.directory.glob("step-*"))


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    checkpoints = store(tmp_path)
    for step in range(1, 7):
        save(checkpoints, step, best=min(step, 2))
    assert names(checkpoints) == [f"step-0000000{step}-validated" for step in (2, 5, 6)]
    best = checkpoints.directory / "best"
    assert torch.load(best / "state.pt", weights_only=True)["w"][0] == 2


def test_a_save_that_was_killed_after_its_rename_is_finished_by_the_next_start(tmp_path: Path) -> None:
    """A run that was done by then saves no more, so nothing else would ever link or remove anything."""
    checkpoints = store(tmp_path)
    for step in (1, 2, 3):
        save(checkpoints, step, best=1)

    def killed(moment: str) -> None:
        if moment == "renamed":
            raise SystemExit

    dying = Store(checkpoints._lease, 2, moment=killed)
    dying.save({"w": torch.zeros(1)}, {"step": 4, "epoch": 4, "validated": True, "best_epoch": 3})
    dying.join()
    best = checkpoints.directory / "best"
    assert best.readlink().name == "step-00000001-validated"
    assert [int(name.split("-")[1]) for name in names(checkpoints)] == [1, 2, 3, 4]
    store(tmp_path).clean([])
    assert best.readlink().name == "step-00000004-validated"
    assert [int(name.split("-")[1]) for name in names(checkpoints)] == [3, 4]


def test_a_state_after_validation_is_newer_than_before_it(tmp_path: Path) -> None:
    checkpoints = store(tmp_path, keep=5)
    save(checkpoints, 7)
    save(checkpoints, 7, validated=True)
    save(checkpoints, 3)
    found = find(tmp_path, bad=print)
    assert found is not None
    assert found.path.name == "step-00000007-validated"


def test_what_is_saved_is_a_copy(tmp_path: Path) -> None:
    """Training goes on while the state is written."""
    checkpoints = store(tmp_path)
    weights = torch.zeros(3_000_000)
    checkpoints.save({"w": weights}, {"step": 1, "epoch": 0, "validated": False})
    weights.fill_(7)
    checkpoints.join()
    saved = torch.load(checkpoints.directory / "step-00000001" / "state.pt", weights_only=True)
    assert not saved["w"].any()


def damage(path: Path, how: str, rng: random.Random) -> None:
    state, meta = path / "state.pt", path / "meta.json"
    data = bytearray(state.read_bytes())
    if how == "truncated":
        state.write_bytes(data[: len(data) // 2])
    elif how == "bit-flipped":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        state.write_bytes(data)
    elif how == "empty":
        state.write_bytes(b"")
    elif how == "missing":
        state.unlink()
    elif how == "foreign":
        torch.save({"something": "else"}, state)
    elif how == "without meta":
        meta.unlink()
    elif how == "meta is garbage":
        meta.write_bytes(b"\xff\x00{")
    elif how == "meta is a list":
        meta.write_text("[]")
    else:
        meta.write_text(json.dumps({**json.loads(meta.read_text()), "sha256": "0" * 64}))


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("truncated", "bytes instead of"),
        ("bit-flipped", "the sha256 of state.pt differs"),
        ("empty", "has 0 bytes instead of"),
        ("missing", "state.pt is missing"),
        ("foreign", "bytes instead of"),
        ("without meta", "meta.json is missing"),
        ("meta is garbage", "meta.json is damaged"),
        ("meta is a list", "meta.json is damaged"),
        ("meta of another", "the sha256 of state.pt differs"),
    ],
)
def test_falls_back_and_says_why(tmp_path: Path, how: str, why: str) -> None:
    checkpoints = store(tmp_path)
    save(checkpoints, 1)
    save(checkpoints, 2)
    damage(checkpoints.directory / "step-00000002", how, random.Random(0))
    told: list[tuple[str, str]] = []
    found = find(tmp_path, bad=lambda *args: told.append(args))
    assert found is not None
    assert found.path.name == "step-00000001"
    ((name, reason),) = told
    assert name == "step-00000002"
    assert why in reason
    checkpoints.clean([name])
    assert names(checkpoints) == ["step-00000001"]
    assert (checkpoints.directory / "bad-step-00000002").exists()
    save(checkpoints, 2)  # the run comes to that step again
    found = find(tmp_path, bad=lambda *args: told.append(args))
    assert found is not None
    assert found.path.name == "step-00000002"


def test_a_stray_file_is_no_checkpoint(tmp_path: Path) -> None:
    """Only what lies in checkpoints/ is the run's, whatever else somebody put into its directory."""
    checkpoints = store(tmp_path)
    save(checkpoints, 3)
    for name in ("meta.json", "state.pt"):
        (tmp_path / name).write_text("{}")
    found = find(tmp_path)
    assert found is not None
    assert found.path.name == "step-00000003"


def test_every_single_bit_counts(tmp_path: Path) -> None:
    checkpoints = store(tmp_path)
    save(checkpoints, 1)
    path = checkpoints.directory / "step-00000001" / "state.pt"
    pristine = path.read_bytes()
    rng = random.Random(1)
    for _ in range(300):
        data = bytearray(pristine)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        assert find(tmp_path) is None
    path.write_bytes(pristine)
    assert find(tmp_path, bad=print) is not None


def test_leftovers_of_killed_saves_are_removed(tmp_path: Path) -> None:
    checkpoints = store(tmp_path)
    save(checkpoints, 1)
    (checkpoints.directory / ".step-00000002.tmp").mkdir()
    (checkpoints.directory / ".step-00000002.tmp" / "state.pt").write_bytes(b"half")
    assert find(tmp_path, bad=print) is not None
    checkpoints.clean([])
    assert [p.name for p in checkpoints.directory.iterdir()] == ["step-00000001"]


def test_a_stale_process_renames_nothing(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    lease, successor = Lease(tmp_path), Lease(tmp_path)
    lease.acquire()
    stale = Store(lease, 2)
    successor.acquire()
    stale.save({}, {"step": 9, "epoch": 0, "validated": False})
    stale.join()
    assert lease.lost
    assert not list(stale.directory.iterdir())


def test_three_automatic_restarts_without_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def begin(restarted: int) -> None:
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restarted))
        count(tmp_path)
        forget(tmp_path)

    begin(0)
    begin(1)
    begin(2)
    (tmp_path / "checkpoints" / "step-00000006").mkdir(parents=True)  # progress
    begin(3)
    begin(4)
    with pytest.raises(NoProgress, match="3 automatic restarts began at step-00000006"):
        begin(5)
    begin(0)  # by hand: a new count
    begin(1)


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """In the midst of a state, at each of its parts: what torch makes of it does not hide the reason."""
    checkpoints, before = store(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    state = {"w": torch.zeros(50_000), "names": [str(i) for i in range(5000)], "m": torch.zeros(50_000)}
    for size in (100, 30_000, 150_000, 250_000, 400_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            checkpoints.save(state, {"step": 1, "epoch": 0, "validated": False})
            checkpoints.join()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert isinstance(checkpoints.error, OSError), size
        assert not list(checkpoints.directory.iterdir())
    save(checkpoints, 2)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    yield join("cpu")
    dist.destroy_process_group()


class Start:
    """A start of a run of a small net: what it goes on from, what it says, and what it saves."""

    def __init__(self, run: Path, shards: ShardSet, world: World, config: Config, precision: str = "off") -> None:
        net = torch.nn.Linear(4, 3)
        self.said: list[str] = []
        self.run = RunDirectory(run, self.said.append, keep=2, writes=True)
        config = replace(config, train=replace(config.train, global_batch=24))  # ten steps an epoch
        self.config, self.shards, self.world = config, shards, world
        self.settled = vars(Settled(False, "by construction", "kept", precision=precision))
        self.scaler = torch.amp.GradScaler("cpu", enabled=precision == "fp16")
        schedule = schedules.build(Config())
        self.state = TrainState(net, optim.build(OptimConfig(), net), self.scaler, schedule, Progress(), Window())

    def restore(self) -> Resumed:
        return restore(self.state, self.config, self.world, self.shards, self.run, self.settled)

    def save(self, **process: Any) -> None:
        """One step further. `process`: what an older program says of itself, if it is one."""
        self.state.progress.advance()
        self.run.path.mkdir(exist_ok=True)
        self.run.lease.acquire()
        self.run.store.directory.mkdir(exist_ok=True)
        meta = self.state.progress.as_meta() | identity(self.config, self.shards) | {"config": as_dict(self.config)}
        meta |= {"process": process or self.settled}
        self.run.store.save(self.state.state_dict() | {"record": 0}, meta)
        self.run.store.join()
        assert self.run.store.error is None


def test_the_precision_may_change(shard_sets: Path, world: World, tmp_path: Path) -> None:
    """Through all three, and back: the scale is what it was if there was one. Each change is recorded."""
    shards = ShardSet(shard_sets / "train")
    first = Start(tmp_path / "run", shards, world, Config(), "fp16")
    first.scaler.scale(torch.ones(()))  # which makes the scale
    first.scaler.update(512.0)
    first.save()
    scales = []
    for i, precision in enumerate(("fp16", "off", "bf16", "fp16", "fp16")):
        start = Start(tmp_path / "run", shards, world, Config(), precision)
        resumed = start.restore()
        assert start.state.progress.step == i + 1
        assert resumed.changed == ({} if i in (0, 4) else {"precision": precision})
        scales.append(start.scaler.get_scale())
        start.save()
    assert scales == [512, 1, 1, 65536, 65536]
    start.save(**{k: v for k, v in start.settled.items() if k != "precision"})
    assert not Start(tmp_path / "run", shards, world, Config()).restore().changed, "of an older program nobody knows"


def test_the_weights_of_another_run_are_for_the_beginning(shard_sets: Path, world: World, tmp_path: Path) -> None:
    """A run that has begun is not given others; the command that began it goes on, and what it says stays true."""
    shards = ShardSet(shard_sets / "train")

    def start(name: str, init_from: Path | None = None) -> Start:
        config = Config(model=ModelConfig(init_from=str(init_from or "")))
        return Start(tmp_path / name, shards, world, config)

    start("other").save()
    start("plain").save()
    with pytest.raises(
        CheckpointError, match=r"init_from is .*other, but .*plain was begun without it and .* leave it"
    ):
        start("plain", tmp_path / "other").restore()
    tuned = start("tuned", tmp_path / "other")
    assert tuned.restore().init_from == str(tmp_path / "other")
    tuned.save()
    for init_from in (tmp_path / "other", tmp_path / "plain" / ".." / "other", None):
        assert start("tuned", init_from).restore().init_from == str(tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"tuned was begun from .*other and goes on from its own step-00000001"):
        start("tuned", tmp_path / "plain").restore()


def test_what_a_net_never_had_is_no_other_setting(shard_sets: Path, world: World, tmp_path: Path) -> None:
    """Programs of an earlier day let `model.hidden` pass for torchvision's nets, and wrote it down."""
    shards = ShardSet(shard_sets / "train")
    config = Config(model=ModelConfig("torchvision:resnet18"))
    start = Start(tmp_path / "run", shards, world, config)
    start.save()
    (meta,) = tmp_path.glob("run/checkpoints/step-*/meta.json")
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"model.hidden": 32}))
    assert Start(tmp_path / "run", shards, world, config).restore().found
    (tmp_path / "run" / "config.yaml").write_text(dump(config).replace("hidden: 4096", "hidden: 32"))
    assert read_config(tmp_path / "run").model == config.model, "to evaluate it"
    other = replace(config, model=ModelConfig("torchvision:resnet34"))
    with pytest.raises(CheckpointError, match=r"model.name was 'torchvision:resnet18', now 'torchvision:resnet34'"):
        Start(tmp_path / "run", shards, world, other).restore()
