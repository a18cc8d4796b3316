"""Reading, decoding and classifying one sample of a tar."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple
from zlib import crc32

from PIL import Image
from pydantic import Field

from pipelines.headers import Headed, headed
from pipelines.limits import limits
from pipelines.pillow import ORIENTATION, guarded, opened, upright_rgb
from pipelines.rows import HEADER, LABELS, NAME
from pipelines.shards import IMAGES
from pipelines.speech import in_line
from pipelines.valid import Invalid, parsed

# Formats that DALI decodes on both CPU and GPU, whatever the file extension.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP")
LARGEST = 65535  # pixels per side that fit into SAMPLE
LABEL = 64  # bytes of a class number, with the space around it
JSON = 256 << 10  # bytes of a sample's json
KEYS = 8  # of a json, that a reason names


class Sample(NamedTuple):
    """One sample of a tar.

    Attributes:
        row: its SAMPLE record; width and height are those of the image as it is shown.
        image: upright, RGB; None if it was not to be decoded.
        turned: whether its EXIF orientation requires turning the stored image.
        plain: whether it is of a kind that DALI has always decoded as Pillow does.
    """

    row: tuple[int, ...]
    image: Image.Image | None
    turned: bool
    plain: bool


@dataclass
class _Labelled:
    """The json of a sample, as timm writes it; its other keys are not looked at."""

    label: Annotated[int, Field(ge=0, lt=LABELS)]


@guarded()
def read_sample(file: Any, members: dict[str, Any], *, turn: bool = True, decode: bool = True) -> Sample:
    """Reads one sample, and decodes it. Raises ValueError and Pillow's errors.

    Args:
        turn: whether to apply the EXIF orientation; false for sets indexed by earlier versions of this program.
        decode: false to believe the header of the image.
    """
    member = next((members[ext] for ext in IMAGES if ext in members), None)
    if member is None or not {"cls", "json"} & members.keys():
        raise ValueError(f"needs one of {', '.join(IMAGES)}, and cls or json, has {', '.join(members)}")
    label = _class_number(file, members)
    limits().check_bytes(member.size)
    file.seek(member.offset_data - HEADER)
    header, data = file.read(HEADER), file.read(member.size)
    image = opened(data) if decode else headed(data)
    if image.format not in FORMATS:
        raise ValueError(f"is a {image.format} image: pack it from a folder, or write it as JPEG, PNG or WebP")
    if max(image.size) > LARGEST:
        raise ValueError(f"is {image.size[0]}x{image.size[1]} pixels: at most {LARGEST} a side")
    seen = image.stand_in if isinstance(image, Headed) else image
    upright = upright_rgb(seen)
    turned = turn and _lies(seen)
    sides = image.size[::-1] if turned and upright.size != seen.size else image.size
    plain = image.format in ("JPEG", "PNG") and image.mode in ("RGB", "L") and ORIENTATION not in seen.getexif()
    row = (member.offset_data, member.size, *sides, label, crc32(header[:NAME]), crc32(data))
    return Sample(row, upright if decode else None, turned, plain)


def _class_number(file: Any, members: dict[str, Any]) -> int:
    """The label of a sample: its cls, or without one the `label` in its json. Raises ValueError."""
    if (member := members.get("cls")) is None:
        return _label_of_json(_content(file, members["json"], JSON, "its json has {} bytes, and at most {} are read"))
    text = _content(file, member, LABEL, "its cls has {} bytes, and a class number at most {}").strip()[:20]
    if not text.isdigit() or (label := int(text)) >= LABELS:  # no valid label has 20 digits
        told = text.decode("ascii", "backslashreplace") or "(empty)"
        raise ValueError(f"label {told} is not a class number: for classes by name pack folders")
    return label


def _content(file: Any, member: Any, most: int, otherwise: str) -> bytes:
    if member.size > most:
        raise ValueError(otherwise.format(member.size, most))
    file.seek(member.offset_data)
    content: bytes = file.read(member.size)
    return content


def _label_of_json(text: bytes) -> int:
    try:
        return parsed(_Labelled, text).label
    except Invalid as error:
        why = f"its json gives no class number ({error})"
    found = None
    with suppress(ValueError, RecursionError):
        found = json.loads(text)
    if isinstance(found, dict):
        keys = [f"{in_line(key):.40}" for key in found][:KEYS]
        why += f"; its keys are {', '.join(keys)}{', ...' if len(found) > KEYS else ''}" if keys else "; it has no keys"
    raise ValueError(why)


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
