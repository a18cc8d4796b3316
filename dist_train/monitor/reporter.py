"""The record of steps and validations."""

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
    """Turns steps and validations into lines of the record.

    A line covers the steps since the previous one: its window. What depends on the machine covers those of them that
    this start has taken.

    Args:
        loader: of the training set, for this rank's wait for data.
    """

    def __init__(self, config: Config, world: World, run: RunDirectory, terminal: Terminal, loader: Loader) -> None:
        self._config, self._world, self._run, self._terminal, self._loader = config, world, run, terminal, loader
        self._sampler = GpuSampler.of(world.device, run.say)
        self._told = 0.0  # this rank's seconds of waiting that were told with votes
        self._epoch_began = time.monotonic()
        self._bad: int | None = None  # bad samples already reported
        # Of those steps of the window that this start has taken:
        self._stepping, self._saving = 0.0, 0.0  # seconds in the ledger when the window began
        self._ends = deque[float]()  # the same, at the end of each step whose vote is not read yet
        self._steps = 0
        self._waited = [0.0] * world.size
        self._memory = 0.0
        self._samples: list[GpuSample] = []

    def begin_epoch(self, progress: Progress) -> None:
        self._terminal.begin_epoch(progress, self._config.train, self._loader.steps)
        self._epoch_began = time.monotonic()
        if self._bad is None:
            self._bad = progress.bad_samples

    def row(self, step: Step) -> tuple[float, ...]:
        """This rank's own numbers in the vote of a step: seconds waited for data since the last one, and at a recorded
        step its peak memory so far in MB; on a GPU also a `GpuSample`."""
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
        """Takes a step whose sums are in `state.window`.

        Args:
            rows: each rank's own numbers; see `row`.
            last: the run ends with this step, so it is recorded whatever `log_every` is.
        """
        self._terminal.tick()
        self._run.ledger.waited(max(waited for waited, *_ in rows))
        self._steps, end = self._steps + 1, self._ends.popleft()
        self._waited = [sum(pair) for pair in zip(self._waited, (row[0] for row in rows), strict=True)]
        self._memory = max(self._memory, *(row[1] for row in rows))
        if self._due(step) or last:
            self._samples = [GpuSample(*row[2:]) for row in rows]
            self._record(step, state, end)
        self._run.status.heartbeat(step=step.number, epoch=step.epoch)

    def begin_validation(self, progress: Progress, batches: int) -> None:
        self._terminal.begin_validation(progress, batches)

    def validated(self) -> None:
        """One batch of the validation is done."""
        self._terminal.validated()
        self._run.status.heartbeat()

    def validation(self, scores: Scores, state: TrainState, lr: float) -> None:
        """Records the validation of an epoch; `lr`: of its last step."""
        values = asdict(scores) | state.window.epoch_means(self._config.train.global_batch)
        seconds = {"seconds": self._run.ledger.last, "epoch_seconds": time.monotonic() - self._epoch_began}
        self._append("validation", state.progress, lr=lr, **values, machine=_rounded(seconds))

    def division(self, divisor: float, error: float, chance: float, lr: float, progress: Progress, remedy: str) -> None:
        """Reports that the learning rate was divided, to `lr`, after a validation error of `error`; `chance`: the error
        of always predicting the most common class; `remedy`: what to do if the net is no better than that."""
        where = {"step": progress.step, "epoch": progress.epoch}
        self._run.events.append("division", **where, lr=lr, error=error)
        text = f"learning rate divided by {divisor:g}, to {lr:g}"
        if error >= chance:
            text += (
                f", but the net is still no better than always naming the most common class ({chance:.2%}): {remedy}"
            )
            self._run.events.append("alert", **where, sentence=text)
        self._run.say(text)

    def probe(self, values: dict[str, Any], progress: Progress, lr: float) -> None:
        """Records what `dist_train.probe` measured before a step."""
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
        """The machine's numbers of the window, whose last step ended at `end` seconds of the ledger; begins another."""
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
        """Peak memory of this rank so far in MB (10^6 bytes): of the GPU, or of the process on the CPU."""
        if self._world.device.type == "cuda":
            return torch.cuda.max_memory_reserved(self._world.device) / 1e6
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6

    def _append(self, kind: str, progress: Progress, **values: Any) -> None:
        images = progress.step * self._config.train.global_batch
        self._run.record.append(kind, step=progress.step, epoch=progress.epoch, images=images, **values)


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    """Rounded to thousandths, the precision of the clocks."""
    return {key: round(value, 3) if isinstance(value, float) else value for key, value in values.items()}
