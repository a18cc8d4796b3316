"""The page served to one user's browser: on loopback, at an address with a secret, until Ctrl-C.

Other users of the machine reach the loopback too, so without the token there is no answer; and a web page of a stranger
that has its own name resolved to 127.0.0.1 (DNS rebinding) is told by the Host header.
"""

from __future__ import annotations

import hmac
import re
import secrets
import socket
import socketserver
import time
from argparse import Namespace
from collections.abc import Callable
from contextlib import suppress
from html import escape
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from shlex import quote
from threading import Lock

from dist_train.outcomes import DONE
from dist_train.page import report
from pipelines.errors import UserError
from pipelines.speech import show

LOOPBACK = "127.0.0.1"
HOST = re.compile(r"(localhost|127\.0\.0\.1)(:[0-9]+)?")  # as a browser asks, here or at the other end of a tunnel
SOON = 10  # seconds between two reloads of a small page
RATE = 50_000  # bytes/s that a larger one takes of a line at most
# Not by a Refresh header: where the address has a #fragment, as a zoomed page's has, that loads nothing.
SENTENCE = "<!doctype html><p>{}</p><script>setTimeout(() => location.reload(), {})</script>"
PATIENCE = 10.0  # seconds for a request to arrive
HEADERS = {
    "Content-Type": "text/html; charset=utf-8",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "frame-ancestors 'none'",  # the page's own says the rest, but not this
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class _Rendered:
    """The page as it is now, made anew only once it is some seconds old: several tabs cost as much as one."""

    def __init__(self, make: Callable[[int], bytes]) -> None:
        self._make, self._turn = make, Lock()
        self._page, self._made, self._live = b"", float(-SOON), SOON

    def get(self) -> bytes:
        with self._turn:
            if time.monotonic() - self._made > SOON / 2:
                self._page, self._made = self._make(self._live), time.monotonic()
                self._live = max(SOON, len(self._page) // RATE)
            return self._page

    def forget(self) -> None:
        """Has it made anew, whenever that was."""
        self._made = float(-SOON)


class PageServer(ThreadingHTTPServer):
    """Serves one page at /TOKEN, and nothing else.

    Args:
        make: the page, to be reloaded after so many seconds.
        port: 0 for one that is free.

    Attributes:
        token: the secret in the address.
        page: what it serves.
    """

    daemon_threads = True

    def __init__(self, make: Callable[[int], bytes], port: int = 0) -> None:
        self.token, self.page = secrets.token_urlsafe(16), _Rendered(make)
        super().__init__((LOOPBACK, port), _Handler)

    def server_bind(self) -> None:
        """Binds, without asking a name server how this machine is called."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = LOOPBACK, self.server_address[1]

    @property
    def address(self) -> str:
        return f"http://localhost:{self.server_port}/{self.token}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Says nothing: the browser has left, or it was none."""


class _Handler(BaseHTTPRequestHandler):
    """Answers one request; GET alone is known."""

    server: PageServer
    server_version, sys_version = "dist_train", ""
    timeout = PATIENCE

    def do_GET(self) -> None:
        asked = self.path.removeprefix("/").encode(errors="replace")
        known = hmac.compare_digest(asked, self.server.token.encode())
        if not known or not HOST.fullmatch(self.headers.get("Host", "")):
            self.send_error(HTTPStatus.FORBIDDEN, "the address has to be the one that was printed")
            return
        try:
            page, status = self.server.page.get(), HTTPStatus.OK
        except (UserError, OSError) as error:  # a run that was moved or damaged meanwhile
            sentence = SENTENCE.format(escape(str(error)), 1000 * SOON)
            page, status = sentence.encode(errors="replace"), HTTPStatus.SERVICE_UNAVAILABLE
        self.send_response(status)
        for name, value in (HEADERS | {"Content-Length": str(len(page))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(page)

    def log_message(self, *_: object) -> None:
        """Says nothing: a line would hold the token."""


def start(args: Namespace) -> int:
    """Serves the page of these runs until Ctrl-C, and says how to reach it. Returns the exit code. Raises UserError for
    what is no run, and if the port cannot be had."""
    runs = report.chosen(args.runs)
    if args.out:
        raise UserError("--serve writes no file: leave --out or --serve out")
    try:
        server = PageServer(lambda live: report.rendered(runs, time.time(), live=live), args.port)
    except (OSError, OverflowError) as error:
        raise UserError(f"port {args.port} cannot be had ({error}): name another one by --port") from error
    with server, suppress(KeyboardInterrupt):
        host, number = quote(socket.gethostname()), server.server_port
        show(
            f"on a laptop (which may reach {host} by another name), first: ssh -N -L {number}:localhost:{number} {host}"
        )
        show(f"in a browser: {server.address}")
        show("whoever has this address sees the page; Ctrl-C ends it")
        server.serve_forever()
    return DONE
