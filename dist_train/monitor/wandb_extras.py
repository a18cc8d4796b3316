"""Pictures, tables of the classes and the best checkpoint of a run, for wandb."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dist_train.monitor import portraits
from dist_train.monitor.portraits import Drawing, What
from dist_train.rundir.checkpoint import find

EVERY = 600.0  # seconds between two pictures of the net
LAST, ENOUGH = 30.0, 10.0  # seconds: longest wait for pictures at the end, and least time left after it
MOST = 50  # classes in a confusion matrix
PAIRS = 100  # most frequent confusions shown of more classes


def patience(seconds: float) -> float:
    """Seconds to wait for pictures at the end of a run, out of those that a stop may take: most of these may be needed
    for sending."""
    return min(LAST, max(0.0, seconds / 2 - ENOUGH))


class Pictures:
    """Draws pictures of a run beside its training: the net's inputs once; its errors and first kernels after
    validations, every ten minutes at most.

    Args:
        say: prints, once, why something cannot be drawn.
        inputs: whether the inputs are still to be drawn.
    """

    def __init__(self, run: Path, say: Callable[[str], None], *, inputs: bool) -> None:
        self._run, self._say, self._told = run, say, False
        self._drawn = -EVERY  # when the last drawing was begun
        self._news = False  # whether there was a validation since
        self._under_way = dict[What, Drawing]()
        if inputs:
            self._begin("inputs")

    def validated(self) -> None:
        """Notes a validation, after which the state is saved soon."""
        self._news = True

    def look(self, *, last: float = 0) -> dict[str, Path]:
        """Pictures drawn since the last look.

        Args:
            last: if not 0, this is the last look: the newest state is drawn, and waited for, so many seconds.
        """
        if self._news and (last or time.monotonic() - self._drawn > EVERY):
            self._news, self._drawn = False, time.monotonic()
            self._begin("wrong")
            self._begin("kernels")
        until, found = time.monotonic() + last, dict[str, Path]()
        for what, drawing in list(self._under_way.items()):
            picture = drawing.wait(until - time.monotonic()) if last else drawing.poll()
            if picture:
                found[f"pictures/{what}"] = picture
            if drawing.failed and not self._told:
                self._say(f"wandb: no picture of {what} ({drawing.failed})")
                self._told = True
            if picture or drawing.failed:
                self._under_way.pop(what, None)
        return found

    def end(self) -> None:
        """Stops all drawing."""
        ended, self._under_way = self._under_way, {}  # another thread may be reading them
        for drawing in list(ended.values()):
            drawing.end()

    def _begin(self, what: What) -> None:
        if what in self._under_way:  # it shows an older state
            self._under_way[what].end()
        self._under_way[what] = Drawing(self._run, what)


def images(pictures: dict[str, Path]) -> dict[str, Any]:
    """Picture files as wandb images."""
    if not pictures:
        return {}
    import wandb

    return {name: wandb.Image(str(path)) for name, path in pictures.items()}


def tables(run: Path) -> dict[str, Any]:
    """Error per class and confusion matrix of the last validation; with many classes, the most frequent confusions.
    Raises UserError if there are no counts."""
    import wandb

    counts = portraits.classes(run)
    names, samples, right = counts.names, counts.samples.tolist(), counts.top1.tolist()
    rows = [[name, n, 1 - hits / n if n else None] for name, n, hits in zip(names, samples, right, strict=True)]
    found = {"tables/classes": wandb.Table(columns=["class", "images", "top-1 error"], data=rows)}
    if len(names) <= MOST:
        body = [[name, *row] for name, row in zip(names, counts.matrix().tolist(), strict=True)]
        found["tables/confusion"] = wandb.Table(columns=["class", *names], data=body)
    else:
        pairs = [[names[label], names[taken], n] for label, taken, n in counts.pairs[:PAIRS]]
        found["tables/confused"] = wandb.Table(columns=["class", "taken for", "images"], data=pairs)
    return found


def checkpoint(run: Path, name: str) -> Any:
    """The best checkpoint as an artifact, without a copy. Raises UserError if it is lost."""
    import wandb

    found = find(run, "best")
    artifact = wandb.Artifact(name, type="model")
    for path in sorted(found.path.iterdir()) if found else []:
        artifact.add_file(str(path), policy="immutable", skip_cache=True)
    return artifact
