"""
A stand-in for W&B's server, on this machine: so much of its protocol that W&B's client is online, sends the rows of a
run and resumes it. It knows no artifacts; what is asked about them is written down, and answered with an error.
"""

import gzip
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self


class Server:
    """Serves while it is entered."""

    def __init__(self) -> None:
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self.summaries: dict[str, str] = {}
        self.exit_codes: dict[str, int] = {}
        self.asked: list[tuple[str, dict[str, Any]]] = []
        """Name and variables of every query."""
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"owner": self}))
        self._thread = threading.Thread(target=self._http.serve_forever, daemon=True)
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *args: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        found = re.search(r"(?:query|mutation)\s+(\w+)", query)
        name = found[1] if found else ""
        self.asked.append((name, variables))
        answers = {"Viewer": self._viewer, "UpsertBucket": self._upsert, "RunResumeStatus": self._resume_status}
        if name not in answers:
            return {"errors": [{"message": f"{name} is unknown"}], "data": None}
        return {"data": answers[name](variables)}

    def _viewer(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"viewer": {"id": "1", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}

    def _upsert(self, variables: dict[str, Any]) -> dict[str, Any]:
        run, is_new = variables["name"], variables["name"] not in self.rows
        self.rows.setdefault(run, [])
        project = {"id": "1", "name": variables["project"] or "p", "entity": {"id": "1", "name": "me"}}
        bucket = {"id": run, "name": run, "displayName": "a run", "project": project, "config": "{}"}
        return {"upsertBucket": {"bucket": bucket, "inserted": is_new}}

    def _resume_status(self, variables: dict[str, Any]) -> dict[str, Any]:
        run, bucket = variables["name"], None
        if run in self.rows:
            rows = self.rows[run]
            bucket = {"id": run, "name": run, "displayName": "a run", "notes": None, "tags": [], "config": "{}"}
            bucket |= {"historyLineCount": len(rows), "eventsLineCount": 0, "logLineCount": 0, "eventsTail": "[]"}
            bucket |= {"historyTail": json.dumps([json.dumps(rows[-1])]), "summaryMetrics": self.summaries[run]}
            bucket["wandbConfig"] = '{"t": 1}'  # says that there is a run
        return {"model": {"id": "1", "name": "p", "entity": {"id": "1", "name": "me"}, "bucket": bucket}}

    def receive(self, run: str, content: dict[str, Any]) -> None:
        """A piece of a run's files."""
        files = content.get("files") or {}
        if "wandb-history.jsonl" in files:
            history = files["wandb-history.jsonl"]
            assert history["offset"] == len(self.rows[run])
            self.rows[run] += map(json.loads, history["content"])
        if "wandb-summary.json" in files:
            self.summaries[run] = files["wandb-summary.json"]["content"][-1]
        if content.get("complete"):
            self.exit_codes[run] = content["exitcode"]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: Server

    def log_message(self, *args: Any) -> None:
        """Nothing: the tests' output is for the tests."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
        reply: dict[str, Any] = {}
        if self.path == "/graphql":
            question = json.loads(content)
            reply = self.owner.answer(question["query"], question.get("variables") or {})
        elif stream := re.search(r"/([^/]+)/file_stream$", self.path):
            self.owner.receive(stream[1], json.loads(content))
        data = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
