"""environment/: what the starts of a run ran with. Imports no torch.

<run>/environment/changes-<hash>.diff    the code's changes since its commit, if there are any
<run>/environment/packages-<hash>.txt    the installed distributions, name==version

One file for each state that differs; the event `start` names those of its start.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from pipelines.files import folder, write_atomically

FOLDER = "environment"


def keep(run: Path, texts: Mapping[str, str]) -> list[str]:
    """Writes the texts that the run has not yet, by kind (`packages.txt`), unless they are empty. Returns the names of
    their files; of one that cannot be written, none: nothing here is worth losing a start."""
    found = []
    for kind, text in texts.items():
        data = text.encode(errors="backslashreplace")
        stem, dot, suffix = kind.partition(".")
        name = f"{stem}-{hashlib.sha256(data).hexdigest()[:8]}{dot}{suffix}"
        with suppress(OSError):
            if data and not (path := run / FOLDER / name).exists():
                folder(path.parent)
                write_atomically(path, data, durable=False)
            found += [name] if data else []
    return found
