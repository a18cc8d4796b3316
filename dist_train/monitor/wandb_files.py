"""Files of wandb: its offline logs, and what the next start needs, the run's id and how far the run was sent."""

from __future__ import annotations

import re
import struct
import uuid
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from dist_train.monitor.reader import Shown, lines
from dist_train.rundir import record
from pipelines.files import folder, read_file, regular, write_atomically

BLOCK, HEADER = 32768, 7  # bytes: a block of wandb's file; the header of each piece, and of the file
WHOLE, LAST = 1, 4  # kinds of pieces that end a message
ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class Kept:
    """The folder `wandb` of a run. Its mark says how far the run was sent: the byte of the record behind the last line
    that has certainly arrived. It moves when a start ends well: what a killed one sent may be lost."""

    def __init__(self, shown: Shown) -> None:
        self._shown = shown
        self._id, self._sent, self._inputs = (shown.run / "wandb" / name for name in ("id", "sent", "inputs"))

    def id(self) -> str:
        """The run's id in wandb; a new one if there is none yet, or if wandb would refuse it."""
        folder(self._id.parent)
        found = read_file(self._id).decode(errors="replace").strip() if self._id.exists() else None
        if found and ID.fullmatch(found):
            return found
        if found is not None:
            self._shown.say(f"wandb: {self._id} holds no id: the run is shown from its beginning, as a new one")
        for left in (self._sent, self._inputs):  # they belong to the other id
            left.unlink(missing_ok=True)
        new = uuid.uuid4().hex[:8]
        write_atomically(self._id, new.encode())
        return new

    def mark(self) -> int:
        """The mark, always at the end of a line. If the record was cut back or replaced, so is the mark, on disk too:
        rewritten lines may have other lengths, and it could point into one."""
        try:
            mark = int(read_file(self._sent))
        except (OSError, ValueError):
            return 0
        most = min(mark, self._shown.record_bytes)
        whole = lines(self._shown.run / record.FILE, record.RecordLine)
        found = max((end for end, _ in whole if end <= most), default=0)
        if found != mark:
            with suppress(OSError):  # a full disk
                self.move(found)
        return found

    def move(self, mark: int) -> None:
        write_atomically(self._sent, str(mark).encode())

    @property
    def has_inputs(self) -> bool:
        """Whether the picture of the inputs has been sent."""
        return self._inputs.exists()

    def inputs_arrived(self) -> None:
        self._inputs.touch()


def is_whole(path: Path) -> bool:
    """Whether an offline file reaches the exit of the run. On a full disk wandb drops what does not fit, silently."""
    from wandb.proto.wandb_internal_pb2 import Record

    try:
        return any(Record.FromString(message).HasField("exit") for message in _messages(path))
    except (OSError, ValueError):
        return False


def sendable(home: Path, run_id: str) -> list[Path]:
    """Offline folders of a run that hold at least one message. A start that is killed early leaves one without, at
    which `wandb sync` gives up, and sends none of the others."""
    found = []
    for path in sorted(home.glob(f"offline-run-*/run-{run_id}.wandb")):  # two in one second differ in their suffix
        with suppress(OSError, ValueError):
            if any(True for _ in _messages(path)):
                found.append(path.parent)
    return found


def _messages(path: Path) -> Iterator[bytes]:
    """The whole messages of a wandb file, a log in LevelDB's format: blocks of pieces, each behind its checksum, length
    and kind. Raises ValueError for damage."""
    place, message = HEADER, b""
    with open(path, "rb", opener=regular) as file:
        file.seek(place)
        while True:
            if (rest := BLOCK - place % BLOCK) < HEADER:
                file.read(rest)
                place += rest
                continue
            head = file.read(HEADER)
            if len(head) < HEADER:
                return
            checksum, size, kind = struct.unpack("<IHB", head)
            piece = file.read(size)
            if len(piece) < size:
                return
            if zlib.crc32(piece, zlib.crc32(head[6:])) != checksum:
                raise ValueError(f"{path}: damaged at byte {place}")
            place, message = place + HEADER + size, message + piece
            if kind in (WHOLE, LAST):
                yield message
                message = b""
