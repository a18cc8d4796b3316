"""Run tasks in processes with one progress bar."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context, parent_process
from threading import Thread
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")
R = TypeVar("R")
_count: Any = None  # in a worker: number of images that all workers have done


def tick() -> None:
    """Count one image as done, in a worker."""
    with _count.get_lock():
        _count.value += 1


def parallel(work: Callable[[T], R], tasks: Sequence[T], *, workers: int, images: int | None, label: str) -> list[R]:
    """`[work(task) for task in tasks]` in processes, which call `tick` once per image.

    The first error ends all workers and is raised; ChildProcessError if a worker was killed.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload([work.__module__])  # its imports take seconds: once, not once per worker
    count = context.Value("q", 0)
    pool = ProcessPoolExecutor(max(1, min(workers, len(tasks))), context, _start, (count,))
    interval = 0.1 if sys.stderr.isatty() else 10
    try:
        with tqdm(total=images, desc=label, unit="img", mininterval=interval, dynamic_ncols=True) as bar:
            futures = [pool.submit(work, task) for task in tasks]
            pending = set(futures)
            while pending:
                done, pending = wait(pending, 0.2, FIRST_COMPLETED)
                bar.update(count.value - bar.n)
                for future in done:
                    future.result()
        pool.shutdown()
        return [future.result() for future in futures]
    except BaseException as error:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in active_children():
            child.kill()
        if isinstance(error, BrokenProcessPool):
            raise ChildProcessError(
                f"{label}: a worker was killed, perhaps for want of memory: repeat the command with fewer --workers"
            ) from error
        raise


def _start(count: Any) -> None:
    global _count
    _count = count
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """A killed parent must not leave workers behind that still write."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
