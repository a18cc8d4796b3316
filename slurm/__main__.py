"""`python -m slurm submit|status|logs|cancel|requeue`: a run on a Slurm cluster."""

from __future__ import annotations

import shlex
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from functools import partial
from pathlib import Path

from slurm import cluster, submissions
from slurm.submissions import Run, SlurmError

OVERRIDES = (
    "What is not listed goes to the trainer: --config FILE, --optim.lr 0.02 (see `python -m dist_train --help`)."
)


def submit(args: Namespace, rest: list[str]) -> None:
    """Check, submit, and say how to go on."""
    from slurm import submit as s

    if args.local and args.nodes > 1:
        raise SlurmError("--local has one node: leave --nodes out")
    planned = s.plan(rest, args)
    top = planned[0][0].directory.parent if args.array else planned[0][0].directory
    folder = top / "slurm"
    wanted = s.parameters(args, top.name, folder)
    if args.dry_run:
        print(s.script(folder, wanted, len(planned) if args.array else 0))
        return
    ranks = f"{args.nodes} nodes x {wanted['ntasks_per_node']} tasks"
    for (run, _), submission in zip(planned, s.submit(planned, folder, wanted, local=args.local), strict=True):
        print(f"job {submission.job}: {ranks}, {run.directory}")
    name, first = shlex.quote(Run(top).name), shlex.quote(planned[0][0].name)
    for verb, words in (("watch", f"status {name}"), ("read", f"logs {first} --follow"), ("stop", f"cancel {name}")):
        print(f"  {verb:6} python -m slurm {words}")


def submit_pack(args: Namespace) -> None:
    """Submit a packing array."""
    from slurm import submit as s

    array, last, folder = s.submit_pack(args)
    print(f"job {array}: {args.tasks} tasks pack {args.source}; job {last} then writes {args.directory}/manifest.json")
    print(f"  watch  squeue --jobs={array},{last}\n  read   {folder}/*_log.out\n  stop   scancel {array} {last}")


def status(args: Namespace) -> None:
    """The table."""
    from slurm import table

    everything = args.runs in ([], ["all"])
    chosen = submissions.all_runs() if everything else [run for text in args.runs for run in submissions.find(text)]
    print(table.table(chosen) if chosen else f"no submitted runs under {submissions.ROOT}/")


def logs(args: Namespace) -> None:
    """What a rank said."""
    from slurm import table

    run, *others = submissions.find(args.run)
    if others:
        raise SlurmError(f"{args.run} is a sweep: name one of its runs, such as {shlex.quote(run.name)}")
    table.show_log(run, args.rank, args.follow)


def cancel(args: Namespace) -> None:
    """Save, end, and never requeue."""
    for run in submissions.find(args.run):
        submission = run.last
        if cluster.ended(submission):
            print(f"{run.name}: job {submission.job} has ended already")
            continue
        submission.over.touch()
        if cluster.entry(submission).state == "RUNNING" and not args.now:
            cluster.stop(submission)
            patience = 30 + run.config()["run"]["stop_timeout"]
            try:
                cluster.wait(partial(cluster.ended, submission), patience, "it does not stop")
            except SlurmError as error:
                print(f"{run.name}: {error}; ending it without a save", file=sys.stderr)
        if not cluster.ended(submission):
            cluster.end(submission)
        newest = run.newest_checkpoint()
        print(f"{run.name}: job {submission.job} is cancelled; {f'saved: {newest}' if newest else 'nothing was saved'}")


def requeue(args: Namespace) -> None:
    """Put a run back into the queue: the same job where Slurm still has it there, otherwise a new one."""
    from slurm import submit as s

    for run in submissions.find(args.run):
        submission, active = run.last, not cluster.ended(run.last)
        if active and submission.local:
            raise SlurmError(f"{run.name} runs on this machine: cancel it first")
        submission.over.unlink(missing_ok=True)
        if active:
            cluster.requeue(submission, args.exclude or "")
            run.tell(submitted=submission.job)
        else:
            wanted = submission.parameters | ({"exclude": args.exclude} if args.exclude else {})
            (submission,) = s.launch([run], Path(submission.folder), wanted, local=submission.local)
        print(f"{run.name}: job {submission.job} is in the queue")


def _time(text: str) -> int:
    from slurm.submit import minutes

    try:
        return minutes(text)
    except ValueError as error:
        raise ArgumentTypeError(f"{text!r} is not a time: write 12:00:00 or 2-12:00:00") from error


def _resources(verb: ArgumentParser) -> None:
    verb.add_argument("--nodes", type=int, default=1, help="(1)")
    verb.add_argument(
        "--gpus-per-node", type=int, default=1, help="one task a GPU; 0: one task a node, on its CPUs (1)"
    )
    verb.add_argument("--time", type=_time, required=True, help="limit of one start, 12:00:00; a run goes on after it")
    for name in ("partition", "account", "qos", "constraint", "exclude", "mem", "comment"):
        verb.add_argument(f"--{name}", help="as for sbatch")
    verb.add_argument("--cpus-per-gpu", type=int, metavar="N", help="CPUs a task")
    verb.add_argument(
        "--signal-before", type=int, default=120, metavar="S", help="seconds for the save at the limit (120)"
    )


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m slurm", description="A run on a Slurm cluster.")
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    verb = verbs.add_parser(
        "submit", help="check a run and put it into the queue", epilog=OVERRIDES, allow_abbrev=False
    )
    _resources(verb)
    verb.add_argument("--array", type=Path, metavar="FILE", help="a sweep: one line of overrides a run")
    verb.add_argument("--dry-run", action="store_true", help="print the sbatch script")
    verb.add_argument("--local", action="store_true", help="the same job in processes of this machine")
    verb.set_defaults(run_verb=submit)

    verb = verbs.add_parser(
        "submit pack", help="pack a large image folder as an array", prog="python -m slurm submit pack"
    )
    verb.add_argument("source", type=Path, help="SRC/<class>/<image>")
    verb.add_argument("directory", type=Path, help="the shard set to make")
    verb.add_argument(
        "--tasks", type=int, required=True, help="tasks of the array, each of which packs a range of shards"
    )
    verb.add_argument(
        "--shorter-side", type=int, default=256, metavar="PX", help="scale larger images down to it (256)"
    )
    verb.add_argument("--quality", type=int, default=90, help="of JPEGs that are written anew, 1 to 95 (90)")
    verb.add_argument("--shard-mb", type=float, default=64.0, help="aimed size of a shard in 10^6 bytes (64)")
    verb.add_argument("--seed", type=int, default=0, help="of the order of the samples in the shards (0)")
    _resources(verb)
    verb.set_defaults(run_verb=submit_pack, gpus_per_node=0)

    verb = verbs.add_parser("status", help="a table of runs")
    verb.add_argument("runs", nargs="*", metavar="RUN", help="directory, or name under runs/; without: all there")
    verb.set_defaults(run_verb=status)

    verb = verbs.add_parser("logs", help="what a rank said, over all restarts")
    verb.add_argument("run", metavar="RUN")
    verb.add_argument("--rank", type=int, default=0, help="(0)")
    verb.add_argument("--follow", action="store_true", help="to the end of the job")
    verb.set_defaults(run_verb=logs)

    verb = verbs.add_parser("cancel", help="save, then end the run; it is not requeued")
    verb.add_argument("run", metavar="RUN")
    verb.add_argument("--now", action="store_true", help="do not wait for a save")
    verb.set_defaults(run_verb=cancel)

    verb = verbs.add_parser("requeue", help="put a run back into the queue")
    verb.add_argument("run", metavar="RUN")
    verb.add_argument("--exclude", metavar="NODE", help="not on these")
    verb.set_defaults(run_verb=requeue)
    return parser


def main(argv: list[str]) -> int:
    """Returns the exit code: 0, or 2 with one sentence."""
    if argv[:2] == ["submit", "pack"]:
        argv = ["submit pack", *argv[2:]]
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    try:
        if args.run_verb is submit:
            submit(args, rest)
        elif rest:
            parser.error(f"unknown: {' '.join(rest)}")
        else:
            args.run_verb(args)
    except (ValueError, OSError) as error:  # ConfigError, ShardError, SlurmError
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
