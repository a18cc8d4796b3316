"""Settings of a training process, and what ranks send each other in a step.

As a module this is the trainer, whose third step is watched: one line of JSON a rank.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import DeviceMesh
from torch.profiler import ProfilerActivity, profile

from dist_train import __main__, process, train
from dist_train.config import Config, ModelConfig, TrainConfig
from dist_train.process import NoCompiler, Settled, keep_freed_memory, prepare
from dist_train.ranks.world import World, join
from tests.helpers.compare import records, status
from tests.helpers.launch import PLAIN, launch

CPU = torch.device("cpu")
SINGLE = World.single(CPU)


class Libc:
    """A C library whose mallopt takes thresholds up to `largest` bytes."""

    def __init__(self, largest: int, name: str) -> None:
        self.largest, self.asked = largest, list[tuple[int, int]]()
        setattr(self, name, None)

    def mallopt(self, parameter: int, value: int) -> int:
        self.asked.append((parameter, value))
        return int(value <= self.largest)


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*filter(lambda n: n.startswith("MALLOC_"), os.environ), "GLIBC_TUNABLES", "LD_PRELOAD"]:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("largest", "kept"), [(1 << 62, "kept, in blocks up to 1024 MiB"), (32 << 20, "kept, in blocks up to 32 MiB")]
)
def test_thresholds_of_newer_and_older_glibc(monkeypatch: pytest.MonkeyPatch, largest: int, kept: str) -> None:
    libc = Libc(largest, "gnu_get_libc_version")
    monkeypatch.setattr(process.ctypes, "CDLL", lambda _: libc)
    assert keep_freed_memory(CPU) == kept
    assert libc.asked[-2:] == [(-3, min(largest, 1 << 30)), (-1, -1)]


def test_malloc_is_left_to_who_set_it(monkeypatch: pytest.MonkeyPatch) -> None:
    libc = Libc(1 << 62, "gnu_get_libc_version")
    monkeypatch.setattr(process.ctypes, "CDLL", lambda _: libc)
    for name, value in {"MALLOC_ARENA_MAX": "2", "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"}.items():
        monkeypatch.setenv(name, value)
        assert keep_freed_memory(CPU) == f"as set by {name}"
        monkeypatch.delenv(name)
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libjemalloc.so.2")
    assert "LD_PRELOAD" in keep_freed_memory(CPU)
    monkeypatch.delenv("LD_PRELOAD")
    assert "not on the CPU" in keep_freed_memory(torch.device("cuda", 0))
    assert libc.asked == []
    monkeypatch.setattr(process.ctypes, "CDLL", lambda _: Libc(0, "musl"))
    assert "not glibc" in keep_freed_memory(CPU)


FAULTS = """
import resource, torch
from dist_train.process import keep_freed_memory
print(keep_freed_memory(torch.device("cpu")))
faults = []
for _ in range(12):
    block = torch.ones(7_000_000)
    del block
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[-1] - faults[1])
"""


@pytest.mark.integration
@pytest.mark.slow
def test_freed_memory_is_kept() -> None:
    """Blocks of 28 MB, freed and taken again: the kernel gives their 6,836 pages a few times, not each time."""
    if not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"):
        pytest.skip("the C library is not glibc")
    faults = {}
    for tunables in ("", "glibc.malloc.trim_threshold=131072"):
        env = {**os.environ, "GLIBC_TUNABLES": tunables} if tunables else dict(os.environ)
        done = subprocess.run([sys.executable, "-c", FAULTS], env=env, capture_output=True, text=True, check=True)
        said, count = done.stdout.splitlines()
        faults[said.partition(" ")[0]] = int(count)
    assert faults["kept,"] < 4 * 6836 < 9 * 6836 < faults["as"]


def test_torchs_flag_is_for_nets_that_are_not_ours() -> None:
    try:
        for name, wanted, expected in (
            ("alexnet", True, "by construction"),
            ("torchvision:resnet18", True, "by torch's flag"),
            ("torchvision:resnet18", False, "no"),
        ):
            config = Config(model=ModelConfig(name=name), train=TrainConfig(deterministic=wanted))
            assert prepare(config, SINGLE, print) == Settled(False, expected, keep_freed_memory(CPU))
            assert torch.are_deterministic_algorithms_enabled() == (expected == "by torch's flag")
            assert not torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    finally:
        torch.use_deterministic_algorithms(False)


def test_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU what is asked for; on a GPU what works, and torch's flag for all nets."""
    said: list[str] = []
    world = join("cpu")
    try:
        gpu = replace(world, device=torch.device("cuda", 0))
        for place, choice, why, expected in (
            (world, "auto", "", False),
            (world, "on", "", True),
            (gpu, "auto", "", True),
            (gpu, "auto", "no compiler", False),
            (gpu, "off", "", False),
            (replace(gpu, mesh=cast(DeviceMesh, "two towers")), "auto", "", False),
        ):
            monkeypatch.setattr(process, "try_compiler", partial(_try, why))
            monkeypatch.setattr(process.machine, "accelerator", lambda _: "a card")
            settled = prepare(Config(train=TrainConfig(compile=cast(Any, choice))), place, said.append)
            assert settled.compiled == expected
            assert settled.deterministic == ("by construction" if place == world else "by torch's flag")
            assert settled.accelerator == ("" if place == world else "a card")
        assert said == ["torch.compile is off, it does not work here: no compiler"]
    finally:
        torch.use_deterministic_algorithms(False)
        dist.destroy_process_group()


def _try(why: str, device: torch.device) -> None:
    if why:
        raise NoCompiler(why)


@pytest.mark.integration
@pytest.mark.slow
def test_a_compiler_that_is_missing_is_named() -> None:
    code = "import torch; from dist_train.process import try_compiler; try_compiler(torch.device('cpu'))"
    env = {**os.environ, "CXX": "/no/such/compiler", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "NoCompiler: " in done.stderr


def watched_step(shard_sets: Path, run: Path, *extra: str, **options: Any) -> list[dict[str, Any]]:
    """What each of two ranks printed of its third step."""
    result = launch(shard_sets, run, "--train.max_steps=4", *extra, module="tests.test_process", **options)
    assert status(run)["state"] == "done", result.stderr
    ranks = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert sorted(step["rank"] for step in ranks) == [0, 1]
    return ranks


@pytest.mark.integration
@pytest.mark.slow
def test_the_collectives_of_a_step(shard_sets: Path, tmp_path: Path) -> None:
    """Gradients and the vote are summed, once for all pieces, and nothing is broadcast; the statistics of BatchNorm
    still are."""
    for pieces in (1, 3):
        for step in watched_step(shard_sets, tmp_path / f"ours{pieces}", f"--train.accumulate={pieces}"):
            assert step["collectives"] == {"all_reduce": step["buckets"] + 1}
    torchvision = ("--model.name=torchvision:shufflenet_v2_x0_5", *PLAIN, "--optim.lr=1e-6")
    for step in watched_step(shard_sets, tmp_path / "theirs", *torchvision):
        assert step["collectives"]["broadcast"] > 0


def normed(classes: int, crop: int) -> nn.Module:
    """The least net with statistics: torchvision's compile for minutes."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 5, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(),
        nn.Linear(128, classes),
    )  # fmt: skip


@pytest.mark.integration
@pytest.mark.slow
def test_a_net_with_statistics_compiles(shard_sets: Path, tmp_path: Path) -> None:
    """The rank that compiles first must not wait for the broadcast of them."""
    extra = ("--model.name=tests.test_process:normed", *PLAIN, "--train.compile=on")
    for step in watched_step(shard_sets, tmp_path / "run", *extra, how="exec", timeout=600):
        assert step["collectives"]["broadcast"] > 0


@pytest.mark.integration
@pytest.mark.slow
def test_one_rank_compiles_and_the_other_reads_its_cache(shard_sets: Path, tmp_path: Path) -> None:
    env = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    ranks = watched_step(shard_sets, tmp_path / "run", "--train.compile=on", how="exec", env=env, timeout=600)
    first, second = sorted(ranks, key=lambda step: step["rank"])
    assert first["compiled"] > 0
    assert (second["compiled"], second["found"]) == (0, first["compiled"])
    begun = records(tmp_path / "run", "begun")
    assert [line["compiled"] for line in begun] == [True]


def test_the_record_says_what_is_in_force(shard_sets: Path, tmp_path: Path) -> None:
    run, env = tmp_path / "run", {"MALLOC_ARENA_MAX": "3"}
    assert launch(shard_sets, run, "--train.max_steps=2", ranks=0, env=env).returncode == 0
    (begun,) = records(run, "begun")
    expected = Settled(False, "by construction", "as set by MALLOC_ARENA_MAX", precision="off")
    assert begun == {"kind": "begun", "step": 0, **vars(expected)}
    result = launch(shard_sets, run, "--train.epochs=1", ranks=0)
    assert result.returncode == 0, result.stderr
    (changed,) = records(run, "changed")
    assert changed["freed_memory"].startswith("kept, in blocks")
    assert "numerics" not in changed


def main() -> int:
    """The trainer. Of its third step it prints what the collectives were, and what the compiler did before it."""
    plain, steps = train.Trainer.train_step, []

    def step(self: train.Trainer, *args: Any) -> train.Pending:
        steps.append(None)
        if len(steps) != 3:
            return plain(self, *args)
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            pending = plain(self, *args)
            pending.vote.read()
        names = Counter(event.name.partition("gloo:")[2] for event in seen.events() if event.name.startswith("gloo:"))
        buckets = len(self.net._get_ddp_logging_data()["bucket_sizes"].split(","))  # type: ignore[operator]
        inductor = counters["inductor"]
        line = {"rank": self.world.rank, "collectives": names, "buckets": buckets}
        line |= {"compiled": inductor["fxgraph_cache_miss"], "found": inductor["fxgraph_cache_hit"]}
        print(json.dumps(line), flush=True)
        return pending

    train.Trainer.train_step = step  # type: ignore[method-assign]
    return __main__.main()


if __name__ == "__main__":
    sys.exit(main())
