"""The run in wandb: a reader of the record."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from shlex import quote
from typing import Any

from dist_train.flat import as_dict
from dist_train.monitor import drawings, names, wandb_about, wandb_extras, wandb_files, wandb_process, wandb_variables
from dist_train.monitor.reader import Anew, Shown, lines, one_line
from dist_train.monitor.wandb_about import EPOCH, LONGEST, Mode, X
from dist_train.monitor.wandb_files import Kept
from dist_train.outcomes import FAILED, Done
from dist_train.rundir import record

FALLBACK: dict[Mode, Mode] = {"online": "offline", "offline": "disabled"}
STARTED = ("code", "versions", "nodes", "world_size", "device")  # of a start's event, beside the configuration
FATAL = "filestream: fatal error"  # in the log of wandb's own process
TIMEOUT = 60  # seconds for wandb to begin
ALERTS = {"diverged": "ERROR", "failed": "ERROR", "stopped": "WARN"}
UNTOLD = {"state": "failed", "reason": "the process left in haste", "code": FAILED}  # if no event tells the end


class WandbRun:
    """One wandb run for all starts of a run: its id, and how far it was sent, are kept in the run directory.

    wandb has one row per step, and accepts none below the last one. If it fails, it falls back to offline, then to
    nothing, and says so: showing a run must never end it.
    """

    def __init__(self, shown: Shown, mode: Mode) -> None:
        self._shown, self._mode = shown, mode
        self._kept, self._odd = Kept(shown), list[str]()
        self._run: Any = None
        self._home, self._id, self._url = Path(), "", ""  # of the run in wandb, once it has begun
        self._first, self._row = 0, 0  # the first step that is sent, and the row of the next line
        self._had = set[str]()  # kinds of lines already sent of the step before it
        self._taken, self._begun, self._lost = 0, 0, False
        self._hurried, self._abandoned, self._closing, self._said_how = False, False, False, False
        self._shows_inputs, self._missed = False, ""  # in this start
        self._end: dict[str, Any] = UNTOLD

    @classmethod
    def wanted(cls, shown: Shown) -> WandbRun | None:
        mode = wandb_about.mode(shown.config)
        return None if mode == "disabled" else cls(shown, mode)

    def begin(self) -> int:
        self._begun += 1
        if self._run is not None:
            self._bury()
        elif not self._is_there():
            self._mode = "disabled"
        while self._mode != "disabled" and self._run is None and not self._abandoned:
            try:
                self._run = self._init()
            except Exception as error:  # no network, no key, a server that answers nonsense
                instead = FALLBACK[self._mode]
                self._shown.say(f"wandb {self._mode} does not work ({self._why(error)}): {instead} instead")
                self._mode = instead
                self._bury()
        if self._run is None:
            return self._shown.record_bytes
        if not self._kept.has_inputs:
            self._shown.pictures.draw_inputs()
        online, mark = self._mode == "online", self._kept.mark()
        sent = [line for end, line in self._lines() if end <= mark]
        self._first = self._row = self._run.starting_step if online else _step(sent) + 1
        self._had = {line["kind"] for line in sent if line.get("step") == self._first - 1}
        self._taken = 0 if online else len(sent)
        return 0 if online else mark

    def take(self, line: dict[str, Any]) -> None:
        if self._run is None:
            return
        try:
            if "kind" in line:
                self._show(line)
            else:
                self._hear(line)
        except Exception as error:  # wandb-core has died
            self._fail(error)
            raise

    def close(self) -> None:
        if self._run is None:
            return
        self._closing = True
        mark = max((end for i, (end, _) in enumerate(self._lines()) if i < self._taken), default=0)
        try:
            self._tell_end()
            self._show_last()
            self._run.finish(exit_code=int(self._end["code"]))
            wandb_process.teardown()  # which waits for the last bytes in the file
            self._check()
        except Exception as error:
            self._fail(error)
        if not self._lost:
            self._kept.move(mark)
            if self._shows_inputs:
                self._kept.inputs_arrived()
            if self._missed and self._begun == 1:
                self._shown.say(f"wandb does not show all of {self._shown.run} ({self._missed})")
        self._say_how()

    def hurry(self, *, last: bool) -> None:
        self._hurried, self._abandoned = True, last
        if last or self._mode == "online":
            wandb_process.kill()  # which waits for a server; without it, the run goes into a file
        if last and self._closing and self._home.name:
            self._lost = True
            self._say_how()

    def _show(self, line: dict[str, Any]) -> None:
        """Sends a line of the record."""
        if values := dict[str, Any](names.named(line)):
            step, kind = int(line["step"]), line["kind"]
            # The server has the step, but the run may have stopped between it and its validation.
            late = step == self._first - 1 and self._had and kind not in self._had
            if step >= self._first or late:
                # The last step of an epoch shares its row with the validation, and the last validation with what is
                # shown at the end of a run: a row of its own would be in the place of the next step, if epochs follow.
                ends = kind == "step" and line["progress"] % 1 > 0
                where = {X: line[X]} | ({EPOCH: line["progress"]} if kind == "step" else {})
                self._log(where | values | self._pictured(kind, step), step, ends=ends)
        self._taken += 1

    def _hear(self, line: dict[str, Any]) -> None:
        """Takes an event."""
        event = line.get("event")
        if event == "start":
            self._end = UNTOLD  # the one just taken may be of an earlier start
            told = {key: line[key] for key in STARTED if key in line}
            self._run.config.update({"start": told}, allow_val_change=True)
        elif event == "end":
            self._end = line
        elif event == "alert":
            self._alert("alert", line["sentence"], "WARN")

    def _alert(self, title: str, text: str, level: str) -> None:
        name = self._shown.config.run.name
        self._run.alert(f"{title}: {name}"[: LONGEST - 1], f"{name}: {text}", level=level)

    def _log(self, values: dict[str, Any], step: int, *, ends: bool) -> None:
        """Logs values in the row of their step, or if that is gone, in the next one.

        Args:
            ends: whether this step is complete. A row is sent when it ends.
        """
        row = max(step, self._row)
        ends = ends and row == step
        self._run.log(values, step=row, commit=ends)
        self._row = row + ends

    def _fail(self, error: Exception) -> None:
        """Takes a failure of wandb during the run. Raises Anew the first time."""
        self._lost = self._begun > 1 or self._abandoned
        if not self._lost:
            self._shown.say(f"wandb has failed ({self._why(error)}): it begins anew, offline")
            self._mode = "offline"
            raise Anew from error

    def _check(self) -> None:
        """Raises ConnectionError if the server has refused lines during the run, and reports a full disk: `finish` does
        neither."""
        log, file = Path(self._run.settings.log_internal), Path(self._run.settings.sync_file)
        if self._mode == "offline" and not wandb_files.is_whole(file):
            self._shown.say(f"wandb has not written all to {file}: is the disk full?")
            self._lost = True
        if self._mode == "online" and log.exists() and FATAL in log.read_text(encoding="utf-8", errors="replace"):
            raise ConnectionError("the server has refused it")

    def _tell_end(self) -> None:
        end, summary = self._end, self._run.summary
        summary.update({key: end[key] for key in ("state", "reason", "goodput", "seconds") if key in end})
        checks = [line for line in record.readable(self._shown.run)[0] if line.get("kind") == "validation"]
        if checks:
            best = min(checks, key=lambda line: float(line["top1_error"]))
            for which, line in (("best", best), ("last", checks[-1])):
                summary.update({f"{which}_{key}": line[key] for key in ("top1_error", "top5_error")})
        if level := ALERTS.get(end["state"]):
            self._alert(end["state"], end["reason"], level)
        if end.get("requeued"):
            self._run.mark_preempting()

    def _pictured(self, kind: str, step: int) -> dict[str, Any]:
        """Pictures drawn meanwhile, to be sent with a line of this kind."""
        if kind == "validation":
            self._shown.pictures.validated(step)
        return self._images() if kind == "step" else {}

    def _images(self, *, last: float = 0) -> dict[str, Any]:
        """What was drawn since this was last asked. `last`: as for `Pictures.draw`, waited for so many seconds."""
        self._shown.pictures.draw(last=last > 0)
        self._shown.pictures.wait(last)
        pictures = self._shown.pictures.taken()
        self._shows_inputs |= "pictures/inputs" in pictures
        return wandb_extras.images(pictures)

    def _show_last(self) -> None:
        """Sends pictures, tables and checkpoint of a run that is done; after another end there is no time."""
        run, row = self._shown.run, self._row
        works: list[Callable[[], Any]] = []
        patience = drawings.patience(self._shown.config.run.stop_timeout) if self._begun == 1 else 0.0
        if self._end["state"] == Done.state:
            works = [lambda: self._run.log(self._images(last=patience), step=row)]
            works += [lambda: self._run.log(wandb_extras.tables(run), step=row)]
            if self._shown.config.monitor.wandb_checkpoint:
                works += [lambda: self._run.log_artifact(wandb_extras.checkpoint(run, f"checkpoint-{self._run.id}"))]
        for work in works:
            try:
                work()
            except Exception as error:
                self._missed = one_line(error)

    def _say_how(self) -> None:
        """Prints how to see the run; once, by the thread that comes first."""
        if self._said_how:
            return
        self._said_how = True
        if self._lost:
            self._shown.say("wandb: the same command, once more, sends what is missing")
        if self._mode == "online":
            self._shown.say(f"wandb: {self._url}")
        elif made := wandb_files.sendable(self._home, self._id):
            self._shown.say(f"wandb sync {' '.join(quote(str(path)) for path in made)}")
        self._shown.say(f"wandb leet {quote(str(self._home))}")

    def _is_there(self) -> bool:
        """Whether wandb can be imported; also finds the variables that it refuses."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about wandb's own dependencies
                import wandb  # noqa: F401
            self._odd = wandb_variables.odd()
        except (Exception, SystemExit) as error:
            self._shown.say(f"wandb does not work ({one_line(error)}): the run is not shown there")
            return False
        for name in self._odd:
            self._shown.say(f"wandb: {name} is left out: wandb does not take its value")
        return True

    def _init(self) -> Any:
        import wandb

        self._id = self._kept.id()
        wandb_process.forget()
        with wandb_variables.hidden(self._odd):
            about = wandb_about.about(self._shown.config)
            with wandb_variables.hidden(wandb_variables.OURS), wandb_process.nobody_is_asked(), wandb_process.mute():
                run = wandb.init(
                    **about,
                    id=self._id,
                    dir=os.environ.get("WANDB_DIR") or str(self._shown.run),
                    mode=self._mode,
                    resume="allow" if self._mode == "online" else None,  # offline none; `wandb sync` merges by id
                    config=as_dict(self._shown.config),
                    settings=wandb.Settings(init_timeout=TIMEOUT, console="off", silent=True),
                )
        self._home, self._url = Path(run.settings.wandb_dir), str(run.url) if self._mode == "online" else ""
        for definition in wandb_about.definitions():
            run.define_metric(**definition)
        run.summary.update({"state": "running", "reason": ""})
        return run

    def _bury(self) -> None:
        """Makes room for another run in this process: wandb-core has died, or still holds the id."""
        self._run = None
        wandb_process.kill()  # otherwise one that is suspended would be waited for
        with suppress(Exception):
            wandb_process.teardown()

    def _why(self, error: Exception) -> str:
        """Why wandb has failed; that its process was killed here is not the reason."""
        hurried = self._hurried and self._mode == "online"
        return "the server does not answer" if hurried else one_line(error)

    def _lines(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """The lines of the record, each with the byte behind it."""
        found = lines(self._shown.run / record.FILE, record.RecordLine)
        return ((end, line) for end, line in found if line is not None)


def _step(lines: list[dict[str, Any]]) -> int:
    """The last step in lines of the record, or -1."""
    return max((int(line["step"]) for line in lines if names.named(line)), default=-1)
