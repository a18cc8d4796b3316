"""The code of a run: its jobs import a copy that was made when it was submitted, and nothing else imports that copy."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from submitit.helpers import DelayedSubmission

from dist_train import code
from dist_train.config import Config
from dist_train.rundir import events
from slurm import receipts, snapshot
from slurm.job import Job
from slurm.submissions import SlurmError, Submission, SubmittedRun
from tests.helpers.compare import status
from tests.slurm.conftest import REPOSITORY, User, job_of
from tests.slurm.private_cluster import wait_for

OLD = REPOSITORY / "tests" / "fixtures" / "old"
BROKEN = "raise RuntimeError('edited after the submission')\n"


def checkout(place: Path) -> Path:
    """A copy of what is in the repository, and a net of the user's own, in two modules."""
    for name in (*code.PACKAGES, "configs"):
        shutil.copytree(REPOSITORY / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
    (place / "my_nets.py").write_text("import json, numpy\nimport my_layers as layers\n\nmake = layers.make\n")
    (place / "my_layers.py").write_text("def make(): ...\n")
    return place


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout that this process seems to run; the current directory."""
    place = checkout(tmp_path / "checkout")
    monkeypatch.setattr(code, "ROOT", place)
    monkeypatch.syspath_prepend(str(place))
    monkeypatch.chdir(place)
    return place


def taken(top: Path, net: str = "my_nets:make", optimizer: str = "torch.optim:NAdam") -> Path:
    """The copy of the code for a run with these."""
    top.mkdir(exist_ok=True)
    config = Config()
    config = replace(config, model=replace(config.model, name=net), optim=replace(config.optim, name=optimizer))
    return snapshot.take(top, [config])


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def started(copy: Path, *task: object, before: str = "", path: str = "") -> subprocess.CompletedProcess[str]:
    """A task begun as a local job begins it, in the current directory, in which the packages lie, too.

    Args:
        before: run by Python before all else.
        path: PYTHONPATH.
    """
    folder = copy.parent / "slurm"
    folder.mkdir(exist_ok=True)
    DelayedSubmission(*task).dump(folder / f"{os.getpid()}_submitted.pkl")
    (copy.parent / "site").mkdir(exist_ok=True)
    (copy.parent / "site" / "sitecustomize.py").write_text(before)
    here = {"JOB_ID": str(os.getpid()), "NTASKS": "1", "GLOBALID": "0", "LOCALID": "0", "NNODES": "1", "NODEID": "0"}
    env = {**os.environ, "SUBMITIT_EXECUTOR": "local", **{f"SUBMITIT_LOCAL_{key}": here[key] for key in here}}
    env["PYTHONPATH"] = f"{copy.parent / 'site'}:{path}"
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    command = [sys.executable, "-u", str(copy / "slurm" / "entry.py"), str(folder)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=100, check=False)


DATA = (".sbatch", ".yaml")


def test_what_is_copied(here: Path, tmp_path: Path) -> None:
    (here / "dist_train" / "__pycache__").mkdir()
    (here / "dist_train" / "__pycache__" / "run.pyc").touch()
    (here / "dist_train" / ".#run.py").symlink_to("me@here.1234")
    git = ["git", "-c", "user.name=me", "-c", "user.email=me@here", "-C", str(here)]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *words], check=True)
    with open(here / "pipelines" / "order.py", "a") as file:
        file.write("# edited\n")
    (here / "slurm" / "new.py").touch()
    copy = taken(tmp_path / "run")
    files = {str(path.relative_to(REPOSITORY)) for name in code.PACKAGES for path in (REPOSITORY / name).rglob("*.py")}
    files |= {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "slurm").rglob("*.*") if path.suffix in DATA}
    page = (path for path in (REPOSITORY / "dist_train" / "page").rglob("*.*") if path.suffix != ".pyc")
    files |= {str(path.relative_to(REPOSITORY)) for path in page}
    files |= {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "configs").rglob("*") if path.is_file()}
    assert names(copy) - files == {"my_nets.py", "my_layers.py", "slurm/new.py", "copied.json", "changes.diff"}
    assert not files - names(copy)
    assert code.sources(copy) == code.sources(here)
    told = json.loads((copy / "copied.json").read_text())
    assert told["from"]["my_layers"] == [str(here / "my_layers.py")]
    assert told["from"]["slurm"] == [str(here / "slurm")]
    assert told["not_copied"] == ["torch"]
    assert (len(told["commit"]), told["changed"]) == (40, "yes")
    changes = (copy / "changes.diff").read_text()
    assert "\n+# edited\n" in changes
    assert "?? slurm/new.py\n" in changes


def test_a_copy_is_replaced_at_once_or_not_at_all(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = taken(tmp_path / "run")
    (here / "my_layers.py").write_text("def make(): return 2\n")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # nobody tidies up after a kill
        patch.setattr(snapshot, "new_file", lambda path: exec(f"raise KeyboardInterrupt({str(path)!r})"))
        with pytest.raises(KeyboardInterrupt):
            taken(tmp_path / "run")
    assert len(list((tmp_path / "run").iterdir())) == 2
    assert (copy / "my_layers.py").read_text() == "def make(): ...\n"
    assert taken(tmp_path / "run") == copy
    assert (copy / "my_layers.py").read_text() == "def make(): return 2\n"
    assert list((tmp_path / "run").iterdir()) == [copy], "nor is anything left of the killed one"
    snapshot.drop(tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())


def test_a_package_with_data_in_it_is_not_copied(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(snapshot, "BYTES", 1000)
    (here / "heavy").mkdir()
    (here / "heavy" / "nets.py").write_text("def make(): ...\n")
    (here / "heavy" / "images.bin").write_bytes(bytes(1001))
    copy = taken(tmp_path / "run", net="heavy.nets:make")
    assert not (copy / "heavy").exists()
    assert json.loads((copy / "copied.json").read_text())["not_copied"] == ["heavy", "torch"]
    assert "heavy is too large to be copied: a job imports what lies in" in capfd.readouterr().err


INSTALLED = """
import sys
from importlib.machinery import PathFinder

class Editable:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return PathFinder.find_spec(name, [{here!r}])

sys.meta_path.append(Editable)
"""
SHOWN = """
import dist_train.code, my_nets, my_layers, pipelines, slurm, sys
from pathlib import Path
from dist_train.ranks import beside
from pipelines.parallel import parallel
from pipelines.resolve import places

for module in (dist_train, my_nets, my_layers, pipelines, slurm):
    print("MODULE", module.__file__)
for found in parallel(places, ["pipelines"], workers=1, images=None, label="x"):
    print("MODULE", found[0])
with open("said", "wb") as file:
    beside.start("dist_train.code", [], file).wait()  # a module that prints nothing
print("RELATIVE", Path("data.txt").read_text())
print("SOURCES", dist_train.code.sources(dist_train.code.ROOT))
"""


def test_everything_comes_from_the_copy(here: Path, tmp_path: Path) -> None:
    """Though the current directory, PYTHONPATH and an editable install have other ones; data stays where it is."""
    then = code.sources(here)
    copy = taken(tmp_path / "run")
    (here / "data.txt").write_text("of the current directory")
    for module in ("dist_train/__init__", "pipelines/__init__", "slurm/__init__", "my_nets", "my_layers"):
        (here / f"{module}.py").write_text(BROKEN)
    before = snapshot.digest(copy)
    done = started(copy, exec, SHOWN, before=INSTALLED.format(here=str(here)), path=str(here))
    assert done.returncode == 0, done.stdout + done.stderr
    said = [line.split(maxsplit=1) for line in done.stdout.splitlines() if line.split()[0].isupper()]
    found = [Path(text) for key, text in said if key == "MODULE"]
    assert len(found) == 6
    assert all(path.is_relative_to(copy) for path in found), found
    assert dict(said)["RELATIVE"] == "of the current directory"
    assert dict(said)["SOURCES"] == then
    assert (here / "said").read_text() == "", "nor does a process beside it import another"
    assert snapshot.digest(copy) == before, "a job writes nothing there"


@pytest.mark.parametrize(
    ("before", "sentence"),
    [
        (
            "sys.path.insert(0, {here!r}); import dist_train",
            "dist_train is imported from {here}/dist_train and not from",
        ),
        (
            "sys.path.insert(0, {here!r}); import my_layers",
            "my_layers is imported from {here}/my_layers.py and not from",
        ),
        ("sys.path.insert(0, {here!r}); import slurm", "slurm is imported from {here}/slurm/job.py and not from"),
    ],
    ids=["dist_train", "own", "slurm"],
)
def test_a_job_whose_code_comes_from_elsewhere_refuses(here: Path, tmp_path: Path, before: str, sentence: str) -> None:
    copy = taken(tmp_path / "run")
    done = started(copy, Job(tmp_path / "run", copy), before=f"import sys; {before.format(here=str(here))}")
    assert done.returncode == 2, done.stdout + done.stderr
    sentence = sentence.format(here=here)
    assert f"error: {sentence} the copy in {copy}: see what puts it there, or submit with --live-code" in done.stderr
    if "import slurm" not in before:
        assert status(tmp_path / "run")["state"] == "failed"
        assert sentence in status(tmp_path / "run")["reason"]
        assert (tmp_path / "run" / "slurm" / f"{os.getpid()}.over").exists(), "it is not requeued"


def submitted(directory: Path) -> SubmittedRun:
    """A run that was submitted from here, and has ended."""
    run = SubmittedRun(directory)
    run.folder.mkdir(parents=True)
    run.config_file.write_text("train: {epochs: 1}\n")
    (directory / "code" / "dist_train").mkdir(parents=True)
    (directory / "code" / "dist_train" / "__init__.py").write_text("")
    run.submitted(Submission("999999", str(run.folder), 1, local=True))
    receipts.keep(run, {"time": 9, "nodes": 1, "ntasks_per_node": 1}, snapshot.digest(directory / "code"))
    return run


@pytest.mark.parametrize(
    "file", ["slurm/job.json", "slurm/config.yaml", "code/dist_train/__init__.py", "code/torch.py"]
)
def test_what_was_changed_since_is_not_requeued(tmp_path: Path, file: str) -> None:
    run = submitted(tmp_path / "run")
    receipts.check(run)
    path = tmp_path / "run" / file
    path.write_text(path.read_text().replace("999999", "999998") + "\n" if path.exists() else "")
    words = f"{file.partition('/')[0]}.* is not as you submitted it: .* `python -m slurm submit --local --config .* "
    with pytest.raises(SlurmError, match=f"{words}--run.dir {run.directory}` continues it"):
        receipts.check(run)


def test_a_strangers_run_is_not_requeued(tmp_path: Path) -> None:
    """Nor a copy of one's own in another place."""
    mine = submitted(tmp_path / "run")
    shutil.copytree(mine.directory, tmp_path / "copy")
    with pytest.raises(
        SlurmError, match=r"was not submitted by you, as far as .*: look at its configuration, then `python -m slurm"
    ):
        receipts.check(SubmittedRun(tmp_path / "copy"))


TOUCH = "import pathlib\npathlib.Path({!r}).touch()\n"


def strange(run: Path, mark: Path) -> None:
    """A copy of the code that leaves a mark when it is imported."""
    for name in (*(f"{package}/__init__" for package in code.PACKAGES), "sitecustomize", "usercustomize", "torch"):
        path = run / "code" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(TOUCH.format(str(mark)))


@pytest.mark.integration
def test_no_command_on_the_cluster_imports_the_copy(tmp_path: Path, shard_sets: Path) -> None:
    user, mark = User(tmp_path, None, shard_sets), tmp_path / "imported"
    user.environment["XDG_STATE_HOME"] = os.environ["XDG_STATE_HOME"]
    submitted(user.run("strange"))
    strange(user.run("strange"), mark)
    assert "strange" in user.slurm("status", "strange")
    user.slurm("logs", "strange", code=2)
    assert "is not as you submitted it" in user.slurm("requeue", "strange", code=2)
    assert "has ended already" in user.slurm("cancel", "strange")
    assert not mark.exists()


@pytest.mark.slow
def test_no_analysis_imports_the_copy(tmp_path: Path) -> None:
    shutil.copytree(OLD, tmp_path / "old")
    strange(tmp_path / "old" / "run", tmp_path / "imported")
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    for verb in ("evaluate", "figures"):
        words = [sys.executable, "-m", "dist_train", verb, "run", "--device=cpu"]
        done = subprocess.run(words, cwd=tmp_path / "old", env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert not (tmp_path / "imported").exists()


@pytest.mark.slow
def test_requeue_keeps_the_code_and_submit_takes_the_new(tmp_path: Path, shard_sets: Path) -> None:
    """On this machine, from a checkout that is the current directory; its home cannot be written at first."""
    user = User(checkout(tmp_path / "checkout"), None, shard_sets)
    user.environment |= {"PYTHONPATH": "", "XDG_STATE_HOME": "/proc/nowhere"}
    words = ("submit", "--local", "--gpus-per-node=0", "--time=30", "--run.name=x", *user.training)
    words += ("--train.epochs=1", "--train.max_steps=2")
    process = user.start(*words)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert "warning: no receipt could be kept (" in err
    wait_for(lambda: "outcome" in user.log("x"), 100, f"the end\n{user.log('x')}")
    then = code.sources(user.home)
    wait_for(lambda: "has ended" in user.slurm("cancel", "x"), 30, "the job to end")

    refused = user.slurm("requeue", "x", code=2)
    assert "was not submitted by you" in refused
    user.environment["XDG_STATE_HOME"] = str(tmp_path / "state")
    told = shlex.split(refused.split("`python -m slurm ")[1].split("`")[0])
    user.slurm(*told, "--gpus-per-node=0")
    wait_for(lambda: user.log("x").count("outcome") == 2, 100, "the end of what was told")
    assert "continuing from step-00000002" in user.log("x")
    wait_for(lambda: "has ended" in user.slurm("cancel", "x"), 30, "the job to end")

    with open(user.home / "dist_train" / "run.py", "a") as file:
        file.write(BROKEN)
    user.slurm("requeue", "x")
    wait_for(lambda: user.log("x").count("outcome") == 3, 100, "the end of the same code")
    sources = [event["code"]["sources"] for event in events.read(user.run("x")) if event["event"] == "start"]
    assert sources == [then, then, then]
    wait_for(lambda: "has ended" in user.slurm("cancel", "x"), 30, "the job to end")

    user.environment["XDG_STATE_HOME"] = "/proc/nowhere"
    assert job_of(user.slurm(*words))
    wait_for(lambda: "edited after the submission" in user.log("x"), 100, "the new code")
    wait_for(lambda: "has ended" in user.slurm("cancel", "x"), 30, "the job to end")
    user.environment["XDG_STATE_HOME"] = str(tmp_path / "state")
    assert "job.json is not as you submitted it" in user.slurm("requeue", "x", code=2), "the receipt is of another one"


@pytest.mark.slow
@pytest.mark.slurm
def test_a_job_in_the_queue_keeps_its_code(user: User) -> None:
    """However often it is requeued."""
    root = checkout(user.home / "checkout")
    user.environment["PYTHONPATH"] = str(root)
    then = code.sources(root)
    full = user.cluster.run("sbatch", "--parsable", "-N4", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 300")
    job = job_of(
        user.slurm("submit", "--gpus-per-node=1", "--time=30", *user.training, "--run.name=kept", "--train.epochs=1")
    )
    with open(root / "dist_train" / "run.py", "a") as file:
        file.write(BROKEN)
    user.cluster.run("scancel", full.strip())
    process = user.freeze("kept", job, rank=0)
    user.cluster.run("scontrol", "requeue", job)
    user.thaw(process, signal.SIGTERM)
    user.wait("kept", job, "done")
    starts = [event for event in events.read(user.run("kept")) if event["event"] == "start"]
    assert [event["code"]["sources"] for event in starts] == [then, then]
    assert code.sources(root) != then
    assert starts[1]["restart"] == 1
