"""Images as Pillow opens them: of known formats, within limits, without another program."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import EpsImagePlugin, Image, ImageOps

from pipelines.files import regular
from pipelines.limits import limits
from pipelines.misc import ceil_div

# Pillow's formats; those that its plugins of other makers register are taken too, since somebody has imported them.
FORMATS = frozenset(
    (  # noqa: SIM905
        "AVIF BLP BMP CUR DCX DDS DIB FITS FLI FTEX GBR GIF ICNS ICO IM IMT JPEG JPEG2000 MCIDAS MSP PCD PCX PIXAR PNG "
        "PPM PSD QOI SGI SPIDER SUN TGA TIFF WEBP XBM XPM XVTHUMB"
    ).split()
)
REFUSED = {  # the others, and why
    "EPS": "is a program, which Pillow has Ghostscript run",
    "IPTC": "holds an image of any format, which Pillow opens in turn",
    "BUFR GRIB HDF5 MPEG WMF": "Pillow knows them, but cannot decode them here",
}
POSTSCRIPT = (b"%!PS", b"\xc5\xd0\xd3\xc6")  # first bytes of an EPS
ORIENTATION = 0x0112  # EXIF tag; 1 means upright
STRIP = 1 << 20  # pixels
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # markers of a JPEG before its height and width


@contextmanager
def guarded() -> Iterator[None]:
    """Pillow inside the limits, however an image is opened there, and without Ghostscript. Raises ValueError for one
    that is too large."""
    before = Image.MAX_IMAGE_PIXELS, EpsImagePlugin.gs_binary
    # Pillow warns above its limit, and refuses above twice its limit.
    Image.MAX_IMAGE_PIXELS, EpsImagePlugin.gs_binary = ceil_div(limits().pixels, 2), False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")  # odd EXIF blocks
            yield
    except Image.DecompressionBombError as error:
        if found := re.search(r"\((\d+) pixels", str(error)):
            limits().check_pixels(int(found[1]))
        raise
    finally:
        Image.MAX_IMAGE_PIXELS, EpsImagePlugin.gs_binary = before


def opened(data: bytes) -> Image.Image:
    """The image in the bytes of a file, not decoded yet. Raises ValueError for one that is too large, and Pillow's
    errors; to be called, and decoded, in `guarded`."""
    limits().check_bytes(len(data))
    if data.startswith(POSTSCRIPT):
        raise ValueError("is PostScript, which another program would have to draw: save it as PNG")
    image = Image.open(BytesIO(data), formats=allowed())
    limits().check_pixels(image.width * image.height)
    return image


def claims(data: memoryview, sides: tuple[int, int]) -> bool:
    """Whether an image's header claims these sides, be they turned: from one of others a crop would be cut that the
    index does not mean, and a decoder might take any amount of memory for it. Nothing is decoded."""
    try:
        return sorted(_sides(data)) == sorted(sides)
    except Exception:  # Pillow raises anything on garbage
        return False


def _sides(data: memoryview) -> tuple[int, int]:
    if bytes(data[:8]) == b"\x89PNG\r\n\x1a\n" and len(data) >= 24:
        return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    place = 2 if bytes(data[:2]) == b"\xff\xd8" else len(data)
    while place + 9 <= len(data) and data[place] == 0xFF:  # a segment of a JPEG: Pillow takes 20 us to find its frame
        if data[place + 1] in FRAMES:
            height, width = data[place + 5 : place + 7], data[place + 7 : place + 9]
            return int.from_bytes(width, "big"), int.from_bytes(height, "big")
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return Image.open(BytesIO(data), formats=allowed()).size


def allowed() -> list[str]:
    """The formats that are opened, in the order in which Pillow tries them."""
    Image.preinit()
    Image.init()
    return [name for name in Image.ID if name in FORMATS or not Image.OPEN[name][0].__module__.startswith("PIL.")]


def read_image(path: str | bytes | Path) -> bytes:
    """The bytes of an image file. Raises ValueError, before it reads them, if there are too many, and OSError."""
    with open(path, "rb", opener=regular) as file:
        size = os.fstat(file.fileno()).st_size
        limits().check_bytes(size)
        return file.read(size)


def upright_rgb(image: Image.Image) -> Image.Image:
    """The image as 8-bit RGB with its EXIF rotation applied; 16-bit levels are scaled, alpha is dropped. It may be the
    same object."""
    image.load()
    if image.getexif().get(ORIENTATION, 1) != 1:  # otherwise this would copy it
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = _eight_bits(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    grey = Image.new("L", image.size)
    for top, strip in strips(image):
        levels = (strip.astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8)
        grey.paste(Image.fromarray(levels), (0, top))
    return grey


def strips(image: Image.Image) -> Iterator[tuple[int, NDArray[np.generic]]]:
    """An image as arrays [height, width, ...] of about `STRIP` pixels, each with the number of its first row: a whole
    one, in numpy's numbers of 8 bytes, would take gigabytes."""
    height = max(1, STRIP // image.width)
    for top in range(0, image.height, height):
        yield top, np.asarray(image.crop((0, top, image.width, min(top + height, image.height))))
