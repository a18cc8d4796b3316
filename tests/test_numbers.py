"""Numbers of one's own in the record: one line in a net.

As a module this is the trainer of `tests.helpers.faults`, with a net that logs; $LOGGED says what.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_train import numbers, train
from dist_train.models.dropout import Dropout
from dist_train.monitor.names import named
from dist_train.numbers import Number, log
from dist_train.outcomes import BadNumbers
from dist_train.ranks import launcher
from dist_train.ranks.logged import Logged, PendingNumbers
from dist_train.ranks.world import World
from dist_train.rundir.state import Window
from pipelines.errors import UserError
from tests.helpers import adding, faults
from tests.helpers.compare import assert_same_run, newest, records, status
from tests.helpers.launch import STEPS, at, command, launch
from tests.test_tensorboard import reader, shown

CPU = torch.device("cpu")


def step(logging: Callable[[], None]) -> dict[str, tuple[float | None, int]]:
    """Result and number of elements of each number that is logged in a step."""
    numbers.open_step(CPU)
    logging()
    return {
        name: (number._replace(value=number.value.item()).result, number.elements)
        for (name, _), number in numbers.close_step().items()
    }


def test_all_elements_of_all_calls_count() -> None:
    """A mean is over elements, so pieces of unequal size count by their size; an empty one does not."""

    def pieces() -> None:
        for piece in (torch.tensor([[1.0, 2.0], [3.0, 6.0]]), torch.tensor([8.0]), torch.empty(0)):
            for over in ("max", "min", "sum"):
                log(over, piece, over)  # type: ignore[arg-type]
            log("layer/mean-1.x", piece.requires_grad_())
        log("float", 2.5)
        log("float", 3)
        log("count", torch.tensor([True, False, True]), "sum")

    found = step(pieces)
    assert found == {
        "max": (8, 5),
        "min": (1, 5),
        "sum": (20, 5),
        "layer/mean-1.x": (4, 5),
        "float": (2.75, 2),
        "count": (2, 3),
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_does_not_overflow(dtype: torch.dtype) -> None:
    x = torch.full((300, 300), 300.0, dtype=dtype)
    assert step(lambda: log("x", x, "sum"))["x"] == (300.0**3, 300**2)
    assert step(lambda: log("x", x, "max"))["x"] == (300, 300**2)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_null(value: float) -> None:
    """Also if other elements, pieces, ranks or steps are finite: a NaN is not lost in a maximum."""
    for over in ("max",) if value > 0 else ("max", "min", "mean", "sum") if math.isnan(value) else ("min",):
        for order in ((value, 1.0), (1.0, value)):
            assert step(lambda: [log("x", torch.tensor(v), over) for v in order])["x"] == (None, 2)  # noqa: B023
            window = Window()
            for v in order:
                window.add(0.0, 0.0, 0.0, {"x": Number(over, v, 1)})
            assert json.dumps(window.means(1)["numbers"]) == '{"x": null}'


@pytest.mark.parametrize("name", ["", "fc7 max", "größte", "/x", ".", 7, None])
def test_a_strange_name_is_refused(name: Any) -> None:
    """Also outside of a step, so that the first forward pass shows it."""
    with pytest.raises(UserError, match=r"has letters, digits, and _ . - / only: not "):
        log(name, 1.0)
    with pytest.raises(UserError, match=r"number 'x' is logged over 'median': choose max, min, mean, sum"):
        log("x", 1.0, "median")  # type: ignore[arg-type]


def test_nothing_is_logged_outside_of_a_step() -> None:
    log("x", 1.0)
    assert step(lambda: None) == {}


def test_a_window_of_steps() -> None:
    window = Window()
    for x in (4.0, 1.0, 2.0):
        window.add(0.0, 0.0, 0.0, {over: Number(over, x, 2) for over in ("max", "min", "mean", "sum")})
        window = Window(**json.loads(json.dumps(vars(window))))  # as a checkpoint restores it
    assert window.means(1)["numbers"] == {"max": 4, "min": 1, "mean": 7 / 6, "sum": 7}
    window.add(0.0, 0.0, 0.0, {"max": Number("min", 9.0, 1)})  # the code was changed
    assert window.means(1)["numbers"]["max"] == 9
    window.clear()
    window.add(0.0, 0.0, 0.0)
    assert "numbers" not in window.means(1)


def test_names_in_wandb_and_tensorboard() -> None:
    line = {
        "kind": "step",
        "step": 4,
        "loss": 1.0,
        "numbers": {"fc7_max": 2.5, "loss": 7.0, "layer/x": 1.0, "bad": None},
    }
    assert named(line) == {"loss/training": 1, "numbers/fc7_max": 2.5, "numbers/loss": 7, "numbers/layer/x": 1}


class Ranks:
    """Three ranks in one process, each with its numbers; `logs[rank]` are those of the step, as (name, value, over)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.worlds = [World(rank, 3, rank, 3, CPU) for rank in range(3)]
        self.ranks = [Logged(world) for world in self.worlds]
        self.sent: list[Tensor] = []
        self.objects: list[Any] = []
        monkeypatch.setattr(World, "reduce", lambda _, values: self.sent.append(values))
        monkeypatch.setattr(dist, "all_gather_object", lambda told, mine: self.gather(told, mine))

    def gather(self, told: list[Any], mine: Any) -> None:
        self.objects.append(mine)
        told[:] = self.told

    def cast(self, *logs: list[tuple[str, float, str]]) -> list[PendingNumbers]:
        self.sent.clear()
        pending = []
        for rank, mine in zip(self.ranks, logs, strict=True):
            numbers.open_step(CPU)
            for name, value, over in mine:
                log(name, value, over)  # type: ignore[arg-type]
            pending.append(rank.cast())
        assert len(self.sent) in (0, 3), "all ranks take part, or none"
        total = sum(self.sent)
        for values in self.sent:
            values.copy_(total)  # type: ignore[arg-type]
        return pending

    def read(self, pending: list[PendingNumbers]) -> dict[str, float]:
        new = float(sum(len(p.new) for p in pending))
        self.told = [{key: n._replace(value=float(n.value)) for key, n in p.new.items()} for p in pending]
        found = [rank.read(p, new) for rank, p in zip(self.ranks, pending, strict=True)]
        assert found[0] == found[1] == found[2]
        return {name: number.result for name, number in found[0].items()}  # type: ignore[misc]


def test_ranks_that_log_different_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some names on some ranks, at some steps, in another order: each number is of those that have logged it, from its
    first step on. Only new names cost the exchange of objects; without any number nothing is sent."""
    ranks = Ranks(monkeypatch)
    assert ranks.read(ranks.cast([], [], [])) == {}
    assert (ranks.sent, ranks.objects) == ([], [])
    a, b, c = (("a", x, "max") for x in (1.0, 5.0, 3.0))
    first = ranks.cast([a, ("s", 1.0, "sum")], [("s", 2.0, "sum"), b], [c])
    second = ranks.cast([a], [], [("m", 4.0, "mean"), ("m", 6.0, "mean")])  # before the first is read
    assert ranks.sent == []
    assert ranks.read(first) == {"a": 5, "s": 3}
    third = ranks.cast([("m", 2.0, "mean")], [b], [c])
    assert ranks.read(second) == {"a": 1, "m": 5}
    fourth = ranks.cast([("m", 2.0, "mean")], [b], [c, ("m", 4.0, "mean"), ("m", 6.0, "mean")])
    assert ranks.read(third) == {"a": 5, "m": 2}
    ranks.objects.clear()
    assert ranks.read(fourth) == {"a": 5, "m": 4}
    assert ranks.read(ranks.cast([], [], [("s", 2.0, "sum")])) == {"s": 2}
    assert ranks.objects == []


def test_what_cannot_be_recorded_ends_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(monkeypatch)
    ranks.read(ranks.cast([], [("x", 1.0, "mean")], []))
    pending = ranks.cast([("x", 1.0, "max")], [], [])
    ranks.told = [{key: n._replace(value=float(n.value)) for key, n in p.new.items()} for p in pending]
    for rank, mine in zip(ranks.ranks, pending, strict=True):
        with pytest.raises(BadNumbers, match="'x' is logged as max and mean: give each a name of its own"):
            rank.read(mine, 1.0)
    ranks = Ranks(monkeypatch)
    assert len(ranks.read(ranks.cast([(f"x{i:02}", 1.0, "max") for i in range(64)], [], []))) == 64
    pending = ranks.cast([], [], [("y", 1.0, "max")])
    ranks.told = [{}, {}, {("y", "max"): Number("max", 1.0, 1)}]
    for rank, mine in zip(ranks.ranks, pending, strict=True):
        with pytest.raises(BadNumbers, match=r"65 numbers are logged, more than 64: log fewer \(x00, x01, x02, ...\)"):
            rank.read(mine, 1.0)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # which the compiler means to hide
def test_a_net_that_logs_is_compiled_and_exported() -> None:
    """Each call of the compiled net logs that call's number, and only in a step; an exported net logs nothing."""

    class Net(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            log("max", x, "max")
            return x + 1

    net, x = Net(3, 3, bias=False), torch.ones(3)
    nn.init.constant_(net.weight, 1.0)
    from torch._dynamo.testing import CompileCounter  # not in a trainer, which sets the compiler up first

    counter = CompileCounter()
    compiled = torch.compile(net, dynamic=False, backend=counter)
    compiled(x * 100)
    for value in (1.0, 5.0, 2.0):
        assert step(lambda: [compiled(x * value) for _ in range(9)])["max"] == (3 * value, 27)  # noqa: B023
    assert counter.frame_count == 2, "before the line and after it, compiled once"
    exported = torch.export.export(net, (x,), strict=True).module()
    assert step(lambda: exported(x)) == {}


# Trainers whose dropout of fc 7 logs, by LOGGED: a function of its output and keys
PIECES, WINDOW = 2, 4
OPTIONS = (f"--train.accumulate={PIECES}", f"--monitor.log_every={WINDOW}", "--checkpoint.steps=3", "--train.epochs=1")
MODULE = "tests.test_numbers"


def everything(y: Tensor, keys: Tensor) -> None:
    log("fc7_max", y, "max")
    log("fc7_mean", y)
    log("images", torch.ones(len(y)), "sum")
    if sometimes := bool(STEP) and int(keys[0]) % 8 == 0:  # on some ranks, at some steps
        log("sometimes", y.amax(), "min")
    if STEP:  # for the test, by another way
        seen = {
            "step": STEP[0],
            "max": y.amax().item(),
            "values": y.detach().flatten().tolist(),
            "sometimes": sometimes,
        }
        with open(f"{os.environ['SEEN']}-{os.environ['RANK']}", "a") as file:
            file.write(json.dumps(seen) + "\n")


def largest(y: Tensor, keys: Tensor) -> None:
    log("fc7_max", y.amax(), "max")
    log(f"units{y.shape[1]}", len(y), "sum")


def too_many(y: Tensor, keys: Tensor) -> None:
    for i in range(33):
        log(f"rank{os.environ['RANK']}/{i}", 1.0)


STEP, LOGGED = list[int](), {"everything": everything, "largest": largest, "too_many": too_many}


def main() -> int:
    logging, forward, train_step = LOGGED[os.environ["LOGGED"]], Dropout.forward, train.Trainer.train_step

    def logs(self: Dropout, x: Tensor, keys: Tensor, first: int = 0) -> Tensor:
        y = forward(self, x, keys, first)
        if self.layer == 7:
            logging(y, keys)
        return y

    def step(self: train.Trainer, *args: Any) -> train.Pending:
        STEP[:] = [self.progress.step + 1]
        try:
            return train_step(self, *args)
        finally:
            STEP.clear()

    Dropout.forward, train.Trainer.train_step = logs, step  # type: ignore[assignment, method-assign]
    return faults.main()


def trained(
    shard_sets: Path, run: Path, *extra: str, what: str = "everything", fault: Any = None, **options: Any
) -> Any:
    """The numbers of the lines of a run, by step."""
    env = {"LOGGED": what, "SEEN": f"{run}-seen", "FAULT": json.dumps(fault or {})}
    launch(shard_sets, run, *OPTIONS, *extra, module=MODULE, env=env, **options)
    assert status(run)["state"] == {"kill all": "running", "SIGTERM": "stopped"}.get((fault or {}).get("do"), "done")
    return {line["step"]: line.get("numbers") for line in records(run, "step")}


@pytest.fixture(scope="module")
def whole(shard_sets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two ranks that logs everything."""
    run = tmp_path_factory.mktemp("numbers") / "run"
    trained(shard_sets, run)
    return run


@pytest.mark.integration
def test_the_numbers_of_a_run(whole: Path) -> None:
    """They are those of all pieces on both ranks at each step of the window; none of warming up or of validation."""
    seen = [json.loads(line) for rank in "01" for line in Path(f"{whole}-seen-{rank}").read_text().splitlines()]
    assert len(seen) == STEPS * PIECES * 2
    lines = {line["step"]: line["numbers"] for line in records(whole, "step")}
    assert list(lines) == [4, 8]
    for last, found in lines.items():
        its = [piece for piece in seen if last - WINDOW < piece["step"] <= last]
        values = [value for piece in its for value in piece["values"]]
        assert found["fc7_max"] == max(values) > 1
        assert found["fc7_mean"] == pytest.approx(math.fsum(values) / len(values), rel=1e-9)
        assert found["images"] == 24 * WINDOW
        some = [piece["max"] for piece in its if piece["sometimes"]]
        assert found.get("sometimes") == min(some, default=None)
    pieces = Counter(piece["sometimes"] for piece in seen)
    assert 0 < pieces[True] < pieces[False]


@pytest.mark.integration
@pytest.mark.slow
def test_a_run_that_logs_is_cut(shard_sets: Path, whole: Path, tmp_path: Path) -> None:
    """In mid-window, by a kill and by a stop: the same record, and the same state."""
    run = tmp_path / "run"
    trained(shard_sets, run, fault=at("step", 6, "kill all"))
    (run / "fault-0").unlink()
    trained(shard_sets, run, fault=at("step", 4, "SIGTERM"))
    trained(shard_sets, run)
    assert_same_run(run, whole)
    assert any(newest(path)["window"]["numbers"] for path in (run, whole)), "the last two steps are in no line"


@pytest.mark.integration
@pytest.mark.slow
def test_a_compiled_run_logs(shard_sets: Path, whole: Path, tmp_path: Path) -> None:
    found = trained(shard_sets, tmp_path / "run", "--train.compile=on", what="largest", how="exec", timeout=600)
    for line in records(whole, "step"):
        assert found[line["step"]]["fc7_max"] == pytest.approx(line["numbers"]["fc7_max"], rel=1e-4)
        assert found[line["step"]]["units32"] == 24 * WINDOW


@pytest.mark.integration
@pytest.mark.slow
def test_towers_on_two_ranks_log(shard_sets: Path, whole: Path, tmp_path: Path) -> None:
    """Each the units that it has: of the same images."""
    towers = ("--model.name=alexnet_two_tower", "--train.tower_parallel=true")
    found = trained(shard_sets, tmp_path / "run", *towers, what="largest")
    assert [numbers["units16"] for numbers in found.values()] == [2 * 24 * WINDOW] * 2
    assert all(numbers["fc7_max"] > 1 for numbers in found.values())


@pytest.mark.integration
@pytest.mark.slow
def test_too_many_numbers_end_a_run(shard_sets: Path, tmp_path: Path) -> None:
    env = {"LOGGED": "too_many"}
    result = launch(shard_sets, tmp_path / "run", module=MODULE, env=env)
    assert result.stderr.count("66 numbers are logged, more than 64: log fewer (rank0/0, rank0/1, rank0/10, ...)") >= 1
    assert "BadNumbers" not in result.stderr, "a traceback"
    assert status(tmp_path / "run")["state"] == "failed"


def test_one_line_logs_a_number() -> None:
    lines = adding.diffs("A logged number").splitlines()
    assert len([line for line in lines if line[:1] in "+-" and line[:3] not in ("+++", "---")]) == 1


@pytest.mark.integration
@pytest.mark.slow
def test_the_line_logs(shard_sets: Path, tmp_path: Path) -> None:
    tree, run = adding.applied("A logged number", tmp_path), tmp_path / "run"
    env = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    words = command(shard_sets, run, "--train.max_steps=3", "--monitor.tensorboard=true")
    done = subprocess.run(words, cwd=tree, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = [line["numbers"]["fc7_max"] for line in records(run, "step")]
    assert len(found) == 3
    assert min(found) > 1
    assert [value for _, value in shown(reader(run))["numbers/fc7_max"]] == pytest.approx(found)


if __name__ == "__main__":
    launcher.leave_with(main)


@pytest.mark.parametrize("value", [None, "0.5", [0.5], torch.tensor(1j)], ids=["none", "text", "list", "complex"])
def test_a_value_that_is_no_number_is_one_sentence(value: Any) -> None:
    numbers.open_step(torch.device("cpu"))
    try:
        with pytest.raises(UserError, match=r"number 'x' is logged as \w+: give a real number or a tensor"):
            numbers.log("x", value)
    finally:
        numbers.close_step()
