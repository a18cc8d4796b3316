"""Loads a state, of which is known before any memory is taken for it what its file holds.

torch's own reader, `weights_only`, runs no code, but believes what a file says of itself: 6 MB may be inflated to
6 GB, a tensor of a million elements may have four bytes, `bytearray(10**10)` is called. What `torch.save` writes has
none of it.
"""

from __future__ import annotations

import os
import pickle
import struct
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from pickle import UnpicklingError
from pickletools import genops
from typing import IO, Any, NamedTuple
from zipfile import BadZipFile, ZipFile

import torch

from dist_train.rundir.checkpoint import STATE, CheckpointError
from pipelines.errors import first_line
from pipelines.files import regular

# What a state with other names, types or shapes makes of its reading
WRONG = (RuntimeError, ValueError, LookupError, TypeError, AttributeError, EOFError, ArithmeticError, UnpicklingError)
LARGEST_PICKLE = 1 << 22  # bytes of names, numbers and shapes, and of the archive's table: of ten thousand tensors
ROOM = 1 << 26  # bytes of a state besides the tensors: most are padding
# Pickle's operations that torch reads, in protocol 2
OPERATIONS = """
    PROTO STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINSTRING TUPLE TUPLE1
    TUPLE2 TUPLE3 EMPTY_TUPLE EMPTY_LIST EMPTY_DICT EMPTY_SET APPEND APPENDS SETITEM SETITEMS GLOBAL REDUCE BUILD
    BINPERSID BINGET LONG_BINGET BINPUT LONG_BINPUT
"""
READ = frozenset(OPERATIONS.split())


class _Kind(NamedTuple):
    """A class of storage, by the bytes of its elements."""

    itemsize: int


class _Storage(NamedTuple):
    size: int  # bytes
    itemsize: int


def load_state(checkpoint: Path, device: torch.device, most: int) -> dict[str, Any]:
    """Loads the state from a checkpoint's directory.

    Args:
        most: bytes that its tensors may take.

    Raises CheckpointError for what no program of ours has written, OSError if it cannot be read.
    """
    path = checkpoint / STATE
    with open(path, "rb", opener=regular) as file:
        try:
            _look_at(file, most)
            file.seek(0)
            state = torch.load(file, map_location=device, weights_only=True)
        except (BadZipFile, NotImplementedError, struct.error, *WRONG) as error:
            raise CheckpointError(
                f"{path} is not loaded ({first_line(error)}): put the right one back, or begin anew under another "
                f"run.name"
            ) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} is not loaded (it holds a {type(state).__name__}): put the right one back")
    return state


def needed(model: torch.nn.Module, optimizer: str) -> int:
    """Bytes that the state of a run may take, at most.

    Args:
        optimizer: `optim.name`; of one that is not ours, 8 float64 tensors of each parameter's size; likewise if empty.
    """
    weights = sum(value.nbytes for value in model.state_dict().values() if torch.is_tensor(value))
    return weights * {"sgd": 2, "adam": 4}.get(optimizer, 17) + ROOM


def _look_at(file: IO[bytes], most: int) -> None:
    """Raises ValueError, or zipfile's error, for an archive that would take more memory than the file has bytes, or
    than `most`, or holds other objects than plain tensors, numbers and text."""
    size, start = os.fstat(file.fileno()).st_size, _table(file)
    with ZipFile(file) as archive:
        entries = archive.infolist()
        if archive.start_dir != start:
            raise ValueError("its table of entries is not where it says")
        if odd := [e for e in entries if e.compress_type or e.compress_size != e.file_size or e.flag_bits & 1]:
            raise ValueError(f"its entry {odd[0].filename} is compressed, which torch does not do")
        sizes = {entry.filename.partition("/")[2]: entry.file_size for entry in entries}
        total = sum(entry.file_size for entry in entries)
        if len(sizes) < len(entries) or total > size:
            raise ValueError("its entries overlap")
        if total > most:
            raise ValueError(f"it holds {total >> 20} MB, and the net and its moments take {most >> 20} at most")
        if sizes.get("data.pkl", 0) > LARGEST_PICKLE:
            raise ValueError("its names, numbers and shapes take more than 4 MiB")
        (pickled,) = (e for e in entries if e.filename.partition("/")[2] == "data.pkl")
        data = archive.read(pickled)
    value: Any
    for operation, value, _ in genops(data):
        if operation.name not in READ or (operation.name == "LONG_BINPUT" and value > len(data)):
            raise ValueError(f"it is pickled with {operation.name}, which torch does not do")
    _count(_Plan(data, sizes).load())


def _table(file: IO[bytes]) -> int:
    """Where the table of entries of an archive begins, which must be the one that any reader finds. Raises
    ValueError."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 98))
    end = file.read(98)
    if end[:4] != b"PK\x06\x06" or end[56:60] != b"PK\x06\x07" or end[76:80] != b"PK\x05\x06":
        raise ValueError("it is no file of torch.save, or only part of one")
    length, start = struct.unpack_from("<QQ", end, 40)
    (where,) = struct.unpack_from("<Q", end, 64)
    if where != size - 98 or start + length != where or length > LARGEST_PICKLE:
        raise ValueError("its table of entries is not where it says, or has more than 4 MiB")
    return int(start)


class _Plan(pickle.Unpickler):
    """Reads what a state holds, with something without memory in the place of each tensor. Raises ValueError for
    anything that a state does not have."""

    def __init__(self, data: bytes, sizes: Mapping[str, int]) -> None:
        super().__init__(BytesIO(data))
        self._sizes = sizes

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}".replace("__builtin__.", "builtins.")  # as Python 2 named them
        if found := FOUND.get(full):
            return found
        if full == "torch.storage.UntypedStorage":
            return _Kind(1)
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if module == "torch" and name in PLAIN:
            return _Kind(PLAIN[name])
        raise ValueError(f"it holds {full}, and not tensors, numbers and text only")

    def persistent_load(self, pid: Any) -> _Storage:
        word, kind, key, _, elements = pid
        size = self._sizes.get(f"data/{key}")
        if word != "storage" or not isinstance(kind, _Kind) or size is None or elements * kind.itemsize != size:
            raise ValueError(f"its entry data/{key} has {size} bytes, for {elements} elements")
        return _Storage(size, kind.itemsize)


def _tensor(storage: Any, offset: int, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any = None) -> object:
    """In the place of `torch._utils._rebuild_tensor_v2`, and of `_v3`, which has the dtype."""
    itemsize = dtype.itemsize if dtype else storage.itemsize
    elements = 1
    for stride, length in sorted(zip(strides, shape, strict=True)):
        if length < 0 or (length > 1 and stride != elements and 0 not in shape):
            raise ValueError(f"a tensor {list(shape)} has the strides {list(strides)}, in which elements share memory")
        elements *= length
    if offset < 0 or (offset + elements) * itemsize > storage.size:
        raise ValueError(f"a tensor {list(shape)} has {storage.size} bytes only")
    if grad or hooks:
        raise ValueError("a tensor has a gradient")
    return object()


def _encoded(text: str, codec: str) -> bytes:
    """In the place of `_codecs.encode`: bytes, as pickle writes them."""
    if codec != "latin1":
        raise ValueError(f"bytes are written in {codec}")
    return text.encode(codec)


def _bytes(text: Any = b"", codec: str = "latin-1") -> bytes:
    """In the place of `bytearray`."""
    if isinstance(text, str):
        return _encoded(text, codec.replace("-", ""))
    if not isinstance(text, bytes):
        raise ValueError(f"it asks for bytes by a {type(text).__name__}")
    return text


FOUND: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor,
    "torch.Size": tuple,
    "torch.device": torch.device,
    "collections.OrderedDict": OrderedDict,
    "collections.Counter": Counter,
    "_codecs.encode": _encoded,
    "builtins.bytearray": _bytes,
    "builtins.set": set,
    "builtins.complex": complex,
}
PLAIN = {  # bytes of an element
    **dict.fromkeys(("ByteStorage", "CharStorage", "BoolStorage"), 1),
    **dict.fromkeys(("HalfStorage", "BFloat16Storage", "ShortStorage"), 2),
    **dict.fromkeys(("FloatStorage", "IntStorage"), 4),
    **dict.fromkeys(("DoubleStorage", "LongStorage", "ComplexFloatStorage"), 8),
    "ComplexDoubleStorage": 16,
}


def _count(state: Any) -> None:
    """Raises ValueError for a state that repeats parts of itself, in which a walk would take for ever."""
    waiting, seen = [state], 0
    while waiting:
        value = waiting.pop()
        seen += 1
        if isinstance(value, dict):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set):
            waiting += value
        if seen > LARGEST_PICKLE:
            raise ValueError("it repeats parts of itself without end")
