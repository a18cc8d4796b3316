"""Values of files, against their formats."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from pipelines.valid import Count, Finite, Invalid, made_of, parsed


@dataclass
class Inner:
    bytes: Count


@dataclass
class Thing:
    """A format."""

    samples: Count
    mean: list[Finite] = field(default_factory=list)
    inner: list[Inner] = field(default_factory=list)
    name: str = ""
    more: dict[str, Any] = field(default_factory=dict)


def test_what_is_right_is_read() -> None:
    text = b'{"samples": 3, "mean": [1, 2.5], "inner": [{"bytes": 4}], "of_a_later_version": 1, "more": {"x": [1]}}'
    assert parsed(Thing, text) == Thing(3, [1.0, 2.5], [Inner(4)], "", {"x": [1]})
    assert made_of(Thing, {"samples": 3}) == Thing(3)
    with pytest.raises(Invalid, match=r"it holds more than numbers and text \(Object of type set is not"):
        made_of(Thing, {"samples": {3}})


WRONG = {
    b"{}": "samples is missing",
    b"[]": "it should be an object",
    b'{"samples": -1}': "samples should be greater than or equal to 0, and is -1",
    b'{"samples": true}': "samples should be a valid integer, and is True",
    b'{"samples": 1.0}': "samples should be a valid integer, and is 1.0",
    b'{"samples": 281474976710656}': "samples should be less than 281474976710656, and is 281474976710656",
    b'{"samples": 1, "mean": [NaN]}': "mean.0 should be a finite number, and is nan",
    b'{"samples": 1, "mean": [1e999]}': "mean.0 should be a finite number, and is inf",
    b'{"samples": 1, "inner": [{"bytes": 1}, {}]}': "inner.1.bytes is missing",
    b'{"samples": 1, "name": [1]}': "name should be a valid string",
    b'{"samples": 1': "it is no JSON: EOF while parsing an object",
    b'{"samples": 1, "name": "\xff"}': "it is no JSON: invalid unicode code point",
    b"[" * 100_000: "it is no JSON: recursion limit exceeded",
    b'{"samples": ' + b"9" * 5000 + b"}": "it is no JSON: number out of range",
    b'{"samples": "' + b"9" * 5000 + b'"}': "samples should be a valid integer, and is '" + 39 * "9",
}


@pytest.mark.parametrize("text", WRONG, ids=range(len(WRONG)))
def test_what_is_wrong_is_named(text: bytes) -> None:
    with pytest.raises(Invalid) as caught:
        parsed(Thing, text)
    assert str(caught.value).partition(" at line")[0] == WRONG[text]
