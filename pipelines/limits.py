"""How large an image may be. A stranger's file of few bytes can claim pixels that fill a memory: what is larger is left
out, and the reason names the option that allows it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple


class Limits(NamedTuple):
    """What an image may have at most: pixels, each of which takes about 8 bytes of memory while it is packed; and bytes
    of its file."""

    pixels: int = 200_000_000
    bytes: int = 500_000_000

    def check_pixels(self, pixels: int) -> None:
        """Raises ValueError if an image has more."""
        self._check(pixels, self.pixels, "pixels")

    def check_bytes(self, size: int) -> None:
        """Raises ValueError if the file of an image has more."""
        self._check(size, self.bytes, "bytes")

    def _check(self, found: int, allowed: int, what: str) -> None:
        if found > allowed:
            raise ValueError(
                f"has {found} {what}, and {allowed} are allowed: leave it out, or add --max-{what} {found}"
            )

    def as_options(self) -> dict[str, int]:
        """By the names of the options."""
        return {f"max_{name}": value for name, value in self._asdict().items()}


USUAL = Limits()
_limits: ContextVar[Limits] = ContextVar("limits", default=USUAL)


def limits() -> Limits:
    """The limits that apply here."""
    return _limits.get()


def apply(chosen: Limits) -> None:
    """Sets the limits of this process, or thread, for good."""
    _limits.set(chosen)


@contextmanager
def limited(chosen: Limits) -> Iterator[None]:
    """Sets the limits for what is done inside, by worker processes too (`parallel`)."""
    token = _limits.set(chosen)
    try:
        yield
    finally:
        _limits.reset(token)
