"""Samples found undecodable in the middle of a run."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dist_train.rundir import events
from pipelines import quarantine
from pipelines.augment import Augment
from pipelines.dali import Decode
from pipelines.handover import HandOver
from pipelines.loader import Loader, Read
from pipelines.manifest import ShardError
from pipelines.pack import Options, pack
from pipelines.plan import FixedPlan, Plan, TrainingPlan
from pipelines.shards import BadSample, ShardSet
from pipelines.sources import ImageFolder
from pipelines.verify import verify
from tests.conftest import TINTS, break_sample, photograph
from tests.helpers.compare import records, status
from tests.helpers.launch import launch

pytestmark = pytest.mark.integration


def test_replaced_by_the_same_sample_at_any_world_size(
    damaged: tuple[Path, list[int]], capsys: pytest.CaptureFixture[str]
) -> None:
    root, bad = damaged
    shards = ShardSet(root / "train")
    plan = TrainingPlan(shards, Augment(72, 67), shards.manifest, seed=4)
    shown: dict[int, list[np.ndarray]] = {}
    for size in (1, 2, 3):
        steps: list[list[np.ndarray]] = [[] for _ in range(10)]
        replaced = 0
        for rank in range(size):
            loader = Loader(plan, shards.manifest, batch=24, dp_rank=rank, dp_size=size, decode=Decode(threads=1))
            for i, batch in enumerate(loader.epoch(1)):
                steps[i].append(batch.samples)
                replaced += batch.replaced
                assert len(batch.inputs) == len(batch.labels) == len(batch.samples)
                np.testing.assert_array_equal(batch.labels, shards.index["label"][batch.samples])
        shown[size] = [np.concatenate(s) for s in steps]
        wanted = Loader(plan, shards.manifest, batch=240).samples(1, 0)[0]
        seen = np.concatenate(shown[size])
        assert replaced == 3
        assert not set(seen) & set(bad)
        assert (seen != wanted).sum() == 3, "the others keep their places"
        for a, b in zip(shown[1], shown[size], strict=True):
            np.testing.assert_array_equal(a, b)
    told = capsys.readouterr().err
    for sample in bad:
        assert told.count(f"{shards.name(sample)} is damaged: another sample takes its place") == 3  # worlds


def shown(root: Path, size: int = 1) -> tuple[list[list[int]], list[list[int]], int]:
    """Samples shown at each step of two training epochs and a validation, and how many were found bad."""
    train, val = ShardSet(root / "train"), ShardSet(root / "val")
    replaced = 0

    def steps(plan: Plan, epoch: int) -> list[list[int]]:
        nonlocal replaced
        found: list[list[int]] = []
        for rank in range(size):
            loader = Loader(plan, train.manifest, batch=24, dp_rank=rank, dp_size=size, decode=Decode(threads=1))
            found = found or [[] for _ in range(loader.steps)]
            for step, batch in zip(found, loader.epoch(epoch), strict=True):
                step += batch.samples.tolist()
                replaced += batch.replaced
        return found

    plan = TrainingPlan(train, Augment(72, 67), train.manifest, seed=4)
    training = [step for epoch in (0, 1) for step in steps(plan, epoch)]
    return training, steps(FixedPlan(val, Augment(72, 67)), 0), replaced


def test_verify_changes_no_step(damaged: tuple[Path, list[int]]) -> None:
    """Samples that it lists are not shown, have the same substitutes as before, and are not counted."""
    root, bad = damaged
    before, validation, replaced = shown(root)
    assert replaced == 2 * len(bad)
    assert len(verify(root / "train", workers=1)) == len(bad) + 3  # and each tar's hash
    assert ShardSet(root / "train").quarantined.tolist() == bad
    for size in (1, 3):
        assert shown(root, size) == (before, validation, 0)
    train = ShardSet(root / "train")
    loader = Loader(TrainingPlan(train, Augment(72, 67), train.manifest, seed=4), train.manifest, batch=24)
    assert [loader.names(0, step) for step in range(10)] == [[train.name(i) for i in step] for step in before[:10]]
    break_sample(root / "train", 50)  # one more, of a later day
    after, _, replaced = shown(root)
    assert replaced == 2
    changed = [(a, b) for x, y in zip(before, after, strict=True) for a, b in zip(x, y, strict=True) if a != b]
    assert {a for a, _ in changed} == {50}


def test_validation_leaves_the_quarantined_out(shard_sets: Path, tmp_path: Path) -> None:
    """Every other sample counts exactly once, at any world size."""
    root = tmp_path / "sets"
    shutil.copytree(shard_sets, root)
    val = ShardSet(root / "val")
    bad = [0, 7, 62]
    rows = np.array(bad) - (np.cumsum(val.shard_samples) - val.shard_samples)[[val.shard_of(i) for i in bad]]
    lines = [{"shard": val.names[val.shard_of(i)], "row": int(row)} for i, row in zip(bad, rows, strict=True)]
    quarantine.write(root / "val", val.fingerprint, lines)
    for size in (1, 2, 3):
        _, validation, replaced = shown(root, size)
        assert [i for step in validation for i in step] == [i for i in range(63) if i not in bad]
        assert replaced == 0


def test_hardly_any_or_no_sample_is_left(shard_sets: Path, tmp_path: Path) -> None:
    directory = tmp_path / "val"
    shutil.copytree(shard_sets / "val", directory)
    val = ShardSet(directory)
    lines = [
        {"shard": name, "row": row}
        for name, n in zip(val.names, val.shard_samples.tolist(), strict=True)
        for row in range(n)
    ]
    quarantine.write(directory, val.fingerprint, lines[:-1])
    val = ShardSet(directory)
    loader = Loader(TrainingPlan(val, Augment(72, 67), val.manifest), val.manifest, batch=21)
    assert [set(batch.samples.tolist()) for batch in loader.epoch()] == [{62}] * 3
    quarantine.write(directory, val.fingerprint, lines)
    with pytest.raises(ShardError, match=r"quarantine.jsonl leaves no sample of .*: pack it again"):
        ShardSet(directory)


@pytest.mark.slow
@pytest.mark.integration
def test_the_advice_about_bad_samples_works(damaged: tuple[Path, list[int]], tmp_path: Path) -> None:
    """Too many bad samples; verify, as the message says; the same command. It ends like a run that allowed them."""
    root, _ = damaged
    words = ("--train.epochs=2", "--checkpoint.steps=1")
    assert launch(root, tmp_path / "allowed", *words, ranks=0).returncode == 0
    ended = launch(root, tmp_path / "run", *words, "--data.max_bad=1", ranks=0)
    assert ended.returncode == 2, ended.stderr
    advice = (
        f"2 samples could not be decoded, more than data.max_bad: run `python -m pipelines verify {root / 'train'}`"
    )
    assert advice in status(tmp_path / "run")["reason"]
    assert list((tmp_path / "run" / "checkpoints").glob("step-*")), "there is something to go on from"
    found = subprocess.run([sys.executable, *advice.partition("`python ")[2].rstrip("`").split()], check=False)
    assert found.returncode == 2
    went_on = launch(root, tmp_path / "run", *words, "--data.max_bad=1", ranks=0)
    assert went_on.returncode == 0, went_on.stderr
    assert "continuing from step-" in went_on.stderr
    assert status(tmp_path / "run")["state"] == "done"
    counts = ("bad_samples",)
    one, two = (
        [{k: v for k, v in line.items() if k not in counts} for line in records(tmp_path / name, "step")]
        for name in ("allowed", "run")
    )
    assert one == two


@pytest.mark.integration
def test_counted_and_limited(damaged: tuple[Path, list[int]], tmp_path: Path) -> None:
    root, bad = damaged
    result = launch(root, tmp_path / "run", "--train.epochs=1")
    assert result.returncode == 0, result.stderr
    assert records(tmp_path / "run", "step")[-1]["bad_samples"] == len(bad)
    told = [event["samples"] for event in events.read(tmp_path / "run") if event["event"] == "bad_samples"]
    assert told == sorted(set(told)), "once a record in which there are more"
    assert told[-1] == len(bad)
    assert result.stderr.count("is damaged: another sample takes its place") == len(bad)
    result = launch(root, tmp_path / "strict", "--train.epochs=1", "--data.max_bad=1", ranks=0)
    assert result.returncode == 2
    end = status(tmp_path / "strict")
    assert end["state"] == "failed"
    assert "2 samples could not be decoded, more than data.max_bad" in end["reason"]


def test_what_dali_cannot_decode(shard_sets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Images whose bytes are as indexed but that DALI refuses (here: cut short) are found and replaced."""
    shards = ShardSet(shard_sets / "train")
    bad = {5, 6, 150}

    def read(sample: int) -> np.ndarray:
        data = shards.read(sample)
        return data[: len(data) // 3] if sample in bad else data

    def batches(reading: Read) -> list[tuple[list[int], int]]:
        plan = TrainingPlan(shards, Augment(72, 67), shards.manifest)
        loader = Loader(plan, shards.manifest, batch=24, decode=Decode(threads=2), reading=reading)
        return [(batch.samples.tolist(), batch.replaced) for batch in loader.epoch(0)]

    whole, mended = batches(Read()), batches(Read(read=read))
    assert sum(replaced for _, replaced in mended) == 3
    for (a, _), (b, _) in zip(whole, mended, strict=True):
        assert all(x == y or (x in bad and y not in bad) for x, y in zip(a, b, strict=True))
    assert capsys.readouterr().err.count("cannot be decoded: another sample takes its place") == 3


def test_no_crop_decides_what_is_bad(tmp_path: Path) -> None:
    """Resized images truncated below the middle: every view detects them, the upper ones included."""
    (tmp_path / "folder" / "class").mkdir(parents=True)
    for i in range(6):
        image = photograph(np.random.default_rng(i), 90, 300, TINTS[i % 3])
        image.save(tmp_path / "folder" / "class" / f"{i}.jpg", quality=90, progressive=i % 2 == 0)
    pack(ImageFolder(tmp_path / "folder"), tmp_path / "set", Options(shorter_side=0), split="x", workers=1)
    shards = ShardSet(tmp_path / "set")

    def read(sample: int) -> np.ndarray:
        data = shards.read(sample)
        return data[: len(data) * 6 // 10].copy() if sample < 3 else data

    for view in range(5):
        plan = FixedPlan(shards, Augment(72, 67), view)
        loader = Loader(plan, shards.manifest, batch=6, decode=Decode(threads=1), reading=Read(read=read))
        (batch,) = loader.epoch()
        assert (loader.bad, batch.replaced) == ({0, 1, 2}, 3), view


def test_nothing_left_to_show(shard_sets: Path) -> None:
    shards = ShardSet(shard_sets / "val")

    def read(sample: int) -> np.ndarray:
        raise BadSample("all gone")

    loader = Loader(FixedPlan(shards, Augment(72, 67)), shards.manifest, batch=63, reading=Read(read=read))
    with pytest.raises(ShardError, match=r"no sample of .* can be decoded"):
        next(loader.epoch())


def test_an_error_that_is_not_decodings_blames_no_sample(shard_sets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a GPU out of memory."""

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(HandOver, "__call__", full)
    shards = ShardSet(shard_sets / "train")
    plan = TrainingPlan(shards, Augment(72, 67), shards.manifest)
    loader = Loader(plan, shards.manifest, batch=24, decode=Decode(threads=1))
    searched: list[range] = []
    monkeypatch.setattr(loader, "_find_bad", lambda _, steps: searched.append(steps))
    with pytest.raises(torch.OutOfMemoryError):
        next(loader.epoch())
    assert not searched
