"""`make bench`, or `python -m tests.benchmarks [NAME ...]`: costs on this machine, as ratios within one run.

Never asserted. Data: `PHOTOS=DIR` names a folder with a sub-folder of photographs for each class; without it random
photographs are made.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from tests.benchmarks import data, indexing, loaders, monitoring, net, record, sets, settings, step, towers, waiting


def main(names: list[str]) -> int:
    """Print the tables of these names, or all."""
    with tempfile.TemporaryDirectory() as scratch:

        @cache
        def photographs() -> data.Photographs:
            return data.photographs(Path(scratch))

        tables: dict[str, Callable[[], None]] = {
            "step": lambda: step.table(photographs().stored, photographs().packed),
            "loaders": lambda: loaders.table(photographs().originals),
            "index": lambda: indexing.table(Path(scratch)),
            "sets": sets.table,
            "settings": settings.table,
            "net": net.table,
            "towers": towers.table,
            "record": record.table,
            "monitoring": lambda: monitoring.table(photographs().packed),
            "page": lambda: monitoring.page_table(photographs().packed),
            "waiting": lambda: waiting.table(photographs().packed),
        }
        if unknown := set(names) - set(tables):
            print(f"error: there is no table {', '.join(sorted(unknown))}: name some of {', '.join(tables)}")
            return 2
        for name in names or tables:
            tables[name]()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
