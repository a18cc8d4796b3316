"""The process that keeps RUN/report.html fresh, started by `monitor.page` with RUN, the start's token and the seconds
between two rewrites. Imports no torch."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

from dist_train.outcomes import DONE
from dist_train.ranks import beside, launcher
from dist_train.rundir.lease import Lease
from pipelines.cli import refuse
from pipelines.errors import UserError
from pipelines.speech import begin

PERIOD = 60.0  # seconds between two rewrites


def rewrite(lease: Lease) -> bool:
    """Rewrites the page of a run. Returns False, without doing so, if the run belongs to another start by now. Raises
    OSError, and UserError for a run that is damaged."""
    from dist_train.page import report  # here, since a rank needs it only at its end

    if not lease.holds():
        return False
    report.write([lease.run], report.default_place([lease.run]))
    return True


def main() -> int:
    """Rewrites the page until the run is over, or another start's. Returns the exit code."""
    begin()
    beside.settle()
    # By an exception, so that `files.replacing` removes what is half written.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    run, token, seconds = sys.argv[1:]
    lease = Lease(Path(run))
    lease.token = token
    try:
        while rewrite(lease):
            time.sleep(float(seconds))
    except (UserError, OSError) as error:
        return refuse(error)
    return DONE


if __name__ == "__main__":
    launcher.leave_with(main)
