"""Files of few bytes that hold, or say that they hold, very much."""

from __future__ import annotations

import io
import struct
import zlib

from PIL import Image

CHANNELS = {0: 1, 2: 3, 6: 4}  # by PNG's colour type


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, colour: int = 2, depth: int = 8, extra: bytes = b"") -> bytes:
    """A whole, black PNG, a thousandth as large as its pixels. One compressed block of rows is repeated."""
    row = bytes(1 + width * CHANNELS[colour] * depth // 8)
    many, rest = divmod(height, 16)

    def block(rows: int, last: bool) -> bytes:
        packer = zlib.compressobj(9, wbits=-15)
        return packer.compress(row * rows) + packer.flush(zlib.Z_FINISH if last else zlib.Z_FULL_FLUSH)

    check = struct.pack(">HH", len(row) * height % 65521, 1)  # Adler-32 of zeros
    body = b"\x78\xda" + block(16, False) * many + block(rest, True) + check
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + extra + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def jpeg(width: int, height: int, *, progressive: bool = False) -> bytes:
    """A JPEG of a few pixels whose header claims more."""
    out = io.BytesIO()
    Image.new("RGB", (64, 64), (200, 10, 30)).save(out, "JPEG", progressive=progressive)
    data = bytearray(out.getvalue())
    at = data.index(b"\xff\xc2" if progressive else b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def gif(frames: int) -> bytes:
    """An animation of black frames of 64x64 pixels."""
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, 64, 64, 0) + b"\x02\x02\x4c\x01\x00"
    return b"GIF89a" + struct.pack("<HHBBB", 64, 64, 0x80, 0, 0) + bytes(6) + frame * frames + b";"


def exif(entries: int, size: int) -> bytes:
    """An EXIF block in which each entry is the whole block."""
    head = b"II*\0" + struct.pack("<IH", 8, entries)
    return (head + b"".join(struct.pack("<HHII", 0x9000 + k, 7, size, 0) for k in range(entries))).ljust(size, b"\0")


def eps(side: int) -> bytes:
    return b"%%!PS-Adobe-3.0 EPSF-3.0\n%%%%BoundingBox: 0 0 %d %d\n%%%%EndComments\nshowpage\n%%%%EOF\n" % (side, side)


def iptc(inside: bytes) -> bytes:
    """An IPTC image, which holds the file of another."""

    def field(record: int, number: int, data: bytes) -> bytes:
        return struct.pack(">BBBH", 0x1C, record, number, len(data)) + data

    fields = [(3, 20, b"\0\x40"), (3, 30, b"\0\x40"), (3, 60, b"\x01\x00"), (3, 120, b"\x05"), (8, 10, inside)]
    return b"".join(field(*one) for one in fields)
