"""docs/troubleshooting.md quotes what the programs print: each quoted message stands in the code, as it is quoted.

A block of quoted lines (`> ...`) holds messages, each in backticks; `...` stands for a part that varies. A line without
backticks is another program's message, behind the name of that program. What it means follows, then "**Do:**".
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path

import pytest

from dist_train.config import Config
from dist_train.flat import as_dict

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
PACKAGES = ("dist_train", "pipelines", "slurm")
OTHERS = ("torch:", "DALI:", "Linux:", "`wandb sync` ends with", "a picture shows")
HOLE = "\0"  # a part that varies
FEWEST = 2  # words that a quoted message has besides: fewer would be found anywhere


def templates(tree: ast.Module) -> Iterator[str]:
    """The strings of a module with holes in the place of what is filled in; docstrings are none."""
    passed = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            passed |= {id(part) for part in node.values}
            parts = (str(part.value) if isinstance(part, ast.Constant) else HOLE for part in node.values)
            yield re.sub(f"{HOLE}+", HOLE, "".join(parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in passed:
            yield node.value


def said(quoted: str, strings: list[str]) -> bool:
    """Whether one of the strings holds a quoted message, whose `...` are its holes."""
    return any(quoted.replace("...", HOLE) in string for string in strings)


STRINGS = [
    string
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
    for string in templates(ast.parse(path.read_text(encoding="utf-8")))
]
BLOCKS = re.findall(r"(?m)^(?:> .*\n)+", PAGE)
LINES = [line.removeprefix("> ").removesuffix("\\") for block in BLOCKS for line in block.splitlines()]
OURS = [quoted for line in LINES if not line.startswith(OTHERS) for quoted in re.findall("`([^`]+)`", line)]


def test_each_quoted_message_is_one_that_is_printed() -> None:
    assert len(OURS) > 40
    lost = [quoted for quoted in OURS if not said(quoted, STRINGS)]
    shown = [string.replace(HOLE, "...") for string in STRINGS] if lost else []
    assert not {quoted: get_close_matches(quoted, shown, n=1, cutoff=0.3) for quoted in lost}


def test_a_quoted_message_says_something() -> None:
    assert [quoted for quoted in OURS if len(re.findall(r"[A-Za-z]{2,}", quoted)) < FEWEST] == []


def test_each_line_is_ours_or_names_its_program() -> None:
    assert [line for line in LINES if not (line.startswith(OTHERS) or re.fullmatch("`[^`]+`", line))] == []


def test_what_it_means_and_what_to_do_follow() -> None:
    texts = re.split(r"(?m)^(?:> .*\n)+", PAGE)[1:]
    short = [text[:60] for text in texts if not re.match(r"\n(?!\*\*Do)[^#>\n].*\n(?:.+\n)*?\*\*Do:\*\* \S", text)]
    assert short == []


def test_each_key_that_it_names_exists() -> None:
    keys = as_dict(Config())
    groups = {key.partition(".")[0] for key in keys}
    named = [
        found for found in re.findall(r"`(?:--)?([a-z]+\.[a-z_]+)[^`]*`", PAGE) if found.partition(".")[0] in groups
    ]
    assert len(named) > 15
    assert [key for key in named if key not in keys] == []


@pytest.mark.parametrize(
    ("quoted", "found"),
    [
        ("... cannot be read (...): trying again", True),
        ("cannot be read (...)", True),
        ("... cannot be read: trying again", False),
        ("... could not be read (...): trying again", False),
        ("its docstring", False),
    ],
)
def test_a_message_that_was_reworded_is_found(quoted: str, found: bool) -> None:
    module = ast.parse('"""its docstring"""\nsay(f"{path}/{name} cannot be read ({why}): " "trying again", end="")')
    assert said(quoted, list(templates(module))) is found
