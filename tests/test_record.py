"""Record of a run: the window of steps in a line, and the breakdown of wall time."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dist_train import optim
from dist_train.config import OptimConfig
from dist_train.rundir.ledger import PHASES, Ledger, accounted
from dist_train.rundir.state import Window
from tests.helpers.compare import assert_same_run, records, status
from tests.helpers.launch import STEPS, at, launch

WINDOW = ("--monitor.log_every=4", "--checkpoint.steps=3", "--checkpoint.keep=9")


def machine(run: Path, kind: str = "step") -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["machine"] for line in lines if line["kind"] == kind]


@pytest.fixture(scope="module")
def steps(shard_sets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of which every step is recorded."""
    run = tmp_path_factory.mktemp("steps") / "run"
    assert launch(shard_sets, run, ranks=2).returncode == 0
    return run


@pytest.fixture(scope="module")
def windows(shard_sets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a record after every fourth step, one of which spans two epochs."""
    run = tmp_path_factory.mktemp("windows") / "run"
    assert launch(shard_sets, run, *WINDOW, ranks=2).returncode == 0
    return run


@pytest.mark.integration
def test_a_record_is_of_its_window(steps: Path, windows: Path) -> None:
    single, found = records(steps, "step"), records(windows, "step")
    assert [line["step"] for line in found] == [4, 8, 12, 16, 20]
    for line in found:
        its = single[line["step"] - 4 : line["step"]]
        for key in ("loss", "train_error", "grad_norm"):
            assert line[key] == pytest.approx(sum(other[key] for other in its) / 4), key
    for epoch, line in enumerate(records(windows, "validation")):
        its = single[STEPS * epoch : STEPS * (epoch + 1)]
        assert line["train_loss"] == pytest.approx(sum(other["loss"] for other in its) / STEPS)
        assert line["train_error"] == pytest.approx(sum(other["train_error"] for other in its) / STEPS)


@pytest.mark.integration
@pytest.mark.parametrize("do", ["kill all", pytest.param("SIGTERM", marks=pytest.mark.slow)])
def test_a_window_goes_on_where_it_was_cut(shard_sets: Path, windows: Path, tmp_path: Path, do: str) -> None:
    """In mid-window, and in mid-epoch: the same line, as if nothing had been."""
    run = tmp_path / "run"
    launch(shard_sets, run, *WINDOW, fault=at("step", 6, do))
    assert max(int(path.name.split("-")[1]) for path in (run / "checkpoints").glob("step-*")) % 4
    (run / "fault-0").unlink()
    launch(shard_sets, run, *WINDOW, fault=at("step", 9, do))
    assert launch(shard_sets, run, *WINDOW).returncode == 0
    assert_same_run(run, windows)


@pytest.mark.integration
@pytest.mark.parametrize("step", [7, pytest.param(5, marks=pytest.mark.slow)])
def test_a_last_window_that_is_short(shard_sets: Path, tmp_path: Path, step: int) -> None:
    """A run that ends between two records is recorded once more, at its last step alone; and it is validated, also if
    it was stopped there."""
    extra = ("--train.max_steps=7", "--monitor.log_every=4")
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert launch(shard_sets, whole, *extra, ranks=0).returncode == 0
    assert [line["step"] for line in records(whole, "step")] == [4, 7]
    launch(shard_sets, run, *extra, fault=at("step", step, "SIGTERM"), ranks=0)
    assert status(run)["state"] == "stopped"
    assert launch(shard_sets, run, *extra, ranks=0).returncode == 0
    assert len(records(run, "validation")) == 1
    assert_same_run(run, whole)


@pytest.mark.integration
def test_which_rank_waits(shard_sets: Path, tmp_path: Path) -> None:
    """One rank's data come late at one step: it is named, and the mean is of all."""
    run = tmp_path / "run"
    slow = at("loader", 6, "slow", 1)
    assert launch(shard_sets, run, fault=slow, ranks=2).returncode == 0
    worst = max(machine(run), key=lambda line: line["data_wait_worst"] / line["images_per_s"])
    assert worst["worst_rank"] == 1
    assert worst["data_wait_worst"] > 0.5
    assert worst["data_wait_worst"] / 2 - 0.001 <= worst["data_wait"] <= worst["data_wait_worst"], "both are rounded"
    assert worst["worst_node"]
    assert all(line["memory_mb"] > 100 for line in machine(run))
    assert status(run)["seconds"]["data"] > 1


@pytest.mark.integration
def test_saves_and_validations_have_durations(windows: Path) -> None:
    saved = [line for line in machine(windows) if "save_write_seconds" in line]
    assert len(saved) >= 3
    assert all(line["save_write_seconds"] > 0 for line in saved)
    assert any(line.get("save_seconds", 0) > 0 for line in machine(windows))
    for line in machine(windows, "validation"):
        assert 0 < line["seconds"] < line["epoch_seconds"]


@pytest.mark.integration
def test_wall_time_is_accounted_whole(shard_sets: Path, tmp_path: Path, windows: Path) -> None:
    """Over a run that is killed twice, with a pause in between. (After other runs, so that what forks it is there.)"""
    run, began = tmp_path / "run", time.time()
    saves = ("--checkpoint.steps=4",)
    for n in (7, 3):
        killed = at("step", n, "slow, kill all", beats=True)  # when the last heartbeat is on the disk
        assert launch(shard_sets, run, *saves, fault=killed, env={"STEP_SECONDS": "0.2"}, ranks=2).returncode != 0
        (run / "fault-0").unlink()
        time.sleep(2)
    result = launch(shard_sets, run, *saves, ranks=2)
    assert result.returncode == 0
    found = status(run)
    seconds, whole = found["seconds"], found["until"] - found["began"]
    assert tuple(seconds) == PHASES
    assert sum(seconds.values()) == pytest.approx(whole, abs=0.1)
    assert found["began"] == pytest.approx(began, abs=1)
    assert found["until"] == pytest.approx(found["heartbeat"], abs=1)
    assert seconds["down"] > 4
    assert seconds["lost"] > 0
    assert seconds["startup"] > seconds["training"] > 0
    assert found["goodput"] == pytest.approx(seconds["training"] / whole, abs=0.002)
    assert f"time  {accounted(seconds)[:7]}" in result.stdout


def test_the_parts_of_a_ledger() -> None:
    """A stop, a requeue, a kill and a submission: the gaps have their names, and the sum is the time since."""
    now = time.time()
    earlier = {"training": 50.0, "data": 5.0, "validation": 7.0, "startup": 8.0}

    def gone_on(state: str, saved: float, submitted: float = 0.0, *, requeued: bool = False) -> dict[str, Any]:
        ledger = Ledger(now - 10)
        before = {
            "state": state,
            "orderly": state in ("stopped", "done"),
            "began": now - 100,
            "until": now - 30,
            "seconds": earlier,
        }
        ledger.go_on(before, {"seconds": earlier | {"training": saved}}, submitted, requeued=requeued)
        found = ledger.state_dict()
        assert sum(found["seconds"].values()) == pytest.approx(time.time() - (now - 100), abs=0.5)
        return {key: round(value) for key, value in found["seconds"].items() if round(value)}

    same = {"data": 5, "validation": 7, "startup": 18}
    assert gone_on("stopped", 50) == same | {"training": 50, "stopped": 20}
    assert gone_on("stopped", 50, requeued=True) == same | {"training": 50, "queue": 20}
    assert gone_on("running", 40) == same | {"training": 40, "lost": 10, "down": 20}
    assert gone_on("running", 40, now - 15) == same | {"training": 40, "lost": 10, "down": 15, "queue": 5}
    assert gone_on("done", 50, now - 12) == same | {"training": 50, "stopped": 18, "queue": 2}


def test_starts_that_came_to_nothing_and_one_that_was_taken_over() -> None:
    """Killed before its claim: it was down from there on. At work still when the next one began: counted once."""
    now = time.time()
    earlier = {"began": now - 100, "until": now - 60, "seconds": {"training": 40.0}, "orderly": True}

    def gone_on(begin: float, before: dict[str, Any], submitted: float = 0.0) -> dict[str, int]:
        ledger = Ledger(begin)
        ledger.go_on(before, before, submitted)
        found = ledger.state_dict()
        assert sum(found["seconds"].values()) == pytest.approx(time.time() - found["began"], abs=0.5)
        return {key: round(value) for key, value in found["seconds"].items() if round(value)}

    nothing = {"state": "starting", "announced": now - 30}
    assert gone_on(now, earlier | nothing) == {"training": 40, "stopped": 30, "down": 30}
    assert gone_on(now, earlier | nothing, now - 10) == {"training": 40, "stopped": 30, "down": 20, "queue": 10}
    assert gone_on(now, nothing) == {"down": 30}
    assert gone_on(now - 70, earlier) == {"training": 40, "startup": 60}


def test_a_first_start_that_has_waited_in_the_queue() -> None:
    now = time.time()
    ledger = Ledger(now - 3)
    ledger.go_on({}, {}, now - 60)
    found = ledger.state_dict()
    assert found["began"] == now - 60
    assert found["seconds"]["queue"] == pytest.approx(57)


@pytest.mark.parametrize(
    "strange",
    [{"seconds": None}, {"seconds": [1]}, {"seconds": {"training": "x", "data": -1.0}}, {"until": None, "began": "a"}],
)
def test_a_strange_status_is_none(strange: dict[str, Any]) -> None:
    ledger = Ledger(time.time())
    ledger.go_on({"state": "running", "until": 5.0, "began": 1.0, "seconds": {"startup": 4.0}} | strange, strange)
    found = ledger.state_dict()
    assert sum(found["seconds"].values()) == pytest.approx(found["until"] - found["began"], abs=0.01)


def test_without_a_status_the_checkpoint_knows() -> None:
    now = time.time()
    ledger = Ledger(now)
    ledger.go_on({}, {"began": now - 90, "until": now - 20, "seconds": {"training": 70.0}})
    found = ledger.state_dict()["seconds"]
    assert (round(found["training"]), round(found["down"]), round(found["lost"])) == (70, 20, 0)


def test_the_norm_of_a_gradient() -> None:
    """Of all parameters, or of those that are told of."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = optim.build(OptimConfig(), net)
    net(torch.randn(5, 3)).square().sum().backward()
    off = torch.amp.GradScaler("cpu", enabled=False)
    expected = [p.grad.square().sum().item() for p in net.parameters() if p.grad is not None]
    assert optim.update(optimizer, off).square.item() == pytest.approx(sum(expected), rel=1e-5)
    told = optim.update(optimizer, off, told_of=list(net[1].parameters()))
    assert told.square.item() == pytest.approx(sum(expected[2:]), rel=1e-5)


def test_the_norm_under_fp16() -> None:
    """Without the scale; an overflow is no norm, and counted."""
    net = nn.Linear(3, 2)
    optimizer = optim.build(OptimConfig(), net)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=True)
    loss = net(torch.ones(1, 3)).square().sum()
    scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
    plain = sum(p.grad.square().sum().item() for p in net.parameters() if p.grad is not None) / 1024.0**2
    assert optim.update(optimizer, scaler).square.item() == pytest.approx(plain, rel=1e-5)
    window = Window()
    window.add(1.0, 1, 2.0)
    assert net.weight.grad is not None
    net.weight.grad.fill_(float("inf"))
    scaler.scale(torch.ones(()))
    updated = optim.update(optimizer, scaler)
    assert not updated.refused
    window.add(3.0, 0, math.sqrt(updated.square.item()))
    assert window.means(1) == {"loss": 2.0, "train_error": 0.5, "grad_norm": 2.0, "skipped": 1}


def test_time_in_words() -> None:
    seconds = dict.fromkeys(PHASES, 0.0) | {"training": 3600.0, "startup": 100.0, "lost": 3.0}
    assert accounted(seconds) == "1:01:43: 97% training, 3% startup"
