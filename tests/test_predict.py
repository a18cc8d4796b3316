"""`python -m dist_train predict` against Pillow, `evaluate` and a plain forward pass."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms.functional import pil_to_tensor

from dist_train import models
from dist_train.__main__ import main
from dist_train.analysis.predict import probabilities
from dist_train.analysis.trained import open_run
from dist_train.cli import parse
from dist_train.ranks.world import World
from pipelines import loose
from pipelines.pack import Options, pack
from pipelines.shards import ShardSet
from pipelines.sources import ImageFolder, Stored
from tests.conftest import CLASSES, TINTS, break_sample, photograph
from tests.test_evaluate import untrained

pytestmark = pytest.mark.integration

CPU = torch.device("cpu")
NAMES = [*CLASSES, *(f"class #{n}" for n in range(3, 9))]
Predict = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)


@pytest.fixture(scope="module")
def run(shard_sets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine outputs for three classes, so that five are not all."""
    return untrained(tmp_path_factory.mktemp("runs") / "nine", shard_sets, "--model.outputs=9", steps=(1,))


@pytest.fixture
def predict(capsys: pytest.CaptureFixture[str]) -> Predict:
    """The verb in this process: exit code, stdout and stderr."""

    def call(*argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["predict", *map(str, argv), "--device=cpu"])
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of all kinds that `pack` takes, in the folder of one class; the others have none."""
    root = tmp_path_factory.mktemp("photos")
    folder = root / "amber"
    for path in (folder / "deep" / "down", root / "blue", root / "green"):
        path.mkdir(parents=True)
    rng = np.random.default_rng(1)

    def image(width: int, height: int) -> Image.Image:
        return photograph(rng, width, height, TINTS[rng.integers(3)])

    image(90, 72).save(folder / "as-it-is.jpg", quality=92)
    image(200, 300).save(folder / "large.jpg", quality=92)
    image(40, 30).save(folder / "small.jpg", quality=92)
    image(96, 80).convert("CMYK").save(folder / "cmyk.jpg")
    image(96, 80).convert("L").save(folder / "grey.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    image(90, 72).save(folder / "turned.jpg", exif=exif)
    clear = image(96, 80).convert("RGBA")
    clear.putalpha(100)
    clear.save(folder / "deep" / "alpha.png")
    levels = rng.integers(0, 65536, (9, 10)).astype(np.uint16)
    Image.fromarray(levels).resize((100, 90)).save(folder / "deep" / "sixteen.png")
    image(96, 80).quantize(32).save(folder / "deep" / "down" / "palette.gif")
    image(96, 80).save(folder / "deep" / "down" / "x.webp")
    return root


def lines(text: str) -> dict[str, dict[str, Any]]:
    """Lines of JSON, by path."""
    return {line.get("path", "set"): line for line in map(json.loads, text.splitlines())}


def packed(run: Path, photos: Path, to: Path, side: int) -> dict[str, np.ndarray]:
    """What `evaluate` computes for these photographs in a set; by the stem of their files, probabilities [9]."""
    pack(ImageFolder(photos), to, Options(shorter_side=side), split="p", workers=1)
    opened = open_run(run, CPU, split=str(to))
    own, p, bad = probabilities(opened, World.single(CPU), 1, len(opened.val))
    assert not bad.any()
    return {opened.val.name(int(k)).split("-", 3)[3][:-4]: p[i].numpy() for i, k in enumerate(own)}


def test_the_prediction_of_a_file_is_that_of_the_same_image_in_a_set(
    run: Path, photos: Path, tmp_path: Path, predict: Predict
) -> None:
    """To the bit, if it is packed as the training images were: rescaled, encoded anew or as it is. Packed at another
    size, it has other pixels."""
    expected, unscaled = packed(run, photos, tmp_path / "set", 72), packed(run, photos, tmp_path / "unscaled", 0)
    code, out, err = predict(run, photos, "--json")
    assert (code, err) == (0, "")
    found = lines(out)
    folder = photos / "amber"
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    assert len(files) == len(found) == len(expected) == 10
    for path in files:
        p = expected["-".join(path.relative_to(folder).with_suffix("").parts)]
        order = np.argsort(-p)[:5]
        assert found[str(path)]["classes"] == [NAMES[k] for k in order]
        assert np.float32(found[str(path)]["probabilities"]).tolist() == p[order].tolist()
    assert np.stack(list(expected.values())).std(axis=0).max() > 0.02, "the images make a difference"
    gap = {name: np.abs(p - unscaled[name]).max() for name, p in expected.items()}
    assert gap["as-it-is"] == 0
    assert 0 < gap["large"] < 0.1
    inside = [str(path.relative_to(folder)) for path in map(Path, found)]
    assert inside == [
        *("as-it-is.jpg", "cmyk.jpg", "grey.jpg", "large.jpg", "small.jpg", "turned.jpg", "deep/alpha.png"),
        *("deep/sixteen.png", "deep/down/palette.gif", "deep/down/x.webp"),
    ]


def test_predictions_are_those_of_pillow_torchvision_and_a_plain_forward_pass(
    run: Path, photos: Path, shard_sets: Path, predict: Predict
) -> None:
    """An image of the size at which the set is packed is not encoded anew."""
    file = photos / "amber" / "as-it-is.jpg"
    config, _ = parse(["--config", str(run / "config.yaml")])
    mean = 255 * torch.tensor(json.loads((shard_sets / "train" / "manifest.json").read_text())["mean"]).view(3, 1, 1)
    model = models.build(config.model, classes=3, crop=67).eval()
    (state,) = run.glob("checkpoints/step-*/state.pt")
    model.load_state_dict(torch.load(state, weights_only=True)["model"])
    for crops, cut in (("one", lambda i: [transforms.CenterCrop(67)(i)]), ("ten", transforms.TenCrop(67))):
        patches = torch.stack([pil_to_tensor(patch).float() - mean for patch in cut(Image.open(file))])
        with torch.inference_mode():
            p = model(patches).softmax(1).mean(0).numpy()
        line = lines(predict(run, file, "--json", "--crops", crops)[1])[str(file)]
        assert line["classes"] == [NAMES[k] for k in np.argsort(-p)[:5]]
        np.testing.assert_allclose(line["probabilities"], np.sort(p)[::-1][:5], atol=2e-5)


def test_the_errors_of_a_set_are_those_of_evaluate(
    run: Path, shard_sets: Path, tmp_path: Path, predict: Predict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And those of its own lines, which come piece by piece."""
    assert main(["evaluate", str(run), "--device=cpu", "--crops=five", f"--json={tmp_path / 'e.json'}"]) == 0
    evaluated = json.loads((tmp_path / "e.json").read_text())
    monkeypatch.setattr("dist_train.analysis.predict.BATCHES", 2)
    file = tmp_path / "p.jsonl"
    code, out, _ = predict(run, shard_sets / "val", "--crops=five", "--batch=10", "--json", file)
    assert code == 0
    found = lines(file.read_text())
    total = found.pop("set")
    assert {name: evaluated[name] for name in total if name not in ("set", "crops", "views")}.items() <= total.items()
    assert (total["set"], total["images"]) == (str(shard_sets / "val"), 63)
    top1 = sum(line["label"] == line["classes"][0] for line in found.values())
    top5 = sum(line["label"] in line["classes"] for line in found.values())
    assert (top1, top5, len(found)) == (total["top1_hits"], total["top5_hits"], 63)
    assert 0 < top1 < top5 < 63, "the images make a difference"
    assert f"{total['top1_error']:.2%}" in out
    for path, line in found.items():
        assert path.startswith(f"{shard_sets / 'val'}/shard-00000")
        assert f"-{line['label']}-" in path


def test_what_cannot_be_read_is_named_and_skipped(run: Path, photos: Path, tmp_path: Path, predict: Predict) -> None:
    folder = tmp_path / "f"
    shutil.copytree(photos / "amber" / "deep", folder)
    good = (photos / "amber" / "large.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(good[:2000])
    (folder / "page.png").write_text("<html>")
    (folder / "phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    (folder / "nowhere.jpg").symlink_to("none")
    (folder / "without-ending").write_bytes(good)
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.jpg").write_bytes(good)
    (folder / "a\x1b[31m\nname.jpg").write_bytes(good)
    code, out, err = predict(run, folder, tmp_path / "none.jpg", f"{folder}/*/*.webp", f"{tmp_path}/*.gif", "--json")
    assert code == 1
    found = lines(out)
    bad = {Path(path).name: line["error"] for path, line in found.items() if "error" in line}
    assert bad == {
        "cut.jpg": "image file is truncated (29 bytes not processed)",
        "page.png": "cannot identify image file",
        "phone.HEIC": "cannot identify image file",
        "nowhere.jpg": "No such file or directory: a link that leads nowhere",
        "none.jpg": "there is no such file",
        "*.gif": "no file matches it",
    }
    for name, why in bad.items():
        assert f"{name} cannot be read: {why}\n" in err
    assert "files that are no images: 2 (" in err
    assert "notes.txt" in err
    assert len(found) - len(bad) == 6
    assert len(out.splitlines()) == len(found) + 1, "the pattern's match lies in the folder, too"
    shown = predict(run, folder / "a\x1b[31m\nname.jpg")[1]
    assert shown.startswith(f"{folder}/a\\x1b[31m\\nname.jpg\n")
    assert [line.split()[-1] for line in shown.splitlines()[1:6]] == [
        name.split()[-1] for name in found[f"{folder}/a\x1b[31m\nname.jpg"]["classes"]
    ]


def test_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two links that lead back make 2 ** 40 paths; a folder matches as well as what is in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "b" / ".c").mkdir(parents=True)
    for name in ("1.jpg", "[2].jpg", "b/3.jpg", "b/.c/4.jpg", "b/.5.jpg"):
        (tmp_path / "a" / name).touch()
    for name in ("back", "again"):
        (tmp_path / "a" / "b" / name).symlink_to("..")

    def found(pattern: str) -> list[str]:
        return [file.path for file in loose.loose_files(pattern) if not file.why]

    assert found("a/**/*.jpg") == found("**/*.jpg") == ["a/1.jpg", "a/[2].jpg", "a/b/3.jpg"]
    assert found(f"{tmp_path}/*/**/3.jpg") == [f"{tmp_path}/a/b/3.jpg"]
    assert sorted(found("a/**")) == sorted(found("a/*")) == ["a/1.jpg", "a/[2].jpg", "a/b/3.jpg"]
    assert found("a/[2].jpg") == found("a/[[]2].jpg") == ["a/[2].jpg"]


def test_a_reader_who_leaves_ends_it(
    run: Path, photos: Path, tmp_path: Path, predict: Predict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`| head`: the other images are not computed, unless a file of JSON is written."""
    monkeypatch.setattr("dist_train.analysis.predicted.unheard", lambda: OSError(errno.EPIPE, ""))
    assert len(lines(predict(run, photos, "--json")[1])) == 1
    predict(run, photos, "--json", tmp_path / "all.json")
    assert len(lines((tmp_path / "all.json").read_text())) == 10


def test_what_dali_alone_cannot_decode(
    run: Path, photos: Path, predict: Predict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if there is nothing else, and no other image stands for it."""

    def cut(data: bytes, *_: object) -> Stored:
        return Stored(data[: len(data) // 3], enlarged=False, unchanged=True)

    file = photos / "amber" / "as-it-is.jpg"
    monkeypatch.setattr(loose, "to_jpeg", cut)
    code, out, err = predict(run, file)
    assert (code, out, err) == (1, "", f"{file} cannot be read: DALI cannot decode it\n")


def test_a_damaged_set(run: Path, shard_sets: Path, tmp_path: Path, predict: Predict) -> None:
    shutil.copytree(shard_sets / "val", tmp_path / "val")
    break_sample(tmp_path / "val", 17)
    code, out, err = predict(run, tmp_path / "val", "--json")
    assert code == 1
    assert err.count("is damaged") == 1
    found = lines(out)
    assert (found["set"]["images"], found["set"]["left_out"]) == (62, 1)
    assert [path for path, line in found.items() if "error" in line] == [
        f"{tmp_path / 'val'}/{ShardSet(shard_sets / 'val').name(17)}"
    ]


def test_pieces_change_nothing(run: Path, photos: Path, predict: Predict) -> None:
    """Nor does a failing file at a piece's end."""
    whole, small = (lines(predict(run, photos, "--json", *more)[1]) for more in ((), ("--batch=1",)))
    assert list(whole) == list(small)
    for path, line in whole.items():
        assert line["classes"] == small[path]["classes"]
        np.testing.assert_allclose(line["probabilities"], small[path]["probabilities"], atol=1e-5)


def test_a_run_without_its_validation_set(
    run: Path, shard_sets: Path, photos: Path, tmp_path: Path, predict: Predict
) -> None:
    alone = tmp_path / "alone"
    shutil.copytree(run, alone)
    text = (alone / "config.yaml").read_text()
    (alone / "config.yaml").write_text(text.replace(str(shard_sets / "val"), "/no/such"))
    file = photos / "amber" / "large.jpg"
    assert predict(alone, file) == predict(run, file)


@pytest.mark.parametrize(("ending", "trust"), [("safetensors", []), ("pt2", ["--trust"])])
def test_an_exported_net_without_its_run_and_its_sets(
    ending: str, trust: list[str], run: Path, shard_sets: Path, photos: Path, tmp_path: Path, predict: Predict
) -> None:
    """The same predictions, and the same errors of a set."""
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "sets").mkdir()
    for split in ("train", "val"):
        shutil.copytree(shard_sets / split, tmp_path / "sets" / split)
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace(str(shard_sets), str(tmp_path / "sets")))
    net = tmp_path / f"net.{ending}"
    assert main(["export", str(tmp_path / "run"), str(net)]) == 0
    shutil.rmtree(tmp_path / "run")
    shutil.rmtree(tmp_path / "sets")
    expected, found = (
        lines(predict(*which, photos, shard_sets / "val", "--json")[1]) for which in ([run], [net, *trust])
    )
    assert found.pop("set") == expected.pop("set")
    assert list(found) == list(expected)
    for path, line in expected.items():
        assert line["classes"] == found[path]["classes"]
        np.testing.assert_allclose(line["probabilities"], found[path]["probabilities"], atol=1e-6)
    about = json.loads(Path(f"{net}.json").read_text())
    about["inputs"]["mean"][0] += 1
    Path(f"{net}.json").write_text(json.dumps(about))
    assert "inputs.mean and inputs.std are not those" in predict(net, *trust, photos)[2]


def test_errors_are_one_sentence(
    run: Path, photos: Path, shard_sets: Path, tmp_path: Path, predict: Predict, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("x")
    (tmp_path / "b.jpg").write_bytes(b"mine")
    file = photos / "amber" / "large.jpg"
    shutil.copytree(photos / "amber", tmp_path / "source" / "amber")
    pack(ImageFolder(tmp_path / "source"), tmp_path / "other", Options(shorter_side=72), split="o", workers=1)
    cases: list[tuple[tuple[object, ...], str]] = [
        ((run,), "required: IMAGE"),
        ((tmp_path / "none", file), "there is no run"),
        ((run, tmp_path / "empty"), f"there is no image in {tmp_path / 'empty'}: name images"),
        ((run, tmp_path / "text"), f"there is no image in {tmp_path / 'text'}: name images"),
        ((run, tmp_path / "no.jpg"), "no.jpg cannot be read (there is no such file): name images"),
        ((run, tmp_path / "*.tif"), "*.tif cannot be read (no file matches it): name images"),
        ((run, file, "--json", tmp_path / "b.jpg"), "b.jpg: the name of its file ends in .json or .jsonl"),
        ((run, "--json", file), f"argument --json: {file}: the name of its file ends in .json or .jsonl"),
        ((run, file, "--json=/no/such/x.json"), "(there is no folder /no/such): choose another place with --json"),
        ((run, file, "--checkpoint="), "has no checkpoint of an empty name: choose last"),
        ((run, file, "https://example.com/a.jpg"), "a.jpg is not on this machine: download it, and name the file"),
        ((run, file, "--checkpoint=step-9"), "has no checkpoint step-9"),
        ((run, tmp_path / "other"), "differ in blue, green, so it has no errors"),
        ((run / "config.yaml", file), "is neither a .safetensors nor a .pt2"),
    ]
    for argv, message in cases:
        code, out, err = predict(*argv)
        assert (code, out) == (2, ""), argv
        assert err.splitlines()[-1].startswith("error: "), err
        assert message in err, err
    assert (tmp_path / "b.jpg").read_bytes() == b"mine"
    code, _, err = predict(run, file, "--max-pixels=50000")
    assert (code, err) == (
        1,
        f"{file} cannot be read: has 60000 pixels, and 50000 are allowed: leave it out, or add --max-pixels 60000\n",
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert predict(run, file)[2] == "error: predict works in one process: start it without torchrun\n"
