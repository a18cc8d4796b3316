"""YAML of strangers, and of people who mistype: bounded before anything is made of it, and no key stands twice."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from pipelines.errors import UserError
from pipelines.files import regular

LARGEST = 1 << 20  # bytes of a file
DEEPEST = 50  # levels
MOST = 100_000  # values, each as often as aliases repeat it
_C: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where PyYAML was built with it
_Words: Any = getattr(yaml, "CBaseLoader", yaml.BaseLoader)


class _Loader(_C):  # type: ignore[misc]
    """Numbers, words, lists and mappings: a date is a word."""

    yaml_constructors = {  # noqa: RUF012
        tag: make
        for tag, make in _C.yaml_constructors.items()
        if not str(tag).endswith((":binary", ":timestamp", ":set", ":omap", ":pairs"))
    }
    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in found if tag != "tag:yaml.org,2002:timestamp"]
        for first, found in _C.yaml_implicit_resolvers.items()
    }


class NoYaml(UserError):
    """A text that is no YAML, or more of it than a person writes. The message begins with a verb: the
    file stands before it."""


def read(path: Path) -> str:
    """The text of a YAML file. Raises OSError, and NoYaml for one that is too large, or not UTF-8."""
    with open(os.path.expanduser(path), "rb", opener=regular) as file:
        text = file.read(LARGEST + 1)
    if len(text) > LARGEST:
        raise NoYaml(f"has more than {LARGEST} bytes: no settings take as many")
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise NoYaml(f"is not a text file in UTF-8 ({error.reason}): write it anew") from error


def load(text: str, *, words: bool = False) -> Any:
    """What a YAML text says. Raises NoYaml.

    Args:
        words: leave all scalars as they are written.
    """
    try:
        check(text)
        return yaml.load(text, Loader=_Words if words else _Loader)
    except NoYaml:
        raise
    except (yaml.YAMLError, ValueError, TypeError) as error:  # such as a number of 5000 digits, or a list as a key
        raise NoYaml(_sentence(error)) from error


def groups(value: Any) -> dict[str, dict[str, Any]]:
    """The same, if it is a mapping of mappings, as settings are. Raises NoYaml."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise NoYaml("holds no groups of settings: write optim: {lr: 0.01}")
    for name, group in value.items():
        if not isinstance(group, dict):
            raise NoYaml(f"has no group of settings at {str(name)[:50]}: write optim: {{lr: 0.01}}")
    return value


def check(text: str) -> None:
    """Raises NoYaml for a text that would take much memory, or says something twice; YAMLError for what is no YAML."""
    frames, sizes = [_Frame()], dict[str, int]()
    for event in _events(text):
        top = frames[-1]
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise NoYaml(f"repeats *{event.anchor} where it is not known yet, in line {_line(event)}: mend it")
            top.take(None, sizes[event.anchor])
        elif isinstance(event, yaml.ScalarEvent):
            if not top.take(event.value, 1):
                raise NoYaml(f"has the key {event.value[:50]} twice, in line {_line(event)}, too: leave one")
            sizes |= {event.anchor: 1} if event.anchor else {}
        elif isinstance(event, yaml.CollectionStartEvent):
            frames.append(_Frame(isinstance(event, yaml.MappingStartEvent), event.anchor or ""))
        elif isinstance(event, yaml.CollectionEndEvent):
            frames.pop()
            frames[-1].take(None, top.size)
            sizes |= {top.anchor: top.size} if top.anchor else {}
        if len(frames) > DEEPEST:
            raise NoYaml(f"is more than {DEEPEST} levels deep in line {_line(event)}: no settings are")
        if frames[-1].size > MOST:
            raise NoYaml(f"stands for more than {MOST} values, up to line {_line(event)}: no settings do")


class _Frame:
    """A list or mapping while it is read: `size` values so far, and of a mapping its keys."""

    def __init__(self, mapping: bool = False, anchor: str = "") -> None:
        self.anchor, self.size, self._keys = anchor, 1, set[str]()
        self._mapping, self._at_key = mapping, True

    def take(self, word: str | None, size: int) -> bool:
        """Takes the next value of so many. Returns whether it is no key that was there before."""
        self.size += size
        if not self._mapping:
            return True
        is_key, self._at_key = self._at_key, not self._at_key
        if not is_key or word is None:
            return True
        new = word not in self._keys
        self._keys.add(word)
        return new


def _events(text: str) -> Iterator[Any]:
    yield from yaml.parse(text, Loader=_C)


def _line(event: Any) -> int:
    return int(event.start_mark.line) + 1


def _sentence(error: Exception) -> str:
    said = " ".join(str(error).split()).replace('in "<unicode string>", ', "in ")
    return f"is no YAML ({said[:300]}): mend it"
