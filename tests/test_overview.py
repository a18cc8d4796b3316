"""A run at a glance: what `runs`, `slurm status` and the page say of it, compared with what its files hold."""

from __future__ import annotations

import json
import math
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest

from dist_train.rundir.listing import cells
from dist_train.rundir.overview import Overview, overview, runs_in

NOW = 1_800_000_000.0
STATUS = {"state": "running", "reason": "", "step": 30, "epoch": 3, "heartbeat": NOW - 5, "start": "a"}
STATUS |= {"began": NOW - 100, "seconds": {"training": 60.0, "data": 20.0}}


def jsonl(lines: list[dict[str, Any]]) -> str:
    return "".join(f"{json.dumps(line)}\n" for line in lines)


def recorded(epochs: int, steps: int, draw: random.Random) -> list[dict[str, Any]]:
    """The lines of a record of so many epochs, a line per step of them, in the form that `Reporter` gives them."""
    lines: list[dict[str, Any]] = [{"kind": "begun", "step": 0}]
    for epoch in range(epochs):
        for step in range(epoch * steps + 1, (epoch + 1) * steps + 1):
            about = {"progress": step / steps, "images": 128 * step, "loss": 1.5, "train_error": 0.25, "lr": 0.01}
            machine = {"images_per_s": 64.0, "data_wait": 0.31, "worst_node": "node-17", "memory_mb": 1234.5}
            lines.append({"kind": "step", "step": step, "epoch": epoch, **about, "machine": machine})
        error = {"top1_error": draw.choice((0.2, 0.3, 0.4, 0.5)) + draw.choice((0, 0, 0.01)), "top5_error": 0.1}
        lines.append({"kind": "validation", "step": step, "epoch": epoch, **error})
    return lines


def made(run: Path, lines: list[dict[str, Any]], **told: Any) -> Path:
    run.mkdir(parents=True, exist_ok=True)
    (run / "status.json").write_text(json.dumps(STATUS | told))
    (run / "config.yaml").write_text("train: {epochs: 6}\n")
    (run / "metrics.jsonl").write_text(jsonl(lines))
    return run


def saved(run: Path, step: int, error: float, epoch: int) -> None:
    """A checkpoint, as far as programs read it without its state."""
    folder = run / "checkpoints" / f"step-{step:08d}-validated"
    folder.mkdir(parents=True)
    about = {"sha256": "0" * 64, "bytes": 1, "epoch": step, "step": step, "best_error": error, "best_epoch": epoch}
    (folder / "meta.json").write_text(json.dumps(about))


@pytest.mark.parametrize("size", [(1, 3), (6, 10), (40, 60)])
def test_the_best_error_is_the_lowest_of_all_validations(tmp_path: Path, size: tuple[int, int]) -> None:
    """Whether or not a checkpoint knows those before it; the first epoch that has it."""
    for seed in range(5):
        lines = recorded(*size, random.Random(seed))
        errors = [line["top1_error"] for line in lines if line["kind"] == "validation"]
        best = min(errors)
        run = made(tmp_path / str(seed), lines)
        for at in (None, *random.Random(seed).sample(range(size[0]), min(2, size[0]))):
            if at is not None:
                known = errors[: at + 1]
                saved(run, (at + 1) * size[1], min(known), known.index(min(known)))
            found = overview(run, NOW)
            assert (found.best_error, found.best_epoch) == (best, errors.index(best) + 1)
            assert found.last_error == errors[-1]


def test_it_says_what_the_files_hold(tmp_path: Path) -> None:
    run = made(tmp_path / "one", recorded(3, 10, random.Random(0)))
    starts = [{"time": NOW - 90.0 + 10 * i, "event": "start", "start": name} for i, name in enumerate("xya")]
    alert = {"time": NOW, "event": "alert", "start": "a", "sentence": 'no "event": "start"'}
    (run / "events.jsonl").write_text(jsonl([*starts, alert]))
    found = overview(run, NOW)
    assert (found.state, found.since, found.heartbeat, found.restarts) == ("running", NOW - 70, NOW - 5, 2)
    assert (found.step, found.epoch, found.epochs, found.progress) == (30, 3, 6, 3.0)
    assert (found.images_per_s, found.goodput, found.elapsed, found.began) == (64.0, 0.75, 80.0, NOW - 100)
    assert found.left == pytest.approx(30 * 128 / 64)  # three epochs of ten batches
    assert found.differs == {"train.epochs": 6}


@pytest.mark.parametrize(
    ("told", "state", "left"),
    [
        ({}, "running", True),
        ({"heartbeat": NOW - 61}, "silent", False),
        ({"state": "starting", "heartbeat": NOW - 61}, "silent", False),
        ({"state": "done", "heartbeat": NOW - 61}, "done", False),
        ({"state": "diverged"}, "diverged", False),
    ],
)
def test_states(tmp_path: Path, told: dict[str, Any], state: str, left: bool) -> None:
    found = overview(made(tmp_path, recorded(2, 5, random.Random(0)), **told), NOW)
    assert (found.state, found.left is not None) == (state, left)
    assert state not in ("silent", "done", "diverged") or found.since == (STATUS | told)["heartbeat"]


@pytest.mark.parametrize("wrong", [{"progress": 1e-308}, {"machine": {"images_per_s": 5e-324}}])
def test_a_time_beyond_all_times_is_not_known(tmp_path: Path, wrong: dict[str, Any]) -> None:
    lines = recorded(1, 3, random.Random(0))
    found = overview(made(tmp_path, [*lines, lines[-2] | wrong]), NOW)
    assert (found.state, found.left) == ("running", None)
    assert cells(found, NOW)["TO GO"] == "-"


@pytest.mark.parametrize(("told", "recorded_to", "shown"), [(3, 2.97, 3.0), (2, 2.97, 2.97), (2, 3.05, 3.05)])
def test_progress_goes_by_the_file_that_is_ahead(tmp_path: Path, told: int, recorded_to: float, shown: float) -> None:
    """Lines of steps are some steps apart, and status.json is written every ten seconds."""
    step = recorded(1, 1, random.Random(0))[1] | {"progress": recorded_to}
    assert overview(made(tmp_path, [step], epoch=told), NOW).progress == shown


def test_a_run_that_has_lost_its_status_has_started(tmp_path: Path) -> None:
    run = made(tmp_path, recorded(1, 3, random.Random(0)))
    (run / "status.json").unlink()
    found = overview(run, NOW)
    assert (found.state, found.reason, found.progress) == ("damaged", "status.json is missing", 1.0)


def test_steps_that_are_left_may_be_fewer(tmp_path: Path) -> None:
    run = made(tmp_path, recorded(3, 10, random.Random(0)))
    (run / "config.yaml").write_text("train: {epochs: 6, max_steps: 40}\n")
    assert overview(run, NOW).left == pytest.approx(10 * 128 / 64)


def test_settings_that_are_not_the_defaults(tmp_path: Path) -> None:
    """As JSON knows them; without those that only say where something lies, and without keys that no program has."""
    (tmp_path / "config.yaml").write_text(
        "optim: {lr: 0.02, momentum: 0.9, strange: 3, options: {nesterov: true}}\nrun: {name: a, dir: b}\n"
        "train: {epochs: 90, global_batch: .nan, seed: {a: 1}}\nschedule: {milestones: [2, 3]}\n"
        f"data: {{train: elsewhere, source: {'x' * 1000}}}\nother: {{lr: 1}}\n"
    )
    assert overview(tmp_path, NOW).differs == {
        "data.source": "x" * 200,
        "optim.lr": 0.02,
        "optim.options.nesterov": True,
        "schedule.milestones": [2, 3],
        "train.global_batch": "nan",
        "train.seed.a": 1,
    }
    assert overview(tmp_path, NOW).epochs == 90


@pytest.mark.parametrize(
    ("file", "text", "why"),
    [
        ("status.json", "{}", "status.json (state is missing)"),
        ("config.yaml", "- 1", "config.yaml holds no groups of settings"),
        ("config.yaml", "a: &a [1]\ntrain: {b: *b}", "config.yaml repeats *b where it is not known yet"),
        ("metrics.jsonl", "[1]\n", "metrics.jsonl (a line at its end: it should be an object)"),
        *(
            ("metrics.jsonl", f'{{"kind": "step", {wrong}}}\n', f"metrics.jsonl (a line at its end: {key} should be ")
            for key, wrong in {
                "images": f'"images": {10**400}',
                "progress": '"progress": 1e308',
                "top1_error": '"top1_error": 1.5',
                "machine.images_per_s": '"machine": {"images_per_s": -5}',
            }.items()
        ),
        ("events.jsonl", None, "events.jsonl is a folder"),
        ("checkpoints/step-00000010/meta.json", None, "checkpoints/step-00000010/meta.json is a folder"),
    ],
)
def test_a_damaged_run_names_the_file(tmp_path: Path, file: str, text: str | None, why: str) -> None:
    made(tmp_path, recorded(1, 3, random.Random(0)))
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    if text is None:
        (tmp_path / file).mkdir()
    else:
        (tmp_path / file).write_text(text)
    found = overview(tmp_path, NOW)
    assert found.state == "damaged"
    assert found.reason.startswith(why)


def test_a_torn_line_and_a_hole_are_no_damage(tmp_path: Path) -> None:
    run = made(tmp_path, recorded(1, 3, random.Random(0)))
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"kind": "st')
    assert overview(run, NOW).last_error is not None
    with open(run / "metrics.jsonl", "wb") as hole:
        hole.truncate(1 << 40)
    assert overview(run, NOW).state == "running"


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    assert overview(tmp_path / "gone", NOW) == Overview(tmp_path / "gone", str(tmp_path / "gone"), "not started")


def test_a_long_record_is_read_in_no_time(tmp_path: Path) -> None:
    """Ninety epochs of ImageNet, a line per 20 steps of 128 images."""
    run = made(tmp_path, recorded(90, 500, random.Random(1)))
    whole = min(_seconds(run) for _ in range(3))
    saved(run, 44_500, 0.2, 0)
    assert whole < 0.5  # some 0.05 on a machine that has nothing else to do
    assert min(_seconds(run) for _ in range(3)) < whole / 2


def _seconds(run: Path) -> float:
    began = time.perf_counter()
    assert math.isclose(overview(run, NOW).best_error or 0, 0.2)
    return time.perf_counter() - began


def test_the_runs_in_a_folder(tmp_path: Path) -> None:
    """Those of sweeps and experiments too, through links, but not in circles, and what is none is no run."""
    runs = tmp_path / "runs"
    for name in ("b", "a", "sweep/10-lr", "sweep/2-lr", "experiments/depth/arm-0", "a/kept", ".hidden/a"):
        made(runs / name, [])
    (runs / "sweep" / "code").mkdir()
    (runs / "sweep" / "code" / "copied.json").write_text("{}")
    (runs / "waits" / "slurm").mkdir(parents=True)
    (runs / "waits" / "slurm" / "job.json").write_text("{}")
    (runs / "empty").mkdir()
    (runs / "file").write_text("")
    made(tmp_path / "elsewhere" / "c", [])
    (runs / "link").symlink_to(tmp_path / "elsewhere")
    (runs / "sweep" / "up").symlink_to(runs)
    (runs / "itself").symlink_to("itself")
    os.mkfifo(runs / "pipe")
    found = [str(run.relative_to(runs)) for run in runs_in(runs)]
    assert found == ["a", "b", "experiments/depth/arm-0", "link/c", "sweep/2-lr", "sweep/10-lr", "waits"]
    assert runs_in(runs / "a") == [runs / "a"]
