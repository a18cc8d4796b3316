"""The GPU report as text."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import Any

Result = dict[str, Any]
WIDTH = 120
INDENT = "  "  # of what a part has found


def describe(report: dict[str, Any]) -> str:
    """A head, one line per part, and the findings of each. Lines of words are at most WIDTH wide."""
    parts = report["parts"]
    how_long = f"{_counted(report['gpus'] or 'no', 'GPU')}, {_counted(format(report['minutes'], 'g'), 'minute')}"
    lines = [f"GPU report of dist_train{_code(report['code'])}", f"{report['date']}, {how_long}", report["command"]]
    if any("output" in found for found in parts.values()):
        lines += ["Before you attach it: what failed parts wrote may quote paths of this machine."]
    rows = [(name, p["state"], f"{p['seconds']:.0f} s", p["reason"]) for name, p in parts.items()]
    lines += ["", *_columns(rows, right=[2])]
    for name, found in parts.items():
        table = list(TABLES.get(name, _tests)(found["result"]))
        if "output" in found:
            table += ["The end of what it wrote:", *(f"| {line}" for line in found["output"])]
        if table:
            lines += ["", name, *(f"{INDENT}{line}".rstrip() for row in table for line in row.splitlines() or [""])]
    return "\n".join(lines)


def _counted(number: object, thing: str) -> str:
    return f"{number} {thing}{'' if str(number) == '1' else 's'}"


def _code(code: dict[str, Any]) -> str:
    changed = " and changes" if code["changed"] else ""
    return f" {code['version']}".rstrip() + (f", commit {code['commit']}{changed}" if code["commit"] else "")


def _wrapped(text: str, beside: int = 0, further: str = "") -> list[str]:
    """Lines that fit beside so many columns; further ones begin with `further`."""
    width = WIDTH - len(INDENT) - beside
    return textwrap.wrap(text, width, subsequent_indent=further, break_long_words=False, break_on_hyphens=False) or [""]


def _columns(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> list[str]:
    """Rows in columns, some of them right-aligned; the last column may wrap."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    beside = sum(widths[:-1]) + 2 * len(widths[:-1])
    texts = []
    for row in rows:
        first, *more = _wrapped(row[-1], beside)
        line = "  ".join(_padded([*row[:-1], first], widths, right)).rstrip()
        texts.append("\n".join([line, *(" " * beside + rest for rest in more)]))
    return texts


def _padded(row: Sequence[str], widths: Sequence[int], right: Collection[int]) -> Iterator[str]:
    for i, (cell, width) in enumerate(zip(row, widths, strict=True)):
        yield cell.rjust(width) if i in right else cell.ljust(width)


def _machine(result: Result) -> Iterator[str]:
    checks = result.get("checks", [])
    rows = _columns([(check["level"], check["name"], check["found"]) for check in checks])
    for row, check in zip(rows, checks, strict=True):
        yield row
        for i, line in enumerate(check["remedy"].splitlines()):
            yield f"      {'  ' if i else '->'} {line}"
    if matrix := result.get("topology", "").partition("Legend:")[0].strip("\n"):
        yield from ("", *matrix.expandtabs().rstrip().splitlines())


def _decoder(result: Result) -> Iterator[str]:
    if "images" in result:
        yield f"{result['images']} images, whose bits must not depend on which batch they are in"
    same = result.get("same_bits_in_batches_of", {})
    if apart := result.get("levels_from_the_cpu", {}):
        rows = [
            (name, f"{far['max']:.1f}", f"{far['mean']:.3f}", *_bits(same.get(name, {}))) for name, far in apart.items()
        ]
        names = ("levels from the CPU's:", "max", "mean", "same bits in batches of", "other bits")
        yield from _columns([names, *rows], right=[1, 2])
    elif same:
        bits = [(name, *_bits(equal)) for name, equal in same.items()]
        yield from _columns([("", "same bits in batches of", "other bits"), *bits])


def _bits(same: dict[str, bool]) -> tuple[str, str]:
    """The batches with the same bits, and the others."""
    equal, other = (", ".join(batch for batch in same if same[batch] == kind) for kind in (True, False))
    return equal, other or ("none" if same else "")


def _pooling(result: Result) -> Iterator[str]:
    rows = []
    for name, found in result.items():
        times, many = found["times"], found["gradients"]
        same = f"all {times} the same" if many == 1 else f"{many} different results in {times}"
        rows.append((name, same, "torch warns" if found["torch_warns"] else ""))
    if rows:
        yield "gradients of overlapping max pooling"
        yield from _columns(rows)


def _tests(result: Result) -> Iterator[str]:
    if "passed" not in result:  # it was cut off
        counts = Counter(result.get("tests", {}).values())
        if counts:
            yield ", ".join(f"{count} {outcome}" for outcome, count in counts.items()) + ", then it was over"
        return
    yield ", ".join(f"{len(result[outcome])} {outcome}" for outcome in ("passed", "failed", "skipped"))
    for outcome in ("failed", "skipped"):
        for why in sorted(set(result[outcome].values())):
            names = [name for name, reason in result[outcome].items() if reason == why]
            yield from _wrapped(f"{outcome} ({why}): {', '.join(names)}", further="    ")


def _speed(result: Result) -> Iterator[str]:
    rows: list[tuple[str, ...]] = [("", "step", "step", "loader", "both", "waits", "host", "device", "took")]
    rows.append(("", "ms", *["images/s"] * 3, "for data", "MB", "MB", "s"))
    for name, run in result.get("runs", {}).items():
        if "failed" in run:
            rows.append((name, "failed", *[""] * 7))
            continue
        step, memory = run["step"], run["memory"]
        rates = [f"{run[stage]['images_per_s']:,.0f}" if run[stage] else "" for stage in ("step", "loader", "both")]
        waits = f"{run['both']['data_wait_share']:.0%}" if run["both"] else ""
        peaks = [memory[f"peak_{where}_mb"] for where in ("host", "device")]
        sizes = ["" if peak is None else f"{peak:,.0f}" for peak in peaks]
        rows.append((name, f"{step['step_ms']:,.1f}", *rates, waits, *sizes, f"{run['seconds']:.0f}"))
    if len(rows) > 2:
        yield from _columns(rows, right=range(1, 9))
    for name, percent in result.get("deterministic_costs_percent", {}).items():
        yield f"train.deterministic costs {percent:.1f} % of the time of a step: {name}"
    if rate := result.get("all_reduce_gb_per_s"):
        yield f"all-reduce of the gradients: algbw {rate['algorithm']:.3g} GB/s, busbw {rate['bus']:.3g} GB/s"
    for name, processes in result.get("processes_by_gpu", {}).items():
        counts = [len(pids) for pids in processes.values()]
        if set(counts) != {1}:
            yield f"not one process per GPU, but {', '.join(map(str, counts))}: {name}"
    yield from (f"not measured, for want of time: {name}" for name in result.get("late", []))


TABLES = {"machine": _machine, "decoder": _decoder, "pooling": _pooling, "speed": _speed}  # the others are tests
