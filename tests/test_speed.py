"""`python -m dist_train speed`: the sums add up, and nothing is left that a run could continue. No time is asserted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.distributed as dist

from dist_train import models
from dist_train.__main__ import main
from dist_train.analysis import pace as measuring
from dist_train.analysis.pace import Pace, Stretch, without_data
from dist_train.analysis.speed import describe, profile_of
from dist_train.cli import parse
from dist_train.config import ModelConfig
from dist_train.flat import as_dict
from dist_train.outcomes import Refused
from dist_train.ranks.watch import Watch
from dist_train.ranks.world import join
from pipelines.augment import Augment
from pipelines.loader import Batch
from pipelines.plan import TrainingPlan
from pipelines.shards import ShardSet
from tests.benchmarks import plain
from tests.helpers.launch import EMPTY, SMALL, Run, alive, children, finish, python, spawn

STEPS = 4
LINES = {
    0: ["on", "net", "step", "loader", "both", "CPU", "memory", "warm-up", "profile"],
    2: [
        "on",
        "net",
        "step",
        "loader",
        "both",
        "all-reduce",
        "CPU",
        "memory",
        "warm-up",
        "computing",
        "loading",
        "profile",
    ],
}


def speed(data: Path | None, *words: str, ranks: int = 0, how: str = "fork") -> Run:
    """The verb, started in the current folder with its temporary files in `tmp`."""
    sets = [f"--data.train={data / 'train'}", f"--data.val={data / 'val'}"] if data else ["--data.train=none"]
    Path("tmp").mkdir(exist_ok=True)
    command = python("dist_train", "speed", f"--config={EMPTY}", *SMALL, *sets, *words, ranks=ranks)
    return spawn(command, env={"TMPDIR": str(Path("tmp").resolve())}, how=how)


def files(*roots: Path) -> dict[str, bytes]:
    """All files below, with their bytes."""
    return {str(path): path.read_bytes() for root in roots for path in sorted(root.rglob("*")) if path.is_file()}


def left(path: Path) -> list[str]:
    """What lies in the folder of the command and in that of its temporary files."""
    dist_train = (path / "tmp").glob("dist_train*")
    return sorted([entry.name for entry in path.iterdir()] + [entry.name for entry in dist_train])


def positive(values: Iterable[Any]) -> bool:
    return all(value is None or value > 0 for value in values)


@pytest.mark.integration
@pytest.mark.parametrize("ranks", [0, 2])
def test_a_profile(ranks: int, shard_sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With data, in one process and in two: all that was asked for is there, and the sums fit."""
    monkeypatch.chdir(tmp_path)
    before = files(shard_sets)
    result = finish(speed(shard_sets, f"--steps={STEPS}", "--run.name=mine", ranks=ranks))
    assert result.returncode == 0, result.stderr
    assert left(tmp_path) == ["profile.json", "tmp"], "no run directory"
    assert files(shard_sets) == before

    report = json.loads((tmp_path / "profile.json").read_text())
    size = max(1, ranks)
    assert (report["world_size"], report["nodes"], report["device_type"]) == (size, 1, "cpu")
    assert (report["global_batch"], report["crop"], report["process"]["compiled"]) == (24, 67, False)
    assert report["versions"]["torch"] == torch.__version__
    sets = [f"--data.{split}={shard_sets / split}" for split in ("train", "val")]
    config, _ = parse(["--config", str(EMPTY), *SMALL, *sets, "--run.name=mine"])
    assert report["config"] == json.loads(json.dumps(as_dict(config))), "as it was given"

    for name in ("step", "loader", "both"):
        found = report[name]
        assert (found["steps"], found["images"]) == (STEPS, 24 * STEPS)
        assert positive(found[key] for key in ("images_per_s", "step_ms", "cpu_ms_per_image"))
        assert found["images_per_s"] == pytest.approx(24e3 / found["step_ms"])
        assert 0 <= found["data_wait_share"] <= 1
    assert report["step"]["data_wait_share"] == 0
    assert [row["rank"] for row in report["ranks"]] == list(range(size))
    assert [row["images"] for row in report["ranks"]] == [24 * STEPS // size] * size
    for row in report["ranks"]:
        assert positive(value for key, value in row.items() if key.endswith(("_ms", "_s", "_mb", "_image")))
    mean = sum(row["both_cpu_ms_per_image"] for row in report["ranks"]) / size
    assert report["both"]["cpu_ms_per_image"] == pytest.approx(mean), "of all ranks, for an image of any"
    if ranks:
        assert report["all_reduce"]["mb"] == pytest.approx(4e-6 * report["parameters"])
        assert positive(report["all_reduce"].values())
    else:
        assert report["all_reduce"] is None

    told = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert list(told) == LINES[ranks]
    assert f"{report['step']['images_per_s']:,.0f} images/s" in told["step"]
    assert f"{report['both']['images_per_s']:,.0f} images/s" in told["both"]


@pytest.mark.integration
def test_without_data_only_the_step_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On random images, with a word about it; a set that is there but damaged is another matter."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    result = finish(speed(None, f"--steps={STEPS}", "--out=elsewhere/p.json", "--model.outputs=7"))
    assert result.returncode == 0, result.stderr
    assert "not measured: none does not exist" in result.stdout
    assert left(tmp_path) == ["elsewhere", "tmp"]
    report = json.loads((tmp_path / "elsewhere" / "p.json").read_text())
    assert report["loader"] is report["both"] is None
    assert report["step"]["images_per_s"] > 0
    assert result.stderr == ""


@pytest.mark.integration
@pytest.mark.parametrize("ranks", [0, 2])
@pytest.mark.slow
def test_ctrl_c_leaves_nothing(ranks: int, shard_sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = speed(shard_sets, "--steps=1000000", ranks=ranks, how="exec")
    deadline = time.monotonic() + 120
    while not [*(tmp_path / "tmp").glob("dist_train-speed-*")]:
        assert alive(run.pid), "it ended before it began"
        assert time.monotonic() < deadline, "it does not begin"
        time.sleep(0.05)
    time.sleep(2)
    for pid in children(run.pid) if ranks else [run.pid]:
        os.kill(pid, signal.SIGINT)
    result = finish(run, timeout=60)
    assert result.returncode == (0 if ranks else 130), "as of other verbs: torchrun would start anew for 130"
    assert result.stderr.splitlines()[-1] == "interrupted"
    assert left(tmp_path) == ["tmp"]


def test_errors_are_one_sentence(
    shard_sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    train = f"--data.train={shard_sets / 'train'}"
    for words, message in [
        (["--step=3"], "unknown option --step: did you mean --steps?"),
        (["--steps=-1"], "argument --steps: -1 is below 0"),
        (["--train.globl_batch=64"], "unknown configuration key train.globl_batch: did you mean train.global_batch?"),
        (["--train.global_batch", "many"], "train.global_batch is many: it must be int"),
        (["--data.crop=300"], "data.crop 300 is larger than data.resize"),
        (["runs/mine"], "runs/mine is one argument too many"),
    ]:
        assert main(["speed", train, *words]) == 2, words
        said = capsys.readouterr().err
        assert said.startswith(f"error: {message}"), said
        assert said.count("\n") == 1
    assert left(tmp_path) == []


@pytest.mark.integration
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--train.global_batch=300"], "train.global_batch 300 is larger than the 240 images"),
        (["--train.global_batch=1"], "train.global_batch 1 is smaller than ranks (2)"),
        (["--data.train=."], "no shards in ."),
        (["--model.name=torchvision:alexnt"], "torchvision:alexnt"),
        (["--out=/dev/null"], "/dev/null cannot be written (it is no file): choose another place with --out"),
        (["--out=tmp"], "tmp cannot be written (it is no file): choose another place with --out"),
        (["--out=no/p.json"], "no/p.json cannot be written (there is no folder no): choose another place with --out"),
    ],
)
def test_what_no_run_could_begin_with_is_refused(
    words: list[str], message: str, shard_sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By rank 0 for all of two."""
    monkeypatch.chdir(tmp_path)
    run = speed(shard_sets, *words, ranks=2)
    result = finish(run)
    assert result.returncode == 1, "torchrun's own, for the 2 of its processes"
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert left(tmp_path) == ["tmp"]


@pytest.mark.integration
def test_a_bad_image_is_counted_once(
    damaged: tuple[Path, list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often its batch is repeated, and the set is gone through: three of them are in the one batch here."""
    monkeypatch.chdir(tmp_path)
    words = ["--train.global_batch=240", f"--steps={STEPS}"]
    result = finish(speed(damaged[0], *words, "--data.max_bad=3"))
    assert result.returncode == 0, result.stderr
    result = finish(speed(damaged[0], *words, "--data.max_bad=2"))
    assert result.returncode == 2
    assert "3 samples could not be decoded, more than data.max_bad" in result.stderr.splitlines()[-1]


@pytest.mark.integration
def test_what_one_rank_meets_ends_the_others(
    damaged: tuple[Path, list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would wait for it, up to the time that a step may take: a sample of the second rank's is of another tar."""
    monkeypatch.chdir(tmp_path)
    shards = ShardSet(damaged[0] / "train")
    sample = int(TrainingPlan(shards, Augment(72, 67), shards.manifest).samples(0, 12, 13)[0])
    row = shards.rows(np.array([sample]))[0]
    with open(shards.directory / shards.names[shards.shard_of(sample)], "r+b") as file:
        file.seek(int(row["offset"]) - 512)
        file.write(b"?" * (512 + int(row["size"])))
    result = finish(speed(damaged[0], "--run.start_timeout=60", ranks=2))
    assert result.returncode == 1, result.stderr
    assert "RuntimeError: rank 1: " in result.stderr
    assert "is not the tar that was indexed" in result.stderr
    assert "no progress" not in result.stderr
    assert "profile.json" not in left(tmp_path)


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Callable[..., Pace]]:
    """Builds, in this process, a Pace of a configuration: on these data, or without any."""
    world = join("cpu")
    watch = cast(Watch, SimpleNamespace(stop=False, step=0, heartbeat=lambda _: None))

    def build(*words: str, data: Path | None = None) -> Pace:
        config, _ = parse(["--config", str(EMPTY), *SMALL, *words])
        shards = ShardSet(data / "train") if data else without_data(config)
        return Pace(config, world, watch, shards, tmp_path, loads=bool(data))

    yield build
    dist.destroy_process_group()


def test_forward_and_backward_go_in_the_pieces_of_a_step(begin: Callable[..., Pace]) -> None:
    """Where a step takes half of its batch at a time, to need half the memory, so does what is measured of it."""
    pace, sizes = begin("--train.accumulate=2", "--model.outputs=7"), list[int]()
    pace._trainer.model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    batch = Batch(
        torch.zeros(9, 3, 67, 67), torch.zeros(9, dtype=torch.int64), np.arange(9), 0, torch.zeros(9, dtype=torch.int64)
    )
    assert pace._computing(batch, 2) > 0
    assert sizes == [4, 5] * 2


@pytest.mark.integration
def test_a_loss_that_is_not_finite_is_refused(begin: Callable[..., Pace]) -> None:
    """In one sentence of its own, also after more steps than the set has; without data it has one."""
    pace = begin("--model.outputs=7")
    assert pace.measure(2)["step"].steps == 2
    with torch.no_grad():
        next(pace._trainer.model.parameters()).fill_(torch.nan)
    with pytest.raises(Refused, match="not finite although no weight has moved"):
        pace.measure(2)


@pytest.mark.integration
def test_a_slow_loader_makes_it_no_longer(
    begin: Callable[..., Pace], shard_sets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a second holds ten batches at most of a loader that needs 50 ms for one, with a step or without."""
    monkeypatch.setattr(measuring, "SECONDS", 0.5)
    pace = begin(data=shard_sets)
    batches = pace._trainer.train_loader.epoch

    def slow(epoch: int, **options: Any) -> Iterator[Batch]:
        for batch in batches(epoch, **options):
            time.sleep(0.05)
            yield batch

    monkeypatch.setattr(pace._trainer.train_loader, "epoch", slow)
    row = pace.measure(0)
    assert 1 <= row["both"].steps <= row["loader"].steps <= 10


def test_a_step_takes_as_long_as_on_the_slowest_rank() -> None:
    """By hand: two ranks of 30 images each, in 2 and 3 seconds, with 4 and 5 seconds of CPU."""

    def row(rank: int, seconds: float, cpu: float) -> dict[str, Any]:
        stretch = Stretch(steps=10, images=30, seconds=seconds, cpu_seconds=cpu, waited_seconds=1.5)
        fixed = {"peak_host_mb": 100.0 + rank, "peak_device_mb": None, "forward_backward_ms": 50 + rank}
        phases = {"step": stretch, "loader": stretch, "both": stretch, "all_reduce": (8.0, 30.0 + rank)}
        return {"rank": rank, "host": f"node{rank}", **fixed, **phases}

    report = profile_of([row(0, 2, 4), row(1, 3, 5)], batch=6)
    both = {"steps": 10, "images": 60, "images_per_s": 20, "step_ms": 300, "cpu_ms_per_image": 150}
    assert report["both"] == pytest.approx(both | {"data_wait_share": 0.75})
    assert report["all_reduce"] == pytest.approx({"mb": 8, "ms": 31, "step_share": 31 / 300})
    assert report["memory"] == {"peak_host_mb": 101, "peak_device_mb": None}
    facts = {"device": "x", "world_size": 2, "nodes": 2, "global_batch": 6, "precision": "bf16"}
    facts |= {"process": {"compiled": True}}
    facts |= {"model": "alexnet", "parameters": 7, "warm_up": {"build_s": 1, "first_steps_s": 2}}
    told = describe(report | facts)
    assert "rank 1 on node1: 51 ms forward and backward (the fastest, rank 0 on node0: 50)" in told
    assert "20 images/s with data; 75.0% of the time waits for data" in told


def test_the_plain_script_trains_the_same_net() -> None:
    """The one that the shipped step is measured against: as many weights, and the same sizes on the way."""
    with torch.device("meta"):
        ours, theirs = models.build(ModelConfig(), classes=1000, crop=227), plain.NETS["paper"]()
        bare, images = plain.NETS["bare"](), torch.empty(2, 3, 227, 227)
        shapes = [sorted(tuple(p.shape) for p in net.parameters()) for net in (ours, theirs, bare)]
        assert shapes[0] == shapes[1] == shapes[2]
        assert sum(p.numel() for p in theirs.parameters()) == 60_965_224
        assert theirs(images).shape == bare(images).shape == (2, 1000)


@pytest.mark.integration
def test_the_plain_script_counts_the_time_of_its_workers() -> None:
    """A child that has ended, one that runs, and the child of that one; of a process that has no others."""
    busy = "import os, time\n{}\nwhile time.process_time() < 0.5: pass\nprint(flush=True)\ntime.sleep({})"
    run = "import subprocess, sys\nfor code in sys.argv[1:]: subprocess.run([sys.executable, '-c', code])"
    command = [sys.executable, "-c", run, busy.format("", 0), busy.format("os.fork()", 60)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert process.stdout
        assert [process.stdout.readline() for _ in range(3)] == [b"\n"] * 3
        assert 1.4 < plain.cpu_seconds(process.pid) < 5
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu(shard_sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The card is named, and its memory counted."""
    monkeypatch.chdir(tmp_path)
    result = finish(speed(shard_sets, f"--steps={STEPS}", "--train.device=cuda", how="exec"))
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "profile.json").read_text())
    assert (report["device_type"], report["device"]) == ("cuda", torch.cuda.get_device_name())
    assert report["memory"]["peak_device_mb"] > 0
