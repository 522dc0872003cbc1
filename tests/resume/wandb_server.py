"""As much of W&B's server as its client needs to hand over a run, and the ways of it to fail."""

import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

HISTORY, SUMMARY = "wandb-history.jsonl", "wandb-summary.json"
PROJECT = {"id": "P", "name": "p", "entity": {"id": "E", "name": "entity"}}


class WandbServer:
    """Keeps one run, on a free port of this machine; `is_silent`: connections are taken and nothing is answered."""

    def __init__(self, port: int = 0) -> None:
        self.history: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.received: list[bytes] = []  # everything that was sent, bodies and paths
        self.exit_code: int | None = None
        self.is_silent = False
        self._closing = threading.Event()
        self._http = ThreadingHTTPServer(("127.0.0.1", port), self._handler())
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Take no connections any longer."""
        self._closing.set()
        self._http.shutdown()
        self._http.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                if server.is_silent:
                    server._closing.wait()
                    return
                server.received += [self.path.encode(), body]
                self._reply(server.answer(self.path, json.loads(body)) if self.command == "POST" else {})

            do_PUT = do_POST  # the config and the summary once more, as files

            def _reply(self, value: dict[str, Any]) -> None:
                body = json.dumps(value).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        return Handler

    def answer(self, path: str, request: dict[str, Any]) -> dict[str, Any]:
        """What a request is told."""
        if path.endswith("file_stream"):
            for name, part in request.get("files", {}).items():
                lines = [json.loads(line) for line in part["content"]]
                if name == HISTORY:
                    self.history[part["offset"] :] = lines
                elif name == SUMMARY:
                    self.summary |= lines[-1]
            self.exit_code = request.get("exitcode", self.exit_code)
            return {"exitcode": None, "limits": {}}
        operation = request.get("operationName")
        if operation == "UpsertBucket":
            bucket = {"id": "B", "name": "run", "displayName": "run", "config": "{}", "project": PROJECT}
            return {"data": {"upsertBucket": {"bucket": bucket, "inserted": not self.history}}}
        if operation == "RunResumeStatus":
            return {"data": {"model": {**PROJECT, "bucket": self._stored_run() if self.history else None}}}
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.url}/upload"} for name in request["variables"]["files"]]
            return {"data": {"createRunFiles": {"runID": "B", "uploadHeaders": [], "files": files}}}
        return {"data": {}}

    def _stored_run(self) -> dict[str, Any]:
        return {
            "id": "B",
            "name": "run",
            "summaryMetrics": json.dumps(self.summary),
            "displayName": "run",
            "logLineCount": 0,
            "historyLineCount": len(self.history),
            "eventsLineCount": 0,
            "historyTail": json.dumps([json.dumps(line) for line in self.history[-1:]]),
            "eventsTail": "[]",
            "config": "{}",
            "tags": [],
            "notes": None,
            "wandbConfig": json.dumps({"t": 1}),
        }
