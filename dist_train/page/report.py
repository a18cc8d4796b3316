"""`python -m dist_train report RUN [RUN ...]`: the page of a run, or of several, as one HTML file that loads nothing.

The file holds uPlot (vendor/), page.js and page.css, which a Content-Security-Policy names by their hashes: it runs
nothing else and requests nothing. All text of a run is escaped, in HTML by jinja2 and in the JSON of the data by
`script_json`.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from argparse import Namespace
from base64 import b64encode
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from dist_train.page.run_data import RunPage, run_page
from dist_train.page.told import differing, reached
from dist_train.page.wording import moment, plainly, spoken
from dist_train.rundir.named import MARKS, no_run, shown_name
from dist_train.rundir.status import SILENT
from pipelines.errors import UserError
from pipelines.files import write_atomically
from pipelines.speech import show

HERE = Path(__file__).parent
FILE = "report.html"  # in a run
MANY = "report-of-{}-runs.html"  # in the folder that all of several runs lie in
MOST = 50  # runs of a page
SCRIPTS, STYLES = ("vendor/uPlot.iife.min.js", "page.js"), ("vendor/uPlot.min.css", "page.css")


def start(args: Namespace) -> int:
    """Write the page. Returns 0. Raises UserError for what is no run, or a place that cannot be written."""
    runs = chosen(args.runs)
    path = args.out or default_place(runs)
    try:
        write(runs, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): name another place by --out") from error
    show(f"{path}: {path.stat().st_size / 1e6:.1f} MB, to be opened in a browser")
    return 0


def chosen(named: Sequence[Path]) -> list[Path]:
    """The runs of a page, each once. Raises UserError for what is no run."""
    runs = list(dict.fromkeys(named))
    for run in runs:
        if not any(os.path.exists(run / name) for name in MARKS):
            raise UserError(no_run(run))
    if len(runs) > MOST:
        raise UserError(f"{len(runs)} runs are more than one page shows: name {MOST} at most")
    return runs


def default_place(runs: Sequence[Path]) -> Path:
    """RUN/report.html; of several runs a file in the folder in which they all lie."""
    if len(runs) == 1:
        return runs[0] / FILE
    return Path(os.path.commonpath([os.path.abspath(run.parent) for run in runs])) / MANY.format(len(runs))


def write(runs: Sequence[Path], path: Path) -> None:
    """Write the page of these runs atomically. Raises OSError if the place cannot be written."""
    write_atomically(path, rendered(runs, time.time()), durable=False)


def rendered(runs: Sequence[Path], now: float, *, live: int = 0) -> bytes:
    """The page of these runs, whatever state they are in.

    Args:
        now: Unix time in seconds.
        live: seconds after which the page loads itself anew, if it is served; 0: it is a file.
    """
    names = page_names(runs)
    pages = [run_page(run, now, names[i], i, len(runs)) for i, run in enumerate(runs)]
    scripts, styles = _own(SCRIPTS), _own(STYLES)
    policy = (
        f"default-src 'none'; script-src {_hashes(scripts)}; style-src {_hashes(styles)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    text = _template().render(
        title=" · ".join(
            [f"{pages[0].shown}, {pages[0].overview.state}"] if len(pages) == 1 else [f"{len(pages)} runs"]
        ),
        pages=pages,
        policy=policy,
        scripts=scripts,
        styles=styles,
        differing=differing([page.overview for page in pages]) if len(pages) > 1 else [],
        reached=[reached(page.overview) for page in pages],
        data=script_json(_data(pages, now, live)),
        written=moment(now),
    )
    return str(text).encode("utf-8", "backslashreplace")


def page_names(runs: Sequence[Path]) -> list[str]:
    """Names of runs on one page: relative to runs/ if they lie there, else the last parts of their paths, as many as
    tell them apart."""
    names = [Path(shown_name(run)) for run in runs]
    names = [Path(shown_name(path.resolve())) if path.name in ("", "..") else path for path in names]
    most = max(len(path.parts) for path in names)
    for parts in range(1, most + 1):
        found = [str(Path(*path.parts[-parts:])) if path.is_absolute() else str(path) for path in names]
        if len(set(found)) == len(found):
            return found
    return [str(path) for path in names]


def script_json(value: Any) -> str:
    """JSON that no character ends a script with, and that is JavaScript too: what HTML knows is escaped."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))  # ASCII: U+2028 and U+2029 are escaped
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _data(pages: Sequence[RunPage], now: float, live: int) -> dict[str, Any]:
    return {
        "written": round(now),
        "live": live,
        "silent": SILENT,
        "runs": [page.data for page in pages],
    }


@cache
def _own(names: tuple[str, ...]) -> list[str]:
    return [(HERE / name).read_text(encoding="utf-8") for name in names]


def _hashes(texts: Sequence[str]) -> str:
    """Sources of a Content-Security-Policy (CSP Level 3, 2.3.1): `'sha256-...'` of each."""
    return " ".join(f"'sha256-{b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in texts)


@cache
def _template() -> Any:
    made = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made.filters |= {"plainly": plainly, "spoken": spoken, "moment": moment}
    return made.from_string((HERE / "page.html").read_text(encoding="utf-8"))
