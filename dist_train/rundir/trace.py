"""Where the time of recorded steps went, from a trace of torch's profiler. Imports no torch.

A trace is one JSON object in Chrome's trace event format, as kineto, the library behind that profiler, writes it (its
output_json.cpp). Of `traceEvents` those are read that have a duration ("ph": "X"), each with `name`, `cat`, `ts` and
`dur` in microseconds, and `tid`. Its `cat` is user_annotation for a named range of the program, cpu_op for an operator,
kernel, gpu_memcpy or gpu_memset for what a GPU did, on whatever stream.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipelines.speech import in_line

STEP = "ProfilerStep#"  # begins the name of the range of a step; viewers know it
PART = "train."  # begins the names of the ranges of its parts
PARTS = ("data", "step", "save")
MOST = 10  # operators or kernels that are named
LONGEST, SHOWN = 400, 76  # characters of their names in the summary, and on a terminal
DECODES = ("dali::", "nvjpeg", "nvimgcodec")  # parts of the names of kernels that prepare images
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")

Event = dict[str, Any]
Spans = Sequence[tuple[float, float]]  # from, to


@dataclass(frozen=True)
class Costly:
    """An operator or a kernel: its own time in ms, as a share of the window too, and how often it began."""

    name: str
    ms: float
    share: float
    calls: int


@dataclass(frozen=True)
class Breakdown:
    """Where the time of the recorded steps of one rank went.

    Attributes:
        first, last: steps, from 1.
        seconds: of the window, from the begin of the first step to the end of the last one.
        host: shares of the window that the main thread spent on `data` (waiting for the loader), `step` (forward,
            backward, update: on a GPU its launch), `save`, and `other`; they sum to 1.
        gpu: shares of the window that the GPU spent on `compute`, `communication` (not hidden behind compute), `data`
            and `idle`, as defined in `gpu_shares`; they sum to 1. None if the trace has no GPU.
        most: the kernels, or without a GPU the operators, that took most time.
    """

    first: int
    last: int
    seconds: float
    host: dict[str, float]
    gpu: dict[str, float] | None
    most: list[Costly]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> list[str]:
        """Lines for a terminal."""
        steps = self.last - self.first + 1
        lines = [
            f"profile of steps {self.first} to {self.last}: {1000 * self.seconds / steps:.1f} ms each; "
            f"main thread: {_percentages(self.host)}"
        ]
        if self.gpu:
            lines.append(f"GPU: {_percentages(self.gpu)}")
        lines.append(
            f"{'ms':>9} {'share':>6} {'calls':>6}  {'kernel' if self.gpu else 'operator (without those it calls)'}"
        )
        rows = ((f"{c.ms:9.1f} {c.share:6.1%} {c.calls:6d}  ", in_line(c.name)) for c in self.most)
        return lines + [numbers + (name if len(name) <= SHOWN else name[: SHOWN - 3] + "...") for numbers, name in rows]


def _percentages(shares: dict[str, float]) -> str:
    return ", ".join(f"{name} {share:.1%}" for name, share in shares.items())


def breakdown(trace: dict[str, Any]) -> Breakdown | None:
    """Where the time went; None if the trace has no step."""
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    ranges = [event for event in events if event.get("cat") == "user_annotation"]
    steps = {int(event["name"].removeprefix(STEP)): event for event in ranges if event["name"].startswith(STEP)}
    if not steps:
        return None
    window = (min(map(_begin, steps.values())), max(map(_end, steps.values())))
    events = [event for event in events if _end(event) > window[0] and _begin(event) < window[1]]
    gpu = [event for event in events if event.get("cat") in ON_GPU]
    waits, *others = (_spans(event for event in ranges if event["name"] == PART + name) for name in PARTS)
    host = dict(zip((*PARTS, "other"), shares(window, waits, *others), strict=True))
    own = _clipped(gpu, window) if gpu else own_times(e for e in events if e.get("cat") == "cpu_op")
    most = _most(own, window[1] - window[0])
    seconds = (window[1] - window[0]) / 1e6
    return Breakdown(min(steps), max(steps), seconds, host, gpu_shares(window, gpu, waits) if gpu else None, most)


def gpu_shares(window: tuple[float, float], events: Iterable[Event], waits: Spans) -> dict[str, float]:
    """What a GPU did in a window, as shares of it that sum to 1. Each moment counts once, for the first that applies:

    compute         a kernel that is none of the following runs on any stream, or memory of the GPU is set or copied
    communication   a kernel of NCCL's runs, which nothing above hides
    data            images come from the host (Memcpy HtoD) or are decoded (a kernel of DALI's or nvJPEG's), or nothing
                    runs at all while the main thread waits for the loader
    idle            the rest: copies to the host at most

    Args:
        events: of the GPU.
        waits: spans in which the main thread waits for the loader.
    """
    classes = defaultdict[str, list[Event]](list)
    for event in events:
        classes[_class(event)].append(event)
    compute, communication, data = (_spans(classes[name]) for name in ("compute", "communication", "data"))
    names = ("compute", "communication", "data", "idle")
    return dict(zip(names, shares(window, compute, communication, [*data, *waits]), strict=True))


def _class(event: Event) -> str:
    name = event["name"]
    if event["cat"] == "gpu_memcpy":
        return "data" if "HtoD" in name else "to the host" if "DtoH" in name else "compute"
    if "nccl" in name:  # ncclDevKernel_AllReduce_Sum_f32_RING_LL; before NCCL 2.19 ncclKernel_AllReduce_...
        return "communication"
    return "data" if any(word in name for word in DECODES) else "compute"


def shares(window: tuple[float, float], *classes: Spans) -> list[float]:
    """The share of a window that the spans of each class cover, where no class before it does; and what is left."""
    covered = list[tuple[float, float]]()
    reach = [0.0]
    for spans in classes:
        covered = _union([*covered, *((max(a, window[0]), min(b, window[1])) for a, b in spans)])
        reach.append(sum(b - a for a, b in covered) / (window[1] - window[0]))
    return [after - before for before, after in zip(reach, [*reach[1:], 1.0], strict=True)]


def _union(spans: Spans) -> list[tuple[float, float]]:
    """The same moments as spans that do not touch, in order."""
    found = list[tuple[float, float]]()
    for begin, end in sorted(span for span in spans if span[0] < span[1]):
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((begin, end))
    return found


def own_times(operators: Iterable[Event]) -> Iterator[tuple[str, float]]:
    """The name of each operator and its microseconds without those of the operators that it calls, which lie within it
    on the same thread."""
    for _, thread in sorted(_by_thread(operators).items()):
        thread.sort(key=lambda event: (event["ts"], -event["dur"]))
        own, around = [event["dur"] for event in thread], list[int]()
        for i, event in enumerate(thread):
            while around and _end(thread[around[-1]]) <= event["ts"]:
                around.pop()
            if around:
                own[around[-1]] -= event["dur"]
            around.append(i)
        yield from zip((event["name"] for event in thread), own, strict=True)


def _by_thread(events: Iterable[Event]) -> dict[str, list[Event]]:
    threads = defaultdict[str, list[Event]](list)
    for event in events:
        threads[str(event["tid"])].append(event)
    return threads


def _clipped(events: Iterable[Event], window: tuple[float, float]) -> Iterator[tuple[str, float]]:
    return ((event["name"], min(_end(event), window[1]) - max(_begin(event), window[0])) for event in events)


def _most(times: Iterable[tuple[str, float]], whole: float) -> list[Costly]:
    total, calls = Counter[str](), Counter[str]()
    for name, time in times:
        total[name] += time  # type: ignore[assignment]  # a Counter takes any number
        calls[name] += 1
    return [Costly(name[:LONGEST], time / 1e3, time / whole, calls[name]) for name, time in total.most_common(MOST)]


def _spans(events: Iterable[Event]) -> list[tuple[float, float]]:
    return [(_begin(event), _end(event)) for event in events]


def _begin(event: Event) -> float:
    return float(event["ts"])


def _end(event: Event) -> float:
    return float(event["ts"] + event["dur"])
