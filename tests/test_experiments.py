"""Experiments: their sweeps are valid configurations, and the table agrees with the runs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dist_train.__main__ import main
from dist_train.analysis import arms, experiments, recorded, tables
from dist_train.cli import parse
from dist_train.config import Config, TrainConfig
from dist_train.packaged import CONFIGS
from dist_train.rundir.state import Progress
from tests.helpers.compare import records, status

pytestmark = pytest.mark.integration  # seconds each
ROOT = Path(__file__).parent.parent
NAMES = sorted(path.stem for path in (CONFIGS / "experiments").glob("*.sweep"))


@pytest.mark.parametrize("name", NAMES)
def test_sweeps_parse_and_say_what_was_measured(name: str, tmp_path: Path) -> None:
    experiment = arms.read(name, 3, tmp_path)
    assert len({arm.name for arm in experiment.arms}) == len(experiment.arms) > 0
    for arm in experiment.arms:
        parse(["--config", str(experiment.config), *arm.overrides])
    head = experiment.config.read_text().partition("\ndata:")[0]
    for word in ("# Data:", "# Hardware:", "# Measured:", "# Time:", "make experiments"):
        assert word in head, word


@pytest.fixture
def sweep(tmp_path: Path, shard_sets: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A small experiment; returns what to call it with."""
    monkeypatch.setattr(arms, "SWEEPS", tmp_path)
    (tmp_path / "small.yaml").write_text(
        f"data: {{train: {shard_sets}/train, val: {shard_sets}/val, resize: 72, crop: 67}}\n"
        "model: {hidden: 32}\n"
        "train: {epochs: 1, global_batch: 24, max_steps: 4, compile: 'off', device: cpu}\n"
        "monitor: {log_every: 1, probes: [0, 2]}\n"
    )
    (tmp_path / "small.sweep").write_text(
        "--optim.lr 0.001  # as it is\n\n"
        "--train.seed 7 --optim.name adam  # Adam, one seed\n"
        "--train.seed 7 --optim.lr 1e9  # diverges\n"
        "# ensemble of two: as it is\n"
    )
    places = ["--root", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    return ["experiments", "small", "--seeds", "2", "--jobs", "2", *places]


@pytest.mark.slow
def test_an_experiment_from_start_to_table(sweep: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(sweep) == 0, capfd.readouterr().err
    runs = tmp_path / "runs" / "small"
    table = (tmp_path / "out" / "small.md").read_text().splitlines()
    assert table[0].startswith("| arm | runs |")
    rows = {
        cells[1].strip(): [cell.strip() for cell in cells[2:-1]] for line in table[2:] if (cells := line.split("|"))
    }
    assert list(rows) == ["as it is", "Adam, one seed", "diverges", "two of: as it is, averaged"]
    errors = [records(runs / f"as-it-is-{seed}", "validation")[-1]["top1_error"] for seed in (0, 1)]
    mean = f"{sum(errors) / 2:.2%} ({min(errors):.2%} to {max(errors):.2%})"
    assert rows["as it is"][0] == "2"
    assert mean in rows["as it is"]
    assert rows["Adam, one seed"][0] == "1"
    assert status(runs / "diverges-7")["state"] == "diverged"
    assert "1 of 1 diverged" in rows["diverges"]
    result = json.loads((runs / "as-it-is-0+as-it-is-1.json").read_text())
    assert [run["run"] for run in result["runs"]] == [str(runs / f"as-it-is-{seed}") for seed in (0, 1)]
    assert f"{result['top1_error']:.2%}" in rows["two of: as it is, averaged"]
    probe = records(runs / "as-it-is-0", "probe")
    assert [p["step"] for p in probe] == [0, 2]
    for picture in ("small.png", "small-outputs.png", "small-gradients.png", "small-lr.png"):
        with Image.open(tmp_path / "out" / picture) as image:
            assert image.size[0] > 600

    before = {path: path.stat().st_mtime_ns for path in runs.rglob("metrics.jsonl")}
    assert main(sweep) == 0
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("metrics.jsonl")} == before, "what is done stays"


@pytest.mark.slow
def test_what_cannot_run_is_said(sweep: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "small.sweep").write_text("--model.nmae x  # misspelt\n--train.seed 0 --train.max_steps 1  # good\n")
    assert main(sweep) == 1
    said = capfd.readouterr().err
    assert "misspelt-0 is not begun: see" in said
    assert "did you mean model.name" in (tmp_path / "runs" / "small" / "misspelt-0.log").read_text()
    assert main(["experiments", "nothing"]) == 2
    assert "there is no experiment nothing: choose from small" in capfd.readouterr().err


def test_a_misspelt_option_starts_no_run(sweep: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Neither one of the verb's own nor one that is for the trainer."""
    for options, meant in ((["--drawonly"], "--draw-only"), (["--optim.lrr", "0.1"], "optim.lr")):
        assert main([*sweep, *options]) == 2
        said = capfd.readouterr().err
        assert said.startswith("error: unknown ")
        assert said.endswith(f"did you mean {meant}?\n")
        assert said.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_images_that_nothing_packs(sweep: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """An error if the experiment was named; one sentence if it was not, and the others are run."""
    nowhere = [f"--data.train={tmp_path}/nowhere"]
    said = f"small is not run: there is no shard set {tmp_path}/nowhere, so pack it: docs/blog.md\n"
    for words, code in ((sweep, 1), ([word for word in sweep if word != "small"], 0)):
        assert main([*words, *nowhere]) == code
        assert said in capfd.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_the_blogs_runs_on_a_shortened_budget(shard_sets: Path, tmp_path: Path) -> None:
    """`make experiments ARGS=blog`, three steps per run, and drawn once more from its own records."""
    sets = {name: shard_sets / name for name in ("train", "val")}
    shutil.copytree(shard_sets, tmp_path / "data" / "fashion-mnist")
    short = " ".join(f"--data.{name} {path}" for name, path in sets.items())
    given = "blog --seeds 1 --root runs --out drawn"
    made = make_experiments(tmp_path, f"{given} --train.max_steps 3 --train.global_batch 8 {short}")
    assert made.returncode == 0, made.stderr
    first = {path.name: path.read_bytes() for path in (tmp_path / "drawn").iterdir()}
    assert {"blog.jsonl", "blog.md", "blog.png", "blog-columns.md", "blog-layers.md"} <= first.keys()
    arms_run = arms.read("blog", 1, tmp_path).trained
    assert len(first["blog.md"].splitlines()) == len({arm.name for arm in arms_run}) + 2
    shutil.rmtree(tmp_path / "runs")
    for path in (tmp_path / "drawn").iterdir():
        if path.suffix != ".jsonl":
            path.unlink()
    assert make_experiments(tmp_path, f"{given} --draw-only").returncode == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "drawn").iterdir()} == first


def make_experiments(cwd: Path, arguments: str) -> subprocess.CompletedProcess[str]:
    venv = Path(sys.executable).parent.parent
    words = ["make", "-f", str(ROOT / "Makefile"), f"VENV={venv}", f"--old-file={venv}/ready", "experiments"]
    env = {name: value for name, value in os.environ.items() if "MAKE" not in name} | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([*words, f"ARGS={arguments}"], cwd=cwd, env=env, capture_output=True, text=True, check=False)


def test_a_source_is_packed_before_the_runs(sweep: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the runs themselves all but one would be refused."""
    order: list[str] = []

    def pack(config: Config) -> None:
        order.append(config.data.source)
        for path in (config.data.train, config.data.val):
            Path(path).mkdir(parents=True)
            (Path(path) / "manifest.json").touch()

    monkeypatch.setattr(experiments.data, "pack_source", pack)
    monkeypatch.setattr(experiments, "_train", lambda *_: order.append("run") or "")
    sets = [f"--data.train={tmp_path}/new/train", f"--data.val={tmp_path}/new/val", "--data.source=fashion-mnist"]
    main([*sweep, *sets])
    assert order[:2] == ["fashion-mnist", "run"]
    assert order.count("fashion-mnist") == 1


def test_arms_of_one_name_are_told_apart(sweep: list[str], tmp_path: Path) -> None:
    (tmp_path / "small.sweep").write_text("--train.seed 3  # twin\n--train.seed 4  # twin\n--optim.lr 1  # single\n")
    experiment = arms.read("small", 1, tmp_path)
    assert [tables.label(experiment, arm) for arm in experiment.arms] == ["twin, seed 3", "twin, seed 4", "single"]


def test_sweeps_are_what_slurm_takes(tmp_path: Path) -> None:
    """`python -m slurm submit --array` reads the same lines, all but the ensembles, which are no runs of their own."""
    from slurm.submit import _sweep

    assert _sweep(CONFIGS / "experiments" / "towers.sweep") == [
        ["--model.name", "alexnet_two_tower", "--train.seed", "0"],
        ["--model.name", "alexnet_one_tower", "--model.width", "0.5"],
    ]
    for name in NAMES:
        trained = arms.read(name, 3, tmp_path).trained
        assert _sweep(CONFIGS / "experiments" / f"{name}.sweep") == [list(arm.overrides) for arm in trained]


def test_a_running_error_from_windows() -> None:
    """As from single steps, about; exactly so where each step is recorded."""
    errors, progress, means = [1 - i / 250 for i in range(200)], Progress(), []
    for number, error in enumerate(errors, 1):
        progress.average(error, number)
        means.append(progress.train_error)
    for many in (1, 5):
        lines: list[dict[str, Any]] = [
            {"step": i + many, "train_error": sum(errors[i : i + many]) / many, "machine": {}}
            for i in range(0, 200, many)
        ]
        found = dict(recorded.running_errors(lines))
        assert found == pytest.approx({step: means[step - 1] for step in found}, rel=1e-12 if many == 1 else 0.01)
    earlier: list[dict[str, Any]] = [{"step": 1000, "train_error": 0.5}]
    assert dict(recorded.running_errors(earlier)) == {1000: 0.5}, "an earlier program's, which goes on"
    assert dict(recorded.running_errors([*earlier, {"step": 1001, "train_error": 0.0, "machine": {}}]))[1001] > 0.48


def test_a_run_that_stopped_at_a_training_error_was_below_it(tmp_path: Path) -> None:
    """Also where its running error, from the means of windows, comes out a little higher."""
    arm = arms.Arm("one", (), (0,))
    lines: list[dict[str, Any]] = [
        {"kind": "step", "step": step, "progress": step / 100, "loss": 1.0, "train_error": 0.3001, "machine": {}}
        for step in range(10, 101, 10)
    ]
    check = {"kind": "validation", "top1_error": 0.3, "lr": 0.01, "loss": 1.0, "train_loss": 1.0, "train_error": 0.3}
    for end, epochs, most, below in ((100, 2, 0, 100), (103, 2, 0, None), (100, 1, 0, None), (100, 2, 100, None)):
        config = Config(train=TrainConfig(until_error=0.3, epochs=epochs, max_steps=most))
        run = recorded._of_lines(arm, 0, config, [*lines, check | {"step": end}], "done")
        assert run.first_below(0.3) == below, (end, epochs, most)
        assert recorded._of_lines(arm, 0, config, [*lines, check | {"step": end}], "stopped").first_below(0.3) is None


def test_epochs_of_runs_in_tables_and_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From records made by hand: two runs of 12 epochs of 5 steps, of which one divides its learning rate twice."""
    errors = [0.9, 0.8, 0.62, 0.55, 0.52, 0.5, 0.49, 0.48, 0.47, 0.46, 0.39, 0.41]
    rates = [0.1] * 6 + [0.01] * 4 + [0.001] * 2
    for name, lrs, better in (("divided", rates, 0.0), ("kept", [0.1] * 12, 0.1)):
        run = tmp_path / "runs" / "made" / f"{name}-0"
        run.mkdir(parents=True)
        (run / "config.yaml").write_text("{}")
        (run / "status.json").write_text(json.dumps({"state": "done", "time": 0}))
        lines: list[dict[str, Any]] = []
        for epoch, (error, lr) in enumerate(zip(errors, lrs, strict=True), 1):
            at = {"step": 5 * epoch, "epoch": epoch, "images": 640 * epoch, "lr": lr}
            lines.append({"kind": "step", **at, "loss": 1.0, "train_error": error, "progress": epoch, "machine": {}})
            training = {"train_loss": 2.0, "train_error": error - 0.2}
            found = {"top1_error": error - better, "top5_error": 0.1, "loss": 1.5, "samples": 10}
            lines.append({"kind": "validation", **at, **found, **training, "machine": {}})
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(arms, "SWEEPS", tmp_path)
    (tmp_path / "made.yaml").write_text("{}")
    (tmp_path / "made.sweep").write_text(
        "# begun below: 0.6\n# validated below: 0.45, 0.2\n"
        "--train.seed 0 --optim.lr 0.1  # divided\n--train.seed 0 --optim.lr 0.2  # kept\n"
    )
    out = tmp_path / "out"
    for _ in range(2):  # from the runs, then from the records that these have left
        assert main(["experiments", "made", "--draw-only", "--root", str(tmp_path / "runs"), "--out", str(out)]) == 0
        rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in (out / "made.md").read_text().splitlines()]
        assert rows[0][3:6] == [
            "validation error below 45% at step",
            "validation error below 20% at step",
            "training error",
        ]
        assert [row[3:] for row in rows[2:]] == [
            ["55", "never in 60", "21.00%", "41.00%", "60"],
            ["25", "never in 60", "21.00%", "31.00%", "60"],
        ]
        rates_table = (out / "made-rates.md").read_text().splitlines()[2:]
        assert [[cell.strip() for cell in row.split("|")[2:-1]] for row in rates_table] == [
            ["0", "0.1", "1 to 6", "30.00%", "50.00%", "50.00%", "64.83%"],
            ["0", "0.01", "7 to 10", "26.00%", "46.00%", "46.00%", "47.50%"],
            ["0", "0.001", "11 to 12", "21.00%", "41.00%", "39.00%", "40.00%"],
            ["0", "0.1", "1 to 12", "21.00%", "31.00%", "29.00%", "38.90%"],
        ]
        assert (out / "made-epochs.png").exists()
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)

    divided, kept = map(json.loads, (out / "made.jsonl").read_text().splitlines())
    del kept["epochs"]  # as an earlier program wrote it
    (out / "made.jsonl").write_text(f"{json.dumps(divided)}\n{json.dumps(kept)}\n")
    assert main(["experiments", "made", "--draw-only", "--root", str(tmp_path / "runs"), "--out", str(out)]) == 0
    assert (out / "made-rates.md").read_text().count("| divided |") == 3
    assert "kept" not in (out / "made-rates.md").read_text()
