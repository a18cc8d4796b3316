"""From a command line to submitted jobs: checks, submitit's parameters, submission."""

from __future__ import annotations

import os
import re
import shlex
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from submitit import LocalExecutor, SlurmExecutor
from submitit.core.utils import FailedJobError
from submitit.helpers import clean_env

from dist_train.cli import checked, default_name, overrides_of, parse
from dist_train.config import Config
from dist_train.data import check_batch, check_tars, open_sets, to_pack
from dist_train.flat import dump
from pipelines.files import read_text, write_atomically
from pipelines.misc import ceil_div
from pipelines.speech import flush
from slurm.cluster import entry
from slurm.job import Job
from slurm.submissions import SlurmError, Submission, SubmittedRun

TEARDOWN = """\
code=$?
lasted=$((SECONDS + 2))  # at most
job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
cd FOLDER || exit $code
if [ $code -ne 0 ]; then
  rm "$job".started 2>/dev/null && reached=1
  # Only a crash: not an end that Slurm is already bringing about, nor one that was requested; 2 is a refusal.
  if [ -n "$(squeue --noheader --jobs="$job" --states=RUNNING)" ] &&
      { [ ! -e "$job".over ] || [ $code -eq 2 ]; }; then
    # The last error of each rank; a stop signal before the first step is none.
    said=$(find . -name "${job}_*_log.out" -newermt "-$lasted seconds" -exec awk '
      /Starting with JobEnvironment/ { said[FILENAME] = "" }
      /Error(:|$)|error:|stopped before the first step/ && !/Exited with|CANCELLED/ { said[FILENAME] = $0 }
      END { for (file in said) print said[file] }' {} + | grep .)
    error=$(grep -v -e 'stopped before the first step' -e 'Terminated$' <<< "$said" | tail -n 1)
    [ -n "$error" ] || [ -z "$said" ] && echo "$(date +%s.%N) $lasted $code $error" > "$job".crash
    # Requeue if it had reached the trainer.
    [ -n "$reached" ] && [ ! -e "$job".over ] && scontrol requeue "$job"
  fi
fi
exit $code"""


class _Executor(SlurmExecutor):  # type: ignore[misc]  # submitit is not type-checked here
    """submitit's executor, able to write its script without Slurm."""

    @classmethod
    def affinity(cls) -> int:
        return 2


class PlannedRuns(NamedTuple):
    """Checked runs of a command line.

    Attributes:
        top: directory of the run or of the sweep.
        runs: the run, or one run per line of the sweep, each with its configuration.
    """

    top: Path
    runs: list[tuple[SubmittedRun, Config]]


def plan(options: Namespace, argv: Sequence[str]) -> PlannedRuns:
    """Checks a command line, so that nothing fails after hours in the queue. Raises ConfigError, ShardError and
    SlurmError.

    Args:
        options: options of `submit`.
        argv: options of the trainer.
    """
    config, stem = parse(argv)
    checked(config)
    name = config.run.name or default_name(stem)
    top = config.run.path(name).absolute()
    runs = []
    for i, overrides in enumerate(_sweep(options.array) if options.array else [[]]):
        if overrides:
            config = checked(parse([*argv, *overrides])[0])
        directory = top / _member(i, overrides) if options.array else top
        config = replace(
            config, run=replace(config.run, name=str(directory.relative_to(top.parent)), dir=str(directory))
        )
        check_batch(config, options.nodes * max(1, options.gpus_per_node))
        if not to_pack(config):  # otherwise the job packs first
            check_tars(open_sets(config))
        run = SubmittedRun(directory)
        _check_directory(run)
        runs.append((run, config))
    return PlannedRuns(top, runs)


def parameters(options: Namespace, name: str, folder: Path) -> dict[str, Any]:
    """submitit's parameters for Slurm: one task per GPU, or one per node without GPUs."""
    if options.signal_before >= 60 * options.time:
        raise SlurmError(
            f"--signal-before {options.signal_before} s leaves nothing of --time: lower it or ask for more time"
        )
    cpus = options.cpus_per_gpu
    srun = ["--kill-on-bad-exit=1", "--open-mode=append"]
    wanted = {
        "job_name": name,
        "time": options.time,
        "nodes": options.nodes,
        "ntasks_per_node": max(1, options.gpus_per_node),
        "gpus_per_node": options.gpus_per_node or None,
        "cpus_per_task": cpus,
        "signal_delay_s": options.signal_before,
        "stderr_to_stdout": True,
        "srun_args": srun + ([f"--cpus-per-task={cpus}"] if cpus else []),  # since 22.05 srun does not inherit it
        "additional_parameters": {"requeue": True},  # after a lost node; many sites default to no
        "teardown": TEARDOWN.replace("FOLDER", shlex.quote(str(folder))).splitlines(),
    }
    named = ("partition", "account", "qos", "constraint", "exclude", "mem", "comment")
    wanted |= {key: getattr(options, key) for key in named}
    return {key: value for key, value in wanted.items() if value is not None} | {"wckey": None}


def script(folder: Path, wanted: dict[str, Any], array: int) -> str:
    """Returns the sbatch script. Writes nothing."""
    executor = _Executor(folder)
    executor.update_parameters(**wanted)
    if array:
        executor.parameters["map_count"] = array
    return str(executor._make_submission_file_text(executor._submitit_command_str, ""))


def submit(planned: PlannedRuns, folder: Path, wanted: dict[str, Any], *, local: bool) -> list[Submission]:
    """Submits runs, several as an array. Raises SlurmError."""
    for run, config in planned.runs:
        run.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(run.config_file, dump(config).encode())
    return launch([run for run, _ in planned.runs], folder, wanted, local=local, trusting=True)


def launch(
    runs: list[SubmittedRun], folder: Path, wanted: dict[str, Any], *, local: bool, trusting: bool
) -> list[Submission]:
    """Submits runs whose configuration is already written. Raises SlurmError.

    Args:
        trusting: the jobs may import the code that the configuration names as `module:name`.
    """
    tasks = wanted["nodes"] * wanted["ntasks_per_node"]
    jobs = hand_over(folder, wanted, [Job(run.directory, trusting=trusting) for run in runs], local=local)
    submissions = [Submission(job, str(folder), tasks, local, wanted) for job in jobs]
    for run, submission in zip(runs, submissions, strict=True):
        run.submitted(submission)
    return submissions


def minutes(text: str) -> int:
    """Whole minutes, rounded up, of a time in Slurm's formats: `90`, `90:00`, `12:00:00`, `2-12`, `2-12:00:00`."""
    if not (found := re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)):
        raise ValueError(text)
    days, first, second, third = (int(number or 0) for number in found.groups())
    if found[1] or found[4]:  # [days-]hours[:minutes[:seconds]]
        hours, mins, secs = first, second, third
    else:  # minutes[:seconds]
        hours, mins, secs = 0, first, second
    return max(1, ceil_div(((days * 24 + hours) * 60 + mins) * 60 + secs, 60))


def hand_over(folder: Path, wanted: dict[str, Any], tasks: Sequence[Callable[[], None]], *, local: bool) -> list[str]:
    """Submits tasks, several as an array. Returns their job numbers. Raises SlurmError."""
    executor: LocalExecutor | _Executor
    # Time-outs lose nothing, so submitit's limit on them must not end a run; `job` counts starts without progress.
    if local:
        executor = LocalExecutor(folder, max_num_timeout=10**6)
        executor.update_parameters(
            timeout_min=wanted["time"],
            tasks_per_node=wanted["ntasks_per_node"],
            gpus_per_node=wanted.get("gpus_per_node", 0),
            signal_delay_s=wanted["signal_delay_s"],
            stderr_to_stdout=True,
        )
    else:
        executor = _Executor(folder, max_num_timeout=10**6)
        executor.update_parameters(**wanted)
    try:
        with _outside(), _aside(folder / "controller.log") if local else nullcontext():
            return [str(job.job_id) for job in executor.submit_array(tasks)]
    except FailedJobError as error:
        raise SlurmError(f"sbatch refused the job: {' '.join(str(error).split())}") from error
    except (FileNotFoundError, RuntimeError) as error:
        raise SlurmError("there is no sbatch here: use a node of the cluster, or --local") from error


@contextmanager
def _outside() -> Iterator[None]:
    """Hides a surrounding job's variables from the new job, except SLURM_CONF and the user's own SBATCH_ACCOUNT
    and its like."""
    own = {key: value for key, value in os.environ.items() if key.startswith("SBATCH_") or key == "SLURM_CONF"}
    with clean_env(["TORCHELASTIC_RUN_ID"]):
        os.environ.update(own)
        yield


@contextmanager
def _aside(log: Path) -> Iterator[None]:
    """Redirects our output to `log`: submitit's local controller inherits it, and would hold a pipe open to its end."""
    flush()
    ours = [os.dup(1), os.dup(2)]
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        for number, copy in enumerate(ours, 1):
            os.dup2(copy, number)
            os.close(copy)


def _sweep(path: Path) -> list[list[str]]:
    """Overrides of a sweep, one list per line of the file."""
    lines = [overrides_of(line, path) for line in read_text(path).splitlines()]
    if not (members := [line for line in lines if line]):
        raise SlurmError(f"{path} is empty: write one line of overrides per run, such as --optim.lr 0.02")
    return members


def _member(number: int, overrides: list[str]) -> str:
    """Directory name of a sweep's run, made of its overrides: `1-optim.lr=0.02`."""
    text = re.sub(r"(^| )--", ",", " ".join(overrides)).strip(",").replace(" ", "=")
    return f"{number}-{re.sub('[^A-Za-z0-9_.,=+-]+', '-', text)[:100]}"


def _check_directory(run: SubmittedRun) -> None:
    """Raises SlurmError if the run is already in the queue, or its name is unusable."""
    check_text(run.directory)
    if (old := run.submission()) and entry(old).active:
        raise SlurmError(
            f"{run.name} is in the queue already, as job {old.job}: cancel it first, or choose another run.name"
        )


def check_text(path: Path) -> None:
    """Raises SlurmError for a path in which Slurm would replace something."""
    if found := re.search(r"[%\\\x00-\x1f]", str(path)):
        raise SlurmError(f"{path} contains {found[0]!r}, which Slurm replaces in file names: choose another name")
