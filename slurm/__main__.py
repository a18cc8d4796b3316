"""`python -m slurm submit|status|logs|cancel|requeue`, or `dist-train-slurm`: a run on a Slurm cluster."""

from __future__ import annotations

import shlex
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist_train.flat import OPTIONS
from dist_train.rundir.named import RUNS
from pipelines.cli import Parser, Verb, as_module, run_verb, watch_option
from pipelines.speech import begin, say, show
from slurm import options, submissions
from slurm.submissions import SlurmError, Submission, SubmittedRun


def _submit(args: Namespace) -> int:
    """Check, submit, and say how to go on."""
    from slurm.chain import chained
    from slurm.script import parameters, script, too_few_cpus
    from slurm.site import fill_in
    from slurm.snapshot import beside
    from slurm.submit import plan, submit

    site = fill_in(args)
    options.refuse_pairs(args)
    planned = plan(args, args.rest)
    folder = planned.top / "slurm"
    wanted = parameters(args, planned.top.name, folder, site)
    if args.chain:
        wanted = chained(wanted, folder)
    if args.dry_run:
        code = None if args.live_code else beside(folder)
        show(script(folder, wanted, len(planned.runs) if args.array else 0, code, args.origins, site.path))
    else:
        jobs = submit(planned, folder, wanted, local=args.local, live=args.live_code, chain=args.chain or 0)
        _show_jobs(planned.top, [run for run, _ in planned.runs], jobs, wanted)
    if not args.local and (advice := too_few_cpus(wanted)):
        say(advice)
    return 0


def _show_jobs(top: Path, runs: list[SubmittedRun], jobs: list[Submission], wanted: dict[str, Any]) -> None:
    nodes, tasks = wanted["nodes"], wanted["ntasks_per_node"]
    ranks = f"{nodes} node{'s' * (nodes > 1)} x {tasks} task{'s' * (tasks > 1)}"
    for run, submission in zip(runs, jobs, strict=True):
        show(f"job {', then '.join(link.job for link in submission.links)}: {ranks}, {run.directory}")
    name, first = shlex.quote(SubmittedRun(top).name), shlex.quote(runs[0].name)
    for verb, words in (("watch", f"status {name}"), ("read", f"logs {first} --follow"), ("stop", f"cancel {name}")):
        show(f"  {verb:6} python -m slurm {words}")


def _submit_pack(args: Namespace) -> int:
    """Submit a packing array."""
    from slurm.packing import submit_pack
    from slurm.site import fill_in

    sets = submit_pack(args, fill_in(args))
    for array, last, directory, _ in sets:
        show(f"job {array}: {args.tasks} tasks pack {directory}; job {last} then writes its manifest.json")
    jobs, logs = ([job for one in sets for job in one[:2]], " ".join(f"{one.folder}/*_log.out" for one in sets))
    show(f"  watch  squeue --jobs={','.join(jobs)}\n  read   {logs}\n  stop   scancel {' '.join(jobs)}")
    return 0


def _status_options(parser: Parser) -> None:
    parser.add_argument("runs", nargs="*", metavar="RUN", help="directory, or name in runs/ (default: all there)")
    watch_option(parser, ", and report runs that fall silent")


def _status(args: Namespace) -> int:
    """Print the table."""

    def find() -> list[SubmittedRun]:
        if args.runs in ([], ["all"]):
            return submissions.all_runs()
        return [run for text in args.runs for run in submissions.find_runs(text)]

    none = f"no submitted runs under {RUNS}/"
    if args.watch:
        from slurm.watch import watch

        watch(find, args.watch, none)
        return 0
    from slurm.table import in_queue, status_table

    runs = find()
    show(status_table(runs, in_queue(runs)) if runs else none, drawn=True)
    return 0


def _logs_options(parser: Parser) -> None:
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--rank", type=int, default=0, help="rank whose log is shown")
    parser.add_argument("--follow", action="store_true", help="until the job ends")
    parser.add_argument("--raw", action="store_true", help="the very bytes, which may control the terminal")


def _logs(args: Namespace) -> int:
    """Print the log of one rank."""
    from slurm.table import show_log

    run, *others = submissions.find_runs(args.run)
    if others:
        raise SlurmError(f"{args.run} is a sweep: name one of its runs, such as {shlex.quote(run.name)}")
    show_log(run, args.rank, args.follow, args.raw)
    return 0


def _meant(text: str) -> list[SubmittedRun]:
    """The runs that a command is to act on: a link in somebody's sweep may lead to another run of the user's."""
    runs = submissions.find_runs(text)
    for run in runs:
        if run.directory.is_symlink() and run.directory.name != Path(text).name:
            raise SlurmError(f"{run.directory} is a link, and perhaps not what you mean: name it by itself")
    return runs


def _cancel_options(parser: Parser) -> None:
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--now", action="store_true", help="do not wait for a save")


def _cancel(args: Namespace) -> int:
    """Save, end, and never requeue."""
    from slurm.cancel import cancel

    cancel(_meant(args.run), now=args.now)
    return 0


def _requeue_options(parser: Parser) -> None:
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--exclude", metavar="NODE", help="nodes to avoid")


def _requeue(args: Namespace) -> int:
    """Put a run back into the queue: the same job if Slurm still has it there, otherwise a new one."""
    from slurm.requeue import put_back

    put_back(_meant(args.run), args.exclude or "")
    return 0


VERBS = {
    "submit": Verb("check a run and put it into the queue", options.submit_options, _submit, passes_on=OPTIONS),
    "submit pack": Verb(
        "pack an image folder, or another source, as an array", options.submit_pack_options, _submit_pack
    ),
    "status": Verb("a table of runs", _status_options, _status),
    "logs": Verb("the log of a rank, over all restarts", _logs_options, _logs),
    "cancel": Verb("save, then end the run; it is not requeued", _cancel_options, _cancel),
    "requeue": Verb("put a run back into the queue", _requeue_options, _requeue),
}


def main(argv: Sequence[str]) -> int:
    """Run a verb. Returns its exit code: 0, 2 after one sentence, or 130."""
    begin()
    return run_verb("python -m slurm", VERBS, argv)


def console() -> int:
    """The console script; returns the exit code."""
    as_module()
    return main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
