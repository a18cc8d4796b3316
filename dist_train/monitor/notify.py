"""Messages about a run, sent to the address in DIST_TRAIN_NOTIFY: by a reader of its events, or one event at once.
Imports no torch."""

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
from dist_train.rundir import record
from dist_train.rundir.last_words import TELLING
from dist_train.rundir.ledger import accounted, clock
from pipelines.errors import UserError
from pipelines.files import read_json, regular, write_atomically
from pipelines.speech import say
from pipelines.valid import object_of

EVERY, GATHERING = 60.0, 1.0  # seconds between two messages; seconds of events that one message gathers
AT_ONCE, LOOKING = TELLING, 1.0  # seconds for a message that is waited for, and of them for reading the record
ENDS = ("stopped", "done", "failed", "diverged", "given_up")
KINDS = ("started", "silent", *ENDS)  # by rising importance
FILE = "message.json"  # in the run directory: time and kind of the last message sent about it
BACK = "Slurm brings it back"


class Notifier:
    """Sends a message when a run starts or resumes, when its previous start was killed, and when it ends."""

    def __init__(self, shown: Shown, webhook: Webhook) -> None:
        self._shown, self._begun = shown, False
        self._outbox = Outbox(webhook, shown.say, shown.run)

    @classmethod
    def wanted(cls, shown: Shown) -> Notifier | None:
        """None without an address. Raises UserError if the address is invalid."""
        webhook = Webhook.wanted()
        return None if webhook is None else cls(shown, webhook)

    def begin(self) -> int:
        return self._shown.record_bytes

    def take(self, line: dict[str, Any]) -> None:
        kind = line.get("event")
        self._begun = self._begun or kind == "start"
        # An end before that belongs to another start; a hasty end was reported by the rank that failed first.
        told = kind != "end" or (self._begun and "error" not in line)
        if told and (message := message_of(self._shown.config.run.name, self._shown.run, line)):
            self._outbox.put(message)

    def close(self) -> None:
        self._outbox.close()


class Outbox(Thread):
    """Sends messages one by one, at most one per minute; those that come meanwhile are merged into the next. Only the
    end of a run does not wait. A failure is reported once; the message is sent again a minute later, with those that
    came meanwhile, and on closing.

    Args:
        say: prints a line for the user.
        run: the run directory, if all messages are of one run: those sent by its other starts and ranks count too. If
            the last one is less than a minute old on closing, messages that are no end are dropped.
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
        """Returns when all messages are sent or have failed."""
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
            while not self._over and (pause := self._pause()) > 0:  # meanwhile another rank may send one too
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
        """Seconds until a message other than an end may be sent."""
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
    """Sends the message of one event, if there is an address; takes AT_ONCE seconds at most. Never raises.

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
    """Does `work`, waiting so many seconds at most: a file system or a server may hang."""
    thread = Thread(target=work, name="message", daemon=True)
    thread.start()
    thread.join(seconds)


def last_sent(run: Path) -> float:
    """Seconds since the last message about a run, by any start or rank; infinite if unknown."""
    try:
        ago = time.time() - float(read_json(run / FILE)["time"])
    except (OSError, UserError, KeyError, TypeError, ValueError):
        return float("inf")
    return max(0.0, ago) if ago > -EVERY else float("inf")  # the clocks of two nodes differ a little


def keep_sent(run: Path, message: Message) -> None:
    """Records that a message was sent just now. If that cannot be written, another start may send one too soon."""
    with suppress(OSError):
        body = {"time": time.time(), "kind": message.kind}
        write_atomically(run / FILE, json.dumps(body).encode(), durable=False)


def merged(messages: list[Message]) -> Message:
    """One message of several: the newest of the most important kind, with the others below it."""
    first = max(reversed(messages), key=lambda message: KINDS.index(message.kind))
    others = [
        message.title + (f": {message.sentence}" if message.sentence else "")
        for message in messages
        if message != first
    ]
    return replace(first, sentence="\n".join([*([first.sentence] if first.sentence else []), *others]))


def silence(name: str, heartbeat: float, **where: Any) -> Message:
    """Message about a run whose last heartbeat was at that Unix time; `where`: step, node, reason, if known."""
    when = f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(heartbeat))}, {clock(time.time() - heartbeat)} ago"
    rows = [(label, str(value)) for label, value in where.items() if value not in (None, "")]
    return Message(name, "silent", f"{name} fell silent", f"its last sign of life was at {when}", rows)


def message_of(name: str, run: Path | None, event: Mapping[str, Any]) -> Message | None:
    """The message about an event, or None if it is of no interest; `run`: None if its record is not to be read."""
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
    """Best and last validation errors of the record; empty if a line is damaged."""
    best, last = None, None
    try:
        with open(run / record.FILE, "rb", opener=regular) as file:
            for line in file:
                if b'"validation"' in line[:40]:  # skips the steps, of which a long run has many
                    last = object_of(record.RecordLine, line)
                    best = last if best is None or last["top1_error"] < best["top1_error"] else best
        return [(label, _shown(line)) for label, line in (("best", best), ("last", last)) if line is not None]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _shown(line: Mapping[str, Any]) -> str:
    return f"top-1 error {line['top1_error']:.2%}, top-5 error {line['top5_error']:.2%} (epoch {line['epoch'] + 1})"
