"""Records some steps of a run with torch's profiler: a trace of each rank for a viewer, and where the time went."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

from torch.profiler import ProfilerActivity, profile, record_function

from dist_train.config import ProfileConfig
from dist_train.ranks.world import World
from dist_train.rundir import trace
from dist_train.rundir.directory import RunDirectory
from dist_train.rundir.state import Progress
from pipelines.files import folder, read_file, write_atomically
from pipelines.loader import Batch

FOLDER, SUMMARY = "profile", "summary.json"
WARM_UP = 20  # steps of a start after which all is as in any later step: compiled, DDP's buckets final, queues filled
LEAD = 2  # steps recorded before the first that counts: some of what a GPU does in it was launched then
VIEWER = "https://ui.perfetto.dev"


class Profile:
    """Records nothing."""

    def batches(self, epoch: Iterator[Batch], progress: Progress, steps: int) -> Iterator[Batch]:
        """The batches that an epoch of so many steps has left, of which some may be recorded."""
        return epoch

    def span(self, name: str) -> AbstractContextManager[object]:
        """Marks a part of a step, one of `trace.PARTS`."""
        return nullcontext()

    def end(self) -> None:
        """Stops recording, if it goes on, and writes what there is. For the normal way out of an epoch: what is
        recorded when a step raises is left, since a GPU that hangs does not let go of it."""

    def close(self, step: int) -> None:
        """Says, after the last step of the run, if none was recorded."""


def profile_as(config: ProfileConfig, world: World, run: RunDirectory) -> Profile:
    """What records the steps that are to be recorded."""
    return Recorder(config, world, run) if config.steps else Profile()


class Recorder(Profile):
    """Records one window of consecutive steps: those from `profile.at` on, if so many are left of their epoch, else the
    first of the next epoch, so that no validation is among them. Whatever fails here is said, and training goes on."""

    def __init__(self, config: ProfileConfig, world: World, run: RunDirectory) -> None:
        self._config, self._world, self._run = config, world, run
        self._first = -1  # step before the window, once it is known
        self._over = False
        self._profile: profile | None = None

    def batches(self, epoch: Iterator[Batch], progress: Progress, steps: int) -> Iterator[Batch]:
        if self._first < 0:
            self._first = self._config.at - 1 if self._config.at > progress.step else progress.step + WARM_UP
        now, end = progress.step, progress.step - progress.step_in_epoch + steps
        size, first = min(self._config.steps, steps), max(now, self._first)
        if self._over or first + size > end:
            self._first = max(first, end)
            yield from epoch
            return
        begin = max(now, first - LEAD)
        yield from islice(epoch, begin - now)
        self._begin()
        for step in range(begin, first + size):
            with self._range(f"{trace.STEP}{step + 1}") if step >= first else nullcontext():
                with self.span("data"):
                    batch = next(epoch)
                yield batch
        self.end()
        yield from epoch

    def span(self, name: str) -> AbstractContextManager[object]:
        return self._range(trace.PART + name)

    def _range(self, name: str) -> AbstractContextManager[object]:
        return record_function(name) if self._profile else nullcontext()

    def _begin(self) -> None:
        self._over = True
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else it tells the terminal that there is no GPU
        activities = [ProfilerActivity.CPU]
        if self._world.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        try:
            self._profile = profile(activities=activities)
            self._profile.start()
        except Exception as error:
            self._profile = None
            self._say(f"nothing is recorded ({type(error).__name__}: {error})")

    def end(self) -> None:
        recorded, self._profile = self._profile, None
        if recorded is None:
            return
        try:
            recorded.stop()
            if self._run.lease.holds():
                self._write(recorded)
        except Exception as error:
            self._say(f"the trace is lost ({type(error).__name__}: {error})")

    def close(self, step: int) -> None:
        if self._first >= 0 and not self._over:
            due = f"the run ended at step {step}, and step {self._first + 1} was to be the first"
            self._run.say(f"profile: nothing is recorded: {due}: name an earlier one by --profile.at")

    def _write(self, recorded: profile) -> None:
        place, name = self._run.path / FOLDER, f"rank-{self._world.rank}.json.gz"
        with TemporaryDirectory() as scratch:  # private: the profiler writes a name as it finds it, be it a link
            path = Path(scratch) / "trace.json"
            recorded.export_chrome_trace(str(path))
            text = read_file(path)
        found = trace.breakdown(json.loads(text))
        if found is None:
            return
        folder(place)
        write_atomically(place / name, gzip.compress(text, mtime=0), durable=False)
        if self._world.rank == 0:
            about = found.as_dict() | {"rank": 0, "device": self._world.device.type, "trace": name}
            write_atomically(place / SUMMARY, json.dumps(about, indent=1).encode(), durable=False)
            shares = {"host": found.host, "gpu": found.gpu}
            self._run.events.append("profile", step=found.last, first=found.first, seconds=found.seconds, **shares)
            for line in [*found.text(), f"its trace: open {place / name} in {VIEWER}"]:
                self._run.say(line)

    def _say(self, what: str) -> None:
        self._run.say(f"profile: {what}: training goes on")
