"""Quantities in a text: numbers with a unit, in digits or in words.

In is a number from two on beside per cent, points, a time, a rate (`images/s`), a ratio (`N times`, `factor of N`) or
a count of steps (`N steps`, `step N`), with every number of a list, range, "± N" or "(least to greatest)" beside its
unit, also over the end of a line, and in a column of a table whose head ends in the unit.

Out are numbers whose unit stands elsewhere, "a", "an" and "one", fractions ("half", "a third"), "tenfold", "twice" and
"three times" unless something is compared ("as", "the", "later"), powers of ten, and thousands separated by a space.
"""

from __future__ import annotations

import re
from decimal import Decimal
from itertools import zip_longest
from typing import NamedTuple

WORDS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10}
WORDS |= {"eleven": 11, "twelve": 12, "thirteen": 13, "fourteen": 14, "fifteen": 15, "sixteen": 16, "seventeen": 17}
WORDS |= {"eighteen": 18, "nineteen": 19, "twenty": 20, "thirty": 30, "forty": 40, "fifty": 50, "sixty": 60}
WORDS |= {"seventy": 70, "eighty": 80, "ninety": 90}
MANY = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "k": 10**3}
WORD = "|".join(WORDS)
NUMERAL = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?(?:e[-+]?\d+)?)(?!\d|[.,]\d)"
BEFORE, AFTER = r"(?<![\w.,^])(?<![A-Za-z]-)", rf"(?:\s*(?:{'|'.join(MANY)})\b)?"
DIGITS, WORDED = rf"{BEFORE}{NUMERAL}{AFTER}", rf"{BEFORE}(?i:(?:\w+ty-)?(?:{WORD}))\b{AFTER}"
NUMBER = f"(?:{DIGITS}|{WORDED})"
INSTEAD = r"against|vs\.?|rather\s+than|instead\s+of|in\s+place\s+of"
JOIN = rf"(?:\s*(?:±|\+-|\+/-|–|—|-|~|/)\s*|\s*,\s+(?:(?:and|or|to)\s+)?|\s+(?:and|or|to|{INSTEAD})\s+)"
NAMES = ("lr", "seed", "batch", "crop", "epoch", "fc", "conv", "tower", "rung", "figure", "table", "footnote")
FIRST = "".join(rf"(?<!\b{name} )" for name in NAMES)  # "with seed 1, 24 %" is no list
SPAN = rf"\s+\({DIGITS}(?:{JOIN}{DIGITS})+\)"  # the least and the greatest, after the mean
LIST = rf"{FIRST}(?:{DIGITS}(?:{JOIN}{DIGITS})*(?:{SPAN})?|{WORDED}(?:{JOIN}{WORDED})*)"
UNITS = {  # pattern: what it counts ("" for a rate, which is that of its name), and how many of that one is
    r"%|per\s?cent\b|points?\b": ("%", 1.0),
    r"[A-Za-z]+(?:\s?/\s?|\s+(?:per|a|every)\s+)(?:s|sec|min|h|second|minute|hour)\b": ("", 1.0),
    r"(?:core|CPU|GPU)[-\s]+hours?\b": ("hours of a processor", 1.0),
    r"(?:ns|nanoseconds?)\b": ("s", 1e-9),
    r"(?:[µμ]s|us|microseconds?)\b": ("s", 1e-6),
    r"(?:ms|milliseconds?)\b": ("s", 1e-3),
    r"(?:s|secs?|seconds?)\b": ("s", 1.0),
    r"(?:mins?|minutes?)\b": ("s", 60.0),
    r"(?:h|hrs?|hours?)\b": ("s", 3600.0),
    r"days?\b": ("s", 86400.0),
    r"weeks?\b": ("s", 604800.0),
    r"(?:steps?|iterations?)\b|스텝": ("step", 1.0),
    r"times\b|fold\b|(?<=\d)x\b(?!\s[A-Z])|×(?!\s*[\dA-Z])": ("times", 1.0),
}
UNIT = "|".join(UNITS)
COMPARED = r"(?=\s+(?:as|th\w+|what|its|our|his|more|less|fewer|\w+er)\b)"
KIND = r"(?:(?:more|further|training|optimizer|percentage)\s+)?"
QUANTITY = re.compile(
    rf"\b(?P<before>[Ss]teps?|[Ii]terations?|[Ff]actors?\s+of)\s+{LIST}(?![-\s]*(?:{UNIT}))"
    rf"|(?P<twice>\b[Tt]wice){COMPARED}"
    rf"|(?<![\w.,^])(?i:{WORD})\s+times{COMPARED}"
    rf"|(?!(?i:{WORD})\s+times\b){LIST}[-\s]*{KIND}(?P<unit>{UNIT})(?:{SPAN}|\s*(?:±|\+-)\s*{DIGITS})?"
)
ANY, NUMBERS = re.compile(NUMBER), re.compile(rf"\s*{LIST}\s*")
ROUND = re.compile(r"\b(about|some|around|roughly)\s$", re.IGNORECASE)


class Quantity(NamedTuple):
    """A number of a text, in the base unit of what it counts ("" for a number without a unit), and half of the last of
    its digits."""

    text: str
    at: int
    counts: str
    value: float
    half: float


class Value(NamedTuple):
    """What is recorded: what it counts ("" for a plain number or a share), in its base unit and as it is shown."""

    counts: str
    value: float
    shown: float

    def agrees(self, number: Quantity) -> bool:
        """Whether this is what the number says. One digit alone, as there are many in a text, must be exact."""
        value = self.shown if not number.counts else self.value
        if number.counts != self.counts and number.counts:
            if self.counts or number.counts not in ("times", "%"):
                return False
            value *= 100 if number.counts == "%" else 1
        half = number.half if number.counts or number.half < 0.1 * abs(value) else 0.0
        return abs(value - number.value) <= half * (1 + 1e-6)


def quantities(text: str) -> list[Quantity]:
    """The numbers with a unit in a text, in its order; `at` is the offset of each."""
    found = []
    for match in QUANTITY.finditer(text):
        before = match["before"] or ""
        unit = match["unit"] or ("step" if before[1:3] == "te" else "times")
        counts, scale = next(of for pattern, of in UNITS.items() if re.fullmatch(rf"\d(?:{pattern})", f"0{unit}"))
        rate = re.sub(r"(?:\s?/\s?|\s+(?:per|a|every)\s+)(s|min|h)\w*", r"/\1", unit)
        if match["twice"]:
            found.append(Quantity("twice", match.start(), counts, 2.0, 0.25))
            continue
        numbers = list(ANY.finditer(text, match.start(), match.end()))
        many = re.search(rf"\s*({'|'.join(MANY)})$|$", numbers[-1][0])[0]  # type: ignore[index]
        for number in numbers:
            written = number[0].removesuffix(many) + many  # "80 to 200 thousand" are all thousands
            value, half = number_of(written, _rounded(text, number.start()))
            named = f"{before} {number[0]}" if before else f"{number[0]} {unit}"
            found.append(Quantity(on_one_line(named), number.start(), counts or rate, value * scale, half * scale))
    return found


def number_of(text: str, rounded: bool = False) -> tuple[float, float]:
    """A number, and half of its last digit."""
    digits, many = re.fullmatch(rf"(?s)(.*?)\s*({'|'.join(MANY)}|)", text).groups()  # type: ignore[union-attr]
    words = [WORDS[word] for word in digits.lower().split("-") if word in WORDS]
    number = Decimal(sum(words)) if words else Decimal(digits.replace(",", ""))
    half = 0.5 * 10.0 ** int(number.as_tuple().exponent)
    if rounded:
        half = max(half, min(0.5 * 10.0 ** int(number.normalize().as_tuple().exponent), 0.1 * float(number)))
    return float(number) * MANY.get(many, 1), half * MANY.get(many, 1)


def value_of(text: str) -> Value:
    """Of a value in docs/measurements.yaml. Raises ValueError unless it is one number, with or without a unit."""
    plain = ANY.fullmatch(text)
    found = [] if plain else quantities(text)
    if not plain and (len(found) != 1 or QUANTITY.fullmatch(text) is None):
        raise ValueError(f"'{text}' is no number with a unit that is known")
    shown = number_of(ANY.search(text)[0])[0]  # type: ignore[index]
    return Value(found[0].counts, found[0].value, shown) if found else Value("", shown, shown)


def bare(text: str) -> list[Quantity]:
    """All numbers of a text without their units."""
    return [Quantity(m[0], m.start(), "", *number_of(m[0], _rounded(text, m.start()))) for m in ANY.finditer(text)]


def _rounded(text: str, at: int) -> bool:
    return bool(ROUND.search(text[max(0, at - 9) : at]))


def with_units(text: str) -> str:
    """A table with the units of its head (`| error, % | steps |`) in its cells; any other text as it is."""
    head, *rows = text.split("\n")
    if not rows or not re.fullmatch(r"[-:| ]+", rows[0]):
        return text
    units = [re.search(rf"(?:^|[\s,(])({UNIT})\)?\s*$", cell) for cell in head.split("|")]
    for at, row in enumerate(rows):
        cells = zip_longest(row.split("|"), units[: row.count("|") + 1])
        rows[at] = "|".join(f"{cell} {unit[1]}" if unit and NUMBERS.fullmatch(cell) else cell for cell, unit in cells)
    return "\n".join([head, *rows])


def on_one_line(text: str) -> str:
    """A text without ends of lines and repeated spaces."""
    return re.sub(r"\s+", " ", text).strip()
