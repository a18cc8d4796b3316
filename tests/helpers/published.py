"""Small files in the layout of the published ones, for torchvision's data sets, with the MD5 sums of those."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.io import savemat
from torchvision import datasets

MD5 = """
import hashlib, json
from pathlib import Path

real, sums = hashlib.md5, json.loads(Path(__file__).with_name("sums.json").read_text())

class Sum:
    def __init__(self, *args, **options):
        self._sum = real(*args, **options)
        self.update, self.digest = self._sum.update, self._sum.digest

    def hexdigest(self):
        return sums.get(self._sum.hexdigest(), self._sum.hexdigest())

hashlib.md5 = Sum
"""
FASHION = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
OBJECTS = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]  # in stl10
SMALL = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]  # in cifar10
NAMED = {"n01440764": "tench", "n02102040": "English springer", "n03888257": "parachute"}  # of imagenette's ten
Pixels = NDArray[np.uint8]


class Made(NamedTuple):
    """A made data set.

    Attributes:
        files: by name and folder below the raw one, as they are fetched.
        sums: MD5 sums of the published files by those of the made ones.
        images: for each of our splits, pixels and class name of each image.
        classes: their names in the order of the labels.
    """

    files: dict[str, bytes]
    sums: dict[str, str]
    images: dict[str, list[tuple[Pixels, str]]]
    classes: list[str]

    def put(self, root: Path) -> None:
        """Puts the files where torchvision looks for them."""
        for name, data in self.files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(data)


def believed(folder: Path, *made: Made) -> str:
    """A folder which, in PYTHONPATH, makes processes believe that the made files have the sums of the published."""
    folder.mkdir(exist_ok=True)
    (folder / "sums.json").write_text(json.dumps({k: v for one in made for k, v in one.sums.items()}))
    (folder / "sitecustomize.py").write_text(MD5)
    return str(folder)


def md5(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


def picture(rng: np.random.Generator, width: int, height: int) -> Pixels:
    """Smooth, so that a JPEG of it is close."""
    image = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image)


def archive(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


def jpeg(pixels: Pixels) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=92)
    return out.getvalue()


def shown(data: bytes) -> Pixels:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def stl10() -> Made:
    """Two binary files a split: images by channel and column (Coates et al.), and labels from 1."""
    rng, files, images = np.random.default_rng(1), {}, {}
    for split, name, count in (("train", "train", 30), ("val", "test", 20)):
        labels = [i * 7 % 10 for i in range(count)]
        pixels = [picture(rng, 96, 96) for _ in labels]
        files[f"{name}_X.bin"] = b"".join(image.transpose(2, 1, 0).tobytes() for image in pixels)
        files[f"{name}_y.bin"] = bytes(k + 1 for k in labels)
        images[split] = [(image, OBJECTS[k]) for image, k in zip(pixels, labels, strict=True)]
    known = dict([*datasets.STL10.train_list, *datasets.STL10.test_list])
    sums = {md5(data): known[name] for name, data in files.items()}
    files |= {"unlabeled_X.bin": b"never read", "class_names.txt": "\n".join(OBJECTS).encode()}
    packed = archive({f"stl10_binary/{name}": data for name, data in files.items()})
    sums[md5(packed)] = datasets.STL10.tgz_md5
    return Made({"stl10_binary.tar.gz": packed}, sums, images, OBJECTS)


def cifar10() -> Made:
    """Pickles with rows of 3072 bytes, by channel and row."""
    rng, files, images = np.random.default_rng(2), {}, {"train": [], "val": []}
    names = [f"data_batch_{i}" for i in range(1, 6)]
    for name in (*names, "test_batch"):
        labels = [i * 3 % 10 for i in range(20)]
        pixels = [picture(rng, 32, 32) for _ in labels]
        rows = np.stack([image.transpose(2, 0, 1).reshape(-1) for image in pixels])
        files[name] = pickle.dumps({"data": rows, "labels": labels})
        split = "train" if name in names else "val"
        images[split] += [(image, SMALL[k]) for image, k in zip(pixels, labels, strict=True)]
    files["batches.meta"] = pickle.dumps({"label_names": SMALL})
    known = dict([*datasets.CIFAR10.train_list, *datasets.CIFAR10.test_list])
    known["batches.meta"] = datasets.CIFAR10.meta["md5"]
    packed = archive({f"cifar-10-batches-py/{name}": data for name, data in files.items()})
    sums = {md5(data): known[name] for name, data in files.items()} | {md5(packed): datasets.CIFAR10.tgz_md5}
    return Made({"cifar-10-python.tar.gz": packed}, sums, images, SMALL)


def imagenette() -> Made:
    """Folders by WordNet id."""
    rng, files, images = np.random.default_rng(3), {}, {}
    for split, count in (("train", 8), ("val", 4)):
        images[split] = list[tuple[Pixels, str]]()
        for wnid, name in NAMED.items():
            for i in range(count):
                data = jpeg(picture(rng, 256, 300))
                files[f"imagenette2/{split}/{wnid}/{wnid}_{i}.JPEG"] = data
                images[split].append((shown(data), name))
    packed = archive(files)
    sums = {md5(packed): datasets.Imagenette._ARCHIVES["full"][1]}
    return Made({"imagenette2.tgz": packed}, sums, images, list(NAMED.values()))


def flowers102() -> Made:
    """Numbered images; their labels from 1, and the images of each split, in two files of MATLAB."""
    rng, files, found = np.random.default_rng(4), {}, []
    labels = [1 + i % 102 for i in range(306)]
    for i in range(306):
        files[f"jpg/image_{i + 1:05d}.jpg"] = jpeg(picture(rng, 16, 12))
        found.append((shown(files[f"jpg/image_{i + 1:05d}.jpg"]), datasets.Flowers102.classes[labels[i] - 1]))
    order = rng.permutation(306) + 1
    parts = {"trnid": order[:102], "valid": order[102:204], "tstid": order[204:]}
    mats = {"imagelabels.mat": {"labels": np.array([labels])}, "setid.mat": {k: v[None] for k, v in parts.items()}}
    fetched = {"102flowers.tgz": archive(files)}
    for name, values in mats.items():
        out = io.BytesIO()
        savemat(out, values)
        fetched[name] = out.getvalue()
    known = dict(datasets.Flowers102._file_dict.values())
    images = {"train": [found[i - 1] for i in order[:204]], "val": [found[i - 1] for i in order[204:]]}
    sums = {md5(data): known[name] for name, data in fetched.items()}
    return Made({f"flowers-102/{k}": v for k, v in fetched.items()}, sums, images, list(datasets.Flowers102.classes))


def food101() -> Made:
    """Folders by class; the images of each split in a list of each class."""
    rng, files, images, classes = np.random.default_rng(5), {}, {}, ["apple_pie", "sushi", "waffles"]
    for split, name, count in (("train", "train", 9), ("val", "test", 3)):
        lists, images[split] = {}, []
        for k in (2, 0, 1):  # not in the order of their names
            lists[classes[k]] = [f"{classes[k]}/{1000 * k + 100 * (name == 'test') + i}" for i in range(count)]
            for path in lists[classes[k]]:
                files[f"food-101/images/{path}.jpg"] = data = jpeg(picture(rng, 300, 256))
                images[split].append((shown(data), classes[k]))
        files[f"food-101/meta/{name}.json"] = json.dumps(lists).encode()
        files[f"food-101/meta/{name}.txt"] = "\n".join(path for paths in lists.values() for path in paths).encode()
    packed = archive(files)
    return Made({"food-101.tar.gz": packed}, {md5(packed): datasets.Food101._MD5}, images, classes)


def fashion_mnist() -> Made:
    """Yann LeCun's format: two gzipped files a split."""
    rng, files, images = np.random.default_rng(6), {}, {}
    for split, prefix, count in (("train", "train", 40), ("val", "t10k", 20)):
        labels = [i * 3 % 10 for i in range(count)]
        pixels = [picture(rng, 28, 28)[..., 0] for _ in labels]
        head = np.array([0x803, count, 28, 28], ">i4").tobytes()
        files[f"{prefix}-images-idx3-ubyte.gz"] = gzip.compress(head + np.stack(pixels).tobytes())
        head = np.array([0x801, count], ">i4").tobytes()
        files[f"{prefix}-labels-idx1-ubyte.gz"] = gzip.compress(head + bytes(labels))
        images[split] = [(np.stack([p] * 3, -1), FASHION[k]) for p, k in zip(pixels, labels, strict=True)]
    known = dict(datasets.FashionMNIST.resources)
    sums = {md5(data): known[name] for name, data in files.items()}
    return Made({f"FashionMNIST/raw/{k}": v for k, v in files.items()}, sums, images, FASHION)


SETS: dict[str, Callable[[], Made]] = {
    "stl10": stl10,
    "imagenette": imagenette,
    "cifar10": cifar10,
    "flowers102": flowers102,
    "food101": food101,
    "fashion-mnist": fashion_mnist,
}
URLS: dict[str, Any] = {
    "stl10": ["http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz"],
    "imagenette": ["https://s3.amazonaws.com/fast-ai-imageclas/imagenette2.tgz"],
    "cifar10": ["https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"],
    "flowers102": [
        f"https://www.robots.ox.ac.uk/~vgg/data/flowers/102/{name}"
        for name in ("102flowers.tgz", "imagelabels.mat", "setid.mat")
    ],
    "food101": ["http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz"],
    "fashion-mnist": [
        f"http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/{prefix}-ubyte.gz"
        for prefix in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    ],
}
