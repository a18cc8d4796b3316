"""What the fuzz test damages of a shard set, and how it is read: as by a start, `index` and `verify`, but in one
process, without torch, and without DALI, which `verify` asks about odd images: a small process is forked fast."""

from __future__ import annotations

import hashlib
import io
import json
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
from hypothesis import strategies as st

sys.modules["pipelines.shown"] = without_dali = ModuleType("shown")
without_dali.refused = lambda *_: []  # type: ignore[attr-defined]

from pipelines import verify  # noqa: E402
from pipelines.augment import Augment  # noqa: E402
from pipelines.manifest import MANIFEST  # noqa: E402
from pipelines.plan import TrainingPlan  # noqa: E402
from pipelines.rows import SAMPLE, checksum  # noqa: E402
from pipelines.scan import scan_shard  # noqa: E402
from pipelines.scanned import WORK  # noqa: E402
from pipelines.shards import INDEX, ShardSet  # noqa: E402
from tests.helpers.damage import Change, as_json, changed, linked, of_bytes, of_values, spoiled  # noqa: E402
from tests.helpers.fuzz import Damage, Subject  # noqa: E402

AUGMENT = Augment(resize=72, crop=67)


def sealed(body: dict[str, Any]) -> bytes:
    """A manifest with the checksum that belongs to it, if it can be computed."""
    rest = {name: value for name, value in body.items() if name != "checksum"}
    text = json.dumps(rest, sort_keys=True)
    return as_json(rest | {"checksum": hashlib.sha256(text.encode()).hexdigest()})


def read_set(folder: Path) -> None:
    """As a start opens a set, and takes a batch of it."""
    shards = ShardSet(folder, patience=0.1)
    shards.check_tars(sizes=True)
    plan = TrainingPlan(shards, AUGMENT, shards.manifest, 0, 16)
    samples = plan.samples(0, 0, min(8, len(shards)))
    plan.views(0, samples, 0)
    _ = shards.labels(samples), shards.sides, shards.name(int(samples[0])), shards.cached(samples)
    for image in shards.reads(samples):
        image()


def verify_shards(folder: Path) -> None:
    """As `verify` does, whose workers are the same functions in other processes."""
    with patch.object(verify, "parallel", lambda work, tasks, **_: [work(task, lambda: None) for task in tasks]):
        verify.verify(folder, workers=1)


def manifests(base: Path) -> Subject:
    """A manifest, with the checksum that belongs to it or not."""
    base = base / "sets" / "train"
    text = (base / MANIFEST).read_bytes()
    body = json.loads(text)

    def make(folder: Path, damage: Damage) -> list[str]:
        kind, changes = damage
        linked(base, folder, MANIFEST)
        if kind == "bytes":
            (folder / MANIFEST).write_bytes(spoiled(text, changes))
            return [kind, *map(str, changes)]
        tree, told = changed({"it": body}, changes)
        whole = tree.get("it")
        data = sealed(whole) if kind == "sealed" and isinstance(whole, dict) else as_json(whole)
        (folder / MANIFEST).write_bytes(data)
        return [kind, *told]

    def read(folder: Path) -> None:
        read_set(folder)
        verify_shards(folder)

    kinds = st.tuples(st.sampled_from(("sealed", "sealed", "sealed", "bare")), of_values())
    return Subject(kinds | st.tuples(st.just("bytes"), of_bytes()), make, read)


ODD = (0, 1, 2, 511, 512, 65535, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 47, (1 << 63) - 1, (1 << 64) - 1)


def indexes(base: Path) -> Subject:
    """An index: its rows, with the checksums that belong to them or without, its bytes, or an array of another kind."""
    base = base / "sets" / "train"
    text = (base / INDEX).read_bytes()
    body, rows = json.loads((base / MANIFEST).read_bytes()), np.load(base / INDEX)
    others: dict[str, Callable[[io.BytesIO], object]] = {
        "npz": lambda file: np.savez(file, rows),
        "objects": lambda file: np.save(file, np.array([{}] * len(rows), object), allow_pickle=True),
        "numbers": lambda file: np.save(file, np.zeros(len(rows))),
        "square": lambda file: np.save(file, np.stack([rows, rows])),
        "scalar": lambda file: np.save(file, rows[0]),
        "none": lambda file: np.save(file, rows[:0]),
        "short": lambda file: np.save(file, rows[:-1]),
        "big-endian": lambda file: np.save(file, rows.astype(SAMPLE.newbyteorder(">"))),
    }

    def make(folder: Path, damage: Damage) -> list[str]:
        kind, changes = damage
        linked(base, folder, INDEX, MANIFEST)
        new, told, data = rows.copy(), list[str](), io.BytesIO()
        if kind == "other":
            told = [sorted(others)[changes[0].at % len(others)]]
            others[told[0]](data)
        elif kind == "bytes":
            told = [str(change) for change in changes]
            data.write(spoiled(text, changes, head=128))
        else:
            for change in changes:
                row, field = change.at % len(new), SAMPLE.names[change.at // 97 % len(SAMPLE.names)]  # type: ignore
                value = ODD[change.value % len(ODD)]
                new[row][field] = np.array(value, np.uint64).astype(new.dtype[field])
                told.append(f"row {row} {field} {value}")
            np.save(data, new)
        (folder / INDEX).write_bytes(data.getvalue())
        sealed_rows, at = json.loads(json.dumps(body)), 0
        for shard in sealed_rows["shards"]:
            if kind == "old":  # as earlier versions wrote it
                del shard["rows"]
            else:
                shard["rows"] = checksum(new[at : at + shard["samples"]])
            at += shard["samples"]
        if kind == "old":
            del sealed_rows["sides"]
        sealed_rows["index_sha256"] = hashlib.sha256(data.getvalue()).hexdigest()
        (folder / MANIFEST).write_bytes(sealed(sealed_rows))
        return [kind, *told]

    def read(folder: Path) -> None:
        read_set(folder)
        verify_shards(folder)

    kinds = st.tuples(st.sampled_from(("sealed", "sealed", "old", "bytes", "other")), of_bytes())
    return Subject(kinds, make, read)


FIELDS = {"name": (0, 100), "size": (124, 136), "typeflag": (156, 157), "linkname": (157, 257), "magic": (257, 265)}
FIELDS |= {"prefix": (345, 500), "mtime": (136, 148), "mode": (100, 108)}
CONTENTS = (
    b"",
    b"\0",
    b"0",
    b"7" * 11,
    b"-1",
    b"\x80" + b"\0" * 10 + b"\xff",
    b"\xff" * 12,
    b"5",
    b"1",
    b"2",
    b"L",
    b"K",
)
CONTENTS += (
    b"x",
    b"g",
    b"S",
    b"6",
    b"3",
    b"../../x.jpg",
    b"/etc/passwd",
    b"a\nb.jpg",
    b"\xff.jpg",
    b".hidden.jpg",
    b"x" * 100,
)
PAX = (("size", "99999999999"), ("size", "-1"), ("size", "x"), ("path", "../../x.jpg"), ("path", "a\nb\x1b.jpg"))
PAX += (
    ("GNU.sparse.major", "1"),
    ("GNU.sparse.map", "0,1,2"),
    ("GNU.sparse.size", "3000000000"),
    ("hdrcharset", "BINARY"),
)
PAX += (("path", "x" * 70_000), ("mtime", "nan"), ("GNU.sparse.numblocks", "-1"), ("linkpath", "/etc/passwd"))


def blocks(path: Path) -> list[list[bytes]]:
    """The members of a tar, each as its header and its data, padded."""
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        ends = [(m.offset, m.offset_data, m.offset_data + -(-m.size // 512) * 512) for m in tar]
    return [[data[a:b], data[b:c]] for a, b, c in ends]


def summed(header: bytes) -> bytes:
    """A header of a tar with the checksum that belongs to it."""
    blank = header[:148] + b" " * 8 + header[156:]
    return blank[:148] + f"{sum(blank):06o}\0 ".encode() + blank[156:]


def pax(name: str, value: str) -> list[bytes]:
    info = tarfile.TarInfo("x.jpg")
    info.pax_headers = {name: value}
    made = info.tobuf(tarfile.PAX_FORMAT)[:-512]
    return [made[:512], made[512:]]


def tars(base: Path) -> Subject:
    """A tar of another tool: its headers, with their sums, its members, its bytes."""
    base = base / "sets" / "val"
    members, tar = blocks(base / "shard-000000.tar")[:8], "shard-000000.tar"

    def make(folder: Path, damage: Damage) -> list[str]:
        kind, changes = damage
        found, told = [list(member) for member in members], [kind]
        for what, at, value in changes if kind != "bytes" else ():
            number, more = at % len(found), at // len(found)
            if kind == "images":
                name = "data"
                found[number][1] = spoiled(found[number][1], [Change(what, at, value)], head=600)
            elif kind == "fields":
                name = sorted(FIELDS)[more % len(FIELDS)]
                first, last = FIELDS[name]
                content = CONTENTS[value % len(CONTENTS)][: last - first].ljust(last - first, b"\0")
                header = found[number][0]
                found[number][0] = summed(header[:first] + content + header[last:])
                what = repr(content.rstrip(b"\0")[:30])
            else:
                name = sorted(("delete", "double", "pax", "swap"))[more % 4]
                if name == "delete" and len(found) > 1:
                    del found[number]
                elif name == "double":
                    found.insert(number, list(found[number]))
                elif name == "swap":
                    found[number], found[-1] = found[-1], found[number]
                else:
                    found.insert(number, pax(*PAX[value % len(PAX)]))
                    what = str(PAX[value % len(PAX)])[:60]
            told.append(f"{name} {number} {what}")
        data = b"".join(header + content for header, content in found) + bytes(10240)
        if kind == "bytes":
            data, told = spoiled(data, changes, head=512), [kind, *map(str, changes)]
        (folder / tar).write_bytes(data)
        (folder / WORK).mkdir()
        return told

    def read(folder: Path) -> None:
        """As a worker of `index` does, and then one of `verify`."""
        scan_shard(folder / tar, [], count=False)
        rows = folder / WORK / f"{tar}.npy"
        rows.rename(folder / INDEX)
        samples = len(np.load(folder / INDEX))
        verify._verify_shard(verify._Task(folder / tar, "", range(samples)), lambda: None)

    kinds = st.tuples(st.sampled_from(("fields", "fields", "images", "images", "members", "bytes")), of_bytes())
    return Subject(kinds, make, read)


SUBJECTS = {"manifest": manifests, "index": indexes, "tar": tars}
