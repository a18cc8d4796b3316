"""The options of the verbs, apart from what they start."""

from __future__ import annotations

from argparse import SUPPRESS
from pathlib import Path

from pipelines.cli import Parser, natural, positive

FIGURES = ("kernels", "top5", "nearest")  # of the paper, which are drawn if none is named
CROPS = {"one": 1, "five": 5, "ten": 10}  # fixed views that `evaluate` averages
# The parts of `gpu-report` in their order, and the seconds that each may take; all together, GPU_MINUTES. The last one
# takes what the others leave, and does the most telling first.
GPU_PARTS = {"machine": 60, "decoder": 90, "pooling": 60, "tests": 240, "resume": 300, "drills": 180, "speed": 600}
GPU_MINUTES = 10


def evaluate(parser: Parser) -> None:
    """Declare the options of `evaluate`."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="directory of a run")
    parser.add_argument(
        "--crops", choices=list(CROPS), default="one", help="centre; and corners; and reflections of these five"
    )
    parser.add_argument("--split", type=Path, metavar="DIR", help="shard set in the place of the validation set")
    parser.add_argument("--checkpoint", default="last", help="last, best, or the name of one")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where the net computes")
    parser.add_argument("--batch", type=positive, default=128, metavar="N", help="images of a forward pass per device")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where all numbers go")


def figures(parser: Parser) -> None:
    """Declare the options of `figures`."""
    parser.add_argument("run", type=Path, metavar="RUN", help="directory of a run")
    parser.add_argument("--checkpoint", choices=["last", "best"], default="last", help="whose weights are taken")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: a GPU if there is one")
    parser.add_argument("--images", type=positive, default=8, metavar="N", help="validation images per figure")
    parser.add_argument("--neighbours", type=positive, default=6, metavar="K", help="training images beside each")
    parser.add_argument(
        "--train-images", type=natural, default=10000, metavar="M", help="training images searched; 0: all"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=[*FIGURES, "inputs", "wrong"],
        default=FIGURES,
        metavar="NAME",
        help="some only, or another one: inputs, what the net is shown; wrong, images that it gets wrong",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the figures go; without: RUN/figures")


def experiments(parser: Parser) -> None:
    """Declare the options of `experiments`; it passes all others on to the trainer."""
    parser.add_argument("names", nargs="*", metavar="NAME", help="without: all of configs/experiments")
    parser.add_argument("--seeds", type=natural, default=3, metavar="N", help="seeds of an arm that gives none")
    parser.add_argument(
        "--jobs", type=natural, default=0, metavar="N", help="runs at a time; 0: the GPUs, or else the CPUs"
    )
    parser.add_argument("--root", type=Path, default=Path("runs/experiments"), help="where the runs lie")
    parser.add_argument("--out", type=Path, default=Path("docs/experiments"), help="where tables and pictures go")
    parser.add_argument("--draw-only", action="store_true", help="run nothing; draw what has been run")


def speed(parser: Parser) -> None:
    """Declare the options of `speed`; all others are the trainer's."""
    parser.usage = "python -m dist_train speed [--steps N] [--out FILE] [the trainer's options]"
    steps = (
        "of each measurement; 0: as many as take some 5 seconds. Few tell little of the loader, which has some ready"
    )
    parser.add_argument("--steps", type=natural, default=0, metavar="N", help=steps)
    parser.add_argument("--out", type=Path, default=Path("profile.json"), metavar="FILE", help="where all numbers go")


def gpu_report(parser: Parser) -> None:
    """Declare the options of `gpu-report`."""
    parser.usage = "python -m dist_train gpu-report [PART ...] [--minutes M] [--out PREFIX] [--data DIR]"
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"some only, of {', '.join(GPU_PARTS)}")
    parser.add_argument(
        "--minutes",
        type=positive,
        default=GPU_MINUTES,
        metavar="M",
        help="minutes for all parts together: what does not fit is left out, the most telling comes first; 30 for all",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="PREFIX",
        help="of the files PREFIX.json and PREFIX.txt; without: gpu-report, and the names of the parts if some only",
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="training set to decode; without: generated images")
    parser.add_argument("--inside", help=SUPPRESS)  # the part that this process is
    parser.add_argument("--seconds", type=float, help=SUPPRESS)  # that it has
    parser.add_argument("--result", type=Path, help=SUPPRESS)  # where it leaves what it finds
