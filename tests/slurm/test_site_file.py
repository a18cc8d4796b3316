"""The site file without a cluster: which one is taken, what it may say, what wins, and the lines that it makes."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

import slurm.__main__
from slurm import receipts
from slurm.setup import setup_lines
from slurm.site import SiteFile
from slurm.submissions import SubmittedRun
from tests.slurm.test_commands import state, submitted

SITES = Path(slurm.__main__.__file__).parent / "sites"
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path


def write(text: str, path: str = "slurm.yaml") -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text)
    Path(path).chmod(0o644)


def dry(capsys: Capture, line: str = "") -> tuple[str, str]:
    """The script of a dry run, and what is said beside it."""
    code = slurm.__main__.main(shlex.split(f"submit --dry-run --run.name x {line}"))
    out, err = capsys.readouterr()
    assert code == 0, err
    return out, err


def refused(capsys: Capture, line: str = "--time 30") -> str:
    assert slurm.__main__.main(shlex.split(f"submit --dry-run --run.name x {line}")) == 2
    out, err = capsys.readouterr()
    assert not out
    assert re.fullmatch(r"error: .*\n", err), err
    return err.removeprefix("error: ").rstrip("\n")


def test_what_is_typed_wins_and_each_line_says_where_it_is_from(capsys: Capture) -> None:
    write(
        "submit: {partition: gpu, time: 12:00:00, cpus_per_gpu: 8, nodes: 2}\nsbatch: {nice: 3, hold: true, wckey: a}"
    )
    said, told = dry(capsys, "--partition big --gpus-per-node 4 --sbatch wckey=b")
    assert told == "site: slurm.yaml\n"
    lines = dict(re.findall(r"^#SBATCH (\S+) +# (.*)$", said, re.M))
    assert lines.items() >= {
        ("--partition=big", "typed"),
        ("--time=720", "slurm.yaml"),  # no number of seconds, as YAML 1.1 would have it
        ("--cpus-per-task=8", "slurm.yaml"),
        ("--nodes=2", "slurm.yaml"),
        ("--ntasks-per-node=4", "typed"),
        ("--gpus-per-node=4", "typed"),
        ("--nice=3", "slurm.yaml"),
        ("--hold", "slurm.yaml"),
        ("--wckey=b", "typed"),
        ("--signal=USR2@120", "default"),
        ("--requeue", "submit"),
    }
    assert "--cpus-per-task=8 " in said.split("srun ")[1]
    assert subprocess.run(["bash", "-n"], input=said, text=True, check=False).returncode == 0


def test_gpus_that_are_typed_replace_those_of_the_site(capsys: Capture) -> None:
    write("submit: {time: 30, gpus-per-node: 8}\nsbatch: {gres: 'gpu:h100:8'}")
    said, _ = dry(capsys)
    assert "--gres=gpu:h100:8" in said
    assert "#SBATCH --gpus-per-node" not in said
    said, _ = dry(capsys, "--sbatch gpus=4 --gpus-per-node 4")
    assert "--gres" not in said
    assert "#SBATCH --gpus=4 " in said


def test_which_file_is_taken(capsys: Capture, home: Path) -> None:
    assert dry(capsys, "--time 30 --cpus-per-gpu 4")[1] == "", "none"
    write("submit: {time: 31}", "config/dist_train/slurm.yaml")
    assert dry(capsys)[1].splitlines()[0] == f"site: {home}/config/dist_train/slurm.yaml"
    write("submit: {time: 32}")
    said, told = dry(capsys)
    assert (told.splitlines()[0], "--time=32 " in said) == ("site: slurm.yaml", True)
    write("submit: {time: 33}", "other.yaml")
    assert "--time=33 " in dry(capsys, "--site other.yaml")[0]
    assert "--time=34 " in dry(capsys, "--site /dev/null --time 34")[0]
    assert refused(capsys, "--site nowhere.yaml").startswith("--site nowhere.yaml cannot be read (No such file")
    assert "leave --site and --sbatch out" in refused(capsys, "--local --site other.yaml --time 30")


@pytest.mark.parametrize("mode", [0o664, 0o646])
def test_a_file_that_others_may_write_is_not_taken(mode: int, capsys: Capture) -> None:
    write("setup: [rm -rf x]")
    Path("slurm.yaml").chmod(mode)
    said, told = dry(capsys, "--time 30")
    assert "rm -rf" not in said
    assert "others may write it (`chmod go-w slurm.yaml` ends that); --site slurm.yaml takes it" in told
    assert "rm -rf" in dry(capsys, "--time 30 --site slurm.yaml")[0]


def test_a_file_of_another_user_is_not_taken(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    write("setup: [rm -rf x]")
    owner = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    said, told = dry(capsys, "--time 30")
    assert "rm -rf" not in said
    assert "slurm.yaml is not taken as the site: it belongs to another user" in told


def test_a_file_in_the_directory_of_a_run_is_not_taken(
    capsys: Capture, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have come with a stranger's run, unpacked by this user."""
    write("setup: [rm -rf x]", "run/slurm.yaml")
    for name in ("config.yaml", "status.json"):
        write("{}", f"run/{name}")
    monkeypatch.chdir(home / "run")
    said, told = dry(capsys, "--time 30")
    assert "rm -rf" not in said
    assert "it lies in the directory of a run" in told


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("setpu: [x]", "unknown key setpu: did you mean setup?"),
        ("partition: x", "unknown key partition: write it under `submit:`, partition being an option of submit"),
        ("reservation: x", "unknown key reservation: write it under `sbatch:`"),
        ("zzz: x", "unknown key zzz: the keys are submit, sbatch, env, setup, srun, python"),
        ("setup: module load x", "setup must be a list, with a line `- ...` for each"),
        ("setup: [[a]]", "setup must be a list"),
        ("env: [a]", "env must be a mapping"),
        ("env: {A: [b]}", "env must be a mapping, with a line `NAME: value` for each"),
        ("env: {A-B: c}", "env: 'A-B' is no name of a variable"),
        ("python: [a]", "python must be a word or a line"),
        ('python: "a\\nb"', "python and the arguments of srun are one line each"),
        ("submit: {partion: x}", "submit: unknown option partion: did you mean partition?"),
        ("submit: {nodes: two}", "submit: argument nodes: 'two' is not a whole number"),
        ("submit: {time: soon}", "submit: argument time: 'soon' is not a time"),
        ("submit: {local: true}", "submit: unknown option local"),
        ("sbatch: {partition: x}", "partition is not for sbatch: write partition under `submit:`"),
        ("sbatch: {cpus-per-task: 3}", "cpus-per-task is not for sbatch: write cpus-per-gpu under `submit:`"),
        ("sbatch: {requeue: true}", "requeue is not for sbatch: a run is requeued until"),
        ("sbatch: {export: NONE}", "export=NONE is refused"),
        ("srun: [--output=x]", "srun: --output is submit's own: leave it out"),
        ("srun: [container]", "srun: container is no option: options begin with --"),
        ("srun: [--container-image=x]", 'srun: a container needs --container-workdir="$PWD"'),
        ("- a", "it must be a mapping with the keys submit, "),
        ("a: [", "slurm.yaml is no YAML ("),
        ("\x00", "slurm.yaml is no YAML ("),
    ],
)
def test_one_sentence_for_what_it_may_not_say(text: str, told: str, capsys: Capture) -> None:
    write(text)
    said = refused(capsys)
    assert told in said
    assert said.startswith("slurm.yaml")


def test_no_time_anywhere(capsys: Capture) -> None:
    assert refused(capsys, "") == (
        "--time is missing: type --time 12:00:00, the time limit of one start, or write it in a site file"
    )


def test_a_pack_takes_what_is_not_of_a_training(
    image_folder: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr("slurm.packing.hand_over", lambda _, wanted, tasks, local: seen.append(dict(wanted)) or ["7_0"])
    write(
        "submit: {time: 30, partition: gpu, gpus-per-node: 8, nodes: 2, cpus-per-gpu: 3}\n"
        "sbatch: {gres: 'gpu:8', reservation: x}\nsetup: [module load y]\npython: p"
    )
    words = ["submit", "pack", str(image_folder / "train"), str(home / "set"), "--tasks", "2", "--sbatch", "nice=1"]
    assert slurm.__main__.main(words) == 0
    array, last = seen
    assert (array["partition"], array["nodes"], array["ntasks_per_node"], array["cpus_per_task"]) == ("gpu", 1, 1, 3)
    assert "gpus_per_node" not in array
    assert array["additional_parameters"] == {"requeue": True, "reservation": "x", "nice": "1"}
    assert last["additional_parameters"] == {**array["additional_parameters"], "dependency": "afterany:7"}
    assert last["python"] == "p"
    assert "module load y" in last["setup"]


def test_the_receipt_keeps_what_the_script_is_made_of(
    monkeypatch: pytest.MonkeyPatch, home: Path, capsys: Capture
) -> None:
    """And a requeue takes it from there: what the run directory says may be a stranger's."""
    seen = []

    def hand_over(_: Path, wanted: dict[str, object], *__: object, **___: object) -> list[str]:
        seen.append(dict(wanted))
        return ["7"]

    monkeypatch.setattr("slurm.submit.hand_over", hand_over)
    monkeypatch.setattr("slurm.cluster.ended", lambda submission: True)
    write("submit: {time: 30}\nsbatch: {nice: 3}\nsetup: [module load y]\npython: p q\nsrun: [--mpi=none]")
    sets = "--data.source= --data.train=t --data.val=v"
    monkeypatch.setattr("slurm.submit.open_sets", lambda config, **_: None)
    monkeypatch.setattr("slurm.submit.check_tars", lambda sets: None)
    assert slurm.__main__.main(shlex.split(f"submit --run.name x {sets}")) == 0, capsys.readouterr()
    run = SubmittedRun((home / "runs" / "x").absolute())
    assert receipts.check(run).wanted == seen[0]
    Path("slurm.yaml").unlink()
    said = json.loads(run.job_file.read_text())
    assert said.keys() == {"job", "folder", "tasks", "local", "chain"}
    shell = {"setup": ["rm -rf z"], "teardown": ["rm -rf z"], "python": "z", "srun": "z", "srun_args": ["z"]}
    run.job_file.write_text(json.dumps(said | {"parameters": shell | {"additional_parameters": {"bcast": "z"}}}))
    assert slurm.__main__.main(["requeue", "x"]) == 0, capsys.readouterr()
    assert seen[1] == seen[0]
    assert slurm.__main__.main(["requeue", "x", "--exclude=n7"]) == 0, capsys.readouterr()
    assert seen[2] == seen[0] | {"exclude": "n7"}
    assert receipts.check(run).parameters.exclude == "n7"
    assert slurm.__main__.main(["requeue", "x", "--trust"]) == 2
    assert "unknown option --trust" in capsys.readouterr().err
    run.job_file.write_text(json.dumps(said | {"job": "8"}))
    assert slurm.__main__.main(["requeue", "x"]) == 2
    assert f"{run.job_file} is not as you submitted it" in capsys.readouterr().err


def ended(script: str, run: Path) -> tuple[int, str]:
    """Exit code and log of a script in the place of job 12 of a run."""
    commands = run.parent / "bin"
    commands.mkdir(exist_ok=True)
    (commands / "squeue").write_text("#!/bin/sh\necho RUNNING\n")
    (commands / "squeue").chmod(0o755)
    log = run / "slurm" / "12_0_log.out"
    variables = {"PATH": f"{commands}:/usr/bin:/bin", "SLURM_JOB_ID": "12", "HOME": "/home/me"}
    with open(log, "a") as file:
        code = subprocess.run(
            ["bash"], input=script, text=True, env=variables, stdout=file, stderr=file, check=False
        ).returncode
    return code, log.read_text()


def of_site(text: str, run: Path) -> str:
    return "\n".join(setup_lines(SiteFile("slurm.yaml", **yaml.load(text, yaml.BaseLoader)), run / "slurm"))


def test_variables_and_setup_reach_the_job_and_the_directory_stays(tmp_path: Path) -> None:
    submitted(tmp_path / "run")
    text = """
env: {ONE: $HOME/x, TWO: 'a "b" `c` \\d', THREE: "on"}
setup:
  - export FOUR=$ONE/y
  - |
    for n in 5 6; do
      export FIVE=$n   # END
    done
    cat <<'END'
    of a document
    END
    cd /
  - set -eu
  - |
    f() { false; }
    f || declare -x SIX=6; echo $UNSET
    case $FIVE in 6) ;; esac
"""
    shown = 'echo "$ONE|$TWO|$THREE|$FOUR|$FIVE|$SIX|$PWD|$-"'
    code, log = ended(f"cd {tmp_path}\n{of_site(text, tmp_path / 'run')}\nfalse\n{shown}\nexit 3", tmp_path / "run")
    told = f'/home/me/x|a "b" `c` \\d|on|/home/me/x/y|6|6|{tmp_path}|'
    *_, last = log.splitlines()
    assert last.startswith(told), log
    assert not set("eu") & set(last.removeprefix(told)), "set -e and -u are off"
    assert code == 3
    assert state(tmp_path / "run") == "not started"


@pytest.mark.parametrize(
    ("line", "code", "told"),
    [
        ("module load cudaa", 127, "line 2 of setup in slurm.yaml, module load cudaa: .*module: command not found"),
        ("ls /no/such", 2, "line 2 of setup in slurm.yaml, ls /no/such: .*No such file or directory"),
        ("echo well; echo Error: is up; echo bye; false", 1, ".*: Error: is up"),
        ("exit 7", 7, "line 2 of setup in slurm.yaml, exit 7: it printed nothing"),
        ("exit", 1, "line 2 of setup in slurm.yaml, exit: it printed nothing"),
        ("if true; then", 2, ".*syntax error: unexpected end of file"),
        ("'", 2, ".*unexpected EOF while looking for matching"),
        ("|\n    set -e\n    false\n    echo on", 1, "line 2 of setup in slurm.yaml, set -e ...: it printed nothing"),
        ("set -u; echo $NOT_SET", 1, ".*NOT_SET: unbound variable"),
        ("echo Error in line 1 >&2; exec 2>&1; (exit 4)", 4, ".*: Error in line 1"),
    ],
)
def test_a_line_that_fails_ends_the_job_and_is_told(line: str, code: int, told: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    folder = submitted(run)
    (folder / "12_0_log.out").write_text("KeyError: of the start before\n")
    (folder / "12.started").touch()
    text = f"setup:\n  - echo Error, which was before\n  - {line if line[0] == '|' else yaml.dump(line)[:-1]}\n"
    text = text.replace("\n...\n", "\n")
    found, log = ended(f"{of_site(text, run)}\necho reached", run)
    assert found == code, log
    assert "\nreached" not in log
    assert "error: line 2 of setup in slurm.yaml" in log
    assert re.fullmatch(f"failed: exit code {code}: {told}.*", state(run)), state(run)
    assert not (folder / "12.started").exists(), "nothing that a later start could take for its own"


def test_a_line_that_ends_with_the_job_is_no_failure(tmp_path: Path) -> None:
    folder = submitted(tmp_path / "run")
    (folder / "12.over").touch()
    ended(of_site("setup: ['false']", tmp_path / "run"), tmp_path / "run")
    assert state(tmp_path / "run") == "not started", "it was cancelled"


@pytest.mark.parametrize("site", sorted(SITES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_examples(site: Path, capsys: Capture) -> None:
    said, _ = dry(capsys, f"--site '{site}' --gpus-per-node 8")
    assert subprocess.run(["bash", "-n"], input=said, text=True, check=False).returncode == 0
    assert "--partition=" in said
    wanted = {
        "plain": "~/venv/bin/python -u",
        "modules-apptainer": '--pwd "$PWD"',
        "pyxis": '--container-workdir="$PWD"',
    }
    assert wanted[site.stem] in said.split("\nsrun ")[1]
