"""The configurations that come with the package: folder `configs` of a clone or a copied tree, or `dist_train/configs`
as a wheel installs it. Their users name them `configs/NAME.yaml` in either case."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from pipelines.speech import say
from pipelines.words import nearest

FOLDER = "configs"
_INSTALLED = Path(__file__).resolve().parent / FOLDER
CONFIGS = _INSTALLED if _INSTALLED.is_dir() else _INSTALLED.parents[1] / FOLDER
DEFAULT = CONFIGS / "quickstart.yaml"


def with_packaged(argv: Sequence[str], *, speaks: bool) -> list[str]:
    """The same command line with the packaged file for `--config configs/NAME.yaml` where there is no such file here.

    Args:
        speaks: whether this process says so; under a launcher one rank does for all.
    """
    words = list(argv)
    for i, word in enumerate(words):
        if word.startswith("--config="):
            words[i] = f"--config={_found(word.partition('=')[2], speaks)}"
        elif i and words[i - 1] == "--config":
            words[i] = _found(word, speaks)
    return words


def _found(word: str, speaks: bool) -> str:
    path = Path(os.path.expanduser(word))
    packaged = CONFIGS.joinpath(*path.parts[1:])
    if path.exists() or path.parts[:1] != (FOLDER,) or not packaged.is_file():
        return word
    if speaks:
        _tell(word, packaged)
    return str(packaged)


@cache  # a sweep parses the same words again for each of its runs
def _tell(word: str, packaged: Path) -> None:
    say(f"--config {word} is not in {Path.cwd()}: {packaged} is taken")


def instead_of_config(word: str) -> str:
    """What to type in place of a file that does not exist."""
    meant = nearest(Path(word).stem, {file.stem for file in CONFIGS.glob("*.yaml")})
    return f"did you mean {FOLDER}/{meant}.yaml?" if meant else "name a YAML file"
