"""The measured numbers of README.md, docs and configs: each has a marker that names where it was recorded.

    python -m tests.helpers.numbers [FILE ...]    FILE:LINE: NUMBER: what is missing; without FILE, of all files

A measured number is a quantity (see `tests.helpers.quantities`) in a paragraph, heading, list, table, quotation,
caption, footnote, text of a link, or HTML; not in a fenced block, inline code, comment or target of a link, nor in a
table that is one of docs/experiments/*.md, which is redrawn and compared.

A block, that is the lines between blank lines, has its markers directly above, each in an HTML comment; the head of a
YAML file has them in its last lines, where what belongs to a marker is indented:

    measured: REF; REF                       each REF is what a number of the block says, in the order of the text
    not measured: 90 %, 300 steps: REASON    the numbers as in the text, and REASON, which may go on after a comma
    not measured: all: REASON                in a block without any of ours; settings are named one by one

REF is `ENTRY.VALUE` of docs/measurements.yaml, `NAME/ARM/FIELD` of docs/experiments/NAME.jsonl (see FIELDS), or `REF
/ REF`. A number agrees if it is the value rounded to its digits; after "about", "some", "around" or "roughly" zeros at
its end are rounding. A value may be a list, as of the row of a table: then the block says all of them in their order.
"""

from __future__ import annotations

import html
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import yaml

from dist_train.analysis.recorded import ArmRun, of_file
from dist_train.analysis.tables import LAST
from tests.helpers.quantities import QUANTITY, Quantity, Value, bare, on_one_line, quantities, value_of, with_units

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docs" / "measurements.yaml"
EXPERIMENTS = ROOT / "docs" / "experiments"
REASONS = re.compile(r"(the paper's|derived|a setting|an example)(, .+)?|published(, .+| [(].+[)])")


def _probe(run: ArmRun, step: str) -> Mapping[str, Any]:
    return run.probe(int(step)) or {}


def _last_loss(run: ArmRun, steps: int) -> float:
    """The mean of the recorded losses of the last steps."""
    return fmean(line.loss for line in run.steps if line.step > run.last_step - steps)


def _of_layer(run: ArmRun, key: str, layer: str, step: str) -> float | None:
    """Of a layer in two towers the root of the mean of the squares, as in the tables."""
    layers = _probe(run, step).get("layers", {})
    found = [of[key] ** 2 for name, of in layers.items() if name.rpartition(".")[2] == layer.replace(" ", "")]
    return fmean(found) ** 0.5 if found else None


def _at(run: ArmRun, lr: str) -> list[float]:
    """The validation errors at a learning rate, in %."""
    return [100 * error for epoch, error in zip(run.epochs, run.errors, strict=True) if epoch.lr == float(lr)]


def _training_at(run: ArmRun, lr: str) -> float | None:
    """The training error of the last epoch at a learning rate, in %."""
    return next((100 * epoch.train_error for epoch in reversed(run.epochs) if epoch.lr == float(lr)), None)


FIELDS: dict[str, tuple[str, Callable[..., float | None]]] = {  # what it counts, and its value for a run
    r"below ([\d.]+)": ("step", lambda run, error: run.first_below(float(error))),
    r"validated below ([\d.]+)": ("step", lambda run, error: run.validated_below(float(error))),
    r"training error": ("%", lambda run: run.epochs[-1].train_error * 100 if run.epochs else None),
    r"last error at lr ([\d.e-]+)": ("%", lambda run, lr: _at(run, lr)[-1] if _at(run, lr) else None),
    r"lowest error at lr ([\d.e-]+)": ("%", lambda run, lr: min(_at(run, lr), default=None)),
    r"mean error at lr ([\d.e-]+)": ("%", lambda run, lr: fmean(_at(run, lr)[-LAST:]) if _at(run, lr) else None),
    r"training error at lr ([\d.e-]+)": ("%", _training_at),
    r"last validation loss": ("", lambda run: run.epochs[-1].loss if run.epochs else None),
    r"lowest validation loss": ("", lambda run: min((epoch.loss for epoch in run.epochs), default=None)),
    r"epochs": ("", lambda run: len(run.epochs) or None),
    r"steps": ("step", lambda run: run.last_step or None),
    r"error": ("%", lambda run: run.errors[-1] * 100 if run.errors else None),
    r"loss of the last (\d+) steps": ("", lambda run, steps: _last_loss(run, int(steps))),
    r"(loss|curvature) at (\d+)": ("", lambda run, key, step: _probe(run, step).get(key)),
    r"stable lr at (\d+)": ("", lambda run, step: run.stable_lr(_probe(run, step)) if _probe(run, step) else None),
    r"(signal|gradient|dead) (.+) at (\d+)": ("", _of_layer),
}


@dataclass
class Records:
    """What markers name.

    Attributes:
        entries: the values of the entries of docs/measurements.yaml.
        runs: of the experiment of a name.
        named: the values, `ENTRY.VALUE`, that were asked for.
    """

    entries: Mapping[str, Mapping[str, str | list[str]]]
    runs: Callable[[str], Sequence[ArmRun]]
    named: set[str] = field(default_factory=set)

    def values(self, ref: str) -> list[Value]:
        """What a REF names, in most cases one value. Raises LookupError that says what is not there."""
        one, divided, other = ref.partition(" / ")
        if divided:
            ratios = [a.value / b.value for a, b in zip(self.values(one), self.values(other), strict=True)]
            return [Value("", ratio, ratio) for ratio in ratios]
        if "/" in ref:
            experiment, *arm, name = ref.split("/")
            return [self._recorded(experiment, "/".join(arm), name)]
        entry, _, name = ref.partition(".")
        if name not in self.entries.get(entry, {}):
            raise LookupError(f"{FILE.name} has no {ref}")
        self.named.add(ref)
        return values_of(self.entries[entry][name])

    def _recorded(self, experiment: str, arm: str, name: str) -> Value:
        runs = [run for run in self.runs(experiment) if run.arm == arm]
        if not runs:
            raise LookupError(f"{experiment}.jsonl has no arm '{arm}'")
        of, wanted = re.fullmatch(r"(least |most |seed \d+ |)(.*)", name).groups()  # type: ignore[union-attr]
        if of.startswith("seed"):
            runs = [run for run in runs if run.seed == int(of.split()[1])]
        for pattern, (counts, value) in FIELDS.items():
            if match := re.fullmatch(pattern, wanted):
                values = [value(run, *match.groups()) for run in runs]
                known = [float(one) for one in values if one is not None]
                if not known or (of != "least " and len(known) < len(values)):
                    raise LookupError(f"'{arm}' of {experiment}.jsonl has no {name}, or not for each seed")
                result = {"least ": min, "most ": max}.get(of, fmean)(known)
                return Value(counts, result, result)
        raise LookupError(f"'{wanted}' is no field: choose from {', '.join(FIELDS)}")


class Block(NamedTuple):
    """Lines between blank lines, the first of them `line`, and the markers above, (kind, text)."""

    line: int
    text: str
    markers: list[tuple[str, str]]


def blocks(text: str) -> Iterator[Block]:
    """The blocks of a page in Markdown, without those that are fenced."""
    lines, at, begun = text.split("\n"), 0, 0
    own, markers = list[str](), list[tuple[str, str]]()
    while at <= len(lines):
        line = lines[at].strip() if at < len(lines) else ""
        comment = line.startswith("<!--")
        fence = re.match(r"`{3,}|~{3,}", line)
        if (not line or comment or fence) and (own or (markers and not comment)):
            yield Block(begun, "\n".join(own), markers)
            own, markers = [], []
        if comment:
            end = next((i for i in range(at, len(lines)) if "-->" in lines[i]), len(lines) - 1)
            markers += _markers("\n".join(lines[at : end + 1]))
            at = end
            if after := lines[end].partition("-->")[2].strip():
                own.append(after)
        elif fence:
            closed = re.compile(rf"\s*{fence[0]}{fence[0][0]}*\s*")
            at = next((i for i in range(at + 1, len(lines)) if closed.fullmatch(lines[i])), len(lines))
        elif line:
            own.append(lines[at])
        begun = begun if len(own) > 1 else at + 1
        at += 1


def head(text: str) -> Block:
    """The comments before the first key of a YAML file. A line that begins a marker, or goes on with one, is blank."""
    own, markers, inside = list[str](), list[str](), False
    for line in re.match(r"(?:(?:#.*)?\n)*", text)[0].splitlines():  # type: ignore[index]
        inside = bool(re.match(r"# (not )?measured:", line)) or (inside and line.startswith("#   "))
        markers += [line[1:].strip()] if inside else []
        own.append("" if inside else line[1:])
    return Block(1, "\n".join(own), _markers("\n".join(markers)))


def _markers(text: str) -> list[tuple[str, str]]:
    found = re.findall(r"(?ms)(?:^|<!--)\s*((?:not )?measured):(.*?)(?=\n\s*(?:not )?measured:|-->|\Z)", text)
    return [(kind, on_one_line(rest)) for kind, rest in found]


def plain(text: str) -> str:
    """What a reader reads of a block, on the same lines."""
    code, comment, target = r"(?<!`)(`+)(?!`).+?(?<!`)\1(?!`)", r"<!--.*?-->", r"\]\([^)]*\)|\w+://\S+"
    for hidden in (code, comment, target, r"<[a-zA-Z/][^>]*>"):
        text = re.sub(hidden, lambda match: "|" + "\n" * match[0].count("\n"), text, flags=re.DOTALL)
    return with_units(html.unescape(re.sub(r"(?m)^ *>|\*|~~|(?<!\w)_+(?=\S)|_+(?!\w)", "", text)))


def problems(name: str, text: str, drawn: Collection[str], records: Records) -> list[str]:
    """What is wrong with the numbers of a file: each `NAME:LINE: NUMBER: what is missing`.

    Args:
        drawn: tables whose numbers need no marker.
    """
    wrong = []
    for block in [head(text)] if name.endswith(".yaml") else blocks(text):
        read = "" if f"{block.text}\n" in drawn else plain(block.text)
        for at, said in _of_block(read, block.markers, records):
            wrong.append(f"{name}:{block.line + read.count(chr(10), 0, at)}: {said}")
    return wrong


def _of_block(text: str, markers: Sequence[tuple[str, str]], records: Records) -> Iterator[tuple[int, str]]:
    """What is wrong in a block, with its offset."""
    found = quantities(text)
    places = {number.at for number in found}
    without = [number for number in bare(text) if number.at not in places]
    numbers = sorted(found + without, key=lambda number: number.at)
    marked, last = set[Quantity](), 0
    for kind, rest in markers:
        if kind == "measured":
            for ref in re.split(r"; ?", rest):
                try:
                    values = records.values(ref)
                except (LookupError, ValueError, ZeroDivisionError) as error:
                    yield 0, f"{ref}: {error}"
                    continue
                shown = ", ".join(f"{value.shown:.5g}" for value in values)
                own = _saying(values, numbers)
                if not own:
                    yield 0, f"{ref}: is {shown}, which no number of the block says"
                elif not (later := [number.at for number in own if number.at >= last]):
                    yield 0, f"{ref}: is {shown}, which the block says before what is named before it"
                else:
                    last = min(later)
                marked |= own
            continue
        names, _, reason = rest.partition(": ")
        if not REASONS.fullmatch(reason):
            yield 0, f"{names}: '{reason}' is no reason: the paper's, derived, a setting, an example, published (WHERE)"
        if names == "all":
            if not found or len(markers) > 1 or reason.startswith("a setting"):
                yield 0, "all: stands alone, above a block with numbers that have a unit, none of which is a setting"
            marked |= set(found)
            continue
        names = re.sub(r"(twice|times)\b", r"\1 as", names)
        if left := re.sub(r"[\s,]|\b(as|and|or)\b", "", QUANTITY.sub("", names)):
            yield 0, f"{left}: is no number with a unit, in 'not measured: {rest}'"
        for one in quantities(names):
            own = {number for number in found if (number.counts, number.value) == (one.counts, one.value)}
            if not own:
                yield 0, f"{one.text}: no number of the block, in 'not measured: {rest}'"
            marked |= own
    for number in found:
        if number not in marked:
            yield number.at, f"{number.text}: no marker names where it was measured, or why it was not"


def _saying(values: Sequence[Value], numbers: Sequence[Quantity]) -> set[Quantity]:
    """The numbers that say this value; of several values one number each, in the same order, with a unit if the value
    has one; or none."""
    if len(values) == 1:
        return {number for number in numbers if values[0].agrees(number)}
    left = iter(numbers)
    own = [
        next((one for one in left if value.agrees(one) and (one.counts or not value.counts)), None) for value in values
    ]
    return set() if None in own else set(filter(None, own))


def values_of(entry: str | list[str]) -> list[Value]:
    """Of a value in docs/measurements.yaml, or a list of such. Raises ValueError unless each is one number."""
    return [value_of(text) for text in ([entry] if isinstance(entry, str) else entry)]


def files() -> list[Path]:
    """README.md, the pages of docs, and the configurations."""
    pages, tables = set(ROOT.glob("docs/**/*.md")), set(EXPERIMENTS.glob("*.md"))
    return [ROOT / "README.md", *sorted(pages - tables), *sorted(ROOT.glob("configs/**/*.yaml"))]


def entries() -> dict[str, dict[str, Any]]:
    """docs/measurements.yaml, all scalars as they are written."""
    return yaml.load(FILE.read_text(encoding="utf-8"), yaml.BaseLoader) or {}


def tables() -> set[str]:
    """Those of docs/experiments."""
    return {path.read_text(encoding="utf-8") for path in EXPERIMENTS.glob("*.md")}


def committed() -> Records:
    """What is in docs."""
    values = {name: entry["values"] for name, entry in entries().items()}
    return Records(values, cache(lambda name: of_file(EXPERIMENTS / f"{name}.jsonl")))


def main(names: Sequence[str]) -> int:
    """Print what is wrong. Returns 1 if anything is."""
    records, drawn, found = committed(), tables(), list[str]()
    for path in [Path(name).resolve() for name in names] or files():
        found += problems(str(path.relative_to(ROOT)), path.read_text(encoding="utf-8"), drawn, records)
    known = {f"{entry}.{name}" for entry, values in records.entries.items() for name in values}
    found += [] if names else [f"docs/{FILE.name}: {ref}: no marker names it" for ref in sorted(known - records.named)]
    print(*found, *["How markers are written: tests/helpers/numbers.py"][: len(found)], sep="\n")
    return int(bool(found))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
