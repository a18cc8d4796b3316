"""Runs on a cluster that are stopped or killed: each ends like a run that was never stopped."""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path

import pytest
import yaml

from dist_train.rundir import events
from pipelines.kinds import kind
from pipelines.pack import Options, pack
from pipelines.shards import ShardSet
from pipelines.sources import ImageFolder
from tests.helpers import imagenet
from tests.helpers.compare import assert_same_run, records, status
from tests.helpers.launch import alive
from tests.helpers.wandb_file import files, logged
from tests.slurm.conftest import EPOCHS, User, job_of
from tests.slurm.private_cluster import parent, wait_for
from tests.test_sources import documented

pytestmark = pytest.mark.slurm


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
    told = events.read(user.run("limited"))
    assert [event["event"] for event in told] == ["start", "end", "requeued", "start", "end"]
    assert (told[1]["state"], told[1]["code"], told[1]["requeued"], told[4]["requeued"]) == ("stopped", 75, True, False)
    assert (told[0]["job"], told[2]["job"], told[2]["restart"], told[3]["restart"]) == (job, job, 1, 1)
    assert len(told[0]["nodes"]) == 2
    assert set(told[0]["nodes"]) <= set(user.cluster.nodes)
    assert status(user.run("limited"))["seconds"]["queue"] > 0


@pytest.mark.slow
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
    """The run has an odd name."""
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
    wait_for(lambda: any(logged(path).id for path in files(user.run("crash"))), 60, "the file of wandb")
    node = user.cluster.nodes[1]
    user.cluster.crash(node)
    user.wait("crash", job, "done")
    user.cluster.boot(node)
    assert len(user.starts("crash")) == 2
    assert_same_run(user.run("crash"), uninterrupted)
    shown = [logged(path) for path in files(user.run("crash"))]
    assert len(shown) == 2
    assert len({one.id for one in shown}) == 1, "one run"
    recorded = {line["step"]: line["loss"] for line in records(user.run("crash"), "step")}
    found = {step: row["loss/training"] for one in shown for step, row in one.rows.items()}
    assert found == recorded


def test_cancel_saves_and_requeue_goes_on(user: User, uninterrupted: Path) -> None:
    """With a schedule of the user's own, whose word is taken by `submit`, and by `requeue` of what it submitted."""
    code = "from dist_train.schedules import Plateau\n\nclass Same(Plateau):\n    pass\n"
    (user.home / "own_schedule.py").write_text(code)
    job = user.submit("mind changed", "--schedule.name=own_schedule:Same")
    process = user.freeze("mind changed", job, rank=0)
    cancelling = user.start("cancel", "mind changed")
    user.thaw(process, signal.SIGUSR2)
    out, err = cancelling.communicate(timeout=60)
    last = f"step-{status(user.run('mind changed'))['step']:08d}"
    assert last in out, out + err
    assert user.cluster.job(job) == "CANCELLED"
    assert status(user.run("mind changed"))["state"] == "stopped"
    assert "mind changed" in user.slurm("status", "mind changed")

    (user.home / "own_schedule.py").unlink()  # the run has a copy
    job = job_of(user.slurm("requeue", "mind changed", f"--exclude={user.cluster.nodes[0]}"))
    user.wait("mind changed", job, "done")
    assert user.starts("mind changed") == ["", last]
    assert_same_run(user.run("mind changed"), uninterrupted)
    wait_for(lambda: user.cluster.job(job) == "COMPLETED", 10, "the end")
    story = (user.run("mind changed") / "slurm" / "starts.jsonl").read_text().splitlines()
    assert user.cluster.nodes[0] not in story[-1]


@pytest.mark.slow
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


def site(user: User, text: str) -> Path:
    """A directory that makes every Python begin with this text, if PYTHONPATH has it."""
    (user.home / "site").mkdir()
    (user.home / "site" / "sitecustomize.py").write_text(text)
    return user.home / "site"


@pytest.mark.slow
def test_nobody_outlives_the_step(user: User) -> None:
    """The step's daemon is killed before the program has begun, while ranks are waited for, and in training."""
    size = ("--nodes=1", "--gpus-per-node=2")
    slow = "import os, time\nif os.environ.get('SLURM_STEP_ID') == '0':\n    time.sleep(1.5)\n"
    path = user.environment["PYTHONPATH"]
    for name in ("early", "waiting"):
        user.environment["PYTHONPATH"] = f"{site(user, slow)}:{path}" if name == "early" else path
        job = user.submit(name, *size)
        ranks = user.processes(job, range(2))
        if name == "waiting":
            user.told(name, "starting: ")
        os.kill(parent(ranks[0]), signal.SIGKILL)
        wait_for(lambda ranks=ranks: not any(map(alive, ranks)), 5, f"{name} to be over\n{user.log(name)}")
    job = user.submit("training", f"--exclude={','.join(user.cluster.nodes[:2])}", "--train.epochs=9000")
    user.told("training", " running ")
    ranks = user.processes(job, range(4))
    os.kill(parent(ranks[3]), signal.SIGKILL)
    wait_for(lambda: not any(map(alive, ranks)), 5, "the ranks of both nodes to be over")
    user.told("training", "failed: another rank is gone and gave no reason")


FAULT = """
import os, sys, threading, time

def strike():  # in rank 1, once
    while not hasattr(sys.modules.get("dist_train.train"), "Trainer"):
        time.sleep(0.01)
    trainer = sys.modules["dist_train.train"].Trainer
    step = trainer.train_step
    def struck(self, *arguments):
        if self.progress.step == 7 and not os.path.exists("struck"):
            open("struck", "w").close()
            raise KeyError("in rank 1")
        return step(self, *arguments)
    trainer.train_step = struck

if os.environ.get("SLURM_STEP_ID") == "0" and os.environ.get("SLURM_PROCID") == "1":
    threading.Thread(target=strike, daemon=True).start()
"""


@pytest.mark.slow
def test_the_rank_that_failed_is_named_and_all_come_back(user: User, uninterrupted: Path) -> None:
    user.environment["PYTHONPATH"] = f"{site(user, FAULT)}:{user.environment['PYTHONPATH']}"
    job = user.submit("struck")
    ranks = user.processes(job, range(4))
    wait_for((user.home / "struck").exists, 60, "the fault")
    wait_for(lambda: not any(map(alive, ranks)), 10, "all ranks to be gone")
    said = status(user.run("struck"))
    assert (said["state"], said["reason"]) == ("failed", "KeyError: 'in rank 1'")
    assert (said["rank"], said["node"]) == (1, user.cluster.nodes[0])
    user.told("struck", "; the start before this one failed: KeyError: 'in rank 1'")
    user.wait("struck", job, "done")
    assert_same_run(user.run("struck"), uninterrupted)


@pytest.mark.parametrize(
    ("rank", "module", "told"),
    [
        (1, "slurm", "exit code [0-9]+: ModuleNotFoundError: import of slurm halted"),  # by the batch script
        (0, "jsonargparse", "failed: ModuleNotFoundError: import of jsonargparse halted"),  # by the job itself
    ],
    ids=["slurm", "jsonargparse"],
)
@pytest.mark.slow
def test_a_node_that_lost_a_module(user: User, rank: int, module: str, told: str) -> None:
    """The other ranks, some of which are signalled before the trainer is there to hear it, do not wait for it."""
    condition = f"os.environ.get('SLURM_STEP_ID') == '0' and os.environ['SLURM_PROCID'] == '{rank}'"
    # Late enough for all ranks to be there at once.
    text = f"import os, sys, time\nif {condition}:\n    time.sleep(2)\n    sys.modules['{module}'] = None\n"
    user.environment["PYTHONPATH"] = f"{site(user, text)}:{user.environment['PYTHONPATH']}"
    job = user.submit(module)
    others = user.processes(job, range(4))
    wait_for(lambda: not any(map(alive, others)), 10, f"the others to leave\n{user.log(module)}")
    wait_for(lambda: re.search(told, user.slurm("status", module)), 10, f"{told}\n{user.slurm('status', module)}")


@pytest.mark.slow
def test_a_lost_environment_is_told(user: User) -> None:
    """By the batch script, since no Python is left to say it; and it would be lost the next time too."""
    installed, lent = Path(sys.prefix), user.home / "env"
    (lent / "bin").mkdir(parents=True)
    (lent / "bin" / "python").symlink_to(sys.executable)
    (lent / "pyvenv.cfg").write_bytes((installed / "pyvenv.cfg").read_bytes())
    (lent / "lib").symlink_to(installed / "lib")
    user.python = str(lent / "bin" / "python")
    job = user.submit("lost", "--nodes=1", "--gpus-per-node=1")
    process = user.freeze("lost", job, rank=0)
    lent.rename(user.home / "gone")
    user.python = sys.executable
    os.kill(process, signal.SIGKILL)
    user.told("lost", f"execve(): {lent}/bin/python: No such file or directory")
    assert user.cluster.job(job) == "FAILED"
    assert len(user.starts("lost")) == 1


@pytest.mark.slow
def test_no_progress_in_three_starts_ends_the_run(user: User) -> None:
    broken = "import time; time.sleep(3); raise OSError('the driver is gone')"  # slowly enough to be seen
    (user.home / "torch.py").write_text(broken)  # found first, in the job's directory
    job = user.submit("broken", "--nodes=1", "--gpus-per-node=1")
    user.told("broken", "failed: OSError: the driver is gone")
    assert len(user.starts("broken")) == 1
    user.told("broken", "starting: torch is imported; the start before this one failed: OSError: the driver is gone")
    wait_for(lambda: user.cluster.job(job) == "FAILED", 240, "the end")
    assert len(user.starts("broken")) == 3
    *ends, given_up = events.read(user.run("broken"))
    assert [(end["event"], end["state"]) for end in ends] == [("end", "failed")] * 3
    assert given_up["event"] == "given_up"
    reason = f"no progress in 3 starts (on {user.cluster.nodes[0]}; the last one failed: OSError: the driver is gone)"
    assert reason in user.slurm("status", "broken")
    assert reason in given_up["reason"]
    assert "OSError: the driver is gone" in user.log("broken")

    (user.home / "torch.py").unlink()
    job = job_of(user.slurm("requeue", "broken"))
    user.freeze("broken", job, rank=0)
    assert "is cancelled" in user.slurm("cancel", "broken", "--now")
    wait_for(lambda: user.cluster.job(job) == "CANCELLED", 30, "the end")


@pytest.mark.slow
def test_packing_as_an_array_gives_the_same_bytes(user: User, image_folder: Path) -> None:
    options = ("--shorter-side=72", "--keep-small", "--shard-mb=0.3", "--time=5")
    said = user.slurm("submit", "pack", str(image_folder / "train"), "a set", "--tasks=3", *options)
    last = [job_of(said.partition(";")[2])]
    (user.home / "photographs.py").write_text(documented(), encoding="utf-8")  # in the directory of who submits
    source = ("photographs:EveryFifth", str(image_folder / "val"), "halves")
    said = user.slurm("submit", "pack", *source, "--tasks=1", "--time=5")
    last += [job_of(line.partition(";")[2]) for line in said.splitlines()[:2]]
    wait_for(lambda: all(user.cluster.job(job) == "COMPLETED" for job in last), 180, "the manifests")
    assert [len(ShardSet(user.home / "halves" / split)) for split in ("train", "val")] == [50, 13]
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
    logs = sorted((user.home / "a set" / "slurm").glob("*_?_0_log.out"))
    assert [bool(re.search(r": (\d+) of \1, ", path.read_text())) for path in logs] == [True] * 3, "all of its images"


@pytest.mark.slow
def test_imagenet_as_arrays(user: User) -> None:
    """Each task reads the headers itself; the shards are those of one process."""
    train, val, kit = imagenet.layouts(user.home / "raw", imagenet.train_pictures(4), imagenet.val_pictures(2))[
        "official"
    ]
    words = [str(path.relative_to(user.home)) for path in (train, val, kit)]
    options = ("--tasks=2", "--shard-mb=0.05", "--shorter-side=32", "--time=5")
    said = user.slurm("submit", "pack", "imagenet", *words[:2], "--devkit", words[2], "sets", *options)
    last = [job_of(line.partition(";")[2]) for line in said.splitlines()[:2]]
    wait_for(lambda: all(user.cluster.job(job) == "COMPLETED" for job in last), 240, "the manifests")
    for split, is_train in (("train", True), ("val", False)):
        source = kind("pack", "imagenet").make(train, val, kit, train=is_train)
        whole = user.home / "whole" / split
        pack(source, whole, Options(shorter_side=32, shard_mb=0.05), split=split, workers=1)
        names = {path.name for path in whole.iterdir()}
        assert names | {"slurm"} == {path.name for path in (user.home / "sets" / split).iterdir()}
        for name in names:
            assert (whole / name).read_bytes() == (user.home / "sets" / split / name).read_bytes(), name
