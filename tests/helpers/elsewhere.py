"""A web server on loopback that serves a folder, and misbehaves as told."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any, TypeVar
from urllib.parse import unquote

Server = TypeVar("Server", bound=ThreadingHTTPServer)


class WebServer(ThreadingHTTPServer):
    """Attributes:
    root: the folder.
    requests: name and first byte of each file asked for, in order.
    ranges: whether it knows them.
    pause: seconds before each 64 kB.
    misbehave: called with the handler and the name before each answer; True: it has answered.
    """

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.requests, self.ranges, self.pause = root, list[tuple[str, int]](), True, 0.0
        self.misbehave: Callable[[Handler, str], bool] = lambda handler, name: False
        self.lock = Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def asked(self, suffix: str = ".tar") -> list[str]:
        """Names of the files asked for, of this kind, but for questions after their size."""
        with self.lock:
            return [name for name, _ in self.requests if name.endswith(suffix)]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Who asks may leave."""


class Handler(BaseHTTPRequestHandler):
    server: WebServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        name = self.path.lstrip("/")
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start = int(found[1]) if found and self.server.ranges else 0
        path = self.server.root / unquote(name)
        if not (found and found[2] == "0"):
            with self.server.lock:
                self.server.requests.append((name, start))
        if self.server.misbehave(self, name):
            return
        if not path.is_file():
            self.say(404, b"nothing here")
            return
        data = path.read_bytes()
        if found and self.server.ranges:
            end = min(int(found[2]) + 1 if found[2] else len(data), len(data))
            self.say(206, data[start:end], f"bytes {start}-{end - 1}/{len(data)}")
        else:
            self.say(200, data)

    def say(self, status: int, data: bytes, content_range: str = "", *, length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        if content_range:
            self.send_header("Content-Range", content_range)
        self.end_headers()
        for at in range(0, len(data), 1 << 16):
            time.sleep(self.server.pause)
            self.wfile.write(data[at : at + (1 << 16)])

    def cut(self) -> None:
        """Ends the connection, as a server does that dies."""
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def answering(server: Server) -> Iterator[Server]:
    """The server answers in a thread, until the block ends."""
    with server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def served(root: Path) -> AbstractContextManager[WebServer]:
    return answering(WebServer(root))
