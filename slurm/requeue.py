"""`requeue`: a run gets the same job again if Slurm still has it, or else a new one, as this user's receipt says."""

from __future__ import annotations

from pathlib import Path

from dist_train.cli import checked, parse
from pipelines.resolve import FLAG
from pipelines.speech import show
from slurm import cluster, receipts
from slurm.cancel import proven
from slurm.receipts import Receipt
from slurm.snapshot import beside
from slurm.submissions import SlurmError, SubmittedRun
from slurm.submit import launch


def put_back(runs: list[SubmittedRun], exclude: str) -> None:
    """Puts runs back into the queue, none if one of them cannot be. Raises UserError or OSError.

    Args:
        exclude: nodes to avoid, from now on.
    """
    kept = [(run, receipts.check(run)) for run in runs]
    queued = {run for run, receipt in kept if _is_queued(run, receipt)}
    here: dict[SubmittedRun, Receipt] = {}  # of a sweep on this machine, to be run in turn
    for run, receipt in kept:
        submission, wanted = receipt.submission, receipt.wanted
        submission.no_requeue.unlink(missing_ok=True)
        if submission.local:
            here[run] = receipt
            continue
        wanted |= {"exclude": exclude} if exclude else {}
        if run in queued:
            cluster.requeue(submission, exclude)
            run.append(submitted=submission.job)
            receipts.keep(run, wanted, receipt.code)
        else:
            folder, chain = Path(submission.folder), len(submission.chain)
            (submission,) = launch([run], folder, wanted, local=False, chain=chain)
        show(f"{run.name}: {submission.subject} in the queue")
    if here:
        last = next(iter(here.values()))
        launched = launch([*here], Path(last.submission.folder), last.wanted, local=True)
        for run, submission in zip(here, launched, strict=True):
            show(f"{run.name}: {submission.subject} in the queue")


def _is_queued(run: SubmittedRun, receipt: Receipt) -> bool:
    """Whether Slurm still has a job of the run. Raises UserError for a run that cannot be requeued."""
    submission = receipt.submission
    run.check_folder(submission)
    if not cluster.ended(submission):
        proven(run)
        if submission.local or submission.chain:
            where = "runs on this machine" if submission.local else "is in the queue as a chain, which is not requeued"
            raise SlurmError(f"{run.name} {where}: cancel it first")
        return True
    if not beside(Path(submission.folder)).is_dir():  # the copy of its code took it already
        checked(parse(["--config", str(run.config_file), FLAG])[0])
    return False
