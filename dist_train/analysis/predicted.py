"""`python -m dist_train predict RUN IMAGE|FOLDER|PATTERN|SET ...`: the most probable classes of images.

An image file is shown to the net as if `pack` had stored it beside the training images: the same bytes go through the
same graph as in validation. A set's errors are those of `evaluate`.
"""

from __future__ import annotations

import json
import math
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from dist_train.analysis import evaluate
from dist_train.analysis.exported import AGAIN, ExportError, description_of, load_export
from dist_train.analysis.options import CROPS, NET, STDOUT, WEIGHTS, check_place
from dist_train.analysis.predict import LEFT_OUT, Probabilities, predict, probabilities, summarise
from dist_train.analysis.trained import Trained, device_option, open_run, read_config
from dist_train.config import Config, TrainConfig
from dist_train.data import difference
from dist_train.data_config import DataConfig
from dist_train.ranks import launcher
from dist_train.ranks.world import World, join
from pipelines.augment import scale
from pipelines.cli import FAILED, chosen_limits
from pipelines.errors import UsageError, UserError
from pipelines.files import as_text, replacing
from pipelines.limits import Limits, limited
from pipelines.loose import HeldImage, HeldSet, LooseFile, held_images, in_pieces, loose_files, packed_as
from pipelines.manifest import MANIFEST, Manifest, ShardError
from pipelines.misc import cpus
from pipelines.origin import some
from pipelines.remote.places import is_url
from pipelines.remote.sets import open_set
from pipelines.shards import ShardSet
from pipelines.speech import bar, in_line, left, say, show, telling, unheard, watched

TOP = 5  # classes of an image
WIDTH = 20  # of the bar of a certain class
PIECE = 4  # batches of image files that are held in memory at a time
MANY = 1000  # files from which on a log shows how far it is
NAMED = 20  # files that are no images, of which the names are kept
WANTED = "name images, folders of images, patterns in quotes, or shard sets"

Line = dict[str, Any]  # of JSON


class _Unread(Exception):
    """Nobody reads what is printed any more (`| head`), and nothing else is to be done."""


@dataclass
class _Outcome:
    """What becomes of the images.

    Attributes:
        tell: takes each line of JSON.
        shows: whether people read the predictions on stdout.
        stdout_only: whether nothing is written but stdout.
        others: number of files that were found in folders and are no images; `names` are the first.
    """

    tell: Callable[[Line], None]
    shows: bool
    stdout_only: bool
    predicted: int = 0
    unreadable: int = 0
    others: int = 0
    names: list[str] = field(default_factory=list)

    def found(self, path: str, best: Line) -> None:
        self.predicted += 1
        self.tell({"path": as_text(path)} | best)
        if self.shows:
            show(_block(path, best))
        self.heard()

    def heard(self) -> None:
        if self.stdout_only and left(unheard()):
            raise _Unread

    def refused(self, image: HeldImage, why: str) -> None:
        path = image.file.path
        if image.meant:
            self.unreadable += 1
            say(f"{in_line(path)} cannot be read: {in_line(why)}")
            self.tell({"path": as_text(path), "error": why})
        else:
            self.others += 1
            self.names += [path] if len(self.names) < NAMED else []


def start(args: Namespace) -> int:
    """Predict, and print. Returns 0, or 1 if an image cannot be read. Raises UserError, OSError."""
    if launcher.size() > 1:
        raise UsageError("predict works in one process: start it without torchrun")
    sets = [text for text in args.images if is_url(text) or (Path(text).expanduser() / MANIFEST).exists()]
    typed = [text for text in args.images if text not in sets]
    if args.json not in (None, STDOUT):
        check_place(args.json, "--json")
    with device_option():
        world = join(args.device)
    try:
        run = _opened(args, world)
        with ExitStack() as stack:
            outcome = _Outcome(_teller(args.json, stack), args.json != STDOUT, args.json in (None, STDOUT))
            opened = [_opened_set(run, place) for place in sets]
            with suppress(_Unread):
                if typed:
                    _predict_files(run, world, typed, args, outcome)
                for val in opened:
                    _predict_set(replace(run, val=val), world, args, outcome)
    finally:
        world.leave()
    return FAILED if outcome.unreadable else 0


def _teller(path: Path | None, stack: ExitStack) -> Callable[[Line], None]:
    """Writes lines of JSON to where --json says. A file takes its place when all is written."""
    if path is None:
        return lambda _: None
    if path == STDOUT:
        return lambda line: show(json.dumps(line))
    file = stack.enter_context(replacing(path))

    def write(line: Line) -> None:
        file.write(json.dumps(line).encode() + b"\n")

    return write


def _opened(args: Namespace, world: World) -> Trained:
    """A run, of which the validation set need not be there; or an exported net."""
    if args.run.suffix not in (NET, WEIGHTS) and not args.run.is_file():
        train = read_config(args.run, trusting=args.trust).data.train
        return open_run(args.run, world.device, args.checkpoint, train, trusting=args.trust)
    if args.checkpoint != "last":
        raise UsageError(f"--checkpoint chooses one of a run, and {args.run} holds one net: leave it out")
    exported = load_export(args.run, world.device, trusting=args.trust)
    about, inputs, trained = exported.about, exported.about.inputs, exported.about.training_set
    manifest = Manifest(
        split="",
        samples=trained.samples,
        classes=about.classes,
        shards=[],
        index_sha256=trained.fingerprint,
        mean=trained.mean,
        std=trained.std,
        eigenvalues=[0.0] * 3,
        eigenvectors=np.eye(3).tolist(),
        stored=trained.stored,
    )
    if [inputs.mean, inputs.std] != [values.tolist() for values in scale(inputs.scale, manifest)]:
        raise ExportError(
            f"{description_of(args.run)} is damaged (inputs.mean and inputs.std are not those of inputs.scale and "
            f"training_set): {AGAIN}"
        )
    side, square = inputs.resize.shorter_side, inputs.center_square
    data = DataConfig(resize=side, crop=inputs.crop, center_square=square, inputs=inputs.scale)
    config, held = Config(data=data, train=TrainConfig(precision="off")), HeldSet(manifest)
    held.place = str(description_of(args.run))
    return Trained(
        args.run, config, exported.model, held.classes, about.step, about.epoch, about.checkpoint, held, held
    )


def _predict_files(run: Trained, world: World, typed: Sequence[str], args: Namespace, outcome: _Outcome) -> None:
    """Predict these files, and those in these folders. Raises UserError if no image is among them."""

    def files() -> Iterator[LooseFile]:
        return chain.from_iterable(map(loose_files, typed))

    with telling("looking for images"):
        many, missing = 0, list[LooseFile]()
        for file in files():
            many += 1
            missing += [file] if file.why and not file.listed else []
    if many == len(missing):
        raise UserError(f"{_absent(missing, typed)}: {WANTED}")
    batch, how = min(args.batch, many), packed_as(run.train.manifest, run.train.place)
    with (
        limited(chosen_limits(args)),
        # On a terminal predictions scroll by, and a bar would stand among them.
        bar(many, "predict", "img", speaks=not watched("stdout"), lines=many > MANY) as done,
    ):
        for piece in in_pieces(held_images(files(), how, cpus()), PIECE * batch):
            _predict_piece(run, world, piece, CROPS[args.crops], batch, outcome)
            done.update(len(piece))
    if outcome.others:
        say(f"files that are no images: {outcome.others} ({some(outcome.names)})")
    if not outcome.predicted + outcome.unreadable:
        raise UserError(f"{_absent(missing, typed)}: {WANTED}")


def _absent(missing: Sequence[LooseFile], typed: Sequence[str]) -> str:
    """The sentence on arguments in which there is no image."""
    if missing:
        return f"{in_line(missing[0].path)} cannot be read ({missing[0].why})"
    return f"there is no image in {' or '.join(map(in_line, typed[:3]))}"


def _predict_piece(
    run: Trained, world: World, piece: Sequence[HeldImage], views: int, batch: int, outcome: _Outcome
) -> None:
    readable = [image for image in piece if image.jpeg]
    best = iter(list[tuple[Line, bool]]())
    if readable:
        held = replace(run, val=HeldSet(run.train.manifest, readable))
        numbers = np.arange(len(readable))
        found = probabilities(held, world, views, batch, samples=numbers, told=lambda _: None)
        best = zip(_best(run, found), found.bad.tolist(), strict=True)
    for image in piece:
        line, bad = next(best) if image.jpeg else ({}, False)
        if line and not bad:
            outcome.found(image.file.path, line)
        else:
            outcome.refused(image, image.why or "DALI cannot decode it")


def _predict_set(run: Trained, world: World, args: Namespace, outcome: _Outcome) -> None:
    """Predict the set of `run.val`, and show its errors. Raises UserError if it cannot be read."""
    val, views = run.val, CROPS[args.crops]

    def seen(found: Probabilities) -> None:
        labels = val.labels(found.samples).tolist()
        rows = zip(found.samples.tolist(), labels, _best(run, found), found.bad.tolist(), strict=True)
        for sample, label, best, bad in rows:
            told = {"error": "cannot be decoded"} if bad else {"label": val.classes[label]} | best
            outcome.tell({"path": f"{val.place}/{val.name(sample)}"} | told)
        outcome.heard()

    table = predict([run], world, views=views, batch=args.batch, seen=seen if args.json else None)
    report = {"crops": args.crops, "views": views} | summarise(table, [run])
    outcome.unreadable += int(table[:, LEFT_OUT].sum()) - len(val.quarantined)
    counted = {name: value for name, value in report.items() if not isinstance(value, list)}
    outcome.tell({"set": counted.pop("split")} | counted)
    if outcome.shows:
        show(evaluate.describe(report))


def _opened_set(run: Trained, place: str) -> ShardSet:
    """Raises UserError if it is not to be had, or its classes are not the run's."""
    data = run.config.data
    if is_url(place) and not data.cache:
        raise UserError(f"{place} is not on this machine: download it, and name the file or the folder")
    with limited(Limits(pixels=data.max_pixels)):
        val = open_set(place if is_url(place) else Path(place).expanduser(), cache=data.cache, cache_gb=data.cache_gb)
    if val.classes != run.classes:
        how = difference(val.classes, run.classes)
        raise ShardError(
            f"the classes of {val.place} and {run.directory} differ {how}, so it has no errors: give the images "
            f"themselves, or a set of the same classes"
        )
    return val


def _best(run: Trained, found: Probabilities) -> Iterator[Line]:
    """The most probable classes of each image, and their probabilities. Of equals the first is the more probable."""
    p = found.probabilities.numpy()
    order = np.argsort(-p, axis=1, kind="stable")[:, :TOP]
    for outputs, row in zip(order, np.take_along_axis(p, order, axis=1), strict=True):
        numbers = [float(str(number)) if math.isfinite(number) else None for number in row]  # the digits of a float32
        yield {"classes": [run.output_name(int(output)) for output in outputs], "probabilities": numbers}


def _block(path: str, best: Line) -> str:
    """The prediction of an image for people."""
    lines = [in_line(path)]
    for name, p in zip(best["classes"], best["probabilities"], strict=True):
        p = math.nan if p is None else p
        filled = "" if math.isnan(p) else "#" * round(WIDTH * p)
        lines.append(f"{p:9.2%}  {filled:{WIDTH}}  {in_line(name)}")
    return "\n".join([*lines, ""])
