"""Errors that are the user's to mend."""

from __future__ import annotations

import re


class UserError(ValueError):
    """Something a user can mend. The message is one sentence that names the thing and the remedy."""


class SourceError(UserError):
    """A source that cannot be packed; the message names it and the remedy."""


class UsageError(UserError):
    """A command line that cannot be understood."""


def of_the_system(error: Exception) -> bool:
    """Whether an error is a file system's, and so says nothing of what was to be read. Pillow's have no number."""
    return isinstance(error, OSError) and error.errno is not None


def first_line(error: BaseException) -> str:
    """The message of an error in one line: whatever a library wrote, its first line says most. Without the addresses of
    objects: the same error has the same message in every process."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return re.sub(r" ?<[^<>]* at 0x[0-9a-fA-F]+>", "", line)
