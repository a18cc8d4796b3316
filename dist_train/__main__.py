"""`torchrun --nproc_per_node=N -m dist_train [--config FILE] [--key value ...]`, `python -m dist_train`, `dist-train`.

`python -m dist_train VERB ...` runs another command instead of training; see `analysis.verbs`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

from dist_train import cli
from dist_train.analysis.verbs import SHARED, VERBS
from dist_train.ranks import beside, kin, launcher
from pipelines.cli import as_module, refuse, run_verb
from pipelines.speech import begin


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code; see `dist_train.outcomes`."""
    begin()
    beside.settle()
    kin.bind()
    words = list(sys.argv[1:] if argv is None else argv)
    if before := launcher.end_before():
        return launcher.end(refuse(before.sentence, before.code, speaks=launcher.rank() == 0), before.sentence)
    if words and not words[0].startswith("-"):
        speaks = launcher.rank() == 0 or words[0] not in SHARED
        told = launcher.end if speaks else launcher.end_behind
        return launcher.exit_code(run_verb("python -m dist_train", VERBS, words, speaks=speaks, told=told))
    return cli.train(words)


def console() -> NoReturn:
    """The console script."""
    as_module()
    launcher.leave_with(main)


if __name__ == "__main__":
    launcher.leave_with(main)
