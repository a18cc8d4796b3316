"""docs/defaults.md has each key, its default, and what the paper says of it; what it says of deviations holds."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dist_train import optim, schedules
from dist_train.cli import parse
from dist_train.config import Config, OptimConfig, ScheduleConfig
from dist_train.flat import as_dict
from dist_train.packaged import CONFIGS
from pipelines import packing
from pipelines.augment import Augment, fixed_views, random_views
from pipelines.cli import Parser
from pipelines.kinds import kind
from pipelines.pack import Options

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "defaults.md"
TEXT = PAGE.read_text(encoding="utf-8")

# Read from the paper, not from the page: the value, the section and words of its sentence.
PAPER: dict[str, tuple[Any, str, str]] = {
    "data.resize": (256, "2", "the shorter side was of length 256"),
    "data.lighting": (0.1, "4.1", "a Gaussian with mean zero and standard deviation 0.1"),
    "data.mirror": (True, "4.1", "(and their horizontal reflections)"),
    "data.inputs": ("mean_subtracted", "2", "subtracting the mean activity over the training set from each pixel"),
    "model.name": ("alexnet", "3.5", "connected only to those kernel maps in the previous layer which reside"),
    "model.outputs": (0, "3.5", "a 1000-way softmax which produces a distribution over the 1000 class labels"),
    "model.width": (1.0, "3.5", "96 kernels of size 11 × 11 × 3"),
    "model.left_out": ("none", "3.5", "the first five are convolutional"),
    "model.init_from": ("", "5", "from a zero-mean Gaussian distribution with standard deviation 0.01"),
    "model.hidden": (4096, "3.5", "The fully-connected layers have 4096 neurons each"),
    "model.dropout": (0.5, "4.2", "with probability 0.5"),
    "model.dropout_scaling": ("test", "4.2", "At test time, we use all the neurons but multiply their outputs by 0.5"),
    "model.activation": ("relu", "3.5", "The ReLU non-linearity is applied"),
    "model.pooling": ("overlapping", "3.4", "with s = 2 and z = 3"),
    "model.lrn": ("paper", "3.5", "Response-normalization layers follow the first and second convolutional layers"),
    "model.lrn_alpha": (1e-4, "3.3", "k = 2, n = 5, α = 10^-4, and β = 0.75"),
    "model.biases": ("paper", "5", "with the constant 1"),
    "optim.name": ("sgd", "5", "stochastic gradient descent"),
    "optim.lr": (0.01, "5", "The learning rate was initialized at 0.01"),
    "optim.momentum": (0.9, "5", "momentum of 0.9"),
    "optim.weight_decay": (0.0005, "5", "weight decay of 0.0005"),
    "schedule.name": ("plateau", "5", "when the validation error rate stopped improving"),
    "schedule.factor": (10, "5", "divide the learning rate by 10"),
    "schedule.max_divisions": (3, "5", "reduced three times prior to termination"),
    "schedule.stop_early": (False, "5", "We trained the network for roughly 90 cycles"),
    "schedule.warmup_epochs": (0.0, "5", "The learning rate was initialized at 0.01"),
    "train.epochs": (90, "5", "roughly 90 cycles"),
    "train.global_batch": (128, "5", "a batch size of 128 examples"),
    "pack --shorter-side": (256, "2", "the shorter side was of length 256"),
    "pack --keep-small": (False, "2", "our system requires a constant input dimensionality"),
}
NOT_THE_PAPERS = {"data.center_square", "data.crop", "data.device", "train.tower_parallel", "pack --quality"}
NOT_THE_PAPERS |= {"schedule.patience", "schedule.patience_steps", "schedule.min_improvement"}
NO_KEYS = {"LRN at a tower's edge", "eigenvalues of lighting", "the tail of an epoch", "views of an image", "the mean"}
NO_KEYS |= {"weight decay of biases", "lr and velocity", "what has to improve", "ReLU after the last layer"}

CELL = r"(?:[^|]|\\\|)+?"
ROW = re.compile(rf"\| `(?P<key>[\w.-]+(?: --[\w-]+)?)` \| `(?P<default>{CELL})` \| (?P<says>.*?) *\|")
SECTION, REASON = r'§\d(?:\.\d)? ".+?"', r": \S+(?: \S+)+"
AGREES, DIFFERS = (
    re.compile(rf"{SECTION}(?:; .+)?"),
    re.compile(rf"\*\*≠\*\* (?:{SECTION}|the paper is silent){REASON}"),
)
NOT_THERE = re.compile(rf"not in the paper{REASON}")


def as_printed(value: Any) -> str:
    """As YAML shows it."""
    return value if isinstance(value, str) and value else json.dumps(value)


def defaults() -> dict[str, Any]:
    """Of all keys of the configuration, and of the options of `pack` that decide what an image becomes."""
    packed = {f"pack --{name.replace('_', '-')}": value for name, value in vars(Options()).items()}
    return {**as_dict(Config()), **packed}


def of_the_program() -> dict[str, str]:
    return {key: as_printed(value) for key, value in defaults().items()}


def wrong(text: str, keys: dict[str, str]) -> list[str]:
    """What is wrong with the rows of the page."""
    found, seen = [], set[str]()
    for number, line in enumerate(text.splitlines(), 1):
        if not line.startswith("| `"):
            continue
        at = f"docs/defaults.md:{number}"
        if not (row := ROW.fullmatch(line)):
            found.append(f"{at}: is no row of key, default, and what the paper says")
            continue
        key, default, says = row["key"], row["default"], row["says"]
        if key not in keys:
            found.append(f"{at}: {key}: there is no such key: take the row out")
        elif key in seen:
            found.append(f"{at}: {key}: has a row above: take one of them out")
        elif default != keys[key]:
            found.append(f"{at}: {key}: is {default} here, and {keys[key]} in the program: make them agree")
        if not any(form.fullmatch(says) for form in (AGREES, DIFFERS, NOT_THERE)):
            found.append(f"{at}: {key}: has neither a section with the paper's words nor a reason: add one")
        seen.add(key)
    return found + [f"docs/defaults.md: {key}: has no row: say what the paper has" for key in keys if key not in seen]


def test_each_key_has_its_default_and_what_the_paper_says() -> None:
    assert wrong(TEXT, of_the_program()) == []


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("| `optim.lr` | `0.01` |", "| `optim.lr` | `0.02` |", "optim.lr: is 0.02 here, and 0.01 in the program"),
        ("| `optim.lr` |", "| `optim.rate` |", "optim.rate: there is no such key"),
        ("| `optim.lr` |", "| `optim.rate` |", "optim.lr: has no row"),
        ("| `optim.momentum` | `0.9` |", "| `optim.lr` | `0.01` |", "optim.lr: has a row above"),
        ('§5 "momentum of 0.9"', '"momentum of 0.9"', "optim.momentum: has neither a section"),
        ('§5 "momentum of 0.9"', "§5", "optim.momentum: has neither a section"),
        ("not in the paper: where runs lie", "not in the paper", "run.root: has neither a section"),
        ("not in the paper: where runs lie", "not in the paper: ", "run.root: has neither a section"),
        ("not in the paper: where runs lie", "", "run.root: has neither a section"),
        ("| `run.root` | `runs` | ", "| `run.root` | ", "is no row of key, default"),
    ],
)
def test_a_page_with_a_mistake_is_refused(old: str, new: str, says: str) -> None:
    assert TEXT.count(old) == 1
    problems = wrong(TEXT.replace(old, new), of_the_program())
    assert any(says in problem for problem in problems), problems


def test_a_deviation_has_a_reason_and_a_new_key_a_row() -> None:
    keys = of_the_program()
    bare = re.sub(r'(`data\.crop` \| `227` \| \*\*≠\*\* §4\.1 ".+?").*', r"\1 |", TEXT)
    assert bare != TEXT
    # Without a reason what is left could be read as an agreement, but for its mark.
    assert [problem.partition(": ")[2][:9] for problem in wrong(bare, keys)] == ["data.crop"]
    assert wrong(TEXT, {**keys, "train.new": "1"}) == [
        "docs/defaults.md: train.new: has no row: say what the paper has"
    ]


def test_the_defaults_are_the_paper() -> None:
    """Values, sections and words as the paper has them, and rows of the page that say no other."""
    flat = defaults()
    assert {key: flat[key] for key in PAPER} == {key: value for key, (value, _, _) in PAPER.items()}
    rows = {row["key"]: row["says"] for row in map(ROW.fullmatch, TEXT.splitlines()) if row}
    assert {key for key, says in rows.items() if AGREES.fullmatch(says)} == PAPER.keys()
    assert {key for key, says in rows.items() if DIFFERS.fullmatch(says)} == NOT_THE_PAPERS
    for key, (_, section, words) in PAPER.items():
        quoted = [(section, re.search(rf'§{re.escape(section)} "[^"]*{re.escape(words)}', rows[key]) is not None)]
        assert (key, quoted) == (key, [(section, True)])
    assert flat["data.crop"] == 227
    assert '§4.1 "random 224 × 224 patches' in rows["data.crop"]


SMALL, WAITS = (
    dict.fromkeys(("data.resize", "data.crop"), "small"),
    {"schedule.patience_steps": "a schedule that waits"},
)
STOPS = {"schedule.stop_early": "ends the run when its last lr brings no more"}
WHOLE, SQUARES = {"data.center_square": "crops of all of an image"}, {"data.center_square": "squares"}
MANY = {"train.epochs": "60 epochs", "train.global_batch": "a batch of 32"}


OTHERS: dict[str, dict[str, str]] = {
    "own": SMALL | WHOLE | MANY | WAITS | STOPS,
    "stl10": SMALL | SQUARES | MANY | WAITS | STOPS,
    "imagenette": WHOLE | WAITS | STOPS,
    "quickstart": {
        **SMALL,
        **SQUARES,
        **dict.fromkeys(("schedule.name", "schedule.milestones"), "divided once, at a fixed epoch"),
        "train.epochs": "3 epochs in place of 90",
        "train.compile": "compiling takes longer",
    },
    "alexnet_8gpu": {
        "train.global_batch": "global batch 1024",
        "optim.lr": "lr scaled",
        "schedule.warmup_epochs": "warmed up",
    },
}


@pytest.mark.parametrize(("name", "differs"), OTHERS.items())
def test_a_configuration_says_in_what_it_differs_from_the_papers(name: str, differs: dict[str, str]) -> None:
    """By key, and in words; where its images are apart."""
    where = ("data.train", "data.val", "data.source")
    papers, its = (as_dict(parse(["--config", str(CONFIGS / f"{file}.yaml")])[0]) for file in ("alexnet", name))
    assert {key for key in its if its[key] != papers[key] and key not in where} == differs.keys()
    text = re.sub(r"\n# *", " ", (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
    assert [words for words in differs.values() if words not in text] == []


def test_each_configuration_is_one_of_these() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {"alexnet", *OTHERS}


def test_alexnet_is_the_defaults_but_for_the_central_square() -> None:
    flat, defaults = as_dict(parse(["--config", str(CONFIGS / "alexnet.yaml")])[0]), as_dict(Config())
    assert {key: value for key, value in flat.items() if value != defaults[key]} == {"data.center_square": True}


def test_pack_has_these_defaults_on_the_command_line() -> None:
    parser = Parser("pack", "")
    packing.options(parser)
    args: Namespace = parser.parse_args(["imagefolder", "a", "b"])
    given, options = vars(args), vars(Options())
    assert given.pop("shorter_side") is None, "the source's"
    assert {kind("pack", name).shorter_side for name in ("imagefolder", "imagenet")} == {256}
    assert {name: given[name] for name in options if name in given} == {
        name: options[name] for name in options if name in given
    }
    assert {"quality", "shard_mb", "seed", "keep_small"} <= given.keys()


def test_weight_decay_is_of_biases_too() -> None:
    """One step without a gradient: w := w - lr 0.0005 w."""
    layer = nn.Linear(2, 3).double()
    nn.init.ones_(layer.bias)
    optimizer = optim.build(OptimConfig(), layer)
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optim.update(optimizer, torch.amp.GradScaler("cpu", enabled=False))
    np.testing.assert_allclose(layer.bias.detach().numpy(), 1 - 0.01 * 0.0005, rtol=1e-12)


def test_a_division_takes_the_velocity_with_it() -> None:
    """v := 0.9 v + g; w := w - lr v. With the paper's v, w would fall by 0.9 x 0.01 + 0.001 in the second step."""
    layer = nn.Linear(1, 1, bias=False).double()
    optimizer = optim.build(OptimConfig(weight_decay=0), layer)
    layer.weight.grad = torch.ones_like(layer.weight)
    weights = [layer.weight.item()]
    for lr in (0.01, 0.001):
        optim.set_lr(optimizer, lr)
        optim.update(optimizer, torch.amp.GradScaler("cpu", enabled=False))
        weights.append(layer.weight.item())
    np.testing.assert_allclose(np.diff(weights), [-0.01, -0.001 * (0.9 + 1)], rtol=1e-12)


def test_the_centre_crop_is_nearly_that_of_the_central_square() -> None:
    """In which it was once rounded more: a pixel apart at most."""
    sizes = np.column_stack([np.arange(256, 1024), np.full(768, 256)])
    whole, square = (fixed_views(sizes, Augment(center_square=of)).corner for of in (False, True))
    assert set(np.unique(np.abs(whole - square))) == {0, 1}


def test_views_of_an_image() -> None:
    """30 x 30 places and their reflections, of the central square; "a factor of 2048" in the paper."""
    n = 40_000
    square = Augment(center_square=True)
    views = random_views(np.tile([300, 256], (n, 1)), square, np.zeros((3, 3)), seed=0, epoch=0, start=0)
    assert len(np.unique(np.column_stack([views.corner, views.mirror]), axis=0)) == 1800


def test_the_error_to_improve_on_is_the_best_at_any_learning_rate() -> None:
    """A division is followed by another if the error stays above the best of the lr before."""
    plateau = schedules.build(Config(schedule=ScheduleConfig(patience=2)))
    divided = [plateau.end_epoch(error, 0.0, epoch, 10) for epoch, error in enumerate([0.5, 0.6, 0.6, 0.58, 0.55])]
    assert divided == [1, 1, 10, 1, 10]


def test_each_deviation_names_a_test_that_there_is() -> None:
    rows = [line.split(" | ") for line in TEXT.partition("## Deviations")[2].splitlines() if line.startswith("| ")][1:]
    assert {what.removeprefix("| ") for what, *_ in rows} >= NO_KEYS
    for what, paper, here, held in rows:
        assert re.search(r"§\d|silent", paper), what
        assert here, what
        file, _, test = held.removesuffix(" |").strip("`").partition("::")
        assert f"def {test or 'test_'}" in (ROOT / "tests" / file).read_text(encoding="utf-8"), held
