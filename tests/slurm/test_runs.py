"""Runs on a cluster, and what happens to them there: each ends as one that was never stopped."""

from __future__ import annotations

import os
import signal
import struct
from pathlib import Path

import pytest
import yaml
from wandb.proto.wandb_internal_pb2 import Record

from pipelines.pack import Options, pack
from pipelines.sources import ImageFolder
from tests.helpers.compare import assert_same_run, records, status
from tests.slurm.conftest import EPOCHS, User, job_of
from tests.slurm.private_cluster import wait_for

pytestmark = pytest.mark.slurm


def logged(path: Path) -> tuple[str, list[int]]:
    """The run's id and the steps in a file of wandb's: a LevelDB log (blocks of 32 KiB; records with checksum,
    length and kind, of which 1 and 4 end a message) of protobuf messages."""
    data, place, message = path.read_bytes(), 7, b""
    name, steps = "", []
    while place + 7 <= len(data):
        if (rest := 32768 - place % 32768) < 7:
            place += rest
            continue
        _, size, kind = struct.unpack_from("<IHB", data, place)
        message += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):
            record, message = Record.FromString(message), b""
            name = record.run.run_id or name
            items = {"/".join(item.nested_key): item.value_json for item in record.history.item}
            if "step/step" in items:
                steps.append(int(items["step/step"]))
    return name, steps


def test_a_plain_run_and_its_log(user: User, uninterrupted: Path) -> None:
    job = user.submit("plain")
    following = user.start("logs", "plain", "--follow")
    user.wait("plain", job, "done")
    assert_same_run(user.run("plain"), uninterrupted)
    assert user.cluster.job(job) == "COMPLETED"
    said, _ = following.communicate(timeout=30)
    assert said == user.log("plain")
    assert said.count(f"epoch {EPOCHS}/{EPOCHS}: top-1 error") == 1
    assert "top-1 error" not in user.slurm("logs", "plain", "--rank=3")


def test_the_time_limit_loses_nothing(user: User, uninterrupted: Path) -> None:
    job = user.submit("limited", "--time=1", "--signal-before=10")
    process = user.freeze("limited", job, rank=3)
    user.thaw(process, signal.SIGUSR2)
    last = user.stopped("limited")
    user.cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=30")  # a slow machine needs no more of these
    user.wait("limited", job, "done")
    assert user.starts("limited") == ["", last]
    assert_same_run(user.run("limited"), uninterrupted)


def test_preemption_by_either_signal_loses_nothing(user: User, uninterrupted: Path) -> None:
    stops = [""]
    user.cluster.preempt_with(user_signal=False)
    job = user.submit("low")
    for number in (signal.SIGTERM, signal.SIGUSR2):
        process = user.freeze("low", job, rank=1, newer=stops[-1])
        user.cluster.preempt_with(user_signal=number == signal.SIGUSR2)
        user.cluster.run("sbatch", "-p", "high", "-N4", "--ntasks-per-node=8", "-o", "/dev/null", "--wrap", "sleep 1")
        user.thaw(process, number)
        stops.append(user.stopped("low"))
    user.wait("low", job, "done")
    assert user.starts("low") == stops
    assert_same_run(user.run("low"), uninterrupted)


def test_a_requeue_loses_nothing_and_a_crashed_rank_comes_back(user: User, uninterrupted: Path) -> None:
    """In a run with an odd name."""
    name = "l'été à 100 $HOME"
    job = user.submit(name)
    process = user.freeze(name, job, rank=2)
    user.cluster.run("scontrol", "requeue", job)
    user.thaw(process, signal.SIGTERM)
    last = user.stopped(name)
    process = user.freeze(name, job, rank=2, newer=last)
    (user.run(name) / "slurm" / f"{job}_submitted.pkl.save_tmp").touch()  # a left-over that fails submitit's requeues
    os.kill(process, signal.SIGKILL)
    user.wait(name, job, "done")
    assert user.starts(name)[:2] == ["", last]
    assert len(user.starts(name)) == 3
    assert not list(user.run(name).glob("slurm/*.save_tmp"))
    assert name in user.slurm("status", name)
    assert_same_run(user.run(name), uninterrupted)


@pytest.mark.slow
def test_a_node_crash_and_one_run_in_wandb(user: User, uninterrupted: Path) -> None:
    job = user.submit("crash", "--monitor.wandb=offline")
    user.freeze("crash", job, rank=3)
    node = user.cluster.nodes[1]
    user.cluster.crash(node)
    user.wait("crash", job, "done")
    user.cluster.boot(node)
    assert len(user.starts("crash")) == 2
    assert_same_run(user.run("crash"), uninterrupted)
    shown = [logged(path) for path in sorted(user.run("crash").glob("wandb/offline-run-*/run-*.wandb"))]
    assert len(shown) == 2
    assert len({name for name, _ in shown}) == 1, "one run"
    recorded = [line["step"] for line in records(user.run("crash"), "step")]
    assert [step for _, steps in shown for step in steps] == recorded, "each step once"


def test_cancel_saves_and_requeue_goes_on(user: User, uninterrupted: Path) -> None:
    job = user.submit("mind changed")
    process = user.freeze("mind changed", job, rank=0)
    cancelling = user.start("cancel", "mind changed")
    user.thaw(process, signal.SIGUSR2)
    out, err = cancelling.communicate(timeout=60)
    last = f"step-{status(user.run('mind changed'))['step']:08d}"
    assert last in out, out + err
    assert user.cluster.job(job) == "CANCELLED"
    assert status(user.run("mind changed"))["state"] == "stopped"
    assert "mind changed" in user.slurm("status", "mind changed")

    job = job_of(user.slurm("requeue", "mind changed", f"--exclude={user.cluster.nodes[0]}"))
    user.wait("mind changed", job, "done")
    assert user.starts("mind changed") == ["", last]
    assert_same_run(user.run("mind changed"), uninterrupted)
    wait_for(lambda: user.cluster.job(job) == "COMPLETED", 10, "the end")
    story = (user.run("mind changed") / "slurm" / "starts.jsonl").read_text().splitlines()
    assert user.cluster.nodes[0] not in story[-1]


def test_a_sweep_is_one_array_and_its_jobs_share_a_node(user: User, uninterrupted: Path) -> None:
    (user.home / "sweep.txt").write_text(
        "--optim.lr 0.01  # as it is\n\n--optim.lr 0.02 --train.seed 7\n--train.epochs 1\n"
    )
    elsewhere = f"--exclude={','.join(user.cluster.nodes[1:])}"
    options = ("--array=sweep.txt", "--gpus-per-node=2", "--time=30", elsewhere, "--run.name=lr sweep")
    said = user.slurm("submit", *options, *user.training)
    array = job_of(said).split("_")[0]
    names = ["0-optim.lr=0.01", "1-optim.lr=0.02,train.seed=7", "2-train.epochs=1"]
    assert [line.split()[1] for line in said.splitlines()[:3]] == [f"{array}_{i}:" for i in range(3)]
    wait_for(lambda: user.cluster.run("squeue", "-h", "-r", "-t", "R").count("\n") == 2, 20, "two jobs at once")
    for i, name in enumerate(names):
        user.wait(f"lr sweep/{name}", f"{array}_{i}", "done", 240)
    runs = [user.run("lr sweep") / name for name in names]
    assert [status(run)["epoch"] for run in runs] == [EPOCHS, EPOCHS, 1]
    config = [yaml.safe_load((run / "config.yaml").read_text()) for run in runs]
    assert [(c["optim"]["lr"], c["train"]["seed"]) for c in config] == [(0.01, 0), (0.02, 7), (0.01, 0)]
    assert [line.split("  ")[0] for line in user.slurm("status", "lr sweep").splitlines()[1:]] == [
        f"lr sweep/{name}" for name in names
    ]
    assert user.slurm("cancel", "lr sweep").count("has ended already") == 3
    assert "is a sweep: name one of its runs" in user.slurm("logs", "lr sweep", code=2)
    assert "top-1 error" in user.slurm("logs", f"lr sweep/{names[2]}")


@pytest.mark.slow
def test_no_progress_in_three_starts_ends_the_run(user: User) -> None:
    (user.home / "torch.py").write_text("raise OSError('the driver is gone')")  # found first, in the job's directory
    job = user.submit("broken", "--nodes=1", "--gpus-per-node=1")
    wait_for(lambda: user.cluster.job(job) == "FAILED", 240, "the end")
    assert len(user.starts("broken")) == 3
    assert "no progress in 3 starts (on " in user.slurm("status", "broken")
    assert "OSError: the driver is gone" in user.log("broken")

    (user.home / "torch.py").unlink()
    job = job_of(user.slurm("requeue", "broken"))
    user.freeze("broken", job, rank=0)
    assert "is cancelled" in user.slurm("cancel", "broken", "--now")
    wait_for(lambda: user.cluster.job(job) == "CANCELLED", 30, "the end")


def test_packing_as_an_array_gives_the_same_bytes(user: User, image_folder: Path) -> None:
    options = ("--shorter-side=72", "--keep-small", "--shard-mb=0.3", "--time=5")
    said = user.slurm("submit", "pack", str(image_folder / "train"), "a set", "--tasks=3", *options)
    last = job_of(said.partition(";")[2])
    wait_for(lambda: user.cluster.job(last) == "COMPLETED", 120, "the manifest")
    pack(
        ImageFolder(image_folder / "train"),
        user.home / "whole",
        Options(shorter_side=72, shard_mb=0.3, keep_small=True),  # which the manifest tells
        split="a set",
        workers=2,
    )
    files = {path.name for path in (user.home / "whole").iterdir()}
    assert len(files) > 4
    assert files | {"slurm"} == {path.name for path in (user.home / "a set").iterdir()}
    for name in files:
        assert (user.home / "a set" / name).read_bytes() == (user.home / "whole" / name).read_bytes(), name
    packed = [path.read_text().count("100%") for path in sorted((user.home / "a set" / "slurm").glob("*_?_0_log.out"))]
    assert packed == [1, 1, 1]
