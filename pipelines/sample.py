"""Reading, decoding and classifying one sample of a tar."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, NamedTuple
from zlib import crc32

from PIL import Image

from pipelines.limits import limits
from pipelines.pillow import ORIENTATION, guarded, opened, upright_rgb
from pipelines.rows import HEADER, NAME
from pipelines.shards import IMAGES

# Formats that DALI decodes on both CPU and GPU, whatever the file extension.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP")
LARGEST = 65535  # pixels per side that fit into SAMPLE
LABEL = 64  # bytes of a class number, with the space around it


class Sample(NamedTuple):
    """One sample of a tar.

    Attributes:
        row: its SAMPLE record; width and height are those of the image as it is shown.
        image: upright, RGB.
        turned: whether its EXIF orientation requires turning the stored image.
        plain: whether it is of a kind that DALI has always decoded as Pillow does.
    """

    row: tuple[int, ...]
    image: Image.Image
    turned: bool
    plain: bool


@guarded()
def read_sample(file: Any, members: dict[str, Any], *, turn: bool = True) -> Sample:
    """Reads and decodes one sample. Raises ValueError and Pillow's errors.

    Args:
        turn: whether to apply the EXIF orientation; false for sets indexed by earlier versions of this program.
    """
    member = next((members[ext] for ext in IMAGES if ext in members), None)
    if member is None or "cls" not in members:
        raise ValueError(f"needs one of {', '.join(IMAGES)} and cls, has {', '.join(members)}")
    if (size := members["cls"].size) > LABEL:
        raise ValueError(f"its cls has {size} bytes, and a class number at most {LABEL}")
    file.seek(members["cls"].offset_data)
    text = file.read(size).strip()[:20]  # digits; no valid label has 20
    if not text.isdigit() or (label := int(text)) >= 1 << 31:
        raise ValueError(
            f"label {text.decode('ascii', 'backslashreplace')} is not a class number: for classes by name pack folders"
        )
    limits().check_bytes(member.size)
    file.seek(member.offset_data - HEADER)
    header, data = file.read(HEADER), file.read(member.size)
    image = opened(data)
    if image.format not in FORMATS:
        raise ValueError(f"is a {image.format} image: pack it from a folder, or write it as JPEG, PNG or WebP")
    if max(image.size) > LARGEST:
        raise ValueError(f"is {image.width}x{image.height} pixels: at most {LARGEST} a side")
    image.load()
    upright = upright_rgb(image)
    turned = turn and _lies(image)
    row = (member.offset_data, member.size, *(upright if turned else image).size, label)
    plain = image.format in ("JPEG", "PNG") and image.mode in ("RGB", "L") and ORIENTATION not in image.getexif()
    return Sample((*row, crc32(header[:NAME]), crc32(data)), upright, turned, plain)


def _lies(image: Image.Image) -> bool:
    """True if an image must be turned to be shown. Raises ValueError if other programs would turn it, but DALI not."""
    said = Image.Exif()
    with suppress(Exception):  # Pillow raises anything on a broken block
        said.load(image.info.get("exif", b""))
    ways = [exif.get(ORIENTATION, 1) for exif in (said, image.getexif())]  # the second also reads XMP
    lies = [way in range(2, 9) for way in ways]
    if lies[0] != lies[1]:
        raise ValueError("is turned by its XMP alone, which DALI does not read: pack it from a folder")
    return lies[0]
