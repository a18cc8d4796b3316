"""`python -m slurm` without a cluster: its output, refusals and imports."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest

from dist_train.rundir import events
from dist_train.rundir.listing import duration
from pipelines.errors import UserError
from slurm.cluster import Entry
from slurm.options import minutes
from slurm.packing import submit_pack
from slurm.script import TEARDOWN
from slurm.site import SiteFile
from slurm.submissions import SubmittedRun
from slurm.table import row
from tests.helpers.compare import status
from tests.helpers.launch import alive, children
from tests.slurm.conftest import User, job_of
from tests.slurm.private_cluster import wait_for

GOLDEN = """\
#!/bin/bash

# Parameters
#SBATCH --account=vision                # typed
#SBATCH --comment='a b'                 # typed
#SBATCH --cpus-per-task=6               # typed
#SBATCH --exclude=n7                    # typed
#SBATCH --gpus-per-node=8               # typed
#SBATCH --job-name='été 1'              # submit
#SBATCH --mem=200G                      # typed
#SBATCH --nodes=4                       # typed
#SBATCH --ntasks-per-node=8             # typed
#SBATCH --open-mode=append              # submit
#SBATCH --output='{home}/runs/été 1/slurm/%j_0_log.out' # submit
#SBATCH --partition=gpu                 # typed
#SBATCH --requeue                       # submit
#SBATCH --signal=USR2@120               # default
#SBATCH --time=720                      # typed

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output '{home}/runs/été 1/slurm/%j_%t_log.out' --kill-on-bad-exit=1 --open-mode=append \
--cpus-per-task=6 {python} -u '{home}/runs/été 1/code/slurm/entry.py' '{home}/runs/été 1/slurm'


# teardown
code=$?
lasted=$((SECONDS + 2))  # at most
job=${{SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}${{SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}}
cd '{home}/runs/été 1/slurm' || exit $code
if [ $code -ne 0 ]; then
  rm "$job".started 2>/dev/null && reached=1
  # Only a crash: not an end that Slurm is already bringing about, nor one that was requested; 2 is a refusal.
  if [ -n "$(squeue --noheader --jobs="$job" --states=RUNNING)" ] &&
      {{ [ ! -e "$job".over ] || [ $code -eq 2 ]; }}; then
    # The last error of each rank; a stop signal before the first step is none.
    said=$(find . -name "${{job}}_*_log.out" -newermt "-$lasted seconds" -exec awk '
      /Starting with JobEnvironment/ {{ said[FILENAME] = "" }}
      /Error(:|$)|error:|stopped before the first step/ && !/Exited with|CANCELLED/ {{ said[FILENAME] = $0 }}
      END {{ for (file in said) print said[file] }}' {{}} + | grep .)
    error=$(grep -v -e 'stopped before the first step' -e 'Terminated$' <<< "$said" | tail -n 1)
    [ -n "$error" ] || [ -z "$said" ] && echo "$(date +%s.%N) $lasted $code $error" > "$job".crash
    [ -n "$reached" ] && [ ! -e "$job".over ] && scontrol requeue "$job"  # if it had reached the trainer
  fi
fi
exit $code
"""
ASKED = "--nodes=4 --gpus-per-node=8 --time=12:00:00 --partition=gpu --account=vision --cpus-per-gpu=6 --mem=200G"


def submitted(run: Path) -> Path:
    """Makes a run submitted as job 12. Returns the folder of its Slurm files."""
    folder = run / "slurm"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("train: {epochs: 90}")
    submission = {"job": "12", "folder": str(folder), "tasks": 1, "local": False, "parameters": {}}
    (folder / "job.json").write_text(json.dumps(submission))
    return folder


def state(run: Path, in_queue: str = "") -> str:
    """The state `status` shows for a run whose job has this state in the queue, or is not in it."""
    return row(SubmittedRun(run), Entry(in_queue) if in_queue else None, time.time())["STATE"]


@pytest.fixture
def outsider(tmp_path: Path, shard_sets: Path) -> User:
    """On a machine without Slurm."""
    user = User(tmp_path, None, shard_sets)
    user.environment["PATH"] = str(Path(sys.executable).parent)
    return user


@pytest.mark.integration
def test_the_sbatch_script(outsider: User) -> None:
    words = [*ASKED.split(), "--exclude=n7", "--comment=a b", "--run.name=été 1", "--train.global_batch=32"]
    said = outsider.slurm("submit", "--dry-run", *outsider.training, *words)
    assert said == GOLDEN.format(home=outsider.home, python=sys.executable)
    assert not list(outsider.home.iterdir()), "a dry run writes nothing"


@pytest.mark.integration
def test_what_goes_to_the_trainer_takes_its_value_with_it(outsider: User) -> None:
    words = ["--time=30", *outsider.training, "--run.name", "x", "--optim", '{"lr": 0.5}', "--config", "small.yaml"]
    (outsider.home / "small.yaml").write_text("train: {device: cpu}")
    assert "#SBATCH --job-name=x" in outsider.slurm("submit", "--dry-run", *words)


def test_a_pack_that_would_be_refused_is_not_submitted(image_folder: Path, tmp_path: Path) -> None:
    """Otherwise a task would report it after hours in the queue."""
    photographs = image_folder / "train"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    for source, directory, complaint in (
        (image_folder, tmp_path / "set", "look like splits and not like classes: pack"),
        (photographs, tmp_path / "mine", "holds thesis.tex, which `pack` did not make: pack into an empty or a new"),
        (photographs, photographs / "set", "lies in .*, whose folders are the classes"),
        (tmp_path / "nowhere", tmp_path / "set", "nowhere is not a folder: give the one whose sub-folders are the"),
    ):
        options = Namespace(
            first=source, second=directory, more=[], shorter_side=None, quality=90, shard_mb=64.0, seed=0
        )
        options.keep_small, options.devkit = False, None
        with pytest.raises(UserError, match=complaint):
            submit_pack(options, SiteFile())
        assert not (directory / "slurm").exists()


@pytest.mark.integration
@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--optim.lrr=1"], "unknown configuration key optim.lrr: did you mean optim.lr?"),
        (["--optim.name=adm"], "optim.name adm is unknown: did you mean adam?"),
        (["--schedule.name=own_schedul:Mine"], "there is no module own_schedul in /"),
        (["--gpus-per-nod=2"], "unknown option --gpus-per-nod: did you mean --gpus-per-node?"),
        (["--nodes=9", "--gpus-per-node=3"], "train.global_batch 24 is smaller than ranks (27)"),
        (["--data.train=nowhere", "--data.source="], "nowhere`, which does not exist yet in /"),
        (["--train.global_batch=1000"], "larger than the 240 images"),
        (["--run.name=100%"], "contains '%', which Slurm replaces in file names: choose another name"),
        (["--time=1", "--signal-before=60"], "--signal-before 60 s leaves nothing of --time"),
        (["--local", "--nodes=2"], "--local has one node"),
        (["--local", "--chain=2"], "--local has no time limit that a chain would be needed for"),
        (["--local", "--dry-run"], "--local has no sbatch script to print"),
        (["--array=sweep.txt", "--chain=2"], "--chain is for one run: submit each line of --array by itself"),
        (["--at-once=2"], "--at-once is for the runs of a sweep"),
        ([], "there is no sbatch here: use a node of the cluster, or --local"),
    ],
)
def test_what_is_refused_before_it_is_submitted(outsider: User, words: list[str], complaint: str) -> None:
    error = outsider.slurm("submit", "--time=30", *outsider.training, "--run.name=x", *words, code=2)
    assert complaint in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1, "one sentence"


@pytest.mark.integration
@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (b"--optim.lr 'x  # unclosed", "sweep.txt: No closing quotation in the line"),
        (b"--optim.lr 1 # \xff", "is not a text file in UTF-8"),
        (b"# nothing\n", "is empty: write one line of overrides per run"),
    ],
)
def test_a_damaged_sweep_is_one_sentence(outsider: User, text: bytes, complaint: str) -> None:
    (outsider.home / "sweep.txt").write_bytes(text)
    error = outsider.slurm("submit", "--time=30", "--array=sweep.txt", *outsider.training, "--run.name=x", code=2)
    assert complaint in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1, "one sentence"


@pytest.mark.integration
def test_other_verbs_name_what_they_miss(outsider: User) -> None:
    assert outsider.slurm("status") == "no submitted runs under runs/\n"
    assert "--time is missing: type --time 12:00:00, the time limit of one start" in outsider.slurm("submit", code=2)
    for verb in ("logs", "cancel", "requeue", "status"):
        assert "no submitted run 'nobody'" in outsider.slurm(verb, "nobody", code=2)


@pytest.mark.integration
def test_a_run_of_a_sweep_by_its_number(outsider: User) -> None:
    for name in ("lr/0-optim.lr=0.01", "lr/2-optim.lr=0.03", "lr/10-optim.lr=0.1", "10-plain"):
        submitted(outsider.run(name))
    table = outsider.slurm("status", "lr").splitlines()[1:]
    assert [line.split()[0] for line in table] == ["lr/0-optim.lr=0.01", "lr/2-optim.lr=0.03", "lr/10-optim.lr=0.1"]
    for text in ("lr/10", "runs/lr/10", f"{outsider.run('lr')}/10", "lr/10-optim.lr=0.1"):
        (line,) = outsider.slurm("status", text).splitlines()[1:]
        assert line.startswith("lr/10-optim.lr=0.1 ")
    said = outsider.slurm("logs", "lr/3", code=2)
    assert said == "error: lr has no run 3: its 3 runs are numbered 0 to 10\n"
    assert "no submitted run '10'" in outsider.slurm("logs", "10", code=2), "runs/ is no sweep"


@pytest.mark.integration
def test_a_sweep_may_run_few_at_a_time(outsider: User) -> None:
    (outsider.home / "sweep.txt").write_text("--optim.lr 0.01\n--optim.lr 0.02\n--optim.lr 0.03\n")
    words = ("--array=sweep.txt", "--time=30", "--dry-run", *outsider.training)
    assert "#SBATCH --array=0-2%3 " in outsider.slurm("submit", *words)
    assert "#SBATCH --array=0-2%2 " in outsider.slurm("submit", *words, "--at-once=2")


def test_a_cancelled_run_is_called_so(tmp_path: Path) -> None:
    folder = submitted(tmp_path)
    (tmp_path / "status.json").write_text(json.dumps({"state": "stopped", "heartbeat": time.time()}))
    (folder / "12.over").touch()  # as a refused start leaves it
    assert state(tmp_path) == "stopped"
    SubmittedRun(tmp_path).last.cancel()
    assert (state(tmp_path), state(tmp_path, "RUNNING")) == ("cancelled", "stopped")
    (tmp_path / "status.json").write_text(json.dumps({"state": "done", "heartbeat": time.time()}))
    assert state(tmp_path) == "done"


@pytest.mark.integration
def test_the_sbatch_script_of_a_chain(outsider: User) -> None:
    words = ["--chain=3", "--run.name=été 1", "--time=30", *outsider.training]
    script = outsider.slurm("submit", "--dry-run", *words)
    assert "scontrol" not in script
    assert "#SBATCH --requeue" not in script
    options = {line.split()[1] for line in script.splitlines() if line.startswith("#SBATCH ")}
    assert {"--no-requeue", "--dependency=singleton"} <= options
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    (outsider.home / "other").mkdir()
    names = [script]
    outsider.home /= "other"
    names += [outsider.slurm("submit", "--dry-run", *words)]
    here, there = (re.findall("--job-name='été 1-(.+)'", name) for name in names)
    assert here != there, "a run of the same name elsewhere is another chain"


@pytest.mark.integration
def test_torch_is_not_imported_until_the_job_runs(outsider: User) -> None:
    program = "import sys, slurm.__main__ as m; m.main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    for words in (
        ["submit", "--dry-run", "--time=9", *outsider.training],
        ["status"],
        ["submit", "--time=9", "--x.y=1"],
    ):
        command = [sys.executable, "-c", program, *words]
        assert not subprocess.run(command, cwd=outsider.home, env=outsider.environment, check=False).returncode, words
    assert "requeue" in outsider.slurm("--help")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90", 90), ("90:01", 91), ("12:00:00", 720), ("0:30", 1), ("2-12", 3600), ("1-0:5", 1445), ("1-1:1:1", 1502)],
)
def test_times_as_slurm_writes_them(text: str, expected: int) -> None:
    assert minutes(text) == expected


def test_durations() -> None:
    assert [duration(s) for s in (0.4, 119, 120, 7199, 7200, 200000)] == [
        "0 s",
        "119 s",
        "2 min",
        "119 min",
        "2 h",
        "2 d",
    ]


@pytest.mark.integration
def test_a_silent_run_is_not_running(outsider: User) -> None:
    """Nor is one that Slurm does not know; there is neither sacct nor squeue here."""
    for name, age in (("silent", 720), ("lost", 5)):
        folder = submitted(outsider.run(name))
        (folder / "starts.jsonl").write_text('{"submitted": "12"}\n' + '{"start": "12"}\n' * 3)
        body = {"state": "running", "reason": "", "step": 17, "epoch": 3, "heartbeat": time.time() - age}
        (folder.parent / "status.json").write_text(json.dumps(body))
        lines = [
            {"kind": "step", "step": 16, "images_per_s": 812.3},
            {"kind": "validation", "step": 16, "top1_error": 0.4071},
        ]
        (folder.parent / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    head, silent, lost = outsider.slurm("status").splitlines()
    assert head.split()[:5] == ["RUN", "JOB", "SLURM", "STATE", "EPOCH"]
    assert "silent for 12 min" in silent
    assert "running, but not in the queue" in lost
    for line in (silent, lost):
        cells = line.split("  ")
        assert {"12", "3/90", "812", "40.7%", "2"} <= {cell.strip() for cell in cells}


@pytest.mark.parametrize(
    ("in_queue", "age", "expected"),
    [
        ("RUNNING", 5, "starting: torch is imported"),
        ("PENDING", 5, "interrupted"),
        ("RUNNING", 720, "silent for 12 min (starting: torch is imported)"),
        ("", 5, "starting, but not in the queue"),
    ],
)
def test_a_start_says_what_it_waits_for(tmp_path: Path, in_queue: str, age: float, expected: str) -> None:
    submitted(tmp_path)
    body = {"state": "starting", "reason": "torch is imported", "heartbeat": time.time() - age}
    (tmp_path / "status.json").write_text(json.dumps(body))
    assert state(tmp_path, in_queue) == expected


NO_PYTHON = "slurmstepd: error: execve(): /env/bin/python: No such file or directory"
BEGUN = "submitit INFO (2026-11-26 11:03:11,490) - Starting with JobEnvironment(job_id=12)"
STOPPED = f"{BEGUN}\nrank 0: stopped before the first step; there is no checkpoint yet"
SRUN = "srun: error: node1: task 0: Exited with exit code 1"


@pytest.mark.parametrize(
    ("before", "code", "log", "over", "expected"),
    [
        ("stopped 90", 127, f"{NO_PYTHON}\n{SRUN}", False, f"failed: exit code 127: {NO_PYTHON}"),
        ("", 1, f"{BEGUN}\nModuleNotFoundError: no slurm\n{SRUN}", False, "failed: exit code 1: ModuleNotFoundError: "),
        ("running 90", 137, f"KeyError: 'old'\n{BEGUN}\n{SRUN}", False, "failed: exit code 137: see the log"),
        ("failed 0", 1, f"{BEGUN}\nKeyError: 'a'\n{SRUN}", False, "failed: told by Python"),
        ("starting 0", 137, f"{BEGUN}\nMemoryError\n{SRUN}", False, "failed: exit code 137: MemoryError"),
        ("stopped 90", 1, f"{STOPPED}\n{SRUN}", False, "stopped"),
        ("stopped 90", 1, f"{BEGUN}\nKeyError: 'a'\n{SRUN}", True, "stopped"),  # cancelled
        ("stopped 90", 2, f"{BEGUN}\nerror: unknown key\n{SRUN}", True, "failed: exit code 2: error: unknown key"),
    ],
)
def test_the_batch_script_tells_what_the_start_could_not(
    tmp_path: Path, before: str, code: int, log: str, over: bool, expected: str
) -> None:
    """`before`: the state in status.json, and how many seconds ago it was written."""
    folder = submitted(tmp_path / "run")
    if before:
        told, age = before.split()
        body = {"state": told, "reason": "told by Python", "heartbeat": time.time() - int(age)}
        (tmp_path / "run" / "status.json").write_text(json.dumps(body))
    for name in ("12.started", *(["12.over"] if over else [])):
        (folder / name).touch()
    (folder / "12_0_log.out").write_text(log + "\n")
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in (("squeue", "echo 12"), ("scontrol", f"echo $* > '{tmp_path}/asked'")):
        (commands / name).write_text(f"#!/bin/sh\n{text}\n")
        (commands / name).chmod(0o755)
    script = f"(exit {code})\n{TEARDOWN.replace('FOLDER', str(folder))}"
    variables = {"PATH": f"{commands}:/usr/bin:/bin", "SLURM_JOB_ID": "12"}
    assert subprocess.run(["bash", "-c", script], env=variables, check=False).returncode == code
    assert state(tmp_path / "run", "PENDING").startswith(expected)
    assert (tmp_path / "asked").exists() != over, "a crash comes back, and nothing else"


@pytest.mark.integration
@pytest.mark.slow
def test_a_local_run_stops_and_comes_back(outsider: User) -> None:
    """The same job in processes of this machine."""
    words = ("--local", "--gpus-per-node=2", "--time=30", "--run.name=local", "--train.device=cpu")
    job = job_of(outsider.slurm("submit", *words, *outsider.training))
    process = outsider.freeze("local", job, rank=1)
    cancelling = outsider.start("cancel", "local")
    outsider.thaw(process, signal.SIGTERM)
    said, _ = cancelling.communicate(timeout=60)
    assert outsider.newest("local") in said
    assert status(outsider.run("local"))["state"] == "stopped"
    outsider.slurm("requeue", "local")
    log = outsider.slurm("logs", "local", "--follow")
    assert "continuing from step-" in log
    assert status(outsider.run("local"))["state"] == "done"
    told = events.read(outsider.run("local"))
    assert [event["event"] for event in told] == ["start", "end", "start", "end"]
    assert (told[0]["job"], told[1]["state"], told[1]["requeued"]) == (job, "stopped", False)  # cancelled


@pytest.mark.integration
def test_a_local_run_ends_with_its_controller(outsider: User) -> None:
    words = ("--local", "--gpus-per-node=2", "--time=30", "--run.name=local", "--train.device=cpu")
    controller = int(job_of(outsider.slurm("submit", *words, *outsider.training)))
    wait_for(lambda: len(children(controller)) == 2, 30, "two ranks", every=0.01)
    ranks = children(controller)
    os.kill(controller, signal.SIGKILL)
    wait_for(lambda: not any(map(alive, ranks)), 5, "the ranks to leave")


def test_what_a_later_program_has_written_is_read(tmp_path: Path) -> None:
    """By the copy of the code that a run keeps."""
    file = submitted(tmp_path) / "job.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"fresh": 1}))
    assert SubmittedRun(tmp_path).last.job == "12"
