"""`python -m slurm submit|status|logs|cancel|requeue`: a run on a Slurm cluster."""

from __future__ import annotations

import shlex
import sys
from argparse import SUPPRESS, ArgumentTypeError, Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from dist_train.flat import OPTIONS
from dist_train.rundir.named import RUNS
from pipelines.cli import Parser, Verb, natural, positive, run_verb
from pipelines.kinds import SIDE_HELP
from pipelines.resolve import FLAG
from pipelines.speech import begin, say, show
from slurm import cluster, submissions
from slurm.submissions import SlurmError, Submission, SubmittedRun

PACK_USAGE = """
submit pack SRC DST --tasks N --time T             SRC/<class>/<image> into the shard set DST
submit pack KIND [SRC ...] DST --tasks N --time T  any source of `python -m pipelines pack`
"""
PATIENCE = 30  # seconds that a stopped job may take to end, besides those of its save


def _submit_options(parser: Parser) -> None:
    parser.epilog = (
        "Every other option goes to the trainer: --config FILE, --optim.lr 0.02 (see `python -m dist_train --help`)."
    )
    _resources(parser, gpus=1)
    parser.add_argument("--array", type=Path, metavar="FILE", help="a sweep: one line of overrides per run")
    parser.add_argument("--dry-run", action="store_true", help="print the sbatch script")
    parser.add_argument("--local", action="store_true", help="run the same job in processes of this machine")


def _submit(args: Namespace) -> int:
    """Check, submit, and say how to go on."""
    from slurm.submit import parameters, plan, script, submit

    if args.local and args.nodes > 1:
        raise SlurmError("--local has one node: leave --nodes out")
    planned = plan(args, args.rest)
    folder = planned.top / "slurm"
    wanted = parameters(args, planned.top.name, folder)
    if args.dry_run:
        show(script(folder, wanted, len(planned.runs) if args.array else 0))
        return 0
    ranks = f"{args.nodes} nodes x {wanted['ntasks_per_node']} tasks"
    runs = [run for run, _ in planned.runs]
    for run, submission in zip(runs, submit(planned, folder, wanted, local=args.local), strict=True):
        show(f"job {submission.job}: {ranks}, {run.directory}")
    name, first = shlex.quote(SubmittedRun(planned.top).name), shlex.quote(runs[0].name)
    for verb, words in (("watch", f"status {name}"), ("read", f"logs {first} --follow"), ("stop", f"cancel {name}")):
        show(f"  {verb:6} python -m slurm {words}")
    return 0


def _pack_options(parser: Parser) -> None:
    parser.usage = PACK_USAGE
    parser.add_argument(
        "first",
        type=Path,
        metavar="[KIND] SRC",
        help="the folder to pack, or another kind of source, such as module:name, before its own",
    )
    parser.add_argument("second", type=Path, metavar="DST", help="the shard set to make, or the folder of two")
    parser.add_argument("more", type=Path, nargs="*", help=SUPPRESS)
    parser.add_argument(
        "--tasks", type=positive, required=True, help="tasks of the array, each of which packs a range of shards"
    )
    parser.add_argument("--shorter-side", type=natural, metavar="PX", help=SIDE_HELP)
    parser.add_argument("--keep-small", action="store_true", help="do not enlarge images whose shorter side is less")
    parser.add_argument("--quality", type=positive, default=90, help="quality of re-encoded JPEGs, 1 to 95")
    parser.add_argument("--shard-mb", type=float, default=64.0, help="target size of a shard in 10^6 bytes")
    parser.add_argument("--seed", type=natural, default=0, help="seed of the order of the samples in the shards")
    _resources(parser, gpus=0)


def _submit_pack(args: Namespace) -> int:
    """Submit a packing array."""
    from slurm.packing import submit_pack

    sets = submit_pack(args)
    for array, last, directory, _ in sets:
        show(f"job {array}: {args.tasks} tasks pack {directory}; job {last} then writes its manifest.json")
    jobs, logs = ([job for one in sets for job in one[:2]], " ".join(f"{one.folder}/*_log.out" for one in sets))
    show(f"  watch  squeue --jobs={','.join(jobs)}\n  read   {logs}\n  stop   scancel {' '.join(jobs)}")
    return 0


def _status_options(parser: Parser) -> None:
    parser.add_argument("runs", nargs="*", metavar="RUN", help="directory, or name in runs/ (default: all there)")
    parser.add_argument(
        "--watch",
        type=positive,
        nargs="?",
        const=10,
        metavar="SECONDS",
        help="repeat every so many seconds (10 if none are given) until Ctrl-C, and report runs that fall silent",
    )


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
    show(status_table(runs, in_queue(runs)) if runs else none)
    return 0


def _logs_options(parser: Parser) -> None:
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--rank", type=int, default=0, help="rank whose log is shown")
    parser.add_argument("--follow", action="store_true", help="until the job ends")


def _logs(args: Namespace) -> int:
    """Print the log of one rank."""
    from slurm.table import show_log

    run, *others = submissions.find_runs(args.run)
    if others:
        raise SlurmError(f"{args.run} is a sweep: name one of its runs, such as {shlex.quote(run.name)}")
    show_log(run, args.rank, args.follow)
    return 0


def _cancel_options(parser: Parser) -> None:
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--now", action="store_true", help="do not wait for a save")


def _cancel(args: Namespace) -> int:
    """Save, end, and never requeue."""
    from dist_train.rundir.checkpoint import newest_name

    for run in submissions.find_runs(args.run):
        submission = run.last
        if cluster.ended(submission):
            show(f"{run.name}: job {submission.job} has ended already")
            continue
        submission.no_requeue.touch()
        if cluster.entry(submission).state == "RUNNING" and not args.now:
            _stop(run, submission)
        if not cluster.ended(submission):
            cluster.end(submission)
        newest = newest_name(run.directory)
        show(f"{run.name}: job {submission.job} is cancelled; {f'saved: {newest}' if newest else 'nothing was saved'}")
    return 0


def _stop(run: SubmittedRun, submission: Submission) -> None:
    """Ask a run to save and end, and wait for it as long as its configuration allows."""
    cluster.stop(submission)
    patience = PATIENCE + run.config()["run"]["stop_timeout"]
    try:
        cluster.wait(partial(cluster.ended, submission), patience, "it does not stop")
    except SlurmError as error:
        say(f"{run.name}: {error}; ending it without a save")


def _requeue_options(parser: Parser) -> None:
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--exclude", metavar="NODE", help="nodes to avoid")
    parser.add_argument(
        FLAG, action="store_true", help="let a new job import the code (module:name) that the run names"
    )


def _requeue(args: Namespace) -> int:
    """Put a run back into the queue: the same job if Slurm still has it there, otherwise a new one."""
    from dist_train.cli import checked, parse
    from slurm.submit import launch

    for run in submissions.find_runs(args.run):
        submission, active = run.last, not cluster.ended(run.last)
        if active and submission.local:
            raise SlurmError(f"{run.name} runs on this machine: cancel it first")
        if not active:
            checked(parse(["--config", str(run.config_file), *[FLAG] * args.trust])[0])
        submission.no_requeue.unlink(missing_ok=True)
        if active:
            cluster.requeue(submission, args.exclude or "")
            run.append(submitted=submission.job)
        else:
            wanted = submission.parameters | ({"exclude": args.exclude} if args.exclude else {})
            (submission,) = launch([run], Path(submission.folder), wanted, local=submission.local, trusting=args.trust)
        show(f"{run.name}: job {submission.job} is in the queue")
    return 0


def _resources(parser: Parser, *, gpus: int) -> None:
    """Declare the resources of a job."""
    parser.add_argument("--nodes", type=positive, default=1, help="nodes of the job")
    parser.add_argument(
        "--gpus-per-node", type=natural, default=gpus, help="one task per GPU; 0: one task per node, on its CPUs"
    )
    parser.add_argument(
        "--time",
        type=_time,
        required=True,
        help="time limit of one start, 12:00:00; the run is then requeued and continues",
    )
    for name in ("partition", "account", "qos", "constraint", "exclude", "mem", "comment"):
        parser.add_argument(f"--{name}", help="as for sbatch")
    parser.add_argument("--cpus-per-gpu", type=positive, metavar="N", help="CPUs per task")
    parser.add_argument(
        "--signal-before",
        type=natural,
        default=120,
        metavar="S",
        help="seconds before the limit at which the run saves",
    )


def _time(text: str) -> int:
    from slurm.submit import minutes

    try:
        return minutes(text)
    except ValueError as error:
        raise ArgumentTypeError(f"{text!r} is not a time: write 12:00:00 or 2-12:00:00") from error


VERBS = {
    "submit": Verb("check a run and put it into the queue", _submit_options, _submit, passes_on=OPTIONS),
    "submit pack": Verb("pack a large image folder, or another source, as an array", _pack_options, _submit_pack),
    "status": Verb("a table of runs", _status_options, _status),
    "logs": Verb("the log of a rank, over all restarts", _logs_options, _logs),
    "cancel": Verb("save, then end the run; it is not requeued", _cancel_options, _cancel),
    "requeue": Verb("put a run back into the queue", _requeue_options, _requeue),
}


def main(argv: Sequence[str]) -> int:
    """Run a verb. Returns its exit code: 0, 2 after one sentence, or 130."""
    begin()
    return run_verb("python -m slurm", VERBS, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
