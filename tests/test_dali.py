"""The loader: DALI's pixels against Pillow's and torchvision's, and the same samples at any world size."""

from __future__ import annotations

import gc
import hashlib
import io
import tarfile
import threading
import time
import weakref
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from nvidia.dali import Pipeline, backend, fn, types
from PIL import Image, ImageOps
from torchvision.transforms import functional as F

from dist_train.models.dropout import keys_of_epoch, mask_keys
from pipelines.augment import Augment, scale
from pipelines.dali import DEPTH, Decode, Device, Feed, _asking, collect, graph
from pipelines.handover import HandOver
from pipelines.indexing import index
from pipelines.loader import Batch, Loader, Read
from pipelines.manifest import Manifest, ShardError
from pipelines.pack import Options, pack
from pipelines.plan import FixedPlan, Plan, TrainingPlan
from pipelines.rows import checksum
from pipelines.shards import ShardSet
from pipelines.sources import ImageFolder
from pipelines.verify import verify
from tests.conftest import CLASSES, TINTS, photograph
from tests.helpers.reference import reference_crop

pytestmark = pytest.mark.integration

AUGMENT = Augment(resize=72, crop=67)
DECODE, READING = Decode(threads=2), Read()
GPU = Decode("gpu", device_id=0, threads=2)


def make(
    directory: Path,
    augment: Augment = AUGMENT,
    *,
    training: bool = True,
    seed: int = 0,
    decode: Decode = DECODE,
    reading: Read = READING,
    **options: Any,
) -> Loader:
    shards = ShardSet(directory)
    plan: Plan = TrainingPlan(shards, augment, shards.manifest, seed) if training else FixedPlan(shards, augment)
    return Loader(plan, shards.manifest, decode=decode, reading=reading, **{"batch": 11, **options})


def threads() -> list[str]:
    """Loader threads that still run."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(("loader", "read"))]


def no_threads() -> bool:
    """True if all have ended after a moment: nobody joins them."""
    until = time.monotonic() + 5
    while threads() and time.monotonic() < until:
        time.sleep(0.01)
    return not threads()


def decoded(shards: ShardSet, sample: int) -> Image.Image:
    return Image.open(io.BytesIO(shards.read(sample).tobytes())).convert("RGB")


def levels(loader: Loader, batch: Batch, shift: NDArray[np.float32]) -> NDArray[np.float32]:
    """A batch's inputs before lighting and mean, in levels, [n, crop, crop, 3]."""
    inputs = batch.inputs.permute(0, 2, 3, 1).numpy()
    return inputs - shift[:, None, None] + 255 * np.array(loader.shards.manifest.mean, np.float32)


def test_inputs_are_exact_without_a_resize(shard_sets: Path) -> None:
    loader = make(shard_sets / "train", seed=3)
    batches = list(loader.epoch(2))  # all are kept, so memory that DALI used again would be seen
    assert len(batches) == 21
    reflected = 0
    for step, batch in enumerate(batches):
        assert batch.start == 11 * step
        assert batch.inputs.shape == (11, 3, 67, 67)
        assert batch.inputs.dtype == torch.float32
        assert batch.inputs.is_contiguous(memory_format=torch.channels_last)
        views = loader.plan.views(2, batch.samples, batch.start)
        images = levels(loader, batch, views.shift)
        for i, sample in enumerate(batch.samples):
            expected = reference_crop(decoded(loader.shards, int(sample)), views, i, 67)
            np.testing.assert_allclose(images[i], expected, atol=1e-4)
        assert abs(views.shift).min() > 0
        reflected += views.mirror.sum()
        names = [loader.shards.name(int(sample)).split("-")[2] for sample in batch.samples]
        assert batch.labels.tolist() == [CLASSES.index(name) for name in names]
        assert batch.labels.dtype == torch.int64
    assert 80 < reflected < 151


def test_lighting_and_mean_are_fused_as_the_paper_adds_them(shard_sets: Path) -> None:
    """Against an image computed in the paper's order: crop, reflect, add lighting, subtract the mean."""
    loader = make(shard_sets / "train", seed=1)
    manifest = loader.shards.manifest
    batch = next(loader.epoch(0))
    views = loader.plan.views(0, batch.samples, 0)
    for i, sample in enumerate(batch.samples):
        pixels = reference_crop(decoded(loader.shards, int(sample)), views, i, 67) / 255
        lit = pixels + views.shift[i] / 255
        np.testing.assert_allclose(
            batch.inputs[i].permute(1, 2, 0).numpy(), 255 * (lit - manifest.mean), atol=1e-3, rtol=0
        )


@pytest.mark.integration
def test_scales_of_the_inputs(shard_sets: Path) -> None:
    """The same pixels, lighting included, in each of the three scales."""
    plain, divided, unit = (
        make(shard_sets / "train", decode=Decode(threads=2, inputs=inputs))
        for inputs in ("mean_subtracted", "standardized", "minus_one_to_one")
    )
    mean, std = (
        255 * torch.tensor(v).view(1, 3, 1, 1) for v in (plain.shards.manifest.mean, plain.shards.manifest.std)
    )
    for one, two, three in zip(plain.epoch(1), divided.epoch(1), unit.epoch(1), strict=True):
        torch.testing.assert_close(two.inputs * std, one.inputs, atol=1e-3, rtol=0)
        torch.testing.assert_close((three.inputs + 1) * 127.5, one.inputs + mean, atol=1e-3, rtol=0)


def test_statistics_are_the_training_sets(shard_sets: Path) -> None:
    train, val = ShardSet(shard_sets / "train"), ShardSet(shard_sets / "val")
    plan, decode = FixedPlan(val, AUGMENT), Decode(threads=1)
    own = next(Loader(plan, val.manifest, batch=63, decode=decode).epoch())
    right = next(Loader(plan, train.manifest, batch=63, decode=decode).epoch())
    offset = 255 * (torch.tensor(val.manifest.mean) - torch.tensor(train.manifest.mean))
    torch.testing.assert_close(
        right.inputs - own.inputs, offset.view(1, 3, 1, 1).expand_as(own.inputs), atol=1e-3, rtol=0
    )


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard set of large and small images of many shapes, stored as they are."""
    root = tmp_path_factory.mktemp("originals")
    rng = np.random.default_rng(5)
    (root / "folder" / "class").mkdir(parents=True)
    for i in range(24):
        width, height = ((400, 500), (500, 375), (28, 28), (72, 301), (333, 73))[i % 5]
        path = root / "folder" / "class" / f"{i}.jpg"
        photograph(rng, width, height, TINTS[i % 3]).save(path, quality=95)
    pack(ImageFolder(root / "folder"), root / "set", Options(shorter_side=0), split="x", workers=1)
    return root / "set"


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("center_square", [False, True])
def test_inputs_after_a_resize(originals: Path, training: bool, center_square: bool) -> None:
    augment = Augment(resize=72, crop=67, center_square=center_square)
    loader = make(originals, augment, batch=8, training=training, seed=4)
    differences = []
    for batch in loader.epoch(1):
        views = loader.plan.views(1, batch.samples, batch.start)
        images = levels(loader, batch, views.shift)
        for i, sample in enumerate(batch.samples):
            image = decoded(loader.shards, int(sample))
            left, top = views.corner[i].tolist()
            resized = F.resize(torch.from_numpy(np.array(image)).permute(2, 0, 1), [72], antialias=True)
            crop = F.crop(resized, top, left, 67, 67)
            torchvisions = (F.hflip(crop) if views.mirror[i] else crop).permute(1, 2, 0).numpy()
            for expected in (reference_crop(image, views, i, 67), torchvisions):
                difference = abs(images[i] - expected)
                assert difference.max() < 3.001, (image.size, views.corner[i])
                differences.append(difference.mean())
    assert len(differences) == 48
    assert np.mean(differences) < 0.5


KINDS = {  # of file, and how Pillow writes it
    "420.jpg": {"quality": 90, "subsampling": 2},
    "444.jpg": {"quality": 90, "subsampling": 0},
    "progressive.jpg": {"quality": 90, "progressive": True},
    "restarts.jpg": {"quality": 90, "restart_marker_blocks": 3},
    "grey.jpg": {"quality": 90},
    "x.png": {},
    "x.webp": {"quality": 90},
}
SHAPES = ((96, 72), (72, 133), (72, 72), (57, 41), (31, 101), (301, 203), (144, 250), (73, 74))  # width, height
FITS = 3  # of them have a shorter side of 72


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard set in which some images already have the right size, in all kinds of files and some with odd sizes."""
    root = tmp_path_factory.mktemp("mixed")
    rng = np.random.default_rng(8)
    (root / "folder" / "class").mkdir(parents=True)
    for i, (width, height) in enumerate(SHAPES):
        for kind, options in KINDS.items():
            image = photograph(rng, width, height, TINTS[i % 3])
            if kind == "grey.jpg":
                image = image.convert("L")
            image.save(root / "folder" / "class" / f"{i}-{kind}", **options)
    pack(ImageFolder(root / "folder"), root / "set", Options(shorter_side=0), split="x", workers=1)
    return root / "set"


def all_resized(loader: Loader, batch: Batch, epoch: int) -> torch.Tensor:
    """Inputs of a batch if every image is decoded whole and then resized, even if it already has that size."""
    shards, crop, n = loader.shards, loader.augment.crop, len(batch.samples)
    views = loader.plan.views(epoch, batch.samples, batch.start)
    ratio = shards.sizes(batch.samples) / views.size
    begin, end = (np.float32(edge * ratio)[:, ::-1].copy() for edge in (views.corner, views.corner + crop))
    encoded = [shards.read(int(sample)) for sample in batch.samples]
    feed = (encoded, begin, end, views.mirror.astype(np.int32), loader.mean - views.shift)
    pipeline = Pipeline(n, 1, None, prefetch_queue_depth=1)
    with pipeline:
        data, begin, end, mirror, mean = fn.external_source(lambda: feed, num_outputs=5, batch=True)
        image = fn.decoders.image(data, output_type=types.RGB, adjust_orientation=False)
        linear = {"interp_type": types.INTERP_LINEAR, "subpixel_scale": False}
        image = fn.resize(image, resize_x=crop, resize_y=crop, roi_start=begin, roi_end=end, **linear)
        image = fn.crop_mirror_normalize(image, mirror=mirror, mean=mean, std=[1.0] * 3, output_layout="HWC")
        pipeline.set_outputs(image)
    pipeline.build()
    return collect(pipeline)[0].permute(0, 3, 1, 2)


@pytest.mark.parametrize("center_square", [False, True])
@pytest.mark.parametrize("batch", [1, 10])  # 56 images: the last one is short
def test_only_some_are_resized_with_the_pixels_of_all_resized(mixed: Path, batch: int, center_square: bool) -> None:
    """Bit for bit, whatever else is in the batch."""
    loader = make(mixed, Augment(72, 67, center_square), batch=batch, seed=3)
    fits = loader.shards.sizes(np.arange(len(loader.shards))).min(axis=1) == 72
    assert fits.sum() == FITS * len(KINDS)
    sorted_ones = np.argsort(fits, kind="stable")  # batches of misfits, a mixed one, batches of others
    for epoch in (0, 1):
        for shown in loader.epoch(epoch):
            assert torch.equal(shown.inputs, all_resized(loader, shown, epoch))
    for view in (0, 1, 4, 7, 9) if batch > 1 else (3,):
        plan = FixedPlan(loader.shards, loader.augment, view, sorted_ones)
        shares = []
        fixed = Loader(plan, loader.shards.manifest, batch=batch, decode=DECODE)
        for shown in fixed.epoch():
            assert torch.equal(shown.inputs, all_resized(fixed, shown, 0))
            shares.append(fits[shown.samples].mean())
        assert shares[0] == 0
        assert shares[-1] == 1
        assert len(shown.samples) == (56 % batch or batch)


@pytest.mark.integration
@pytest.mark.slow
def test_what_dali_reads_lives_until_its_batch_is_out(mixed: Path) -> None:
    """On the CPU the feeds are not copied. They are freed soon after, too."""
    loader, steps = make(mixed, batch=7), 8
    feeds = loader.feeds(0, range(steps))
    living: list[list[weakref.ref[Any]]] = []

    def source() -> Feed:
        feed = next(feeds)
        encoded, *others = (
            feed[name] for name in ("encoded", "begin", "extent", "roi_begin", "scaled", "mirror", "mean")
        )
        living.append([weakref.ref(array) for array in (*encoded, *others)])
        return feed

    pipeline = graph(source, augment=AUGMENT, batch=7, resize=True, std=[1.0] * 3, decode=DECODE)
    pipeline.build()
    for step in range(steps):
        with suppress(StopIteration):
            collect(pipeline)
        gc.collect()
        assert all(array() is not None for array in living[step])
        assert not any(array() is not None for old in living[: max(0, step - DEPTH - 2)] for array in old)
    assert len(living) == steps


def test_what_dali_copies_is_not_held() -> None:
    """For the GPU."""
    given: Feed = {"encoded": [np.zeros(3, np.uint8)], "mean": np.zeros((1, 3)), "mirror": np.zeros(1)}
    alive, feeds = weakref.ref(given["encoded"][0]), [given]
    del given
    assert len(_asking(feeds.pop, ["encoded", "mean"], held=0)()) == 2
    assert alive() is None


def test_shards_of_other_tools(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    images = []
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for i, kind in enumerate(("PNG", "WEBP", "JPEG") * 3):
            out = io.BytesIO()
            photograph(rng, 72 + 3 * i, 72, TINTS[i % 3]).save(out, kind)
            images.append(np.asarray(Image.open(out).convert("RGB")))
            for extension, data in ((kind.lower(), out.getvalue()), ("cls", str(i % 3).encode())):
                member = tarfile.TarInfo(f"folder/{'k' * 120}{i}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    index(tmp_path, classes=None, split="x", workers=1)
    loader = make(tmp_path, Augment(72, 72), training=False)
    (batch,) = loader.epoch()
    pixels = levels(loader, batch, np.zeros((9, 3), np.float32))
    for i, image in enumerate(images):
        centre = np.asarray(F.center_crop(Image.fromarray(image), [72]))
        np.testing.assert_allclose(pixels[i], centre, atol=1e-4)
    assert batch.labels.tolist() == [0, 1, 2] * 3


def lying(rng: np.random.Generator, way: int, kind: str = "JPEG") -> bytes:
    """A photograph with this EXIF orientation."""
    exif, out = Image.Exif(), io.BytesIO()
    exif[0x0112] = way
    photograph(rng, 110 + way, 74 + way, TINTS[way % 3]).save(out, kind, exif=exif)
    return out.getvalue()


def write_tar(directory: Path, files: dict[str, bytes]) -> None:
    """Writes a tar of images of one class, like another tool."""
    directory.mkdir(exist_ok=True)
    with tarfile.open(directory / "x.tar", "w") as tar:
        for name, data in files.items():
            for member, content in ((name, data), (f"{name.partition('.')[0]}.cls", b"0")):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


@pytest.fixture(scope="module")
def turned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tars/, an indexed set of photographs in all EXIF orientations, and folder/class/, their files."""
    root = tmp_path_factory.mktemp("turned")
    rng = np.random.default_rng(11)
    files = {f"{i}.jpg": lying(rng, i + 1) for i in range(8)}
    files |= {"8.png": lying(rng, 6, "PNG"), "9.webp": lying(rng, 8, "WEBP"), "x.jpg": lying(rng, 5)}
    write_tar(root / "tars", files)
    (root / "folder" / "class").mkdir(parents=True)
    for name, data in files.items():
        (root / "folder" / "class" / name).write_bytes(data)
    index(root / "tars", classes=None, split="x", workers=1)
    return root


@pytest.mark.parametrize("resize", [72, 80])
def test_photographs_that_lie_are_shown_as_a_packed_set_shows_them(turned: Path, tmp_path: Path, resize: int) -> None:
    """Turned and mirrored as the EXIF orientation says, by `index` as by `pack`: where an image is resized, and where
    only the crop of it is decoded (of those turned in way 6, at 80)."""
    assert verify(turned / "tars", workers=1) == []
    assert ShardSet(turned / "tars").manifest.stored == {"turned": 10}, "one of 11 is upright"
    pack(ImageFolder(turned / "folder"), tmp_path / "set", Options(0, quality=95), split="x", workers=1)
    crops: dict[str, dict[str, np.ndarray]] = {}
    for directory in (turned / "tars", tmp_path / "set"):
        loader = make(directory, Augment(resize, 67), training=False)
        (batch,) = loader.epoch()
        assert batch.replaced == 0
        pixels = levels(loader, batch, np.zeros((11, 3), np.float32))
        names = [loader.shards.name(i).rpartition("/")[2].rpartition(".")[0][-1] for i in batch.samples]
        crops[directory.name] = dict(zip(names, pixels, strict=True))
    for path in (turned / "folder" / "class").iterdir():
        upright = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
        expected = np.asarray(F.center_crop(F.resize(upright, resize), [67]), np.float32)
        assert abs(crops["tars"][path.stem] - expected).mean() < 1, path.name
        assert abs(crops["tars"][path.stem] - crops["set"][path.stem]).mean() < 4, "those are JPEGs of JPEGs"


def test_a_set_that_an_earlier_program_indexed_is_shown_as_it_was(tmp_path: Path) -> None:
    """Lying: its index has the stored width and height, and its manifest does not say that images are turned."""
    data = lying(np.random.default_rng(12), 6)
    write_tar(tmp_path, {"a.jpg": data})
    index(tmp_path, classes=None, split="x", workers=1)
    rows = np.load(tmp_path / "index.npy")
    assert (rows["width"][0], rows["height"][0]) == (80, 116)
    rows["width"], rows["height"] = 116, 80
    np.save(tmp_path / "index.npy", rows)
    digest = hashlib.sha256((tmp_path / "index.npy").read_bytes()).hexdigest()
    old = Manifest.read(tmp_path)
    shards = [old.shards[0] | {"rows": checksum(rows)}]
    replace(old, stored={}, shards=shards, index_sha256=digest).write(tmp_path)
    assert verify(tmp_path, workers=1) == []
    loader = make(tmp_path, Augment(80, 67), training=False)
    (batch,) = loader.epoch()
    expected = F.center_crop(Image.open(io.BytesIO(data)), [67])
    np.testing.assert_allclose(levels(loader, batch, np.zeros((1, 3), np.float32))[0], np.asarray(expected), atol=1e-4)


def test_an_image_that_only_xmp_turns_is_rejected(tmp_path: Path) -> None:
    """Pillow, and so `pack`, reads the orientation from XMP; DALI does not."""
    out = io.BytesIO()
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    photograph(np.random.default_rng(12), 90, 80, TINTS[0]).save(out, "JPEG", xmp=xmp)
    write_tar(tmp_path, {"a.jpg": out.getvalue()})
    with pytest.raises(ShardError, match=r"no usable image in .*: 1 were rejected, .*: is turned by its XMP alone"):
        index(tmp_path, classes=None, split="x", workers=1)


@pytest.mark.parametrize("resize", [72, 80])
def test_world_sizes_give_the_same_global_batches(shard_sets: Path, resize: int) -> None:
    rng = np.random.default_rng(7)
    augment = Augment(resize=resize, crop=67)
    expected: list[tuple[bytes, list[int]]] = []
    for size in (1, 2, 3, 4):
        ranks = []
        for rank in range(size):
            decode = Decode(threads=int(rng.integers(1, 4)))
            reading = Read(readers=int(rng.integers(1, 9)), ahead=int(rng.integers(0, 5)))
            loader = make(
                shard_sets / "train", augment, seed=8, dp_rank=rank, dp_size=size, decode=decode, reading=reading
            )
            ranks.append([next(epoch) for epoch in [loader.epoch(3)] for _ in range(20)])
        batches = [
            (
                torch.cat([batch.inputs.permute(0, 2, 3, 1) for batch in parts]).numpy().tobytes(),
                torch.cat([batch.labels for batch in parts]).tolist(),
            )
            for parts in zip(*ranks, strict=True)
        ]
        expected = expected or batches
        assert batches == expected
    assert len({inputs for inputs, _ in expected}) == 20


def test_each_sample_at_most_once_an_epoch(shard_sets: Path) -> None:
    loader = make(shard_sets / "train", seed=1)
    orders = [np.concatenate([batch.samples for batch in loader.epoch(epoch)]) for epoch in (0, 1)]
    for order in orders:
        assert len(order) == len(set(order.tolist())) == 21 * 11  # the incomplete tail is dropped
    assert not np.array_equal(*orders)
    assert len(set(orders[0]) & set(orders[1])) < 21 * 11  # and is another one in the next epoch


def test_start_in_the_middle_of_an_epoch(shard_sets: Path) -> None:
    whole = list(make(shard_sets / "train", seed=2).epoch(1))
    for start in (1, 7, 20, 21):
        rest = list(make(shard_sets / "train", seed=2).epoch(1, start))
        assert len(rest) == 21 - start
        for one, two in zip(rest, whole[start:], strict=True):
            assert torch.equal(one.inputs, two.inputs)
            assert torch.equal(one.labels, two.labels)
            assert one.start == two.start


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_validation_covers_every_sample_once(shard_sets: Path, size: int) -> None:
    augment = Augment(resize=72, crop=67)
    seen: list[int] = []
    lengths = []
    for rank in range(size):
        loader = make(shard_sets / "val", augment, batch=31, training=False, dp_rank=rank, dp_size=size)
        batches = list(loader.epoch())
        lengths.append([len(batch.labels) for batch in batches])
        for batch in batches:
            seen += batch.samples.tolist()
            assert batch.inputs.shape == (len(batch.samples), 3, 67, 67)
            assert batch.labels.tolist() == loader.shards.index["label"][batch.samples].tolist()
            for image, sample in zip(levels(loader, batch, np.zeros((1, 3), np.float32)), batch.samples, strict=True):
                centre = np.asarray(F.center_crop(decoded(loader.shards, int(sample)), [67]))
                np.testing.assert_allclose(image, centre, atol=1e-4)
    assert sorted(seen) == list(range(63))
    assert {len(row) for row in lengths} == {3}  # 31 + 31 + 1
    assert sorted(row[2] for row in lengths) == [0] * (size - 1) + [1]


@pytest.mark.integration
def test_a_consumer_that_leaves_ends_the_threads(shard_sets: Path) -> None:
    shards, reads = ShardSet(shard_sets / "train"), []

    def read(sample: int) -> NDArray[np.uint8]:
        reads.append(sample)
        return shards.read(sample)

    loader = make(shard_sets / "train", reading=Read(read=read))
    for steps in (0, 1, 5):
        reads.clear()
        for i, _ in enumerate(loader.epoch()):
            assert "loader" in threads()
            if i == steps:
                break
        gc.collect()
        assert no_threads()
        assert len(reads) < (steps + 14) * 11  # the rest of the epoch's 21 batches is left unread
    unused = loader.epoch()
    del unused
    assert len(list(loader.epoch())) == 21
    assert no_threads()


def test_a_reader_that_fails_reaches_the_consumer(shard_sets: Path) -> None:
    shards = ShardSet(shard_sets / "train")
    fails = int(make(shard_sets / "train").plan.samples(0, 100, 101)[0])

    def read(sample: int) -> NDArray[np.uint8]:
        if sample == fails:
            raise ShardError("injected")
        return shards.read(sample)

    loader = make(shard_sets / "train", reading=Read(read=read, ahead=1))
    seen = []
    with pytest.raises(ShardError, match="injected"):
        seen.extend(loader.epoch())
    assert len(seen) < 10  # position 100 stands in batch 9
    del seen
    gc.collect()
    assert no_threads()


def test_the_next_images_are_read_while_a_batch_is_used(shard_sets: Path) -> None:
    """Section 4.1, "while the GPU is training on the previous batch": nobody asks, and still they come."""
    shards, reads = ShardSet(shard_sets / "train"), list[int]()

    def read(sample: int) -> NDArray[np.uint8]:
        reads.append(sample)
        return shards.read(sample)

    epoch = make(shard_sets / "train", reading=Read(read=read, ahead=1)).epoch()
    next(epoch)
    wait_for = time.monotonic() + 20
    while len(reads) < 33 and time.monotonic() < wait_for:
        time.sleep(0.01)
    assert len(reads) >= 33, "of three batches of 11, of which one was asked for"


def test_slow_reads_overlap(shard_sets: Path) -> None:
    shards = ShardSet(shard_sets / "train")
    lock, under_way, most = threading.Lock(), 0, 0

    def read(sample: int) -> NDArray[np.uint8]:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        time.sleep(0.02)
        with lock:
            under_way -= 1
        return shards.read(sample)

    loader = make(shard_sets / "train", reading=Read(read=read))
    assert sum(len(batch.labels) for batch in loader.epoch()) == 231
    assert most >= 8


# The GPU. -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resize", [True, False])
@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_placement(resize: bool, device: Device) -> None:
    """Constructs the graph, which needs no GPU, and walks it from its output to its inputs."""
    pipeline = graph(
        lambda: pytest.fail("nothing is run"),
        augment=AUGMENT,
        batch=8,
        resize=resize,
        std=[1.0, 1.0, 1.0],
        decode=Decode(device, 0 if device == "gpu" else None, threads=2),
    )
    (output,) = pipeline._graph_out
    assert output.device == device
    image, chain, arguments = output, [], set()
    while image.source.inputs:
        operator = image.source._op
        chain.append((operator.schema_name, operator.device))
        image, *others = image.source.inputs
        if operator.schema_name != "_conditional__Merge":  # its others are the images that are not resized
            arguments |= {argument.device for argument in others}
    assert arguments == {"cpu"}  # numbers, which every back end takes from the host
    assert type(image.source._op).__name__ == "ExternalSource"
    names = [
        "CropMirrorNormalize",
        "Flip",
        *(["_conditional__Merge", "Resize", "_conditional__Split"] if resize else []),
    ]
    if device == "gpu":
        names += ["Slice"]  # not of the decoder: that was seen to crash
        assert chain == [*((name, "gpu") for name in names), ("decoders__Image", "mixed")]
    else:
        assert chain == [(name, "cpu") for name in [*names, "decoders__ImageSlice"]]
    registered = {
        "cpu": backend.RegisteredCPUOps(),
        "mixed": backend.RegisteredMixedOps(),
        "gpu": backend.RegisteredGPUOps(),
    }
    for name, placed in chain:
        assert name in registered[placed]


@pytest.fixture
def sets(shard_sets: Path, mixed: Path, turned: Path) -> dict[str, Path]:
    return {"packed": shard_sets / "train", "mixed": mixed, "turned": turned / "tars"}


@pytest.mark.parametrize("of", ["packed", "mixed", "turned"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("center_square", [True, False])
def test_the_graph_of_a_gpu_shows_what_the_cpus_does(
    sets: dict[str, Path], monkeypatch: pytest.MonkeyPatch, of: str, training: bool, center_square: bool
) -> None:
    """On the CPU's operators, bit for bit: what `fn.slice` is given, its units and the order of its axes are right."""
    asked: list[dict[str, Any]] = []

    def image(encoded: Any, **how: Any) -> Any:
        asked.append(how)
        return original(encoded, **{**how, "device": "cpu"})

    original = fn.decoders.image
    monkeypatch.setattr(fn.decoders, "image", image)
    directory = sets[of]
    on_gpu = Decode("gpu", threads=2, hw_decoder_load=0.3, wanted=torch.device("cpu"))
    for resize in (72, 80):
        augment = Augment(resize, 67, center_square)
        here, there = (make(directory, augment, training=training, decode=decode) for decode in (DECODE, on_gpu))
        assert here.resizing == there.resizing == (resize == 80 or of != "packed")
        for one, two in zip(here.epoch(2 * training), there.epoch(2 * training), strict=True):
            assert torch.equal(one.inputs, two.inputs)
    assert [how["device"] for how in asked] == ["mixed"] * 2
    assert all(how["jpeg_fancy_upsampling"] and how["hw_decoder_load"] == 0.3 for how in asked)


@pytest.mark.parametrize("inputs", ["mean_subtracted", "minus_one_to_one", "standardized"])
def test_bytes_that_go_to_a_gpu_become_the_same_inputs(mixed: Path, inputs: Any) -> None:
    """A quarter of what floats would take to copy, normalised on the device by the same arithmetic."""
    floats = make(mixed, decode=Decode(threads=2, inputs=inputs))
    decode = Decode(threads=2, inputs=inputs, wanted=torch.device("meta"))  # a device that is not the CPU
    assert decode.gives_bytes
    for batch in make(mixed, decode=decode).epoch():
        assert {tensor.device.type for tensor in (batch.inputs, batch.labels, batch.keys)} == {"meta"}
    std = scale(inputs, floats.shards.manifest)[1]
    feeds = make(mixed, decode=decode).feeds(0, range(floats.steps))
    pipeline = graph(lambda: next(feeds), augment=AUGMENT, batch=11, resize=True, std=std.tolist(), decode=decode)
    pipeline.build()
    bring = HandOver(torch.device("cpu"), std)
    for expected in floats.epoch():
        pixels, mean = collect(pipeline)
        assert pixels.dtype == torch.uint8
        found, labels = bring([pixels, mean], expected.labels)
        assert found.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(found, expected.inputs, rtol=1e-6, atol=1e-5)
        if inputs == "mean_subtracted":
            assert torch.equal(found, expected.inputs)
        assert labels is expected.labels


def test_each_sample_has_its_key(shard_sets: Path) -> None:
    keys = keys_of_epoch(seed=3, first=100)
    loader = make(shard_sets / "train", dp_rank=1, dp_size=2)
    for step, batch in enumerate(loader.epoch(0, 4, keys), 4):
        positions = np.arange(batch.start, batch.start + len(batch.labels))
        assert torch.equal(batch.keys, mask_keys(3, 100 + step, positions))
    assert step == 20
    assert not next(loader.epoch()).keys.any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(("resize", "of"), [(72, "packed"), (80, "packed"), (72, "mixed"), (80, "turned")])
def test_gpu_inputs_are_the_cpus(shard_sets: Path, sets: dict[str, Path], resize: int, of: str) -> None:
    augment = Augment(resize=resize, crop=67)
    directory = sets[of]
    on_cpu = list(make(directory, augment).epoch())
    on_gpu = list(make(directory, augment, decode=GPU).epoch())  # all are kept
    assert len(on_cpu) == len(on_gpu) == {"packed": 21, "mixed": 5, "turned": 1}[of]
    for one, two in zip(on_cpu, on_gpu, strict=True):
        assert two.inputs.is_cuda
        assert two.inputs.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(one.labels, two.labels.cpu())
        difference = (one.inputs - two.inputs.cpu()).abs()
        assert difference.max() <= 4  # another JPEG decoder and another resize: they round in another way
        assert difference.mean() < 0.3
    for rank in range(3):
        batches = list(make(shard_sets / "val", batch=31, training=False, dp_rank=rank, dp_size=3, decode=GPU).epoch())
        assert all(batch.inputs.is_cuda and len(batch.inputs) == len(batch.labels) for batch in batches)
