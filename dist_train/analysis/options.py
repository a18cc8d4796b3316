"""The options of the verbs, apart from what they start."""

from __future__ import annotations

from argparse import SUPPRESS, Action, ArgumentError, ArgumentTypeError, Namespace
from pathlib import Path
from typing import Any

from dist_train.rundir.named import RUNS, run_named
from pipelines.cli import Parser, limit_options, natural, positive, watch_option
from pipelines.errors import UserError
from pipelines.resolve import FLAG

FIGURES = ("kernels", "top5", "nearest")  # of the paper, which are drawn if none is named
DRAWN = (*FIGURES, "inputs", "wrong")  # all
CROPS = {"one": 1, "five": 5, "ten": 10}  # fixed views that `evaluate` averages
STDOUT = Path("-")
JSON_HELP = "a line of JSON per image, on stdout in place of the text, or into FILE (.json or .jsonl)"
# The parts of `gpu-report` in their order, and the seconds that each may take; all together, GPU_MINUTES. The last one
# takes what the others leave, and does the most telling first.
GPU_PARTS = {"machine": 60, "decoder": 90, "pooling": 60, "tests": 240, "resume": 300, "drills": 180, "speed": 600}
GPU_MINUTES = 10
NET, WEIGHTS, ONNX = (".pt2", ".safetensors", ".onnx")  # what `export` writes, by the end of its name


def check_place(path: Path, option: str) -> None:
    """Raises UserError if no file can be written where this option says, before anything that takes hours."""
    special = path.exists() and not path.is_file()
    if special or not path.parent.is_dir():
        why = "it is no file" if special else f"there is no folder {path.parent}"
        raise UserError(f"{path} cannot be written ({why}): choose another place with {option}")


class _Names(Action):
    """Names of figures as several words or, like all lists, with commas."""

    def __call__(self, parser: Any, args: Namespace, values: Any, option: str | None = None) -> None:
        names = [name for value in values for name in value.strip("[]").split(",") if name]
        if unknown := [name for name in names if name not in DRAWN]:
            raise ArgumentError(self, f"{unknown[0]!r} is no figure: choose from {', '.join(DRAWN)}")
        setattr(args, self.dest, names)


def _crops(text: str) -> str:
    return next((name for name, views in CROPS.items() if text == str(views)), text)


def runs(parser: Parser) -> None:
    """Declare the options of `runs`."""
    parser.add_argument(
        "dir", nargs="?", type=Path, default=RUNS, metavar="DIR", help="folder of runs and sweeps (default: runs/)"
    )
    parser.add_argument("--json", action="store_true", help="all numbers, as a list of objects (docs/runs.md)")
    watch_option(parser)


def evaluate(parser: Parser) -> None:
    """Declare the options of `evaluate`."""
    parser.add_argument(
        "runs", nargs="+", type=run_named, metavar="RUN", help="directory of a run, or its name in runs/"
    )
    parser.add_argument(
        "--crops",
        type=_crops,
        choices=list(CROPS),
        default="one",
        help="centre; and corners; and reflections of these five; or 1, 5, 10",
    )
    parser.add_argument("--split", default="", metavar="SET", help="shard set in place of the validation set")
    parser.add_argument("--checkpoint", default="last", help="last, best, or the name of a checkpoint")
    parser.add_argument(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="device of the net; auto: a GPU if there is one",
    )
    parser.add_argument("--batch", type=positive, default=128, metavar="N", help="images per forward pass and device")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for all numbers")
    _trust(parser)


def predicted(parser: Parser) -> None:
    """Declare the options of `predict`."""
    parser.add_argument(
        "run",
        type=run_named,
        metavar="RUN",
        help="directory of a run, or its name in runs/; or a .safetensors or .pt2 that `export` wrote",
    )
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="image, folder of images at any depth, pattern in quotes ('photos/**/*.jpg'), or shard set",
    )
    parser.add_argument("--json", nargs="?", type=_lines_file, const=STDOUT, metavar="FILE", help=JSON_HELP)
    parser.add_argument(
        "--crops", type=_crops, choices=list(CROPS), default="one", help="views that are averaged, as for `evaluate`"
    )
    parser.add_argument("--checkpoint", default="last", help="of a run: last, best, or the name of a checkpoint")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: a GPU if there is one")
    parser.add_argument("--batch", type=positive, default=128, metavar="N", help="images per forward pass")
    limit_options(parser)
    _trust(parser)


def figures(parser: Parser) -> None:
    """Declare the options of `figures`."""
    parser.add_argument("run", type=run_named, metavar="RUN", help="directory of a run, or its name in runs/")
    parser.add_argument(
        "--checkpoint", choices=["last", "best"], default="last", help="checkpoint whose weights are used"
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: a GPU if there is one")
    parser.add_argument(
        "--images", type=positive, metavar="N", help="validation images per figure; without: 12, and 8 for nearest"
    )
    parser.add_argument("--neighbours", type=positive, default=6, metavar="K", help="training images beside each")
    parser.add_argument(
        "--train-images", type=natural, default=10000, metavar="M", help="training images searched; 0: all"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        action=_Names,
        default=FIGURES,
        metavar="NAME",
        help="figures to draw, with spaces or commas between them; also inputs, augmented training images, and wrong, "
        "misclassified images",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="directory of the figures (default: RUN/figures)")
    _trust(parser)


def export(parser: Parser) -> None:
    """Declare the options of `export`."""
    parser.add_argument("run", type=run_named, metavar="RUN", help="directory of a run, or its name in runs/")
    parser.add_argument(
        "file",
        type=_export,
        metavar="FILE",
        help="FILE.pt2, the net for torch.export.load; FILE.safetensors, its weights; FILE.onnx. Beside it stands "
        "FILE.pt2.json, with all else that is needed. What is there already is replaced",
    )
    parser.add_argument("--checkpoint", default="last", help="last, best, or the name of a checkpoint")
    _trust(parser)


def _export(text: str) -> Path:
    if (path := Path(text)).suffix not in (NET, WEIGHTS, ONNX):
        raise ArgumentTypeError(f"{text}: end its name with {NET} (the net), {WEIGHTS} (its weights) or {ONNX}")
    return path


def _lines_file(text: str) -> Path:
    if (path := Path(text)) != STDOUT and path.suffix not in (".json", ".jsonl"):
        raise ArgumentTypeError(f"{text}: the name of its file ends in .json or .jsonl, put --json behind the images")
    return path


def _trust(parser: Parser) -> None:
    parser.add_argument(FLAG, action="store_true", help="import the code (module:name) that a run names")


def experiments(parser: Parser) -> None:
    """Declare the options of `experiments`; it passes all others on to the trainer."""
    parser.add_argument("names", nargs="*", metavar="NAME", help="experiments (default: all of configs/experiments)")
    parser.add_argument(
        "--seeds", type=natural, default=3, metavar="N", help="number of seeds of an arm that gives none"
    )
    parser.add_argument(
        "--jobs", type=natural, default=0, metavar="N", help="runs at a time; 0: the GPUs, or else the CPUs"
    )
    parser.add_argument("--root", type=Path, default=Path("runs/experiments"), help="directory of the runs")
    parser.add_argument("--out", type=Path, default=Path("docs/experiments"), help="directory of tables and pictures")
    parser.add_argument(
        "--draw-only",
        action="store_true",
        help="run nothing: draw the results so far, or without any the records in OUT",
    )


def speed(parser: Parser) -> None:
    """Declare the options of `speed`; all others are the trainer's."""
    parser.usage = "python -m dist_train speed [--steps N] [--out FILE] [the trainer's options]"
    steps = (
        "steps of each measurement; 0: as many as take some 5 seconds. A few say little about the loader, which has "
        "some ready"
    )
    parser.add_argument("--steps", type=natural, default=0, metavar="N", help=steps)
    parser.add_argument("--out", type=Path, default=Path("profile.json"), metavar="FILE", help="file for all numbers")


def report_page(parser: Parser) -> None:
    """Declare the options of `report`."""
    parser.add_argument(
        "runs", nargs="+", type=run_named, metavar="RUN", help="directory of a run, or its name in runs/"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="file of the page (default: RUN/report.html; of several runs, in the folder that they lie in)",
    )
    parser.add_argument(
        "--serve",
        action="store_true",
        help="write no file: serve the page to a browser here or behind ssh, until Ctrl-C",
    )
    parser.add_argument("--port", type=natural, default=0, metavar="N", help="of --serve; 0: one that is free")


def gpu_report(parser: Parser) -> None:
    """Declare the options of `gpu-report`."""
    parser.usage = "python -m dist_train gpu-report [PART ...] [--minutes M] [--out PREFIX] [--data DIR]"
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"parts to run (default: all), of {', '.join(GPU_PARTS)}"
    )
    parser.add_argument(
        "--minutes",
        type=positive,
        default=GPU_MINUTES,
        metavar="M",
        help="minutes for all parts together; the most telling come first, what does not fit is left out; 30 for all",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="PREFIX",
        help="of the files PREFIX.json and PREFIX.txt (default: gpu-report, with the names of the parts if only some)",
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="training set to decode (default: generated images)")
    parser.add_argument("--inside", help=SUPPRESS)  # the part that this process is
    parser.add_argument("--seconds", type=float, help=SUPPRESS)  # that it has
    parser.add_argument("--result", type=Path, help=SUPPRESS)  # where it leaves what it finds
