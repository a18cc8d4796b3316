"""pytest plugin: failing tests show how each rank of their runs ended, and Ctrl-C works wherever tests are started."""

from __future__ import annotations

import shutil
import signal
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.helpers import launch


def pytest_configure() -> None:
    """A shell's `make test &` has SIGINT ignored, by all that it starts."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Among several workers, a file being one worker's (`--dist loadfile`), Slurm's and what takes longest come first,
    so that nobody begins with them last."""
    waits = Counter(item.path for item in items if item.get_closest_marker("integration"))
    items.sort(key=lambda item: (not item.get_closest_marker("slurm"), -waits[item.path]))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if report.failed:
        for run in launch.STARTED:
            report.sections.append((f"{' '.join(run.process.args)}", run.tails()))
    return report


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish() -> None:
    """The next test begins with no runs, and their output goes."""
    for run in launch.STARTED:
        shutil.rmtree(run.folder, ignore_errors=True)
    launch.STARTED.clear()
