"""Pictures of a run as data URIs, within a budget of bytes."""

from __future__ import annotations

from base64 import b64encode
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from pipelines import pillow
from pipelines.errors import UserError
from pipelines.files import read_file

FOLDERS = ("pictures", "figures")  # of a run; the same picture stands in both, and the first is newer while it trains
CAPTIONS = {
    "inputs": "Training samples, and augmented versions of them as the net is shown them",
    "wrong": "Validation images that the net gets wrong, with its five most probable classes",
    "kernels": "Kernels of the first convolution",
    "top5": "Validation images with the five most probable classes",
    "nearest": "Validation images, and the training images nearest to them in the last hidden layer",
}
MOST, PIXELS = 1 << 25, 1 << 25  # bytes of a file, and pixels
QUALITY = 85  # of a JPEG
SMALLER = (1.0, 0.75, 0.5, 0.35, 0.25, 0.15)  # scales that are tried until a picture fits
PNG = b"\x89PNG\r\n\x1a\n"  # its first bytes (RFC 2083, 3.1)


class Picture(NamedTuple):
    """A picture in the page. Sizes are those of the file, in pixels."""

    name: str
    caption: str
    uri: str
    width: int
    height: int


def pictures(run: Path, budget: int) -> tuple[list[Picture], list[str]]:
    """The pictures of a run in at most `budget` characters together, and why others are left out."""
    paths = [path for name in CAPTIONS if (path := _path(run, name))]
    found, wrong = list[Picture](), list[str]()
    for i, path in enumerate(paths):
        share = (budget - sum(len(picture.uri) for picture in found)) // (len(paths) - i)
        try:
            found.append(_inlined(path, share))
        except (OSError, ValueError, SyntaxError, UserError, MemoryError) as error:  # whatever Pillow makes of garbage
            wrong.append(f"{path.parent.name}/{path.name} is no picture that can be shown ({error})")
    return found, wrong


def _path(run: Path, name: str) -> Path | None:
    return next((path for folder in FOLDERS if (path := run / folder / f"{name}.png").exists()), None)


def _inlined(path: Path, share: int) -> Picture:
    data = read_file(path, MOST)
    if not data.startswith(PNG):
        raise ValueError("it is no PNG")
    _check(int.from_bytes(data[16:20]), int.from_bytes(data[20:24]))  # of IHDR, the first chunk (RFC 2083, 4.1.1)
    with pillow.guarded(), Image.open(BytesIO(data), formats=["PNG"]) as image:
        width, height = image.size
        _check(width, height)
        image.load()
        flat = Image.new("RGB", image.size, "white")
        flat.paste(image, mask=image.getchannel("A") if "A" in image.getbands() else None)
    kind, kept = "png", data
    for scale in SMALLER:
        if 4 * len(kept) / 3 + 64 <= share:
            uri = f"data:image/{kind};base64,{b64encode(kept).decode()}"
            return Picture(path.stem, CAPTIONS[path.stem], uri, width, height)
        kind, kept = "jpeg", _smaller(flat, scale)
    raise ValueError("there is no room for it")


def _check(width: int, height: int) -> None:
    if width * height > PIXELS:
        raise ValueError(f"it has more than {PIXELS} pixels")


def _smaller(image: Image.Image, scale: float) -> bytes:
    size = max(1, round(scale * image.width)), max(1, round(scale * image.height))
    file = BytesIO()
    image.resize(size, Image.Resampling.LANCZOS).save(file, "JPEG", quality=QUALITY, optimize=True)
    return file.getvalue()
