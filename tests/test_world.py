"""Work done by some of the ranks, and what the others do if it fails there. Also run under torchrun."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from dist_train.__main__ import main
from dist_train.outcomes import STOPPED, NotBegun, Refused
from dist_train.ranks import kin, launcher
from dist_train.ranks import world as world_module
from dist_train.ranks.peers import Peer, gpu_index, gpu_name, twice
from dist_train.ranks.world import World, join
from pipelines.errors import UserError
from pipelines.misc import cpus

ROOT = Path(__file__).parent.parent


def fail(error: Exception) -> None:
    raise error


def check(world: World) -> None:
    """One rank's part."""
    last = world.size - 1
    assert world.together(lambda: world.rank + 5) == world.rank + 5
    assert world.together(lambda: "done", on=[last]) == ("done" if world.rank == last else None)
    with pytest.raises(Refused, match="rank 0 cannot, read the manual"):
        world.together(lambda: fail(UserError(f"rank {world.rank} cannot, read the manual")))
    with pytest.raises(NotBegun, match="the disk is gone"):
        world.together(lambda: fail(OSError("the disk is gone")), on=[last], failure=NotBegun)
    assert world.share(world.rank) == 0
    assert world.nodes == [socket.gethostname()] * world.size
    # of CPUs that all may use
    assert (world.threads, torch.get_num_threads()) == (max(1, cpus() // world.size),) * 2
    assert len(world.shares) == world.size


def test_alone() -> None:
    world = join("cpu")
    try:
        check(world)
        with pytest.raises(OSError, match="for a moment"):  # no refusal, where the caller says so
            world.together(lambda: fail(OSError("for a moment")), catch=(UserError,))
    finally:
        dist.destroy_process_group()


def test_half_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """MASTER_ADDR may be left over in an environment; without a rank it is one sentence."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(UserError, match=r"the environment is not a launcher's, use torchrun: .* RANK"):
        join("cpu")
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(UserError, match=r"use torchrun: .*many"):
        join("cpu")


def test_what_torchrun_hears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The code, and the sentence in its error file. What it restarts, and cannot end otherwise, ends so again."""
    for attempt in (0, 1):
        (tmp_path / f"attempt_{attempt}" / "0").mkdir(parents=True)
    monkeypatch.setattr(kin, "bind", lambda: None)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "attempt_0" / "0" / "error.json"))
    assert main(["evaluate", "nosuch", "--crop", "one"]) == 2
    said = capsys.readouterr().err
    failure = ProcessFailure(0, 1, 2, str(tmp_path / "attempt_0" / "0" / "error.json"))
    assert said == f"error: {failure.message['message']}\n"  # type: ignore[index]
    assert "unknown option --crop: did you mean --crops?" in said

    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "attempt_1" / "0" / "error.json"))
    assert main(["evaluate", "a", "run", "this time"]) == 2
    assert capsys.readouterr().err == said
    assert launcher.exit_code(STOPPED) == 0
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert launcher.exit_code(STOPPED) == STOPPED


def taken(*seen: list[str], local: list[int] | None = None) -> str:
    """The complaint of ranks that see these GPUs, each taking one of them."""
    indices = [gpu_index(rank, len(uuids)) for rank, uuids in zip(local or range(len(seen)), seen, strict=True)]
    assert None not in indices
    return twice([Peer("node1", gpu=uuids[index or 0]) for uuids, index in zip(seen, indices, strict=True)])


def test_the_gpu_of_a_rank() -> None:
    """All see all; each sees its own; and two would take one, whichever way they came to it."""
    both = ["GPU-a", "GPU-b"]
    assert taken(both, both) == ""
    assert taken(["GPU-a"], ["GPU-b"], ["GPU-c"], ["GPU-d"]) == ""
    assert taken(["MIG-a"], ["MIG-b"]) == ""
    assert taken(both, both, ["GPU-c", "GPU-d"], ["GPU-c", "GPU-d"], local=[0, 1, 0, 1]) == ""
    said = (
        "would both train on GPU GPU-a of node1: start one process per GPU, and let each see all GPUs of its node, or"
    )
    assert f"ranks 0 and 2 {said}" in taken(["GPU-a"], ["GPU-b"], ["GPU-a"])
    assert f"ranks 0 and 1 {said}" in taken(both, ["GPU-a"])
    assert f"ranks 0 and 2 {said}" in taken(both, both, both, both, local=[0, 1, 0, 1])  # of two launchers
    assert "ranks 0 and 1 would both train on MIG-a of node1" in taken(["MIG-a"], ["MIG-a"])
    assert [gpu_index(2, 2), gpu_index(0, 0)] == [None, None]


def test_a_slice_of_a_gpu_has_a_name_of_its_own() -> None:
    """Also where torch gives the UUID of the whole; and other names for a GPU are not taken for one."""
    assert gpu_name("GPU-a", 0, "MIG-1") == "MIG-1"
    assert gpu_name("a", 1, "MIG-1, MIG-2") == "MIG-2"
    assert [gpu_name("a", 0, visible) for visible in ("", "0", "3,4", "GPU-a")] == ["a"] * 4


@pytest.mark.integration
@pytest.mark.slow
def test_ranks_that_see_the_same_gpu_are_refused() -> None:
    """All of them, before any waits for another."""
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
    env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    words = [sys.executable, "-m", "tests.test_world", "GPU-a"]
    ranks = [
        subprocess.Popen(
            words, cwd=ROOT, env={**env, "RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE, text=True
        )
        for rank in "01"
    ]
    for rank in ranks:
        _, said = rank.communicate(timeout=60)
        assert "UserError: ranks 0 and 1 would both train on GPU GPU-a of " in said
        assert rank.returncode == 1


@pytest.mark.integration
@pytest.mark.slow
def test_two_launchers_on_one_node() -> None:
    """Their ranks share its CPUs; and a master of 127.0.0.1 is right, though there seem to be two nodes."""
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    launcher += ["--master-addr=127.0.0.1", f"--master-port={port}"]
    launchers = [
        subprocess.Popen(
            [*launcher, f"--node-rank={i}", "-m", "tests.test_world"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    for one in launchers:
        out, err = one.communicate(timeout=120)
        assert (one.returncode, out.count("as agreed")) == (0, 1), err


@pytest.mark.integration
def test_three_ranks() -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    done = subprocess.run(
        [*launcher, "-m", "tests.test_world"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("as agreed") == 3


if __name__ == "__main__":
    if sys.argv[1:]:  # the UUID of a GPU that the machine need not have
        world_module.pick_device = lambda *_: torch.device("cuda", 0)
        world_module._prepare = lambda _: None
        world_module._name = lambda _: sys.argv[1]
    check(join("cpu"))
    print("as agreed", flush=True)
    dist.barrier()
    dist.destroy_process_group()
