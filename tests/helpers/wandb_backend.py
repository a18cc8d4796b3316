"""State and answers of a W&B backend: runs, artifacts, uploads. wandb_server.py serves it over HTTP.

The answers are complete, field by field as wandb's core asks for them: it panics where one is missing.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, field
from typing import Any

ENTITY = "tester"


def identity(kind: str, name: object) -> str:
    return base64.b64encode(f"{kind}:{name}".encode()).decode()


def project(name: str) -> dict[str, Any]:
    return {"id": identity("Project", name), "name": name, "entity": {"id": identity("Entity", ENTITY), "name": ENTITY}}


@dataclass
class SeenRun:
    """A run as the backend has it.

    history: its rows, each with its `_step`. A row whose step is not above that of the last one is dropped (`dropped`
        counts them), as W&B does.
    summary, config: as they are now.
    told: what UpsertBucket said: displayName, groupName, jobType, tags, notes, commit ...
    uploads: the bytes of its files, by name.
    starts: how often it was begun or resumed.
    """

    name: str
    told: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    console: list[str] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    alerts: list[dict[str, Any]] = field(default_factory=list)
    uploads: dict[str, bytes] = field(default_factory=dict)
    exit_code: int | None = None
    preempting: bool = False
    starts: int = 0
    dropped: int = 0

    @property
    def steps(self) -> list[int]:
        return [row["_step"] for row in self.history]

    @property
    def state(self) -> str:
        if self.exit_code is None:
            return "preempting" if self.preempting else "running"
        return "finished" if self.exit_code == 0 else "preempted" if self.preempting else "failed"

    def upsert(self, told: dict[str, Any]) -> None:
        """At each start, which tells the host, and whenever configuration, tags or notes change."""
        if told.get("host"):
            self.starts += 1
            self.exit_code, self.preempting = None, False
        self.told |= {name: value for name, value in told.items() if value is not None}
        if told.get("config"):
            self.config = {name: entry["value"] for name, entry in json.loads(told["config"]).items()}
        if told.get("summaryMetrics"):
            self.summary = json.loads(told["summaryMetrics"])

    def stream(self, sent: dict[str, Any]) -> None:
        """One POST to its file stream: lines of its files, from a line's number on, and how it goes."""
        for name, lines in sent.get("files", {}).items():
            if name == "wandb-history.jsonl":
                for row in map(json.loads, lines["content"]):
                    self._append(row)
            elif name == "wandb-summary.json":
                self.summary = json.loads(lines["content"][-1])
            elif name == "wandb-events.jsonl":
                self.events[lines["offset"] :] = lines["content"]
            elif name == "output.log":
                self.console[lines["offset"] :] = lines["content"]
        self.preempting |= bool(sent.get("preempting"))
        if sent.get("complete"):
            self.exit_code = sent["exitcode"]

    def _append(self, row: dict[str, Any]) -> None:
        if self.history and row["_step"] <= self.history[-1]["_step"]:
            self.dropped += 1
        else:
            self.history.append(row)

    def bucket(self) -> dict[str, Any]:
        """All of it that any query asks for."""
        return {
            "id": identity("Run:v1", self.name),
            "name": self.name,
            "displayName": self.told.get("displayName") or self.name,
            "description": self.told.get("description"),
            "notes": self.told.get("notes"),
            "tags": self.told.get("tags") or [],
            "sweepName": None,
            "state": self.state,
            "config": json.dumps({name: {"value": value, "desc": None} for name, value in self.config.items()}),
            "wandbConfig": json.dumps({"t": self.config["_wandb"]["t"]}),
            "summaryMetrics": json.dumps(self.summary),
            "project": project(self.told.get("project") or "uncategorized"),
            "logLineCount": len(self.console),
            "historyLineCount": len(self.history),
            "eventsLineCount": len(self.events),
            "historyTail": json.dumps([json.dumps(row) for row in self.history[-1:]]),
            "eventsTail": json.dumps(self.events[-1:]),
        }


@dataclass
class SeenArtifact:
    """An artifact: what CreateArtifact said of it (artifactCollectionNames, artifactTypeName, clientID ...), the bytes
    of its files by path, its manifest among them, and whether it was committed."""

    id: str
    told: dict[str, Any]
    files: dict[str, bytes] = field(default_factory=dict)
    committed: bool = False

    def answer(self) -> dict[str, Any]:
        state = "COMMITTED" if self.committed else "PENDING"
        return {"id": self.id, "state": state, "digest": self.told["digest"], "artifactSequence": self.sequence()}

    def sequence(self) -> dict[str, Any]:
        return {"id": identity("Sequence", self.id), "latestArtifact": {"id": self.id} if self.committed else None}


class Backend:
    """Runs by their id, artifacts in their order.

    Args:
        url: where files can be put.

    Attributes:
        unknown: operations that it was asked for and does not know: there should be none.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.runs: dict[str, SeenRun] = {}
        self.artifacts: dict[str, SeenArtifact] = {}
        self.unknown: list[str] = []

    def answer(self, operation: str, given: dict[str, Any]) -> dict[str, Any]:
        """The data of a GraphQL operation with these variables."""
        if (known := getattr(self, f"_{operation}", None)) is None:
            self.unknown.append(operation)
        return known(given) if known else {}

    def stored(self, path: str, content: bytes) -> None:
        """A file was put under `url`."""
        kind, name, file = path.split("/", 2)
        if kind == "run":
            self.runs[name].uploads[file] = content
        else:
            self.artifacts[name].files[file] = content

    # --- the operations, by their names in the protocol

    def _Viewer(self, _: dict[str, Any]) -> dict[str, Any]:
        teams = {"edges": [{"node": {"name": ENTITY}}]}
        names = {"entity": ENTITY, "username": ENTITY, "email": f"{ENTITY}@localhost", "flags": "{}"}
        return {"viewer": {"id": identity("User", ENTITY), "teams": teams, **names}}

    def _ServerFeaturesQuery(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def _RunResumeStatus(self, given: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.get(given["name"])
        return {"model": {**project(given["project"]), "bucket": run and run.bucket()}}

    def _UpsertBucket(self, given: dict[str, Any]) -> dict[str, Any]:
        name = given.get("name") or next(n for n, run in self.runs.items() if run.bucket()["id"] == given["id"])
        inserted = name not in self.runs
        run = self.runs.setdefault(name, SeenRun(name))
        run.upsert(given)
        return {"upsertBucket": {"bucket": run.bucket(), "inserted": inserted}}

    def _NotifyScriptableRunAlert(self, given: dict[str, Any]) -> dict[str, Any]:
        self.runs[given["runName"]].alerts.append(given)
        return {"notifyScriptableRunAlert": {"success": True}}

    def _CreateRunFiles(self, given: dict[str, Any]) -> dict[str, Any]:
        files = [{"name": file, "uploadUrl": f"{self.url}/run/{given['run']}/{file}"} for file in given["files"]]
        run = self.runs[given["run"]].bucket()["id"]
        return {"createRunFiles": {"runID": run, "uploadHeaders": [], "files": files}}

    def _MarkRunFilesUploaded(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"markRunFilesUploaded": {"success": True}}

    def _OrganizationCoreWeaveOrganizationID(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"entity": {"organization": None}}

    def _ArtifactType(self, given: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"artifact": None}}

    def _XXHashDigestsEnabled(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"entity": {"xxhashDigestsEnabled": False}}

    def _FetchArtifactDigestAlgorithm(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"artifactType": None}}

    def _ClientIDMapping(self, given: dict[str, Any]) -> dict[str, Any]:
        found = [a.id for a in self.artifacts.values() if a.told["clientID"] == given["clientID"]]
        return {"clientIDMapping": {"serverID": found[0]} if found else None}

    def _CreateArtifact(self, given: dict[str, Any]) -> dict[str, Any]:
        artifact = SeenArtifact(f"artifact-{len(self.artifacts)}", given["input"])
        self.artifacts[artifact.id] = artifact
        return {"createArtifact": {"artifact": artifact.answer()}}

    def _CreateArtifactManifest(self, given: dict[str, Any]) -> dict[str, Any]:
        place = f"{given['artifactID']}/{given['name']}"
        file = {"id": identity("File", place), "uploadUrl": f"{self.url}/artifact/{place}", "uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": identity("Manifest", place), "file": file}}}

    def _CreateArtifactFiles(self, given: dict[str, Any]) -> dict[str, Any]:
        edges = []
        for file in given["input"]["artifactFiles"]:
            artifact, name = file["artifactID"], file["name"]
            place = {"storagePath": name, "uploadUrl": f"{self.url}/artifact/{artifact}/{name}", "uploadHeaders": []}
            edges.append({"node": {**place, "uploadMultipartUrls": None, "artifact": {"id": artifact}}})
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def _CommitArtifact(self, given: dict[str, Any]) -> dict[str, Any]:
        artifact = self.artifacts[given["artifactID"]]
        artifact.committed = True
        return {"commitArtifact": {"artifact": artifact.answer()}}
