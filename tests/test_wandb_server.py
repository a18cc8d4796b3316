"""The tests' W&B server: wandb's own client works with it and meets the faults it simulates."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.drills import until
from tests.helpers.wandb_server import Part, WandbServer

pytestmark = pytest.mark.integration

BEGIN = """
import numpy, wandb
quick = wandb.Settings(init_timeout=20, console="off", silent=True, x_disable_stats=True)
def begin(**more):
    return wandb.init(project="flowers", id="one", resume="allow", settings=quick, **more)
"""
SHOW = "print('got', run.starting_step)\n"


@pytest.fixture
def server() -> Iterator[WandbServer]:
    with WandbServer(delay=1) as server:
        yield server
        assert server.backend.unknown == []


def start(server: WandbServer, folder: Path, code: str, **env: str) -> subprocess.Popen[str]:
    """Run lines of Python after BEGIN, in a process that uses the server."""
    variables = {**os.environ, **server.environment, "WANDB_DIR": str(folder), **env}
    command = [sys.executable, "-W", "ignore", "-c", BEGIN + code]
    return subprocess.Popen(
        command, env=variables, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def client(server: WandbServer, folder: Path, code: str, **env: str) -> subprocess.CompletedProcess[str]:
    """The same, to its end."""
    with start(server, folder, code, **env) as process:
        out, err = process.communicate(timeout=100)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def test_a_run_arrives(server: WandbServer, tmp_path: Path) -> None:
    """Rows in their order, whatever is told of the run, an alert, and how it ended."""
    code = """
run = begin(name="nice", config={"model": {"width": 1}}, group="sweep", job_type="train", tags=["a"], notes="by hand")
run.log({"loss": 2.0}, step=3)
run.log({"loss": 1.0}, step=7)
run.alert("diverged", "loss is nan", level="ERROR")
run.summary["state"] = "preempted"
run.mark_preempting()
run.finish(exit_code=75)
"""
    result = client(server, tmp_path, code)
    assert result.returncode == 0, result.stderr
    run = server.run
    assert [(row["_step"], row["loss"]) for row in run.history] == [(3, 2.0), (7, 1.0)]
    told = {name: run.told[name] for name in ("displayName", "project", "groupName", "jobType", "tags", "notes")}
    assert list(told.values()) == ["nice", "flowers", "sweep", "train", ["a"], "by hand"]
    assert run.config["model"] == {"width": 1}
    assert (run.summary["state"], run.summary["loss"]) == ("preempted", 1.0)
    assert [(a["title"], a["text"], a["severity"]) for a in run.alerts] == [("diverged", "loss is nan", "ERROR")]
    assert (run.exit_code, run.preempting, run.state, run.starts) == (75, True, "preempted", 1)


def test_a_run_goes_on(server: WandbServer, tmp_path: Path) -> None:
    """The client learns the last step, and the server takes no row from below it: here of a file that is synced."""
    rows = "run = begin()\nfor step in range({}): run.log(dict(loss=step), step=step)\nrun.finish()\n"
    assert client(server, tmp_path, rows.format(5)).returncode == 0
    again = client(server, tmp_path, "run = begin()\n" + SHOW + "run.log(dict(loss=9), step=9)\nrun.finish()\n")
    assert again.stdout == "got 5\n", again.stderr
    assert (server.run.steps, server.run.starts, server.run.state) == ([0, 1, 2, 3, 4, 9], 2, "finished")
    offline = rows.format(12).replace("begin()", "wandb.init(project='flowers', id='one', settings=quick)")
    assert client(server, tmp_path, offline, WANDB_MODE="offline").returncode == 0
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    synced = subprocess.run(
        [sys.executable, "-m", "wandb", "sync", str(folder)],
        env={**os.environ, **server.environment},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert synced.returncode == 0, synced.stderr
    assert (server.run.steps, server.run.dropped) == ([0, 1, 2, 3, 4, 9, 10, 11], 10)


def test_files_arrive(server: WandbServer, tmp_path: Path) -> None:
    """An image, a table, which comes as an artifact too, and an artifact of one's own."""
    (tmp_path / "state.pt").write_bytes(bytes(100_000))
    code = """
run = begin()
run.log({"input": wandb.Image(numpy.zeros((8, 8, 3), numpy.uint8)), "worst": wandb.Table(["class"], [["rose"]])})
checkpoint = wandb.Artifact("checkpoint", "model")
checkpoint.add_file("state.pt")
run.log_artifact(checkpoint)
run.finish()
"""
    result = client(server, tmp_path, code)
    assert result.returncode == 0, result.stderr
    assert server.run.history[0]["input"]["path"] in server.run.uploads
    assert b"rose" in server.run.uploads[server.run.history[0]["worst"]["path"]]
    arrived = {a.told["artifactTypeName"]: a for a in server.artifacts if a.committed}
    assert set(arrived) == {"run_table", "model"}
    assert arrived["model"].files["state.pt"] == bytes(100_000)


def test_a_wrong_key(server: WandbServer, tmp_path: Path) -> None:
    """Whether the key is wrong or the server says so."""
    assert "returned error 401" in client(server, tmp_path, "begin()", WANDB_API_KEY="f" * 40).stderr
    server.play("wrong key")
    assert "returned error 401" in client(server, tmp_path, "begin()").stderr
    assert server.backend.runs == {}


@pytest.mark.parametrize(
    "part", ["refuse", *(pytest.param(part, marks=pytest.mark.slow) for part in ("die", "hang", "slow", "429"))]
)
def test_a_fault_passes(server: WandbServer, tmp_path: Path, part: Part) -> None:
    """What is logged while the server plays it arrives when it is well again, on the same port."""
    code = """
import pathlib, time
run = begin()
for step in range(20):
    run.log(dict(loss=step), step=step)
    while step == 9 and not pathlib.Path("played").exists(): time.sleep(0.01)
run.finish()
"""
    process = start(server, tmp_path, code)
    server.until(lambda: server.backend.runs and server.run.steps == list(range(9)))  # the tenth may still be added to
    server.play(part)
    asked = len(server.asked)
    (tmp_path / "played").touch()
    (log,) = tmp_path.glob("wandb/run-*/logs/debug-internal.log")
    until(lambda: len(server.asked) > asked or "connection refused" in log.resolve().read_text())
    server.play("well")
    _, said = process.communicate(timeout=100)
    assert process.returncode == 0, said
    assert (server.run.steps, server.run.state) == (list(range(20)), "finished")
