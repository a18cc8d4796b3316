"""Exported nets: the same logits without this program, layers that say it all, and files of strangers."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import zipfile
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from dist_train import build, models
from dist_train.__main__ import main
from dist_train.analysis.export import write_export
from dist_train.analysis.exported import bare, load_export
from dist_train.analysis.trained import Trained, open_run
from dist_train.config import ModelConfig
from dist_train.ranks.world import World
from pipelines import resolve
from pipelines.errors import UserError
from tests.helpers.launch import launch
from tests.helpers.strange import MINE

pytestmark = pytest.mark.integration  # a run is trained, and torch.export takes seconds

CPU = torch.device("cpu")
SMALL = {"hidden": 32, "width": 0.25}
NETS = {
    "alexnet_two_tower": ModelConfig("alexnet_two_tower", **SMALL),
    "every variant": ModelConfig(
        "alexnet_one_tower",
        **SMALL,
        outputs=5,
        dropout=0.3,
        dropout_scaling="training",
        activation="tanh",
        pooling="plain",
        lrn="every",
        lrn_alpha=2e-5,
        left_out="conv4",
    ),
    "blog": ModelConfig("blog"),
    "blog_two_tower": ModelConfig("blog_two_tower", options={"crossings": "paper", "heads": "sum", "hidden": 64}),
    "four_layers": ModelConfig("four_layers", options={"activation": "tanh"}),
    "resnet18": ModelConfig("torchvision:resnet18"),
    "own": ModelConfig("net_to_export:make", options={"width": 3}),
}
OWN = """
from torch import nn


class Net(nn.Module):
    def __init__(self, classes, fixed):
        super().__init__()
        self.net, self.fixed = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(3 * 67 * 67, classes)), fixed

    def forward(self, images):
        return self.net(images.reshape(2, 3, 67, 67) if self.fixed else images)


def make(classes, crop, width=1, fixed=False):
    return Net(classes, fixed)
"""
ELSEWHERE = """
import importlib.util, pathlib, sys

sys.path.append(sys.argv[1])  # site-packages, without the .pth by which this program is found
assert not any(map(importlib.util.find_spec, ("dist_train", "pipelines", "slurm")))
import torch

torch.set_num_threads(int(sys.argv[2]))
images = torch.load("images.pt")
with torch.no_grad():
    for path in pathlib.Path().glob("*.pt2"):
        net = torch.export.load(path).module()
        torch.save([net(images), net(images[:1])], path.with_suffix(".logits"))
"""


@pytest.fixture(scope="module")
def directory(shard_sets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("runs") / "a run"
    result = launch(shard_sets, made, "--train.epochs=2", ranks=0)
    assert result.returncode == 0, result.stderr
    return made


@pytest.fixture
def run(directory: Path) -> Trained:
    return open_run(directory, CPU)


def images_of(run: Trained) -> Tensor:
    """The first images of the validation set as DALI prepares them, [16, 3, 67, 67]."""
    loader = build.fixed_loader(run.config, World.single(CPU), run.val, run.train, batch=16)
    return next(iter(loader.epoch())).inputs.clone().contiguous()


def with_net(run: Trained, options: ModelConfig) -> Trained:
    """With weights under which images differ much."""
    torch.manual_seed(0)
    net = models.build(options, classes=len(run.classes), crop=67).eval()
    for name, value in net.state_dict().items():
        if value.ndim > 1:
            nn.init.kaiming_normal_(value)
        elif "running" in name:
            nn.init.uniform_(value, 0.5, 2)
    return replace(run, model=net, config=replace(run.config, model=options))


def elsewhere(folder: Path, images: Tensor) -> dict[str, list[Tensor]]:
    """The logits of all .pt2 files of a folder for these images, and for the first alone: the batch size is free. In a
    process that cannot import this program."""
    torch.save(images, folder / "images.pt")
    site, threads = str(Path(torch.__file__).parent.parent), str(torch.get_num_threads())
    words = [sys.executable, "-I", "-S", "-c", ELSEWHERE, site, threads]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return {path.stem: torch.load(path) for path in folder.glob("*.logits")}


def from_layers(about: dict[str, Any], weights: dict[str, Tensor], images: Tensor) -> Tensor:
    """The logits of the net that is built of `layers` with torch.nn, in float64."""
    known = {"images": images.double()}
    for layer in about["architecture"]["layers"][1:]:
        kind, taken, given = layer["kind"], [known[name] for name in layer["inputs"]], layer.get("arguments", {})
        if kind == "Parameter":
            value = weights[layer["weights"]].double()
        elif kind == "Dropout":
            value = taken[0] * (1 - given["p"]) if given.get("scaling") == "test" else taken[0]
        elif kind == "local_response_norm":
            groups, n = given.pop("groups"), given.pop("n")
            given["alpha"] *= n  # which torch divides by n
            value = torch.cat([F.local_response_norm(part, n, **given) for part in taken[0].chunk(groups, 1)], 1)
        elif kind[0].isupper():
            module = getattr(nn, kind)(**given)
            prefix = layer.get("weights", "") + "."
            module.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
            value = module.double().eval()(taken[0])
        elif kind in ("cat", "stack"):
            value = getattr(torch, kind)(taken, **given)
        else:
            value = (getattr(F, kind, None) or getattr(torch, kind))(*taken, **given)
        known[layer["name"]] = value
    return value


def near(found: Tensor, expected: Tensor) -> None:
    spread = float(expected.std())
    assert spread > 0
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=2e-5 * max(spread, 1e-3))


def about_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.with_name(f"{path.name}.json").read_bytes())
    return found


def test_a_run(directory: Path, run: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command line; the net elsewhere; what stands beside it."""
    path = tmp_path / "net.pt2"
    path.write_bytes(b"an older one")
    assert main(["export", str(directory), str(path), "--checkpoint", "best"]) == 0
    assert str(path) in capsys.readouterr().out
    best = open_run(directory, CPU, "best")
    images, net = images_of(run), bare(best.model).to(memory_format=torch.contiguous_format)
    found = elsewhere(tmp_path, images)["net"]
    with torch.no_grad():
        assert all(map(torch.equal, found, [net(images), net(images[:1])]))
    about = about_of(path)
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_bytes().splitlines()]
    validations = [line for line in lines if line["kind"] == "validation" and line["step"] <= best.step]
    lowest = min(validations, key=lambda line: line["top1_error"])
    for key, line in (("last", validations[-1]), ("best", lowest)):
        assert about[key]["epoch"] == line["epoch"] + 1
        assert about[key]["top1_error"] == line["top1_error"]
    manifest = json.loads((Path(run.config.data.train) / "manifest.json").read_bytes())
    assert about["classes"] == manifest["classes"] == ["amber", "blue", "green"]
    assert about["training_set"]["mean"] == manifest["mean"]
    np.testing.assert_allclose(about["inputs"]["mean"], 255 * np.array(manifest["mean"]), rtol=1e-6)
    assert (about["step"], about["epoch"]) == (best.step, best.epoch)


@pytest.mark.parametrize(("resize", "crop"), [(72, 67), (110, 67), (40, 35)])  # as stored, larger, smaller
def test_preparing_as_the_docs_say(
    resize: int, crop: int, run: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lines of docs/nets.md give the inputs that DALI gives, but for the rounding of decoders and resizes."""
    page = (Path(__file__).parent.parent / "docs" / "nets.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"\n# How an image becomes an input:\n(.*?)\n\n", page, re.DOTALL)
    imports = "\n".join(re.findall(r"(?m)^(?:import|from) .*(?:sys|torch|PIL|functional).*$", page))
    run = replace(run, config=replace(run.config, data=replace(run.config.data, resize=resize, crop=crop)))
    write_export(run, tmp_path / "net.safetensors")
    for image, inputs in enumerate(images_of(run)[:4]):
        photo = tmp_path / "photo.jpg"
        photo.write_bytes(run.val.read(image).tobytes())
        monkeypatch.setattr(sys, "argv", ["look.py", str(photo)])
        names: dict[str, Any] = {"about": about_of(tmp_path / "net.safetensors")}
        exec(f"{imports}\n{lines}", names)
        difference = (names["images"] - inputs).abs()
        assert names["images"].shape == (1, 3, crop, crop)
        assert difference.mean() < 1
        assert difference.max() < 12


@pytest.mark.slow
def test_every_net(run: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process without this program; built of `layers` with torch.nn; and loaded from the weights alone."""
    (tmp_path / "net_to_export.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    resolve.trust("net_to_export:make")
    images, expected, alone = images_of(run), dict[str, Tensor](), dict[str, Tensor]()
    for name, options in NETS.items():
        other = with_net(run, options)
        write_export(other, tmp_path / f"{name}.pt2")
        write_export(other, tmp_path / f"{name}.safetensors")
        with torch.no_grad():
            expected[name] = other.model(images)
            alone[name] = other.model(images[:1])
        weights = load_file(tmp_path / f"{name}.safetensors")
        near(from_layers(about_of(tmp_path / f"{name}.pt2"), weights, images), expected[name])
        loaded = load_export(tmp_path / f"{name}.safetensors", CPU)
        with torch.no_grad():
            near(loaded.model(images), expected[name])
    found = elsewhere(tmp_path, images)
    assert found.keys() == NETS.keys()
    for name in NETS:
        assert all(map(torch.equal, found[name], [expected[name], alone[name]])), name


@pytest.mark.slow
@pytest.mark.parametrize("options", [ModelConfig(**SMALL), NETS["alexnet_two_tower"], NETS["blog_two_tower"]])
def test_onnx(run: Trained, options: ModelConfig, tmp_path: Path) -> None:
    other, path = with_net(run, options), tmp_path / "net.onnx"
    write_export(other, path)
    images = images_of(run)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for n in (1, 16):
        with torch.no_grad():
            expected = other.model(images[:n])
        (logits,) = session.run(["logits"], {"images": images[:n].numpy()})
        near(torch.from_numpy(logits), expected)


def test_weights(run: Trained, tmp_path: Path) -> None:
    """From the weights alone the very predictions of `evaluate`: the same bits."""
    images = images_of(run).to(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = run.model(images)
    names = {name: value.shape for name, value in run.model.state_dict().items()}
    write_export(run, tmp_path / "net.safetensors")
    assert {name: value.shape for name, value in load_file(tmp_path / "net.safetensors").items()} == names
    loaded = load_export(tmp_path / "net.safetensors", CPU)
    with torch.no_grad():
        assert torch.equal(loaded.model(images), expected)
    assert (loaded.augment.resize, loaded.augment.crop) == (72, 67)
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(UserError, match="safetensors cannot be written"):
        write_export(run, tmp_path / "folder.safetensors")


@pytest.fixture
def weights(run: Trained, tmp_path: Path) -> Path:
    path = tmp_path / "net.safetensors"
    write_export(run, path)
    return path


def rewritten(path: Path, **changes: Any) -> None:
    """What stands beside a file, changed."""
    about = about_of(path)
    for key, value in changes.items():
        *groups, last = key.split("__")
        place = about
        for group in groups:
            place = place[group]
        place[last] = value
    path.with_name(f"{path.name}.json").write_text(json.dumps(about))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sha256": "0" * 64}, "do not belong together"),
        ({"size": 3}, "do not belong together"),
        ({"format": 2}, "has format 2, this program reads 1"),
        ({"classes": []}, "classes should have at least 1 item"),
        ({"inputs__std": [1.0, 0.0, 1.0]}, "inputs.std.1 should be greater than 0"),
        ({"inputs__crop": 99}, "inputs.crop is larger"),
        ({"inputs__range": [0, 1]}, "inputs.range.1 should be 255"),
        ({"inputs__resize__interpolation": "nearest"}, "interpolation should be 'bilinear'"),
        ({"architecture__settings__hidden": 1 << 40}, "does not fit the net"),
        ({"architecture__settings__hidden": -1}, "architecture.settings.hidden is -1"),
        ({"architecture__settings__lrn": "often"}, "lrn should be 'paper', 'every' or 'none'"),
        ({"architecture__outputs": 1 << 30}, "does not fit the net"),
        ({"architecture__name": "alexnat"}, "did you mean"),
        ({"architecture__name": "strange_net:make"}, "--trust"),
        ({"architecture__name": "torchvision:resnet18"}, "does not fit the net"),
    ],
)
def test_a_description_of_a_stranger(weights: Path, changes: dict[str, Any], said: str) -> None:
    rewritten(weights, **changes)
    with pytest.raises(UserError) as caught:
        load_export(weights, CPU)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_of_a_stranger(weights: Path) -> None:
    def refused(said: str) -> None:
        data = weights.read_bytes()
        rewritten(weights, size=len(data), sha256=hashlib.sha256(data).hexdigest())
        with pytest.raises(UserError, match=said):
            load_export(weights, CPU)

    good = load_file(weights)
    save_file(good | {"fc8.bias": torch.full((3,), float("nan"))}, weights)
    refused("fc8.bias is not finite")
    save_file(good | {"fc8.bias": torch.zeros(4)}, weights)
    refused("does not fit the net")
    weights.write_bytes(b"\xff" * 100)
    refused("does not fit the net")


def test_a_pt2_of_a_stranger(run: Trained, tmp_path: Path) -> None:
    """It is code, and so not loaded without --trust, whatever its sha256."""
    path, mark = tmp_path / "net.pt2", tmp_path / "mark"

    class Gadget:
        def __reduce__(self) -> Any:
            return eval, (f"open({str(mark)!r}, 'w').close() or ()",)

    write_export(run, path)
    code = BytesIO()
    torch.save(Gadget(), code)
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, code.getvalue() if "sample_inputs" in name else data)
    data = path.read_bytes()
    rewritten(path, size=len(data), sha256=hashlib.sha256(data).hexdigest())
    with pytest.raises(UserError, match="--trust"):
        load_export(path, CPU)
    assert not mark.exists()


def test_a_pt2_of_ones_own(run: Trained, tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    write_export(run, path)
    images = images_of(run)
    with torch.no_grad():
        assert torch.equal(load_export(path, CPU, trusting=True).model(images), run.model(images))


def test_links_are_not_followed(run: Trained, victim: Path, tmp_path: Path) -> None:
    for name in ("net.safetensors", "net.safetensors.json"):
        (tmp_path / name).symlink_to(victim)
    write_export(run, tmp_path / "net.safetensors")
    assert victim.read_bytes() == MINE
    load_export(tmp_path / "net.safetensors", CPU)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["net.pth"], "net.pth: end its name with .pt2"),
        (["nowhere/net.pt2"], "net.pt2 cannot be written (there is no folder nowhere): choose another place with FILE"),
        (["net.pt2", "--checkpoint", "step-1"], "has no checkpoint step-1: choose last"),
    ],
)
def test_what_cannot_be_written(
    words: list[str],
    said: str,
    directory: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(directory), *words]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_without_onnx(directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert main(["export", str(directory), "net.onnx"]) == 2
    assert "pip install onnx onnxscript" in capsys.readouterr().err


def test_a_net_of_fixed_batches(run: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "net_to_export.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    resolve.trust("net_to_export:make")
    other = with_net(run, ModelConfig("net_to_export:make", options={"fixed": True}))
    with pytest.raises(UserError, match="net_to_export:make cannot be exported with a free batch size"):
        write_export(other, tmp_path / "net.pt2")
    assert not list(tmp_path.glob("net.pt2*"))
