"""Confusion matrix: counted with the errors, over all ranks, and kept in the run directory.

`python -m tests.test_confusion RUN OUT` is what one rank of `test_any_number_of_ranks_counts_the_same` does.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dist_train import build
from dist_train.analysis.trained import open_run
from dist_train.ranks.world import World, join
from dist_train.rundir.confusion import FILE, Confusion, ConfusionError, ConfusionFile, read
from dist_train.rundir.lease import Lease
from dist_train.rundir.writer import Writer
from dist_train.validate import Tally, padded, validate
from tests.helpers.compare import records
from tests.helpers.launch import finish, launch, python, spawn

BATCH = 24  # as tests.helpers.launch.SMALL has it
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def finished(shard_sets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one epoch; the last layer has two outputs that stand for no class."""
    run = tmp_path_factory.mktemp("runs") / "run"
    result = launch(shard_sets, run, "--train.epochs=1", "--model.outputs=5", ranks=0)
    assert result.returncode == 0, result.stderr
    return run


def keep(run: Path, counts: Confusion, names: list[str], *, writes: bool = True) -> list[str]:
    """Write them into a run directory; what was said."""
    lease, writer, said = Lease(run), Writer(), list[str]()
    if writes:
        lease.acquire()
    ConfusionFile(lease, said.append, writer, writes=writes).put(counts, names, 7, 0)
    writer.wait()
    return said


def same(counts: Confusion, others: Confusion) -> None:
    for name, values in vars(counts).items():
        assert values.dtype == np.int64
        np.testing.assert_array_equal(values, vars(others)[name], name)


def test_what_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against one image after the other; outputs 7 and 8 stand for no class. With too many classes no pairs."""
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(400, 9)).astype(np.float32), rng.integers(0, 6, 400)  # class 6 has no image
    taken, top5 = np.zeros((7, 8), np.int64), np.zeros(7, np.int64)
    for values, label in zip(logits, labels, strict=True):
        order = sorted(range(9), key=lambda output: -values[output])
        taken[label, min(order[0], 7)] += 1
        top5[label] += label in order[:5]
    for most in (7, 6):
        monkeypatch.setattr("dist_train.validate.MOST", most)
        tally = Tally(7, CPU)
        for part in np.array_split(np.arange(400), 9):
            tally.add(torch.from_numpy(logits[part]), torch.from_numpy(labels[part]))
        found = tally.found()
        np.testing.assert_array_equal(found.samples, taken.sum(1))
        np.testing.assert_array_equal(found.top1, taken.diagonal())
        np.testing.assert_array_equal(found.top5, top5)
        pairs = np.argwhere(taken) if most == 7 else np.zeros((0, 2))
        np.testing.assert_array_equal(np.stack([found.label, found.predicted], 1), pairs)
        np.testing.assert_array_equal(found.count, taken[taken > 0] if most == 7 else [])
    assert taken[:, 7].sum() > 50
    meta = torch.device("meta")  # where nothing can be waited for
    Tally(7, meta).add(torch.empty(20, 9, device=meta), torch.empty(20, dtype=torch.int64, device=meta))


@pytest.mark.integration
def test_a_run_keeps_what_its_net_takes_for_what(finished: Path) -> None:
    """The file against a plain computation, and the recorded scores against the sums that they were before, bit for
    bit."""
    run = open_run(finished, CPU)
    loader = build.fixed_loader(run.config, World.single(CPU), run.val, run.train, batch=BATCH)
    total, probable, labels = torch.zeros(1, dtype=torch.float64), [], []
    with torch.inference_mode():
        for batch in loader.epoch():
            logits = run.model(padded(batch.inputs, BATCH))[: len(batch.labels)].float()
            total += F.cross_entropy(logits, batch.labels, reduction="sum")
            probable.append(logits.argsort(1, descending=True).numpy())
            labels.append(batch.labels.numpy())
    order, label = np.concatenate(probable), np.concatenate(labels)
    counts, names = read(finished)
    assert names == run.classes
    matrix = np.zeros((3, 4), np.int64)
    matrix[counts.label, counts.predicted] = counts.count
    expected = np.zeros((3, 4), np.int64)
    np.add.at(expected, (label, np.minimum(order[:, 0], 3)), 1)
    np.testing.assert_array_equal(matrix, expected)
    np.testing.assert_array_equal(counts.samples, [21, 21, 21])
    np.testing.assert_array_equal(counts.top1, expected.diagonal())
    np.testing.assert_array_equal(counts.top5, [21, 21, 21])

    (line,) = records(finished, "validation")
    assert line["loss"] == float(total) / 63
    assert line["top1_error"] == (63 - int((order[:, 0] == label).sum())) / 63
    assert (line["top5_error"], line["samples"]) == (0, 63)


@pytest.mark.integration
@pytest.mark.parametrize("ranks", [0, 2])
def test_any_number_of_ranks_counts_the_same(finished: Path, tmp_path: Path, ranks: int) -> None:
    result = finish(spawn(python("tests.test_confusion", str(finished), str(tmp_path), ranks=ranks)))
    assert result.returncode == 0, result.stderr
    same(read(tmp_path)[0], read(finished)[0])
    (line,) = records(finished, "validation")
    assert json.loads(result.stdout) == [line["top1_error"], line["top5_error"], pytest.approx(line["loss"]), 63]


def test_a_disk_that_is_full_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing else comes of it; what was there stays. Other ranks write nothing, nor does who has lost the run."""
    counts = Confusion(*(np.arange(n) for n in (3, 3, 3, 2, 2, 2)))
    assert keep(tmp_path, counts, ["a", "b", "ü"], writes=False) == []
    assert not (tmp_path / FILE).exists()
    with pytest.raises(ConfusionError, match="it is written when the net is validated"):
        read(tmp_path)
    assert keep(tmp_path, counts, ["a", "b", "ü"]) == []
    found, names = read(tmp_path)
    assert names == ["a", "b", "ü"]
    same(found, counts)

    before = (tmp_path / FILE).read_bytes()

    def is_full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as full:
        full.setattr(np, "savez_compressed", is_full)
        (said,) = keep(tmp_path, Confusion(*(np.zeros(3, np.int64),) * 6), ["a"])
    assert said.startswith(f"{FILE} cannot be written ([Errno 28] No space left on device")
    assert (tmp_path / FILE).read_bytes() == before

    writer, lease = Writer(), Lease(tmp_path)  # one that has no token
    ConfusionFile(lease, print, writer, writes=True).put(counts, ["another's"], 7, 0)
    writer.wait()
    assert (tmp_path / FILE).read_bytes() == before
    bomb = BytesIO()
    np.savez_compressed(bomb, names=np.zeros(1 << 29, np.uint8))
    for damage in (before[:100], before[:-100], b"", before.replace(b"samples", b"simples"), bomb.getvalue()):
        (tmp_path / FILE).write_bytes(damage)
        with pytest.raises(ConfusionError, match="is damaged"):
            read(tmp_path)


@pytest.mark.parametrize(
    "wrong",
    [
        {"label": [2]},
        {"label": [-1]},
        {"predicted": [3]},
        {"top1": [1]},
        {"count": [1, 2]},
        {"label": [[1]], "predicted": [[1]], "count": [[1]]},
    ],
)
def test_counts_that_are_not_those_of_their_classes(wrong: dict[str, Any], tmp_path: Path) -> None:
    """Two classes; 2 as a prediction stands for an output that is no class."""
    good = {"samples": [1, 1], "top1": [1, 0], "top5": [1, 1], "label": [1], "predicted": [2], "count": [1]}
    names = np.frombuffer(b'["a", "b"]', np.uint8)
    np.savez(tmp_path / FILE, names=names, **{key: np.array(value) for key, value in good.items()})
    assert read(tmp_path)[1] == ["a", "b"]
    np.savez(tmp_path / FILE, names=names, **{key: np.array(value) for key, value in (good | wrong).items()})
    with pytest.raises(ConfusionError, match="is damaged"):
        read(tmp_path)


def main() -> None:
    world, run = join("cpu"), open_run(Path(sys.argv[1]), CPU)
    loader = build.fixed_loader(run.config, world, run.val, run.train, batch=BATCH)
    scores, counts = validate(run.model, loader, world, build.autocast(run.config, world), lambda: None, [])
    keep(Path(sys.argv[2]), counts, run.classes, writes=world.rank == 0)
    if world.rank == 0:
        print(json.dumps([*vars(scores).values()]), flush=True)
    world.leave()


if __name__ == "__main__":
    main()
