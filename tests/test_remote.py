"""Sets elsewhere: the same samples as from a local directory, or one sentence, whatever the server does."""

from __future__ import annotations

import errno
import os
import shutil
import ssl
import subprocess
import sys
import time
from base64 import b64encode
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import numpy as np
import pytest

from pipelines import quarantine
from pipelines.augment import Augment
from pipelines.errors import UserError
from pipelines.files import regular
from pipelines.images import ImageLoader
from pipelines.loader import Loader, Read
from pipelines.manifest import ShardError
from pipelines.opened import ReadError
from pipelines.order import Ints
from pipelines.plan import FixedPlan, TrainingPlan
from pipelines.remote.ahead import Ahead
from pipelines.remote.places import expanded
from pipelines.remote.sets import open_set
from pipelines.shards import ShardSet
from tests.helpers.elsewhere import Handler, WebServer, served

pytestmark = pytest.mark.integration

AUGMENT = Augment(resize=72, crop=64)


@pytest.fixture
def server(shard_sets: Path) -> Iterator[WebServer]:
    with served(shard_sets) as server:
        yield server


@pytest.fixture
def cache(tmp_path: Path) -> str:
    return str(tmp_path / "cache")


def same(ours: ShardSet, theirs: ShardSet) -> None:
    """All bytes, rows and names of two sets."""
    assert ours.fingerprint == theirs.fingerprint
    assert np.array_equal(ours.index, theirs.index)
    for sample in range(len(theirs)):
        assert np.array_equal(ours.read(sample), theirs.read(sample))
    assert ours.name(5) == theirs.name(5)


@pytest.mark.parametrize("ranges", [True, False])
def test_a_set_on_a_web_server(server: WebServer, shard_sets: Path, cache: str, ranges: bool) -> None:
    """Each tar is asked for once, and the next process asks for none."""
    server.ranges = ranges
    shards = open_set(f"{server.url}/val", cache=cache)
    shards.check_tars(sizes=True)
    same(shards, ShardSet(shard_sets / "val"))
    assert shards.place == f"{server.url}/val"
    assert sorted(server.asked()) == sorted(f"val/{name}" for name in shards.names)
    same(open_set(f"{server.url}/val/", cache=cache), shards)
    assert len(server.asked()) == len(shards.names)
    assert len(server.asked("index.npy")) == 1
    assert os.stat(cache).st_mode & 0o777 == 0o700


def test_a_slow_directory(shard_sets: Path, cache: str) -> None:
    same(open_set(shard_sets / "val", cache=cache), ShardSet(shard_sets / "val"))
    assert len(list(Path(cache).glob("*.tar"))) == len(ShardSet(shard_sets / "val").names)


@pytest.mark.integration
def test_a_set_in_an_object_store(shard_sets: Path, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which the credentials and the address are in the environment."""
    import boto3
    from moto.server import ThreadedMotoServer

    store = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    store.start()
    try:
        host, port = store.get_host_and_port()
        for name, value in {
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        }.items():
            monkeypatch.setenv(name, value)
        client = boto3.client("s3")
        client.create_bucket(Bucket="sets")
        for path in (shard_sets / "val").iterdir():
            client.upload_file(str(path), "sets", f"of/val/{path.name}")
        client.close()
        same(open_set("s3://sets/of/val", cache=cache), ShardSet(shard_sets / "val"))
        for url in ("s3://none/of/val", "s3://sets/of/other"):
            with pytest.raises(ShardError, match=f"{url}/manifest.json is missing"):
                open_set(url, cache=cache)
        shards = open_set("s3://sets/of/val", cache=f"{cache}-2", patience=1)
    finally:
        store.stop()
    with pytest.raises(ReadError, match=f"s3://sets/of/val/{shards.names[0]} could not be read .*connect"):
        shards.read(0)


# Batches


Seen = list[tuple[Ints, bytes]]


def epochs(train: ShardSet, val: ShardSet, ahead: Ahead | None = None) -> Seen:
    """Samples and pixels of two epochs, each with a validation."""
    reading = Read(readers=4, ahead=2)
    plan = TrainingPlan(train, AUGMENT, train.manifest, seed=3, shuffle_shards=2)
    loader = Loader(plan, train.manifest, batch=16, reading=reading)
    check = Loader(FixedPlan(val, AUGMENT), train.manifest, batch=16, reading=reading)
    seen: Seen = []
    for epoch in range(2):
        if ahead:
            rest = (train, loader.upcoming(epoch + 1, 0))
            ahead.follow([(train, loader.upcoming(epoch, 0)), (val, check.upcoming(0, 0)), rest])
        for batches in (loader.epoch(epoch), check.epoch()):
            seen += [(batch.samples, batch.inputs.numpy().tobytes()) for batch in batches]
    return seen


def two_blocks(shards: ShardSet) -> float:
    """GB of the four largest shards."""
    return sum(sorted(shard["bytes"] for shard in shards.manifest.shards)[-4:]) / 1e9


@pytest.mark.integration
@pytest.mark.parametrize("room", ["all", "two blocks"])
def test_batches_are_those_of_the_local_sets(shard_sets: Path, server: WebServer, cache: str, room: str) -> None:
    """Also with a cache that holds two blocks, and never more."""
    local = ShardSet(shard_sets / "train"), ShardSet(shard_sets / "val")
    most = 0.0 if room == "all" else two_blocks(local[0])
    train, val = (open_set(f"{server.url}/{name}", cache=cache, cache_gb=most) for name in ("train", "val"))
    assert len(train.names) > 4
    held, over = [0], []

    def watch() -> None:
        while not over:
            before = Path(cache).stat().st_mtime_ns
            size = sum(path.lstat().st_size for path in Path(cache).iterdir() if path.is_file())
            if Path(cache).stat().st_mtime_ns == before:  # else a file that has gone and its successor were counted
                held.append(size)
            time.sleep(0.005)

    watcher = Thread(target=lambda: _quietly(watch), daemon=True)
    watcher.start()
    ahead = Ahead()
    try:
        seen = epochs(train, val, ahead)
    finally:
        ahead.close()
        over.append(True)
        watcher.join()
    for (samples, pixels), (theirs, of_theirs) in zip(seen, epochs(*local), strict=True):
        assert np.array_equal(samples, theirs)
        assert pixels == of_theirs
    asked = Counter(server.asked())
    assert set(asked) == {f"{name}/{tar}" for name, shards in (("train", train), ("val", val)) for tar in shards.names}
    if room == "all":
        assert max(asked.values()) == 1
    else:
        assert max(held) <= round(most * 1e9)


def _quietly(work: object) -> None:
    while True:
        try:
            work()  # type: ignore[operator]
            return
        except FileNotFoundError:
            pass


@pytest.mark.integration
def test_an_image_loader_takes_a_url(shard_sets: Path, server: WebServer, cache: str) -> None:
    def first(directory: str, **options: str) -> bytes:
        loader = ImageLoader(directory, batch=16, crop=64, resize=72, threads=1, **options)
        batches = [images.numpy().tobytes() for images, _ in loader]
        val = directory.replace("train", "val")
        return b"".join(batches + [images.numpy().tobytes() for images, _ in loader.validation(val)])

    assert first(f"{server.url}/train", cache=cache) == first(str(shard_sets / "train"))
    assert max(Counter(server.asked()).values()) == 1


def test_shards_in_the_order_of_need(shard_sets: Path) -> None:
    """Computed from the samples: a block's shards come together, and before those of the next."""
    shards = ShardSet(shard_sets / "train")
    plan = TrainingPlan(shards, AUGMENT, shards.manifest, seed=3, shuffle_shards=2)
    loader = Loader(plan, shards.manifest, batch=16)
    for step in range(loader.steps):
        samples = plan.samples(1, step * 16, len(plan))
        first = list(dict.fromkeys(shards.shard_of(int(sample)) for sample in samples))
        given = loader.upcoming(1, step).tolist()
        assert sorted(first) == sorted(set(first) & set(given))
        assert len(given) == len(set(given))
        places = [given.index(shard) for shard in first]
        assert all(abs(place - at) <= 2 for at, place in enumerate(places, len(given) - len(first)))
    assert loader.upcoming(1, 0).size == len(shards.names)
    fixed = Loader(FixedPlan(shards, AUGMENT), shards.manifest, batch=16)
    last = shards.shard_of(16 * 3)
    assert fixed.upcoming(0, 3).tolist() == list(range(last, len(shards.names)))


# Servers


def failing(times: int, how: str) -> object:
    """Answers of each tar that are wrong, so many times."""
    left: Counter[str] = Counter()

    def misbehave(handler: Handler, name: str) -> bool:
        if not name.endswith(".tar") or left[name] >= times:
            return False
        left[name] += 1
        data = (handler.server.root / name).read_bytes()
        if how == "refuses":
            handler.say(503, b"later")
        elif how == "too many":
            handler.say(429, b"later")
        elif how == "truncates":
            handler.say(200, data[: len(data) // 2])
        elif how == "dies":
            handler.say(200, data[: len(data) // 2], length=len(data))
            handler.cut()
        elif how == "resets":
            handler.cut()
        elif how == "lies":
            handler.say(200, bytes(len(data)))
        elif how == "html":
            handler.say(200, b"<html>Please log in</html>")
        return True

    return misbehave


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("how", ["refuses", "too many", "truncates", "dies", "resets", "lies", "html"])
def test_a_server_that_fails_and_recovers(
    server: WebServer, shard_sets: Path, cache: str, how: str, ranges: bool
) -> None:
    server.ranges = ranges
    server.misbehave = failing(1, how)  # type: ignore[assignment]
    same(open_set(f"{server.url}/val", cache=cache), ShardSet(shard_sets / "val"))


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("refuses", "503 Service Unavailable"),
        ("truncates", "it broke off at byte"),
        ("dies", "it broke off at byte|not completed|payload"),
        ("resets", "disconnected|reset"),
        ("lies", "its sha256 is not the manifest's"),
        ("html", "it broke off at byte 26"),
    ],
)
def test_a_server_that_fails_for_good(server: WebServer, cache: str, how: str, why: str) -> None:
    """After the patience one sentence names the URL; no byte of it was read."""
    shards = open_set(f"{server.url}/val", cache=cache, patience=1)
    server.misbehave = failing(10**6, how)  # type: ignore[assignment]
    began = time.monotonic()
    with pytest.raises(ReadError, match=why) as caught:
        shards.read(0)
    assert f"{server.url}/val/{shards.names[0]} could not be read" in str(caught.value)
    assert "then repeat the command" in str(caught.value)
    assert time.monotonic() - began < 10
    assert not list(Path(cache).glob("*.tar"))


def test_a_server_that_is_gone(server: WebServer, cache: str) -> None:
    shards = open_set(f"{server.url}/val", cache=cache, patience=1)
    server.misbehave = failing(1, "resets")  # type: ignore[assignment]
    server.shutdown()
    server.server_close()
    with pytest.raises(ReadError, match=r"(?i)could not be read .*connect"):
        shards.read(0)


def test_a_slow_server_is_waited_for(server: WebServer, shard_sets: Path, cache: str) -> None:
    """Longer than the patience, since bytes arrive; this is told."""
    shards = open_set(f"{server.url}/train", cache=cache, patience=1)
    told: list[tuple[str, bool]] = []
    shards.waiting = lambda text, moved: told.append((text, moved))
    server.pause = 1.2
    data = shards.read(0)
    assert np.array_equal(data, ShardSet(shard_sets / "train").read(0))
    assert any(moved for _, moved in told)
    assert all(f"waiting for {server.url}/train/{shards.names[0]}, " in text for text, _ in told)


def test_a_stop_ends_the_waiting(server: WebServer, cache: str) -> None:
    shards = open_set(f"{server.url}/val", cache=cache)
    server.misbehave = lambda handler, name: time.sleep(20) is None
    began = time.monotonic()
    shards.hurried = lambda: time.monotonic() - began > 0.5
    with pytest.raises(ReadError, match="the process is to stop"):
        shards.read(0)
    assert time.monotonic() - began < 2


def test_what_is_said_without_a_hook(server: WebServer, cache: str, capsys: pytest.CaptureFixture[str]) -> None:
    shards = open_set(f"{server.url}/train", cache=cache)
    shards.here.spoken._since = -100.0  # type: ignore[attr-defined]
    server.pause = 1.2
    shards.read(0)
    said = capsys.readouterr().err.splitlines()
    assert said[0].endswith(" MB")
    assert said[-1] == f"{server.url}/train/{shards.names[0]} has come: reading goes on"


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (404, b"", "manifest.json is missing, so this is not a shard set: correct the URL"),
        (403, b"", "manifest.json could not be read (403 Forbidden): check the URL and who may read it"),
        (401, b"", "manifest.json could not be read (401 Unauthorized): check the URL and who may read it"),
        (200, b"<html>Please log in</html>", "manifest.json is damaged (Expecting value"),
        (200, b"{}", "manifest.json is another program's"),
    ],
)
def test_no_set_at_that_url(server: WebServer, cache: str, status: int, body: bytes, said: str) -> None:
    def misbehave(handler: Handler, name: str) -> bool:
        handler.say(status, body)
        return True

    server.misbehave = misbehave
    with pytest.raises((ShardError, ReadError)) as caught:
        open_set(f"{server.url}/val", cache=cache)
    assert f"{server.url}/val/{said}" in str(caught.value)


def test_a_quarantine_that_is_forbidden(server: WebServer, shard_sets: Path, cache: str) -> None:
    """As an object store says of what it does not have, to those who may not list it."""

    def misbehave(handler: Handler, name: str) -> bool:
        if forbidden := not (server.root / name).exists():
            handler.say(403, b"AccessDenied")
        return forbidden

    server.misbehave = misbehave
    same(open_set(f"{server.url}/val", cache=cache), ShardSet(shard_sets / "val"))


@pytest.mark.parametrize(
    "url",
    [
        "https://",
        "http:///val",
        "http://host:port/val",
        "https://me:secret@host/val?token=secret",
        "https://me:se@cret@host/val#secret",
        "https://host/val?",
    ],
)
def test_urls_that_name_no_folder(cache: str, url: str) -> None:
    with pytest.raises(UserError, match=r"is not https://HOST/FOLDER \(without \? and #\): correct it") as caught:
        open_set(url, cache=cache)
    assert "me:" not in str(caught.value)
    assert "cret@" not in str(caught.value)


def test_odd_names(shard_sets: Path, tmp_path: Path, cache: str) -> None:
    """Of a folder, as one writes and as one copies it; and a password is not shown."""
    shutil.copytree(shard_sets / "val", tmp_path / "my set%20é")
    asked = []

    def misbehave(handler: Handler, name: str) -> bool:
        asked.append((name, handler.headers["Authorization"]))
        return False

    with served(tmp_path) as server:
        server.misbehave = misbehave
        site = server.url.replace("//", "//me:se@cret@")
        for url in (f"{site}/my set%2520é", f"{site}/my%20set%2520%C3%A9"):
            shards = open_set(url, cache=cache)
            assert shards.place == url.replace("me:se@cret@", "")
    assert {word for _, word in asked} == {f"Basic {b64encode(b'me:se@cret').decode()}"}
    assert {name.rpartition("/")[0] for name, _ in asked} == {"my%20set%2520%C3%A9"}


@pytest.mark.integration
def test_a_certificate_that_nobody_knows(
    server: WebServer, tmp_path: Path, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lasts, so it is said at once; the remedy that is named is one."""
    key, own = tmp_path / "key.pem", tmp_path / "own.pem"
    made = f"req -x509 -newkey rsa:2048 -nodes -subj /CN=x -addext subjectAltName=IP:127.0.0.1 -keyout {key} -out {own}"
    program = shutil.which("openssl") or pytest.skip("there is no openssl")
    subprocess.run([program, *made.split()], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(own, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    url = server.url.replace("http", "https") + "/val"
    began = time.monotonic()
    with pytest.raises(ReadError, match=r"CERTIFICATE_VERIFY_FAILED.*let SSL_CERT_FILE .* name its certificate"):
        open_set(url, cache=cache)
    assert time.monotonic() - began < 5
    monkeypatch.setenv("SSL_CERT_FILE", str(own))
    code = f"from pipelines.remote.sets import open_set\nprint(len(open_set({url!r}, cache={cache!r}).read(0)) > 0)"
    assert said(code) == "True\n"


def test_a_manifest_that_does_not_come(
    server: WebServer, cache: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening is patient, and says so."""
    monkeypatch.setattr("pipelines.remote.elsewhere.QUIET", 0.2)
    began = time.monotonic()
    server.misbehave = lambda handler, name: time.monotonic() - began < 1 and handler.say(503, b"") is None
    open_set(f"{server.url}/val", cache=cache)
    words = f"{server.url}/val/manifest.json cannot be read (503 Service Unavailable): trying again\n"
    assert capsys.readouterr().err == words


def test_a_slow_directory_that_fails(
    shard_sets: Path, cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading is repeated; the cache is not blamed."""
    shards, failures = open_set(shard_sets / "val", cache=cache, patience=5), [errno.ESTALE, errno.EIO]

    def fails(path: str, flags: int) -> int:
        if path.endswith(".tar") and failures:
            raise OSError(failures[-1], os.strerror(failures.pop()))
        return regular(path, flags)

    monkeypatch.setattr("pipelines.remote.places.regular", fails)
    assert len(shards.read(0))
    assert not failures
    shards, failures[:] = open_set(shard_sets / "val", cache=str(tmp_path / "two")), [errno.EACCES]
    with pytest.raises(ReadError, match=r"could not be read \(Permission denied\): check the URL and who may read it"):
        shards.read(0)


def test_another_protocol_whose_server_is_not_there(cache: str) -> None:
    with pytest.raises(ReadError, match=r"ftp://127.0.0.1:9/val could not be read \(.*refused\): check the URL"):
        open_set("ftp://127.0.0.1:9/val", cache=cache)


def test_a_cache_that_cannot_be(shard_sets: Path) -> None:
    with pytest.raises(UserError, match=r"/proc/x cannot keep shards \(No such file or directory\): let data.cache be"):
        open_set(shard_sets / "val", cache="/proc/x")


def test_a_cache_below_a_link(shard_sets: Path, tmp_path: Path) -> None:
    """As /scratch is, often."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "scratch").symlink_to("disk")
    for cache in ("scratch/shards", "scratch"):
        open_set(shard_sets / "val", cache=str(tmp_path / cache)).read(0)
    assert len(list((tmp_path / "disk").rglob("*.tar"))) == 2


def test_a_manifest_of_gigabytes(server: WebServer, cache: str) -> None:
    def misbehave(handler: Handler, name: str) -> bool:
        handler.say(200, b"{", length=10**10)
        return True

    server.misbehave = misbehave
    with pytest.raises(UserError, match=r"val/manifest.json has 10000000000 bytes, and no set has one of more than"):
        open_set(f"{server.url}/val", cache=cache)


def test_a_tar_that_is_missing(server: WebServer, cache: str) -> None:
    shards = open_set(f"{server.url}/val", cache=cache)

    def misbehave(handler: Handler, name: str) -> bool:
        handler.say(404, b"")
        return True

    server.misbehave = misbehave
    for look in (lambda: shards.read(0), lambda: shards.check_tars(sizes=False)):
        with pytest.raises(ShardError, match=f"{server.url}/val/{shards.names[0]} is missing"):
            look()


# What is opened


def test_a_quarantine_comes_along(shard_sets: Path, tmp_path: Path, cache: str) -> None:
    copy = tmp_path / "set"
    shutil.copytree(shard_sets / "val", copy)
    name = ShardSet(copy).names[0]
    bad = [{"shard": name, "row": 2, "name": "x", "reason": "y"}]
    quarantine.write(copy, ShardSet(copy).fingerprint, bad)
    assert open_set(copy, cache=cache).quarantined.tolist() == [2]
    quarantine.write(copy, ShardSet(copy).fingerprint, [])
    assert open_set(copy, cache=cache).quarantined.tolist() == []
    (copy / quarantine.QUARANTINE).write_bytes(b"{")
    with pytest.raises(ShardError, match=rf"{copy}/quarantine.jsonl is damaged .* verify DIR` where {copy} lies"):
        open_set(copy, cache=cache)


def test_an_index_that_is_damaged(server: WebServer, shard_sets: Path, cache: str) -> None:
    """In the cache: it is fetched again. At the server: one sentence."""
    shards = open_set(f"{server.url}/val", cache=cache)
    kept = shards.directory / "index.npy"
    good = kept.read_bytes()
    for bad in (good[:-1], good[:-1] + bytes([good[-1] ^ 1])):
        kept.unlink()
        kept.write_bytes(bad)
        same(open_set(f"{server.url}/val", cache=cache), ShardSet(shard_sets / "val"))
        assert kept.read_bytes() == good
    kept.unlink()

    def misbehave(handler: Handler, name: str) -> bool:
        if found := name.endswith("index.npy"):
            handler.say(200, bytes(len(good)))
        return found

    server.misbehave = misbehave
    with pytest.raises(
        ReadError, match=r"val/index.npy could not be read \(its sha256 is not the manifest's\): verify"
    ):
        open_set(f"{server.url}/val", cache=cache)


def test_a_url_needs_a_cache() -> None:
    with pytest.raises(ShardError, match=r"https://host/set is not on this machine: name a directory .* data.cache"):
        open_set("https://me:secret@host/set")
    with pytest.raises(UserError, match=r"\$NO_SUCH/x has \$NO_SUCH, which is not set on this node"):
        expanded("$NO_SUCH/x")


def test_variables_of_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH", "/fast")
    assert expanded("${SCRATCH}/a/$SCRATCH") == Path("/fast/a/fast")


def said(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return result.stdout + result.stderr.strip().splitlines()[-1] if result.returncode else result.stdout


@pytest.mark.integration
def test_what_is_imported(shard_sets: Path, cache: str) -> None:
    """For a local set nothing of the libraries for others; without these, one sentence."""
    look = "import sys; from pipelines.remote.sets import open_set; open_set({!r}, cache={!r}).read(0); "
    show = "print(*({'fsspec', 'aiohttp', 's3fs'} & set(sys.modules)))"
    for kept in ("", cache):
        assert said(look.format(str(shard_sets / "val"), kept) + show).split() == []
    for url, missing in (("https://host/set", "aiohttp"), ("s3://host/set", "s3fs")):
        told = said(f"import sys; sys.modules[{missing!r}] = None; " + look.format(url, cache))
        assert f"{url} cannot be read" in told
        assert f"pip install {missing}" in told
    assert "no://host/set cannot be read" in said(look.format("no://host/set", cache))
