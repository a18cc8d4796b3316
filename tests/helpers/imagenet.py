"""Small synthetic files of ImageNet (ILSVRC-2012) in all layouts in which people have it: each class is a colour.

`python -m tests.helpers.imagenet DIR [EACH]` makes DIR/official, DIR/kaggle, DIR/unpacked and DIR/sorted, of the same
images: EACH training images of each class.
"""

from __future__ import annotations

import io
import sys
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.io
from PIL import Image

Colour = tuple[int, int, int]
TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"


class Kind(NamedTuple):
    """A class, with its ILSVRC2012_ID, which follows no order, as in the real devkit."""

    wnid: str
    words: str
    number: int
    colour: Colour


KINDS = (  # in the order of the labels
    Kind("n01440764", "tench, Tinca tinca", 4, (200, 30, 30)),
    Kind("n01443537", "goldfish, Carassius auratus", 1, (30, 200, 30)),
    Kind("n02012849", "crane", 6, (30, 30, 200)),
    Kind("n02123045", "tabby, tabby cat", 2, (200, 200, 30)),
    Kind("n03063599", "coffee mug", 5, (30, 200, 200)),
    Kind("n03126707", "crane", 3, (200, 30, 200)),
)
INNER = (("n00001740", "entity", 7, 3), ("n02084071", "dog, domestic dog, Canis familiaris", 8, 2))
NAMES = [f"{kind.wnid} {kind.words}" for kind in KINDS]  # what the manifest of each layout says
PNG, CMYK, EXIF, LARGE, BROKEN = range(5)  # classes whose training image number DIRTY is such a one
DIRTY = 1


class Picture(NamedTuple):
    """An image of a layout: file name, class, bytes of the file."""

    name: str
    kind: Kind
    data: bytes


def picture(colour: Colour, seed: int, size: tuple[int, int] = (60, 44), form: str = "JPEG", **save: object) -> bytes:
    """An image of this colour, with some grain."""
    grain = np.random.default_rng(seed).integers(-9, 10, (size[1], size[0], 1)) if max(size) < 1000 else 0
    levels = np.broadcast_to(np.array(colour) + grain, (size[1], size[0], 3))
    out = io.BytesIO()
    image = Image.fromarray(levels.astype(np.uint8))
    (image.convert("CMYK") if save.pop("cmyk", False) else image).save(out, form, **save)
    return out.getvalue()


def train_pictures(each: int = 12, dirt: bool = True) -> list[Picture]:
    """`each` images of each class. With dirt: the real set's PNG in a .JPEG name, CMYK, an EXIF block that is none, an
    image of more pixels than are decoded whole, and a file that is cut off."""
    made = []
    for label, kind in enumerate(KINDS):
        for i in range(each):
            data = picture(kind.colour, 100 * label + i, (60 + i, 44))
            if dirt and i == DIRTY:
                data = dirty(label, kind.colour, data)
            made.append(Picture(f"{kind.wnid}_{10 * i + 7}.JPEG", kind, data))
    return made


def dirty(what: int, colour: Colour, clean: bytes) -> bytes:
    """One of the images that decoders stumble over."""
    if what == PNG:
        return picture(colour, 1, form="PNG")
    if what == CMYK:
        return picture(colour, 1, cmyk=True)
    if what == EXIF:
        block = b"Exif\0\0II*\0\xff\xff\xff\xff" + bytes(range(40))
        return clean[:2] + b"\xff\xe1" + (len(block) + 2).to_bytes(2, "big") + block + clean[2:]
    if what == LARGE:
        return picture(colour, 1, (9000, 6000))
    return clean[: len(clean) // 3] if what == BROKEN else clean


def val_pictures(each: int = 5) -> list[Picture]:
    """`each` images of each class, whose numbers follow no order of classes."""
    order = np.random.default_rng(5).permutation(np.repeat(np.arange(len(KINDS)), each))
    return [
        Picture(f"ILSVRC2012_val_{i:08d}.JPEG", KINDS[k], picture(KINDS[k].colour, 1000 + i, (50, 40 + i)))
        for i, k in enumerate(order.tolist(), 1)
    ]


def tar_of(path: Path, members: Iterable[tuple[str, bytes]], mode: str = "w") -> Path:
    """A tar of these files, in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def tar_bytes(members: Iterable[tuple[str, bytes]]) -> bytes:
    """A tar as bytes."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


def meta_mat(rows: Sequence[tuple[int, str, str, int]] = ()) -> bytes:
    """data/meta.mat, of rows (ILSVRC2012_ID, WNID, words, num_children); by default of the classes, sorted by their
    IDs, and of two inner nodes of WordNet, as the real one."""
    leaves = sorted((kind.number, kind.wnid, kind.words, 0) for kind in KINDS)
    rows = rows or [*leaves, *((number, wnid, words, children) for wnid, words, number, children in INNER)]
    kinds = [(name, object) for name in ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children")]
    synsets = np.zeros((len(rows), 1), kinds)
    for i, (number, wnid, words, children) in enumerate(rows):
        below = np.arange(children, dtype=np.float64).reshape(1, -1)
        synsets[i, 0] = (np.float64(number), wnid, words, f"what {words} means", np.float64(children), below)
    out = io.BytesIO()
    scipy.io.savemat(out, {"synsets": synsets}, do_compression=True)
    return out.getvalue()


def ground_truth(val: Sequence[Picture]) -> bytes:
    """data/ILSVRC2012_validation_ground_truth.txt."""
    return "".join(f"{picture.kind.number}\n" for picture in val).encode()


def devkit(path: Path, meta: bytes | None = None, truth: bytes | None = None) -> Path:
    """The devkit, or one with other contents; empty ones are left out."""
    meta = meta_mat() if meta is None else meta
    truth = ground_truth(val_pictures()) if truth is None else truth
    files = {
        "readme.txt": b"the development kit\n",
        "data/meta.mat": meta,
        "data/ILSVRC2012_validation_ground_truth.txt": truth,
        "evaluation/demo_eval.m": b"% of Matlab\n",
    }
    return tar_of(path, ((f"ILSVRC2012_devkit_t12/{name}", data) for name, data in files.items() if data), "w:gz")


def official(folder: Path, train: Sequence[Picture], val: Sequence[Picture]) -> Path:
    """The three files that image-net.org has: a tar of tars, sorted by class; a flat tar; the devkit."""
    inner = []
    for kind in KINDS:
        images = [(one.name, one.data) for one in reversed(train) if one.kind == kind]
        inner += [(f"{kind.wnid}.tar", tar_bytes(images))] * bool(images)
    tar_of(folder / TRAIN_TAR, inner)
    tar_of(folder / VAL_TAR, ((one.name, one.data) for one in val))
    devkit(folder / DEVKIT, truth=ground_truth(val))
    return folder


def unpacked(folder: Path, train: Sequence[Picture], val: Sequence[Picture], *, by_class: bool = False) -> Path:
    """train/<wnid>/<image>, and val/<image>, or val/<wnid>/<image> as the widespread valprep script sorts it."""
    for split, pictures in (("train", train), ("val", val)):
        for one in pictures:
            place = folder / split / (one.kind.wnid if split == "train" or by_class else "")
            place.mkdir(parents=True, exist_ok=True)
            (place / one.name).write_bytes(one.data)
    return folder


def kaggle(folder: Path, train: Sequence[Picture], val: Sequence[Picture]) -> Path:
    """What the zip of Kaggle's competition holds: ILSVRC, and tables beside it."""
    unpacked(folder / "ILSVRC" / "Data" / "CLS-LOC", train, val)
    rows = [f"{one.name.removesuffix('.JPEG')},{one.kind.wnid} 1 2 30 40 {one.kind.wnid} 5 5 9 9 " for one in val]
    table = "\n".join(["ImageId,PredictionString", *reversed(rows), ""])
    (folder / "LOC_val_solution.csv").write_text(table)
    (folder / "LOC_synset_mapping.txt").write_text("".join(f"{name}\n" for name in NAMES))
    return folder


def layouts(root: Path, train: Sequence[Picture], val: Sequence[Picture]) -> dict[str, list[Path]]:
    """Files of all layouts below a folder; what `pack imagenet` takes for each."""
    first, second = official(root / "official", train, val), kaggle(root / "kaggle", train, val)
    third, fourth = unpacked(root / "unpacked", train, val), unpacked(root / "sorted", train, val, by_class=True)
    kit = devkit(third / DEVKIT, truth=ground_truth(val))
    return {
        "official": [first / TRAIN_TAR, first / VAL_TAR, first / DEVKIT],
        "folder of the official": [first],
        "kaggle": [second],
        "kaggle, ILSVRC": [second / "ILSVRC"],
        "kaggle, CLS-LOC": [second / "ILSVRC" / "Data" / "CLS-LOC"],
        "unpacked": [third / "train", third / "val", kit],
        "unpacked, csv": [third / "train", third / "val", second / "LOC_val_solution.csv"],
        "sorted": [fourth / "train", fourth / "val", kit],
    }


if __name__ == "__main__":
    layouts(Path(sys.argv[1]), train_pictures(*map(int, sys.argv[2:])), val_pictures())
