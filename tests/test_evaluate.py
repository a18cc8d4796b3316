"""`python -m dist_train evaluate` against Pillow, torchvision's TenCrop and a plain forward pass."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision import transforms
from torchvision.transforms.functional import pil_to_tensor

from dist_train import models
from dist_train.__main__ import main
from dist_train.analysis import evaluate as evaluation
from dist_train.analysis.evaluate import describe
from dist_train.analysis.predict import probabilities
from dist_train.analysis.trained import Trained, open_run
from dist_train.cli import parse
from dist_train.flat import dump
from dist_train.ranks.world import World
from dist_train.rundir.lease import Lease
from dist_train.rundir.resume import identity
from dist_train.rundir.store import Store
from pipelines import quarantine
from pipelines.pack import Options, pack
from pipelines.shards import ShardSet
from pipelines.sources import ImageFolder
from tests.conftest import CLASSES
from tests.helpers.compare import records
from tests.helpers.launch import STEPS, finish, launch, python, spawn

pytestmark = pytest.mark.integration

CPU = torch.device("cpu")
SMALL = ["--data.resize=72", "--data.crop=67", "--model.hidden=32", "--model.width=0.25", "--train.device=cpu"]


def untrained(
    directory: Path, sets: Path, *settings: str, seed: int = 0, steps: tuple[int, ...] = (1, 2), scale: float = 1
) -> Path:
    """A run whose weights are random, and large enough for its predictions to differ from image to image."""
    data = [f"--data.train={sets / 'train'}", f"--data.val={sets / 'val'}", f"--run.dir={directory}"]
    config, _ = parse([*SMALL, *data, *settings])
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text(dump(config))
    lease = Lease(directory)
    lease.acquire()
    store = Store(lease, keep=2)
    store.clean([])
    shards = ShardSet(sets / "train")
    model = models.build(config.model, classes=len(shards.classes), crop=67)
    for step in steps:
        rng = torch.Generator().manual_seed(100 * seed + step)
        for value in model.state_dict().values():
            fan_in = value[0].numel() if value.ndim > 1 else 100
            value.copy_(torch.randn(value.shape, generator=rng) * (2 / fan_in) ** 0.5 * scale)
        meta = {"step": step, "epoch": step, "validated": True, "best_epoch": steps[0] - 1} | identity(config, shards)
        store.save({"model": model.state_dict()}, meta)
        store.join()
    assert store.error is None
    return directory


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """For nets as small as these, waiting for more threads takes longer than computing."""
    torch.set_num_threads(1)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)


@pytest.fixture(scope="module")
def runs(shard_sets: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two runs of other settings and other numbers of outputs."""
    root = tmp_path_factory.mktemp("runs")
    wide = ("--model.outputs=9", "--data.center_square=true")
    return {
        "nine": untrained(root / "nine", shard_sets, *wide, seed=1),
        "three": untrained(root / "three", shard_sets, "--data.inputs=standardized", seed=2),
    }


def images(sets: Path) -> list[tuple[Image.Image, int]]:
    """The validation images, by Pillow, and their labels, from the folder that each came from."""
    shards = ShardSet(sets / "val")
    labels = [CLASSES.index(shards.name(i).split("-")[2]) for i in range(len(shards))]
    encoded = [io.BytesIO(shards.read(i).tobytes()) for i in range(len(shards))]
    return [(Image.open(data).convert("RGB"), label) for data, label in zip(encoded, labels, strict=True)]


def reference(run: Path, sets: Path, crops: str, checkpoint: str = "step-00000002-validated") -> NDArray[np.float32]:
    """The mean of the softmax outputs over the crops, [images, outputs], without any of the code under test."""
    config, _ = parse(["--config", str(run / "config.yaml")])
    manifest = json.loads((sets / "train" / "manifest.json").read_text())
    mean, std = (255 * torch.tensor(manifest[name]).view(3, 1, 1) for name in ("mean", "std"))
    std = std if config.data.inputs == "standardized" else torch.ones(3, 1, 1)
    state = torch.load(run / "checkpoints" / checkpoint / "state.pt", weights_only=True)["model"]
    model = models.build(config.model, classes=3, crop=67).eval()
    model.load_state_dict(state)
    square = transforms.CenterCrop(72) if config.data.center_square else (lambda image: image)
    cut: Any = {"one": lambda i: [transforms.CenterCrop(67)(i)], "five": transforms.FiveCrop(67)}
    cut = cut.get(crops, transforms.TenCrop(67))
    rows = []
    for image, _ in images(sets):
        patches = torch.stack([(pil_to_tensor(patch).float() - mean) / std for patch in cut(square(image))])
        with torch.inference_mode():
            rows.append(model(patches).softmax(1).mean(0).numpy())
    return np.stack(rows)


def counted(p: NDArray[np.float32], labels: list[int]) -> tuple[int, int, Counter[tuple[int, int]]]:
    """Hits among the first and among the first five, and confusions."""
    order = np.argsort(-p, axis=1)
    confusions = Counter((t, int(o[0])) for t, o in zip(labels, order, strict=True) if o[0] != t)
    top1 = sum(int(o[0]) == t for t, o in zip(labels, order, strict=True))
    return top1, sum(t in o[:5] for t, o in zip(labels, order, strict=True)), confusions


def evaluate(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    """The verb in this process: exit code, stdout and stderr."""
    code = main(["evaluate", *map(str, argv), "--device=cpu"])
    out, err = capsys.readouterr()
    return code, out, err


def check(report: dict[str, Any], p: NDArray[np.float32], labels: list[int]) -> None:
    top1, top5, confusions = counted(p, labels)
    assert (report["images"], report["left_out"]) == (63, 0)
    assert (report["top1_hits"], report["top5_hits"]) == (top1, top5)
    assert report["top1_error"] == pytest.approx(1 - top1 / 63)
    assert report["top5_error"] == pytest.approx(1 - top5 / 63)
    names = [*CLASSES, *(f"class #{n}" for n in range(3, 9))]
    expected = {(names[t], names[o]): n for (t, o), n in confusions.items()}
    assert {(row["true"], row["predicted"]): row["count"] for row in report["confusions"]} == expected
    assert [row["count"] for row in report["confusions"]] == sorted(expected.values(), reverse=True)
    for label, row in enumerate(report["classes"]):
        right = sum(int(q.argmax()) == label for q, t in zip(p, labels, strict=True) if t == label)
        assert (row["class"], row["samples"], row["top1_hits"]) == (CLASSES[label], 21, right)
        assert row["top1_error"] == pytest.approx(1 - right / 21)


@pytest.mark.parametrize(("crops", "typed"), [("one", "one"), ("five", "five"), ("ten", "10")])
@pytest.mark.integration
def test_predictions_are_those_of_pillow_torchvision_and_a_plain_forward_pass(
    crops: str, typed: str, runs: dict[str, Path], shard_sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of each run, and of the mean of their softmax outputs. The sets are packed at the size that crops are cut from,
    so DALI's pixels are Pillow's."""
    labels = [label for _, label in images(shard_sets)]
    expected = {name: reference(run, shard_sets, crops) for name, run in runs.items()}
    views = {"one": 1, "five": 5, "ten": 10}[crops]
    for name, run in runs.items():
        own, p, bad = probabilities(open_run(run, CPU), World.single(CPU), views, 20)
        assert own.tolist() == list(range(63))
        assert not bad.any()
        assert p.numpy().std(axis=0).max() > 0.02, "the images make a difference"
        np.testing.assert_allclose(p.numpy(), expected[name], atol=2e-5)

    _, out, _ = evaluate(capsys, *runs.values(), "--crops", typed, f"--json={tmp_path / 'both.json'}")
    both = json.loads((tmp_path / "both.json").read_text())
    assert both["crops"] == crops
    check(both, (expected["nine"] + np.pad(expected["three"], ((0, 0), (0, 6)))) / 2, labels)
    for row, (name, run) in zip(both["runs"], runs.items(), strict=True):
        assert row["run"] == str(run)
        assert row["checkpoint"] == "step-00000002-validated"
        assert (row["top1_hits"], row["top5_hits"]) == counted(expected[name], labels)[:2]
        assert f"{row['top1_error']:.2%}" in out
    assert f"{both['top1_error']:.2%}" in out


def test_the_numbers_of_one_run_go_into_it(
    runs: dict[str, Path], shard_sets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = runs["nine"] / "evaluation-one.json"
    code, out, _ = evaluate(capsys, runs["nine"])
    assert code == 0
    assert out.splitlines()[-1] == str(path)
    labels = [label for _, label in images(shard_sets)]
    check(json.loads(path.read_text()), reference(runs["nine"], shard_sets, "one"), labels)


def test_the_numbers_are_written_before_they_are_shown_and_shown_in_any_case(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who reads them may leave, and a disk may be full, after hours of work."""
    path, there = tmp_path / "x.json", list[bool]()
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "show", lambda text: there.append(path.exists()))
        assert evaluate(capsys, runs["nine"], f"--json={path}")[0] == 0
    assert there == [True, True]
    with monkeypatch.context() as patch:

        def full(path: Path, data: bytes) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

        patch.setattr(evaluation, "write_atomically", full)
        code, out, err = evaluate(capsys, runs["nine"], f"--json={path}")
    assert code == 2
    assert "top-1 error" in out
    assert "(No space left on device): choose another place with --json" in err
    code, out, err = evaluate(capsys, runs["nine"], f"--json={tmp_path / 'nowhere' / 'x.json'}")
    assert (code, out) == (2, "")  # a place that is not there is told before the work
    assert f"there is no folder {tmp_path / 'nowhere'}" in err


def test_the_best_checkpoint_and_another_split(
    runs: dict[str, Path], shard_sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = reference(runs["nine"], shard_sets, "one", "step-00000001-validated")
    file = tmp_path / "x.json"
    assert evaluate(capsys, runs["nine"], "--checkpoint=best", f"--json={file}")[0] == 0
    report = json.loads(file.read_text())
    assert (report["runs"][0]["checkpoint"], report["runs"][0]["step"]) == ("step-00000001-validated", 1)
    check(report, best, [label for _, label in images(shard_sets)])

    assert evaluate(capsys, runs["nine"], f"--split={shard_sets / 'train'}", f"--json={file}")[0] == 0
    report = json.loads(file.read_text())
    assert (report["images"], report["split"]) == (240, str(shard_sets / "train"))


@pytest.mark.integration
def test_the_number_of_processes_changes_no_number(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One, two and three processes, the last with unequal parts: the same bytes, printed once."""
    file = tmp_path / "x.json"
    argv = [*map(str, runs.values()), "--crops=five", "--batch=10", f"--json={file}"]
    code, table, _ = evaluate(capsys, *argv)
    assert code == 0
    report = file.read_bytes()
    for ranks in (2, 3):
        file.unlink()
        result = finish(spawn(python("dist_train", "evaluate", *argv, "--device=cpu", ranks=ranks)))
        assert result.returncode == 0, result.stderr
        assert "Traceback" not in result.stderr
        assert file.read_bytes() == report
        assert result.stdout == table


@pytest.mark.integration
def test_a_usage_error_under_torchrun(tmp_path: Path) -> None:
    """One sentence from rank 0, and torchrun hears of it, also where the ranks have met already."""
    argv = ["evaluate", str(tmp_path / "none"), "--device=cpu"]
    result = finish(spawn(python("dist_train", *argv, ranks=2)))
    assert result.returncode == 1, result.stderr
    assert result.stderr.count("error: there is no run") == 1
    assert "traceback : there is no run" in result.stderr


@pytest.mark.integration
def test_a_run_as_a_user_trains_and_evaluates_it(shard_sets: Path, tmp_path: Path) -> None:
    """One crop gives the validation's own errors, and nothing else in the run changes."""
    run = tmp_path / "a run, ä"
    assert launch(shard_sets, run, "--train.epochs=1", ranks=0).returncode == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    result = finish(spawn(python("dist_train", "evaluate", str(run), "--device=cpu"), how="exec"))
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    for word in ("top-1 error", "top-5 error", f"step {STEPS}", "63", str(run / "evaluation-one.json"), *CLASSES):
        assert word in result.stdout
    report = json.loads((run / "evaluation-one.json").read_text())
    (validation,) = records(run, "validation")
    assert report["top1_error"] == pytest.approx(validation["top1_error"], abs=1e-9)
    after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() if "evaluation" not in path.name}
    assert after == before


def test_an_image_that_cannot_be_decoded_is_left_out(
    runs: dict[str, Path], shard_sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No other image stands for it, in whatever view."""
    split = tmp_path / "val"
    shutil.copytree(shard_sets / "val", split)
    shards = ShardSet(split)
    row = shards.index[17]
    with open(split / shards.names[shards.shard_of(17)], "r+b") as file:
        file.seek(int(row["offset"]))
        file.write(b"\xff" * int(row["size"]))
    file_ = tmp_path / "x.json"
    code, out, err = evaluate(capsys, runs["nine"], f"--split={split}", "--crops=five", f"--json={file_}")
    assert code == 0
    assert err.count("is damaged") == 1, "not once more in every view"
    assert re.search("left out +1 image", out)
    report = json.loads(file_.read_text())
    expected = np.delete(reference(runs["nine"], shard_sets, "five"), 17, axis=0)
    labels = [label for i, (_, label) in enumerate(images(shard_sets)) if i != 17]
    assert (report["images"], report["left_out"]) == (62, 1)
    assert (report["top1_hits"], report["top5_hits"]) == counted(expected, labels)[:2]


def test_a_quarantined_image_is_left_out(
    runs: dict[str, Path], shard_sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is no hit of any class, and another image does not count twice."""
    split, file_ = tmp_path / "val", tmp_path / "x.json"
    shutil.copytree(shard_sets / "val", split)
    shards = ShardSet(split)
    bad = {"shard": shards.names[1], "row": 2}
    number = int(shards.shard_samples[0]) + 2
    quarantine.write(split, shards.fingerprint, [bad])
    code, out, _ = evaluate(capsys, runs["nine"], f"--split={split}", f"--json={file_}")
    assert code == 0
    assert re.search("left out +1 image", out)
    report = json.loads(file_.read_text())
    expected = np.delete(reference(runs["nine"], shard_sets, "one"), number, axis=0)
    labels = [label for i, (_, label) in enumerate(images(shard_sets)) if i != number]
    assert (report["images"], report["left_out"]) == (62, 1)
    assert (report["top1_hits"], report["top5_hits"]) == counted(expected, labels)[:2]


def test_a_run_that_was_trained_by_an_earlier_program_past_a_quarantine(
    shard_sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its checkpoints hold another fingerprint of the same set."""
    (tmp_path / "val").symlink_to(shard_sets / "val")
    shutil.copytree(shard_sets / "train", tmp_path / "train")
    run = untrained(tmp_path / "run", tmp_path)
    shards = ShardSet(tmp_path / "train")
    text = json.dumps({"shard": shards.names[1], "row": 2}) + "\n"
    then = hashlib.sha256((shards.fingerprint + text).encode()).hexdigest()[:16]
    for path in run.glob("checkpoints/step-*/meta.json"):
        path.write_text(path.read_text().replace(shards.fingerprint[:16], then))
    code, _, err = evaluate(capsys, run)
    assert code == 2
    assert "is not the training set that" in err
    (tmp_path / "train" / "quarantine.jsonl").write_text(text)
    assert evaluate(capsys, run)[0] == 0


@pytest.fixture(scope="module")
def two_classes(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shard sets of other classes."""
    root = tmp_path_factory.mktemp("two")
    for split in ("train", "val"):
        shutil.copytree(image_folder / split, root / "folder" / split)
        shutil.rmtree(root / "folder" / split / "blue")
        pack(ImageFolder(root / "folder" / split), root / split, Options(shorter_side=72), split=split, workers=1)
    return root


def break_state(checkpoint: Path) -> None:
    state = checkpoint / "state.pt"
    state.write_bytes(state.read_bytes()[:-1] + b"?")


@pytest.mark.integration
def test_errors_are_one_sentence(
    shard_sets: Path, two_classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = untrained(tmp_path / "good", shard_sets)
    other = untrained(tmp_path / "other", two_classes)
    (tmp_path / "no-run").mkdir()
    bare = untrained(tmp_path / "bare", shard_sets, steps=())
    half = untrained(tmp_path / "half", shard_sets)
    break_state(half / "checkpoints" / "best")
    lost = untrained(tmp_path / "lost", shard_sets)
    shutil.rmtree(lost / "checkpoints" / "step-00000001-validated")
    bad = untrained(tmp_path / "bad", shard_sets)
    for checkpoint in (bad / "checkpoints").glob("step-*"):
        break_state(checkpoint)
    moved = untrained(tmp_path / "moved", shard_sets)
    text = (moved / "config.yaml").read_text().replace(str(shard_sets / "val"), "sets/val")
    (moved / "config.yaml").write_text(text)
    gone = untrained(tmp_path / "gone", shard_sets)
    (gone / "config.yaml").write_text(text.replace("sets/val", "/no/such/val"))
    exchanged = untrained(tmp_path / "exchanged", shard_sets)
    (exchanged / "config.yaml").write_text((other / "config.yaml").read_text())
    edited = untrained(tmp_path / "edited", shard_sets)
    text = (edited / "config.yaml").read_text()
    (edited / "config.yaml").write_text(text.replace("hidden: 32", "hidden: 31"))
    typing = untrained(tmp_path / "typing", shard_sets)
    (typing / "config.yaml").write_text(text.replace("hidden: 32", "hiden: 32"))
    broken = untrained(tmp_path / "broken", shard_sets)
    (broken / "config.yaml").write_text("data: [")
    cases: list[tuple[tuple[object, ...], str]] = [
        ((tmp_path / "none",), r"there is no run .*/none: name the directory of a run, or its name in runs/"),
        ((tmp_path / "no-run",), r"has no config\.yaml, so it is no directory of a run: name that of a run"),
        ((bare,), r"bare has no checkpoint yet: train on"),
        ((bare, "--checkpoint=best"), r"bare has no checkpoint yet: train on"),
        (
            (lost, "--checkpoint=best"),
            r"the best checkpoint was not saved, or is not in .*/lost/checkpoints any",
        ),
        ((half, "--checkpoint=best"), r"no good checkpoint \(step-00000001-validated: the sha256 .*: choose last"),
        ((bad,), r"no good checkpoint \(step-00000002-validated: the sha256 .*-00000001.*: put a good one back"),
        ((moved,), r"validation set of .*moved, sets/val, is not there: start in the directory that the run was"),
        ((gone,), r"validation set of .*gone, /no/such/val, is not there: put it back"),
        ((good, "--split=/no/such"), r"no shards in /no/such: make them with"),
        ((exchanged,), r"is not the training set that .*exchanged was trained on .*: put the right one back"),
        ((edited,), r"does not fit the model of .*config\.yaml .*: restore the file"),
        ((typing,), r"config\.yaml: unknown configuration key model\.hiden: did you mean model\.hidden"),
        ((broken,), r"config\.yaml: "),
        ((good, other), r"classes of .*other and .*good differ in blue, .*: evaluate them one by one"),
        ((good, "--split", two_classes / "val"), r"3 classes and .*val has 2"),
        ((good, "--crop=ten"), r"unknown option --crop: did you mean --crops\?"),
        ((good, "--crops=nine"), r"--crops: invalid choice: 'nine'"),
        ((good, "--batch=0"), r"argument --batch: 0 is below 1"),
        ((), r"required: RUN"),
        ((good, "--json=/no/such/x.json"), r"/no/such/x\.json cannot be written .*: choose another place with --json"),
    ]
    for argv, message in cases:
        code, _, err = evaluate(capsys, *argv)
        assert code == 2, argv
        assert re.fullmatch(f"error: .*{message}.*\n", err), err
    assert evaluate(capsys, half)[0] == 0, "the newest is good"


def test_a_net_that_always_names_one_class(
    runs: dict[str, Path], shard_sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of equal outputs the first is named."""
    run = untrained(tmp_path / "r", shard_sets, scale=0)
    assert "\nalways names amber, whatever the image shows\n" in evaluate(capsys, run)[1]
    assert "always names" not in evaluate(capsys, runs["nine"])[1]


def test_a_damaged_newest_checkpoint_is_passed_over(shard_sets: Path, tmp_path: Path) -> None:
    run = untrained(tmp_path / "r", shard_sets)
    break_state(run / "checkpoints" / "step-00000002-validated")
    opened = open_run(run, CPU)
    assert isinstance(opened, Trained)
    assert (opened.checkpoint, opened.step, opened.epoch) == ("step-00000001-validated", 1, 1)
    assert not opened.model.training
    assert (run / "checkpoints" / "step-00000002-validated").is_dir(), "nothing is moved"


def test_a_run_decoded_on_the_gpu_opens_without_one(
    shard_sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = untrained(tmp_path / "r", shard_sets, "--data.device=gpu")
    assert evaluate(capsys, run, "--device=cpu")[0] == 0


def test_validation_sets_that_differ_cannot_be_averaged(
    shard_sets: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = tmp_path / "sets"
    sets.mkdir()
    (sets / "train").symlink_to(shard_sets / "train")
    pack(ImageFolder(image_folder / "val"), sets / "val", Options(shorter_side=72, seed=1), split="val", workers=1)
    one, two = untrained(tmp_path / "one", shard_sets), untrained(tmp_path / "two", sets)
    code, _, err = evaluate(capsys, one, two)
    assert code == 2
    assert "have different validation sets" in err
    assert "--split" in err
    code, out, _ = evaluate(capsys, one, two, f"--split={shard_sets / 'val'}")
    assert code == 0
    assert "mean of these softmax outputs" in out


def test_a_misspelt_verb_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evalute", "x"]) == 2
    assert capsys.readouterr().err.startswith("error: unknown verb evalute: did you mean evaluate?")
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    assert "evaluate" in capsys.readouterr().out


def test_long_tables_are_cut(runs: dict[str, Path]) -> None:
    """At most twenty classes, the worst first, and ten confusions."""
    errors = np.random.default_rng(0).permutation(30) / 30
    report = {
        "images": 300,
        "split": "s",
        "crops": "one",
        "left_out": 0,
        "runs": [],
        "classes": [{"class": f"c{i}", "samples": 10, "top1_error": e} for i, e in enumerate(errors)],
        "confusions": [{"true": f"t{i}", "predicted": f"p{i}", "count": 30 - i} for i in range(30)],
    }
    lines = describe(report).splitlines()
    shown = [line.split()[-1] for line in lines if re.search(r" c\d+$", line)]
    assert shown == [f"c{i}" for i in np.argsort(-errors)[:20]]
    assert any("10 more" in line for line in lines)
    assert [line.split()[1] for line in lines if " -> p" in line][1:] == [f"t{i}" for i in range(10)]
