"""`python -m dist_train speed [the trainer's options]`: speed of the step, the loader, both, and the all-reduce.

The step is the trainer's own, with its net, DDP, optimizer and vote. Other programs read these numbers in profile.json,
whose names carry their units.
"""

from __future__ import annotations

import json
import platform
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dist_train import data
from dist_train.analysis.options import check_place
from dist_train.analysis.pace import Pace, Stretch, without_data
from dist_train.config import Config
from dist_train.flat import as_dict
from dist_train.machine import versions_of_training
from dist_train.outcomes import Ended, Refused
from dist_train.ranks import launcher
from dist_train.ranks.watch import Watch
from dist_train.ranks.world import World, join
from dist_train.rundir.last_words import LastWords
from pipelines.errors import UserError
from pipelines.files import write_atomically
from pipelines.remote.places import is_url
from pipelines.shards import ShardSet
from pipelines.speech import show

FORMAT = 1


def start(args: Namespace, config: Config) -> int:
    """Measure, print a summary, and write profile.json. Returns the exit code of this rank.

    Raises UserError in one process, RuntimeError for an error of one rank of several, so that a launcher ends the
    others, and KeyboardInterrupt on all ranks after a stop signal.
    """
    watch = Watch(config.run.start_timeout, config.run.stop_timeout, LastWords())
    watch.heartbeat(config.run.start_timeout)  # a stop is met by the next vote from here on: there are files to remove
    code = 0
    try:
        world = join(config.train.device)
        try:
            _speed(args, config, world, watch)
        except Ended as end:  # on all ranks
            code = launcher.end_refused(end)
        except (UserError, OSError) as error:
            if world.size == 1:
                raise
            raise RuntimeError(f"rank {world.rank}: {error}") from error
        world.leave()
    finally:
        watch.close()
    return code


def _speed(args: Namespace, config: Config, world: World, watch: Watch) -> None:
    """Raises Ended on all ranks alike."""
    world.together(lambda: check_place(args.out, "--out"), on=[0])
    shards = _opened(config, world)
    built = world.in_pairs() if config.train.tower_parallel else world
    with tempfile.TemporaryDirectory(prefix="dist_train-speed-") as scratch:
        try:
            pace = Pace(config, built, watch, shards or without_data(config), Path(scratch), loads=bool(shards))
        except ValueError as error:  # ours, and torch's for sizes that do not fit
            raise Refused(str(error)) from error
        row = pace.measure(args.steps)
    rows: list[dict[str, Any]] = [{}] * world.size
    dist.all_gather_object(rows, row)
    report = facts(config, world) | pace.facts() | profile_of(rows, config.train.global_batch)
    report["warm_up"] = {"build_s": pace.build_seconds, "first_steps_s": pace.warm_up_seconds}
    report["config"] = as_dict(config)
    try:
        world.together(lambda: _write(report, args.out.resolve()), on=[0])
    finally:
        if world.rank == 0:
            show(describe(report))
    if world.rank == 0:
        show(f"{'profile':>10}  {args.out.resolve()}")


def _opened(config: Config, world: World) -> ShardSet | None:
    """The training set, or None if rank 0 finds none. Raises Refused on all ranks."""
    world.together(lambda: data.check_batch(config, world.size))
    if not world.share(is_url(config.data.train) or Path(config.data.train).exists()):
        return None
    trained = replace(config, data=replace(config.data, val=config.data.train))  # nothing is validated
    sets = world.together(lambda: data.open_sets(trained))
    assert sets is not None
    return sets[0]


def facts(config: Config, world: World) -> dict[str, Any]:
    """Facts about the machine and the work, for profile.json."""
    cuda = world.device.type == "cuda"
    return {
        "format": FORMAT,
        "device": torch.cuda.get_device_name(world.device) if cuda else _processor(),
        "device_type": world.device.type,
        "world_size": world.size,
        "nodes": len(set(world.nodes)),
        "global_batch": config.train.global_batch,
        "crop": config.data.crop,
        "data": config.data.train,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "dali": versions_of_training()["DALI"],
        },
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def profile_of(rows: Sequence[dict[str, Any]], batch: int) -> dict[str, Any]:
    """Numbers of all ranks together, and one row per rank. A step takes as long as on its slowest rank; CPU time is the
    sum."""
    report: dict[str, Any] = {"steps": rows[0]["step"].steps}
    for name in ("step", "loader", "both"):
        report[name] = _together([row[name] for row in rows], batch) if rows[0][name] else None
    report["all_reduce"] = None
    if rows[0]["all_reduce"]:
        mb, ms = rows[0]["all_reduce"][0], max(row["all_reduce"][1] for row in rows)
        report["all_reduce"] = {"mb": mb, "ms": ms, "step_share": ms / report["step"]["step_ms"]}
    memory = {f"peak_{where}_mb": [row[f"peak_{where}_mb"] for row in rows] for where in ("host", "device")}
    report["memory"] = {name: None if None in values else max(values) for name, values in memory.items()}
    report["ranks"] = [_flat(row) for row in rows]
    return report


def _together(stretches: Sequence[Stretch], batch: int) -> dict[str, Any]:
    steps, seconds = stretches[0].steps, max(stretch.seconds for stretch in stretches)
    images = steps * batch
    return {
        "steps": steps,
        "images": images,
        "images_per_s": images / seconds,
        "step_ms": 1000 * seconds / steps,
        "cpu_ms_per_image": 1000 * sum(stretch.cpu_seconds for stretch in stretches) / images,
        "data_wait_share": max(stretch.waited_seconds / stretch.seconds for stretch in stretches),
    }


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """Row of profile.json of one rank. `images` are those of its steps."""
    flat = {name: row[name] for name in ("rank", "host", "forward_backward_ms", "peak_host_mb", "peak_device_mb")}
    flat["images"] = row["step"].images
    for name in ("step", "loader", "both"):
        if stretch := row[name]:
            flat[f"{name}_images_per_s"] = stretch.images / stretch.seconds
            flat[f"{name}_cpu_ms_per_image"] = 1000 * stretch.cpu_seconds / stretch.images
    if row["both"]:
        flat["data_wait_share"] = row["both"].waited_seconds / row["both"].seconds
    return flat


def describe(report: dict[str, Any]) -> str:
    """Summary of the report in about ten lines."""
    step, loader, both, reduce = (report[name] for name in ("step", "loader", "both", "all_reduce"))
    nodes = f" on {report['nodes']} nodes" if report["nodes"] > 1 else ""
    how = "compiled" if report["process"]["compiled"] else "not compiled"
    precision = "float32" if report["precision"] == "off" else report["precision"]
    rows = [
        ("on", f"{_counted(report['world_size'], 'process', 'es')}{nodes}, {report['device']}"),
        ("net", f"{report['model']}, {report['parameters']:,} parameters, {precision}, {how}"),
        ("step", f"{_rate(step)} without data: {step['step_ms']:,.0f} ms for a batch of {report['global_batch']}"),
    ]
    cpu = f"{_short(step['cpu_ms_per_image'])} ms per image without data"
    if loader and both:
        rows.append(("loader", f"{_rate(loader)} by itself"))
        rows.append(("both", f"{_rate(both)} with data; {both['data_wait_share']:.1%} of the time waits for data"))
        cpu += f", {_short(both['cpu_ms_per_image'])} with; the loader by itself {_short(loader['cpu_ms_per_image'])}"
    else:
        classes = report["config"]["model.outputs"] or 1000
        why = f"{report['data']} does not exist; the step saw random images of {classes} classes"
        rows.append(("loader", f"not measured: {why}"))
    if reduce:
        size, ms, share = f"{reduce['mb']:,.1f} MB", _short(reduce["ms"]), reduce["step_share"]
        rows.append(
            (
                "all-reduce",
                f"{size} in {ms} ms by itself, which is {share:.1%} of a step; there it overlaps the backward pass",
            )
        )
    rows.append(("CPU", cpu))
    memory = report["memory"]
    device = f", {memory['peak_device_mb']:,.0f} MB on the device" if memory["peak_device_mb"] is not None else ""
    rows.append(("memory", f"{memory['peak_host_mb']:,.0f} MB at most in a process{device}"))
    warm = report["warm_up"]
    built = "build, with two steps for DDP" if reduce else "build"
    rows.append(("warm-up", f"{warm['build_s']:.1f} s to {built}, {warm['first_steps_s']:.1f} s for the first steps"))
    rows += _slowest(report["ranks"])
    return "\n".join(f"{label:>10}  {text}" for label, text in rows)


def _slowest(ranks: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """The slowest ranks, as rows."""

    def spread(key: str, unit: str, *, slow_is_high: bool) -> str:
        slow, *_, fast = sorted(ranks, key=lambda rank: float(rank[key]), reverse=slow_is_high)
        fastest = f"the fastest, rank {fast['rank']} on {fast['host']}: {_short(fast[key])}"
        return f"the slowest is rank {slow['rank']} on {slow['host']}: {_short(slow[key])} {unit} ({fastest})"

    if len(ranks) == 1:
        return []
    rows = [("computing", spread("forward_backward_ms", "ms forward and backward", slow_is_high=True))]
    if "loader_images_per_s" in ranks[0]:
        rows.append(("loading", spread("loader_images_per_s", "images/s", slow_is_high=False)))
    return rows


def _counted(number: int, word: str, plural: str) -> str:
    return f"{number} {word}{plural if number > 1 else ''}"


def _rate(found: dict[str, Any]) -> str:
    return f"{found['images_per_s']:,.0f} images/s"


def _short(number: float) -> str:
    """Three figures."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _write(report: dict[str, Any], path: Path) -> None:
    try:
        write_atomically(path, (json.dumps(report, indent=1, ensure_ascii=False) + "\n").encode())
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error.strerror}): choose another place with --out") from error
