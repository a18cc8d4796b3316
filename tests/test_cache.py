"""The cache of a node: what is fetched once, what goes first, and what is not taken for a shard."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Container, Iterator
from pathlib import Path

import numpy as np
import pytest

from pipelines.opened import ReadError
from pipelines.remote.ahead import Ahead
from pipelines.remote.cache import Cache, Full, Wanted
from pipelines.remote.places import SlowFolder
from pipelines.remote.sets import open_set
from pipelines.shards import BadSample, ShardSet
from tests.conftest import break_sample
from tests.helpers.drills import until
from tests.helpers.elsewhere import WebServer, served
from tests.helpers.strange import MINE

MB = 1_000_000


@pytest.fixture
def server(shard_sets: Path) -> Iterator[WebServer]:
    with served(shard_sets) as server:
        yield server


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def opened(server: WebServer, cache: Path, **options: float) -> ShardSet:
    return open_set(f"{server.url}/train", cache=str(cache), **options)  # type: ignore[arg-type]


def local(server: WebServer) -> ShardSet:
    return ShardSet(server.root / "train")


def same(ours: ShardSet, theirs: ShardSet) -> None:
    for sample in range(len(theirs)):
        assert np.array_equal(ours.read(sample), theirs.read(sample))


# By itself


@pytest.fixture
def files(tmp_path: Path) -> list[Wanted]:
    """Six of 1 MB in a folder, and what they are called in `tmp_path/cache`."""
    place, cache = SlowFolder(str(tmp_path)), Cache(tmp_path / "cache")
    wanted = []
    for number in range(6):
        data = bytes([number]) * MB
        (tmp_path / f"{number}").write_bytes(data)
        wanted.append(cache.shard(place, f"{number}", MB, hashlib.sha256(data).hexdigest()))
    return wanted


def fetch(cache: Cache, wanted: Wanted, spare: Container[str] | None = None) -> bool:
    """False if it is there, or somebody is about it."""
    file = cache.begin(wanted, spare)
    if file:
        cache.fill(file, wanted)
    return file is not None


def there(files: list[Wanted]) -> list[int]:
    return [number for number, wanted in enumerate(files) if wanted.kept.exists()]


def aged(files: list[Wanted], *numbers: int) -> None:
    """Used in this order, long ago."""
    for age, number in enumerate(numbers):
        os.utime(files[number].kept, (age + 1, age + 1))


def test_the_least_recently_used_goes_first(tmp_path: Path, files: list[Wanted]) -> None:
    cache = Cache(tmp_path / "cache", 0.003)
    for number in range(3):
        assert fetch(cache, files[number])
    aged(files, 1, 0, 2)
    held = cache.open(files[1])  # which is a use
    assert held
    held.close()
    fetch(cache, files[3])
    assert there(files) == [1, 2, 3]
    fetch(cache, files[4])
    assert there(files) == [1, 3, 4]


def test_what_the_user_has_there_stays(tmp_path: Path, files: list[Wanted], monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache may be a folder of his; neither a small budget nor a full disk takes anything else than shards."""
    mine = tmp_path / "cache" / "thesis"
    mine.mkdir()
    names = ["photos.tar", "0123abcd.tar", f"{'A' * 64}.tar", f"{'0' * 64}.part", f"{'0' * 64}.tar.gz", "thesis/1.tar"]
    for name in names:
        (tmp_path / "cache" / name).write_bytes(b"mine")
        os.utime(tmp_path / "cache" / name, (1, 1))
    fetch(Cache(tmp_path / "cache", 1e-9), files[0])
    monkeypatch.setattr(os, "pwrite", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match="has no room"):
        fetch(Cache(tmp_path / "cache"), files[1])
    assert all((tmp_path / "cache" / name).read_bytes() == b"mine" for name in names)


def test_what_is_in_use_stays(tmp_path: Path, files: list[Wanted]) -> None:
    """Even if a shard that is needed then makes the cache larger; it shrinks again."""
    cache, other = Cache(tmp_path / "cache", 0.002), Cache(tmp_path / "cache", 0.002)
    held = []
    for number in range(3):
        assert fetch(cache, files[number])
        held.append(other.open(files[number]))
    assert there(files) == [0, 1, 2]
    with pytest.raises(Full):
        fetch(cache, files[3], ())
    assert there(files) == [0, 1, 2]
    for file in held:
        assert file
        file.close()
    fetch(cache, files[3], ())
    assert len(there(files)) == 2


def test_what_is_needed_sooner_stays(tmp_path: Path, files: list[Wanted]) -> None:
    cache = Cache(tmp_path / "cache", 0.003)
    for number in range(3):
        fetch(cache, files[number])
    aged(files, 0, 1, 2)
    spare = {files[0].kept.name, files[2].kept.name}
    fetch(cache, files[3], spare)
    assert there(files) == [0, 2, 3]
    with pytest.raises(Full):
        fetch(cache, files[4], spare | {files[3].kept.name})
    assert there(files) == [0, 2, 3]
    assert not list((tmp_path / "cache").glob("*.part"))


def test_one_at_a_time(tmp_path: Path, files: list[Wanted]) -> None:
    cache, other = Cache(tmp_path / "cache"), Cache(tmp_path / "cache")
    part = cache.begin(files[0])
    assert part
    assert not fetch(other, files[0])
    cache.fill(part, files[0])
    assert not fetch(other, files[0])
    assert other.holds(files[0])
    assert os.listdir(tmp_path / "cache") == [files[0].kept.name]


@pytest.mark.parametrize("left", [b"", bytes(MB // 2), bytes(MB), bytes(2 * MB), b"\1" * MB, b"\1" * 5])
def test_a_part_that_was_left(tmp_path: Path, files: list[Wanted], left: bytes) -> None:
    """Right or wrong, too short or too long."""
    cache = Cache(tmp_path / "cache")
    files[0].unfinished.write_bytes(left)
    assert fetch(cache, files[0])
    assert files[0].kept.read_bytes() == bytes(MB)
    assert not files[0].unfinished.exists()


def test_a_full_disk(tmp_path: Path, files: list[Wanted], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 3 MB: the least recently used go, unless they are in use."""
    cache, pwrite = Cache(tmp_path / "cache"), os.pwrite

    def full(number: int, data: bytes, at: int) -> int:
        if sum(path.stat().st_size for path in (tmp_path / "cache").iterdir()) + len(data) > 3 * MB:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(number, data, at)

    monkeypatch.setattr(os, "pwrite", full)
    for number in range(3):
        fetch(cache, files[number])
    aged(files, 2, 0, 1)
    fetch(cache, files[3])
    assert there(files) == [0, 1, 3]
    held = [cache.open(files[number]) for number in (0, 1, 3)]
    with pytest.raises(OSError, match="has no room for its 1000000 bytes, and nothing in it can be removed"):
        fetch(cache, files[4])
    assert there(files) == [0, 1, 3]
    assert all(held)


@pytest.mark.parametrize("what", ["link", "part is a link", "pipe", "size", "owner", "part of another"])
def test_what_is_no_shard_of_ours(tmp_path: Path, files: list[Wanted], victim: Path, what: str) -> None:
    cache, wanted = Cache(tmp_path / "cache"), files[0]
    good = tmp_path / "0"
    if what == "link":
        wanted.kept.symlink_to(good)
    elif what == "part is a link":
        wanted.unfinished.symlink_to(victim)
    elif what == "pipe":
        os.mkfifo(wanted.kept)
    elif what == "size":
        wanted.kept.write_bytes(bytes(MB - 1))
    else:
        if os.geteuid():
            pytest.skip("only the administrator can make files of another user")
        path = wanted.kept if what == "owner" else wanted.unfinished
        shutil.copy(good, path)
        os.chown(path, 4321, 4321)
    assert cache.open(wanted) is None
    while not fetch(cache, wanted):  # after what was in the way is removed
        pass
    assert wanted.kept.read_bytes() == bytes(MB)
    assert not wanted.kept.is_symlink()
    assert wanted.kept.stat().st_uid == os.geteuid()
    assert victim.read_bytes() == MINE
    assert good.read_bytes() == bytes(MB)


def test_one_that_is_removed_while_it_is_opened(
    tmp_path: Path, files: list[Wanted], monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    cache, flock = Cache(tmp_path / "cache"), fcntl.flock
    fetch(cache, files[0])

    def slow(file: object, how: int) -> None:
        files[0].kept.unlink(missing_ok=True)
        flock(file, how)  # type: ignore[arg-type]

    monkeypatch.setattr(fcntl, "flock", slow)
    assert cache.open(files[0]) is None


# Processes


def process(server: WebServer, cache: Path, gigabytes: float = 0, *, keeps: bool = True) -> subprocess.Popen[str]:
    words = json.dumps([f"{server.url}/train", str(cache), gigabytes, keeps])
    return subprocess.Popen(
        [sys.executable, "-m", "tests.helpers.fetching", words],
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


def line(one: subprocess.Popen[str]) -> str:
    assert one.stdout
    return one.stdout.readline().strip()


def go(*processes: subprocess.Popen[str]) -> None:
    for one in processes:
        assert one.stdin
        one.stdin.write("\n")
        one.stdin.flush()


def finish(*processes: subprocess.Popen[str]) -> None:
    for one in processes:
        one.communicate("\n", timeout=60)


def firsts(shards: ShardSet) -> str:
    return hashlib.sha256(b"".join(bytes(shards.read(first)) for first in shards.firsts.tolist())).hexdigest()


@pytest.mark.integration
def test_each_shard_is_asked_for_once_per_node(server: WebServer, cache: Path) -> None:
    processes = [process(server, cache) for _ in range(4)]
    assert [line(one) for one in processes] == ["opened"] * 4
    server.pause = 0.05
    go(*processes)
    assert {line(one) for one in processes} == {firsts(local(server))}
    finish(*processes)
    assert Counter(server.asked()) == {f"train/{name}": 1 for name in local(server).names}
    assert len(server.asked("index.npy")) == 1


@pytest.mark.integration
def test_two_jobs_share_a_cache_that_is_too_small_for_one(server: WebServer, cache: Path) -> None:
    """Each keeps all its shards open, so that nothing can go: nobody waits for the other."""
    smallest = min(shard["bytes"] for shard in local(server).manifest.shards) / 1e9
    jobs = [process(server, cache, smallest) for _ in range(2)]
    assert [line(one) for one in jobs] == ["opened"] * 2
    go(*jobs)
    assert {line(one) for one in jobs} == {firsts(local(server))}
    finish(*jobs)
    (cache / f"{local(server).manifest.shards[0]['sha256']}.tar").unlink()
    later = process(server, cache, smallest, keeps=False)
    line(later)
    go(later)
    assert line(later) == firsts(local(server))
    finish(later)
    assert len(list(cache.glob("*.tar"))) == 1, "and what nobody uses any more has gone"


@pytest.mark.integration
def test_a_process_that_is_killed_in_the_middle_of_a_shard(server: WebServer, cache: Path) -> None:
    """Another goes on where it has ended."""
    first, second = process(server, cache), process(server, cache)
    assert [line(first), line(second)] == ["opened"] * 2
    server.pause = 0.7  # a piece is handed on after a second
    go(first)
    until(lambda: any(path.stat().st_size for path in cache.glob("*.part")))
    go(second)
    first.kill()
    first.communicate()
    server.pause = 0
    assert line(second) == firsts(local(server))
    finish(second)
    asked = [start for name, start in server.requests if name == f"train/{local(server).names[0]}"]
    assert asked[0] == 0
    assert asked[-1] > 0
    assert len(asked) == 2


# Damage


def test_a_flipped_bit_in_the_cache(server: WebServer, cache: Path) -> None:
    """In an image, or in a header: the shard is fetched again, also by another process that has it open."""
    shards, other = opened(server, cache), opened(server, cache)
    same(shards, local(server))
    same(other, local(server))
    row = shards.index[0]
    path = cache / f"{shards.manifest.shards[0]['sha256']}.tar"
    for at in (int(row["offset"]) + 20, int(row["offset"]) - 500):
        with open(path, "r+b") as file:
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 4]))
        same(shards, local(server))
        same(other, local(server))
        same(opened(server, cache), local(server))
    assert server.asked().count(f"train/{shards.names[0]}") == 3


def test_a_sample_that_is_damaged_where_it_lies(shard_sets: Path, tmp_path: Path, cache: Path) -> None:
    """But was so when the set was made: its shard is right, and fetched once."""
    shutil.copytree(shard_sets / "train", tmp_path / "train")
    break_sample(tmp_path / "train", 3)
    manifest = json.loads((tmp_path / "train" / "manifest.json").read_bytes())
    del manifest["checksum"]
    tar = tmp_path / "train" / manifest["shards"][0]["name"]
    manifest["shards"][0]["sha256"] = hashlib.sha256(tar.read_bytes()).hexdigest()
    manifest["checksum"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (tmp_path / "train" / "manifest.json").write_text(json.dumps(manifest))
    with served(tmp_path) as server:
        shards = opened(server, cache)
        with pytest.raises(BadSample, match="is damaged"):
            shards.read(3)
        assert np.array_equal(shards.read(4), local(server).read(4))
        assert len(server.asked()) == 1


def test_wrong_bytes_at_the_server(shard_sets: Path, tmp_path: Path, cache: Path) -> None:
    """A pixel differs: nothing of the shard is read."""
    shutil.copytree(shard_sets / "train", tmp_path / "train")
    break_sample(tmp_path / "train", 3)
    with served(tmp_path) as server:
        shards = opened(server, cache)
        with pytest.raises(ReadError, match=r"its sha256 is not the manifest's\): verify"):
            shards.read(4)
        assert not list(cache.glob("*.tar"))


def test_tars_that_are_not_kept_are_closed(server: WebServer, cache: Path) -> None:
    shards = opened(server, cache)
    same(shards, local(server))
    small = Cache(cache, 1e-9)
    wanted = small.shard(SlowFolder(str(server.root / "val")), "manifest.json", 1, "0" * 64)
    shards.keep(np.array([1, 2]))
    with pytest.raises(Full):
        small.begin(wanted, ())
    kept = {f"{shards.manifest.shards[shard]['sha256']}.tar" for shard in (1, 2)}
    assert {path.name for path in cache.glob("*.tar")} == kept


# Ahead


@pytest.mark.integration
def test_what_is_fetched_ahead(server: WebServer, cache: Path) -> None:
    """In order, as much as there is room for; then more, as shards have been used."""
    train = local(server)
    order = np.random.default_rng(0).permutation(len(train.names))
    sizes = [train.manifest.shards[shard]["bytes"] for shard in order.tolist()]
    shards = opened(server, cache, cache_gb=sum(sizes[:3]) / 1e9)
    names = [f"{train.manifest.shards[shard]['sha256']}.tar" for shard in order.tolist()]
    ahead = Ahead()
    try:
        ahead.follow([(shards, order)])
        until(lambda: len(list(cache.glob("*.tar"))) == 3)
        time.sleep(0.5)
        assert {path.name for path in cache.glob("*.tar")} == set(names[:3])
        for place, shard in enumerate(order.tolist()):
            until((cache / names[place]).exists)
            shards.read(int(shards.firsts[shard]))
            shards.keep(order[place : place + 1])
        assert Counter(server.asked()) == {f"train/{name}": 1 for name in train.names}
    finally:
        ahead.close()


@pytest.mark.integration
def test_its_process(server: WebServer, cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Is started again if it dies, says one sentence of a server that fails, and ends with `close`."""
    shards = opened(server, cache)
    everything = np.arange(len(shards.names))
    ahead = Ahead()
    try:
        ahead.follow([(shards, everything[:1])])
        until(lambda: len(list(cache.glob("*.tar"))) == 1)
        process = ahead._process
        assert process
        process.kill()
        process.wait()
        time.sleep(2)
        ahead.follow([(shards, everything)])
        until(lambda: len(list(cache.glob("*.tar"))) == len(everything))
        assert ahead._process
        assert ahead._process.pid != process.pid
        shutil.rmtree(cache)
        os.mkdir(cache)

        def misbehave(handler: object, name: str) -> bool:
            handler.say(404, b"")  # type: ignore[attr-defined]
            return True

        server.misbehave = misbehave
        train = opened_again(server, shards)
        ahead.follow([(train, everything)])
        until(lambda: "cannot be fetched ahead of need" in capfd.readouterr().err)
    finally:
        ahead.close()
    assert ahead._process.poll() is not None
    assert "Traceback" not in capfd.readouterr().err


def opened_again(server: WebServer, shards: ShardSet) -> ShardSet:
    """The folder of the set is gone with the cache; its manifest is put back."""
    shutil.copytree(server.root / "train", shards.directory, ignore=shutil.ignore_patterns("*.tar"))
    return shards


@pytest.mark.integration
def test_it_ends_with_whoever_started_it(server: WebServer, cache: Path) -> None:
    """Killed without a word, in the middle of a shard, which the next one continues."""
    code = (
        "import sys, time, numpy as np; from pipelines.remote.ahead import Ahead; from pipelines.remote.sets import *; "
        f"s = open_set('{server.url}/train', cache='{cache}'); a = Ahead(); a.follow([(s, np.arange(len(s.names)))])\n"
        "while not a._process: time.sleep(0.01)\n"
        "print(a._process.pid, flush=True); time.sleep(100)"
    )
    server.pause = 0.7
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pid = int(line(parent))
    until(lambda: any(path.stat().st_size for path in cache.glob("*.part")))
    os.kill(pid, signal.SIGTERM)  # as Slurm sends it to all processes of a step
    parent.kill()
    parent.communicate()
    until(lambda: not Path(f"/proc/{pid}/stat").exists() or ") Z " in Path(f"/proc/{pid}/stat").read_text())
    server.pause = 0
    same(opened(server, cache), local(server))
    assert any(start for name, start in server.requests if name.endswith(".tar"))
