"""Sets that are read through a cache: their shards are fetched ahead of need, and waiting for one is no hang."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from dist_train.config import Config
from dist_train.outcomes import Unread
from dist_train.ranks.watch import Watch
from dist_train.ranks.world import World
from dist_train.rundir.directory import RunDirectory
from pipelines.loader import Loader
from pipelines.opened import ReadError
from pipelines.remote.ahead import Ahead

T = TypeVar("T")


class Fetching:
    """This rank's part in fetching. The first rank of a node has the shards fetched for all ranks there, by a process
    that ends with it; each rank says what it waits for.

    Args:
        loaders: of the training and the validation set.
    """

    def __init__(
        self, config: Config, world: World, watch: Watch, run: RunDirectory, loaders: tuple[Loader, Loader]
    ) -> None:
        self._loaders, self._epochs = loaders, config.train.epochs
        every = config.run.step_timeout / 10

        def waits(sentence: str, moved: bool) -> None:
            if moved:
                watch.wait()
            if sentence:
                run.waiting.write(world.rank, sentence, moved=moved, every=every)

        for loader in loaders:
            loader.shards.hurried, loader.shards.waiting = lambda: watch.stop, waits
        self._ahead = Ahead() if config.data.cache and world.leads else None

    def follow(self, epoch: int, step: int = 0) -> None:
        """Has fetched, in this order: the epoch from this step on, the validation set, and the next epoch."""
        if self._ahead:
            train, val = self._loaders
            after = [(train.shards, train.upcoming(epoch + 1, 0))] if epoch + 1 < self._epochs else []
            coming = [(train.shards, train.upcoming(epoch, step)), (val.shards, val.upcoming(0, 0)), *after]
            self._ahead.follow(coming)

    def close(self) -> None:
        """Ends the process that fetches."""
        if self._ahead:
            self._ahead.close()


def read_together(world: World, work: Callable[[], T], **how: Any) -> T | None:
    """As `World.together`, but raises Unread, on all ranks, for a read that may succeed another time."""
    unread: list[ReadError] = []

    def read() -> T | None:
        try:
            return work()
        except ReadError as error:
            unread.append(error)
        return None

    def tell() -> None:
        for error in unread:
            raise error

    found = world.together(read, **how)
    world.together(tell, failure=Unread)
    return found
