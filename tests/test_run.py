"""A run as a user starts it."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import webdataset
import yaml
from PIL import Image

from dist_train.cli import parse
from dist_train.data import open_sets
from dist_train.rundir import events
from pipelines.indexing import index
from pipelines.manifest import ShardError
from pipelines.pack import Options, pack
from pipelines.sources import ImageFolder
from tests.helpers.compare import newest, records, status
from tests.helpers.launch import PLAIN, STEPS, command, finish, launch, spawn
from tests.helpers.server import fork

pytestmark = pytest.mark.integration


def test_two_ranks_from_start_to_done(shard_sets: Path, tmp_path: Path) -> None:
    run = tmp_path / "a run, ä"
    result = launch(shard_sets, run, "--monitor.wandb=offline", how="exec")
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.count("epoch 1/2: top-1 error") == 1, "only rank 0 speaks"
    for word in ("accuracy", "images/s", "curves", str(run)):
        assert result.stdout.count(word) >= 1, result.stdout

    assert [r["step"] for r in records(run, "step")] == list(range(1, 2 * STEPS + 1))
    checks = records(run, "validation")
    assert [(r["epoch"], r["step"], r["samples"]) for r in checks] == [(0, STEPS, 63), (1, 2 * STEPS, 63)]
    for r in checks:
        assert (r["top1_error"] * 63) % 1 == pytest.approx(0, abs=1e-6) or (r["top1_error"] * 63) % 1 > 1 - 1e-6
        assert r["top5_error"] == 0, "three classes"
    assert status(run) | {"state": "done", "step": 2 * STEPS, "epoch": 2} == status(run)
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["hidden"] == 32
    with Image.open(run / "curves.png") as curves:
        assert curves.size[0] >= 600
    assert newest(run)["state"]["epoch"] == 2
    best = json.loads((run / "checkpoints" / "best" / "meta.json").read_text())
    assert best["epoch"] == 1 + int(np.argmin([r["top1_error"] for r in checks]))
    assert list(run.glob("wandb/offline-run-*/run-*.wandb"))

    before = (run / "metrics.jsonl").read_bytes()
    again = launch(shard_sets, run, ranks=0)
    assert again.returncode == 0, again.stderr
    assert "outcome  done: epoch 2 was its last and is trained already; --train.epochs 4 goes on\n" in again.stdout
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_the_number_of_processes_changes_nothing_but_rounding(shard_sets: Path, tmp_path: Path) -> None:
    """One process without torchrun, with accumulation, and three ranks of unequal parts (25 = 8 + 8 + 9)."""
    runs = {"alone": (0, 1), "accumulating": (0, 4), "three": (3, 1)}
    for name, (ranks, pieces) in runs.items():
        extra = ("--train.global_batch=25", "--train.epochs=1", f"--train.accumulate={pieces}")
        result = launch(shard_sets, tmp_path / name, *extra, ranks=ranks, how="exec")
        assert result.returncode == 0, result.stderr
    assert len({r["loss"] for r in records(tmp_path / "alone", "step")}) == 9
    for name in ("accumulating", "three"):
        for kind in ("step", "validation"):
            for a, b in zip(records(tmp_path / "alone", kind), records(tmp_path / name, kind), strict=True):
                del a["kind"], b["kind"]
                assert b == pytest.approx(a, rel=1e-4), name


def test_a_division_that_comes_too_early_is_told(shard_sets: Path, tmp_path: Path) -> None:
    """Here every epoch divides: before the net has learned anything, by Adam at a useful lr after it has."""
    every = ("--schedule.name=milestones", "--schedule.milestones=[1,2,3]", "--train.epochs=3", "--optim.name=adam")
    net = ("--schedule.factor=1.01", "--model.width=1", "--model.dropout=0")
    told = {}
    for lr in ("1e-30", "3e-4"):
        result = launch(shard_sets, tmp_path / lr, *every, *net, f"--optim.lr={lr}", ranks=0)
        assert result.stderr.count("learning rate divided by 1.01") == 3, result.stderr
        told[lr] = result.stderr.count("no better than always naming the most common class (66.67%): move")
        errors = [r["top1_error"] for r in records(tmp_path / lr, "validation")]
        assert told[lr] == sum(error > 0.66 for error in errors)
        story = events.read(tmp_path / lr)
        assert [e["error"] for e in story if e["event"] == "division"] == errors
        assert sum(e["event"] == "alert" and "no better" in e["sentence"] for e in story) == told[lr]
        rates = [e["lr"] / float(lr) for e in story if e["event"] == "division"]
        assert rates == pytest.approx([1 / 1.01, 1 / 1.01**2, 1 / 1.01**3])
    assert told["1e-30"] == 3
    assert told["3e-4"] < 3


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision(shard_sets: Path, tmp_path: Path, precision: str) -> None:
    result = launch(shard_sets, tmp_path / "r", f"--train.precision={precision}", "--train.max_steps=3", ranks=0)
    assert result.returncode == 0, result.stderr
    losses = [r["loss"] for r in records(tmp_path / "r", "step")]
    assert losses[0] == pytest.approx(np.log(3), rel=0.3)
    scale = newest(tmp_path / "r")["scaler"].get("scale", 0)
    assert (scale > 1) == (precision == "fp16")


def test_a_torchvision_model(shard_sets: Path, tmp_path: Path) -> None:
    extra = ("--model.name=torchvision:squeezenet1_1", *PLAIN, "--data.inputs=standardized", "--optim.name=adam")
    result = launch(shard_sets, tmp_path / "r", *extra, "--optim.lr=1e-4", "--train.epochs=1", ranks=0)
    assert result.returncode == 0, result.stderr


def test_the_embedded_source_is_packed_first(tmp_path: Path) -> None:
    """Where the data cannot be had there is one sentence; where it is packed already nothing is fetched."""
    extra = ("--data.source=nosuchset",)
    result = launch(tmp_path / "none", tmp_path / "r", *extra, ranks=0)
    assert result.returncode == 2
    assert "torchvision has no data set 'nosuchset'" in result.stderr
    assert "Traceback" not in result.stderr


def test_foreign_sets_of_which_one_lacks_a_class(tmp_path: Path) -> None:
    """Without names the classes are as many as the largest label says: the remedy is that of tars, not of folders."""
    image = io.BytesIO()
    Image.new("RGB", (72, 72)).save(image, "PNG")
    for split, labels in (("train", range(3)), ("val", range(2))):
        (tmp_path / split).mkdir()
        with webdataset.TarWriter(str(tmp_path / split / "x.tar")) as tar:
            for label in labels:
                tar.write({"__key__": f"{label}", "png": image.getvalue(), "cls": label})
        index(tmp_path / split, classes=None, split=split, workers=1)
    sets = (f"--data.train={tmp_path / 'train'}", f"--data.val={tmp_path / 'val'}", "--train.global_batch=1")
    config, _ = parse([*sets, "--data.resize=72", "--data.crop=67"])
    with pytest.raises(ShardError) as refused:
        open_sets(config)
    assert str(refused.value).endswith(
        f"has 2, which differ in 2: labels would not mean the same, name all classes in one file, in the order of "
        f"their labels, and index with it what was not packed here (`python -m pipelines index --classes FILE "
        f"{tmp_path / 'val'}`)"
    )
    for split in ("train", "val"):
        index(tmp_path / split, classes=["a", "b", "c"], split=split, workers=1)
    assert open_sets(config)[1].classes == ["a", "b", "c"]


def test_bad_input_is_one_sentence(shard_sets: Path, image_folder: Path, tmp_path: Path) -> None:
    """Without a launcher the exit code is 2, and no run directory is begun."""
    folder = tmp_path / "folder"
    shutil.copytree(image_folder / "val", folder)
    shutil.rmtree(folder / "blue")
    other = tmp_path / "sets"
    other.mkdir()
    (other / "train").symlink_to(shard_sets / "train")
    pack(ImageFolder(folder), other / "val", Options(shorter_side=72), split="val", workers=1)
    cases = [
        (other, (), "3 classes and .*val has 2, which differ in blue: labels would not mean the same"),
        (tmp_path / "none", (), "no shards in .*none/train: make them with `python -m pipelines pack"),
        (
            shard_sets,
            ("--train.global_batch=2", "--train.accumulate=3"),
            r"smaller than ranks \(1\) x train.accumulate \(3\)",
        ),
        (shard_sets, ("--train.global_batch=241",), "larger than the 240 images"),
        (
            shard_sets,
            ("--data.crop=71",),
            "data.crop 71 does not fit the layers of alexnet: the nearest that does is 67",
        ),
        (shard_sets, ("--model.name=alexnt",), "did you mean 'alexnet'"),
        (shard_sets, ("--model.width=0.01",), "in_channels must be divisible by groups"),
        (shard_sets, (f"--model.init_from={shard_sets}",), "which is neither a run nor a checkpoint of one"),
        (shard_sets, ("--optim.lrr=1",), "unknown configuration key optim.lrr: did you mean optim.lr?"),
    ]
    for data, extra, message in cases:
        result = launch(data, tmp_path / "r", *extra, ranks=0)
        assert result.returncode == 2, result.stderr
        lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        assert "Traceback" not in result.stderr
        assert re.search(message, lines[0]), lines[0]
        assert not (tmp_path / "r" / "metrics.jsonl").exists()


def test_data_that_are_not_what_was_indexed(shard_sets: Path, tmp_path: Path) -> None:
    """A missing tar, and a validation tar of another size, are told before training; a training tar when it is due."""
    for split, name, harm, begun in (
        ("train", "shard-000001.tar", None, False),
        ("val", "shard-000000.tar", 512, False),
        ("train", "shard-000000.tar", 512, True),
    ):
        sets, run = tmp_path / f"{split}-{harm}", tmp_path / f"run-{split}-{harm}"
        shutil.copytree(shard_sets, sets)
        tar = sets / split / name
        if harm is None:
            tar.unlink()
        else:
            tar.write_bytes(tar.read_bytes()[:-harm])
        result = launch(sets, run, ranks=0)
        assert f"{tar} is " in result.stdout + result.stderr
        assert (result.returncode, "Traceback" in result.stderr, run.exists()) == (2, False, begun)
        if begun:
            assert status(run)["state"] == "failed"
            assert "is not the tar that was indexed" in status(run)["reason"]


@pytest.mark.slow
def test_wrong_command_lines_under_torchrun(shard_sets: Path, tmp_path: Path) -> None:
    """One sentence from rank 0, which also stands at the end of torchrun's report, a code that stops a script, and no
    run directory. What torchrun restarts ends the same way, at once."""
    none = tmp_path / "none"
    nowhere = (f"--data.train={none}/train", f"--data.val={none}/val")
    for words, sentence in [
        (("--optim.lrr=1",), "unknown configuration key optim.lrr: did you mean optim.lr?"),
        (("--model.name=alexnt",), "model.name 'alexnt' is unknown: did you mean 'alexnet'?"),
        (("--config=nosuch.yaml",), "nosuch.yaml does not exist"),
        (("--data.source=nosuchset", *nowhere), "torchvision has no data set 'nosuchset'"),
        (("--train.global_batch=1",), "train.global_batch 1 is smaller than ranks (2)"),
    ]:
        result = launch(shard_sets, tmp_path / "r", *words, how="exec" if words == ("--optim.lrr=1",) else None)
        assert result.returncode == 1, words
        said, _, report = result.stderr.rpartition("ChildFailedError")
        assert said.count("error: ") <= 1, "rank 0 may be ended before it says it, since the others have"
        assert not said.count("error: ") or sentence in said
        assert sentence in "".join(report.splitlines()[-6:])
        assert "exitcode  : 2 " in report
        assert not (tmp_path / "r").exists()
    again = launch(shard_sets, tmp_path / "r", "--train.global_batch=1", agent="--max-restarts=3", how="exec")
    assert again.returncode == 1
    assert 1 < again.stderr.count("train.global_batch 1 is smaller") <= 6, "4 attempts, and the report on 1 or 2 ranks"


@pytest.mark.slow
def test_what_one_rank_refuses_all_hear(shard_sets: Path, tmp_path: Path) -> None:
    """One that has no device, and one that finds no checkpoint: its sentence, and nobody waits for it."""
    script = tmp_path / "rank.sh"
    for mine, sentence in (
        ("--train.device=cuda", "train.device is cuda, but this node has "),
        ("--model.init_from=/nosuch", "model.init_from: there is no run /nosuch: "),
    ):
        script.write_text(f'[ $RANK = 1 ] && set -- "$@" {mine}\nexec {sys.executable} -m dist_train "$@"\n')
        words = command(shard_sets, tmp_path / "r", agent="--no-python")
        at = words.index("--no-python") + 1
        result = finish(spawn([*words[:at], "bash", str(script), *words[at + 2 :]], how="exec"), 60)
        assert result.returncode == 1
        said, _, report = result.stderr.rpartition("ChildFailedError")
        assert sentence in said
        assert report.count(sentence) == 2, report
        assert not (tmp_path / "r").exists()


def test_a_full_disk_takes_what_it_prints(damaged: tuple[Path, list[int]], tmp_path: Path) -> None:
    """The run goes on to its end, and that is its exit code; also where the loader has something to tell."""
    words, full = command(damaged[0], tmp_path / "r", "--train.epochs=1", ranks=0), Path("/dev/full")
    assert fork(words, {**os.environ, "OMP_NUM_THREADS": "1"}, Path.cwd(), full, full).wait(60) == 0
    assert status(tmp_path / "r")["state"] == "done"


@pytest.mark.slow
@pytest.mark.parametrize("how", ["2>&1 | head -0; exit ${PIPESTATUS[0]}", "<&- >&- 2>&-", ">/dev/full 2>/dev/full"])
@pytest.mark.parametrize("ranks", [0, 2])
def test_nobody_reads_what_it_prints(how: str, ranks: int, damaged: tuple[Path, list[int]], tmp_path: Path) -> None:
    """Nor does a file of the run get the number of a stream that is closed: what is printed would go into it."""
    sets, _ = damaged
    before = {path: path.read_bytes() for path in sets.rglob("*.*")}
    words = command(sets, tmp_path / "r", "--train.epochs=1", ranks=ranks)
    assert subprocess.run(["bash", "-c", f'"$@" {how}', "bash", *words], timeout=120, check=False).returncode == 0
    assert status(tmp_path / "r")["state"] == "done"
    assert [r["step"] for r in records(tmp_path / "r", "step")] == list(range(1, STEPS + 1))
    assert before == {path: path.read_bytes() for path in sets.rglob("*.*")}
