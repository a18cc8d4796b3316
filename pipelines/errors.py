"""Errors that are the user's to mend."""

from __future__ import annotations

import re


class UserError(ValueError):
    """Something a user can mend. The message is one sentence that names the thing and the remedy."""


class SourceError(UserError):
    """A source that cannot be packed; the message names it and the remedy."""


class UsageError(UserError):
    """A command line that cannot be understood."""


def first_line(error: BaseException) -> str:
    """The message of an error in one line: whatever a library wrote, its first line says most. Without the addresses of
    objects: the same error has the same message in every process."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return re.sub(r" ?<[^<>]* at 0x[0-9a-fA-F]+>", "", line)
