"""The first file of a job, in the copy of its code: `python <top>/code/slurm/entry.py FOLDER`, as `python -m
submitit.core._submit FOLDER`, but with the copy before the current directory on the path of imports."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def main() -> int:
    """Runs this rank's job. Returns 2, after one sentence, if its code would not be that of the copy."""
    folder = Path(__file__).resolve().parent  # which Python has put on the path
    copy = str(folder.parent)
    here = [] if getattr(sys.flags, "safe_path", False) else [os.getcwd()]  # where modules that are not copied lie
    sys.path[:] = [copy, *here, *(path for path in sys.path if os.path.realpath(path) != str(folder))]
    # For processes that this one starts.
    os.environ["PYTHONPATH"] = os.pathsep.join([copy, *filter(None, [os.environ.get("PYTHONPATH")])])
    # The copy stays as it was submitted, of which the receipt holds a hash.
    os.environ["PYTHONDONTWRITEBYTECODE"], sys.dont_write_bytecode = "1", True
    from pipelines.cli import refuse
    from slurm import job  # the rest is looked at there, where status.json can say it

    if not Path(job.__file__).resolve().is_relative_to(copy):
        where = f"slurm is imported from {job.__file__} and not from the copy in {copy}"
        return refuse(f"{where}: see what puts it there, or submit with --live-code")
    from submitit.core.submission import submitit_main

    submitit_main()
    return 0


if __name__ == "__main__":
    sys.exit(main())
