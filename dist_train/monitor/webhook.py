"""Messages to a chat or a phone: the format that each vendor documents, and the request. Imports no torch.

The address is a secret, since whoever knows it can write there. It is read from the environment and appears in no text
that leaves this module.
"""

from __future__ import annotations

import base64
import ipaddress
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from http.client import HTTPException
from threading import Thread
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import SplitResult, quote, unquote, urlsplit, urlunsplit
from urllib.request import HTTPRedirectHandler, ProxyHandler, Request, build_opener

from pipelines.errors import UserError

WHERE, HOW = "DIST_TRAIN_NOTIFY", "DIST_TRAIN_NOTIFY_FORMAT"
TIMEOUT = 5.0  # seconds for each read and write of a request
HOSTS = {
    r"hooks\.slack(-gov)?\.com": "slack",
    r"(\w+\.)?discord(app)?\.com": "discord",
    r"(.+\.webhook|outlook)\.office\.com|.+\.logic\.azure\.com|.+\.powerplatform\.com": "teams",
    r"ntfy\.sh": "ntfy",
}
# Characters of a message that each accepts or shows; ntfy counts bytes of UTF-8, a card has 28 kB in all.
SLACK, DISCORD, TEAMS, NTFY = 4000, 2000, 4000, 4000
TITLE = 250


class NotSent(Exception):
    """A message could not be sent; the text says why, without the address."""


@dataclass(frozen=True)
class Message:
    """A message about a run.

    Attributes:
        run: its name.
        kind: started, done, stopped, diverged, failed, given_up or silent.
        title: one line.
        sentence: one, several, or empty.
        rows: labels and values.
    """

    run: str
    kind: str
    title: str
    sentence: str = ""
    rows: Sequence[tuple[str, str]] = ()

    @property
    def urgent(self) -> bool:
        """Whether somebody may have to do something."""
        return self.kind in ("diverged", "failed", "given_up", "silent")

    @property
    def body(self) -> str:
        """Sentence and rows, one line each."""
        return "\n".join(
            [*([self.sentence] if self.sentence else []), *(f"{label}: {value}" for label, value in self.rows)]
        )


@dataclass(frozen=True)
class Webhook:
    """Address and format of messages."""

    url: SplitResult = field(repr=False)
    form: str

    @classmethod
    def wanted(cls, environment: Mapping[str, str] = os.environ) -> Webhook | None:
        """The webhook named in the environment, or None. Raises UserError, which does not quote the address."""
        text, form = environment.get(WHERE, "").strip(), environment.get(HOW, "").strip()
        if not text:
            return None
        if form and form not in FORMS:
            raise UserError(f"{HOW} must be one of {', '.join(FORMS)}: no messages are sent")
        try:
            url = urlsplit(text)
            host, _ = url.hostname or "", url.port
            known = host and re.fullmatch(r"[!-~]+", text)
        except ValueError:
            known = None
        if not known or (url.scheme != "https" and not (url.scheme == "http" and _is_here(host))):
            raise UserError(f"{WHERE} must be an address that begins with https:// : no messages are sent")
        form = form or next((kind for name, kind in HOSTS.items() if re.fullmatch(name, host)), "json")
        if form == "ntfy" and not url.path.strip("/"):
            raise UserError(f"{WHERE} must have the topic behind the address of ntfy: no messages are sent")
        return cls(url, form)

    def post(self, message: Message) -> None:
        """Sends a message; redirections are not followed. Raises NotSent. The vendors answer 200, 202 or 204."""
        url, payload = self.url, FORMS[self.form](message)
        if self.form == "ntfy":  # takes JSON at its root, with the topic inside
            payload["topic"], url = unquote(url.path.strip("/")), url._replace(path="/")
        user, _, host = url.netloc.rpartition("@")
        headers = {"Content-Type": "application/json; charset=utf-8", "User-Agent": "dist_train"}
        if user:
            headers["Authorization"] = "Basic " + base64.b64encode(unquote(user).encode()).decode()
        address = urlunsplit(url._replace(netloc=host, fragment=""))
        body = json.dumps(payload, ensure_ascii=False).encode(errors="backslashreplace")
        handlers = [_NoRedirect(), *([ProxyHandler({})] if _is_here(url.hostname or "") else [])]
        failed = list[str]()

        def send() -> None:
            try:
                request = Request(address, body, headers, method="POST")
                build_opener(*handlers).open(request, timeout=TIMEOUT).close()  # the answer's text is not needed
            except Exception as error:  # a server or a proxy can cause any
                if isinstance(error, HTTPError):
                    error.close()
                failed.append(self._scrubbed(_why(error)))

        thread = Thread(target=send, name="message", daemon=True)  # a socket's time-out starts anew at each byte
        thread.start()
        thread.join(2 * TIMEOUT)
        if failed or thread.is_alive():
            raise NotSent(failed[0] if failed else f"no answer within {2 * TIMEOUT:g} s") from None

    def _scrubbed(self, text: str) -> str:
        """The text without parts of the address, which a library may have quoted."""
        for secret in (self.url.geturl(), self.url.netloc, self.url.path, self.url.query):
            if len(secret) > 1:
                text = text.replace(secret, "...").replace(quote(secret), "...")
        return text


class _NoRedirect(HTTPRedirectHandler):
    """Follows no redirection: the address is a secret, for its own server only."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def _why(error: Exception) -> str:
    """The reason in words, none of them from the address."""
    if isinstance(error, HTTPError):
        return f"the server answers {error.code}"
    if isinstance(error, URLError) and isinstance(error.reason, Exception):
        error = error.reason
    if isinstance(error, TimeoutError):
        return f"no answer within {TIMEOUT:g} s"
    if found := re.match(r"Tunnel connection failed: (\d+)", str(error)):
        return f"the proxy answers {found[1]}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return "the answer makes no sense" if isinstance(error, HTTPException) else type(error).__name__


def _is_here(host: str) -> bool:
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: max(0, length - 3)] + "..."


def _slack(message: Message) -> dict[str, Any]:
    """https://docs.slack.dev/messaging/sending-messages-using-incoming-webhooks; three characters are escaped, and
    up to 4,000 are recommended."""
    text = _cut(f"*{_cut(message.title, TITLE)}*\n{message.body}".rstrip(), SLACK)
    for character, name in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):
        text = text.replace(character, name)
    return {"text": text}


def _discord(message: Message) -> dict[str, Any]:
    """https://docs.discord.com/developers/resources/webhook#execute-webhook: `content` has at most 2,000 characters."""
    escaped = [re.sub(r"([\\*_~`|<>#\[\]])", r"\\\1", text) for text in (_cut(message.title, TITLE), message.body)]
    text = "**{}**\n{}".format(*escaped).rstrip()
    return {"content": _cut(text, DISCORD), "allowed_mentions": {"parse": []}}  # names in the text notify nobody


def _teams(message: Message) -> dict[str, Any]:
    """A workflow's webhook takes Adaptive Cards, as attachments:
    https://learn.microsoft.com/microsoftteams/platform/webhooks-and-connectors/how-to/connectors-using"""
    body: list[dict[str, Any]] = [
        {"type": "TextBlock", "text": _cut(message.title, TITLE), "weight": "Bolder", "size": "Medium", "wrap": True}
    ]
    if message.sentence:
        body.append({"type": "TextBlock", "text": _cut(message.sentence, TEAMS), "wrap": True})
    if message.rows:
        facts = [{"title": label, "value": _cut(value, TITLE)} for label, value in message.rows]
        body.append({"type": "FactSet", "facts": facts})
    card = {"$schema": "http://adaptivecards.io/schemas/adaptive-card.json", "type": "AdaptiveCard", "version": "1.4"}
    attachment = {"contentType": "application/vnd.microsoft.card.adaptive", "contentUrl": None}
    return {"type": "message", "attachments": [attachment | {"content": card | {"body": body}}]}


def _ntfy(message: Message) -> dict[str, Any]:
    """https://docs.ntfy.sh/publish/#publish-as-json: more than 4,096 bytes would become a file."""
    text = message.body or message.title
    while len(text.encode(errors="replace")) > NTFY:
        text = _cut(text, len(text) * 3 // 4)
    priority, tag = (4, "warning") if message.urgent else (3, "chart_with_downwards_trend")
    return {"title": _cut(message.title, TITLE), "message": text, "priority": priority, "tags": [tag]}


def _json(message: Message) -> dict[str, Any]:
    about = {"run": message.run, "kind": message.kind, "title": message.title, "text": message.sentence}
    return about | {"rows": dict(message.rows)}


FORMS: dict[str, Callable[[Message], dict[str, Any]]] = {
    "slack": _slack,
    "discord": _discord,
    "teams": _teams,
    "ntfy": _ntfy,
    "json": _json,
}
