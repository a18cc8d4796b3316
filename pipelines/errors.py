"""Errors that the user can fix."""

from __future__ import annotations

import re


class UserError(ValueError):
    """An error that the user can fix. Its message is one sentence that names the cause and the remedy."""


class SourceError(UserError):
    """A source that cannot be packed; the message names it and the remedy."""


class UsageError(UserError):
    """An invalid command line."""


def of_the_system(error: Exception) -> bool:
    """True if the file system failed, which says nothing about the file's content. Pillow's errors have no errno."""
    return isinstance(error, OSError) and error.errno is not None


def first_line(error: BaseException) -> str:
    """First line of an error's message, the most telling one in any library. Addresses of objects are removed, so that
    the same error has the same message in every process."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return re.sub(r" ?<[^<>]* at 0x[0-9a-fA-F]+>", "", line)
