"""Pictures, tables of the classes and the best checkpoint of a run, for wandb."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dist_train.rundir import confusion
from dist_train.rundir.checkpoint import find

MOST = 50  # classes in a confusion matrix
PAIRS = 100  # most frequent confusions shown of more classes


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

    counts = confusion.classes(run)
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
