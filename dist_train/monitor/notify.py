"""Messages about a run, to the address in DIST_TRAIN_NOTIFY: a reader of its story, and a way to tell one event at
once. Imports no torch."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from threading import Condition, Thread
from typing import Any

from dist_train.monitor.reader import Shown
from dist_train.monitor.webhook import Message, NotSent, Webhook
from dist_train.ranks import launcher
from dist_train.rundir import record
from dist_train.rundir.last_words import TELLING
from dist_train.rundir.ledger import accounted, clock
from pipelines.errors import UserError
from pipelines.files import read_json, write_atomically
from pipelines.speech import say

EVERY, GATHERING = 60.0, 1.0  # seconds between two messages; in which events are told as one
AT_ONCE, LOOKING = TELLING, 1.0  # seconds that a message may take which somebody waits for, and to look at the record
ENDS = ("stopped", "done", "failed", "diverged", "given_up")
KINDS = ("started", "silent", *ENDS)  # the last one matters most
FILE = "message.json"  # in the directory of a run: when the last message about it was sent, and of which kind
BACK = "Slurm brings it back"


class Notifier:
    """Tells that a run goes on, that the start before was killed, and how the run ends."""

    def __init__(self, shown: Shown, webhook: Webhook) -> None:
        self._shown, self._begun = shown, False
        self._outbox = Outbox(webhook, shown.say, shown.run)

    @classmethod
    def wanted(cls, shown: Shown) -> Notifier | None:
        """None without an address. Raises UserError for one that is none."""
        webhook = Webhook.wanted()
        return None if webhook is None else cls(shown, webhook)

    def begin(self) -> int:
        return self._shown.record_bytes

    def take(self, line: dict[str, Any]) -> None:
        kind = line.get("event")
        self._begun = self._begun or kind == "start"
        # An end before that is of another start, and of an end in haste the rank that was first has told.
        told = kind != "end" or (self._begun and "error" not in line)
        if told and (message := message_of(self._shown.config.run.name, self._shown.run, line)):
            self._outbox.put(message)

    def close(self) -> None:
        self._outbox.close()


class Outbox(Thread):
    """Sends messages one after the other, at most one a minute: those that come meanwhile are one then. Only how a run
    ends does not wait for that. It says once if that does not work, and tries again a minute later, with what has come
    meanwhile, and when it is closed.

    Args:
        say: shows the user a line.
        run: the directory of the one run that the messages are of: what other starts of it, or ranks, have sent counts,
            too. Where that is still less than a minute ago when it is closed, what is no end is left out.
    """

    def __init__(self, webhook: Webhook, say: Callable[[str], None], run: Path | None = None) -> None:
        super().__init__(name="outbox", daemon=True)
        self._webhook, self._say, self._run = webhook, say, run
        self._changed = Condition()
        self._waiting: list[Message] = []
        self._over, self._told, self._sent = False, False, float("-inf")
        self.start()

    def put(self, message: Message) -> None:
        with self._changed:
            self._waiting = [*self._waiting[-9:], message]
            self._changed.notify()

    def close(self) -> None:
        """Returns when all is sent, or could not be."""
        with self._changed:
            self._over = True
            self._changed.notify()
        self.join()

    def run(self) -> None:
        over = False
        while not over:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._waiting) or self._over)
                self._changed.wait_for(lambda: self._over, GATHERING)
            while not self._over and (pause := self._pause()) > 0:  # another rank, too, may tell something meanwhile
                with self._changed:
                    self._changed.wait_for(lambda: self._over, pause)
            with self._changed:
                over, messages = self._over, self._waiting
                self._waiting = []
            if over and self._run and not any(message.kind in ENDS for message in messages) and self._pause() > 0:
                return
            if messages and not self._send(merged(messages)):
                with self._changed:
                    self._waiting = [*messages, *self._waiting]

    def _pause(self) -> float:
        """Seconds until a message that is no end may be sent."""
        ago = min(time.monotonic() - self._sent, last_sent(self._run) if self._run else float("inf"))
        return EVERY - ago

    def _send(self, message: Message) -> bool:
        self._sent = time.monotonic()
        try:
            self._webhook.post(message)
            if self._run:
                keep_sent(self._run, message)
        except NotSent as error:
            if not self._told:
                self._say(f"a message could not be sent ({error}): the run goes on")
            self._told = True
            return False
        return True


def tell_now(name: str, run: Path, event: str, **values: Any) -> None:
    """Send the message of one event, if there is an address; whoever calls waits AT_ONCE at most. Never raises.

    Args:
        name: of the run.
        run: its directory.
    """

    told = {"event": event, **values}
    found = list[Message | None]()

    def look() -> None:
        found.append(message_of(name, run, told))

    def send() -> None:
        try:
            if webhook := Webhook.wanted():
                _try(look, LOOKING)
                if message := found[0] if found else message_of(name, None, told):
                    webhook.post(message)
                    keep_sent(run, message)
        except (NotSent, UserError) as error:
            say(f"a message could not be sent ({error})")

    _try(send, AT_ONCE)


def _try(work: Callable[[], None], seconds: float) -> None:
    """Wait so long for it at most: a file system, or a server, may hang."""
    thread = Thread(target=work, name="message", daemon=True)
    thread.start()
    thread.join(seconds)


def last_sent(run: Path) -> float:
    """How many seconds ago the last message about a run was sent, by whichever start or rank; infinite if that is not
    known."""
    try:
        ago = time.time() - float(read_json(run / FILE)["time"])
    except (OSError, UserError, KeyError, TypeError, ValueError):
        return float("inf")
    return max(0.0, ago) if ago > -EVERY else float("inf")  # the clocks of two nodes differ a little


def keep_sent(run: Path, message: Message) -> None:
    """Keep that a message was sent just now. Where that cannot be written, another start may send one too soon."""
    with suppress(OSError):
        body = {"time": time.time(), "kind": message.kind}
        write_atomically(run / FILE, json.dumps(body).encode(), by=f".{launcher.rank()}", durable=False)


def merged(messages: list[Message]) -> Message:
    """Several as one: what matters most, the newest of it, and below it the others."""
    first = max(reversed(messages), key=lambda message: KINDS.index(message.kind))
    others = [
        message.title + (f": {message.sentence}" if message.sentence else "")
        for message in messages
        if message != first
    ]
    return replace(first, sentence="\n".join([*([first.sentence] if first.sentence else []), *others]))


def silence(name: str, heartbeat: float, **where: Any) -> Message:
    """A run whose last sign of life was at that Unix time; `where`: step, node, reason, as far as they are known."""
    when = f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(heartbeat))}, {clock(time.time() - heartbeat)} ago"
    rows = [(label, str(value)) for label, value in where.items() if value not in (None, "")]
    return Message(name, "silent", f"{name} fell silent", f"its last sign of life was at {when}", rows)


def message_of(name: str, run: Path | None, event: Mapping[str, Any]) -> Message | None:
    """The message that tells of an event, or None if it is of those that nobody is told of; `run`: None if its record
    is not to be looked at."""
    kind = event.get("event")
    if kind == "start":
        step, nodes = event.get("step", 0), event.get("nodes", [])
        rows = [("nodes", f"{len(nodes)}: {', '.join(nodes[:8])}"), ("ranks", f"{event.get('world_size')}")]
        rows += [("device", str(event.get("device"))), ("job", str(event.get("job") or "none"))]
        return Message(name, "started", f"{name} goes on at step {step}" if step else f"{name} has started", "", rows)
    if kind == "killed" and isinstance(event.get("heartbeat"), int | float):
        return silence(name, event["heartbeat"], **{key: event.get(key) for key in ("step", "node", "reason")})
    if kind == "given_up":
        return Message(name, "given_up", f"{name} is given up", str(event.get("reason", "")))
    return _end(name, run, event) if kind == "end" and event.get("state") in KINDS else None


def _end(name: str, run: Path | None, event: Mapping[str, Any]) -> Message:
    state, reason = str(event["state"]), str(event.get("reason", ""))
    if "rank" in event:
        reason = f"rank {event['rank']} on {event.get('node')}: {reason}"
    title = {
        "done": f"{name} is done",
        "stopped": f"{name} was stopped" + (f" at step {event['step']}" if "step" in event else ""),
        "diverged": f"{name} has diverged",
        "failed": f"{name} has failed",
    }[state]
    if event.get("requeued"):
        reason = BACK if state == "stopped" else f"{reason}; {BACK}"
    rows = _errors(run) if run else []
    if isinstance(seconds := event.get("seconds"), dict):
        rows.append(("time", accounted(seconds)))
    return Message(name, state, title, reason, rows)


def _errors(run: Path) -> list[tuple[str, str]]:
    """The best and the last validation errors of the record; a damaged line has none."""
    best, last = None, None
    try:
        with open(run / record.FILE, "rb") as file:
            for line in file:
                if b'"validation"' in line[:40]:  # not all steps of a long run are parsed for it
                    last = json.loads(line)
                    best = last if best is None or last["top1_error"] < best["top1_error"] else best
        return [(label, _shown(line)) for label, line in (("best", best), ("last", last)) if line is not None]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _shown(line: Mapping[str, Any]) -> str:
    return f"top-1 error {line['top1_error']:.2%}, top-5 error {line['top5_error']:.2%} (epoch {line['epoch'] + 1})"
