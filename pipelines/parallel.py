"""Tasks in worker processes, with one progress bar."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing import active_children, get_context, parent_process
from multiprocessing.util import get_temp_dir
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, TypeVar

from pipelines.limits import Limits, apply, limits
from pipelines.speech import bar

T = TypeVar("T")
R = TypeVar("R")
SOCKET = 107 - len("/pymp-xxxxxxxx/listener-xxxxxxxx")  # longest folder of a socket, in bytes: unix(7)
_count: Any = None  # in a worker: images done by all workers


def tick() -> None:
    """Counts one image as done; called in a worker."""
    with _count.get_lock():
        _count.value += 1


def parallel(
    work: Callable[[T], R], tasks: Sequence[T], *, workers: int, images: int, label: str, done: int = 0
) -> list[R]:
    """`[work(task) for task in tasks]` in worker processes, which call `tick` once per image.

    The first error ends all workers and is raised; ChildProcessError if a worker was killed.

    Args:
        images: in all; a guess is corrected at the end.
        done: those of them that an earlier start has done.
    """
    _place_socket()
    context = get_context("forkserver")
    if _found_first(work.__module__):
        context.set_forkserver_preload([work.__module__])  # import it once, not once per worker: it takes seconds
    count = context.Value("q", 0)
    pool = ProcessPoolExecutor(max(1, min(workers, len(tasks))), context, _start, (count, limits()))
    try:
        with bar(images, label, "img", initial=done, lines=True) as shown:
            futures, ended = [pool.submit(work, task) for task in tasks], SimpleQueue[Future[R]]()
            for future in futures:  # `wait` would look at all of them each time
                future.add_done_callback(ended.put)
            left = len(futures)
            while left:
                with suppress(Empty):
                    ended.get(timeout=0.2).result()
                    left -= 1
                if left:  # otherwise the bar is shown for the last time when it is closed
                    shown.update(done + count.value - shown.n)
            shown.n = shown.total = done + count.value
        pool.shutdown()
        return [future.result() for future in futures]
    except BaseException as error:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in active_children():
            child.kill()
        if isinstance(error, BrokenProcessPool):
            raise ChildProcessError(
                f"{label}: a worker was killed, perhaps for lack of memory: repeat the command with fewer --workers"
            ) from error
        raise


def _found_first(module: str) -> bool:
    """Whether the fork server, which looks in the current directory first, would import this module, and not another of
    its name. The workers look where this process does."""
    package = module.partition(".")[0]
    here, other = getattr(sys.modules.get(package), "__file__", None), Path.cwd() / package
    return not other.exists() or (here is not None and other.resolve() == Path(here).resolve().parent)


def _place_socket() -> None:
    """Puts the fork server's socket into /tmp if TMPDIR is too long for it, as a job's may be."""
    usual = tempfile.gettempdir()
    if len(os.fsencode(usual)) > SOCKET:
        try:
            tempfile.tempdir = "/tmp"
            get_temp_dir()  # caches it
        finally:
            tempfile.tempdir = usual


def _start(count: Any, chosen: Limits) -> None:
    global _count
    _count = count
    apply(chosen)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")  # odd EXIF blocks, amid the bar
    Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """Ends this worker with its parent: a killed parent must not leave workers that still write."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
