"""A run directory of a stranger, or a damaged one: nothing that it says is run, signalled or written through."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import slurm.__main__
from slurm import cluster
from slurm.submissions import Submission, SubmittedRun
from tests.helpers.compare import assert_same_run
from tests.helpers.launch import SMALL
from tests.helpers.strange import MINE
from tests.slurm.conftest import User, job_of
from tests.slurm.private_cluster import wait_for
from tests.slurm.test_commands import submitted

pytestmark = pytest.mark.integration

Capture = pytest.CaptureFixture[str]


def said(place: Path, /, **values: object) -> None:
    """Changes what a run's file, in this folder, says of its job."""
    file = place / "job.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def refused(capsys: Capture, *words: str) -> str:
    """The one sentence with which `python -m slurm` ends."""
    assert slurm.__main__.main(words) == 2, capsys.readouterr()
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("[1]", "it should be an object"),
        ("[" * 100_000, "it is no JSON"),
        (b"\xff", "it is no JSON"),
        ("", "it is no JSON"),
        ({"job": None}, "job should be a valid string"),
        ({"job": 12}, "job should be a valid string"),
        ({"job": "-1"}, "job should match"),
        ({"job": "12 --user=me"}, "job should match"),
        ({"job": "\u0663"}, "job should match"),
        ({"job": "12_"}, "job should match"),
        ({"folder": "slurm"}, "folder should match"),
        ({"folder": "/a\nb"}, "folder should match"),
        ({"tasks": True}, "tasks should be a valid integer"),
        ({"tasks": -1}, "tasks should be greater"),
        ({"tasks": float("nan")}, "tasks should be a valid integer"),
        ({"local": "yes"}, "local should be a valid boolean"),
        ({"chain": "12"}, "chain should be a valid array"),
        ({"chain": ["12", "x"]}, "chain.1 should match"),
    ],
)
def test_a_damaged_file_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, text: object, field: str
) -> None:
    monkeypatch.chdir(tmp_path)
    file = submitted(tmp_path / "runs" / "x") / "job.json"
    if isinstance(text, dict):
        said(file.parent, **text)
    else:
        file.write_bytes(text if isinstance(text, bytes) else str(text).encode())
    for verb in ("logs", "cancel", "requeue"):
        assert f"{file} is damaged ({field}" in refused(capsys, verb, "x")
    for key in ("job", "folder", "tasks", "local"):
        file.unlink()
        shutil.rmtree(file.parent.parent)
        submitted(tmp_path / "runs" / "x")
        file.write_text(
            json.dumps({name: value for name, value in json.loads(file.read_text()).items() if name != key})
        )
        assert f"{file} is damaged ({key} is missing)" in refused(capsys, "cancel", "x")


def test_a_pipe_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.chdir(tmp_path)
    file = submitted(tmp_path / "runs" / "x") / "job.json"
    file.unlink()
    os.mkfifo(file)
    for verb in ("logs", "cancel", "requeue"):
        assert f"{file} is no file but a pipe" in refused(capsys, verb, "x")


@pytest.mark.integration
@pytest.mark.parametrize("module", [cluster.CONTROLLER, cluster.QUEUE])
def test_a_process_of_another_run_is_not_signalled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, module: str
) -> None:
    """Though it runs the same program; nor is a mark written."""
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "site" / Path(*module.split("."))
    place.parent.mkdir(parents=True)
    (place.parent / "__init__.py").touch()
    (tmp_path / "site" / module.split(".")[0] / "__init__.py").touch()
    place.with_suffix(".py").write_text("import time\n\nprint(flush=True)\ntime.sleep(100)\n")
    folder = submitted(tmp_path / "runs" / "strange")
    (folder.parent.parent / "mine" / "slurm").mkdir(parents=True)
    words = [sys.executable, "-m", module, str(folder.parent.parent / "mine" / "slurm")]
    variables = os.environ | {"PYTHONPATH": f"{tmp_path}/site"}
    with subprocess.Popen(words, env=variables, stdout=subprocess.PIPE) as mine:
        assert mine.stdout
        mine.stdout.readline()
        job = str(mine.pid) if module == cluster.CONTROLLER else f"{mine.pid}_0"
        for number in (job, str(os.getpid()), "0", "1"):
            said(folder, job=number, local=True)
            for more in ([], ["--now"]):
                assert slurm.__main__.main(["cancel", "strange", *more]) == 0
                assert f"job {number} has ended already" in capsys.readouterr().out
        assert "was not submitted by you" in refused(capsys, "requeue", "strange")
        assert mine.poll() is None
        assert not list(tmp_path.rglob("*.over"))
        assert cluster.entry(Submission(job, words[3], 1, local=True)).active, "of the run whose folder it has"
        mine.kill()


def test_a_folder_elsewhere_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, victim: Path
) -> None:
    """Though the queue has such a job; a run that is reached over a link of the user's, and one of a sweep, go on."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("slurm.cluster.ended", lambda submission: False)
    folder = submitted(tmp_path / "runs" / "x")
    said(folder, folder=str(victim.parent))
    assert "which is not that of this run" in refused(capsys, "cancel", "x")
    folder.rename(tmp_path / "moved")
    folder.symlink_to(tmp_path / "moved")
    said(folder, folder=str(folder))
    assert "which is not that of this run" in refused(capsys, "cancel", "x")
    assert [path.name for path in victim.parent.iterdir()] == ["victim"]
    assert not list((tmp_path / "moved").glob("*.over"))

    folder = submitted(tmp_path / "scratch" / "sweep" / "0-a")
    (tmp_path / "runs" / "sweep").symlink_to(tmp_path / "scratch" / "sweep")
    run = SubmittedRun(tmp_path / "runs" / "sweep" / "0-a")
    for place in (folder, run.folder, folder.parent.parent / "slurm", run.directory.parent / "slurm"):
        said(folder, folder=str(place))
        run.check_folder(run.last)


def test_a_link_in_a_sweep_is_not_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """It leads to a run of the user's, whose job Slurm would know."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("slurm.cluster.ended", lambda submission: True)
    submitted(tmp_path / "runs" / "mine")
    submitted(tmp_path / "runs" / "sweep" / "0-a")
    (tmp_path / "runs" / "sweep" / "1-b").symlink_to(tmp_path / "runs" / "mine")
    for text in ("sweep", "sweep/1"):
        for verb in ("cancel", "requeue"):
            assert "1-b is a link, and perhaps not what you mean: name it by itself" in refused(capsys, verb, text)
    for text in ("sweep/0", "sweep/1-b", "mine"):
        assert slurm.__main__.main(["cancel", text]) == 0


def test_no_code_that_a_run_names_reaches_a_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, shard_sets: Path
) -> None:
    """Also not that of a source whose sets are there, so that nothing of it is looked up now."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))  # no sbatch
    folder = submitted(tmp_path / "runs" / "x")
    words = ["submit", "--time=30", "--gpus-per-node=0", "--config", str(folder / "config.yaml")]
    words += [f"--run.dir={tmp_path}/runs/x", "--data.resize=72", "--data.crop=67", "--train.global_batch=24"]
    for text in ("data: {source: 'theirs:Source', %s}", "model: {name: 'theirs:net'}\ndata: {%s}"):
        (folder / "config.yaml").write_text(text % f"train: {shard_sets}/train, val: {shard_sets}/val")
        assert "theirs:" in (err := refused(capsys, *words))
        assert "comes from a run directory" in err
        assert "if you trust its author, add --trust" in err


@pytest.mark.parametrize(
    "name",
    [
        *("slurm", "code", "slurm/starts.jsonl", "slurm/job.json", "slurm/.job.json.tmp", "slurm/config.yaml"),
        *("slurm/controller.log", "slurm/12_0_log.out", "slurm/12.over"),
    ],
)
def test_what_submit_would_write_through_a_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, victim: Path, shard_sets: Path, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))  # no sbatch
    link = tmp_path / "run" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(victim if "." in name else victim.parent)
    words = [*SMALL, f"--data.train={shard_sets}/train", f"--data.val={shard_sets}/val"]
    err = refused(capsys, "submit", "--time=30", "--gpus-per-node=0", *words, f"--run.dir={tmp_path}/run")
    replaced = name in ("code", "slurm/config.yaml")
    assert link.is_symlink() != replaced
    assert ("there is no sbatch here" if replaced else f"{link} is ") in err
    assert victim.read_bytes() == MINE
    assert [path.name for path in victim.parent.iterdir()] == ["victim"]


def test_marks_of_a_job_follow_no_link(tmp_path: Path, victim: Path) -> None:
    folder = submitted(tmp_path)
    run = SubmittedRun(tmp_path)
    for name in ("starts.jsonl", "12.over"):
        (folder / name).symlink_to(victim)
    for write in (run.last.forbid_requeue, lambda: run.append(start="12")):
        with pytest.raises(OSError, match="is a link, which is not followed"):
            write()
    run.last.cancel()
    assert run.last.cancelled
    run.last.forbid_requeue()
    assert run.last.cancelled, "the mark of the user stays"
    assert victim.read_bytes() == MINE


@pytest.mark.slurm
def test_a_job_that_is_not_of_the_run_is_not_touched(user: User) -> None:
    """A job of the user's whose number stands in a stranger's file, by itself, in an array and in a chain."""
    folder = submitted(user.run("strange"))
    words = ("--parsable", "-n1", "-o", f"{user.home}/%A_%a_0_log.out", "--array=0-1", "--wrap", "sleep 300")
    array = user.cluster.run("sbatch", *words).strip()
    jobs = [f"{array}_0", f"{array}_1"]
    wait_for(lambda: [user.cluster.job(job) for job in jobs] == ["RUNNING"] * 2, 30, "the jobs to run")
    said(folder, job=array)
    assert "has ended already" in user.slurm("cancel", "strange"), "a run is never a whole array"
    for values in ({"job": jobs[1]}, {"job": "1", "chain": ["1", jobs[0]]}):
        said(folder, **{"chain": [], **values})
        for verb in (["cancel", "strange"], ["cancel", "strange", "--now"]):
            err = user.slurm(*verb, code=2)
            assert "which Slurm does not know as this run's" in err
            assert err.count("\n") == 1
        assert "was not submitted by you" in user.slurm("requeue", "strange", code=2)
    assert [user.cluster.job(job) for job in jobs] == ["RUNNING"] * 2
    assert not list(user.home.rglob("*.over"))
    assert "Restarts=0" in user.cluster.run("scontrol", "show", "job", jobs[1])


@pytest.mark.slow
@pytest.mark.slurm
def test_nothing_that_a_strangers_run_says_is_run(user: User, uninterrupted: Path) -> None:
    """The run of a colleague, which has stopped; his file has what an earlier version took for the script. The command
    that is told continues the run."""
    mine, user.environment["XDG_STATE_HOME"] = user.environment["XDG_STATE_HOME"], str(user.home / "his")
    job = user.submit("hers")
    process = user.freeze("hers", job, rank=0)
    cancelling = user.start("cancel", "hers")
    user.thaw(process, signal.SIGUSR2)
    assert cancelling.communicate(timeout=60)[0].count("is cancelled") == 1
    last = user.newest("hers")
    user.environment["XDG_STATE_HOME"] = mine

    mark, folder = user.home / "executed", user.run("hers") / "slurm"
    touch = f"touch {shlex.quote(str(mark))}"
    lines = {"setup": [touch], "teardown": [touch], "python": f"{touch}; python", "srun": f"; {touch};"}
    more = {"srun_args": [f"; {touch};"], "additional_parameters": {"requeue": True, "output": str(mark)}}
    said(folder, parameters={"time": 30, "nodes": 1, "ntasks_per_node": 1, **lines, **more}, **lines)
    (folder / "slurm.yaml").write_text(f"setup: [{touch}]\n")
    his = {path.name for path in folder.iterdir()}
    err = user.slurm("requeue", "hers", code=2)
    assert "was not submitted by you" in err
    assert {path.name for path in folder.iterdir()} == his
    assert not user.cluster.run("squeue", "-h")

    words = shlex.split(err.split("`python -m slurm ")[1].split("`")[0])
    job = job_of(user.slurm(*words, "--nodes=2", "--gpus-per-node=2"))
    user.wait("hers", job, "done")
    assert user.starts("hers") == ["", last]
    assert_same_run(user.run("hers"), uninterrupted)
    assert not mark.exists()


@pytest.mark.integration
@pytest.mark.slow
def test_whatever_a_submission_writes_is_written_in_one_place(shard_sets: Path, tmp_path: Path) -> None:
    """As in `tests/test_links.py`: of `submit --local`, the job, `cancel` and `requeue`. What submitit writes itself
    goes into a folder without links."""
    data = [*SMALL, f"--data.train={shard_sets}/train", f"--data.val={shard_sets}/val", "--train.device=cpu"]
    submit = ["slurm", "submit", "--local", "--gpus-per-node=0", "--time=30", *data]
    (tmp_path / "sweep.txt").write_text("--train.max_steps 1\n--train.max_steps 2\n")
    run, sweep = f"{tmp_path}/runs/one", f"{tmp_path}/runs/sweep"
    commands = [
        [*submit, f"--run.dir={run}", "--train.epochs=1"],  # its job imports a copy
        ["slurm", "logs", run, "--follow"],
        [*submit, f"--run.dir={run}", "--live-code", "--train.epochs=2"],
        ["slurm", "logs", run, "--follow"],
        ["slurm", "requeue", run],
        ["slurm", "cancel", run],
        ["slurm", "requeue", run],
        ["slurm", "logs", run, "--follow"],
        [*submit, f"--run.dir={sweep}", f"--array={tmp_path}/sweep.txt", "--live-code"],
        ["slurm", "logs", f"{sweep}/1", "--follow"],
        ["slurm", "cancel", sweep],
    ]
    (tmp_path / "commands.json").write_text(json.dumps(commands))
    words = [sys.executable, "-m", "tests.helpers.written", str(tmp_path / "runs"), str(tmp_path / "commands.json")]
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    found = {tuple(entry) for entry in json.loads(result.stdout.splitlines()[-1])["events"]}
    opened = {module for event, module, _ in found if event == "open"}
    assert opened == {"pipelines/files.py", "submitit"}
    ours = {place for place in found if place[1].startswith("slurm/")}
    assert ours == {
        ("os.mkdir", "slurm/snapshot.py", "take"),  # of a random name
        ("os.mkdir", "slurm/snapshot.py", "_copy"),  # in there
        ("os.mkdir", "slurm/snapshot.py", "_replace"),
        ("os.rmdir", "slurm/snapshot.py", "_replace"),
        ("os.remove", "slurm/job.py", "_begin"),  # marks of the job, of which a link goes itself; so do the next
        ("os.remove", "slurm/job.py", "_remove_stale"),
        ("os.remove", "slurm/requeue.py", "put_back"),
        ("os.rename", "slurm/snapshot.py", "_replace"),  # a link itself, not what it leads to
        ("shutil.rmtree", "slurm/snapshot.py", "_replace"),  # does not follow a link
    }
