"""When the state of a run is saved."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, NoReturn

from dist_train.config import CheckpointConfig
from dist_train.outcomes import BadData, NotSaved, Stopped, Unread
from dist_train.ranks.world import World
from dist_train.rundir.checkpoint import newest_name
from dist_train.rundir.directory import RunDirectory
from dist_train.rundir.state import TrainState
from pipelines.loader import Unreadable
from pipelines.manifest import ShardError
from pipelines.opened import ReadError


class Saver:
    """Saves by steps, by the clock and at epochs, and makes sure that the last state is saved.

    Args:
        meta: entries of a checkpoint's meta.json, besides the progress.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        world: World,
        run: RunDirectory,
        state: TrainState,
        meta: dict[str, Any],
    ) -> None:
        self._config, self._world, self._run, self._state = config, world, run, state
        self.meta = meta
        self._saved_at = time.monotonic()
        self._saved_step = -1

    def due_by_clock(self) -> bool:
        """Whether a save is due by the clock; asked of rank 0 only."""
        minutes = self._config.minutes
        return self._world.rank == 0 and minutes > 0 and time.monotonic() - self._saved_at > 60 * minutes

    def due(self, step: int) -> bool:
        """Whether the state after `step` steps is to be saved and is not yet: this is called twice for an epoch's last
        step."""
        every = self._config.steps
        return every > 0 and step % every == 0 and step != self._saved_step

    def check(self) -> None:
        """Raises the error of a save if the disk did not cause it: retrying would not help."""
        error = self._run.store.error
        if error and not isinstance(error, OSError):
            raise error

    def save(self, *, unless: Callable[[], bool] = lambda: False) -> None:
        """Save the state beside training; rank 0 writes. All ranks call it at the same step.

        Args:
            unless: whether to skip this save because another follows at once; rank 0 asks when the previous save is
                done, which may take a while.
        """
        with self._run.ledger.during("saving"):
            self._save(unless)

    def _save(self, unless: Callable[[], bool]) -> None:
        self._saved_at, self._saved_step = time.monotonic(), self._state.progress.step
        state = self._state.state_dict()  # on all ranks: towers on two ranks are merged
        if self._world.rank:
            return
        run = self._run
        run.store.join()
        if run.lease.lost or unless():
            return
        if run.store.error:
            run.say(f"the last save failed ({run.store.error}): {self._stands()}, trying again")
        state |= {"record": run.record.size, "ledger": run.ledger.state_dict()}
        run.store.save(state, self._state.progress.as_meta() | self.meta)

    def give_up(self, unread: Unreadable, *, saves: bool, stop: bool) -> NoReturn:
        """End the run on all ranks because one of them cannot read its samples. Raises Unread, BadData if their set
        cannot be used, or what `finish` raises; Stopped if the run was to stop anyway.

        Args:
            unread: the errors of this rank, if it is the one.
            saves: whether the state is that after the last step taken.
        """

        def tell(kind: type[ReadError | ShardError]) -> None:
            if unread and isinstance(unread[0], kind):
                raise unread[0]

        if saves:
            self.save()
        self.finish()
        if stop:
            raise Stopped
        self._world.together(partial(tell, ShardError), failure=BadData)  # another try would end the same way
        self._world.together(partial(tell, ReadError), failure=Unread)
        raise AssertionError("one of them has said so")

    def finish(self) -> None:
        """Wait for the last save, and retry once if it failed. Raises, on all ranks, LeaseLost, or NotSaved if it fails
        again."""
        run, share = self._run, self._world.share
        run.ledger.enter("saving")  # to the end of the run
        run.store.join()
        self.check()
        if share(bool(run.store.error) and not run.lease.lost):
            self.save()
            run.store.join()
        if lost := share(run.lease.lost):
            raise run.lease.loss(lost)
        failure = run.store.error or run.record.error
        message = f"({type(failure).__name__}: {failure}): {self._stands()}" if failure else ""
        if message := share(message):
            raise NotSaved(f"the last state could not be saved {message}")

    def _stands(self) -> str:
        """Words for messages: which checkpoint is left, as far as the disk answers."""
        with suppress(OSError):
            newest = newest_name(self._run.path)
            return f"the newest checkpoint is {newest}" if newest else "there is no checkpoint yet"
        return "older checkpoints, if any, are intact"
