"""docs/paper.md, "Where each sentence lives": no number of the paper is missing, and what can be counted is counted."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dist_train import models, optim
from dist_train.config import Config, ModelConfig, OptimConfig
from dist_train.flat import as_dict
from dist_train.models.alexnet import AlexNet
from dist_train.models.dropout import mask_keys
from pipelines.augment import Augment, random_views

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
FIRST = PAGE.partition("## Where each sentence lives\n")[2].partition("\n## ")[0]

# Read from the paper: the numbers of each section, those of its captions, tables and footnotes included.
NUMBERS = {
    "Abstract": "1.2 million; 1000; 60 million; 650,000; 37.5%; 17.0%; 15.3%; 26.2%; 1%; 2%; "
    "five and six days; GTX 580",
    "Section 2": "15 million; 22,000; 1000 images; 1000 categories; 1.2 million; 50,000; 150,000; top-5; 256 × 256",
    "Section 3.1": "eight learned; max(0, x); tanh(x); e^-x; 25%; CIFAR-10; six times; four-layer; Caltech-101",
    "Section 3.2": "3GB; 1.2 million; half of the kernels; layer 3; layer 4; 1.7%; 1.2%; half as many; "
    "slightly less time",
    "Section 3.3": "k = 2; n = 5; 10^-4; 0.75; 1.4%; 1.2%; 13%; 11%; CIFAR-10; total number of kernels",
    "Section 3.4": "s = z; s < z; s = 2 and z = 3; 0.4%; 0.3%; s = 2, z = 2; equivalent dimensions; overfit",
    "Section 3.5": "1000-way; 224 × 224 × 3; 96 kernels of size 11 × 11 × 3; stride of 4; "
    "256 kernels of size 5 × 5 × 48; 384 kernels of size 3 × 3 × 256; 384 kernels of size 3 × 3 × 192; "
    "256 kernels of size 3 × 3 × 192; 4096 neurons; 150,528; "
    "253,440–186,624–64,896–64,896–43,264–4096–4096–1000",
    "Section 4": "60 million; 1000 classes; 10 bits; 224 × 224; 256 × 256; 2048; five; ten patches; "
    "deviation 0.1; over 1%; factor of two; probability 0.5; outputs by 0.5; doubles",
    "Section 5": "128; 0.9; 0.0005; deviation 0.01; constant 1; constant 0; by 10; at 0.01; three times; "
    "90 cycles; 1.2 million; five to six days; GTX 580",
    "Section 6": "37.5%; 17.0%; 39.0%; 18.3%; 47.1%; 28.2%; 45.7%; 25.7%; 0.1%; 40.7 %; 18.2 %; five; "
    "38.1 %; 16.4 %; sixth; 15M; 22K; Fall 2011; 39.0 %; 16.6 %; two CNNs; 36.7 %; 15.4 %; 15.3 %; 26.2 %; "
    "Fall 2009; 10,184; 8.9 million; half; 67.4%; 40.9%; 78.1%; 60.9%; 96; 11 × 11 × 3; top 48; bottom 48; "
    "GPU 1; GPU 2; Eight; five labels; six training; 4096",
}


def rows(text: str) -> dict[str, list[list[str]]]:
    """The cells of each row of the tables, by the heading above."""
    parts = re.split(r"(?m)^### (.*)$", text)[1:]
    found = {}
    for heading, part in zip(parts[::2], parts[1::2], strict=True):
        lines = [line for line in part.splitlines() if line.startswith("|")]
        if lines:
            assert lines[0] == "| the paper | code | test |", heading
            found[heading] = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]
    return found


def problems(text: str) -> list[str]:
    """Numbers of the paper without a row, and rows that do not say where a sentence lives and what covers it."""
    tables, keys, wrong = rows(text), as_dict(Config()), []
    for section, numbers in NUMBERS.items():
        heading = next((heading for heading in tables if re.split("[,:]", heading)[0] == section), "")
        said = "\n".join(row[0] for row in tables.get(heading, []))
        wrong += [
            f"{section}: {n}: add a row"
            for n in numbers.split("; ")
            if not re.search(rf"(?<![\d.]){re.escape(n)}", said)
        ]
    for heading, table in tables.items():
        for row in table:
            at = f"{heading}: {row[0][:40]}"
            if len(row) != 3 or not all(row):
                wrong.append(f"{at}: a row has three cells")
                continue
            words = re.findall(r"`([^`]+)`", row[1])
            wrong += [f"{at}: {w}: there is no such file" for w in words if "/" in w and not (ROOT / w).is_file()]
            settings = [
                w.partition(":")[0] for w in words if re.match(r"(data|model|optim|schedule|train|monitor)\.\w+", w)
            ]
            wrong += [f"{at}: {w}: there is no such setting" for w in settings if w not in keys]
            if not re.search(
                r"`test_|measured below|not tested here(, because \w| \(ImageNet\))|^there$|^the same$", row[2]
            ):
                wrong.append(f"{at}: say which test covers it, or why none does")
    marks, items = set(re.findall(r"\*\*≠(\d+)\*\*", text)), set(re.findall(r"(?m)^(\d+)\. ", text))
    return wrong + [f"≠{n}: is a mark without a deviation, or the reverse" for n in sorted(marks ^ items)]


def test_every_number_of_the_paper_has_a_row() -> None:
    assert problems(FIRST) == []


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("39.0% and 18.3%", "39.0%", "Section 6: 18.3%: add a row"),
        ("13% test error", "test error", "Section 3.3: 13%: add a row"),
        ("| `model.width`, `model.hidden`", "| `model.width`, `model.hiden`", "model.hiden: there is no such setting"),
        ("| `dist_train/optim.py` |", "| `dist_train/sgd.py` |", "dist_train/sgd.py: there is no such file"),
        (
            "| not tested here, because the distances of the pictures are not computed |",
            "| not tested here |",
            "say which test covers it",
        ),
        ("| not tested here, because the distances of the pictures are not computed |", "| |", "a row has three cells"),
        ("**≠15**", "**≠16**", "≠16: is a mark without a deviation"),
        ("\n14. ", "\n", "≠14: is a mark without a deviation"),
    ],
)
def test_a_page_that_lacks_something_is_refused(old: str, new: str, says: str) -> None:
    assert old in FIRST
    found = problems(FIRST.replace(old, new))
    assert any(says in problem for problem in found), found


def counted(options: ModelConfig) -> list[int]:
    """Outputs of each layer of the net for one image of 227 x 227 pixels and 1000 classes, counted while it runs."""
    found: list[int] = []
    with torch.device("meta"):
        net = models.build(options, classes=1000, crop=227).eval()
        for layer in net.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.register_forward_hook(lambda _, __, out: found.append(out.numel()))
        net(torch.empty(1, 3, 227, 227))
    return found


def test_neurons_of_figure_2() -> None:
    """Seven of the paper's numbers come out, with plain pooling too (3.4); the first and the sum in the abstract do
    not."""
    paper = [253_440, 186_624, 64_896, 64_896, 43_264, 4096, 4096, 1000]
    ours = counted(ModelConfig())
    assert ours == counted(ModelConfig(pooling="plain")) == [55 * 55 * 96, *paper[1:]]
    assert (ours[0], paper[0]) == (290_400, 55 * 48 * 96)
    assert (sum(ours), sum(paper)) == (659_272, 622_312)
    assert (224 * 224 * 3, 227 * 227 * 3) == (150_528, 154_587)


def test_parameters_by_layer() -> None:
    """Section 1 gives each convolution "no more than 1%" of all parameters, footnote 2 the first dense layer most."""
    with torch.device("meta"):
        net = models.build(ModelConfig(), classes=1000, crop=227)
        half = models.build(ModelConfig("alexnet_one_tower", width=0.5), classes=1000, crop=227)
    shares = [100 * sum(p.numel() for p in layer.parameters()) / 60_965_224 for layer in net.children()]
    # conv 1 to 5, fc 6, its dropout, fc 7, its dropout, fc 8
    assert [round(share, 2) for share in shares] == [0.06, 0.50, 1.45, 1.09, 0.73, 61.93, 0, 27.53, 0, 6.72]

    maps, sides = [3, 48, 128, 192, 192, 256], [11, 5, 3, 3, 3]  # footnote 2: the last convolution is not halved
    own = sum((side * side * a + 1) * b for side, (a, b) in zip(sides, pairwise(maps), strict=True))
    dense = sum((a + 1) * b for a, b in pairwise([6 * 6 * 256, 4096, 4096, 1000]))
    assert own + dense == 59_798_312
    assert sum(p.numel() for p in half.parameters()) == 40_702_632, "model.width halves it"


def test_views_of_an_image() -> None:
    """Counted by drawing. The paper's 2048 would be 32 x 32 places, and their reflections."""
    for crop, views in ((227, 30 * 30 * 2), (224, 33 * 33 * 2)):
        size, augment = np.full((60_000, 2), 256), Augment(crop=crop)
        drawn = random_views(size, augment, np.zeros((3, 3)), seed=0, epoch=0, start=0)
        assert len(np.unique(np.column_stack([drawn.corner, drawn.mirror]), axis=0)) == views


def test_dropped_units_take_no_part() -> None:
    """Section 4.2: they "do not contribute to the forward pass and do not participate in back-propagation"."""
    torch.manual_seed(0)
    net = AlexNet(4, 67, ModelConfig(hidden=64))
    x, keys = torch.randn(1, 3, 67, 67) * 60, mask_keys(0, 0, np.arange(1))
    logits = net(x, keys)
    F.cross_entropy(logits, torch.tensor([1])).backward()
    kept = net.drop6(torch.ones(1, 64), keys)[0] > 0
    assert 16 < kept.sum() < 48
    gradient = net.fc6.weight.grad
    assert gradient is not None
    assert (gradient[~kept] == 0).all()
    assert (gradient[kept].abs().sum(1) > 0).all()
    with torch.no_grad():
        net.fc6.weight[~kept] += 1
    assert torch.equal(net(x, keys), logits)


def test_all_layers_have_one_learning_rate() -> None:
    """Section 5, "an equal learning rate for all layers": weights and biases move by lr times the same gradient."""
    net = AlexNet(3, 67, ModelConfig(hidden=8))
    before = [p.detach().clone() for p in net.parameters()]
    optimizer = optim.build(OptimConfig(weight_decay=0), net)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optim.update(optimizer, torch.amp.GradScaler("cpu", enabled=False))
    for old, new in zip(before, net.parameters(), strict=True):
        torch.testing.assert_close(new.detach(), old - 0.01, rtol=0, atol=1e-7)
