"""Tower parallelism: two towers on two ranks compute the same as one process with both.

`python -m tests.test_towers` under torchrun is what one rank of `test_every_gradient` does.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from dist_train import build, optim
from dist_train.config import Config, ConfigError, ModelConfig, TrainConfig
from dist_train.data import check_batch
from dist_train.data_config import DataConfig
from dist_train.models.dropout import mask_keys
from dist_train.models.two_tower import TwoTowers
from dist_train.ranks.tower_parallel import told_of
from dist_train.ranks.world import World, join
from dist_train.rundir import confusion
from pipelines.order import even_split
from tests.helpers.compare import assert_same_run, equal, newest, records, status
from tests.helpers.launch import at, launch

pytestmark = pytest.mark.integration

STEPS = 8  # an epoch: 240 images in batches of 30
WHOLE = ("--model.name=alexnet_two_tower", "--train.global_batch=30", "--train.epochs=1")
PAIRS = (*WHOLE, "--train.tower_parallel=true")


def run(data: Path, where: Path, *extra: str, ranks: int, fault: dict[str, Any] | None = None) -> dict[str, Any]:
    """Run to its end, or to the fault; its status."""
    (where / f"fault-{fault['rank'] if fault else 0}").unlink(missing_ok=True)
    result = launch(data, where, *extra, ranks=ranks, fault=fault)
    assert result.returncode in ((0,) if ranks else (0, 75)) or status(where)["state"] == "diverged", result.stderr
    assert result.returncode or "Traceback" not in result.stderr
    return status(where)


@pytest.fixture(scope="module")
def alone(shard_sets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process that has both towers."""
    where = tmp_path_factory.mktemp("alone")
    assert run(shard_sets, where, *WHOLE, ranks=0)["state"] == "done"
    return where


@pytest.fixture(scope="module")
def pair(shard_sets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a tower on each of two ranks."""
    where = tmp_path_factory.mktemp("pair")
    assert run(shard_sets, where, *PAIRS, ranks=2)["state"] == "done"
    return where


def assert_close(a: Path, b: Path) -> None:
    """Equal up to the order of summation: losses to 1e-5 of their size, weights and momenta to 1e-5 of the largest of
    each tensor. The checkpoints are made alike: names, numbers, shapes, dtypes and memory formats."""
    steps = [[r for r in records(where) if r["kind"] not in ("begun", "probe")] for where in (a, b)]
    for ours, theirs in zip(*steps, strict=True):
        assert ours.pop("kind") == theirs.pop("kind")
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert len(steps[0]) == STEPS + 1
    assert steps[0][-1]["samples"] == 63
    ours, theirs = newest(a), newest(b)
    assert list(ours["model"]) == list(theirs["model"])
    assert ours["optimizer"]["param_groups"] == theirs["optimizer"]["param_groups"]
    assert list(ours["optimizer"]["state"]) == list(theirs["optimizer"]["state"])
    assert ours["state"] == pytest.approx(theirs["state"])
    momenta = [
        {str(i): m["momentum_buffer"] for i, m in saved["optimizer"]["state"].items()} for saved in (ours, theirs)
    ]
    assert len(momenta[0]) == len(ours["model"]) == 2 * 15 + 1
    for left, right in ((ours["model"], theirs["model"]), momenta):
        for name, value in left.items():
            assert value.stride() == right[name].stride(), name
            torch.testing.assert_close(value, right[name], rtol=0, atol=1e-5 * float(right[name].abs().max()))


def test_a_pair_is_one_process(alone: Path, pair: Path) -> None:
    assert_close(pair, alone)
    (counts, _), (theirs, _) = confusion.read(pair), confusion.read(alone)
    assert counts.samples.sum() == 63, "counted once"
    assert all(map(np.array_equal, vars(counts).values(), vars(theirs).values()))


def test_two_pairs_are_one_process(shard_sets: Path, tmp_path: Path, alone: Path) -> None:
    """Two data-parallel ranks of two towers, which accumulate; the probe, which goes through both towers, changes
    nothing."""
    options = ("--monitor.probes=[2]", "--train.accumulate=2")
    assert run(shard_sets, tmp_path, *PAIRS, *options, ranks=4)["state"] == "done"
    assert_close(tmp_path, alone)
    (probe,) = records(tmp_path, "probe")
    assert all(name.startswith("towers.0.") for name in probe["layers"])


def test_stopping_and_going_on(shard_sets: Path, tmp_path: Path, alone: Path, pair: Path) -> None:
    """A SIGTERM to tower 1 saves the whole net, and going on gives the bits of never having stopped. So does the same
    checkpoint, up to rounding, where one process goes on, is stopped, and a pair finishes; a save fails there, and the
    other try needs both towers."""
    stopped, mixed = tmp_path / "stopped", tmp_path / "mixed"
    end = run(shard_sets, stopped, *PAIRS, ranks=2, fault=at("step", 3, "SIGTERM", 1))
    assert end["state"] == "stopped"
    assert 3 <= newest(stopped)["state"]["step"] < STEPS
    shutil.copytree(stopped, mixed)

    assert run(shard_sets, stopped, *PAIRS, ranks=2)["state"] == "done"
    assert_same_run(stopped, pair)

    assert run(shard_sets, mixed, *WHOLE, ranks=0, fault=at("step", 2, "SIGTERM", 0))["state"] == "stopped"
    assert 5 <= newest(mixed)["state"]["step"] < STEPS
    full = at("save:written", 1, "disk full", 0)
    assert run(shard_sets, mixed, *PAIRS, ranks=2, fault=full)["state"] == "done"
    assert (mixed / "fault-0").exists(), "the save has failed once"
    assert_close(mixed, alone)


def test_weights_of_another_run(shard_sets: Path, tmp_path: Path, alone: Path) -> None:
    """`init_from` gives each rank its tower's weights of a run that had both in one process; no step changes them."""
    frozen = (f"--model.init_from={alone}", "--optim.lr=1e-30", "--optim.weight_decay=0", "--train.max_steps=2")
    assert run(shard_sets, tmp_path, *PAIRS, *frozen, ranks=2)["state"] == "done"
    assert equal(newest(tmp_path)["model"], newest(alone)["model"])


def test_a_gradient_of_one_tower_that_is_not_finite(shard_sets: Path, tmp_path: Path) -> None:
    end = run(shard_sets, tmp_path, *PAIRS, ranks=2, fault=at("step", 3, "nan", 1))
    assert end["state"] == "diverged"
    assert "the gradient is not finite at step 3 " in end["reason"]


def test_damaged_samples(damaged: tuple[Path, list[int]], tmp_path: Path) -> None:
    """Both towers see the same images in the place of those that cannot be decoded, each of which counts once."""
    data, bad = damaged
    ends = [run(data, tmp_path / "pair", *PAIRS, ranks=2), run(data, tmp_path / "alone", *WHOLE, ranks=0)]
    assert [end["state"] for end in ends] == ["done", "done"]
    assert_close(tmp_path / "pair", tmp_path / "alone")
    assert records(tmp_path / "pair", "step")[-1]["bad_samples"] == len(bad)


def test_what_cannot_be_paired_is_one_sentence(shard_sets: Path, tmp_path: Path) -> None:
    result = launch(shard_sets, tmp_path / "r", *PAIRS, ranks=0)
    assert result.returncode == 2
    message = "error: train.tower_parallel puts each net on two ranks, and 1 cannot be paired: start an even number"
    assert result.stderr.splitlines() == [message]
    config = Config(
        model=ModelConfig("alexnet_two_tower"), train=TrainConfig(global_batch=2, accumulate=2, tower_parallel=True)
    )
    check_batch(config, 2)  # the two ranks see the same samples
    with pytest.raises(ConfigError, match=r"smaller than ranks \(2\) x train\.accumulate \(2\)"):
        check_batch(config, 4)
    for setting, remedy in (({"precision": "fp16"}, "set it to bf16 or off"), ({"compile": "on"}, "auto or off")):
        with pytest.raises(ConfigError, match=remedy):
            Config(model=ModelConfig("alexnet_two_tower"), train=TrainConfig(tower_parallel=True, **setting))


@pytest.mark.slow
def test_every_gradient() -> None:
    """In float64, on two data-parallel ranks of two towers; see `compare`."""
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run([*ranks, "-m", "tests.test_towers"], env=env, capture_output=True, text=True, timeout=180)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("as one process") == 4


@pytest.mark.slow
def test_a_tower_that_cannot_read(shard_sets: Path, pair: Path, tmp_path: Path) -> None:
    """Both towers of its net, and those of the other nets, leave the step out, save, and leave."""
    result = launch(shard_sets, tmp_path / "run", *PAIRS, ranks=4, fault=at("loader", 6, "unread", 2))
    assert result.returncode == 1
    assert status(tmp_path / "run") | {"state": "failed", "step": 5} == status(tmp_path / "run")
    assert run(shard_sets, tmp_path / "run", *PAIRS, ranks=2)["state"] == "done"
    for a, b in zip(records(pair, "step"), records(tmp_path / "run", "step"), strict=True):
        assert (b["step"], b["loss"]) == (a["step"], pytest.approx(a["loss"], rel=1e-4))


def compare() -> None:
    """One rank: weights, logits and gradients against the same net whole, on the same samples."""
    world = join("cpu").in_pairs()
    assert (world.dp_rank, world.tower) == divmod(world.rank, 2)
    options = ModelConfig("alexnet_two_tower", hidden=32, width=0.25)
    config = Config(model=options, data=DataConfig(crop=67), train=TrainConfig(global_batch=7, tower_parallel=True))
    whole = build.model(config, World.single(world.device), 9, compiled=False)
    model = build.model(config, world, 9, compiled=False)
    assert isinstance(model, TwoTowers)
    assert [name.partition(".")[0] for name, _ in model.towers.named_children()] == [str(world.tower)]
    for name, value in model.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name]), "the weights follow from the seed"

    images = torch.randn(7, 3, 67, 67, generator=torch.Generator().manual_seed(1)) * 60
    images, keys = images.to(memory_format=torch.channels_last), mask_keys(0, 0, np.arange(7))
    for layout in (torch.channels_last, torch.contiguous_format):
        maps = torch.arange(2 * 6 * 5 * 4.0).view(2, 6, 5, 4).to(memory_format=layout)
        joined = model.exchange.join([maps.chunk(2, 1)[world.tower].contiguous(memory_format=layout)])
        assert torch.equal(joined, maps)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(images, keys), whole(images, keys))

    model, whole, images, labels = model.double(), whole.double(), images.double(), torch.arange(7)
    low, high = even_split(7, world.dp_rank, world.dp_size)
    net = DistributedDataParallel(model, process_group=world.group("data"))
    logits, expected = net(images[low:high], keys[low:high]), whole(images, keys)
    torch.testing.assert_close(logits, expected[low:high], rtol=1e-12, atol=0)
    (F.cross_entropy(logits, labels[low:high], reduction="sum") * (world.dp_size / 7)).backward()
    F.cross_entropy(expected, labels).backward()
    theirs = dict(whole.named_parameters())
    for name, parameter in model.named_parameters():
        gradient, reference = parameter.grad, theirs[name].grad
        assert gradient is not None
        assert reference is not None
        assert reference.abs().max() > 0, name
        torch.testing.assert_close(gradient, reference, rtol=0, atol=1e-12 * float(reference.abs().max()), msg=name)

    optimizer, off = optim.build(config.optim, model), torch.amp.GradScaler("cpu", enabled=False)
    updated = optim.update(optimizer, off, world.agree, told_of(model))
    assert updated.refused == 0
    square = updated.square if world.dp_rank == 0 else torch.zeros_like(updated.square)
    dist.all_reduce(square)
    expected = sum(float(p.grad.square().sum()) for p in whole.parameters() if p.grad is not None)
    assert abs(float(square) / expected - 1) < 1e-6, "the norm over both towers, told once"
    biases = [torch.empty_like(model.bias) for _ in range(world.size)]
    dist.all_gather(biases, model.bias.detach())
    assert all(torch.equal(bias, biases[0]) for bias in biases), "each rank has this parameter: it must stay one"
    before = {k: v.clone() for k, v in model.state_dict().items()}
    if world.tower == 1:
        optimizer.param_groups[0]["params"][1].grad.fill_(float("nan"))
    assert optim.update(optimizer, off, world.agree).refused == 1
    assert equal(dict(model.state_dict()), before), "refused on both"
    print("as one process", flush=True)


if __name__ == "__main__":
    warnings.simplefilter("error")
    compare()
    dist.destroy_process_group()
