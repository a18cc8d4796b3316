"""Reading from elsewhere: a web server, an object store, or a slow file system; a file from any byte on."""

from __future__ import annotations

import errno
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.client import responses
from pathlib import Path
from time import monotonic
from typing import IO, Any
from urllib.parse import quote

from pipelines.errors import UserError, first_line
from pipelines.files import regular
from pipelines.opened import PASSING, Absent, ReadError
from pipelines.speech import in_line

SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
SECRET = re.compile(r"(?<=://)[^/]*@")  # name and password in a URL
VARIABLE = re.compile(r"\$(\w+|\{[^}]*\})")
PIECE = 1 << 20  # bytes of a web server's answer that are handed on at a time
FEWEST, MOST = 1 << 18, 1 << 23  # bytes that an object store is asked for at a time
LONG = 1.0  # seconds after which what has come is handed on, and less is asked for
SILENCE = 20.0  # seconds after which a server that sends nothing is given up
AGAIN = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS)
LASTING = (
    "NoCredentialsError",
    "PartialCredentialsError",
    "ParamValidationError",
    "ProfileNotFound",
    "TooManyRedirects",
)
TRUST = "if you trust it, let SSL_CERT_FILE (of S3: AWS_CA_BUNDLE) name its certificate, then repeat the command"
WHO = "check the URL and who may read it, then repeat the command"


def is_url(text: str | Path) -> bool:
    """Whether a place is a URL, and not a path."""
    return bool(SCHEME.match(str(text)))


def expanded(text: str) -> Path:
    """A path with the environment's values for $VARIABLES, and ~. Raises UserError for a variable that is not set."""
    path = os.path.expandvars(os.path.expanduser(text))
    if left := VARIABLE.search(path):
        raise UserError(
            f"{in_line(text)} has {in_line(left[0])}, which is not set on this node: set it, or write a path"
        )
    return Path(path).resolve()  # a site's scratch is a link, often


def place_of(text: str | Path) -> Distant:
    """The place that a path or an fsspec URL means. Raises UserError if what its protocol needs is not installed."""
    found = SCHEME.match(str(text))
    if not found:
        return SlowFolder(str(text))
    return (Web if found[1].lower() in ("http", "https") else ObjectStore)(str(text))


class Distant(ABC):
    """Files elsewhere. Methods raise Absent, FileNotFoundError and PermissionError.

    Attributes:
        name: in messages.
    """

    def __init__(self, root: str) -> None:
        self.root = root.rstrip("/")
        self.name = in_line(SECRET.sub("", self.root))

    def path(self, name: str) -> str:
        """A file, in messages."""
        return f"{self.name}/{name}"

    @abstractmethod
    def size(self, name: str) -> int:
        """Bytes of a file."""

    @abstractmethod
    def pieces(self, name: str, start: int, stop: int) -> Iterator[bytes]:
        """Yields the bytes [start, stop) of a file as they come, in pieces of some MB; Absent if there are fewer."""

    def small(self, name: str, most: int) -> bytes:
        """A whole file. Raises UserError if it has more than so many bytes."""
        if (size := self.size(name)) > most:
            raise UserError(
                f"{self.path(name)} has {size} bytes, and no set has one of more than {most}: check the URL"
            )
        return b"".join(self.pieces(name, 0, size))


class SlowFolder(Distant):
    """A directory, on a file system that is too slow to be read at random."""

    def size(self, name: str) -> int:
        with self._opened(name) as file:
            return os.fstat(file.fileno()).st_size

    def pieces(self, name: str, start: int, stop: int) -> Iterator[bytes]:
        with self._opened(name) as file:
            file.seek(start)
            while start < stop and (piece := file.read(min(PIECE, stop - start))):
                yield piece
                start += len(piece)
        _whole(start, stop)

    @contextmanager
    def _opened(self, name: str) -> Iterator[IO[bytes]]:
        try:
            with open(Path(self.root) / name, "rb", buffering=0, opener=regular) as file:
                yield file
        except (Absent, FileNotFoundError):
            raise
        except PermissionError as error:
            raise Forbidden(str(error.strerror)) from error
        except OSError as error:
            raise Absent(str(error.strerror), passing=error.errno in PASSING) from error


class _Remote(Distant):
    """What fsspec reads. Its file systems run in a thread that a fork does not copy, so each process has its own."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self._of: tuple[int, Any] = (os.getpid(), self._opened())

    @property
    def _fs(self) -> Any:
        if self._of[0] != os.getpid():
            self._of = (os.getpid(), self._opened())
        return self._of[1]

    def _opened(self) -> Any:
        import fsspec

        protocol = self.root.partition("://")[0].lower()
        try:
            return fsspec.url_to_fs(self.root, skip_instance_cache=True, **self._settings(protocol))[0]
        except (ImportError, ValueError) as error:
            package = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs"}.get(protocol)
            remedy = f"pip install {package}" if package else "install it"
            why = in_line(first_line(error))
            raise UserError(
                f"{self.name} cannot be read, since what {protocol}:// needs is not installed ({why}): {remedy}"
            ) from None
        except Exception as error:  # of any library; some ask the server now
            raise ReadError(f"{self.name} could not be read ({in_line(first_line(error))}): {WHO}") from error

    def _settings(self, protocol: str) -> dict[str, Any]:
        return {}


class Web(_Remote):
    """A web server: one request per file. A server that knows no ranges sends a file from its beginning again."""

    def __init__(self, root: str) -> None:
        if not re.fullmatch(r"[^:]*://(?:[^/]*@)?([^/@:?#\[\]]+|\[[^/]*\])(:\d+)?(/[^?#]*)?", root):
            raise UserError(f"{in_line(SECRET.sub('', root))} is not https://HOST/FOLDER (without ? and #): correct it")
        super().__init__(root)

    def _settings(self, protocol: str) -> dict[str, Any]:
        try:
            from aiohttp import ClientTimeout
        except ImportError:  # which fsspec explains
            return {}
        timeout = ClientTimeout(total=None, sock_connect=SILENCE, sock_read=SILENCE)
        return {"client_kwargs": {"timeout": timeout, "trust_env": True}}  # with the proxies of the environment

    def size(self, name: str) -> int:
        answer = self._ask(name, 0, 1)
        try:
            total = answer.headers.get("Content-Range", "").rpartition("/")[2] if answer.status == 206 else ""
            total = total or answer.headers.get("Content-Length", "")
            if not total.isdecimal():
                raise Absent("its server does not say how long it is", passing=False, remedy=WHO)
            return int(total)
        finally:
            self._sync(_closed, answer)

    def pieces(self, name: str, start: int, stop: int) -> Iterator[bytes]:
        answer = self._ask(name, start, stop)
        try:
            at = start if answer.status == HTTPStatus.PARTIAL_CONTENT else 0
            while at < stop and (piece := self._sync(_some, answer.content, min(PIECE, stop - at))):
                if (at := at + len(piece)) > start:
                    yield piece[-(at - start) :] if at - start < len(piece) else piece
                    start = at
            _whole(at, stop)
        finally:
            self._sync(_closed, answer)

    def _ask(self, name: str, start: int, stop: int) -> Any:
        url, headers = f"{self.root}/{quote(name)}", {"Accept-Encoding": "identity"}
        answer = self._sync(_answer, self._fs, url, headers | {"Range": f"bytes={start}-{stop - 1}"})
        if (status := answer.status) in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT):
            return answer
        self._sync(_closed, answer)
        said = f"{status} {responses.get(status, '')}".rstrip()
        if status in (HTTPStatus.NOT_FOUND, HTTPStatus.GONE):
            raise FileNotFoundError(errno.ENOENT, said, self.path(name))
        if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            raise Forbidden(said)
        raise Absent(said, passing=status >= 500 or status in AGAIN)

    def _sync(self, work: Any, *arguments: Any) -> Any:
        from fsspec.asyn import sync

        try:
            return sync(self._fs.loop, work, *arguments)
        except Exception as error:
            raise _meant(error) from error


class ObjectStore(_Remote):
    """Any other file system of fsspec, in ranged reads: few bytes at first, then more while they come fast."""

    def _settings(self, protocol: str) -> dict[str, Any]:
        if protocol not in ("s3", "s3a"):
            return {}
        return {"config_kwargs": {"connect_timeout": SILENCE, "read_timeout": SILENCE, "retries": {"max_attempts": 0}}}

    def _opened(self) -> Any:
        system = super()._opened()
        system.retries = 1  # of s3fs: whoever calls this module tries again
        return system

    def size(self, name: str) -> int:
        return int(self._read("size", name))

    def pieces(self, name: str, start: int, stop: int) -> Iterator[bytes]:
        most = FEWEST
        while start < stop:
            began, end = monotonic(), min(start + most, stop)
            piece = self._read("cat_file", name, start=start, end=end)
            yield piece
            _whole(start + len(piece), end)
            start = end
            most = min(2 * most, MOST) if monotonic() - began < LONG else max(most // 2, FEWEST)

    def _read(self, what: str, name: str, **kept: int) -> Any:
        try:
            return getattr(self._fs, what)(f"{self.root}/{name}", **kept)
        except Exception as error:
            raise _meant(error) from error


class Forbidden(Absent, PermissionError):
    """A file that may not be read."""

    def __init__(self, why: str) -> None:
        super().__init__(why, passing=False, remedy=WHO)


def _meant(error: Exception) -> OSError:
    """What a library's error means here. Unless it is known to last, it may pass."""
    if isinstance(error, Absent | FileNotFoundError):
        return error
    why = in_line(first_line(error) or type(error).__name__)
    if isinstance(error, PermissionError):
        return Forbidden(why)
    if "CERTIFICATE_VERIFY_FAILED" in why:
        return Absent(why, passing=False, remedy=TRUST)
    lasting = isinstance(error, ValueError | TypeError | UserError) or type(error).__name__ in LASTING
    return Absent(why, passing=False, remedy=WHO) if lasting else Absent(why, passing=True)


def _whole(end: int, wanted: int) -> None:
    if end != wanted:
        raise Absent(f"it broke off at byte {end}", passing=True)


async def _answer(system: Any, url: str, headers: dict[str, str]) -> Any:
    from yarl import URL  # aiohttp's

    session = await system.set_session()
    given = {**system.kwargs, "headers": system.kwargs.get("headers", {}) | headers}  # of fsspec's own settings
    return await session.get(URL(url), **given)


async def _some(content: Any, most: int) -> bytes:
    """So many bytes, or what comes within a second; nothing at the end."""
    got, until = bytearray(), monotonic() + LONG
    try:
        while len(got) < most and monotonic() < until and (data := await content.read(most - len(got))):
            got += data
    except Exception:
        if not got:  # otherwise the next call raises it again
            raise
    return bytes(got)


async def _closed(answer: Any) -> None:
    answer.close()
