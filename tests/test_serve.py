"""`report RUN --serve`: the page for one user's browser, and nothing for anybody else."""

from __future__ import annotations

import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from dist_train.__main__ import main
from dist_train.page import serve
from dist_train.page.report import rendered
from dist_train.page.serve import PageServer
from pipelines.errors import UserError
from tests.helpers import recorded_runs
from tests.helpers.browser import MISSING, chromium, program
from tests.helpers.elsewhere import answering
from tests.helpers.launch import launch

HTML = b"<!doctype html><title>a page</title>"


def served(make: Callable[[int], bytes]) -> AbstractContextManager[PageServer]:
    return answering(PageServer(make))


@pytest.fixture
def server() -> Iterator[PageServer]:
    with served(lambda live: HTML) as server:
        yield server


def asked(
    server: PageServer, path: str, method: str = "GET", host: str | None = None
) -> tuple[int, bytes, http.client.HTTPMessage]:
    """Status, body and headers of an answer; `host`: the header, "" for none."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.putrequest(method, path, skip_host=host is not None)
    if host:
        connection.putheader("Host", host)
    connection.endheaders()
    answer = connection.getresponse()
    found = answer.status, answer.read(), answer.headers
    connection.close()
    return found


def test_the_page_and_how_it_is_sent(server: PageServer) -> None:
    status, body, headers = asked(server, f"/{server.token}")
    assert (status, body) == (200, HTML)
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert headers["Cache-Control"] == "no-store"
    assert headers["Referrer-Policy"] == "no-referrer", "the address is the secret"
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]


@pytest.mark.parametrize("host", ["localhost", "localhost:9999", "127.0.0.1:8000"])
def test_a_browser_at_the_other_end_of_a_tunnel(server: PageServer, host: str) -> None:
    """Where the port may be another."""
    assert asked(server, f"/{server.token}", host=host)[:2] == (200, HTML)


@pytest.mark.parametrize(
    "host", ["", "evil.example", "evil.example:80", "localhost.evil.example", "127.0.0.1.nip.io", "[", "localhost:x"]
)
def test_a_name_that_a_stranger_has_pointed_here(server: PageServer, host: str) -> None:
    """DNS rebinding: the page of another site asks with its own name."""
    status, body, _ = asked(server, f"/{server.token}", host=host)
    assert status == 403
    assert HTML not in body
    assert server.token.encode() not in body


def test_without_the_token_there_is_nothing(server: PageServer) -> None:
    token = server.token
    assert len(token) >= 20
    wrong = ["/", "//", "/report.html", "/favicon.ico", f"/{token}x", f"/{token[:-1]}", f"/{token}/", f"/{token}?a=1"]
    wrong += [
        f"/{token}/../../etc/passwd",
        f"/{token}/metrics.jsonl",
        f"/?token={token}",
        "/%00",
        f"/{token.swapcase()}",
    ]
    for path in wrong:
        status, body, _ = asked(server, path)
        assert (status, HTML in body) == (403, False), path
    with PageServer(lambda live: HTML) as another:
        assert another.token != token


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "CONNECT", "TRACE"])
def test_nothing_but_get(server: PageServer, method: str) -> None:
    status, body, headers = asked(server, f"/{server.token}", method)
    assert status == 501
    assert HTML not in body
    assert headers["Access-Control-Allow-Origin"] is None


def test_only_this_machine_reaches_it(server: PageServer) -> None:
    assert server.server_address[0] == "127.0.0.1"
    with socket.socket() as other, pytest.raises(OSError, match="refused"):
        other.connect(("127.0.0.2", server.server_port))


def test_a_run_that_is_gone() -> None:
    """A sentence, and the page again once it is there."""
    pages = iter([UserError("there is no run <b>demo"), HTML])

    def make(live: int) -> bytes:
        page = next(pages)
        if isinstance(page, Exception):
            raise page
        return page

    with served(make) as server:
        status, body, headers = asked(server, f"/{server.token}")
        assert status == 503
        assert b"there is no run &lt;b&gt;demo<" in body
        assert headers["Content-Type"] == "text/html; charset=utf-8"
        assert asked(server, f"/{server.token}")[:2] == (200, HTML)
        assert asked(server, f"/{server.token}")[:2] == (200, HTML), "made once in some seconds"


def test_a_large_page_is_reloaded_less_often() -> None:
    """At 3 MB, every minute: a line from home is not filled by it."""
    asked_for: list[int] = []

    def make(live: int) -> bytes:
        asked_for.append(live)
        return 3_000_000 * b"x"

    with PageServer(make) as server:
        server.page.get()
        server.page.forget()
        server.page.get()
    assert asked_for == [10, 60]


@pytest.mark.integration
def test_a_reload_shows_what_is_new_in_the_same_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In Chromium: zoomed in with the mouse and scrolled down, the page that loads itself anew stays there; and
    it comes back, zoomed in, if the run was gone for a moment."""
    if not program():
        (pytest.fail if os.environ.get("CI") else pytest.skip)(MISSING)
    run = recorded_runs.healthy(tmp_path / "run")
    scale = "() => { const x = window.page.charts.loss.scales.x; return [x.min, x.max]; }"
    monkeypatch.setattr(serve, "SOON", 1)
    gone = [False]

    def make(live: int) -> bytes:
        if gone[0]:
            raise UserError("there is no run demo")
        return rendered([run], time.time(), live=3)

    with served(make) as server, chromium() as browser:
        page = browser.new_page(viewport={"width": 1100, "height": 600})
        page.goto(server.address)
        whole = page.evaluate(scale)
        box = page.locator("#chart-loss .u-over").bounding_box()
        assert box
        page.mouse.move(box["x"] + 0.25 * box["width"], box["y"] + 20)
        page.mouse.down()
        page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 30, steps=5)
        page.mouse.up()
        page.evaluate("scrollTo(0, 300)")
        before = [*page.evaluate(scale), page.evaluate("scrollY")]
        assert 0 < before[0] < before[1] < 0.6 * whole[1]
        assert before[2] > 100
        page.evaluate("window.before = true")
        page.wait_for_function("() => window.page && !window.before", timeout=60_000)
        assert [*page.evaluate(scale), page.evaluate("scrollY")] == pytest.approx(before, rel=0.01)
        assert server.token in page.url
        gone[0] = True
        page.wait_for_selector("text=there is no run demo", timeout=60_000)
        gone[0] = False
        page.wait_for_function("() => window.page", timeout=60_000)
        assert page.evaluate(scale) == pytest.approx(before[:2], rel=0.01)


@pytest.mark.integration
def test_until_ctrl_c(shard_sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As it is typed: the address, the line for ssh, and the page as it is now."""
    run = tmp_path / "run"
    assert launch(shard_sets, run, "--train.max_steps=2", ranks=0).returncode == 0
    words = [sys.executable, "-m", "dist_train", "report", str(run), "--serve"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        said = "".join(process.stdout.readline() for _ in range(3))
        found = re.search(r"http://localhost:(\d+)/(\S+)", said)
        assert found
        port, token = int(found[1]), found[2]
        assert f"ssh -N -L {port}:localhost:{port} {socket.gethostname()}\n" in said
        connection = http.client.HTTPConnection("localhost", port, timeout=60)
        connection.request("GET", f"/{token}")
        answer = connection.getresponse()
        assert (answer.status, b'id="summary"' in answer.read()) == (200, True)
        connection.close()
        assert main(["report", str(run), "--serve", "--port", str(port)]) == 2
        assert capsys.readouterr().err == (
            f"error: port {port} cannot be had ([Errno 98] Address already in use): name another one by --port\n"
        )
    finally:
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
