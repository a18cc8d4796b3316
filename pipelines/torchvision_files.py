"""The files of torchvision's data sets: fetched, checked and unpacked, or named to be fetched by hand."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple
from urllib import request
from urllib.error import HTTPError, URLError

from pipelines.errors import SourceError, first_line
from pipelines.files import folder, replacing
from pipelines.speech import bar, say

TIMEOUT = 15.0  # seconds after which a server that sends nothing counts as gone
PIECE = 1 << 18
AGENT = {"User-Agent": "pytorch/vision"}  # as torchvision names itself: some of its servers refuse Python


class Unfetched(Exception):
    """Why a file could not be fetched, or not whole."""


class Download(NamedTuple):
    """A file that torchvision would download.

    Attributes:
        path: where it looks for the file before it asks the server.
        md5: in hex; None if torchvision does not know it.
        into: the folder into which it is unpacked; None if it is used as it is.
    """

    url: str
    path: Path
    md5: str | None
    into: Path | None

    @property
    def present(self) -> bool:
        """Whether the file is there, and whole as far as that is known."""
        return self.path.is_file() and self.md5 in (None, _md5(self.path))


def complete(name: str, make: Callable[[bool], Any], module: str, remedy: str = "") -> Any:
    """A data set of torchvision whose files are there, or are fetched now. A file that was put in its place by hand is
    taken if its MD5 sum is the one that torchvision knows.

    Args:
        name: of the data set, for messages.
        make: makes it, given `download`.
        module: that of torchvision in which its class stands.
        remedy: what can be done besides fetching the files by hand.

    Raises SourceError that names the files, and anything that `make` raises.
    """
    with suppress(RuntimeError, OSError):  # how torchvision says that a file is missing, or is not what it was
        return make(False)
    made = failure = None
    with _listed(sys.modules[module]) as wanted:
        try:
            made = make(True)
        except Exception as error:  # it finds nothing of what it believes to have downloaded
            failure = error
    if failure and not wanted:
        raise failure
    if not wanted:  # it has downloaded by itself, in a way of its own
        return made
    missing = [one for one in wanted if not one.present]
    for k, one in enumerate(missing):
        try:
            _fetch(one)
        except Unfetched as error:
            raise SourceError(f"{name} is unavailable ({error}): {_by_hand(missing[k:])}{remedy}") from error
    for one in wanted:
        if one.into:
            _unpack(one.path, one.into)
    return make(False)


@contextmanager
def _listed(module: Any) -> Iterator[list[Download]]:
    """Lists what a module of torchvision would download meanwhile; nothing is downloaded."""
    wanted = list[Download]()

    def download_url(url: str, root: Any, filename: Any = None, md5: str | None = None, **_: Any) -> None:
        path = Path(root).expanduser() / (filename or os.path.basename(url))
        wanted.append(Download(url, path, md5, None))

    def download_and_extract_archive(
        url: str, download_root: Any, extract_root: Any = None, filename: Any = None, md5: str | None = None, **_: Any
    ) -> None:
        download_url(url, download_root, filename, md5)
        wanted[-1] = wanted[-1]._replace(into=Path(extract_root or download_root).expanduser())

    ours = {"download_url": download_url, "download_and_extract_archive": download_and_extract_archive}
    theirs = {name: vars(module)[name] for name in ours if name in vars(module)}
    vars(module).update({name: ours[name] for name in theirs})
    try:
        yield wanted
    finally:
        vars(module).update(theirs)


def _by_hand(missing: list[Download]) -> str:
    """What to fetch, and where to put it."""
    urls = ", ".join(one.url for one in missing)
    if len(missing) == 1:
        return f"fetch it where there is a network and put it at {missing[0].path}: {urls}"
    folders = " or ".join(sorted({str(one.path.parent) for one in missing}))
    return f"fetch them where there is a network and put them into {folders}: {urls}"


def _fetch(one: Download) -> None:
    """Puts a file in its place when it is whole. Raises Unfetched, or OSError if it cannot be written."""
    there = one.path.exists()
    name, digest, first, got = one.path.name, hashlib.md5(usedforsecurity=False), b"", 0
    try:
        response = _answer(one.url)
    except Unfetched as error:
        raise Unfetched(f"{one.path} is not the whole file; {error}" if there else str(error)) from error
    folder(one.path.parent)
    with response, replacing(one.path) as file:
        total = response.length
        say(f"fetching {one.url}" + (f", {total / 1e6:.1f} MB" if total else ""))
        with bar(total and max(1, total // 10**6), name, "MB", lines=True) as shown:
            while piece := _piece(response):
                first, got = first or piece[:512], got + len(piece)
                file.write(piece)
                digest.update(piece)
                shown.update(got // 10**6 - shown.n)
        if total and got < total:
            raise Unfetched(f"{one.url} ended after {got} of {total} bytes")
        if one.md5 not in (None, digest.hexdigest()):
            what = "a web page, perhaps of a proxy" if first.lstrip()[:1] == b"<" else "another file"
            raise Unfetched(f"{one.url} answers with {what}: its MD5 sum is {digest.hexdigest()}, not {one.md5}")


def _answer(url: str) -> Any:
    """The server's answer. A name with many addresses, none of which answers, costs no more time than one address."""
    answers = list[Any]()

    def ask() -> None:
        try:
            answers.append(request.urlopen(request.Request(url, headers=AGENT), timeout=TIMEOUT))
        except HTTPError as error:
            error.close()
            answers.append(error)
        except (OSError, HTTPException, ValueError) as error:
            answers.append(error.reason if isinstance(error, URLError) else error)

    thread = Thread(target=ask, daemon=True)
    thread.start()
    thread.join(TIMEOUT)
    if not answers or isinstance(answers[0], TimeoutError):
        raise Unfetched(f"no answer in {TIMEOUT:g} seconds")
    if isinstance(answers[0], Exception | str):
        raise Unfetched(first_line(Exception(answers[0])))
    return answers[0]


def _piece(response: Any) -> bytes:
    try:
        piece: bytes = response.read(PIECE)
    except (OSError, HTTPException) as error:
        raise Unfetched(f"the server broke off: {first_line(error)}") from error
    return piece


def _unpack(path: Path, into: Path) -> None:
    """Unpacks an archive beside its place and moves it there: torchvision would take half of it for the whole. Raises
    SourceError or OSError."""
    from torchvision.datasets.utils import extract_archive

    half = into / f".{path.name}.half"
    shutil.rmtree(half, ignore_errors=True)
    folder(half)
    if path.stat().st_size > 10**8:
        say(f"unpacking {path}")
    try:
        extract_archive(str(path), str(half))
        for entry in half.iterdir():
            if (into / entry.name).is_dir():  # of which torchvision says that it is not whole
                shutil.rmtree(into / entry.name)
            os.replace(entry, into / entry.name)
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise SourceError(f"{path} cannot be unpacked ({first_line(error)}): remove it, and start again") from error
    finally:
        shutil.rmtree(half, ignore_errors=True)


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()
