"""Run directories as a trainer leaves them, with a clock of their own, made in milliseconds: config.yaml, status.json,
metrics.jsonl, events.jsonl, confusion.npz, pictures. The numbers follow from seed and step, as a trainer's do."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dist_train.config import Config
from dist_train.flat import dump
from dist_train.rundir import confusion, events, postmortem, record, status
from dist_train.rundir.directory import CONFIG
from dist_train.rundir.lease import Lease
from dist_train.rundir.ledger import PHASES
from dist_train.rundir.writer import Writer

BEGAN = 1_790_000_000.0  # Unix time in seconds: in September 2026
CLOTHES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
SCRIPT = "</script><script>window.hacked=1</script>"
ATTACKS = (
    "<img src=x onerror=window.hacked=2>",
    SCRIPT,
    "line\u2028and paragraph\u2029separator",
    "\"'><svg onload=window.hacked=3>",
    "&lt;b&gt; <!-- <script>",
    "{{ 7*7 }} ${window.hacked=4} \u202eright to left",
    "]]> \x07 \\u003cimg",
    "名前 " + "very long " * 30,
)


@dataclass
class Story:
    """A run that is told step by step.

    Attributes:
        steps, epochs: per epoch, and of the run.
        rate: images per second.
        divided: epochs after which lr is divided by 10.
        checkpoint: the step that the next start resumes from.
    """

    path: Path
    steps: int = 468
    epochs: int = 6
    batch: int = 128
    lr: float = 0.01
    every: int = 20
    rate: float = 500.0
    seed: int = 0
    classes: Sequence[str] = CLOTHES
    divided: Sequence[int] = (3, 5)
    settings: dict[str, Any] = field(default_factory=dict)
    world: int = 2
    data_wait: float = 0.08

    now: float = BEGAN
    step: int = 0
    checkpoint: int = 0
    bad: int = 0

    def __post_init__(self) -> None:
        self.path.mkdir(parents=True)
        self._seconds, self._lines, self._start = dict.fromkeys(PHASES, 0.0), list[dict[str, Any]](), ""
        self._noise = np.random.default_rng(self.seed).normal(0, 1, (self.steps * self.epochs + 1, 3))
        self._unsaved = 0.0  # seconds of training since the checkpoint
        self._wrong = 0.0  # of the last validation
        self._killed: dict[str, Any] = {}  # what the next start finds
        groups: dict[str, dict[str, Any]] = {"optim": {"lr": self.lr}, "run": {"name": self.path.name}}
        groups["train"] = {"epochs": self.epochs, "global_batch": self.batch, "seed": self.seed}
        groups["schedule"] = {"name": "milestones", "milestones": tuple(self.divided)}
        for key, value in self.settings.items():
            group, _, name = key.partition(".")
            groups.setdefault(group, {})[name] = value
        default = Config()
        config = replace(default, **{name: replace(getattr(default, name), **of) for name, of in groups.items()})
        assert {f.name for f in fields(config)} >= groups.keys()
        (self.path / CONFIG).write_text(dump(config), encoding="utf-8")

    def spend(self, phase: str, seconds: float) -> None:
        self.now += seconds
        self._seconds[phase] += seconds

    def tell(self, event: str, **values: Any) -> None:
        line = {"time": self.now, "event": event, "start": self._start, **values}
        with open(self.path / events.FILE, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def start(self, sources: str = "5a89cd78ebf007fb", changed: dict[str, Any] | None = None, **job: Any) -> None:
        """A start resumes from the newest checkpoint; the record is cut back to it."""
        self.spend("startup", 30)
        before, self._start = self._start, f"20260921-{int(self.now) % 1_000_000:06d}-{self.seed:08x}"
        if self._killed:
            self.tell("killed", **self._killed)
        self.step, self._killed = self.checkpoint, {}
        self._lines = [line for line in self._lines if line["step"] <= self.step]
        code = {"version": "0.1.0", "sources": sources}
        about = {"step": self.step, "checkpoint": f"step-{self.step:08d}" if before else "", "device": "cuda"}
        nodes = [f"gpu-{i + 5:02d}" for i in range(max(1, self.world // 4))]
        start = {"nodes": nodes, "world_size": self.world, "versions": {"torch": "2.14.1"}, "code": code, "pid": 4711}
        self.tell("start", **about, **start, environment=[], job="", restart=0, **job)
        if not before:
            self._lines.append({"kind": "begun", "step": 0, "compiled": True, "deterministic": "by construction"})
        if changed:
            self.tell("changed", step=self.step, **changed)

    def train(self, until: int) -> None:
        """Steps up to this one, with validation, save and division at the end of an epoch."""
        while self.step < until:
            self.step += 1
            if self.step % self.every == 0:
                self._lines.append(self._recorded())
            self.spend("training", self.batch / self.rate * (1 - self.data_wait))
            self.spend("data", self.batch / self.rate * self.data_wait)
            self._unsaved += self.batch / self.rate
            if self.step % self.steps == 0:
                self.validate()

    def save(self) -> None:
        self.checkpoint, self._unsaved = self.step, 0.0
        self.spend("saving", 0.5)

    def validate(self) -> None:
        epoch = self.step // self.steps - 1
        level = self._level(self.step)
        error = min(0.999, 0.8 * level + 0.01 * float(self._noise[self.step, 2]) * level + 0.03)
        self.spend("validation", 20)
        values = {"top1_error": error, "top5_error": error * error / 2, "loss": 1.1 * self._loss(self.step)}
        values |= {"train_loss": self._loss(self.step), "train_error": 0.85 * level, "samples": 10_000}
        machine = {"seconds": 20.0, "epoch_seconds": self.steps * self.batch / self.rate}
        about = {"step": self.step, "epoch": epoch, "images": self.step * self.batch, "lr": self._lr(self.step)}
        self._lines.append({"kind": "validation", **about, **values, "machine": machine})
        self._wrong = error
        if epoch + 1 in self.divided:
            self.tell("division", step=self.step, epoch=epoch, lr=self._lr(self.step + 1), error=error)
        self.save()

    def unreadable(self, samples: int) -> None:
        self.bad += samples
        self.tell("bad_samples", step=self.step, epoch=self.step // self.steps, samples=self.bad)

    def die(self) -> None:
        """Killed without notice: what it did since its checkpoint is lost. Found by the next start."""
        self.write("running")
        self._seconds["training"] -= self._unsaved
        self._seconds["lost"] += self._unsaved
        about = {"step": self.step, "epoch": self.step // self.steps, "node": "gpu-05"}
        self._killed = {"of": self._start, "heartbeat": self.now, **about}
        self._unsaved = 0.0
        self.spend("down", 600)

    def end(self, state: str, reason: str = "", code: int = 0) -> Path:
        """Returns the run's directory."""
        how = {"state": state, "reason": reason, "code": code, "step": self.step, "epoch": self.step // self.steps}
        self.tell("end", **how, requeued=False, **self._ledger())
        return self.write(state, reason)

    def write(self, state: str, reason: str = "") -> Path:
        (self.path / record.FILE).write_text("".join(json.dumps(line) + "\n" for line in self._lines))
        about = {"state": state, "reason": reason, "step": self.step, "epoch": self.step // self.steps}
        about |= {**self._ledger(), "start": self._start, "heartbeat": self.now, "pid": 4711}
        (self.path / status.FILE).write_text(json.dumps(about))
        if self._wrong:
            self._confusion(self._wrong, self.checkpoint // self.steps)
        return self.path

    def _ledger(self) -> dict[str, Any]:
        whole = sum(self._seconds.values())
        times = {"began": BEGAN, "until": BEGAN + whole, "seconds": {k: round(v, 3) for k, v in self._seconds.items()}}
        return times | {"goodput": round(self._seconds["training"] / whole, 3)}

    def _lr(self, step: int) -> float:
        return self.lr / 10 ** sum(step > epoch * self.steps for epoch in self.divided)

    def _level(self, step: int) -> float:
        """Of loss and errors: falls, and faster where lr is divided."""
        drop = 0.75 ** sum(step > epoch * self.steps for epoch in self.divided)
        return drop * (0.12 + 0.86 / (1 + 2.5 * step / self.steps * (self.lr / 0.01) ** 0.3))

    def _loss(self, step: int) -> float:
        return math.log(len(self.classes)) * self._level(step)

    def _recorded(self) -> dict[str, Any]:
        noise, step = self._noise[self.step].tolist(), self.step
        values = {"progress": step / self.steps, "images": step * self.batch, "lr": self._lr(step)}
        values |= {"loss": self._loss(step) * (1 + 0.04 * noise[0]), "grad_norm": 1.5 + 0.3 * abs(noise[1])}
        values["train_error"] = min(1.0, max(0.0, 0.85 * self._level(step) * (1 + 0.04 * noise[0])))
        if self.bad:
            values["bad_samples"] = self.bad
        wait = max(0.0, self.data_wait * (1 + 0.2 * noise[1]))
        machine = {"images_per_s": round(self.rate * (1 + 0.02 * noise[2]), 3), "data_wait": round(wait, 3)}
        machine |= {"data_wait_worst": round(min(1.0, 1.6 * wait), 3), "worst_rank": self.world - 1}
        machine |= {"worst_node": "gpu-05", "memory_mb": 4321.0}
        about = {"kind": "step", "step": step, "epoch": (step - 1) // self.steps}
        return {**about, **values, "machine": machine}

    def _confusion(self, error: float, epoch: int) -> None:
        """Each class has 50 images, and is taken for the two that follow it."""
        n, rng = len(self.classes), np.random.default_rng(self.seed)
        wrong = rng.binomial(50, np.clip(error * rng.uniform(0.4, 1.6, n), 0, 1))
        label, first = np.arange(n), wrong - wrong // 3
        pairs = [(label, label, 50 - wrong), (label, (label + 1) % n, first), (label, (label + 2) % n, wrong // 3)]
        counts = np.concatenate([np.stack(pair) for pair in pairs], 1)
        counts = counts[:, counts[2] > 0]
        taken = confusion.Confusion(np.full(n, 50), 50 - wrong, 50 - wrong // 4, *counts)
        lease, writer = Lease(self.path), Writer()
        lease.acquire()
        confusion.ConfusionFile(lease, print, writer, writes=True).put(taken, list(self.classes), self.step, epoch)
        writer.wait()


def healthy(path: Path, **about: Any) -> Path:
    """Done after six epochs, with two divisions of the learning rate."""
    story = Story(path, **about)
    story.start()
    story.train(story.steps * story.epochs)
    return story.end("done")


def killed_twice(path: Path) -> Path:
    """Killed in epochs 2 and 4, then on four ranks, then with changed code and another setting; done."""
    story = Story(path, seed=1, data_wait=0.31)
    story.start()
    story.train(700)
    story.die()
    story.world = 4
    story.start()
    story.train(1000)
    story.unreadable(3)
    story.train(1600)
    story.die()
    old, new = ({"version": "0.1.0", "sources": f"{digit}" * 16} for digit in "ab")
    settings = {"checkpoint.minutes": [10.0, 2.0]}
    story.start(sources=new["sources"], changed={"code": [old, new], "exact_until": 1404, "settings": settings})
    story.train(story.steps * story.epochs)
    return story.end("done")


def diverged(path: Path) -> Path:
    """The loss grows, and is NaN at last."""
    story = Story(path, lr=0.3, seed=2)
    story.start()
    story.train(600)
    for line in (lines := [line for line in story._lines if line["kind"] == "step"])[-8:]:
        line["loss"] *= 10.0 ** (line["step"] - lines[-8]["step"] + 20) ** 0.4
        line["grad_norm"] *= 50
    lines[-1]["loss"] = lines[-1]["grad_norm"] = math.nan
    keys = [f"train/{name}/{i:05d}.jpg" for i, name in enumerate(CLOTHES * 12)]
    report = {"what": "loss", "step": 601, "epoch": 1, "lr": 0.3, "keys": keys}
    (path / postmortem.FILE).write_text(json.dumps(report, indent=1))
    reason = (
        f"the loss is not finite at step 601 (epoch 2, lr 0.3), batch {keys[0]} ... {keys[-1]} (all keys in "
        f"{postmortem.FILE}): lower optim.lr; the last checkpoint is good"
    )
    return story.end("diverged", reason, 70)


def three(root: Path) -> list[Path]:
    """Members of a sweep over lr and dropout; the third is shorter, and still running."""
    paths = [healthy(root / "lr-0.01", seed=3)]
    paths.append(healthy(root / "lr-0.02", lr=0.02, seed=4, rate=650.0, settings={"model.dropout": 0.3}))
    story = Story(root / "lr-0.005", lr=0.005, seed=5)
    story.start()
    story.train(1500)
    return [*paths, story.write("running")]


def imagenet(path: Path) -> Path:
    """90 epochs with 45,000 lines of steps, 1000 classes, and all pictures at the size that they have."""
    names = [f"n{i:08d} {'great white shark, white shark, man-eater, Carcharodon'[: 8 + i % 40]}" for i in range(1000)]
    story = Story(path, steps=500, epochs=90, batch=128 * 20, every=1, rate=9000.0, classes=names, divided=(30, 50, 70))
    story.start()
    story.train(story.steps * story.epochs)
    pictures(path)
    return story.end("done")


def attacked(path: Path) -> Path:
    """Every name that a stranger may choose is one of ATTACKS."""
    names = [*ATTACKS, *CLOTHES]
    story = Story(path / f"run {ATTACKS[0]}", epochs=2, classes=names, divided=(1,), settings={"run.name": SCRIPT})
    story.start()
    story.train(500)
    story.tell("alert", step=500, epoch=1, sentence=ATTACKS[0])
    changed = {"settings": {"data.source": ["", SCRIPT], ATTACKS[0]: [ATTACKS[3], ATTACKS[4]]}}
    story.die()
    story.start(sources=ATTACKS[1], changed=changed)
    story.train(600)
    for line in story._lines[-5:]:
        line.get("machine", {})["worst_node"] = ATTACKS[0]
    (story.path / "pictures").mkdir()
    (story.path / "pictures" / f"{ATTACKS[0]}.png").write_bytes(b"no picture")
    return story.end("failed", f"rank 0: FileNotFoundError: {' '.join(ATTACKS)}", 1)


def pictures(path: Path) -> None:
    """As many, as wide and as high as those that are drawn beside a run and by `figures`, and hard to compress: one
    photograph with a camera's grain in place of each."""
    waves = np.add.outer(np.sin(np.arange(1000) / 37), np.cos(np.arange(1140) / 53))[..., None]
    grain = np.random.default_rng(0).normal(0, 6, (1000, 1140, 3))
    photograph = Image.fromarray((120 + np.array([50, 40, 30]) * waves + grain).clip(0, 255).astype(np.uint8))
    for name in ("pictures/inputs", "pictures/wrong", "pictures/kernels", "figures/top5", "figures/nearest"):
        (path / name).parent.mkdir(exist_ok=True)
        photograph.save(path / f"{name}.png", compress_level=1)
