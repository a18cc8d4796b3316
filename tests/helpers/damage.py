"""Random damage, as strategies of hypothesis: to trees of values, and to bytes. A damage is a short list of
changes, which can be printed; `at` says where each is, as a number that is taken modulo the number of places."""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from hypothesis import strategies as st

DEEP = "<deep>"  # stands in a text of JSON for lists in lists in lists
DEPTH = 100_000
PLACES = st.integers(0, 1 << 20)
NUMBERS: tuple[Any, ...] = (0, 1, -1, 2, 1 << 16, (1 << 31) - 1, 1 << 31, 1 << 48, (1 << 63) - 1, 1 << 63, 1 << 64)
NUMBERS += (-(1 << 63), 10**30, 0.5, -0.0, 1e308, 5e-324, math.nan, math.inf, -math.inf)
TEXTS = ("", "x", "0", "-1", "nan", "\0", "a\nb", "\x1b[2J", "..", ".", "../x", "/etc/passwd", "\udcff", "\u202e", DEEP)
TEXTS += ("x" * 100_000, "manifest.json", "step-00000002", "__class__")
PLAIN = (None, True, False, [], {}, [[]], [0, 1], [1.5] * 3, {"a": 1}, [0] * 100_000)
COMMON = dict | list | str | int | float | None
VALUES = st.sampled_from([*NUMBERS, *TEXTS, *PLAIN])


class Change(NamedTuple):
    """One change of a value within others."""

    what: str
    at: int
    value: Any

    def __repr__(self) -> str:
        return f"{self.what} {self.at} {self.value!r:.60}"


def of_values() -> st.SearchStrategy[list[Change]]:
    """One to four changes of a tree of dicts and lists."""
    what = st.sampled_from(("put", "put", "put", "delete", "double", "swap", "wrap"))
    return st.lists(st.builds(Change, what, PLACES, VALUES), min_size=1, max_size=4)


def of_bytes() -> st.SearchStrategy[list[Change]]:
    """One to four changes of bytes. `at`: where, `value`: how many or which, each modulo what there is."""
    what = st.sampled_from(("flip", "flip", "set", "cut", "remove", "double", "zero"))
    return st.lists(st.builds(Change, what, PLACES, st.integers(0, 1 << 16)), min_size=1, max_size=4)


def nodes(tree: Any, path: str = "") -> Iterator[tuple[Any, Any, str]]:
    """Each value below the root: what holds it, under which key, and its name."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield tree, key, f"{path}.{key}"
        yield from nodes(value, f"{path}.{key}")


def changed(
    tree: Any, changes: list[Change], others: Mapping[str, Callable[[Any], Any]] = MappingProxyType({})
) -> tuple[Any, list[str]]:
    """A copy with these changes, and what they were, by the names of values.

    Args:
        others: what a change "other" can make of a value, by name; of values only that are no dict, list or scalar.
    """
    tree, told = copy.deepcopy(tree), []
    for what, at, value in changes:
        found = list(nodes(tree))
        if what == "other":
            found = [node for node in found if not isinstance(node[0][node[1]], COMMON)]
        if not found:
            break
        holder, key, name = found[at % len(found)]
        other, key2, name2 = found[at * 7919 % len(found)]
        if what == "put":
            holder[key] = copy.deepcopy(value)  # else a list might get into itself
        elif what == "other":
            holder[key] = others[value](holder[key])
        elif what == "delete":
            del holder[key]
        elif what == "double" and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        elif what == "swap":
            holder[key], other[key2] = copy.deepcopy(other[key2]), copy.deepcopy(holder[key])
        elif what == "wrap":
            holder[key] = [holder[key]]
        told.append(f"{what} {name} {name2 if what == 'swap' else '' if what == 'delete' else repr(value)[:60]}")
    return tree, told


def linked(base: Path, folder: Path, *but: str) -> None:
    """Makes hard links to the files of a folder, except those of these names, in another."""
    for path in base.iterdir():
        if path.is_file() and path.name not in but:
            os.link(path, folder / path.name)


def as_json(tree: Any) -> bytes:
    """As JSON text, in which DEEP stands for what Python itself cannot write."""
    deep = "[" * DEPTH + "]" * DEPTH
    return json.dumps(tree).replace(json.dumps(DEEP), deep).encode()


def spoiled(data: bytes, changes: list[Change], *, head: int = 0) -> bytes:
    """A copy with these changes of bytes.

    Args:
        head: half of the changes are in so many bytes at the beginning, if not 0.
    """
    found = bytearray(data)
    for what, at, value in changes:
        if not found:
            break
        at = at // 2 % min(head, len(found)) if head and at % 2 else at * 7919 % len(found)
        some = 1 + value % 64
        if what == "flip":
            found[at] ^= 1 << value % 8
        elif what == "set":
            found[at] = value % 256
        elif what == "cut":
            del found[at:]
        elif what == "remove":
            del found[at : at + some]
        elif what == "double":
            found[at:at] = found[at : at + some]
        else:
            found[at : at + some] = bytes(min(some, len(found) - at))
    return bytes(found)
