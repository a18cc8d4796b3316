"""What the header of an image says, as Pillow would say it of the decoded image. Nothing is decoded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple
from zlib import crc32

from PIL import Image

from pipelines.limits import limits
from pipelines.pillow import ORIENTATION, opened

PNG = b"\x89PNG\r\n\x1a\n"
TEXT = (b"tEXt", b"zTXt", b"iTXt", b"eXIf")  # chunks of a PNG, before or behind its pixels, that may say how to turn it
START_OF_FRAME = (0xC0, 0xC1, 0xC2)  # baseline, extended and progressive: markers of a JPEG (ITU-T T.81, table B.1)
START_OF_SCAN, TABLES = 0xDA, 0xDB
SKIPPED = (0xC4, 0xDD, 0xFE, *range(0xE3, 0xED), 0xEF)  # Huffman tables, restart interval, comment, most of APPn
# Segments for applications that Pillow reads, with the length from which on it takes each; or never, but looks at the
# image more closely: it is turned, perhaps, or an MPO.
NEVER = 1 << 16
READ = {
    0xE0: {b"JFIF": 7},
    0xE1: {b"Exif\0\0": NEVER, b"http://ns.adobe.com/xap/1.0/\0": NEVER},
    0xE2: {b"MPF\0": NEVER},
    0xED: {b"Photoshop 3.0\0": NEVER},
    0xEE: {b"Adobe": 7},
}
MODES = {1: "L", 3: "RGB", 4: "CMYK"}
UPRIGHT = Image.new("RGB", (1, 2))


class Headed(NamedTuple):
    """An image of which only the header is known: attributes of Pillow's image, and a stand-in of two pixels, one above
    the other, which is turned as the image is."""

    format: str | None
    mode: str
    size: tuple[int, int]
    stand_in: Image.Image = UPRIGHT


def headed(data: bytes) -> Headed:
    """What the header in the bytes of a file says. Raises ValueError for an image that is too large, and what Pillow
    raises when it opens one; to be called in `guarded`."""
    limits().check_bytes(len(data))
    if found := _plain_jpeg(data):
        limits().check_pixels(found.size[0] * found.size[1])
        return found
    image = opened(_texts_first(data) if data.startswith(PNG) else data)
    found = Headed(image.format, image.mode, image.size)
    if ORIENTATION not in Image.Image.getexif(image):  # that of a PNG would decode it
        return found
    stand_in = UPRIGHT.copy()
    stand_in.info.update(image.info)
    return found._replace(stand_in=stand_in)


def _plain_jpeg(data: bytes) -> Headed | None:
    """The header of a JPEG without EXIF, for which Pillow takes several times as long; None if it has EXIF, or anything
    else unusual, which is left to Pillow."""
    frame: tuple[str, tuple[int, int]] | None = None
    for marker, begin, end in _segments(data):
        if marker == START_OF_SCAN:
            return Headed("JPEG", *frame) if frame and all(frame[1]) else None
        if marker in START_OF_FRAME and not frame and end - begin > 5:
            mode, components = MODES.get(data[begin + 5], ""), data[begin + 5]
            if not mode or end - begin != 6 + 3 * components or data[begin] != 8:
                return None
            height, width = (int.from_bytes(data[at : at + 2], "big") for at in (begin + 1, begin + 3))
            frame = mode, (width, height)
        elif marker == TABLES:  # of 64 numbers each, behind a byte: T.81, B.2.4.1
            if (end - begin) % 65 or any(data[at] > 15 for at in range(begin, end, 65)):
                return None
        elif marker in READ:
            if any(data.startswith(start, begin, end) and end - begin < least for start, least in READ[marker].items()):
                return None
        elif marker not in SKIPPED:
            return None
    return None


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, begin and end of each segment of a JPEG, as far as there are any."""
    place = 2 if data.startswith(b"\xff\xd8\xff") else len(data)
    while data[place : place + 1] == b"\xff" and place + 4 <= len(data):
        end = place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        if not place + 4 <= end <= len(data):
            return
        yield data[place + 1], place + 4, end
        place = end


def _texts_first(data: bytes) -> bytes:
    """A PNG's header with the texts that stand behind its pixels, which Pillow reads when it has decoded these."""
    place, head, behind = len(PNG), 0, list[bytes]()
    while place + 12 <= len(data):
        length, kind = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        if kind == b"IDAT":
            head = head or place
        elif kind == b"IEND" or not kind.isalnum() or (head and kind == b"fcTL" and b"acTL" in data[:head]):
            break
        elif head and kind in TEXT and place + 12 + length <= len(data):
            body = data[place + 4 : place + 8 + length]
            behind.append(length.to_bytes(4, "big") + body + crc32(body).to_bytes(4, "big"))  # Pillow checks none there
        place += 12 + length
    return data[:head] + b"".join(behind) + data[head:] if behind else data
