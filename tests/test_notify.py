"""Messages about a run: each vendor's documented form, on a server of the test's own; the cost of a dead server;
and that the address is never disclosed."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace
from typing import Any

import cloudpickle
import pytest

from dist_train.config import Config, RunConfig
from dist_train.monitor import notify, webhook
from dist_train.monitor.notify import Notifier, Outbox, keep_sent, merged, message_of, tell_now
from dist_train.monitor.reader import Shown
from dist_train.monitor.webhook import HOW, WHERE, Message, NotSent, Webhook
from dist_train.ranks import launcher
from dist_train.rundir import events, status
from pipelines.errors import UserError
from slurm import job
from slurm.cluster import Entry
from slurm.job import Job
from slurm.submissions import SubmittedRun
from slurm.watch import Silences
from tests.helpers.compare import status as told_status
from tests.helpers.drills import EVERY, all_gone, until, until_status
from tests.helpers.launch import at, finish, launch, start

ROOT = Path(__file__).parents[1]
SECRET = "T0SECRET"
LONG = Message("a/b", "failed", "<b> has & failed_x", "why " * 2000, [("best", "top-1 *20%*"), ("time", "1:02:03")])


class Endpoint(ThreadingHTTPServer):
    """Keeps what it is sent, and answers with `code`; hangs where that is 0, and drips where it is 1."""

    daemon_threads = True

    def __init__(self, code: int = 200, location: str = "") -> None:
        self.code, self.location = code, location
        self.got: list[tuple[str, dict[str, str], bytes]] = []
        self.over = Event()
        super().__init__(("127.0.0.1", 0), Answer)
        Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/services/{SECRET}"

    @property
    def bodies(self) -> list[dict[str, Any]]:
        return [json.loads(body) for _, _, body in self.got]


class Answer(BaseHTTPRequestHandler):
    server: Endpoint

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.got.append((self.path, dict(self.headers), body))
        if self.server.code == 0:
            self.server.over.wait(60)
            return
        if self.server.code == 1:  # now and then a byte, and never an end
            while not self.server.over.wait(0.1):
                self.wfile.write(b"X")
            return
        self.send_response(self.server.code)
        if self.server.location:
            self.send_header("Location", self.server.location)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[Callable[..., Endpoint]]:
    """Starts endpoints."""
    started: list[Endpoint] = []

    def begin(*args: Any) -> Endpoint:
        started.append(Endpoint(*args))
        return started[-1]

    yield begin
    for each in started:
        each.over.set()
        each.shutdown()
        each.server_close()


def posted(server: Endpoint, form: str, message: Message = LONG) -> dict[str, Any]:
    hook = Webhook.wanted({WHERE: server.url, HOW: form})
    assert hook
    hook.post(message)
    path, headers, body = server.got[-1]
    assert headers["Content-Type"].startswith("application/json")
    assert path == ("/" if form == "ntfy" else f"/services/{SECRET}")
    found: dict[str, Any] = json.loads(body)
    return found


# Vendors


def test_slack(endpoint: Callable[..., Endpoint]) -> None:
    """`text` is required; &, < and > are escaped; 4,000 characters are recommended, and above 40,000 it is cut."""
    found = posted(endpoint(), "slack")
    assert set(found) == {"text"}
    assert found["text"].startswith("*&lt;b&gt; has &amp; failed_x*\nwhy why")
    assert len(found["text"]) <= 4000 + 20
    most = posted(endpoint(), "slack", Message("a", "failed", "t", "<&>" * 2000))["text"]
    assert len(most) <= 40_000
    assert not re.search(r"[<>]|&(?!amp;|lt;|gt;)", most)


def test_discord(endpoint: Callable[..., Endpoint]) -> None:
    """`content` of at most 2,000 characters; markup in names is none, and no name calls anybody. It answers 204."""
    found = posted(endpoint(204), "discord")
    assert found["allowed_mentions"] == {"parse": []}
    assert found["content"].startswith("**\\<b\\> has & failed\\_x**\nwhy")
    assert len(found["content"]) <= 2000
    short = posted(endpoint(204), "discord", Message("a", "done", "a is done", "", LONG.rows))
    assert short["content"] == "**a is done**\nbest: top-1 \\*20%\\*\ntime: 1:02:03"


def test_teams(endpoint: Callable[..., Endpoint]) -> None:
    """A workflow goes through `attachments`, each an Adaptive Card of a type, a version and a body; 28 kB. It answers
    202."""
    found = posted(endpoint(202), "teams")
    assert found["type"] == "message"
    (attachment,) = found["attachments"]
    assert attachment["contentType"] == "application/vnd.microsoft.card.adaptive"
    card = attachment["content"]
    assert card["$schema"] == "http://adaptivecards.io/schemas/adaptive-card.json"
    assert (card["type"], card["version"]) == ("AdaptiveCard", "1.4")
    title, text, facts = card["body"]
    assert (title["type"], title["text"], title["wrap"]) == ("TextBlock", LONG.title, True)
    assert (text["type"], text["wrap"], text["text"][:7]) == ("TextBlock", True, "why why")
    assert facts == {"type": "FactSet", "facts": [{"title": a, "value": b} for a, b in LONG.rows]}
    assert len(json.dumps(found)) < 28_000
    short = posted(endpoint(202), "teams", Message("a", "done", "a is done"))["attachments"][0]["content"]["body"]
    assert [block["type"] for block in short] == ["TextBlock"]


def test_ntfy(endpoint: Callable[..., Endpoint]) -> None:
    """JSON goes to the root, with the topic; priorities are 1 to 5; more than 4,096 bytes would be a file."""
    message = Message("a", "failed", "é" * 600, "é" * 5000)
    found = posted(endpoint(), "ntfy", message)
    assert found["topic"] == f"services/{SECRET}"
    assert len(found["message"].encode()) <= 4096
    assert len(found["title"]) <= 250
    assert (found["priority"], found["tags"]) == (4, ["warning"])
    calm = posted(endpoint(), "ntfy", Message("a", "done", "a is done"))
    assert (calm["message"], calm["priority"]) == ("a is done", 3)


def test_ntfy_with_a_password(endpoint: Callable[..., Endpoint]) -> None:
    server = endpoint()
    hook = Webhook.wanted({WHERE: server.url.replace("//", "//me:p%40ss@"), HOW: "ntfy"})
    assert hook
    hook.post(LONG)
    assert server.got[0][1]["Authorization"] == "Basic bWU6cEBzcw=="
    assert "@" not in server.got[0][1]["Host"]


def test_json(endpoint: Callable[..., Endpoint]) -> None:
    found = posted(endpoint(), "json")
    assert found == {
        **{"run": "a/b", "kind": "failed", "title": LONG.title, "text": LONG.sentence},
        "rows": {"best": "top-1 *20%*", "time": "1:02:03"},
    }


def test_the_form_follows_from_the_host() -> None:
    for url, form in {
        "https://hooks.slack.com/services/T/B/x": "slack",
        "https://discord.com/api/webhooks/1/x": "discord",
        "https://ptb.discord.com/api/webhooks/1/x": "discord",
        "https://me.webhook.office.com/webhookb2/x": "teams",
        "https://prod-12.westeurope.logic.azure.com:443/workflows/x?sig=y": "teams",
        "https://default1.2.environment.api.powerplatform.com:443/powerautomate/x": "teams",
        "https://ntfy.sh/mine": "ntfy",
        "https://hooks.slack.com.example.org/x": "json",
        "https://example.org/hook": "json",
        "http://localhost:9/x": "json",
        "http://[::1]:9/x": "json",
    }.items():
        hook = Webhook.wanted({WHERE: url})
        assert hook
        assert hook.form == form, url
        assert url not in repr(hook)
    assert Webhook.wanted({}) is None
    assert Webhook.wanted({WHERE: " "}) is None


@pytest.mark.parametrize(
    "url",
    [
        f"http://example.org/{SECRET}",
        f"http://127.0.0.1.example.org/{SECRET}",
        f"ftp://example.org/{SECRET}",
        SECRET,
        f"https:///{SECRET}",
        f"https://[{SECRET}",
        f"https://example.org:{SECRET}/x",
        f"https://example.org/{SECRET} x",
    ],
)
def test_other_addresses_are_refused_unnamed(url: str) -> None:
    with pytest.raises(UserError, match="must be an address that begins with https://") as caught:
        Webhook.wanted({WHERE: url})
    assert SECRET not in str(caught.value)
    with pytest.raises(UserError, match=f"{HOW} must be one of slack, discord, teams, ntfy, json"):
        Webhook.wanted({WHERE: url, HOW: "pager"})


# Endpoints that do not work


@pytest.mark.parametrize("code", [301, 302, 307, 308, 400, 403, 404, 429, 500, 502])
def test_an_answer_that_is_none(code: int, endpoint: Callable[..., Endpoint]) -> None:
    """Also a redirection: the address is not for another server."""
    other = endpoint()
    server = endpoint(code, other.url)
    with pytest.raises(NotSent, match=f"the server answers {code}") as caught:
        posted(server, "json")
    assert SECRET not in str(caught.value)
    assert caught.value.__suppress_context__, "no traceback shows what the library has said"
    assert not other.got


def test_who_does_not_speak_http(endpoint: Callable[..., Endpoint], monkeypatch: pytest.MonkeyPatch) -> None:
    """A port where nobody listens, a server that hangs, and one that says something else."""
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    hook = Webhook.wanted({WHERE: f"http://127.0.0.1:{port}/{SECRET}"})
    assert hook
    with pytest.raises(NotSent, match="Connection refused"):
        hook.post(LONG)

    monkeypatch.setattr(webhook, "TIMEOUT", 0.2)
    with pytest.raises(NotSent, match=r"no answer within 0.2 s"):
        posted(endpoint(0), "json")

    def talk(server: socket.socket) -> None:
        connection, _ = server.accept()
        connection.recv(1 << 16)
        connection.sendall(f"{SECRET} what?\r\n\r\n".encode())
        connection.close()

    with socket.create_server(("127.0.0.1", 0)) as server:
        Thread(target=talk, args=(server,), daemon=True).start()
        hook = Webhook.wanted({WHERE: f"http://127.0.0.1:{server.getsockname()[1]}/{SECRET}"})
        assert hook
        with pytest.raises(NotSent, match="the answer makes no sense") as caught:
            hook.post(LONG)
    assert SECRET not in str(caught.value)


def test_a_proxy_that_refuses(endpoint: Callable[..., Endpoint], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told the host, and nothing behind it; to this machine no proxy is asked."""
    asked = []

    def refuse(server: socket.socket) -> None:
        connection, _ = server.accept()
        asked.append(connection.recv(1 << 16))
        connection.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
        connection.close()

    with socket.create_server(("127.0.0.1", 0)) as proxy:
        Thread(target=refuse, args=(proxy,), daemon=True).start()
        for name in ("https_proxy", "http_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.getsockname()[1]}")
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        assert posted(endpoint(), "json")
        hook = Webhook.wanted({WHERE: f"https://example.org/{SECRET}"})
        assert hook
        with pytest.raises(NotSent, match="the proxy answers 407"):
            hook.post(LONG)
    assert asked[0].startswith(b"CONNECT example.org:443")
    assert SECRET.encode() not in asked[0]


# When, and what


def note(kind: str, title: str) -> Message:
    return Message("a", kind, title, "so")


def outbox(server: Endpoint, say: Callable[[str], None] = print, run: Path | None = None) -> Outbox:
    hook = Webhook.wanted({WHERE: server.url})
    assert hook
    return Outbox(hook, say, run)


def test_at_most_one_a_minute(endpoint: Callable[..., Endpoint], monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes at once is one message, what comes within the minute waits, and the end waits for nothing."""
    monkeypatch.setattr(notify, "GATHERING", 0.2)
    server = endpoint()
    box = outbox(server)
    box.put(note("silent", "it was killed"))
    box.put(note("started", "it goes on"))
    until(lambda: server.got)
    box.put(note("silent", "another"))
    box.put(note("failed", "it failed"))
    box.close()
    first, second = server.bodies
    assert (first["kind"], first["title"], first["text"]) == ("silent", "it was killed", "so\nit goes on: so")
    assert (second["kind"], second["title"], second["text"]) == ("failed", "it failed", "so\nanother: so")


def test_the_next_minute(endpoint: Callable[..., Endpoint], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notify, "GATHERING", 0.01)
    monkeypatch.setattr(notify, "EVERY", 0.5)
    server = endpoint()
    box = outbox(server)
    box.put(note("started", "one"))
    until(lambda: server.got)
    box.put(note("started", "two"))
    box.put(note("started", "three"))
    until(lambda: len(server.got) == 2)
    assert [body["title"] for body in server.bodies] == ["one", "three"]
    assert server.bodies[1]["text"] == "so\ntwo: so"
    box.close()
    assert len(server.got) == 2


def test_the_minute_of_a_run_is_that_of_all_its_starts(
    endpoint: Callable[..., Endpoint], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A crash loop tells that it goes on once a minute, and each of its ends."""
    monkeypatch.setattr(notify, "GATHERING", 0.01)
    server = endpoint()
    monkeypatch.setenv(WHERE, server.url)

    def titles() -> list[str]:
        return [body["title"] for body in server.bodies]

    for i in range(3):  # each is killed, or fails, before the minute is over
        box = outbox(server, run=tmp_path)
        box.put(note("silent", f"{i} was killed"))
        box.put(note("started", f"{i} goes on"))
        until(lambda: server.got)
        box.close()
    assert titles() == ["0 was killed"]
    tell_now("it", tmp_path, "end", state="failed", reason="why")
    tell_now("it", tmp_path, "end", state="failed", reason="why")
    assert titles()[1:] == ["it has failed"] * 2
    box = outbox(server, run=tmp_path)
    box.put(note("started", "it goes on"))
    box.put(note("stopped", "it was stopped"))
    box.close()
    assert titles()[3:] == ["it was stopped"]
    assert server.bodies[-1]["text"] == "so\nit goes on: so"


@pytest.mark.integration
def test_a_start_waits_for_the_minute_of_the_one_before(
    endpoint: Callable[..., Endpoint], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(notify, "GATHERING", 0.01)
    monkeypatch.setattr(notify, "EVERY", 1.0)
    server, began = endpoint(), time.time()
    keep_sent(tmp_path, note("started", "one"))
    box = outbox(server, run=tmp_path)
    box.put(note("started", "two"))
    until(lambda: server.got)
    box.close()
    assert server.bodies[0]["title"] == "two"
    assert time.time() - began >= 1.0


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"time": "soon"}', '{"time": 99999999999}'])
def test_when_the_last_message_was_sent_may_not_be_known(
    text: str, endpoint: Callable[..., Endpoint], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Neither a damaged file, nor a clock, nor a disk that takes nothing keeps a message."""
    monkeypatch.setattr(notify, "GATHERING", 0.01)
    (tmp_path / notify.FILE).write_text(text)
    server = endpoint()
    for run in (tmp_path, tmp_path / "gone"):
        box = outbox(server, run=run)
        box.put(note("started", "one"))
        box.close()
    assert len(server.got) == 2


def test_what_could_not_be_sent_comes_with_the_next_one(
    endpoint: Callable[..., Endpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One warning, without the address."""
    monkeypatch.setattr(notify, "GATHERING", 0.01)
    monkeypatch.setattr(notify, "EVERY", 0.1)
    server, said = endpoint(500), list[str]()
    box = outbox(server, said.append)
    box.put(note("started", "one"))
    until(lambda: len(server.got) > 2)
    server.code = 200
    box.put(note("stopped", "two"))
    box.close()
    assert (server.bodies[-1]["title"], server.bodies[-1]["text"]) in (("two", "so\none: so"), ("two", "so"))
    assert said == ["a message could not be sent (the server answers 500): the run goes on"]


def test_what_is_told_of_an_event(tmp_path: Path) -> None:
    lines = [{"kind": "step", "step": 1}]
    lines += [
        {"kind": "validation", "step": i, "epoch": i, "top1_error": e, "top5_error": e / 2}
        for i, e in ((1, 0.5), (2, 0.25), (3, 0.375))
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def of(event: str, **values: Any) -> Message:
        found = message_of("demo", tmp_path, {"event": event, **values})
        assert found
        return found

    begun = of("start", step=0, nodes=["a", "b"], world_size=8, device="cuda", job="12")
    assert begun.title == "demo has started"
    assert ("nodes", "2: a, b") in begun.rows
    assert of("start", step=40, nodes=["a"]).title == "demo goes on at step 40"
    done = of("end", state="done", reason="", seconds={"training": 3700.0, "data": 20.0})
    assert (done.kind, done.title, done.urgent) == ("done", "demo is done", False)
    assert done.rows == [
        ("best", "top-1 error 25.00%, top-5 error 12.50% (epoch 3)"),
        ("last", "top-1 error 37.50%, top-5 error 18.75% (epoch 4)"),
        ("time", "1:02:00: 99% training, 1% data"),
    ]
    assert of("end", state="stopped", reason="a signal", step=7, requeued=True).sentence == "Slurm brings it back"
    assert of("end", state="stopped", reason="a signal", step=7).title == "demo was stopped at step 7"
    assert of("end", state="diverged", reason="the loss").title == "demo has diverged"
    failed = of("end", state="failed", reason="why", rank=3, node="b", error="OSError", requeued=True)
    assert (failed.title, failed.sentence) == ("demo has failed", "rank 3 on b: why; Slurm brings it back")
    assert of("given_up", reason="no progress").urgent
    silent = of("killed", heartbeat=time.time() - 61, step=9, node="b", reason="")
    assert "0:01:01 ago" in silent.sentence or "0:01:02 ago" in silent.sentence
    assert silent.rows == [("step", "9"), ("node", "b")]
    for event in ("division", "bad_samples", "requeued", "changed"):
        assert message_of("demo", tmp_path, {"event": event}) is None
    assert merged([begun]) == begun


def test_ends_that_others_tell(
    endpoint: Callable[..., Endpoint], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """That of the start before, and one in haste, of which the rank that failed has told."""
    server = endpoint()
    monkeypatch.setenv(WHERE, server.url)
    reader = Notifier.wanted(Shown(tmp_path, Config(run=RunConfig(name="demo")), print))
    assert reader
    reader.take({"event": "end", "state": "stopped", "start": "earlier"})
    reader.take({"event": "start", "step": 3, "nodes": ["a"]})
    reader.take({"event": "end", "state": "failed", "error": "OSError", "rank": 1})
    reader.close()
    assert [body["title"] for body in server.bodies] == ["demo goes on at step 3"]


def test_one_event_at_once(
    endpoint: Callable[..., Endpoint],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nobody waits longer than some seconds, and nothing is raised."""
    tell_now("demo", tmp_path, "given_up", reason="no progress")  # no address
    server, dead = endpoint(), endpoint(0)
    monkeypatch.setenv(WHERE, server.url)
    tell_now("demo", tmp_path, "given_up", reason="no progress")
    assert server.bodies[0]["title"] == "demo is given up"
    monkeypatch.setattr(notify, "AT_ONCE", 0.1)
    monkeypatch.setenv(WHERE, dead.url)
    tell_now("demo", tmp_path, "given_up", reason="no progress")
    until(lambda: dead.got)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(notify, "AT_ONCE", 3)
    monkeypatch.setenv(WHERE, f"http://example.org/{SECRET}")
    tell_now("demo", tmp_path, "given_up", reason="no progress")
    said = capsys.readouterr().err
    assert "a message could not be sent (DIST_TRAIN_NOTIFY must be" in said
    assert SECRET not in said


# Runs


def everything(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


@pytest.mark.slow
@pytest.mark.integration
def test_a_run_tells_of_itself_and_not_of_the_address(
    endpoint: Callable[..., Endpoint], shard_sets: Path, tmp_path: Path
) -> None:
    """Started, killed and gone on, failed on another rank, done: and the secret is in no file and no line."""
    server, run = endpoint(), tmp_path / "run"
    env = {WHERE: server.url, HOW: "json", "WANDB_MODE": "offline"}
    early = start(shard_sets, run, EVERY, fault={}, env=env | {"STEP_SECONDS": "0.5"}, how="exec")
    until(lambda: server.got)
    until_status(run, "running")
    early.kill()
    all_gone(early)
    told = [finish(early)]
    assert [body["title"] for body in server.bodies] == ["run has started"]
    (run / notify.FILE).unlink()  # as if a minute had passed
    slowly = env | {"STEP_SECONDS": "0.5"}
    told.append(launch(shard_sets, run, EVERY, fault=at("step", 4, "error", 1), env=slowly))
    told.append(launch(shard_sets, run, EVERY, env=env, ranks=0))
    titles = [body["title"] for body in server.bodies[1:]]
    assert "run fell silent" in titles
    assert titles.count("run has failed") == 1
    assert server.bodies[-1]["kind"] == "done"
    assert set(server.bodies[-1]["rows"]) == {"best", "last", "time"}
    assert told_status(run)["state"] == "done"
    assert SECRET.encode() not in everything(tmp_path)
    assert SECRET not in "".join(each.stdout + each.stderr for each in told)


@pytest.mark.integration
@pytest.mark.parametrize(("broken", "code", "why"), [(False, 2, "gone/train"), (True, 1, "OSError: no driver")])
def test_a_job_that_fails_before_it_has_claimed_the_run(
    broken: bool, code: int, why: str, endpoint: Callable[..., Endpoint], shard_sets: Path, tmp_path: Path
) -> None:
    """Its data are not there, or torch cannot be imported. Nobody sees it, as somebody does who has typed it."""
    server, run = endpoint(), tmp_path / "run"
    data = shard_sets if broken else tmp_path / "gone"
    env = {WHERE: server.url, HOW: "json"}
    if broken:
        (tmp_path / "torch.py").write_text("raise OSError('no driver')")
        env["PYTHONPATH"] = f"{tmp_path}:{ROOT}"
    else:
        assert launch(data, run, env=env, ranks=0).returncode == 2
        assert (server.got, run.exists()) == ([], False)
    env |= {"SUBMITIT_EXECUTOR": "slurm", launcher.OVER: str(tmp_path / "over")}
    assert finish(start(data, run, env=env, ranks=0, how="exec")).returncode == code
    (body,) = server.bodies
    assert (body["kind"], body["title"]) == ("failed", "run has failed")
    assert body["text"].startswith(f"rank 0 on {os.uname().nodename}: ")
    assert why in body["text"]
    assert ("Slurm brings it back" in body["text"]) is broken
    (event,) = events.read(run)
    assert (event["event"], event["start"], event["state"], event["code"]) == ("end", "", "failed", code)
    assert (told_status(run)["state"], event["requeued"]) == ("failed", broken)
    if not broken:  # the next start is not taken for the end of this one
        assert launch(shard_sets, run, EVERY, env={WHERE: server.url}, ranks=0).returncode == 0
        assert [event["event"] for event in events.read(run)] == ["end", "start", "end"]


HANGING = """
import sys, time
from pathlib import Path
from dist_train.monitor.notify import tell_now
from dist_train.ranks import launcher
from dist_train.rundir.errors import Errors
from dist_train.rundir.last_words import LastWords
from dist_train.rundir.lease import Lease
from dist_train.rundir.status import Status
from dist_train.rundir.writer import Writer

run = Path(sys.argv[1])
lease = Lease(run)
lease.acquire()
words = LastWords(run)
words.claimed(run, Status(lease, print, Writer(), writes=True), 2)
words.tellers = [lambda *_, **__: time.sleep(3600), lambda *_, **event: tell_now("run", run, "end", **event)]
Errors.folder = property(lambda self: time.sleep(3600))
Status.fail = launcher.comes_back = lambda *_: time.sleep(3600)
words.hang(4, 7, "read (vote.py:1)", "the stacks")
"""


@pytest.mark.integration
def test_a_file_system_that_hangs_keeps_no_message(endpoint: Callable[..., Endpoint], tmp_path: Path) -> None:
    """Nor the rank: not where it asks whether the job comes back, not the event, and not the record."""
    server = endpoint()
    os.mkfifo(tmp_path / "metrics.jsonl")
    variables = {**os.environ, WHERE: server.url}
    words = [sys.executable, "-c", HANGING, str(tmp_path)]
    done = subprocess.run(words, env=variables, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1, done.stderr
    assert [body["title"] for body in server.bodies] == ["run has failed"]
    assert "no progress for 4 s" in server.bodies[0]["text"]


@pytest.mark.integration
@pytest.mark.parametrize("code", [0, 500])
def test_a_dead_endpoint_ends_nothing(
    code: int, endpoint: Callable[..., Endpoint], shard_sets: Path, tmp_path: Path
) -> None:
    server, run = endpoint(code), tmp_path / "run"
    result = launch(shard_sets, run, EVERY, env={WHERE: server.url}, ranks=0)
    assert (result.returncode, told_status(run)["state"]) == (0, "done"), result.stderr
    assert result.stderr.count("a message could not be sent") == 1
    assert server.got
    assert SECRET not in result.stderr


def test_no_pickle_has_the_address(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(WHERE, f"https://example.org/{SECRET}")
    assert SECRET.encode() not in cloudpickle.dumps(Job(tmp_path))


# The cluster


def in_queue(root: Path, name: str, age: float, state: str = "running") -> SubmittedRun:
    """A run that was submitted, whose last sign of life was so long ago."""
    folder = root / "runs" / name / "slurm"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("train: {epochs: 90}")
    submission = {"job": name, "folder": str(folder), "tasks": 1, "local": False, "parameters": {}}
    (folder / "job.json").write_text(json.dumps(submission))
    body = {"state": state, "reason": "", "heartbeat": time.time() - age, "step": 5}
    (folder.parent / status.FILE).write_text(json.dumps(body))
    return SubmittedRun(folder.parent)


def beat(run: SubmittedRun, when: float, state: str = "running") -> None:
    """The run's last sign of life is of this Unix time."""
    body = {"state": state, "reason": "", "heartbeat": when, "step": 5}
    (run.directory / status.FILE).write_text(json.dumps(body))


def test_a_silence_is_told_once(tmp_path: Path) -> None:
    """Of a run that Slurm has running, and again when it has been heard and falls silent once more."""
    runs = [in_queue(tmp_path, "1", 600), in_queue(tmp_path, "2", 5), in_queue(tmp_path, "3", 600, "done")]
    runs += [in_queue(tmp_path, "4", 600), in_queue(tmp_path, "5", 600)]
    running, now = Entry("RUNNING"), time.time()
    queue = {runs[0].name: running, runs[1].name: running, runs[2].name: running, runs[3].name: Entry("PENDING")}
    seen = Silences()
    (message,) = seen.found(runs, queue, now)
    assert (message.run, message.kind) == (runs[0].name, "silent")
    assert seen.found(runs, queue, now) == []
    (again,) = seen.found(runs, queue, now + 600)
    assert again.run == runs[1].name
    beat(runs[0], now + 600)
    assert seen.found(runs, queue, now + 600) == []
    assert [message.run for message in seen.found(runs, queue, now + 900)] == [runs[0].name]


@pytest.mark.parametrize("place", [None, Entry("PENDING"), Entry("OUT_OF_MEMORY")])
def test_a_run_that_was_alive_and_left_the_queue(place: Entry | None, tmp_path: Path) -> None:
    """Killed by the system or with its node, it had no time to say so; what ends in its own words is not silent."""
    killed, stopped, now = in_queue(tmp_path, "1", 5), in_queue(tmp_path, "2", 5), time.time()
    seen = Silences()
    assert seen.found([killed, stopped], {run.name: Entry("RUNNING") for run in (killed, stopped)}, now) == []
    beat(stopped, now, "stopped")
    queue = {killed.name: place} if place else {}
    (message,) = seen.found([killed, stopped], queue, now + 600)
    assert (message.run, message.title) == (killed.name, f"{killed.name} fell silent")
    assert ("Slurm", place.state if place else "not in the queue") in message.rows
    assert seen.found([killed, stopped], queue, now + 1200) == []
    beat(killed, now + 1200, "starting")  # it came back, and nobody has seen it run since
    assert seen.found([killed, stopped], queue, now + 1200) == []
    assert seen.found([killed, stopped], {}, now + 1800) == []


def environment(run: SubmittedRun) -> Any:
    """What submitit tells a job of one rank."""
    return SimpleNamespace(
        job_id=run.last.job, paths=SimpleNamespace(folder=run.folder), num_tasks=1, cluster="slurm", hostnames=["a"]
    )


def test_a_run_is_given_up_whatever_the_disk_takes(
    endpoint: Callable[..., Endpoint], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its job does not come back, and somebody is told."""
    server, run = endpoint(), in_queue(tmp_path, "12", 600)
    monkeypatch.setenv(WHERE, server.url)
    for node in ("a", "b", "c"):
        run.append(start="12", checkpoint="", nodes=[node])
    (run.directory / "events.jsonl").mkdir()
    assert not job._begin(run, environment(run))
    assert run.last.no_requeue.exists()
    assert [body["kind"] for body in server.bodies] == ["given_up"]


def test_a_crash_is_that_of_the_start_which_crashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the second crash nothing is known but that it came before the second start had claimed the run."""
    monkeypatch.setenv(launcher.SUBMITTED, "")
    run = in_queue(tmp_path, "12", 600)
    status.write(run.directory, "running", start="first")
    for starts in (["first"], []):
        run.last.crash.write_text(f"{time.time() + 5} 9 137 ")
        assert job._begin(run, environment(run))
        found = status.known(run.directory)
        assert (found["state"], found["reason"]) == ("failed", "exit code 137: see the log")
        assert [found[key] for key in ("start",) if key in found] == starts


@pytest.mark.integration
def test_watching_the_table(endpoint: Callable[..., Endpoint], tmp_path: Path) -> None:
    """Until Ctrl-C; the message about a silent run goes out once."""
    server = endpoint()
    in_queue(tmp_path, "12", 600)
    commands = tmp_path / "bin"
    commands.mkdir()
    (commands / "squeue").write_text("#!/bin/sh\necho '12|RUNNING|None|1:00'\n")
    (commands / "squeue").chmod(0o755)
    variables = {**os.environ, "PATH": f"{commands}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), WHERE: server.url}
    words = [sys.executable, "-m", "slurm", "status", "--watch", "1"]
    with open(tmp_path / "said", "wb") as said:
        watching = subprocess.Popen(words, cwd=tmp_path, env=variables, stdout=said, stderr=subprocess.STDOUT)
    until(lambda: server.got and (tmp_path / "said").read_text().count("HEARTBEAT") > 2)
    watching.send_signal(signal.SIGINT)
    assert watching.wait(20) == 0
    text = (tmp_path / "said").read_text()
    assert "silent for 10 min" in text
    assert "\033" not in text, "it is no terminal"
    assert SECRET not in text
    assert [body["title"] for body in server.bodies] == ["12 fell silent"]


@pytest.mark.integration
def test_an_answer_that_does_not_end(endpoint: Callable[..., Endpoint], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook, "TIMEOUT", 0.5)
    with pytest.raises(NotSent, match="no answer within 1 s"):
        posted(endpoint(1), "json")
