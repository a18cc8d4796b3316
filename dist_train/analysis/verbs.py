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


def _predict(args: Namespace) -> int:
    from dist_train.analysis import predicted as verb

    return verb.start(args)


def _figures(args: Namespace) -> int:
    from dist_train.analysis import figures as verb

    return verb.start(args)


def _export(args: Namespace) -> int:
    from dist_train.analysis import export as verb

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


def _report(args: Namespace) -> int:
    if args.serve:
        from dist_train.page import serve

        return serve.start(args)
    from dist_train.page import report as verb

    return verb.start(args)


def _runs(args: Namespace) -> int:
    from dist_train.analysis import runs as verb

    return verb.start(args)


SHARED = ("evaluate", "speed")  # verbs whose work the ranks of torchrun share
VERBS = {
    "runs": Verb("a table of all runs in a folder, or their numbers as JSON", options.runs, _runs),
    "report": Verb("the page of a run, or of several: one HTML file for any browser", options.report_page, _report),
    "evaluate": Verb("exact errors of a run, or of several, averaged", options.evaluate, _evaluate),
    "predict": Verb("the most probable classes of images in files, folders or shard sets", options.predicted, _predict),
    "figures": Verb("figures 3 and 4 of the paper, for a trained run", options.figures, _figures),
    "export": Verb("a trained net, or its weights, for other programs", options.export, _export),
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
