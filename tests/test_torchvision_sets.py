"""torchvision's data sets of photographs, end to end from files in the layout of the published ones; and what is said
when these cannot be fetched, or are not what they should be."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets
from torchvision.datasets import utils

from pipelines import torchvision_files, torchvision_sets
from pipelines.errors import SourceError
from pipelines.shards import ShardSet
from pipelines.torchvision_sets import Torchvision, prefetch
from tests.helpers import published
from tests.helpers.compare import records
from tests.helpers.launch import finish, python, spawn
from tests.test_docs import OFFLINE

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _no_package_of_debian(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torchvision_sets, "INSTALLED", tmp_path / "nowhere")


@pytest.fixture
def believe(monkeypatch: pytest.MonkeyPatch) -> Callable[[published.Made], None]:
    """Makes this process believe that made files have the sums of the published ones."""
    real = hashlib.md5

    def use(made: published.Made) -> None:
        class Sum:
            def __init__(self, *args: Any, **options: Any) -> None:
                self._sum = real(*args, **options)
                self.update = self._sum.update

            def hexdigest(self) -> str:
                return made.sums.get(self._sum.hexdigest(), self._sum.hexdigest())

        monkeypatch.setattr(hashlib, "md5", Sum)

    return use


def typed(path: str, *words: object) -> subprocess.CompletedProcess[str]:
    """`python -m ...` where no server answers."""
    env = {**os.environ, **OFFLINE, "PYTHONPATH": f"{path}:{ROOT}"}
    return subprocess.run(
        [sys.executable, "-m", *map(str, words)], env=env, capture_output=True, text=True, check=False, timeout=300
    )


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in published.SETS if name != "fashion-mnist"])
def test_each_set_from_files_fetched_by_hand(name: str, tmp_path: Path) -> None:
    """Without a network one sentence names the files and their places; from there, both sets have the pixels, labels
    and class names of the published format, which is read here without torchvision."""
    made = published.SETS[name]()
    path, sets = published.believed(tmp_path / "path", made), tmp_path / "sets"
    failed = typed(path, "pipelines", "pack", name, sets)
    assert (failed.returncode, failed.stdout) == (2, "")
    (said,) = failed.stderr.splitlines()
    for url in published.URLS[name]:
        assert url in said
    for file in made.files:
        place = sets / "raw" / file
        assert f"put it at {place}: " in said or f"put them into {place.parent}: " in said
    made.put(sets / "raw")
    done = typed(path, "pipelines", "pack", name, sets, "--workers=2")
    assert done.returncode == 0, done.stderr
    for split, images in made.images.items():
        shards = ShardSet(sets / split)
        assert shards.classes == made.classes
        assert len(shards) == len(images)
        side = 256 if name == "flowers102" else min(images[0][0].shape[:2])
        assert shards.sides[0] == side, "photographs as in the paper, others as they are"
        left = list(range(len(images)))
        for i in range(len(shards)):
            image = Image.open(BytesIO(shards.read(i).tobytes()))
            label = shards.classes[int(shards.index["label"][i])]
            size = images[0][0].shape[1::-1]
            pixels = np.asarray(image.resize(size, Image.Resampling.BOX), np.int64)
            far = {k: abs(pixels - images[k][0]).mean() for k in left}
            nearest = min(far, key=lambda k: far[k])
            assert far[nearest] < 4
            assert label == images[nearest][1], "pixels and label belong together"
            left.remove(nearest)
    assert ("flowers102" in name) == (
        "train and val (204 images) for training, test (102) for validation" in done.stderr
    )
    again = typed(path, "pipelines", "pack", name, sets, "--workers=2")
    assert again.stdout.count("already packed") == 2, again.stderr


def test_fashion_mnist_from_files_fetched_by_hand(believe: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """In this process: where Debian's package is installed, another would take its files."""
    made = published.fashion_mnist()
    believe(made)
    monkeypatch.setattr("urllib.request.urlopen", offline)
    with pytest.raises(SourceError) as told:
        _ = Torchvision("fashion-mnist", tmp_path, train=True).items
    for url in published.URLS["fashion-mnist"]:
        assert url in str(told.value)
    assert f"put them into {tmp_path}/FashionMNIST/raw: " in str(told.value)
    assert str(told.value).endswith("; or install Debian's package dataset-fashion-mnist")
    made.put(tmp_path)
    for split, images in made.images.items():
        source = Torchvision("fashion-mnist", tmp_path, train=split == "train")
        for item, (pixels, name) in zip(source.items, images, strict=True):
            assert source.classes[item.label] == name
            np.testing.assert_array_equal(np.asarray(source.load(item.reference)), pixels[..., 0])


def test_the_bytes_of_photographs_are_kept(believe: Any, tmp_path: Path) -> None:
    made = published.imagenette()
    believe(made)
    made.put(tmp_path)
    source = Torchvision("imagenette", tmp_path, train=False)
    assert source.items[0].name == "imagenette2/val/n01440764/n01440764_0.JPEG"
    path = tmp_path / source.items[0].name
    assert source.load(0) == path.read_bytes()


def test_unlabelled_images_are_not_read(believe: Any, tmp_path: Path) -> None:
    """Of which STL10 has 2.8 GB: they need not even be there."""
    made = published.stl10()
    believe(made)
    made.put(tmp_path)
    _ = Torchvision("stl10", tmp_path, train=True).items
    (tmp_path / "stl10_binary" / "unlabeled_X.bin").unlink()
    (tmp_path / "stl10_binary.tar.gz").unlink()
    source = Torchvision("stl10", tmp_path, train=True)
    assert [item.label for item in source.items] == [i * 7 % 10 for i in range(30)]


def test_both_splits_are_looked_at_first(believe: Any, tmp_path: Path) -> None:
    made = published.imagenette()
    believe(made)
    made.put(tmp_path)
    _ = Torchvision("imagenette", tmp_path, train=True).items
    (tmp_path / "imagenette2/val/n03888257").rename(tmp_path / "imagenette2/val/n03417042")
    with pytest.raises(SourceError, match=r"Imagenette .*has other classes for validation .*garbage truck.*parachute"):
        _ = Torchvision("imagenette", tmp_path, train=True).items


class Planted:
    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> Any:
        return (Path.touch, (self.victim,))


@pytest.mark.parametrize("name", ["data_batch_1", "test_batch", "batches.meta"])
def test_a_planted_pickle_is_not_loaded(name: str, believe: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """Of cifar10: its sum is compared first."""
    made, victim = published.cifar10(), tmp_path / "victim"
    believe(made)
    made.put(tmp_path)
    _ = Torchvision("cifar10", tmp_path, train=True).items
    (tmp_path / "cifar-10-python.tar.gz").unlink()
    (tmp_path / "cifar-10-batches-py" / name).write_bytes(pickle.dumps(Planted(victim)))
    monkeypatch.setattr("urllib.request.urlopen", offline)
    with pytest.raises(SourceError, match="CIFAR10 is unavailable"):
        _ = Torchvision("cifar10", tmp_path, train=True).items
    assert not victim.exists()


def offline(*_: Any, **__: Any) -> Any:
    raise OSError("network is unreachable")


# Servers. -------------------------------------------------------------------------------------------


@contextmanager
def server(answer: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[str]:
    """The address of a server on this machine."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self)

        def log_message(self, *_: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{http.server_port}"
    finally:
        http.shutdown()
        http.server_close()


def sends(data: bytes, length: int | None = None, code: int = 200) -> Callable[[BaseHTTPRequestHandler], None]:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(code)
        handler.send_header("Content-Length", str(len(data) if length is None else length))
        handler.end_headers()
        handler.wfile.write(data)

    return answer


def test_a_download(believe: Any, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """One line says what is fetched; a file by hand that is not whole is replaced."""
    made = published.food101()
    believe(made)
    archive = tmp_path / "food-101.tar.gz"
    archive.write_bytes(made.files[archive.name][:1000])
    with server(sends(made.files[archive.name])) as url:
        monkeypatch.setattr(datasets.Food101, "_URL", f"{url}/{archive.name}")
        source = Torchvision("food101", tmp_path, train=True)
        assert len(source.items) == 27
    assert archive.read_bytes() == made.files[archive.name]
    lines = [line for line in capsys.readouterr().err.splitlines() if "fetching" in line]
    assert lines == [f"fetching {url}/{archive.name}, {len(made.files[archive.name]) / 1e6:.1f} MB"]


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (
            sends(b"\n<!DOCTYPE html><p>Log in"),
            "answers with a web page, perhaps of a proxy: its MD5 sum is .*, not 85",
        ),
        (sends(b"PK" * 999), "answers with another file: its MD5 sum is"),
        (sends(b"half", 5000), r"ended after 4 of 5000 bytes"),
        (sends(b"gone", code=404), "HTTP Error 404: Not Found"),
        (lambda _: time.sleep(3), "no answer in 0.5 seconds"),
    ],
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of a socket that urllib leaves
def test_a_server_that_does_not_send_the_file(answer: Any, why: str, tmp_path: Path, monkeypatch: Any) -> None:
    """One sentence, and nothing stays in its place; a file that was there stays."""
    monkeypatch.setattr(torchvision_files, "TIMEOUT", 0.5)
    with server(answer) as url:
        monkeypatch.setattr(datasets.Food101, "_URL", f"{url}/food-101.tar.gz")
        remedy = f"fetch it where there is a network and put it at {tmp_path}/food-101.tar.gz: {url}/food-101.tar.gz$"
        with pytest.raises(SourceError, match=rf"Food101 is unavailable \(.*{why}.*\): {remedy}"):
            _ = Torchvision("food101", tmp_path, train=True).items
        assert os.listdir(tmp_path) == []
        (tmp_path / "food-101.tar.gz").write_bytes(b"by hand")
        with pytest.raises(SourceError, match=remedy):
            _ = Torchvision("food101", tmp_path, train=True).items
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"by hand"]


def test_a_file_by_hand_that_is_not_whole(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("urllib.request.urlopen", offline)
    file = tmp_path / "imagenette2.tgz"
    file.write_bytes(b"half")
    told = rf"Imagenette is unavailable \({file} is not the whole file; network is unreachable\): f"
    with pytest.raises(SourceError, match=told):
        _ = Torchvision("imagenette", tmp_path, train=True).items


def test_a_network_that_drops_packets(tmp_path: Path, monkeypatch: Any) -> None:
    """However many addresses a name has."""
    monkeypatch.setattr(torchvision_files, "TIMEOUT", 0.5)

    def slow(*_: Any, **__: Any) -> Any:
        time.sleep(4)
        raise OSError("nobody answers")

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    begin = time.monotonic()
    with pytest.raises(SourceError, match=r"STL10 is unavailable \(no answer in 0.5 seconds\)"):
        _ = Torchvision("stl10", tmp_path, train=True).items
    assert time.monotonic() - begin < 3


def test_half_an_archive_is_not_taken_for_the_whole(believe: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """torchvision looks whether imagenette's folder is there, and no further."""
    made = published.imagenette()
    believe(made)
    made.put(tmp_path)
    real = utils.extract_archive

    def killed(source: str, into: str) -> None:
        real(source, into)
        for image in Path(into).glob("imagenette2/train/*/*_[4567].JPEG"):
            image.unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(utils, "extract_archive", killed)
    with pytest.raises(KeyboardInterrupt):
        _ = Torchvision("imagenette", tmp_path, train=True).items
    monkeypatch.setattr(utils, "extract_archive", real)
    assert len(Torchvision("imagenette", tmp_path, train=True).items) == 24


def test_debians_package_after_a_failure(tmp_path: Path, monkeypatch: Any) -> None:
    """What its sentence tells to do helps, whatever the mirrors have left behind."""
    made, raw = published.fashion_mnist(), tmp_path / "FashionMNIST" / "raw"
    monkeypatch.setattr("urllib.request.urlopen", offline)
    with pytest.raises(SourceError, match=r"or install Debian's package dataset-fashion-mnist$"):
        _ = Torchvision("fashion-mnist", tmp_path, train=True).items
    for name, data in made.files.items():
        file = tmp_path / torchvision_sets.DEBIAN / Path(name).name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    raw.mkdir(parents=True, exist_ok=True)
    assert len(Torchvision("fashion-mnist", tmp_path, train=True).items) == 40


def test_make_asks_the_mirrors_before_apt(tmp_path: Path) -> None:
    """With programs that only say that they are called: apt is asked if `prefetch` fails, and not after Ctrl-C."""
    programs, told = tmp_path / "bin", tmp_path / "told"
    programs.mkdir()
    for name in ("python", "apt-get", "dpkg-deb"):
        text = f'#!/bin/sh\necho "{name} $*" >> {told}\ncase "$*" in *prefetch*) exit $CODE;; esac\n'
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    words = ["make", "-f", str(ROOT / "Makefile"), f"VENV={tmp_path}", f"--old-file={tmp_path}/ready"]
    target = "data/fashion-mnist/val/manifest.json"
    clean = {name: value for name, value in os.environ.items() if "MAKE" not in name}
    for code, apt, wanted in (
        (0, True, ["prefetch", "pack"]),
        (130, True, ["prefetch"]),
        (1, True, ["prefetch", "update", "download", "pack"]),
        (1, False, ["prefetch", "pack"]),
    ):
        if not apt:
            (programs / "apt-get").unlink()
        path = f"{programs}:/usr/bin:/bin" if apt else str(_without_apt(tmp_path))
        told.unlink(missing_ok=True)
        done = subprocess.run(
            [*words, target], cwd=tmp_path, env={**clean, "PATH": path, "CODE": str(code)}, capture_output=True
        )
        assert (done.returncode == 0) == (code != 130), done.stderr
        calls = [line for line in told.read_text().splitlines() if not line.startswith("dpkg-deb")]
        assert len(calls) == len(wanted)
        assert all(word in line for word, line in zip(wanted, calls, strict=True))


def _without_apt(folder: Path) -> Path:
    """A folder with the few programs that the Makefile's shell needs."""
    (folder / "few").mkdir()
    for name in ("make", "bash", "sh", "mkdir", "rm", "mv", "echo"):
        (folder / "few" / name).symlink_to(f"/usr/bin/{name}")
    return folder / "few"


def test_what_make_says_when_the_mirrors_do_not_answer(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr("urllib.request.urlopen", offline)
    assert prefetch("fashion-mnist", str(tmp_path)) == 1
    assert capsys.readouterr().err == "FashionMNIST is unavailable (network is unreachable)\n"


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.parametrize("name", ["stl10", "imagenette"])
def test_its_configuration_packs_and_trains(name: str, tmp_path: Path) -> None:
    """As it stands, but for where the files are, the size of the net, and the number of steps."""
    made, sets = published.SETS[name](), tmp_path / "sets"
    path = published.believed(tmp_path / "path", made)
    made.put(sets / "raw")
    small = ("--train.global_batch=4", "--model.hidden=16", "--model.width=0.125", "--train.compile=off")
    where = (f"--data.train={sets}/train", f"--data.val={sets}/val", f"--data.source={name}")
    words = (f"--config={ROOT}/configs/{name}.yaml", *where, f"--run.dir={tmp_path}/run", *small, "--train.max_steps=2")
    env = {**OFFLINE, "PYTHONPATH": f"{path}:{ROOT}"}
    done = finish(spawn(python("dist_train", *words, "--train.device=cpu", ranks=2), env=env, how="exec"))
    assert done.returncode == 0, done.stderr
    assert f"packing {name} into {sets}" in done.stderr
    assert [line["step"] for line in records(tmp_path / "run", "step")][-1] == 2
    manifest = json.loads((sets / "val" / "manifest.json").read_text())
    assert (manifest["samples"], manifest["classes"]) == (len(made.images["val"]), made.classes)
