"""Drills on a killed launcher and on stops that come early or twice: all processes are gone within seconds, nothing is
half written, and the next start continues as if nothing had happened."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from dist_train import data
from dist_train.config import Config
from dist_train.data_config import DataConfig
from dist_train.ranks import watch
from dist_train.run import _pack
from pipelines.manifest import ShardError
from tests.helpers.compare import status
from tests.helpers.drills import (
    EVERY,
    GONE,
    TABLE,
    all_gone,
    kill,
    listens,
    ranks_of,
    same,
    table,
    undisturbed,
    until,
    until_status,
)
from tests.helpers.launch import MARK, Run, at, children, command, finish, launch, spawn, start

__all__ = ["table", "undisturbed"]  # fixtures
pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[1]
STANDS = "the newest checkpoint is step-00000004"
REAPER = """if 1:
    import ctypes, subprocess, sys, time
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER of linux/prctl.h
    ctypes.CDLL(None).prctl(15, b"slurmstepd")  # PR_SET_NAME
    subprocess.run(sys.argv[1:])
    time.sleep(60)
"""


def continued(shard_sets: Path, run: Path, undisturbed: Path) -> None:
    """The same command leads to the end that it would have come to undisturbed."""
    result = launch(shard_sets, run, EVERY)
    assert result.returncode == 0, result.stderr
    same(run, undisturbed)


def stopped_run(shard_sets: Path, run: Path) -> bytes:
    """A run that was stopped after some steps. Returns its status.json."""
    assert launch(shard_sets, run, EVERY, fault=at("step", 6, "SIGTERM")).returncode == 0
    assert status(run)["state"] == "stopped"
    return (run / "status.json").read_bytes()


# Orphans


def test_orphans_that_another_has_taken_in(shard_sets: Path, tmp_path: Path) -> None:
    """torchrun is killed before its ranks have run a line of the program; to them Slurm's daemon is the parent."""
    words = command(shard_sets, tmp_path / "run")
    reaper = spawn([sys.executable, "-c", REAPER, *words], how="exec")
    until(lambda: ranks_of(reaper))
    (torchrun,) = ranks_of(reaper)
    until(lambda: len(children(torchrun)) == 2)
    kill(torchrun)
    took = until(lambda: reaper.processes() == [reaper.pid], GONE)
    reaper.kill()
    finish(reaper)
    TABLE.append(("torchrun killed, ranks not yet bound", f"gone in {took:.1f} s", "-"))


@pytest.mark.slow
def test_orphans_in_the_rendezvous(shard_sets: Path, undisturbed: Path, tmp_path: Path) -> None:
    """torchrun is killed while a rank waits for one that does not come, as `python -m dist_train` is typed."""
    run = tmp_path / "run"
    early = start(shard_sets, run, EVERY, how="exec")
    until_status(run, "starting: torch is imported")
    until(lambda: all(map(listens, ranks_of(early))))  # rank 1 may be slower, and must have been bound
    os.kill(ranks_of(early)[1], signal.SIGSTOP)
    until_status(run, "starting: 2 ranks are waited for")
    time.sleep(0.5)
    assert len(early.processes()) == 3
    early.kill()
    took = all_gone(early)
    finish(early)
    continued(shard_sets, run, undisturbed)
    TABLE.append(("torchrun killed, ranks in the rendezvous", f"gone in {took:.1f} s, continued, same bits", "-"))


@pytest.mark.parametrize(("moment", "n"), [("meeting", 1), ("validation", 1), ("save:written", 2)])
def test_orphans(moment: str, n: int, shard_sets: Path, undisturbed: Path, tmp_path: Path) -> None:
    """torchrun is killed as a rank comes to a moment, and hangs there."""
    run = tmp_path / "run"
    early = start(shard_sets, run, EVERY, fault=at(moment, n, "launcher SIGKILL, hang"))
    assert finish(early).returncode == -signal.SIGKILL
    took = all_gone(early)
    assert list(run.glob("fault-*"))
    continued(shard_sets, run, undisturbed)
    TABLE.append((f"torchrun killed, {moment}", f"gone in {took:.1f} s, continued, same bits", "-"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("extra", "said", "least"),
    [("--monitor.wandb=offline", "running: ", 4), ("--train.compile=on", "starting: ", 3)],
    ids=["wandb", "compiling"],
)
def test_orphans_of_libraries(
    extra: str, said: str, least: int, shard_sets: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """The processes that wandb and the compiler have started go as well."""
    run = tmp_path / "run"
    env = {"STEP_SECONDS": "1", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    early = start(shard_sets, run, EVERY, extra, fault={}, env=env, how="exec")
    until_status(run, said)
    if "compile" in extra:  # g++ runs beside the ranks
        until(lambda: any((tmp_path / "cache").rglob("*.cpp")))
    until(lambda: len(early.processes()) >= least)
    early.kill()
    took = all_gone(early)
    finish(early)
    continued(shard_sets, run, undisturbed)
    TABLE.append((f"torchrun killed, {extra}", f"gone in {took:.1f} s, continued, same bits", "-"))


@pytest.mark.slow
def test_a_rank_behind_a_script(shard_sets: Path, undisturbed: Path, tmp_path: Path) -> None:
    """The launcher is no parent of the rank: a script is between them."""
    run, script = tmp_path / "run", tmp_path / "rank.sh"
    script.write_text(f'{sys.executable} -m dist_train "$@"\necho ended\n')
    words = command(shard_sets, run, EVERY)
    words = [*words[: words.index("-m", 3)], "--no-python", "bash", str(script), *words[words.index("-m", 3) + 2 :]]
    early = spawn(words, how="exec")
    until_status(run, "starting: the net is built")  # which takes a second
    assert len(early.processes()) == 5, "torchrun, two scripts, two ranks"
    early.kill()
    took = all_gone(early)
    finish(early)
    continued(shard_sets, run, undisturbed)
    TABLE.append(("torchrun killed, a script before the rank", f"gone in {took:.1f} s, continued, same bits", "-"))


@pytest.mark.slow
def test_a_bare_run_outlives_its_shell(shard_sets: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    line = " ".join(command(shard_sets, run, "--train.epochs=1", ranks=0))
    shell = ["bash", "-c", f"nohup {line} > {tmp_path}/said 2>&1 &"]
    subprocess.run(shell, env={**os.environ, MARK: str(tmp_path)}, check=True, start_new_session=True, timeout=5)
    until_status(run, "done: ")
    TABLE.append(("nohup, and the shell ends", "goes on to the end", "-"))


# Stop signals


@pytest.mark.slow
def test_a_stop_while_torch_is_imported(shard_sets: Path, undisturbed: Path, tmp_path: Path) -> None:
    """The run is as it was, and the sentence names the newest checkpoint."""
    run = tmp_path / "run"
    before = stopped_run(shard_sets, run)
    early = start(shard_sets, run, EVERY, how="exec")
    until_status(run, "starting: torch is imported")
    until(lambda: all(map(listens, ranks_of(early))))
    os.kill(early.pid, signal.SIGTERM)
    began = time.monotonic()
    assert finish(early).returncode == 1
    took = time.monotonic() - began
    assert took < 3
    assert not early.processes()
    assert "stopped before the first step; the newest checkpoint is step-" in early.said("stderr")
    assert (run / "status.json").read_bytes() == before
    continued(shard_sets, run, undisturbed)
    TABLE.append(("a stop while torch is imported", f"gone in {took:.1f} s, continued, same bits", "-"))


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("moment", "state"), [("meeting", ""), ("step", "stopped")], ids=["rendezvous", "first step"])
def test_an_early_stop(moment: str, state: str, rank: int, shard_sets: Path, undisturbed: Path, tmp_path: Path) -> None:
    """Of one rank, or of all: before the run is claimed it is left as it was, and then it is `stopped`."""
    run = tmp_path / "run"
    before = stopped_run(shard_sets, run)
    step = status(run)["step"]  # 7, or the next one if the signal came late
    (run / "fault-0").unlink()
    early = start(shard_sets, run, EVERY, fault=at(moment, 1, "SIGTERM, hang", rank))
    began = time.monotonic()
    assert finish(early).returncode == 1
    took = time.monotonic() - began
    assert took < 6
    all_gone(early)
    assert f"rank {rank}: stopped before the first step; the newest checkpoint is step-{step:08d}" in early.said(
        "stderr"
    )
    if state:
        assert status(run)["state"] == state
        assert status(run)["reason"] == f"stopped before the first step; the newest checkpoint is step-{step:08d}"
        assert status(run)["step"] == step
    else:
        assert (run / "status.json").read_bytes() == before
    continued(shard_sets, run, undisturbed)
    TABLE.append((f"a stop of rank {rank} at first {moment}", f"gone in {took:.1f} s, continued, same bits", "-"))


def test_ctrl_c_twice(shard_sets: Path, undisturbed: Path, tmp_path: Path) -> None:
    """More than two seconds apart, while a rank hangs: without a launcher the sentence names the newest checkpoint."""
    run = tmp_path / "run"
    early = start(shard_sets, run, EVERY, fault=at("step", 7, "hang"), ranks=0)
    until((run / "fault-0").exists)
    os.kill(early.pid, signal.SIGINT)
    time.sleep(2.3)
    assert early.processes(), "one signal is a wish"
    os.kill(early.pid, signal.SIGINT)
    took = all_gone(early)
    assert finish(early).returncode == 1
    said = f"second stop signal: leaving without a save; {STANDS}"
    assert said in early.said("stderr")
    assert (status(run)["state"], status(run)["reason"]) == ("failed", said)
    assert launch(shard_sets, run, EVERY, ranks=0).returncode == 0
    TABLE.append(("Ctrl-C twice", f"gone in {took:.1f} s, failed, names the newest checkpoint", "-"))


@pytest.mark.slow
def test_ctrl_c_twice_under_torchrun(shard_sets: Path, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    early = start(shard_sets, run, EVERY, fault=at("step", 7, "hang", -1), how="exec")
    until((run / "fault-0").exists)
    for _ in range(2):
        os.kill(early.pid, signal.SIGINT)
        time.sleep(2.3)
    took = all_gone(early)
    assert finish(early).returncode != 0
    continued(shard_sets, run, undisturbed)
    TABLE.append(("Ctrl-C twice under torchrun", f"gone in {took:.1f} s, same bits", "-"))


@pytest.mark.slow
def test_a_stop_while_the_net_is_compiled(shard_sets: Path, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    env = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    early = start(shard_sets, run, EVERY, "--train.compile=on", env=env, how="exec")
    until(lambda: any((tmp_path / "cache").rglob("*.cpp")))
    os.kill(early.pid, signal.SIGTERM)
    took = all_gone(early)
    assert finish(early).returncode != 0
    assert "stopped before the first step; there is no checkpoint yet" in early.said("stderr")
    assert not list(run.rglob("*")), "nobody has claimed it"
    continued(shard_sets, run, undisturbed)
    TABLE.append(("a stop while the net is compiled", f"gone in {took:.1f} s, continued, same bits", "-"))


HANGUP = """if 1:
    import os, signal, sys, time
    from dist_train.ranks.watch import Watch
    signal.signal(signal.SIGHUP, getattr(signal, sys.argv[1]))
    class Words:
        def follow(self, **_): return False
        def waits(self): return False
    watch = Watch(60, 60, Words())
    watch.heartbeat(60)
    os.kill(os.getpid(), signal.SIGHUP)
    until = time.monotonic() + float(sys.argv[2])
    while time.monotonic() < until and not watch.stop:
        time.sleep(0.01)
    print(watch.stop)
"""


def test_a_terminal_that_goes_away() -> None:
    """Is a stop like SIGTERM, but for what was started by nohup."""
    for handler, seconds, stops in (("SIG_DFL", 9, "True"), ("SIG_IGN", 0.3, "False")):
        words = [sys.executable, "-c", HANGUP, handler, str(seconds)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=20, cwd=ROOT)
        assert (done.returncode, done.stdout) == (0, f"{stops}\n"), done.stderr


def raw_fashion_mnist(folder: Path, images: int) -> None:
    """As torchvision keeps it, with random pixels."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(3)
    for prefix, n in (("train", images), ("t10k", 60)):
        pixels = rng.integers(0, 256, (n, 28, 28), np.uint8)
        head = np.array([0x803, n, 28, 28], ">i4").tobytes()
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(head + pixels.tobytes())
        head = np.array([0x801, n], ">i4").tobytes()
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(head + (np.arange(n) % 10).astype(np.uint8).tobytes())


def packing(root: Path, run: Path) -> Run:
    """A run that begins by packing its sets."""
    return start(root, run, "--data.source=fashion-mnist", "--train.max_steps=3")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_end_while_packing(number: signal.Signals, tmp_path: Path) -> None:
    """The workers go too, what is packed is taken up again, and the sets are those of one go."""
    raw_fashion_mnist(tmp_path / "raw" / "FashionMNIST" / "raw", 6000)
    run = tmp_path / "run"
    early = packing(tmp_path, run)
    until(lambda: list(tmp_path.glob("train/**/*.tar*")))
    assert len(early.processes()) >= 6, "torchrun, two ranks, two workers, and who starts them"
    os.kill(early.pid, number)
    took = all_gone(early)
    assert finish(early).returncode != 0
    assert f"packing fashion-mnist into {tmp_path}\n" in early.said("stderr")
    if number == signal.SIGTERM:
        assert "stopped before the first step; there is no checkpoint yet" in early.said("stderr")
        assert not (run / "status.json").exists()
    late = finish(packing(tmp_path, run))
    assert late.returncode == 0, late.stderr
    TABLE.append((f"{number.name} to torchrun while packing", f"gone in {took:.1f} s, packed, trained", "-"))


class Quiet:
    """Another rank, or this one, that the watch has nothing to say of but a hang."""

    def __init__(self) -> None:
        self.hung = Event()

    def force(self, why: str, *, begun: bool) -> None:
        raise AssertionError(why)

    def hang(self, seconds: float, step: int, place: str, stacks: str) -> None:
        self.hung.set()

    def follow(self, *, signalled: bool, begun: bool) -> bool:
        return False

    def waits(self) -> bool:
        return False


class One:
    """A world of one rank."""

    rank = 0

    def share(self, value: Any) -> Any:
        return value

    def together(self, work: Callable[[], Any], *, on: list[int]) -> Any:
        return work()


@pytest.mark.parametrize("stands_still", [False, True])
def test_packing_takes_longer_than_the_start_may(
    stands_still: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as something is written it is no hang; and what the packing raises is raised."""
    monkeypatch.setattr(watch, "signal", Mock(getsignal=signal.getsignal, SIGHUP=1, SIG_IGN=None))
    monkeypatch.setattr(watch, "faulthandler", Mock(dump_traceback=lambda *_, **__: None))
    monkeypatch.setattr(watch, "POLL", 0.02)
    monkeypatch.setattr(data, "LOOK", 0.02)
    words, packed = Quiet(), Event()

    def pack_source(config: Config) -> None:
        (tmp_path / "val").mkdir()
        for i in range(22):
            time.sleep(0.05)
            with open(tmp_path / "val" / "shard-000000.tar", "ab") as file:
                file.write(bytes(1 if not stands_still or i < 4 else 0))
        packed.set()
        raise ShardError("this one is of another set")

    monkeypatch.setattr(data, "pack_source", pack_source)
    watching = watch.Watch(0.7, 9, words)
    config = Config(data=DataConfig(train=str(tmp_path / "train"), val=str(tmp_path / "val"), source="fashion-mnist"))
    told: list[str] = []
    try:
        with pytest.raises(ShardError, match="of another set"):
            _pack(config, One(), watching, Mock(say=told.append))  # type: ignore[arg-type]
    finally:
        watching.close()
    assert packed.is_set()
    assert words.hung.is_set() == stands_still
    assert set(told) == {"fashion-mnist is packed"}
