"""Runs whose sets lie on a server: the same bits as from a directory, whatever the server does."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Any
from unittest.mock import Mock

import pytest

from dist_train import data
from dist_train.config import Config, ConfigError, RunConfig, TrainConfig
from dist_train.data_config import DataConfig
from dist_train.monitor.wandb_about import about
from dist_train.ranks.watch import Watch
from dist_train.rundir.lease import Lease
from dist_train.rundir.waiting import Waiting
from pipelines.shards import ShardSet
from tests.helpers.compare import assert_same_run, status
from tests.helpers.drills import all_gone, until, until_status
from tests.helpers.elsewhere import Handler, WebServer, served
from tests.helpers.launch import at, finish, launch, python, spawn, start

# A block is a shard, and what the loader reads ahead lies in two of them.
BLOCKS = ("--data.shuffle_shards=1", "--train.global_batch=8", "--data.ahead=1", "--checkpoint.steps=12")


@pytest.fixture(scope="module")
def undisturbed(shard_sets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run from a directory."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    result = launch(shard_sets, run, *BLOCKS)
    assert result.returncode == 0, result.stderr
    return run


@pytest.fixture
def web(shard_sets: Path) -> Iterator[WebServer]:
    with served(shard_sets) as server:
        yield server


def two_blocks(shard_sets: Path) -> float:
    """Gigabytes of the two largest shards of the training set."""
    sizes = sorted(path.stat().st_size for path in (shard_sets / "train").glob("*.tar"))
    assert len(sizes) >= 4
    return sum(sizes[-2:]) / 1e9


def answers(web: WebServer, tars: int) -> None:
    """From now on it is there for so many tars, and then closes the connection of whoever asks for anything."""
    left = [tars]

    def misbehave(handler: Handler, name: str) -> bool:
        if not left[0]:
            handler.cut()
            return True
        left[0] -= name.endswith(".tar") and handler.headers.get("Range") != "bytes=0-0"  # that asks for the size
        return False

    web.misbehave = misbehave


def returns(web: WebServer) -> None:
    web.misbehave = lambda handler, name: False


def remote(web: WebServer, cache: Path, *extra: str, gb: float = 0) -> list[str]:
    return [*BLOCKS, *urls(web), f"--data.cache={cache}", f"--data.cache_gb={gb!r}", *extra]


def urls(web: WebServer) -> list[str]:
    return [f"--data.train={web.url}/train", f"--data.val={web.url}/val"]


def kept(cache: Path) -> int:
    """Bytes of the tars in a cache."""
    return sum(path.stat().st_size for path in cache.rglob("*.tar"))


# Without processes


def test_urls_are_no_paths() -> None:
    """Where a set is taken for a directory, the URL of one is not."""
    urls = {"train": "https://h.org/imagenet/train/", "val": "s3://bucket/val", "cache": "$SCRATCH/x"}
    config = Config(data=DataConfig(**urls, source="imagefolder"), run=RunConfig(name="x"))
    assert not data.to_pack(config)
    assert data.elsewhere(config)
    config = Config(data=DataConfig(**urls), run=RunConfig(name="x"))
    assert about(config)["tags"][-1] == "imagenet"
    config = Config(data=DataConfig(train="s3://bucket/train", cache="x"), run=RunConfig(name="x"))
    assert about(config)["tags"][-1] == "bucket"
    with pytest.raises(ConfigError, match=r"data.val is https://h.org/v, .* cache: name a folder by data.cache$"):
        Config(data=DataConfig(val="https://h.org/v"))


def test_a_cache_that_is_too_small(shard_sets: Path, tmp_path: Path) -> None:
    """Two blocks of the training set must fit: the number that is asked for is enough, a little less is not."""
    sets = {"train": str(shard_sets / "train"), "val": str(shard_sets / "val"), "cache": str(tmp_path / "cache")}
    train = TrainConfig(global_batch=24)
    least = two_blocks(shard_sets)
    with pytest.raises(ConfigError, match=r"cache_gb is ") as found:
        data.open_sets(Config(DataConfig(**sets, shuffle_shards=1, cache_gb=0.99 * least), train=train))
    words = str(found.value)
    assert f"is {0.99 * least:g}, " in words
    assert "two blocks of data.shuffle_shards 1 of" in words
    asked = float(words.partition("may take ")[2].partition(" ")[0].rstrip(":"))
    assert least <= asked < 1.01 * least
    config = Config(DataConfig(**sets, shuffle_shards=1, cache_gb=asked), train=train)
    opened = data.open_sets(config)
    whole = sum(path.stat().st_size for path in shard_sets.glob("*/*.tar")) / 1e9
    assert f"every epoch; the cache {tmp_path / 'cache'} holds" in data.traffic(config, opened)
    config = Config(DataConfig(**sets, shuffle_shards=1, cache_gb=whole), train=train)
    assert data.traffic(config, opened).endswith(f"once, then it is in the cache {tmp_path / 'cache'}")
    # A block of more shards than there are is all of them.
    with pytest.raises(ConfigError, match=r"shuffle_shards 99 of"):
        data.open_sets(Config(DataConfig(**sets, shuffle_shards=99, cache_gb=least), train=train))
    data.open_sets(Config(DataConfig(**sets, shuffle_shards=99, cache_gb=whole), train=train))


def leased(run: Path, token: str) -> Lease:
    lease = Lease(run)
    (run / "owner").write_text(token)
    lease.token = token
    return lease


def test_what_a_rank_waits_for_is_read_by_the_others(tmp_path: Path) -> None:
    """What counts is that something has arrived, not that the sentence changes, nor another start's file."""
    shown, said = list[str](), list[str]()
    writer, other = (Waiting(leased(tmp_path, "a"), Mock(), Mock()) for _ in range(2))
    reader = Waiting(leased(tmp_path, "a"), shown.append, said.append)
    assert not reader.look()
    writer.write(1, "waiting for x: nothing yet", moved=False, every=0)
    assert not reader.look()
    writer.write(1, "waiting for x: 1 of 9 MB", moved=True, every=0)
    assert reader.look()
    assert not reader.look()
    other.write(2, "waiting for y", moved=False, every=0)
    assert not reader.look()
    writer.write(1, "waiting for x: 1 of 9 MB", moved=False, every=0)
    assert not reader.look()
    writer.write(1, "not written, but counted", moved=True, every=1)
    assert not reader.look()
    writer.write(1, "waiting for x: 2 of 9 MB", moved=False, every=0)
    assert reader.look()
    assert shown[:3] == ["waiting for x: nothing yet", "waiting for x: 1 of 9 MB", "waiting for y"]
    assert said == ["waiting for x: nothing yet"], "one line in a while"
    stranger = Waiting(leased(tmp_path, "b"), Mock(), Mock())
    assert not stranger.look()
    writer.write(1, "waiting for x: 3 of 9 MB", moved=True, every=0)
    assert not stranger.look(), "the run belongs to another start"


class Words:
    """Has nothing to say but a hang."""

    def __init__(self, waiting: Waiting) -> None:
        self.hung, self.waits = Event(), waiting.look

    def force(self, why: str, *, begun: bool) -> None:
        raise AssertionError(why)

    def hang(self, seconds: float, step: int, place: str, stacks: str) -> None:
        self.hung.set()

    def follow(self, *, signalled: bool, begun: bool) -> bool:
        return False


@pytest.mark.slow
def test_a_rank_that_waits_is_no_hang_to_another(tmp_path: Path) -> None:
    """As long as something arrives there; then it is one."""
    writer = Waiting(leased(tmp_path, "a"), Mock(), Mock())
    words = Words(Waiting(leased(tmp_path, "a"), Mock(), Mock()))
    watch = Watch(2.5, 60, words)
    try:
        for i in range(12):
            writer.write(1, f"{i} MB", moved=True, every=0)
            time.sleep(0.5)
        assert not words.hung.is_set()
        until(lambda: writer.write(1, "12 MB", moved=False, every=0) or words.hung.is_set(), 8)
    finally:
        watch.close()


# Whole runs


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "two blocks"])
def test_the_same_bits_as_from_a_directory(
    whole: bool, web: WebServer, shard_sets: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """And each shard is fetched once, by one process for both ranks, if the cache holds it. Then it is evaluated."""
    run, cache = tmp_path / "run", tmp_path / "cache"
    gb = 0 if whole else two_blocks(shard_sets)
    result = launch(shard_sets, run, *remote(web, cache, gb=gb))
    assert result.returncode == 0, result.stderr
    assert_same_run(run, undisturbed)
    for of in ("train", "val"):
        tars = [name for name in web.asked() if name.startswith(f"{of}/")]
        names = [f"{of}/{name}" for name in ShardSet(shard_sets / of).names]
        assert set(tars) == set(names)
        if whole:
            assert sorted(tars) == sorted(names)
        else:
            assert max(map(tars.count, names)) <= 2, "two epochs"
            assert kept(cache) <= 1e9 * gb
    said = f"of {web.url}/train and "
    assert said in result.stderr
    assert ("once, then it is in the cache" if whole else "every epoch; the cache") in result.stderr
    if whole:
        evaluated = {}
        for name, path in {"remote": run, "local": undisturbed}.items():
            words = ["evaluate", str(path), f"--json={tmp_path / name}.json", "--device=cpu"]
            done = finish(spawn(python("dist_train", *words)))
            assert done.returncode == 0, done.stderr
            evaluated[name] = json.loads((tmp_path / f"{name}.json").read_text())
        assert evaluated["remote"]["top1_error"] == evaluated["local"]["top1_error"]
        assert evaluated["remote"]["split"] == f"{web.url}/val"


@pytest.mark.integration
@pytest.mark.slow
def test_killed_and_moved_to_a_server(web: WebServer, shard_sets: Path, undisturbed: Path, tmp_path: Path) -> None:
    """A run that began in a directory is killed, goes on from a server, is killed there, and ends where it would."""
    run, cache = tmp_path / "run", tmp_path / "cache"
    gb = two_blocks(shard_sets)
    early = start(shard_sets, run, *BLOCKS, fault=at("step", 20, "kill"))
    assert finish(early).returncode != 0
    late = start(shard_sets, run, *remote(web, cache, gb=gb), fault=at("step", 40, "kill", rank=1))
    assert finish(late).returncode != 0
    all_gone(late)
    result = launch(shard_sets, run, *remote(web, cache, gb=gb))
    assert result.returncode == 0, result.stderr
    assert "continuing from step-" in result.stderr
    assert_same_run(run, undisturbed)


@pytest.mark.integration
@pytest.mark.slow
def test_a_server_that_goes_and_returns(web: WebServer, shard_sets: Path, undisturbed: Path, tmp_path: Path) -> None:
    run, cache = tmp_path / "run", tmp_path / "cache"
    answers(web, 3)
    going = start(shard_sets, run, *remote(web, cache, gb=two_blocks(shard_sets)))
    until_status(run, "waiting for ")
    assert web.url in status(run)["reason"]
    time.sleep(3)
    returns(web)
    result = finish(going)
    assert result.returncode == 0, result.stderr
    assert "waiting for " in result.stderr
    assert_same_run(run, undisturbed)


@pytest.mark.integration
@pytest.mark.slow
def test_a_server_that_is_gone_for_good(web: WebServer, shard_sets: Path, undisturbed: Path, tmp_path: Path) -> None:
    """One sentence with the URL, a failure that a restart may mend, and nothing is left behind."""
    run, cache = tmp_path / "run", tmp_path / "cache"
    options = remote(web, cache, "--run.step_timeout=8", gb=two_blocks(shard_sets))
    answers(web, 3)
    going = start(shard_sets, run, *options)
    result = finish(going)
    assert result.returncode == 1, result.stderr
    all_gone(going)
    found = status(run)
    assert found["state"] == "failed"
    assert f"{web.url}/" in found["reason"]
    assert not any("Traceback" in path.read_text() for path in going.folder.glob("*/*/*/stderr.log"))
    returns(web)
    result = launch(shard_sets, run, *options)
    assert result.returncode == 0, result.stderr
    assert_same_run(run, undisturbed)


@pytest.mark.integration
@pytest.mark.slow
def test_a_server_that_is_not_there(shard_sets: Path, undisturbed: Path, tmp_path: Path) -> None:
    """Another start may find it, so it is no refusal."""
    run, cache = tmp_path / "run", tmp_path / "cache"
    with served(shard_sets) as web:
        options = remote(web, cache, "--run.step_timeout=4")
        answers(web, 0)
        result = launch(shard_sets, run, *options)
        assert result.returncode == 1, result.stderr
        assert status(run)["state"] == "failed"
        assert status(run)["reason"].startswith(f"{web.url}/")
        returns(web)
        result = launch(shard_sets, run, *options)
        assert result.returncode == 0, result.stderr
    assert_same_run(run, undisturbed)


@pytest.mark.integration
@pytest.mark.slow
def test_a_slow_server_is_no_hang(web: WebServer, shard_sets: Path, undisturbed: Path, tmp_path: Path) -> None:
    """Each shard takes longer than `run.step_timeout`."""
    run, cache = tmp_path / "run", tmp_path / "cache"
    assert min(path.stat().st_size for path in shard_sets.glob("train/*0.tar")) > 2 << 16
    web.pause = 1.5  # before each 64 kB, of which there are three at least
    result = launch(shard_sets, run, *remote(web, cache, "--run.step_timeout=4"))
    assert result.returncode == 0, result.stderr
    assert "waiting for " in result.stderr
    assert_same_run(run, undisturbed)


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_end_while_waiting(number: signal.Signals, web: WebServer, shard_sets: Path, tmp_path: Path) -> None:
    """All processes are gone within seconds, the one that fetches as well."""
    run, cache = tmp_path / "run", tmp_path / "cache"
    answers(web, 3)
    going = start(shard_sets, run, *remote(web, cache, gb=two_blocks(shard_sets)))
    until_status(run, "waiting for ")
    assert len(going.processes()) >= 4, "torchrun, two ranks, and who fetches"
    os.kill(going.pid, number)
    finish(going)
    all_gone(going)


@pytest.mark.integration
@pytest.mark.slow
def test_two_runs_with_one_cache(web: WebServer, shard_sets: Path, undisturbed: Path, tmp_path: Path) -> None:
    """It holds two blocks of one of them, so each takes from the other what that needs next: slower, never wrong."""
    words = remote(web, tmp_path / "cache", gb=two_blocks(shard_sets))
    runs = [tmp_path / name for name in ("one", "other")]
    for run, going in [(run, start(shard_sets, run, *words)) for run in runs]:
        result = finish(going)
        assert result.returncode == 0, result.stderr
        assert_same_run(run, undisturbed)


@pytest.mark.integration
@pytest.mark.slow
def test_the_process_that_fetches_is_killed(
    web: WebServer, shard_sets: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """Ranks fetch what they need themselves until there is another one."""
    run = tmp_path / "run"
    answers(web, 3)
    going = start(shard_sets, run, *remote(web, tmp_path / "cache", gb=two_blocks(shard_sets)))
    until_status(run, "waiting for ")
    fetchers = [
        pid for pid in going.processes() if b"pipelines.remote.fetcher" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    assert len(fetchers) == 1
    os.kill(fetchers[0], signal.SIGKILL)
    returns(web)
    result = finish(going)
    assert result.returncode == 0, result.stderr
    assert_same_run(run, undisturbed)


@pytest.mark.integration
@pytest.mark.slow
def test_an_object_store(shard_sets: Path, undisturbed: Path, tmp_path: Path) -> None:
    boto3 = pytest.importorskip("boto3")
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        key = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
        env = {**key, "AWS_ENDPOINT_URL": f"http://{host}:{port}"}
        client: Any = boto3.client(
            "s3",
            endpoint_url=env["AWS_ENDPOINT_URL"],
            aws_access_key_id="a",
            aws_secret_access_key="b",
            region_name="us-east-1",
        )
        client.create_bucket(Bucket="sets")
        for path in shard_sets.glob("*/*"):
            client.upload_file(str(path), "sets", str(path.relative_to(shard_sets)))
        sets = ["--data.train=s3://sets/train", "--data.val=s3://sets/val", f"--data.cache={tmp_path / 'cache'}"]
        run = tmp_path / "run"
        result = launch(shard_sets, run, *BLOCKS, *sets, env=env)
        assert result.returncode == 0, result.stderr
        assert_same_run(run, undisturbed)
    finally:
        server.stop()


@pytest.mark.integration
def test_refusals_in_one_sentence(shard_sets: Path, tmp_path: Path, web: WebServer) -> None:
    """Exit code 2, and no run."""
    cases = {
        "name a folder by data.cache": ["--data.train=http://127.0.0.1:9/x"],
        "raise it to that, or lower data.shuffle_shards": remote(web, tmp_path / "cache", gb=1e-6),
        "NO_SUCH_PLACE": [*urls(web), "--data.cache=$NO_SUCH_PLACE/x"],
    }
    for words, options in cases.items():
        result = launch(shard_sets, tmp_path / "run", *options, ranks=0)
        assert result.returncode == 2, result.stderr
        assert words in result.stderr
        assert result.stderr.count("error: ") == 1
        assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.integration
@pytest.mark.slow
def test_speed_and_figures_of_sets_elsewhere(web: WebServer, shard_sets: Path, tmp_path: Path) -> None:
    run, cache = tmp_path / "run", tmp_path / "cache"
    result = launch(shard_sets, run, *remote(web, cache, "--train.epochs=1"), ranks=0)
    assert result.returncode == 0, result.stderr
    done = finish(spawn(python("dist_train", "figures", str(run), "--only", "inputs", "wrong", "--device=cpu")))
    assert done.returncode == 0, done.stderr
    assert (run / "figures" / "inputs.png").exists()
    options = [f"--config={run / 'config.yaml'}", "--steps=2", f"--out={tmp_path / 'profile.json'}"]
    done = finish(spawn(python("dist_train", "speed", *options, f"--data.cache={tmp_path / 'other'}")))
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "profile.json").read_text())["loader"]["images_per_s"] > 0
