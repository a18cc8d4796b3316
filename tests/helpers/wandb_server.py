"""The tests' own W&B server on loopback: wandb's client works online against it, and it simulates faults."""

from __future__ import annotations

import base64
import json
import re
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Literal
from urllib.parse import unquote

from tests.helpers.wandb_backend import Backend, SeenArtifact, SeenRun

KEY = "0123456789abcdef0123456789abcdef01234567"
STORE = "/stored"
Part = Literal["well", "refuse", "slow", "hang", "die", "429", "wrong key"]


class WandbServer:
    """The server: it answers from the beginning, and is closed at the end of `with`.

    Args:
        delay: seconds before each answer while it is "slow", and what "429" asks the client to wait.
    """

    def __init__(self, delay: float = 60) -> None:
        self.delay = delay
        self.part: Part = "well"
        self.asked: list[str] = []  # the GraphQL operations and the other requests, in their order, answered or not
        self.changed = threading.Condition()  # guards all that is here; told when anything has come
        self._open: set[socket.socket] = set()
        self._http: ThreadingHTTPServer | None = None
        self.port = 0
        self._listen()
        self.backend = Backend(self.url + STORE)

    def __enter__(self) -> WandbServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.play("refuse")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """For a process that is to use it; there, rows are sent each second and not four times a minute."""
        return {
            "WANDB_BASE_URL": self.url,
            "WANDB_API_KEY": KEY,
            "WANDB_ERROR_REPORTING": "false",
            "WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL": "1",  # seconds, and whole ones
            "WANDB_X_FILE_STREAM_RETRY_WAIT_MIN_SECONDS": "1",
        }

    @property
    def run(self) -> SeenRun:
        """The one run that it has got."""
        (run,) = self.backend.runs.values()
        return run

    @property
    def artifacts(self) -> list[SeenArtifact]:
        return list(self.backend.artifacts.values())

    def play(self, part: Part) -> None:
        """From now on, until it plays another part, on the same port:

        well: answers. refuse: takes no connection, and ends those that are open. die: the same, in the middle of its
        next answer, when it has done what it was asked. hang: takes requests and does not answer. slow: answers late.
        429: asks for patience. wrong key: answers 401. What hangs or waits goes on when the part changes.
        """
        with self.changed:
            self.part = part
            self.changed.notify_all()
        if part == "refuse":
            self._close()
        elif self._http is None:
            self._listen()

    def until(self, holds: Callable[[], object], timeout: float = 60) -> None:
        """Wait till it is so; an error if it is not in time."""
        with self.changed:
            assert self.changed.wait_for(holds, timeout), f"so far it was asked {self.asked[-30:]}"

    def _listen(self) -> None:
        handler = type("Bound", (_Handler,), {"owner": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self._http.daemon_threads = True
        self.port = self._http.server_port
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def _close(self) -> None:
        http, self._http = self._http, None
        if http is None:
            return
        http.shutdown()
        http.socket.close()
        with self.changed:
            for connection in self._open:
                with suppress(OSError):  # the client has closed it
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    connection.shutdown(socket.SHUT_RDWR)


def cores(pid: int) -> list[int]:
    """wandb's own processes that a process has started."""
    listed = [file.read_text().split() for file in Path(f"/proc/{pid}/task").glob("*/children")]
    return [int(child) for children in listed for child in children if _is_core(child)]


def _is_core(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip() == "wandb-core"
    except OSError:  # it has gone
        return False


def operation(request: dict[str, Any]) -> str:
    """The name of a GraphQL operation, which wandb's Python client writes in the query only."""
    named = re.match(r"\s*(?:query|mutation)\s+(\w+)", request["query"])
    assert named, request
    return named[1]


class _Handler(BaseHTTPRequestHandler):
    """One connection of a client."""

    protocol_version = "HTTP/1.1"
    owner: WandbServer

    def setup(self) -> None:
        super().setup()
        with self.owner.changed:
            self.owner._open.add(self.connection)

    def finish(self) -> None:
        with self.owner.changed:
            self.owner._open.discard(self.connection)
        with suppress(OSError):
            super().finish()

    def handle(self) -> None:
        with suppress(OSError):  # the client, or a fault, has ended the connection
            super().handle()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._serve(b"")

    def do_POST(self) -> None:
        self._serve(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    do_PUT = do_POST

    def _serve(self, body: bytes) -> None:
        owner = self.owner
        what = operation(json.loads(body)) if self.path == "/graphql" else f"{self.command} {self.path}"
        with owner.changed:
            owner.asked.append(what)
            owner.changed.notify_all()
            if owner.part == "slow":
                owner.changed.wait_for(lambda: owner.part != "slow", owner.delay)
            elif owner.part == "hang":
                owner.changed.wait_for(lambda: owner.part != "hang")
            if owner.part == "refuse":
                self.close_connection = True
                return
            status, answer = self._answer(body)
            dies = owner.part == "die"
            owner.changed.notify_all()
        content = json.dumps(answer).encode()
        self.send_response(status)
        if status == 429:
            self.send_header("Retry-After", str(int(owner.delay)))
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if dies else content)
        if dies:
            owner.play("refuse")

    def _answer(self, body: bytes) -> tuple[int, dict[str, Any]]:
        """Status and content of the answer, by the part that is played."""
        owner = self.owner
        key = base64.b64encode(f"api:{KEY}".encode()).decode()
        if owner.part == "429":
            return 429, {"error": "rate limit exceeded"}
        path = unquote(self.path)
        if self.command == "PUT" and path.startswith(STORE):
            owner.backend.stored(path.removeprefix(STORE + "/"), body)
            return 200, {}
        if owner.part == "wrong key" or self.headers.get("Authorization") != f"Basic {key}":
            return 401, {"errors": [{"message": "user is not logged in"}]}
        if path == "/graphql":
            request = json.loads(body)
            return 200, {"data": owner.backend.answer(operation(request), request.get("variables") or {})}
        if path.endswith("/file_stream"):
            owner.backend.runs[path.split("/")[4]].stream(json.loads(body))
            return 200, {"limits": {}}
        return 404, {"error": f"nothing at {path}"}
