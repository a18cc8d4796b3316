"""The fenced blocks of a page in Markdown: their marks and rules, their commands run, their output compared.

A bash block is run as it stands, unless a comment directly above its fence says otherwise:

    <!-- stand-in: COMMANDS -->   are run in its place; may have several lines
    <!-- needs: GPU -->           (or ImageNet, cluster, network) nothing is run

A text block is compared with the output of the bash block before it, unless there is a heading between them.
"""

from __future__ import annotations

import ast
import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from tests.helpers.launch import finish, spawn

NEEDS = ("GPU", "ImageNet", "cluster", "network")
LANGUAGES = ("bash", "text", "python", "yaml", "mermaid", "diff")
FENCE = re.compile(r"( *)(`{3,}|~{3,})(.*)")
MARK = re.compile(r"<!--\s*([\w-]+):(.*?)-->", re.DOTALL)
ITEM = re.compile(r" *([-*+]|\d+[.)]) +")
HIDDEN = re.compile(r"\t|[> ]*>[> ]*[`~]{3}|\s*<(pre|code)\b")
PROMPT = re.compile(r"\$ \w")
PATIENCE = 10.0  # seconds for what a page has started to end after it
MARKER = "\x1e"  # in the output of a page: the line of a block follows, whose output begins

TIME = r"(?:ms|s|min|h|d|days?|hours?|minutes?|seconds?)"
NUMBER = r"[-+]?\d+(?:[.,:]\d+)*(?:e[-+]?\d+)?"
QUANTITY = rf"{NUMBER}(?: ?(?:{TIME}|[kMGT]?i?B)\b(?: {NUMBER} ?{TIME}\b)*)?"
WILD = re.compile(
    rf"(?P<any>\.\.\.|…)|(?P<hash>\b(?=[a-f]*\d)(?=\d*[a-f])[0-9a-f]{{7,64}}\b)|(?P<number>{QUANTITY})|\s+"
)


@dataclass
class Block:
    """A fenced block.

    Attributes:
        line: that of its fence, from 1.
        stand_in: commands that are run in its place.
        needs: what a machine needs for it, one of NEEDS.
        output: what its page shows of its output; "" if nothing is shown.
    """

    line: int
    language: str
    text: str
    stand_in: str = ""
    needs: str = ""
    output: str = ""

    @property
    def commands(self) -> str:
        """The commands to run; "" if none are."""
        return "" if self.needs else self.stand_in or self.text


@dataclass
class Page:
    """The blocks of a page in their order, and what is against the rules, each with its line."""

    blocks: list[Block] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def bash(self) -> list[Block]:
        return [block for block in self.blocks if block.language == "bash"]

    def wrong(self, line: int, reason: str) -> None:
        self.problems.append(f"line {line}: {reason}")


def read(text: str) -> Page:
    """The page of this text."""
    page, lines = Page(), text.split("\n")
    at = indent = 0  # `indent`: of the text of a list item
    before: Block | None = None  # the block since the last heading
    mark, blank = "", True
    while at < len(lines):
        line, number = lines[at], at + 1
        if fence := FENCE.fullmatch(line):
            end = next((i for i in range(number, len(lines)) if lines[i].strip() == fence[2]), len(lines))
            if end == len(lines):
                page.wrong(number, "a fence that is not closed")
            code = "\n".join(row.removeprefix(fence[1]) for row in lines[number:end])
            block = _block(page, number, fence[3].strip(), code, mark)
            if block.language == "text" and before and before.language == "bash":
                before.output += f"{code}\n"
            at, before, mark = end, block, ""
        elif line.lstrip().startswith("<!--"):
            end = next((i for i in range(at, len(lines)) if "-->" in lines[i]), at)
            mark += "\n".join(lines[at : end + 1]) + "\n"
            at = end
        else:
            if re.search(r"<!--\s*(stand-in|needs):", mark):
                page.wrong(number, "the mark above is not directly above a bash block")
            mark = ""
            if item := ITEM.match(line):
                indent = len(item[0])
            elif line.strip() and not line.startswith(" "):
                indent = 0
                before = None if line.startswith("#") else before
            if HIDDEN.match(line):
                page.wrong(number, "code that is not found here: begin its fence at the beginning of the line")
            if blank and line.strip() and len(line) - len(line.lstrip()) >= indent + 4 and not item:
                page.wrong(number, "an indented code block: fence it")
        blank = not lines[min(at, len(lines) - 1)].strip()
        at += 1
    return page


def _block(page: Page, line: int, language: str, text: str, mark: str) -> Block:
    """The block whose fence stands in this line, below the comments `mark`; appends it to the page."""
    block = Block(line, language, text)
    page.blocks.append(block)
    if language not in LANGUAGES:
        page.wrong(line, f"a block of {language or 'no language'}: label it {', '.join(LANGUAGES)}")
    marks = [(key, value.strip()) for key, value in MARK.findall(mark)]
    if language == "bash":
        if len({key for key, _ in marks}) > 1 or MARK.sub("", mark).strip():
            page.wrong(line, "more than one mark, or a comment that is none")
        for key, value in marks:
            if key == "stand-in" and value and not re.fullmatch(r"true|:|#.*", value):
                block.stand_in += f"{value}\n"
            elif key == "needs" and value in NEEDS and not block.needs:
                block.needs = value
            else:
                page.wrong(line, f"an unknown mark, {key}: {value}")
    elif marks:
        page.wrong(line, f"a mark above a block of {language}")
    if language in ("bash", "text") and any(PROMPT.match(row) for row in text.split("\n") if row[:1] != "#"):
        page.wrong(line, "a prompt: commands stand in a bash block, output in a text block after it")
    try:
        if language == "bash":
            for commands in (text, block.stand_in):
                subprocess.run(["bash", "-n"], input=commands, capture_output=True, text=True, check=True)
        elif language == "python":
            ast.parse(text)
        elif language == "yaml":
            yaml.safe_load(text)
    except subprocess.CalledProcessError as error:
        page.wrong(line, f"no bash: {error.stderr}")
    except (SyntaxError, yaml.YAMLError) as error:
        page.wrong(line, f"no {language}: {error}")
    return block


def check(page: Page, folder: Path, env: Mapping[str, str], seconds: float) -> None:
    """Run the blocks of a page, one after another, in one shell in the current directory.

    Args:
        folder: empty, for the shell's script.
        env: on top of the environment of this process.

    Raises:
        AssertionError: with the line of a block that fails, whose output differs, or after which processes are left.
        TimeoutExpired: after so many seconds; what ran is killed.
    """
    rows = ["exec 2>&1 </dev/null", """trap 'echo "exit code $?: $BASH_COMMAND"' ERR"""]
    blocks = [block for block in page.bash if block.commands]
    for block in blocks:
        rows += [f"echo '{MARKER}{block.line}'", block.commands.rstrip("\n")]
    (folder / "page.sh").write_text("\n".join([*rows, ""]), encoding="utf-8")
    run = spawn(["bash", "-euo", "pipefail", str(folder / "page.sh")], env=dict(env), how="exec")
    try:
        result = finish(run, seconds)
        printed = {}
        for part in result.stdout.split(MARKER)[1:]:
            line, _, output = part.partition("\n")
            printed[int(line)] = output
        assert result.returncode == 0, f"line {result.stdout.rpartition(MARKER)[2]}"
        wrong = {block.line: difference(block.output, printed[block.line]) for block in blocks}
        assert not any(wrong.values()), "\n".join(f"line {line}: {said}" for line, said in wrong.items() if said)
        deadline = time.monotonic() + PATIENCE
        while left := run.processes():
            assert time.monotonic() < deadline, f"processes are left: {left}"
            time.sleep(0.1)
    finally:
        for pid in run.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def difference(shown: str, printed: str) -> str:
    """Where the output differs from what is shown of it, in words; "" if it does not.

    Shown lines follow each other in the output, which may have more before and after them; a line of dots stands for
    any others. Numbers, times, hashes and widths of columns may differ; dots stand for anything.
    """
    lines = [row.rpartition("\r")[2].strip() for row in printed.split("\n")]
    lines = [row for row in lines if row]
    start = 0
    for group in re.split(r"(?m)^\s*(?:\.\.\.|…)\s*$", shown):
        patterns = [(row.strip(), _pattern(row.strip())) for row in group.split("\n") if row.strip()]
        best, end = 0, None
        for first in range(start, len(lines) + 1):
            pairs = zip(patterns, lines[first:], strict=False)
            fits = next((i for i, ((_, form), row) in enumerate(pairs) if not form.fullmatch(row)), None)
            fits = min(len(patterns), len(lines) - first) if fits is None else fits
            best = max(best, fits)
            if fits == len(patterns):
                end = first + fits
                break
        if end is None:
            return f"the output has no line like {patterns[best][0]!r} in its place; it is\n{printed}"
        start = end
    return ""


def _pattern(shown: str) -> re.Pattern[str]:
    """Of the lines that are like this one."""
    parts, at = [], 0
    for wild in WILD.finditer(shown):
        parts.append(re.escape(shown[at : wild.start()]))
        parts.append({"any": ".*", "hash": "[0-9a-f]+", "number": QUANTITY, None: r"\s+"}[wild.lastgroup])
        at = wild.end()
    return re.compile("".join([*parts, re.escape(shown[at:])]))
