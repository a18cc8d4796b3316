"""`torchrun --nproc_per_node=N -m dist_train [--config FILE] [--key value ...]`, or `python -m dist_train`.

`python -m dist_train VERB ...` runs another command instead of training; see `analysis.verbs`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dist_train import cli
from dist_train.analysis.verbs import SHARED, VERBS
from dist_train.ranks import launcher
from pipelines.cli import run_verb


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code; see `dist_train.outcomes`."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and not words[0].startswith("-"):
        shared = words[0] in SHARED
        code = run_verb("python -m dist_train", VERBS, words, speaks=launcher.rank() == 0 or not shared)
        return launcher.exit_code(code) if shared else code
    return cli.train(words)


if __name__ == "__main__":
    launcher.leave(main())
