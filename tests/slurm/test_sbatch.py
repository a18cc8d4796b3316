"""Any option of sbatch: `--sbatch KEY=VALUE`, what is refused, and what is answered to one that is typed without it."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

import slurm.__main__
from slurm import sbatch
from tests.slurm.private_cluster import missing

# Added after Slurm 22.05, which is Debian's.
LATER = {"container-id", "extra", "oom-kill-step", "segment", "stepmgr", "tres-bind", "tres-per-task"}


def answer(line: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What `submit` says to a command line that it refuses."""
    assert slurm.__main__.main(shlex.split(f"submit --time 30 {line}")) == 2
    out, err = capsys.readouterr()
    assert not out
    assert re.fullmatch(r"error: .*\n", err), err
    return err.removeprefix("error: ").rstrip("\n")


def script(line: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The script of a dry run, without its remarks."""
    assert slurm.__main__.main(shlex.split(f"submit --time 30 --dry-run --run.name x {line}")) == 0
    return re.sub(" +# [a-z]+$", "", capsys.readouterr().out, flags=re.M)


@pytest.fixture(autouse=True)
def _no_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "none"))


@pytest.mark.skipif(bool(missing()), reason="no sbatch")
def test_the_names_are_those_of_sbatch(tmp_path: Path) -> None:
    (tmp_path / "slurm.conf").write_text("ClusterName=x\nSlurmctldHost=localhost\n")
    (tmp_path / "job").write_text("no script\n")  # refused once the options are read
    environment = {**os.environ, "SLURM_CONF": str(tmp_path / "slurm.conf")}

    def said(*words: str) -> str:
        done = subprocess.run(
            ["sbatch", *words], env=environment, capture_output=True, text=True, check=False, timeout=60
        )
        return done.stdout + done.stderr

    helped = re.findall(r"^ +(?:-(\w),? +)?--([a-z-]+)(\[?=)?", said("--help"), re.M)
    assert len(helped) > 80
    # The help has no = in lines that are short of room, and brackets where getopt wants a value.
    odd = {"export": "=", "get-user-env": "?", "no-kill": "?", "container": "=", "wrap": "=", "mem": "="}
    kinds = {"": "", "=": "=", "[=": "?"}
    theirs = {name: (short, odd.get(name, kinds[kind])) for short, name, kind in helped}
    assert {name: sbatch.NAMES.get(name) for name in theirs} == theirs
    for name in sbatch.NAMES.keys() - theirs.keys() - LATER:
        assert "unrecognized option" not in said(f"--{name}", str(tmp_path / "job")), name
    assert "unrecognized option" in said("--walltime", "1", str(tmp_path / "job"))


def test_what_we_own_exists() -> None:
    assert sbatch.OWNED.keys() | set(sbatch.GPUS) <= sbatch.NAMES.keys()


def test_any_option_becomes_a_line_of_the_script(capsys: pytest.CaptureFixture[str]) -> None:
    said = script("--sbatch reservation=x --sbatch exclusive --sbatch mail_user='a b#c' --sbatch future=1", capsys)
    lines = ("--reservation=x", "--exclusive", "--mail-user='a b#c'", "--future=1", "--gpus-per-node=1", "--requeue")
    for line in lines:
        assert f"\n#SBATCH {line}\n" in said
    assert "#SBATCH --wckey=x" in script("--sbatch wckey=x", capsys)


@pytest.mark.parametrize(
    ("line", "present", "tasks"),
    [
        ("--gpus-per-node 8 --sbatch gres=gpu:h100:8", "--gres=gpu:h100:8", 8),
        ("--gpus-per-node 8 --sbatch gres=gpu:h100:8(S:0-1),disk:1T", "--gres='gpu:h100:8(S:0-1),disk:1T'", 8),
        ("--gpus-per-node 4 --nodes 2 --sbatch gpus=h100:8", "--gpus=h100:8", 4),
        ("--gpus-per-node 4 --sbatch gpus-per-task=1", "--gpus-per-task=1", 4),
        ("--gpus-per-node 4 --sbatch gpus-per-node=a100:4", "--gpus-per-node=a100:4", 4),
        ("--sbatch gres=gpu", "--gres=gpu", 1),
    ],
)
def test_gpus_asked_for_in_another_way_replace_ours(
    line: str, present: str, tasks: int, capsys: pytest.CaptureFixture[str]
) -> None:
    said = script(line, capsys)
    assert re.findall("#SBATCH (--(?:gres|gpus).*)", said) == [present]
    assert f"#SBATCH --ntasks-per-node={tasks}\n" in said


def test_other_resources_do_not_replace_ours(capsys: pytest.CaptureFixture[str]) -> None:
    said = script("--gpus-per-node 2 --sbatch gres=disk:1T --sbatch gpu-bind=none", capsys)
    assert "#SBATCH --gpus-per-node=2\n" in said


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("requeue", "requeue is not for sbatch: a run is requeued until it is done or cancelled"),
        ("no-requeue", "a run is requeued until it is done or cancelled"),
        ("signal=USR1@60", "signal is not for sbatch: here it is --signal-before"),
        ("output=x", "the logs lie in the run directory, `python -m slurm logs RUN` reads them"),
        ("e=x", "error is not for sbatch: the logs lie"),
        ("open-mode=truncate", "the logs lie"),
        ("array=0-3", "here it is --array FILE, a sweep"),
        ("job-name=x", "here it is --run.name"),
        ("nodes=3", "here it is --nodes"),
        ("ntasks=3", "there is one task per GPU"),
        ("ntasks-per-gpu=3", "there is one task per GPU"),
        ("tasks-per-node=3", "there is one task per GPU"),
        ("time=30", "here it is --time"),
        ("p=x", "partition is not for sbatch: here it is --partition"),
        ("cpus-per-task=3", "here it is --cpus-per-gpu"),
        ("wrap=x", "the script is written here"),
        ("parsable", "it asks sbatch for no resources"),
        ("chdir=/", "a job works in the directory where it is submitted"),
        ("export=NONE", "export=NONE is refused: a job needs the variables of the shell that submits it"),
        ("export=A=1,B", "is refused"),
        ("reque", "reque is no option of sbatch: did you mean requeue?"),  # sbatch would take it
        ("'reservation=a\nrm -rf x'", "more than one line"),
        ("'a b=c'", "'a b' is no option of sbatch: write KEY=VALUE"),
        ("reservation=", "has no value: write"),
        ("reservation", "reservation needs a value: write reservation=VALUE"),
        ("hold=1", "hold is a flag of sbatch and takes no value"),
        ("gres=gpu:h100:8", "gres=gpu:h100:8 asks for 8 GPUs where 1 of the tasks run"),
        ("gpus-per-task=2", "gpus-per-task=2 asks for 2 GPUs"),
    ],
)
def test_what_is_refused_with_the_reason(line: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert told in answer(f"--sbatch {line}", capsys)


def test_what_may_be_exported(capsys: pytest.CaptureFixture[str]) -> None:
    assert "#SBATCH --export=ALL,A=1\n" in script("--sbatch export=ALL,A=1", capsys)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("--reservation x", "unknown option --reservation: type `--sbatch reservation=x`"),
        ("--gres=gpu:8", "`--sbatch gres=gpu:8` beside it replaces what sbatch is asked for"),
        ("--mail-type END", "type `--sbatch mail-type=END`"),
        ("--mail-user 'a b'", "type `--sbatch 'mail-user=a b'`"),
        ("-p part", "unknown option -p: here it is --partition part"),
        ("-N4", "here it is --nodes 4"),
        ("-A x", "here it is --account x"),
        ("-t 1:00", "here it is --time 1:00"),
        ("-H", "type `--sbatch hold`"),
        ("-L matlab:1", "type `--sbatch licenses=matlab:1`"),
        ("--exclusive", "type `--sbatch exclusive`"),
        ("--exclusive=user", "type `--sbatch exclusive=user`"),
        ("--reservation --sbatch exclusive", "type `--sbatch reservation=VALUE`"),
        ("--nodelist n[1-3]", "type `--sbatch 'nodelist=n[1-3]'`"),
        ("--requeue", "a run is requeued until it is done or cancelled"),
        ("--export NONE", "a job needs the variables of the shell that submits it"),
        ("--job-name x", "here it is --run.name"),
        ("--lr 3", "here it is --optim.lr"),
        ("-lr 3", "here it is --optim.lr"),
        ("--batch 3", "here it is --train.global_batch"),
    ],
)
def test_an_option_of_sbatch_without_it(line: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert told in answer(line, capsys)


def test_every_name_is_answered(capsys: pytest.CaptureFixture[str]) -> None:
    """None with the nearest option of a training."""
    ours = {"export", "array", "nodes", "gpus-per-node", "cpus-per-gpu", "time", "help"}
    for name in sbatch.NAMES.keys() - ours - {"batch"}:
        if name in ("partition", "account", "qos", "constraint", "exclude", "mem", "comment"):
            continue
        said = answer(f"--{name}=x", capsys)
        assert "did you mean" not in said, said
        assert re.search(f"--sbatch {name}=x|{re.escape(sbatch.OWNED.get(name, '-'))}", said), said
