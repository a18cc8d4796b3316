"""`python -m dist_train.ranks.torchrun ...`: torchrun for interactive use, with the same arguments.

It hides torchrun's log (which begins with a banner on OMP_NUM_THREADS), and prints no traceback after a stop or after a
failure that a rank has explained: the last lines are those of the run.
"""

from __future__ import annotations

import logging
import sys

from pipelines.cli import INTERRUPTED
from pipelines.speech import begin


def main() -> int:
    """Returns the exit code: 0, that of the first rank that failed, or 128 plus the number of the stop signal. Raises
    ChildFailedError, torchrun's report, if a rank was killed."""
    begin()
    logging.disable(logging.ERROR)
    try:
        from torch.distributed import run
        from torch.distributed.elastic.multiprocessing import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

        try:
            run.main()
        except SignalException as stop:
            return 128 + int(stop.sigval)
        except ChildFailedError as failed:
            _, first = failed.get_first_failure()
            if first.exitcode < 0:
                raise
            return int(first.exitcode)
    except KeyboardInterrupt:  # before torchrun handles signals itself
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
