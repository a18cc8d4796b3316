"""GPU behaviour testable without a GPU: copies between host and device per step, and settings of the device.

The `meta` device stands for the GPU: its tensors have no numbers, so whatever would wait for one fails.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dist_train import __main__, build, data, models, numbers, optim, process
from dist_train.choices import PAPER_NETS, TORCHVISION
from dist_train.config import Config, ConfigError, ModelConfig, OptimConfig, TrainConfig
from dist_train.data_config import DataConfig
from dist_train.models.dropout import Dropout, mask_keys
from dist_train.ranks import vote
from dist_train.ranks.logged import Logged
from dist_train.ranks.world import World, join
from dist_train.rundir.state import Progress
from dist_train.train import Trainer
from pipelines import handover
from pipelines.augment import Augment
from pipelines.handover import HandOver
from pipelines.loader import Batch, Loader, Read
from pipelines.misc import CpuShare
from pipelines.plan import TrainingPlan
from pipelines.shards import ShardSet
from tests.helpers.compare import assert_same_run, records, status
from tests.helpers.launch import STEPS, at, launch

CPU = torch.device("cpu")
META = torch.device("meta")
N = 6
INDUCTOR = (
    "TORCHINDUCTOR_CACHE_DIR",
    "TORCHINDUCTOR_COMPILE_THREADS",
    "TORCHINDUCTOR_DETERMINISTIC",
    "TRITON_CACHE_DIR",
)


class Copies(TorchDispatchMode):
    """Notes each copy between host and device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, tuple[int, ...], bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if "_fused_sgd_" in str(func):  # which `meta` has not
            return None
        result = func(*args, **kwargs)
        given, got = ([t for t in tree_leaves(of) if isinstance(t, torch.Tensor)] for of in ((args, kwargs), result))
        if str(func).startswith(("aten._to_copy", "aten.copy_")) and len({t.device for t in (*given, *got)}) > 1:
            source = given[-1]
            late = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
            self.found.append((f"{source.device} to {got[0].device}", tuple(source.shape), bool(late)))
        return result


def trainer(name: str, accumulate: int) -> Trainer:
    """One that can take a step on META and has no more than that needs."""
    config = Config(
        data=DataConfig(resize=67, crop=67),
        model=ModelConfig(name) if name.startswith(TORCHVISION) else ModelConfig(name, hidden=8, width=0.25),
        train=TrainConfig(global_batch=N, accumulate=accumulate),
    )
    made = Trainer.__new__(Trainer)
    made.config = config
    here = World.single(CPU)
    made.model = build.model(config, here, 3, compiled=False)
    made.model.to(META)
    made.net = made.model
    made.world = cast(World, MetaWorld())
    made.autocast = torch.autocast("cpu", enabled=False)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    made.progress = Progress()
    optimizer = optim.build(config.optim, made.model)
    made.state = cast(Any, SimpleNamespace(optimizer=optimizer, scaler=scaler, progress=made.progress))
    made.watch = cast(Any, SimpleNamespace(stop=False))
    made.run = cast(Any, SimpleNamespace(lease=SimpleNamespace(lost=False)))
    made.logged, made.unread = Logged(made.world), []
    made.report = cast(Any, SimpleNamespace(row=lambda _: (0.0, 0.0)))
    made.saver = cast(Any, SimpleNamespace(due_by_clock=lambda: False))
    return made


class MetaWorld:
    """A single rank on META, which notes what it sums."""

    rank, size, dp_rank, dp_size, device, counted, mesh = 0, 1, 0, 1, META, True, None

    def __init__(self) -> None:
        self.summed: list[torch.Tensor] = []

    def reduce(self, values: torch.Tensor) -> None:
        self.summed.append(values)

    def agree(self, flag: torch.Tensor) -> None:
        assert flag.device == META


def on_meta() -> Batch:
    """As the loader gives it: all on the device."""
    inputs = torch.empty(N, 67, 67, 3, device=META).permute(0, 3, 1, 2)
    labels, keys = (torch.zeros(N, dtype=torch.int64, device=META) for _ in range(2))
    return Batch(inputs, labels, np.arange(N), 0, keys)


@pytest.fixture
def fused_on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["torch.optim.sgd"], "_device_dtype_check_for_fused", lambda *_: None)


@pytest.mark.parametrize("name", ["alexnet", "alexnet_two_tower", "torchvision:alexnet"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_what_a_step_copies(name: str, accumulate: int, fused_on_meta: None) -> None:
    """The plain numbers of the vote, without waiting, and nothing else; nothing is waited for."""
    step = trainer(name, accumulate)
    for _ in range(2):
        with Copies() as copies:
            pending = step.train_step(on_meta(), 0.01)
        assert copies.found == [("cpu to meta", (12,), True)]
        assert pending.vote.values.device == META
    assert [values.dtype for values in cast(MetaWorld, step.world).summed] == [torch.float64] * 2


def test_what_logged_numbers_copy(fused_on_meta: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once they are known, one vector more; in each piece, tensors and plain numbers are reduced on the device."""
    plain = Dropout.forward

    def logs(self: Dropout, x: torch.Tensor, *args: Any) -> torch.Tensor:
        for over in ("max", "mean"):
            numbers.log(over, x, over)  # type: ignore[arg-type]
        numbers.log("plain", 0.5)
        return plain(self, x, *args)

    monkeypatch.setattr(Dropout, "forward", logs)
    step = trainer("alexnet", 3)
    for known, copied in ((False, [(12,)]), (True, [(16,), (12,)])):
        with Copies() as copies:
            pending = step.train_step(on_meta(), 0.01)
        assert copies.found == [("cpu to meta", shape, True) for shape in copied]
        assert len(pending.numbers.new) == (0 if known else 3)
        step.logged._place(set(pending.numbers.new))


def test_what_waits_is_noticed(fused_on_meta: None) -> None:
    """The test above can fail: labels that come from the host are seen, and a number cannot be read."""
    step, batch = trainer("alexnet", 1), on_meta()
    with Copies() as copies:
        labels = torch.zeros(N, dtype=torch.int64).to(META)
        step.train_step(batch._replace(labels=labels), 0.01)
    assert copies.found == [("cpu to meta", (N,), False), ("cpu to meta", (12,), True)]
    with pytest.raises(RuntimeError, match="meta"):
        float(torch.ones((), device=META))


# On a GPU that is pretended -------------------------------------------------------------------------------------------


class Streams:
    """In the place of torch's streams of a GPU: notes what is asked of them, by name, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.said: list[str] = []
        self.at, self.made = "net", 0
        for name in ("stream", "set_stream", "set_device", "current_stream", "default_stream", "Stream"):
            getattr(torch.cuda, name)  # there is such a thing
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda _, stream: self.said.append(f"used by {stream.name}"))
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: self.pinned(tensor))
        empty_like, copy = torch.empty_like, torch.Tensor.copy_

        def empty(like: torch.Tensor, *, device: str, pin_memory: bool) -> torch.Tensor:
            self.said.append(f"pinned {pin_memory}")
            return empty_like(like, device=device)

        def copied(to: torch.Tensor, values: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
            self.said.append(f"copied at {self.at}, late {non_blocking}")
            return copy(to, values)

        monkeypatch.setattr(torch, "empty_like", empty)
        monkeypatch.setattr(torch.Tensor, "copy_", copied)

    def pinned(self, tensor: torch.Tensor) -> torch.Tensor:
        self.said.append(f"pinned at {self.at}")
        return tensor

    def Stream(self, device: torch.device) -> Stream:
        self.made += 1
        return Stream(self, "side")

    def current_stream(self, device: torch.device) -> Stream:
        return Stream(self, self.at)

    def default_stream(self, device: torch.device) -> Stream:
        return Stream(self, "net")

    def set_device(self, device: torch.device) -> None:
        self.said.append(f"GPU {device.index}")

    def set_stream(self, stream: Stream) -> None:
        self.at = stream.name

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.at = self.at, stream.name
        yield
        self.at = before


class Stream(NamedTuple):
    streams: Streams
    name: str

    def wait_stream(self, other: Stream) -> None:
        self.streams.said.append(f"{self.name} waits for {other.name}")

    def record_event(self) -> Any:
        self.streams.said.append(f"event at {self.name}")
        return SimpleNamespace(synchronize=lambda: self.streams.said.append("host waits"))


def test_the_vote_comes_back_beside_the_net(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stream that waits for the sum; the host waits when it reads, for that stream's event alone."""
    streams, values = Streams(monkeypatch), torch.arange(7, dtype=torch.float64)
    monkeypatch.setattr(torch.cuda, "Event", SimpleNamespace)
    vote._side_stream.cache_clear()
    work = SimpleNamespace(wait=lambda: streams.said.append(f"sum waited for at {streams.at}"))
    pending = vote.PendingVote(*vote._returning(values, cast(Any, work)))
    asked = ["side waits for net", "sum waited for at side"]
    asked += ["pinned True", "copied at side, late True", "used by side", "event at side"]
    assert streams.said == asked
    assert pending.read() == vote.Vote(*range(7))
    assert streams.said == [*asked, "host waits"]
    vote._returning(values, None)
    assert streams.made == 1
    vote._side_stream.cache_clear()


def test_a_vote_is_cast_from_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """And it is one that comes back beside the net."""
    streams, made = Streams(monkeypatch), torch.tensor

    class OnHost(torch.Tensor):
        def to(self, *args: Any, **options: Any) -> torch.Tensor:
            streams.said.append(f"to {args[0]}, late {options['non_blocking']}")
            return self.as_subclass(torch.Tensor)

    def tensor(values: Any, *, pin_memory: bool, **options: Any) -> torch.Tensor:
        streams.said.append(f"made, pinned {pin_memory}")
        return made(values, **options).as_subclass(OnHost)

    monkeypatch.setattr(torch, "tensor", tensor)
    vote._side_stream.cache_clear()
    world = SimpleNamespace(device=torch.device("cuda", 0), rank=0, size=1, reduce=lambda _: None)
    vote.Vote.cast(cast(World, world), stop=True)
    assert streams.said[:3] == ["made, pinned True", "to cuda:0, late True", "side waits for net"]
    vote._side_stream.cache_clear()


def test_a_loader_hands_over_on_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """What DALI holds is copied, what comes from the host is pinned, and the net's stream is told who uses it."""
    streams = Streams(monkeypatch)
    hand_over, another = (HandOver(CPU, np.ones(3, np.float32)) for _ in range(2))
    handover._stream.cache_clear()
    hand_over._stream = handover._stream(CPU)
    another._stream = handover._stream(CPU)
    hand_over.enter_thread()
    shown, labels = torch.rand(2, 5, 5, 3), torch.arange(2)
    inputs, handed = hand_over([shown], labels)
    assert torch.equal(inputs, shown.permute(0, 3, 1, 2))
    assert inputs.data_ptr() != shown.data_ptr()
    assert handed is not labels
    assert streams.at == "side"
    assert streams.said == ["GPU None", "event at side", "host waits", "used by net", "used by net"]
    hand_over.place = META  # another device than that of the tensors
    with Copies() as copies:
        hand_over([shown], labels)
    assert [late for _, _, late in copies.found] == [True, True]
    assert streams.said[5:7] == ["pinned at side", "pinned at side"]
    assert another._stream is hand_over._stream
    assert streams.made == 1
    handover._stream.cache_clear()


def test_a_loaders_thread_begins_with_its_gpu(shard_sets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is read or decoded: whatever comes first on GPU 0 leaves a context there."""
    entered: list[tuple[str, int]] = []
    reads: list[int] = []
    shards = ShardSet(shard_sets / "train")
    monkeypatch.setattr(
        HandOver, "enter_thread", lambda _: entered.append((threading.current_thread().name, len(reads)))
    )

    def read(sample: int) -> Any:
        reads.append(sample)
        return shards.read(sample)

    plan = TrainingPlan(shards, Augment(72, 67), shards.manifest)
    for _ in Loader(plan, shards.manifest, batch=64, reading=Read(read=read)).epoch():
        pass
    assert entered == [("loader", 0)]


# The optimizer, and torch's generator -------------------------------------------------------------------------------


def learnt(*, zeros: bool, skip: int = -1, steps: int = 5) -> list[torch.Tensor]:
    """Weights and momentum after some steps of which an overflow has one skipped."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 64)
    optimizer = optim.build(OptimConfig(), layer)
    if not zeros:  # as torch would have it
        optimizer.state.clear()
    scaler = torch.amp.GradScaler("cpu")
    for step in range(steps):
        optimizer.zero_grad()
        scaler.scale(layer(torch.ones(8, 64)).pow(2).mean()).backward()
        if step == skip:
            layer.weight.grad[0, 0] = torch.inf  # type: ignore[index]
        assert optim.update(optimizer, scaler).refused == 0
    return [*map(torch.clone, layer.parameters()), *(s["momentum_buffer"] for s in optimizer.state.values())]


@pytest.fixture
def filled_memory() -> Iterator[None]:
    """torch fills uninitialised memory with NaN, so that whoever uses it is found out."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def test_a_first_step_that_is_skipped_leaves_no_garbage(filled_memory: None) -> None:
    """fp16's scale is too large at first. The same bits as without our zeros where no step is skipped."""
    assert all(torch.equal(a, b) for a, b in zip(learnt(zeros=True), learnt(zeros=False), strict=True))
    assert not all(bool(t.isfinite().all()) for t in learnt(zeros=False, skip=0))
    skipped = learnt(zeros=True, skip=0)
    assert all(bool(t.isfinite().all()) for t in skipped)
    assert all(bool(t.isfinite().all()) for t in learnt(zeros=True, skip=2))


def test_momentum_of_a_run_that_had_none_begins_with_zeros() -> None:
    layer = nn.Linear(4, 3)
    before = optim.build(OptimConfig(momentum=0), layer)
    layer.weight.grad, layer.bias.grad = torch.ones(3, 4), torch.ones(3)
    before.step()
    now = optim.build(OptimConfig(), layer)
    optim.load_moments(now, before.state_dict())
    assert [s["momentum_buffer"].abs().max() for s in now.state.values()] == [0, 0]


def test_a_card_that_only_emulates_bf16_takes_fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch says that a T4 supports it, and is slow."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert build.precision(Config(), World.single(torch.device("cuda", 0))) == "fp16"


def test_only_nets_that_may_draw_numbers_are_seeded(monkeypatch: pytest.MonkeyPatch, fused_on_meta: None) -> None:
    seeds: list[int] = []
    monkeypatch.setattr("dist_train.train.torch.manual_seed", seeds.append)
    for name, seeded in (("alexnet", 0), ("alexnet_two_tower", 0), ("torchvision:alexnet", 1)):
        step = trainer(name, 1)
        seeds.clear()  # the weights are drawn
        with Copies():
            step.train_step(on_meta(), 0.01)
        assert len(seeds) == seeded
    assert models.draws_numbers(nn.Linear(1, 1))  # a stranger's, which says nothing


def test_our_nets_draw_no_numbers() -> None:
    """What they declare is true, in training with dropout."""
    for name in PAPER_NETS:
        net = models.build(ModelConfig(name=name, hidden=8, width=0.25), classes=3, crop=67)
        before = torch.get_rng_state()
        net(torch.randn(2, 3, 67, 67, generator=torch.Generator().manual_seed(0)), mask_keys(0, 0, np.arange(2)))
        assert torch.equal(torch.get_rng_state(), before)


# What is settled ------------------------------------------------------------------------------------------------------


def test_full_precision_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """`train.precision off` is float32 in convolutions too, where torch would take TF32."""
    assert torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high")
    monkeypatch.setattr("dist_train.ranks.world.pick_device", lambda *_: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: None)
    try:
        join("cuda")
        assert not torch.backends.cudnn.allow_tf32
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.backends.cudnn.allow_tf32 = True
        torch.set_float32_matmul_precision("highest")


def test_the_decoder_of_a_gpu_is_fixed_where_bits_are(shard_sets: Path) -> None:
    world, sets = World.single(CPU), {"train": str(shard_sets / "train"), "resize": 72, "crop": 67}
    for deterministic, key, expected in ((True, 0.65, 1.0), (False, 0.65, 0.65), (False, 0.25, 0.25)):
        train = TrainConfig(global_batch=8, deterministic=deterministic)
        config = Config(data=DataConfig(**sets, hw_decoder_load=key), train=train)
        loader = build.train_loader(config, world, ShardSet(shard_sets / "train"))
        assert loader.decode.hw_decoder_load == expected
        assert loader.decode.wanted == CPU
    elsewhere = build.train_loader(config, World.single(META), ShardSet(shard_sets / "train"))
    assert elsewhere.decode.wanted == META
    assert elsewhere.decode.gives_bytes
    fine = Config(data=DataConfig(hw_decoder_load=1.0), train=TrainConfig(deterministic=False))
    assert fine.data.hw_decoder_load == 1.0
    with pytest.raises(ConfigError, match=r"must lie in \[0, 1\]"):
        Config(data=DataConfig(hw_decoder_load=1.01), train=TrainConfig(deterministic=False))
    with pytest.raises(ConfigError, match="deterministic fixes it at 1"):
        Config(data=DataConfig(hw_decoder_load=0.5))


def test_a_small_share_is_told() -> None:
    """Of README's eight ranks at the paper's batch, not of the configuration that is meant for them."""
    paper, eight = Config(), Config(train=TrainConfig(global_batch=1024))
    assert "a GPU gets 16 images" in data.small_share(paper, 8, "cuda")
    assert not data.small_share(paper, 4, "cuda")
    assert "a GPU gets 16 images" in data.small_share(replace(paper, train=TrainConfig(accumulate=2)), 4, "cuda")
    assert "gets 31 " in data.small_share(Config(train=TrainConfig(global_batch=31)), 1, "cuda")
    assert not data.small_share(Config(train=TrainConfig(global_batch=32)), 1, "cuda")
    pairs = Config(model=ModelConfig(name="alexnet_two_tower"), train=TrainConfig(tower_parallel=True))
    assert not data.small_share(pairs, 8, "cuda")
    assert not data.small_share(paper, 8, "cpu")
    assert not data.small_share(eight, 8, "cuda")


def test_what_is_compiled_is_kept_in_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in INDUCTOR:
        monkeypatch.setenv(name, "")  # so that it is as before after the test
        monkeypatch.delenv(name)
    place, threads, deterministic, triton = INDUCTOR
    world = World(5, 8, 1, 4, CPU, shares=[CpuShare(Fraction(rank), True) for rank in range(8)])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    process.prepare_compiler(world, deterministic=False)
    cache = Path(os.environ[place])
    assert cache.is_dir()
    assert cache.parent == tmp_path / "dist_train"
    assert cache.stat().st_mode & 0o077 == 0
    assert list(cache.iterdir()) == []
    assert Path(os.environ[triton]) == cache / f"triton-{socket.gethostname()}-1"
    assert os.environ[threads] == "5"
    assert deterministic not in os.environ
    mine = dict(zip(INDUCTOR, ("mine", "5", "0", "here"), strict=True))
    for name, value in mine.items():
        monkeypatch.setenv(name, value)
    process.prepare_compiler(world, deterministic=True)
    assert {name: os.environ[name] for name in INDUCTOR} == mine


@pytest.mark.parametrize("home", ["/proc/no/such", "full"])
def test_a_cache_that_cannot_be_written_is_left_to_torch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, home: str
) -> None:
    def full(**_: Any) -> None:
        raise OSError(28, "No space left on device")

    for name in INDUCTOR:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path) if home == "full" else home)
    if home == "full":
        monkeypatch.setattr(process.tempfile, "TemporaryFile", full)
    process.prepare_compiler(World.single(CPU), deterministic=True)
    assert INDUCTOR[0] not in os.environ
    assert INDUCTOR[3] not in os.environ
    assert os.environ[INDUCTOR[2]] == "1"


@pytest.mark.parametrize("message", ["", "  \n ", "first\nthe reason\n\n"])
def test_a_compiler_that_fails_without_a_word(monkeypatch: pytest.MonkeyPatch, message: str) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(process.NoCompiler, match="the reason" if "reason" in message else "RuntimeError"):
        process.try_compiler(CPU)


# With the real trainer ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.integration
def test_ddp_around_the_net_of_one_rank(shard_sets: Path, tmp_path: Path) -> None:
    """`train.ddp always`: the same bits, in pieces too, and continued after a stop."""
    for extra in ((), ("--train.accumulate=3",)):
        runs = [tmp_path / f"{name}{len(extra)}" for name in ("plain", "wrapped", "stopped")]
        wrapped = (*extra, "--train.ddp=always")
        assert launch(shard_sets, runs[0], *extra, ranks=0).returncode == 0
        assert launch(shard_sets, runs[1], *wrapped, ranks=0).returncode == 0
        assert_same_run(runs[1], runs[0])
    launch(shard_sets, runs[2], *wrapped, ranks=0, fault=at("step", 4, "SIGTERM"))
    assert status(runs[2])["state"] == "stopped"
    newest_step = status(runs[2])["step"]
    result = launch(shard_sets, runs[2], *wrapped, ranks=0, module="tests.test_device")
    assert "the net is in DistributedDataParallel" in result.stdout
    assert result.stdout.count("keys as they are meant") == 2 * STEPS - newest_step
    assert result.stderr.count("a GPU gets 8 images of a batch") == 1
    assert_same_run(runs[2], runs[0])


@pytest.mark.integration
def test_another_gpu_is_told(shard_sets: Path, tmp_path: Path) -> None:
    """A run that was saved with one card and goes on with another, or with none; nothing is said of the same one."""
    assert launch(shard_sets, tmp_path, "--train.epochs=1", ranks=0).returncode == 0
    same = launch(shard_sets, tmp_path, "--train.epochs=2", ranks=0)
    assert "the bits may differ" not in same.stderr
    newest = max((tmp_path / "checkpoints").glob("step-*")) / "meta.json"
    meta = json.loads(newest.read_text())
    assert meta["process"]["accelerator"] == ""
    meta["process"]["accelerator"] = "NVIDIA A100, driver 550.54"
    newest.write_text(json.dumps(meta))
    other = launch(shard_sets, tmp_path, "--train.epochs=3", ranks=0)
    assert other.returncode == 0, other.stderr
    told = "the checkpoint was saved on NVIDIA A100, driver 550.54, this is no GPU: from here on the bits may differ"
    assert other.stderr.count(told) == 1
    assert "accelerator" not in other.stderr
    assert records(tmp_path, "changed")[-1]["accelerator"] == ""
    newest = max((tmp_path / "checkpoints").glob("step-*")) / "meta.json"
    meta = json.loads(newest.read_text())
    del meta["process"]["accelerator"]  # as of an older program
    newest.write_text(json.dumps(meta))
    older = launch(shard_sets, tmp_path, "--train.epochs=4", ranks=0)
    assert "the bits may differ" not in older.stderr
    assert "accelerator" not in records(tmp_path, "changed")[-1]


def test_what_holds_on_one_rank_alone_is_not_what_is_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler works on this rank, and not on another; another has another card."""
    world = World(0, 2, 0, 2, torch.device("cuda", 0), shares=[CpuShare(Fraction(1), True)] * 2)
    said: list[str] = []

    def together(_: World, work: Any, *, failure: type[Exception], **options: Any) -> None:
        raise failure("not on rank 1")

    def gather(into: list[str], mine: str) -> None:
        into[:] = ["H100", mine]

    monkeypatch.setattr(World, "together", together)
    monkeypatch.setattr(process, "try_compiler", lambda _: None)
    monkeypatch.setattr(process.machine, "accelerator", lambda _: "A100")
    monkeypatch.setattr(dist, "all_gather_object", gather)
    for name in INDUCTOR:
        monkeypatch.setenv(name, os.environ.get(name, "x"))
    try:
        settled = process.prepare(Config(), world, said.append)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not settled.compiled
    assert "not on rank 1" in said[0]
    assert settled.accelerator == "A100; H100"


@pytest.mark.integration
@pytest.mark.slow
def test_a_start_on_another_node_compiles_nothing_anew(
    shard_sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted by a compiler that notes its calls. Nothing of it lies in the run's directory."""
    for name in INDUCTOR:
        monkeypatch.delenv(name, raising=False)
    compiler, calls = tmp_path / "c++", tmp_path / "calls"
    real = shutil.which("c++")
    compiler.write_text(f'#!/bin/sh\necho "$@" >> {calls}\nexec {real} "$@"\n')
    compiler.chmod(0o755)
    env = {"CXX": str(compiler), "XDG_CACHE_HOME": str(tmp_path / "home")}
    run, counts = tmp_path / "run", []
    for state, fault in (("stopped", at("step", 12, "SIGTERM")), ("done", None)):
        calls.unlink(missing_ok=True)
        extra = ("--train.compile=on", "--train.ddp=always")
        result = launch(shard_sets, run, *extra, ranks=0, fault=fault, env=env, how="exec", timeout=600)
        assert status(run)["state"] == state, result.stderr
        lines = calls.read_text().splitlines() if calls.exists() else []
        counts.append(sum(" -o " in line and " -E " not in line for line in lines))  # -E: a header is read
    assert counts[0] > 0
    assert counts[1] == 0
    assert list((tmp_path / "home" / "dist_train").glob("inductor-*/*"))
    assert not [path for path in run.rglob("*") if path.suffix in (".so", ".cpp", ".py")]


def main() -> int:
    """The trainer, which says whether its net is in DDP and its keys are those of the step, and takes itself to be on a
    GPU when it speaks of shares."""
    distribute, step, share = build.distribute, Trainer.train_step, data.small_share

    def keyed(trainer: Trainer, batch: Batch, lr: float) -> Any:
        positions = batch.start + np.arange(len(batch.labels))
        meant = mask_keys(trainer.config.train.seed, trainer.progress.step, positions)
        print("keys as they are meant" if torch.equal(batch.keys, meant) else "other keys")
        return step(trainer, batch, lr)

    def told(*args: Any, **options: Any) -> nn.Module:
        net = distribute(*args, **options)
        if isinstance(net, nn.parallel.DistributedDataParallel):
            print("the net is in DistributedDataParallel")
        return net

    build.distribute, Trainer.train_step = told, keyed  # type: ignore[method-assign]
    data.small_share = lambda config, ranks, _: share(config, ranks, "cuda")
    return __main__.main()


if __name__ == "__main__":
    sys.exit(main())
