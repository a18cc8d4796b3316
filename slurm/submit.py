"""From a command line to submitted jobs: checks and submission."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from dist_train.cli import checked, default_name, overrides_of, parse
from dist_train.config import Config
from dist_train.data import check_batch, check_tars, elsewhere, open_sets, to_pack
from dist_train.flat import dump
from pipelines import files
from pipelines.files import read_text, write_atomically
from pipelines.resolve import check_trust
from pipelines.speech import say
from slurm import cluster, receipts, snapshot
from slurm.chain import forget_ends
from slurm.job import Job
from slurm.script import check_text, hand_over
from slurm.submissions import SlurmError, Submission, SubmittedRun


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
    check_trust("data.source", config.data.source)  # a job imports all that its configuration names
    name = config.run.name or default_name(stem)
    top = config.run.path(name).absolute()
    runs = []
    for i, overrides in enumerate(_sweep(options.array) if options.array else [[]]):
        if overrides:
            config = checked(parse([*argv, *overrides])[0])
            check_trust("data.source", config.data.source)
        directory = top / _member(i, overrides) if options.array else top
        config = replace(
            config, run=replace(config.run, name=str(directory.relative_to(top.parent)), dir=str(directory))
        )
        check_batch(config, options.nodes * max(1, options.gpus_per_node))
        if elsewhere(config):
            say(f"{config.data.train} and {config.data.val} are first opened by the job, since one of them is a URL")
        elif not to_pack(config):  # otherwise the job packs first
            check_tars(open_sets(config, cached=False))
        run = SubmittedRun(directory)
        _check_directory(run)
        runs.append((run, config))
    for record in {*top.glob("*/slurm/job.json")} - {run.job_file for run, _ in runs}:
        _check_directory(SubmittedRun(record.parent.parent))  # another of the sweep: they share the copy of the code
    return PlannedRuns(top, runs)


def submit(
    planned: PlannedRuns, folder: Path, wanted: dict[str, Any], *, local: bool, live: bool = False, chain: int = 0
) -> list[Submission]:
    """Submits runs, several as an array. Raises SlurmError.

    Args:
        live: their jobs import the code that is there when they start; otherwise a copy of the present one.
        chain: as for `launch`.
    """
    for run, config in planned.runs:
        files.folder(run.folder)
        write_atomically(run.config_file, dump(config).encode())
    if live:
        snapshot.drop(planned.top)
    else:
        snapshot.take(planned.top, [config for _, config in planned.runs])
    return launch([run for run, _ in planned.runs], folder, wanted, local=local, chain=chain)


def launch(
    runs: list[SubmittedRun], folder: Path, wanted: dict[str, Any], *, local: bool, chain: int = 0
) -> list[Submission]:
    """Submits runs whose configuration is already written, with the copy of their code, if there is one. Their jobs may
    import the code that the configuration names as `module:name`. Raises SlurmError.

    Args:
        chain: length of the chain of jobs that the one run is to have; 0: none.
    """
    copy = snapshot.beside(folder)
    code = copy if copy.is_dir() else None
    if local and len(runs) > 1:
        return _launch_queue(runs, folder, wanted)
    if chain:
        submissions = [_launch_chain(runs[0], folder, wanted, code, chain)]
    else:
        jobs = hand_over(folder, wanted, [Job(run.directory, code) for run in runs], local=local, code=code)
        submissions = [Submission(job, str(folder), _tasks(wanted), local) for job in jobs]
        for run, submission in zip(runs, submissions, strict=True):
            run.submitted(submission)
    _keep_receipts(runs, copy, wanted)
    return submissions


def _launch_chain(
    run: SubmittedRun, folder: Path, wanted: dict[str, Any], code: Path | None, length: int
) -> Submission:
    """Submits the jobs of a chain, or none."""
    forget_ends(run.folder)
    jobs = list[str]()
    for number in range(length):
        job = Job(run.directory, code, (number, length))
        try:
            jobs += hand_over(folder, wanted, [job], local=False, code=code)
        except SlurmError:
            cluster.end_jobs(jobs)
            raise
        submission = Submission(jobs[0], str(folder), _tasks(wanted), local=False, chain=jobs)
        if number:
            run.record(submission)
        else:  # it may start before the last one is submitted
            run.submitted(submission)
    return submission


def _launch_queue(runs: list[SubmittedRun], folder: Path, wanted: dict[str, Any]) -> list[Submission]:
    """Starts a process that runs them in turn on this machine; it outlives this one, and the terminal."""
    files.folder(folder)
    with files.appended(folder / "controller.log") as log:
        words = [sys.executable, "-m", "slurm.local", str(folder)]
        queue = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True)
    jobs = [f"{queue.pid}_{number}" for number in range(len(runs))]
    submissions = [Submission(job, str(folder), _tasks(wanted), local=True) for job in jobs]
    for run, submission in zip(runs, submissions, strict=True):
        run.submitted(submission)
    _keep_receipts(runs, snapshot.beside(folder), wanted)
    assert queue.stdin
    with queue.stdin as told:  # it begins at the end of this text
        told.write(json.dumps({"runs": [str(run.directory) for run in runs], "wanted": wanted}).encode())
    return submissions


def _keep_receipts(runs: list[SubmittedRun], copy: Path, wanted: dict[str, Any]) -> None:
    try:
        code = snapshot.digest(copy)
        for run in runs:
            receipts.keep(run, wanted, code)
    except OSError as error:  # no reason to withhold a job that is in the queue
        say(f"warning: no receipt could be kept ({error}): `python -m slurm requeue` will not know these runs")


def _tasks(wanted: dict[str, Any]) -> int:
    tasks: int = wanted["nodes"] * wanted["ntasks_per_node"]
    return tasks


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
    if (old := run.submission()) and not cluster.ended(old) and cluster.belongs(old, to_anybody=True):
        raise SlurmError(
            f"{run.name} is in the queue already, as job {old.job}: cancel it first, or choose another run.name"
        )
