"""What is recorded of a step and of a validation."""

from __future__ import annotations

import resource
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from dist_train.config import Config
from dist_train.monitor.gpus import GpuSample, GpuSampler, by_node
from dist_train.monitor.terminal import Terminal
from dist_train.ranks.world import World
from dist_train.rundir.directory import RunDirectory
from dist_train.rundir.state import Progress, Step, TrainState
from dist_train.validate import Scores
from pipelines.loader import Loader


class Reporter:
    """Turns steps and validations into records.

    A record is of the steps since the one before: its window. What depends on the machine is of those of them that this
    start has taken.

    Args:
        loader: of the training set, for the seconds that this rank waited for data.
    """

    def __init__(self, config: Config, world: World, run: RunDirectory, terminal: Terminal, loader: Loader) -> None:
        self._config, self._world, self._run, self._terminal, self._loader = config, world, run, terminal, loader
        self._sampler = GpuSampler.of(world.device, run.say)
        self._told = 0.0  # seconds of waiting of this rank that the votes know
        self._epoch_began = time.monotonic()
        self._bad: int | None = None  # bad samples that were told
        # Of the window, as far as this start has taken it:
        self._stepping, self._saving = 0.0, 0.0  # seconds of the ledger when it began
        self._ends = deque[float]()  # the same, at the end of each step whose sums are not known yet
        self._steps = 0
        self._waited = [0.0] * world.size
        self._memory = 0.0
        self._samples: list[GpuSample] = []

    def begin_epoch(self, progress: Progress) -> None:
        self._terminal.begin_epoch(progress, self._config.train.epochs, self._loader.steps)
        self._epoch_began = time.monotonic()
        if self._bad is None:
            self._bad = progress.bad_samples

    def row(self, step: Step) -> tuple[float, ...]:
        """What this rank tells of itself with the vote of a step: the seconds that it has waited for data since the
        last one, and at a step that is recorded its largest memory so far in MB; on a GPU also a `GpuSample`."""
        self._ends.append(self._run.ledger.stepping)
        waited, self._told = self._loader.waited - self._told, self._loader.waited
        memory, due = 0.0, self._due(step)
        if due:
            memory = self._peak()
        if self._world.device.type != "cuda":
            return waited, memory
        sample = self._sampler.latest() if due and self._sampler else None
        if due and self._sampler:
            self._sampler.sample()  # for the next record
        return waited, memory, *(sample or GpuSample())

    def step(self, step: Step, rows: Sequence[tuple[float, ...]], state: TrainState, *, last: bool) -> None:
        """A step whose sums are known, and are in `state.window`.

        Args:
            rows: what each rank has told of itself; see `row`.
            last: the run ends with it, so it is recorded whether or not it is one of every `log_every`.
        """
        self._run.ledger.waited(max(waited for waited, *_ in rows))
        self._steps, end = self._steps + 1, self._ends.popleft()
        self._waited = [sum(pair) for pair in zip(self._waited, (row[0] for row in rows), strict=True)]
        self._memory = max(self._memory, *(row[1] for row in rows))
        if self._due(step) or last:
            self._samples = [GpuSample(*row[2:]) for row in rows]
            self._record(step, state, end)
        self._terminal.tick()
        self._run.status.heartbeat(step=step.number, epoch=step.epoch)

    def validation(self, scores: Scores, state: TrainState, lr: float) -> None:
        """The validation of an epoch; `lr`: of its last step."""
        values = asdict(scores) | state.window.epoch_means(self._config.train.global_batch)
        seconds = {"seconds": self._run.ledger.last, "epoch_seconds": time.monotonic() - self._epoch_began}
        self._append("validation", state.progress, lr=lr, **values, machine=_rounded(seconds))

    def division(self, error: float, chance: float, lr: float, progress: Progress) -> None:
        """The learning rate is divided after a validation error of `error`, to `lr`; `chance`: the error of a net that
        always names the most common class."""
        where = {"step": progress.step, "epoch": progress.epoch}
        self._run.events.append("division", **where, lr=lr, error=error)
        text = f"learning rate divided by {self._config.schedule.factor:g}"
        if error >= chance:
            text += (
                f", but the net is still no better than always naming the most common class ({chance:.2%}): raise "
                f"schedule.patience, or move schedule.milestones"
            )
            self._run.events.append("alert", **where, sentence=text)
        self._run.say(text)

    def probe(self, values: dict[str, Any], progress: Progress, lr: float) -> None:
        """What `dist_train.probe` measured before a step."""
        self._append("probe", progress, lr=lr, **values)

    def _due(self, step: Step) -> bool:
        return step.number % self._config.monitor.log_every == 0

    def _record(self, step: Step, state: TrainState, end: float) -> None:
        batch = self._config.train.global_batch
        fraction = step.epoch + (step.step_in_epoch + 1) / self._loader.steps
        values: dict[str, Any] = {"progress": fraction, "images": step.number * batch}
        values |= state.window.means(batch) | {"lr": step.lr}
        if state.progress.bad_samples:
            values["bad_samples"] = state.progress.bad_samples
        if state.progress.bad_samples != self._bad:
            self._bad = state.progress.bad_samples
            self._run.events.append("bad_samples", step=step.number, epoch=step.epoch, samples=self._bad)
        self._run.record.append("step", step=step.number, epoch=step.epoch, **values, machine=self._machine(batch, end))
        state.window.clear()

    def _machine(self, batch: int, end: float) -> dict[str, Any]:
        """Of the window, which the step ended that the ledger had so many seconds after; the next one begins."""
        ledger, size = self._run.ledger, self._world.size
        seconds = max(1e-9, end - self._stepping)
        worst = max(range(size), key=self._waited.__getitem__)
        numbers: dict[str, Any] = {
            "images_per_s": self._steps * batch / seconds,
            "data_wait": min(1.0, sum(self._waited) / size / seconds),
            "data_wait_worst": min(1.0, self._waited[worst] / seconds),
            "worst_rank": worst,
            "worst_node": self._world.nodes[worst],
            "memory_mb": self._memory or self._peak(),
        }
        if nodes := by_node(self._samples, self._world.nodes):
            numbers["nodes"] = {node: _rounded(values) for node, values in nodes.items()}
        if saving := ledger.seconds["saving"] - self._saving:
            numbers["save_seconds"] = saving  # that training stood still
        if (took := self._run.store.took()) is not None:
            numbers["save_write_seconds"] = took  # beside it
        self._stepping, self._saving = end, ledger.seconds["saving"]
        self._steps, self._waited, self._memory = 0, [0.0] * size, 0.0
        return _rounded(numbers)

    def _peak(self) -> float:
        """The largest memory of this rank so far, of the device or on the CPU of the process, in MB (10^6 bytes)."""
        if self._world.device.type == "cuda":
            return torch.cuda.max_memory_reserved(self._world.device) / 1e6
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6

    def _append(self, kind: str, progress: Progress, **values: Any) -> None:
        images = progress.step * self._config.train.global_batch
        self._run.record.append(kind, step=progress.step, epoch=progress.epoch, images=images, **values)


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    """To a thousandth: what clocks measure is no more certain than that."""
    return {key: round(value, 3) if isinstance(value, float) else value for key, value in values.items()}
