"""What wandb shows of a run besides its numbers: pictures, tables of its classes, its best checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dist_train.monitor import portraits
from dist_train.monitor.portraits import Drawing, What
from dist_train.rundir.checkpoint import find

EVERY = 600.0  # seconds between two pictures of what the net has learnt
LAST, ENOUGH = 30.0, 10.0  # seconds that pictures are waited for at the end at most, and that are left then at least
MOST = 50  # classes that a confusion matrix has room for
PAIRS = 100  # most confused ones, of more classes


def patience(seconds: float) -> float:
    """How long pictures are waited for at the end of a run, of the seconds that a stop may take: most of these may be
    needed to send what there is."""
    return min(LAST, max(0.0, seconds / 2 - ENOUGH))


class Pictures:
    """Draws a run beside its training, and hands over what is drawn: what the net is shown once, and after
    validations, not more often than every ten minutes, what it takes for something else and its first kernels.

    Args:
        say: told, once, why something cannot be drawn.
        inputs: whether those are still to be drawn.
    """

    def __init__(self, run: Path, say: Callable[[str], None], *, inputs: bool) -> None:
        self._run, self._say, self._told = run, say, False
        self._drawn = -EVERY  # when it was begun
        self._news = False  # whether the net has learnt since
        self._under_way = dict[What, Drawing]()
        if inputs:
            self._begin("inputs")

    def validated(self) -> None:
        """There is a validation, behind which the state is saved soon."""
        self._news = True

    def look(self, *, last: float = 0) -> dict[str, Path]:
        """What has been drawn since the last look.

        Args:
            last: nothing follows; so the newest state is drawn, if it was not yet, and waited for, so many seconds.
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
        """Nothing is drawn any more."""
        ended, self._under_way = self._under_way, {}  # another thread may look at them
        for drawing in list(ended.values()):
            drawing.end()

    def _begin(self, what: What) -> None:
        if what in self._under_way:  # of a state that is gone
            self._under_way[what].end()
        self._under_way[what] = Drawing(self._run, what)


def images(pictures: dict[str, Path]) -> dict[str, Any]:
    """Files as wandb's images."""
    if not pictures:
        return {}
    import wandb

    return {name: wandb.Image(str(path)) for name, path in pictures.items()}


def tables(run: Path) -> dict[str, Any]:
    """How the last validation went for each class, and what was taken for what: of many classes the pairs that were so
    most often. Raises UserError where none has been counted."""
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
    """The best checkpoint as an artifact, which is not copied first. Raises UserError where it was lost."""
    import wandb

    found = find(run, "best")
    artifact = wandb.Artifact(name, type="model")
    for path in sorted(found.path.iterdir()) if found else []:
        artifact.add_file(str(path), policy="immutable", skip_cache=True)
    return artifact
