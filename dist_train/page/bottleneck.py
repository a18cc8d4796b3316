"""What limits the speed of a run now, in one sentence with a remedy, from the last lines of its record."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from dist_train.page.series import number
from dist_train.page.wording import percent, plainly
from dist_train.rundir import record
from dist_train.rundir.ledger import REPEATED

# Shares of the time from which on each is worth a sentence.
WAIT, VALIDATION, SAVING = 0.10, 0.15, 0.05
APART = 0.10  # by which the slowest rank waits longer than the mean, and twice as long: it is one node's matter
SLOWED = ("hw_slowdown", "hw_thermal", "sw_thermal", "hw_power_brake")  # reasons of NVML that are no normal operation


def bottleneck(
    recent: Sequence[Mapping[str, Any]],
    validation: Mapping[str, Any] | None,
    seconds: Mapping[str, float],
    side: object,
    *,
    gpu: bool,
) -> str:
    """The sentence; empty without a line.

    Args:
        recent: lines of steps of the present start, without its first, whose steps waited for the first batch.
        validation: the newest line of a validation.
        seconds: wall time of the run by phase.
        side: shorter side of the images before the crop, `data.resize`.
        gpu: whether the run trains on GPUs.
    """
    if not recent:
        return ""
    machines = [machine for line in recent if isinstance(machine := line.get(record.MACHINE, line), dict)]
    mean, worst = (_mean(machines, key) for key in ("data_wait", "data_wait_worst"))
    checks, saves = _checks(validation, _mean(machines, "images_per_s")), _saves(seconds)
    shares = {"data": max(mean, worst) / WAIT, "checks": checks / VALIDATION, "saves": saves / SAVING}
    first = max(shares, key=shares.__getitem__)
    if shares[first] >= 1:
        if first == "data":
            return _data(machines, mean, worst, side)
        if first == "checks":
            remedy = "a smaller validation set, or one on a local disk"
            return f"validation takes {percent(checks, 0)} of an epoch: {remedy}"
        return f"stands still {percent(saves, 0)} of the time to save: raise checkpoint.minutes or .steps"
    if slowed := _slowed(machines):
        return slowed
    remedy = "more GPUs, or faster ones" if gpu else "a GPU"
    return f"limited by the net itself, which waits for data {percent(mean)} of the time: {remedy} would help"


def _data(machines: Sequence[Mapping[str, Any]], mean: float, worst: float, side: object) -> str:
    """The sentence on waiting for data."""
    ranks = Counter[tuple[str, str]]()
    for machine in machines:
        if "worst_rank" in machine:
            who = plainly(machine.get("worst_node", "")), plainly(machine["worst_rank"])
            ranks[who] += round(1000 * (number(machine.get("data_wait_worst")) or 0))
    (node, rank), waited = ranks.most_common(1)[0] if ranks else (("", ""), 0)
    where = f"rank {rank} on {node}" if node else f"rank {rank}"
    pack = f", or pack at {plainly(side)}" if side else ""
    if ranks and worst > 2 * mean and worst - mean > APART:
        average = f"waits for data {percent(worst, 0)} of the time, the average rank {percent(mean, 0)}"
        if 2 * waited > ranks.total():
            return f"{where} {average}: look at the disk and the CPUs of that node"
        return f"one rank or another {average}: more CPUs per rank{pack}"
    place = f", worst on {node}, rank {rank}" if node else ""
    return f"waits for data {percent(mean, 0)} of the time{place}: more CPUs per rank{pack}"


def _checks(validation: Mapping[str, Any] | None, rate: float) -> float:
    """Share of a whole epoch at this rate that validates; "epoch_seconds" is that of a part after a restart."""
    line = validation or {}
    machine = line.get(record.MACHINE)
    seconds = number(machine.get("seconds")) if isinstance(machine, dict) else None
    images, epoch = number(line.get("images")), number(line.get("epoch"))
    if not seconds or images is None or epoch is None or min(seconds, images, epoch + 1, rate) <= 0:
        return 0.0
    return seconds / (seconds + images / (epoch + 1) / rate)


def _saves(seconds: Mapping[str, float]) -> float:
    """Share of the time of all steps in which training stood still for a save; the last lines may hold none, or one by
    chance."""
    whole = sum(seconds.get(phase, 0.0) for phase in (*REPEATED, "saving", "lost"))
    return seconds.get("saving", 0.0) / whole if whole else 0.0


def _slowed(machines: Sequence[Mapping[str, Any]]) -> str:
    """The sentence on GPUs with reduced clocks, if most lines have the same."""
    found = Counter[tuple[str, str]]()
    for machine in machines:
        nodes = machine.get("nodes")
        for node, values in nodes.items() if isinstance(nodes, dict) else ():
            reasons = values.get("throttled") if isinstance(values, dict) else None
            for reason in SLOWED:
                if isinstance(reasons, list | str) and reason in reasons:
                    found[(node, reason)] += 1
    for (node, reason), count in found.most_common(1):
        if 2 * count > len(machines):
            return f"a GPU of {plainly(node)} runs at reduced clocks ({reason}): look at its cooling and its power"
    return ""


def _mean(machines: Sequence[Mapping[str, Any]], key: str) -> float:
    values = [value for machine in machines if (value := number(machine.get(key))) is not None]
    return sum(values) / len(values) if values else 0.0
