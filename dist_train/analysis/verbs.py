"""The verbs: commands on finished runs, and on one before it starts. Each imports what it needs when it starts."""

from __future__ import annotations

from argparse import Namespace

from dist_train import cli
from dist_train.analysis import options
from dist_train.flat import OPTIONS
from pipelines.cli import Verb


def _evaluate(args: Namespace) -> int:
    from dist_train.analysis import evaluate as verb

    return verb.start(args)


def _figures(args: Namespace) -> int:
    from dist_train.analysis import figures as verb

    return verb.start(args)


def _experiments(args: Namespace) -> int:
    from dist_train.analysis import arms

    chosen = arms.chosen(args.names, args.seeds, args.root, args.rest)  # what is misspelt does not wait for torch
    from dist_train.analysis import experiments as verb

    return verb.start(args, chosen)


def _speed(args: Namespace) -> int:
    config = cli.checked(cli.parse(args.rest)[0])  # what is misspelt does not wait for torch
    from dist_train.analysis import speed as verb

    return verb.start(args, config)


def _gpu_report(args: Namespace) -> int:
    from dist_train.analysis import gpu_report as verb

    return verb.start(args)


SHARED = ("evaluate", "speed")  # verbs whose work the ranks of torchrun share
VERBS = {
    "evaluate": Verb("exact errors of a run, or of several, averaged", options.evaluate, _evaluate),
    "figures": Verb("figures 3 and 4 of the paper, for a trained run", options.figures, _figures),
    "experiments": Verb(
        "run and draw the sweeps of configs/experiments; further options go to the trainer",
        options.experiments,
        _experiments,
        passes_on=OPTIONS,
    ),
    "speed": Verb(
        "images/s of step, loader and both on this machine, for a training command line; nothing is trained",
        options.speed,
        _speed,
        passes_on=OPTIONS,
    ),
    "gpu-report": Verb(
        "checks and speeds of a machine with GPUs, in two files for an issue: what fits into ten minutes, the most "
        "telling first; --minutes 30 for all",
        options.gpu_report,
        _gpu_report,
    ),
}
