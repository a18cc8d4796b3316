"""One parquet file of images and labels, which may be a stranger's: its columns, its labels, its images.

The layout is that of Hugging Face's library `datasets`: an image is {bytes, path} (or bytes alone), a label a number;
the schema's metadata `huggingface` describe each column in JSON, with the names of the classes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import SourceError, first_line
from pipelines.files import HeldFile, regular
from pipelines.limits import limits
from pipelines.manifest import CLASSES
from pipelines.speech import in_line

FOOTER = 64 << 20  # bytes of a file's description of itself, at most
BUFFER = 1 << 20  # bytes of a column that are read at a time
LABELS = 1 << 16  # labels that are read at a time
RATIO = 100  # images hardly shrink when compressed: what shrinks more than this is a bomb, if it is large
POINTER = b"version https://git-lfs"  # begins what `git clone` leaves for a large file
CLASS = "ClassLabel"  # of datasets' kinds of columns


class Columns:
    """A parquet file, opened. Raises SourceError if it is damaged, or does not hold images and labels.

    Args:
        image, label: the columns; empty: the one of this name, or else the only one with images, or with classes.

    Attributes:
        names: of the classes; None if the file gives none.
        groups: number of rows of each row group.
    """

    def __init__(self, path: Path, image: str, label: str) -> None:
        try:
            from pyarrow import parquet
        except ImportError as error:
            raise SourceError(f"parquet files are read by pyarrow ({error}): pip install pyarrow") from error
        self.path = path
        with self._readable():
            file = HeldFile(str(path), "rb", opener=regular)
            if file.read(len(POINTER)) == POINTER:
                raise SourceError(f"{path} is only a pointer of Git LFS: run `git lfs pull` in its clone")
            size = file.seek(-8, 2) + 8
            footer = int.from_bytes(file.read(4), "little")
            if footer > FOOTER:
                raise ValueError(f"its footer has {footer} bytes, and {FOOTER} are allowed")
            self._file = parquet.ParquetFile(file, buffer_size=BUFFER, pre_buffer=False)
            meta, schema = self._file.metadata, self._file.schema_arrow
            self.groups = [meta.row_group(k).num_rows for k in range(meta.num_row_groups)]
            if min(self.groups, default=0) < 0 or sum(self.groups) > size:
                raise ValueError(f"it claims {sum(self.groups)} rows in {size} bytes")
            features = _features(schema.metadata or {})
        kinds = {field.name: field.type for field in schema}
        pictures = [name for name, kind in kinds.items() if _bytes_of(name, kind)]
        classes = [name for name in kinds if features.get(name, {}).get("_type") == CLASS]
        self._image = self._chosen("image", image, pictures, list(kinds))
        self._label = self._chosen("label", label, classes, list(kinds))
        if not (column := _bytes_of(self._image, kinds[self._image])):
            found = f"{kinds[self._image]!s:.80} in its column {self._image}"
            raise SourceError(f"{path} has {in_line(found)}, which should hold the bytes of images")
        self._bytes = column
        self.names = self._names(features.get(self._label, {}))

    def labels(self) -> NDArray[np.int64]:
        """The label of each row; -1 where there is none."""
        from pyarrow import compute, types

        found = [np.empty(0, np.int64)]
        with self._readable():
            for batch in self._file.iter_batches(LABELS, columns=[self._label], use_threads=False):
                column = batch.column(0)
                if not types.is_integer(column.type):
                    raise SourceError(
                        f"{self.path} holds {column.type!s:.80} in its column {in_line(self._label)}, and labels are "
                        f"numbers: make them such, as class_encode_column of the library datasets does"
                    )
                found.append(compute.fill_null(column.cast("int64"), -1).to_numpy(zero_copy_only=False))
            labels = np.concatenate(found)
            if len(labels) != sum(self.groups):
                raise ValueError(f"it has {len(labels)} labels for {sum(self.groups)} rows")
        return labels

    def images(self, group: int) -> Iterator[Any]:
        """The bytes of the image in each row of a row group, as an Arrow scalar, or None: one at a time, since a
        dictionary may hold one large image for all rows. Raises SourceError, also if the row group claims what is
        impossible."""
        with self._readable():
            meta = self._file.metadata
            chunks = [meta.row_group(group).column(k) for k in range(meta.num_columns)]
            chunk = next(chunk for chunk in chunks if chunk.path_in_schema == self._bytes)
            plain, packed = chunk.total_uncompressed_size, chunk.total_compressed_size
            if plain > max(limits().bytes, RATIO * packed):
                raise ValueError(f"its row group {group} claims {plain} bytes of images in {packed}")
            batches = self._file.iter_batches(1, row_groups=[group], columns=[self._bytes], use_threads=False)
        while True:
            with self._readable():
                batch = next(batches, None)
            if batch is None:
                return
            for cell in batch.column(0):
                yield _inside(cell)

    def _chosen(self, what: str, wanted: str, likely: list[str], known: list[str]) -> str:
        """The column of images, or labels. Raises SourceError if that is unclear."""
        if (name := wanted or what) in known:
            return name
        if not wanted and len(likely) == 1:
            return likely[0]
        told = ", ".join(map(in_line, likely if len(likely) > 1 else known))
        raise SourceError(
            f"{self.path} has no column {name}, but {told}: name one by a class of your own with {what} = '...', "
            f"derived from pipelines.published.parquet.Parquet (docs/data.md)"
        )

    def _names(self, feature: dict[str, Any]) -> list[str] | None:
        names = feature.get("names")
        if names is None:
            return None
        if not (isinstance(names, list) and len(names) <= CLASSES and all(isinstance(name, str) for name in names)):
            raise SourceError(
                f"{self.path} names its classes by {names!r:.80}, which is not a list of names: fetch it anew"
            )
        return names

    @contextmanager
    def _readable(self) -> Iterator[None]:
        """Errors of pyarrow as one sentence."""
        try:
            yield
        except SourceError:
            raise
        except Exception as error:
            raise SourceError(f"{self.path} cannot be read as parquet ({first_line(error)}): fetch it anew") from error


def _bytes_of(name: str, kind: Any) -> str:
    """Path of the column with the bytes of images; empty if a column of this type has none."""
    from pyarrow import types

    if types.is_struct(kind):
        inside = [field for field in kind if field.name == "bytes"]
        return f"{name}.bytes" if inside and _bytes_of("", inside[0].type) is not None else ""
    plain = kind.value_type if types.is_dictionary(kind) else kind
    return name if types.is_binary(plain) or types.is_large_binary(plain) else ""


def _inside(cell: Any) -> Any:
    """The scalar of bytes in that of a row; None if there is none."""
    from pyarrow import DictionaryScalar, StructScalar

    while cell is not None and cell.is_valid:
        if isinstance(cell, StructScalar):
            cell = cell["bytes"]
        elif isinstance(cell, DictionaryScalar):
            cell = cell.value
        else:
            return cell
    return None


def _features(metadata: dict[bytes, bytes]) -> dict[str, dict[str, Any]]:
    """The columns as `datasets` describes them: {"info": {"features": {name: {"_type": ..., "names": ...}}}}."""
    found: Any = json.loads(metadata.get(b"huggingface", b"{}"))
    for key in ("info", "features"):
        found = found.get(key, {}) if isinstance(found, dict) else {}
    return {name: kind for name, kind in found.items() if isinstance(kind, dict)} if isinstance(found, dict) else {}
