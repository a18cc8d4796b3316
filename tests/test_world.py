"""Work done by some of the ranks, and what the others do if it fails there. Also run under torchrun."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from dist_train.__main__ import main
from dist_train.outcomes import STOPPED, NotBegun, Refused
from dist_train.ranks import kin, launcher
from dist_train.ranks.world import World, join
from pipelines.errors import UserError

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


@pytest.mark.integration
def test_three_ranks() -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    done = subprocess.run(
        [*launcher, "-m", "tests.test_world"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("as agreed") == 3


if __name__ == "__main__":
    check(join("cpu"))
    print("as agreed", flush=True)
    dist.barrier()
    dist.destroy_process_group()
