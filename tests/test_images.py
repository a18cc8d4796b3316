"""The loader in a training script of one's own, and the page about it: docs/loader.md."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import cross_entropy
from torchvision.transforms import functional as F

from pipelines import ImageLoader, ValidationLoader
from pipelines.errors import UserError
from pipelines.images import ImageOptions, decoding
from pipelines.manifest import ShardError
from pipelines.pack import Options, pack
from pipelines.sources import ImageFolder
from tests.helpers import docs
from tests.helpers.launch import finish, spawn
from tests.helpers.reference import reference_crop
from tests.test_dali import no_threads, threads

ROOT = Path(__file__).parent.parent
PAGE = docs.read((ROOT / "docs" / "loader.md").read_text(encoding="utf-8"))
SIX, SCRIPT = (block.text for block in PAGE.blocks if block.language == "python")
COUNTS = {"train": 60, "val": 21}
GAP = 4  # levels between the grey of an image and that of the next one


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sets train/ (60) and val/ (21) of plain grey images. Image i has level 4 i and class i modulo 3."""
    root = tmp_path_factory.mktemp("numbered")
    for split, count in COUNTS.items():
        for i in range(count):
            path = root / "folder" / split / "abc"[i % 3] / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (72, 64), (GAP * i,) * 3).save(path, quality=95)
        pack(ImageFolder(root / "folder" / split), root / split, Options(64, shard_mb=0.02), split=split, workers=1)
    return root


def make(directory: Path, **options: Any) -> ImageLoader:
    return ImageLoader(directory, **{"batch": 8, "crop": 64, "resize": 64, "threads": 1, "readers": 2, **options})


def grey(loader: ImageLoader | ValidationLoader, images: torch.Tensor, labels: torch.Tensor) -> list[int]:
    """The numbers of these images, seen in their pixels, after a look at their labels."""
    seen = ((images[:, 0, 0, 0] + loader.loader.mean[0]) / GAP).round().long()
    assert torch.equal(labels, seen % 3)
    return seen.tolist()


def plain(directory: Path, **options: Any) -> ImageLoader:
    """A loader whose pixels are the images' levels minus the mean."""
    return make(directory, inputs="mean_subtracted", lighting=0, **options)


@pytest.mark.integration
def test_importing_the_package_loads_neither_torch_nor_dali(numbered: Path, tmp_path: Path) -> None:
    """And the same program may end inside a loop: DALI would abort it."""
    program = """
import sys, pipelines
assert {"ImageLoader", "ValidationLoader", "__version__"} <= set(dir(pipelines)), dir(pipelines)
for name in ("ImageLaoder", "images"):
    try:
        getattr(pipelines, name)
    except AttributeError as error:
        assert str(error) == f"module 'pipelines' has no attribute {name!r}"
    else:
        raise AssertionError(name)
assert not {"torch", "nvidia", "webdataset", "numpy"} & sys.modules.keys()
from pipelines import manifest
assert "torch" not in sys.modules
from pipelines import ImageLoader
assert {"torch", "nvidia.dali"} <= sys.modules.keys()
assert pipelines.ImageLoader is ImageLoader and ImageLoader.__module__ == "pipelines.images"
batches = iter(ImageLoader(sys.argv[1], batch=2, crop=224))
next(batches)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program, str(numbered / "train")]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_epoch_over_two_ranks_shows_each_image_at_most_once(numbered: Path) -> None:
    """In another order in the next epoch; the images left over are others, too."""
    ranks = [plain(numbered / "train", rank=rank, world_size=2) for rank in range(2)]
    epochs = []
    for epoch in (0, 1):
        assert [(loader.epoch, loader.step) for loader in ranks] == [(epoch, 0)] * 2
        halves = [[grey(loader, *batch) for batch in loader] for loader in ranks]
        assert [len(half) for half in halves] == [len(loader) for loader in ranks] == [60 // 8] * 2
        assert all(len(numbers) == 4 for half in halves for numbers in half)
        epochs.append(list(chain(*halves[0], *halves[1])))
        assert len(set(epochs[-1])) == 56
    assert epochs[0] != epochs[1]
    assert set(epochs[0]) != set(epochs[1])


@pytest.mark.parametrize("size", [1, 2, 4])
def test_validation_shows_every_image_once(numbered: Path, size: int) -> None:
    """Again in each loop, in as many batches on every rank; what is left over makes short ones, and empty ones."""
    seen, lengths = [], []
    for rank in range(size):
        val = plain(numbered / "train", rank=rank, world_size=size).validation(numbered / "val", batch=10)
        next(iter(val))
        batches = [grey(val, *batch) for batch in val]
        assert len(batches) == len(val) == 3
        seen += chain(*batches)
        lengths.append(len(batches[-1]))
    assert sorted(seen) == list(range(21))
    assert sorted(lengths) == [0] * (size - 1) + [1]
    assert no_threads()


def test_pixels_are_torchvisions(shard_sets: Path) -> None:
    """Standardised with the training set's statistics, in the validation set, too."""
    train = make(shard_sets / "train", crop=67, resize=72)
    statistics = train.loader.shards.manifest
    for loader in (train, train.validation(shard_sets / "val")):
        shards = loader.loader.shards
        (images, labels), (samples, start) = next(iter(loader)), loader.loader.samples(0, 0)
        assert (images.dtype, images.shape, labels.dtype) == (torch.float32, (8, 3, 67, 67), torch.int64)
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert labels.tolist() == shards.labels(samples).tolist()
        views = loader.loader.plan.views(0, samples, start)
        for i, sample in enumerate(samples.tolist()):
            image = Image.open(io.BytesIO(shards.read(sample).tobytes())).convert("RGB")
            crop = Image.fromarray(np.ascontiguousarray(reference_crop(image, views, i, 67)))
            if loader is not train:
                crop = F.center_crop(image, [67])
            lit = F.to_tensor(crop) + torch.from_numpy(views.shift[i] / 255).view(3, 1, 1)
            expected = F.normalize(lit, statistics.mean, statistics.std)
            torch.testing.assert_close(images[i], expected, atol=1e-4, rtol=0)
    assert abs(views.shift).max() == 0


def raw(images: torch.Tensor, labels: torch.Tensor) -> list[bytes]:
    """Pixels and label of each image."""
    return [image.numpy().tobytes() + bytes([label]) for image, label in zip(images, labels.tolist(), strict=True)]


def shown(directory: Path, state: str, steps: int, size: int) -> tuple[list[list[bytes]], str]:
    """The global batches of so many steps over `size` ranks from a state (as JSON) on, and the state after them."""
    ranks, states = [], set()
    for rank in range(size):
        loader, batches = make(directory, seed=5, rank=rank, world_size=size), []
        if state:
            loader.load_state_dict(json.loads(state))
        while len(batches) < steps:
            for batch in loader:
                batches.append(raw(*batch))
                if len(batches) == steps:
                    states.add(json.dumps(loader.state_dict()))
                    break
        ranks.append(batches)
    (after,) = states
    return [list(chain(*shares)) for shares in zip(*ranks, strict=True)], after


def test_a_state_goes_on_with_the_same_batches_at_any_world_size(numbered: Path) -> None:
    """Through JSON; in mid-epoch, at the end of an epoch, and after a break without a state."""
    expected, end = shown(numbered / "train", "", 14, 1)
    assert len({image for batch in expected for image in batch}) == 14 * 8
    found, state = [], ""
    for steps, size in ((3, 2), (4, 3), (5, 2), (2, 1)):
        batches, state = shown(numbered / "train", state, steps, size)
        found += batches
    assert found == expected
    assert state == end
    assert (json.loads(end)["epoch"], json.loads(end)["step"]) == (2, 0)
    loader, again = make(numbered / "train", seed=5), []
    while loader.epoch < 2:
        for batch in loader:
            again.append(raw(*batch))
            if loader.step % 3 == 2:
                break
    assert again == expected


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "seed": (lambda state: {**state, "seed": 4}, "with seed 4, and this loader has 0"),
    "batch": (lambda state: {**state, "batch": 16}, "with batch 16, and this loader has 8"),
    "augmentation": (lambda state: {**state, "mirror": False}, "with mirror False, and this loader has True"),
    "a default": (lambda state: {k: v for k, v in state.items() if k != "crop"}, "with crop 227, and this loader"),
    "another version": (lambda state: {**state, "blur": 2}, "with blur 2, and this loader has None"),
    "set": (lambda state: {**state, "set": "0" * 64}, "of another shard set than .*train, or this one was packed"),
    "step": (lambda state: {**state, "step": 7}, "at epoch 0, step 7, and an epoch has 7 steps"),
    "a net's": (lambda state: {"weight": torch.zeros(1)}, r"no state of an ImageLoader: give what its state_dict\(\)"),
    "nothing": (lambda state: {}, "no state of an ImageLoader"),
}


@pytest.mark.parametrize("of", REFUSED)
def test_a_state_that_would_show_other_images_is_refused(numbered: Path, of: str) -> None:
    change, said = REFUSED[of]
    loader = make(numbered / "train")
    loader.load_state_dict({**loader.state_dict(), "step": 2})
    with pytest.raises(UserError, match=said):
        loader.load_state_dict(change(loader.state_dict()))
    assert (loader.epoch, loader.step) == (0, 2)
    other = make(numbered / "train", threads=2, readers=3, ahead=1)
    other.load_state_dict({k: v for k, v in loader.state_dict().items() if k != "lighting"})  # it has its default
    assert other.step == 2


IMPOSSIBLE = {
    "a small batch": ({"batch": 2, "rank": 0, "world_size": 3}, "batch is 2 for 3 ranks: it is the global batch"),
    "no batch": ({"batch": 0}, "batch is 0: it must be at least 1"),
    "a large batch": ({"batch": 61}, "batch 61 is larger than the 60 images of .*train: lower it"),
    "crop": ({"crop": 65}, "crop 65 is larger than resize 64: it is cut from that"),
    "bounds": ({"lighting": -0.5}, "lighting is -0.5: it must be at least 0"),
    "text": ({"crop": "64"}, "crop is '64': it must be of type int"),
    "a fraction": ({"batch": 8.5}, "batch is 8.5: it must be of type int"),
    "nothing": ({"seed": None}, "seed is None: it must be of type int"),
    "inputs": ({"inputs": "imagenet"}, "inputs is imagenet: it must be one of mean_subtracted"),
    "rank": ({"rank": 2, "world_size": 2}, "rank is 2 and world_size 2"),
    "half a rank": ({"rank": 0.5, "world_size": 2}, "rank is 0.5: it must be of type int"),
    "a large seed": ({"seed": 1 << 70}, r"seed is .*: it must lie in \[0, "),
    "half": ({"rank": 1}, "rank and world_size belong together"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_impossible_values(numbered: Path, case: str) -> None:
    options, said = IMPOSSIBLE[case]
    with pytest.raises(UserError, match=said):
        make(numbered / "train", **options)


def test_what_is_no_state(numbered: Path) -> None:
    loader = make(numbered / "train")
    with pytest.raises(UserError, match="this is no state of an ImageLoader"):
        loader.load_state_dict(None)  # type: ignore[arg-type]
    loader.step = 10**6
    with pytest.raises(UserError, match=r"step is 1000000, and an epoch has \d+: set"):
        next(iter(loader))
    with pytest.raises(UserError, match=r"batch is 2\.5"):
        loader.validation(numbered / "val", 2.5)  # type: ignore[arg-type]


def test_a_state_is_plain(numbered: Path, tmp_path: Path) -> None:
    """Numbers of numpy's that the user gave, too, would be refused when a checkpoint is read."""
    loader = make(numbered / "train", batch=np.int64(8), seed=np.uint8(3), lighting=np.float64(0.2), mirror=np.True_)
    torch.save(loader.state_dict(), tmp_path / "state.pt")
    loader.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert {type(value) for value in loader.state_dict().values()} == {int, float, str, bool}
    make(numbered / "train", batch=8, seed=3, lighting=0.2).load_state_dict(loader.state_dict())


def test_what_else_cannot_be(numbered: Path, shard_sets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match="ImageLoader has no option seeds: did you mean seed"):
        make(numbered / "train", seeds=1)
    with pytest.raises(ShardError, match="folder"):
        make(numbered / "folder")
    with pytest.raises(ShardError, match="have different classes"):
        make(numbered / "train").validation(shard_sets / "val")
    with pytest.raises(UserError, match="batch is -1: it must be at least 1"):
        make(numbered / "train").validation(numbered / "val", batch=-1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"one of 2 ranks, and .* call init_process_group before ImageLoader"):
        make(numbered / "train")
    assert make(numbered / "train", rank=0, world_size=1).loader.dp_size == 1


def loop(loader: ImageLoader, act: Callable[[], Any]) -> None:
    for _ in loader:
        act()


def test_a_loop_that_is_left_ends_its_threads(numbered: Path) -> None:
    loader = make(numbered / "train")
    for _ in loader:
        assert "loader" in threads()
        break
    assert no_threads()
    with pytest.raises(KeyError):
        loop(loader, lambda: {}["injected"])
    assert no_threads()
    assert loader.step == 2


def test_a_loop_inside_another_is_refused(numbered: Path) -> None:
    """And so is a state that is loaded inside one: either way the outer loop would go on elsewhere."""
    loader = make(numbered / "train")
    state = loader.state_dict()
    for act in (lambda: next(iter(loader)), lambda: loader.load_state_dict(state)):
        with pytest.raises(RuntimeError, match="was begun inside this one: leave a loop by break"):
            loop(loader, act)
    assert (loader.epoch, loader.step) == (0, 0)


def test_images_for_a_gpu_are_decoded_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the CPUs of a node shared out to its ranks."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(10)))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    options = ImageOptions()
    for name, index in (("cuda:1", 1), ("cuda", 3)):
        decode = decoding(torch.device(name), options)
        assert (decode.device, decode.device_id, decode.place) == ("gpu", index, torch.device("cuda", index))
        assert (decode.threads, decode.inputs) == (2, "standardized")
    decode = decoding(torch.device("cpu"), ImageOptions(threads=7))
    assert (decode.device, decode.device_id, decode.threads, decode.place) == ("cpu", None, 7, torch.device("cpu"))


def test_the_six_lines_of_the_page(shard_sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they stand there: one epoch, in which the net changes."""
    assert len([line for line in SIX.splitlines() if line.strip()]) == 6
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "own").symlink_to(shard_sets)
    monkeypatch.chdir(tmp_path)
    net = nn.Sequential(nn.AvgPool2d(32), nn.Flatten(), nn.Linear(147, 3))
    before = net[2].weight.clone()
    names: dict[str, Any] = {
        "net": net,
        "optimizer": torch.optim.SGD(net.parameters(), lr=0.01),
        "cross_entropy": cross_entropy,
    }
    exec(compile(SIX, "docs/loader.md", "exec"), names)
    assert (names["train"].epoch, names["train"].step, len(names["train"])) == (1, 0, 7)
    assert not torch.equal(net[2].weight, before)


# In front of the script of the page: what each rank is shown goes to a file, and it is struck at a batch.
WATCHED = """
import os, signal, zlib
from pipelines import ImageLoader
inner = ImageLoader.__iter__
def watched(self):
    place = (self.epoch, self.step)
    for images, labels in inner(self):
        with open(os.environ["SEEN"] + os.environ["RANK"], "a") as file:
            crc = zlib.crc32(images.permute(0, 2, 3, 1).numpy().tobytes())
            print(*place, crc, *labels.tolist(), file=file, flush=True)
        if os.environ["STRUCK"] == "%d %d" % place:
            os.kill(os.getpid(), signal.SIGKILL)
        place = (self.epoch, self.step)
        yield images, labels
ImageLoader.__iter__ = watched
"""


@pytest.mark.integration
@pytest.mark.slow
def test_the_script_of_the_page(shard_sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it stands there but for some numbers: torchvision's AlexNet on two ranks, killed in mid-epoch and started
    again, is shown what one that was never stopped is shown, and ends with the same bits."""
    script = SCRIPT
    for there, here in (("crop=224", "crop=64, resize=72"), ("= 90, 100,", "= 2, 3,")):
        assert script.count(there) == 1
        script = script.replace(there, here)
    ends, seen = [], []
    for name, strikes in (("whole", [""]), ("struck", ["0 5", ""])):
        home = tmp_path / name
        (home / "data").mkdir(parents=True)
        (home / "data" / "own").symlink_to(shard_sets)
        (home / "train.py").write_text(WATCHED + script)
        monkeypatch.chdir(home)
        for struck in strikes:
            env = {"PYTHONPATH": str(ROOT), "SEEN": str(home / "seen"), "STRUCK": struck, "CUDA_VISIBLE_DEVICES": ""}
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train.py"]
            result = finish(spawn(command, env=env, how="exec"))
            assert (result.returncode == 0) == (not struck), result.stderr
        assert re.findall(r"epoch (\d): top-1 error [\d.]+% of 63 images", result.stdout) == ["1", "2"]
        ends.append(torch.load("last.pt", weights_only=True))
        (home / "last.pt").unlink()
        seen.append([(home / f"seen{rank}").read_text().splitlines() for rank in range(2)])
    for whole, struck in zip(*seen, strict=True):
        assert len(whole) == len(set(whole)) == 14
        assert len(struck) > 14, "steps since the last save are repeated"
        assert set(struck) == set(whole)
    one, two = ends
    assert one["train"] == two["train"]
    assert (one["train"]["epoch"], one["train"]["step"]) == (2, 0)
    assert all(torch.equal(one["net"][key], two["net"][key]) for key in one["net"] | two["net"])
    momenta = [end["optimizer"]["state"] for end in ends]
    assert all(torch.equal(momenta[0][i]["momentum_buffer"], momenta[1][i]["momentum_buffer"]) for i in momenta[0])
