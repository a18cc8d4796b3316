"""Whether the values of a file are those of its format: checked in one place for all formats, by pydantic.

A format is a dataclass, or any other type, whose fields say what they hold: `samples: Count`. Values must be of the
very type (`"1"` is no number). Keys that a dataclass lacks are a later version's, and left out.
"""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Annotated, Any, TypeVar, cast

from pydantic import Field, TypeAdapter, ValidationError

from pipelines.errors import first_line

T = TypeVar("T")

MOST = 1 << 48  # samples or bytes of one file: their sums stay within 64 bits
NO_JSON = "it is no JSON: "
SHOWN = 40  # characters of a wrong value in a message

Count = Annotated[int, Field(ge=0, lt=MOST)]
Finite = Annotated[float, Field(allow_inf_nan=False)]  # an integer is one, too


class Invalid(ValueError):
    """Values that are none of their format; the message names the field and what is wrong with it. Whoever knows the
    file puts its name before, and the remedy behind."""


class Torn(Invalid):
    """A text that ends before its value does, as a kill or a full disk leaves the last line of a file."""


def parsed(kind: type[T], text: bytes) -> T:
    """The value of this type that a JSON text holds. Raises Invalid."""
    try:
        made: T = _adapter(cast(Any, kind)).validate_json(text, strict=True)
    except ValidationError as error:
        sentence = _sentence(error)
        wrong = Torn if sentence.startswith(f"{NO_JSON}EOF") else Invalid
        raise wrong(sentence) from None  # its own message repeats the values, whatever their size
    return made


def object_of(kind: type[Any], text: bytes) -> dict[str, Any]:
    """The object that a JSON text holds, if the keys that this dataclass has are as it says; all others stay. Raises
    Invalid."""
    parsed(kind, text)
    found: dict[str, Any] = json.loads(text)
    return found


def objects_of(kind: type[Any], text: bytes) -> tuple[list[dict[str, Any]], dict[int, Invalid]]:
    """The objects of a text with one on each line, as `object_of` finds them; and what is wrong with each other line,
    by its number, from 1."""
    found, wrong = list[dict[str, Any]](), dict[int, Invalid]()
    for number, line in enumerate(text.split(b"\n"), 1):
        try:
            found += [object_of(kind, line)] if line else []
        except Invalid as error:
            wrong[number] = error
    return found, wrong


def made_of(kind: type[T], value: Any) -> T:
    """The value of this type that is made of Python's dicts, lists, strings and numbers. Raises Invalid."""
    try:
        text = json.dumps(value)  # pydantic is strict with the text of an object, but not with a dict
    except (TypeError, ValueError, RecursionError) as error:
        raise Invalid(f"it holds more than numbers and text ({first_line(error)})") from None
    return parsed(kind, text.encode())


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _sentence(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    field = ".".join(map(str, first["loc"])) or "it"
    if first["type"] == "json_invalid":
        return f"{NO_JSON}{first['ctx']['error']}"
    if first["type"] == "missing":
        return f"{field} is missing"
    what = re.sub("^(Input|List|String|Value error,) | after validation", "", first["msg"])
    value = first["input"]
    shown = f", and is {value!r:.{SHOWN}}" if isinstance(value, bool | int | float | str | None) else ""
    return f"{field} {what}{shown}"
