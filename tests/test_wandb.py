"""Runs in wandb, checked by the files and requests of the real client."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dist_train.config import Config, MonitorConfig, RunConfig
from dist_train.monitor import drawings, wandb_about, wandb_extras
from dist_train.monitor.reader import Shown
from dist_train.monitor.readers import Readers
from dist_train.rundir import confusion, events, record
from dist_train.rundir.checkpoint import Checkpoint
from tests.helpers.compare import records
from tests.helpers.drills import EVERY, until
from tests.helpers.launch import Run, at, finish, start
from tests.helpers.wandb_file import files, logged
from tests.helpers.wandb_server import WandbServer

pytestmark = [pytest.mark.usefixtures("wandb_alone")]

EXACT = {
    "loss/training": "loss",
    "error/training": "train_error",
    "lr": "lr",
    "images": "images",
    "progress/epoch": "progress",
}
CHECKED = {"error/validation_top1": "top1_error", "error/validation_top5": "top5_error", "loss/validation": "loss"}


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)


class Drawn:
    """In place of a drawing, which takes seconds: it is there at once."""

    failed = ""

    def __init__(self, run: Path, what: str) -> None:
        self._path = run / f"{what}.png"
        Image.new("RGB", (8, 8)).save(self._path)

    def poll(self) -> Path:
        return self._path

    def wait(self, _: float) -> Path:
        return self._path

    def end(self) -> None: ...


@pytest.fixture
def _drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawings, "Drawing", Drawn)


def line(step: int, **more: Any) -> dict[str, Any]:
    """A line of a record with ten steps an epoch."""
    body = {"step": step, "epoch": (step - 1) // 10, "progress": step / 10, "images": 24 * step}
    return {"kind": "step", **body, "loss": 1 / step, "train_error": 0.5, "lr": 0.01, **more}


def checked(step: int, error: float = 0.25) -> dict[str, Any]:
    body = {"step": step, "epoch": step // 10 - 1, "images": 24 * step, "samples": 63, "lr": 0.01}
    return {"kind": "validation", **body, "top1_error": error, "top5_error": error / 2, "loss": 1.5}


class Showing:
    """A run directory whose record grows by hand, and is shown by the readers."""

    def __init__(self, run: Path, **monitor: Any) -> None:
        run.mkdir(exist_ok=True)
        self.run, self.said = run, list[str]()
        sizes = [(run / name).stat().st_size if (run / name).exists() else 0 for name in (record.FILE, events.FILE)]
        config = replace(
            Config(), run=RunConfig(name=run.name, dir=str(run)), monitor=MonitorConfig(**({"page": False} | monitor))
        )
        self.readers = Readers(Shown(run, config, self.said.append, *sizes))
        self.readers.open()

    def write(self, *lines: dict[str, Any]) -> None:
        for values in lines:
            with open(self.run / (record.FILE if "kind" in values else events.FILE), "a") as file:
                file.write(json.dumps(values) + "\n")
        self.readers.wake()

    def end(self, state: str = "done", code: int = 0, **more: Any) -> None:
        self.write({"event": "end", "state": state, "reason": f"it is {state}", "code": code, **more})
        self.readers.close(60)


def sends(begun: Run, run: Path) -> bool:
    """Whether wandb has begun, and lines go to its process: the first picture is drawn by another one."""
    commands = [Path(f"/proc/{pid}/cmdline") for pid in begun.processes()]
    drawn = any(command.exists() and b"figures" in command.read_bytes() for command in commands)
    return drawn or (run / "wandb" / "inputs").exists()


@pytest.mark.integration
@pytest.mark.slow
def test_five_starts_of_which_two_are_killed(shard_sets: Path, tmp_path: Path) -> None:
    """The files of all starts together have each step; what is there twice is the same twice."""
    run = tmp_path / "run"
    words = (shard_sets, run, EVERY, "--monitor.wandb=offline", "--train.epochs=4")
    for ended in ("killed", "stopped", "killed", "stopped", "done"):
        fault = at("step", 3, "SIGTERM", always=True) if ended == "stopped" else {}
        pause = "0.3" if ended == "killed" else "0"
        begun = start(*words, ranks=0, fault=fault, env={"STEP_SECONDS": pause})
        if ended == "killed":
            until(lambda begun=begun: sends(begun, run))
            seen = len(records(run, "step"))
            until(lambda seen=seen: len(records(run, "step")) >= seen + 2)  # which wandb loses
            for pid in sorted(begun.processes(), reverse=True):  # wandb's, which is the younger one, first
                os.kill(pid, signal.SIGKILL)
        assert finish(begun).returncode == {"killed": -signal.SIGKILL, "stopped": 75, "done": 0}[ended]
    shown = [logged(path) for path in files(run)]
    assert len(shown) == 5
    assert len({one.id for one in shown if one.id}) == 1, "one run"
    assert [one.code for one in shown] == [None, 75, None, 75, 0]

    steps = {values["step"]: values for values in records(run, "step")}
    assert sorted(steps) == list(range(1, 41))
    assert {step for one in shown for step in one.rows} >= set(steps)
    for one in shown:
        for step, row in one.rows.items():
            if step in steps:
                assert {name: row[name] for name in EXACT} == {name: steps[step][k] for name, k in EXACT.items()}
    for values in records(run, "validation"):
        rows = [row for one in shown for row in one.rows.values() if "loss/validation" in row]
        wanted = {name: values[key] for name, key in CHECKED.items()}
        assert [row for row in rows if {name: row[name] for name in CHECKED} == wanted]
    for before, after in ((1, 2), (3, 4)):
        assert not shown[before].rows.keys() & shown[after].rows.keys(), "what a clean end has sent is not sent again"
    assert int((run / "wandb" / "sent").read_text()) == (run / record.FILE).stat().st_size


@pytest.mark.integration
def test_wandbs_process_is_killed(shard_sets: Path, tmp_path: Path) -> None:
    """One warning; what was sent before, and what comes after, is in the file of an offline run."""
    run = tmp_path / "run"
    words = ("--monitor.wandb=offline", "--run.stop_timeout=20")
    begun = start(shard_sets, run, *words, ranks=0, fault={}, env={"STEP_SECONDS": "0.3"})
    # wandb's process is there, and has its file, before wandb.init returns.
    logs = "wandb/offline-run-*/logs/debug.log"
    until(lambda: any("run started" in log.read_text() for log in run.glob(logs)) and len(records(run, "step")) > 2)
    (core,) = [pid for pid in begun.processes() if b"wandb-core" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(core, signal.SIGKILL)
    result = finish(begun)
    assert result.returncode == 0, result.stderr
    lost, found = map(logged, files(run))
    assert (lost.code, found.code, found.id) == (None, 0, lost.id or found.id)
    assert sorted(found.rows) == list(range(1, 21))
    assert result.stderr.count("wandb has failed") == 1
    assert int((run / "wandb" / "sent").read_text()) == (run / record.FILE).stat().st_size


@pytest.mark.integration
@pytest.mark.usefixtures("_drawn")
def test_a_validation_behind_a_stop_is_shown(tmp_path: Path) -> None:
    """wandb takes nothing more for a step that it has: it is in the row of the next one."""
    first = Showing(tmp_path / "run", wandb="offline")
    first.write(line(9), line(10))
    first.end("stopped", 75, requeued=True)
    second = Showing(tmp_path / "run", wandb="offline")
    second.write(checked(10), line(11), line(12))
    second.end("diverged", 70)
    one, two = map(logged, files(first.run))
    assert (list(one.rows), one.code, one.preempting) == ([9, 10], 75, True)
    assert (list(two.rows), two.code, two.preempting) == ([11, 12], 70, False)
    assert two.rows[11]["error/validation_top1"] == 0.25
    assert [(title, text) for title, text, _ in two.alerts] == [("diverged: run", "run: it is diverged")]
    assert {two.summary[k] for k in ("state", "best_top1_error", "last_top5_error")} == {"diverged", 0.25, 0.125}


@pytest.mark.integration
@pytest.mark.usefixtures("_drawn")
def test_pictures_tables_and_the_best_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the rows of lines that come, and in the last one; inputs once in the life of a run."""
    run = tmp_path / "run"
    names, counts = ["a", "b"], np.array([30, 33])
    counted = confusion.ClassCounts(names, counts, np.array([15, 11]), counts, [(1, 0, 22), (0, 1, 15)])
    monkeypatch.setattr(confusion, "classes", lambda _: counted)
    best = run / "checkpoints" / "step-00000010-validated"
    best.mkdir(parents=True)
    (best / "state.pt").write_bytes(b"weights")
    monkeypatch.setattr(wandb_extras, "find", lambda *_: Checkpoint(best, {}))
    first = Showing(run, wandb="offline", wandb_checkpoint=True)
    first.write(line(10), checked(10), line(11), line(20), checked(20))
    first.end()
    second = Showing(run, wandb="offline")
    second.write(line(21), line(22))
    second.end("stopped", 75)
    one, two = map(logged, files(run))
    extras = {
        step: {"/".join(name.split("/")[:2]) for name in row if name.startswith(("pictures/", "tables/"))}
        for step, row in (one.rows | two.rows).items()
    }
    learnt = {"pictures/wrong", "pictures/kernels"}
    assert extras == {
        10: {"pictures/inputs"},
        11: learnt,  # the state is saved behind a validation
        20: learnt | {"tables/classes", "tables/confusion"},
        21: set(),
        22: set(),
    }
    assert one.artifacts == [
        ("run_table", ["tables/classes.table.json"]),
        ("run_table", ["tables/confusion.table.json"]),
        ("model", ["state.pt"]),
    ]
    assert two.artifacts == []


def test_of_many_classes_the_most_confused_pairs_are_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    n, ones = wandb_extras.MOST + 1, np.ones(wandb_extras.MOST + 1, np.int64)
    counted = confusion.ClassCounts([f"class {i}" for i in range(n)], ones, 0 * ones, ones, [(2, 1, 7), (1, 2, 3)])
    monkeypatch.setattr(confusion, "classes", lambda _: counted)
    found = wandb_extras.tables(tmp_path)
    assert sorted(found) == ["tables/classes", "tables/confused"]
    assert found["tables/confused"].data == [["class 2", "class 1", 7], ["class 1", "class 2", 3]]


@pytest.mark.integration
@pytest.mark.usefixtures("_drawn")
def test_online_after_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server is brought up to date from the record, and is sent nothing that it has."""
    run = tmp_path / "run"
    offline = Showing(run, wandb="offline")
    offline.write(*(line(step) for step in range(1, 11)), checked(10))
    offline.end("stopped", 75, requeued=True)
    with WandbServer() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        online = Showing(run, wandb="online")
        online.write(line(11))
        server.until(lambda: server.backend.runs and server.run.steps == list(range(1, 12)))
        online.end("stopped", 75, requeued=True)
        assert (server.run.state, server.run.preempting) == ("preempted", True)
        again = Showing(run, wandb="online", wandb_tags=("mine",))
        again.write(line(12), line(20), checked(20))
        again.end("done")
        assert server.run.steps == [*range(1, 13), 20]
        assert (server.run.starts, server.run.dropped, server.run.state) == (2, 0, "finished")
        checks = [row["_step"] for row in server.run.history if "error/validation_top1" in row]
        assert checks == [10, 20], "what the server has is not sent in another row"
        assert [alert["title"] for alert in server.run.alerts] == ["stopped: run"]
        assert "mine" in server.run.told["tags"]
        assert server.run.config["optim.lr"] == 0.01
        assert any(text == f"wandb leet {run / 'wandb'}" for text in again.said)


def mode_by(**variables: str) -> str:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(f"WANDB_{name}", value)
        return wandb_about.mode(Config())


def test_wandbs_variables_count_where_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert mode_by() == "disabled"
    assert mode_by(API_KEY="x", MODE="") == "disabled"
    assert {mode_by(PROJECT="x"), mode_by(ENTITY="x"), mode_by(DIR="x"), mode_by(MODE="online")} == {"online"}
    assert {mode_by(MODE="offline"), mode_by(MODE="dryrun", PROJECT="x")} == {"offline"}
    assert mode_by(MODE="disabled", PROJECT="x") == "disabled"
    said = replace(Config(), monitor=MonitorConfig(wandb="disabled"))
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    assert wandb_about.mode(said) == "disabled", "what is said counts first"
    assert wandb_about.about(said)["project"] == "theirs"
    assert wandb_about.about(replace(said, monitor=MonitorConfig(wandb_project="ours")))["project"] == "ours"


def test_members_of_sweeps_have_names_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_NAME", "theirs")
    monkeypatch.setenv("WANDB_TAGS", "x, mine")
    config = replace(Config(), monitor=MonitorConfig(wandb_tags=("mine",)))
    told = wandb_about.about(replace(config, run=RunConfig(name="sweep/1-optim.lr=0.02")))
    assert (told["name"], told["group"]) == ("sweep/1-optim.lr=0.02", "sweep")
    assert (told["job_type"], told["tags"]) == ("train", ["mine", "x", "alexnet", "imagenet"])
    alone = wandb_about.about(replace(config, run=RunConfig(name="alone")))
    assert (alone["name"], alone["group"]) == ("theirs", None), "WANDB_RUN_GROUP counts"


@pytest.mark.integration
@pytest.mark.usefixtures("_drawn")
def test_errors_are_on_the_first_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`wandb leet` sorts its charts by their names, nine on a page, and shows those that are hidden, too."""
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "elsewhere"))
    showing = Showing(tmp_path / "run", wandb="offline")
    machine = {"images_per_s": 400.0, "nodes": {"gpu-07": {"watts": 300.0}}, "worst_node": "gpu-07"}
    showing.write(line(10, grad_norm=2.0, machine=machine), checked(10))
    showing.end()
    (path,) = (tmp_path / "elsewhere").glob("wandb/offline-run-*/*.wandb")
    found = logged(path)
    charts = sorted(name for name in found.rows[10] if not name.startswith("_") and "pictures/" not in name)
    assert charts[:6] == [
        "error/training",
        "error/validation_top1",
        "error/validation_top5",
        "grad_norm",
        "images",
        "loss/training",
    ]
    assert found.rows[10]["machine/gpu-07/watts"] == 300
    hidden = {name for name, metric in found.metrics.items() if metric.options.hidden}
    assert hidden == {"images", "progress/epoch"}
    assert {metric.step_metric for name, metric in found.metrics.items() if name not in hidden} == {"images"}
    assert {"min", "last"} == set(found.summary["error/validation_top1"])
    assert sorted(item.name for item in (tmp_path / "run" / "wandb").iterdir()) == ["id", "inputs", "sent"]
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", str(path)]
    said = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"HOME": str(tmp_path)})
    assert "error/validation_top1.min" in said.stdout
