"""The GPU report as a person reads it."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import Any

Result = dict[str, Any]


def describe(report: dict[str, Any]) -> str:
    """A head, a line for each part, and what each has found."""
    gpus, parts = report["gpus"], report["parts"]
    head = f"GPU report of dist_train, {report['date']}, {gpus or 'no'} GPU{'' if gpus == 1 else 's'}"
    lines = [f"{head}, {report['minutes']:g} minutes", report["command"], ""]
    lines += _columns(
        [(name, p["state"], f"{p['seconds']:.0f} s", p["reason"]) for name, p in parts.items()], right=[2]
    )
    for name, found in parts.items():
        table = list(TABLES.get(name, _tests)(found["result"]))
        if "output" in found:
            table += ["The end of what it wrote:", *(f"| {line}" for line in found["output"])]
        if table:
            lines += ["", name, *(f"  {line}".rstrip() for line in table)]
    return "\n".join(lines)


def _columns(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> list[str]:
    """Rows as lines, in columns, of which some are put to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(_padded(row, widths, right)).rstrip() for row in rows]


def _padded(row: Sequence[str], widths: Sequence[int], right: Collection[int]) -> Iterator[str]:
    for i, (cell, width) in enumerate(zip(row, widths, strict=True)):
        yield cell.rjust(width) if i in right else cell.ljust(width)


def _machine(result: Result) -> Iterator[str]:
    checks = result.get("checks", [])
    lines = _columns([(check["level"], check["name"], check["found"]) for check in checks])
    for line, check in zip(lines, checks, strict=True):
        yield line
        if check["remedy"]:
            yield f"      -> {check['remedy']}"
    if matrix := result.get("topology", "").partition("Legend:")[0].strip("\n"):
        yield from ("", *matrix.expandtabs().rstrip().splitlines())


def _decoder(result: Result) -> Iterator[str]:
    if "images" in result:
        yield f"{result['images']} images: how many levels from the CPU's inputs, and whether bits depend on the batch"
    same, rows = result.get("same_bits_in_batches_of", {}), []
    for name, far in result.get("levels_from_the_cpu", {}).items():
        bits = ", ".join(f"{batch}: {'yes' if equal else 'no'}" for batch, equal in same.get(name, {}).items())
        rows.append((name, f"{far['max']:.1f}", f"{far['mean']:.3f}", bits))
    yield from _columns([("", "max", "mean", "the same bits in batches of"), *rows] if rows else [], right=[1, 2])


def _pooling(result: Result) -> Iterator[str]:
    rows = [
        (name, f"{found['gradients']} different in {found['times']}", "torch warns" if found["torch_warns"] else "")
        for name, found in result.items()
    ]
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
            yield from textwrap.wrap(f"{outcome}, {why}: {', '.join(names)}", 118, subsequent_indent="    ")


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
        yield f"all-reduce of the gradients: {rate['algorithm']:.3g} GB/s, {rate['bus']:.3g} GB/s on the bus"
    for name, processes in result.get("processes_by_gpu", {}).items():
        counts = [len(pids) for pids in processes.values()]
        if set(counts) != {1}:
            yield f"not one process a GPU, but {', '.join(map(str, counts))}: {name}"
    yield from (f"not measured, for want of time: {name}" for name in result.get("late", []))


TABLES = {"machine": _machine, "decoder": _decoder, "pooling": _pooling, "speed": _speed}  # the others are tests
