"""A loopback server that speaks as much of the Hugging Face hub's protocol as fetching a dataset needs."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

REPO = "someone/golf"
COMMIT = "c0ffee" * 6 + "c0de"


class FakeHub(ThreadingHTTPServer):
    """Serves files (by path in the repository) of one dataset; large ones are listed with their sha256.

    cut_after: the next transfer of each of these paths ends after so many bytes. corrupt: paths that arrive with one
    byte changed. requests: every "METHOD path" answered. refusal: paths with this in them get this status and headers.
    """

    daemon_threads = True

    def __init__(self, files: dict[str, bytes], *, address: str = "127.0.0.1", port: int = 0) -> None:
        super().__init__((address, port), HubHandler)
        self.files = files
        self.cut_after: dict[str, int] = {}
        self.corrupt: set[str] = set()
        self.requests: list[str] = []
        self.refusal: tuple[str, int, dict[str, str]] | None = None

    @property
    def endpoint(self) -> str:
        return f"http://{self.server_address[0]!s}:{self.server_address[1]}"

    def downloads(self) -> list[str]:
        """Names of the files whose contents were asked for, in order."""
        return [line.rsplit("/", 1)[-1] for line in self.requests if line.startswith("GET") and "/resolve/" in line]


@contextlib.contextmanager
def serve(files: dict[str, bytes]) -> Iterator[FakeHub]:
    """Run a hub with files while the block lasts."""
    hub = FakeHub(files)
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()


class HubHandler(BaseHTTPRequestHandler):
    """One request."""

    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self.answer(has_body=False)

    def do_GET(self) -> None:
        self.answer(has_body=True)

    def answer(self, *, has_body: bool) -> None:
        path = self.path.split("?")[0]
        self.server.requests.append(f"{self.command} {path}")
        if self.server.refusal is not None and self.server.refusal[0] in path:
            self.refuse(*self.server.refusal[1:])
            return
        resolve = re.fullmatch(rf"/datasets/{REPO}/resolve/{COMMIT}/(.+)", path)
        if path == f"/api/datasets/{REPO}/revision/main":
            self.send_json({"_id": "0", "id": REPO, "sha": COMMIT, "siblings": [], "private": False, "tags": []})
        elif path == f"/api/datasets/{REPO}/tree/{COMMIT}":
            self.send_json([self.entry(name) for name in sorted(self.server.files)])
        elif resolve and resolve[1] in self.server.files:
            self.send_file(resolve[1], has_body=has_body)
        else:
            self.send_json({"error": "Repository not found"}, status=404, code="RepoNotFound")

    def refuse(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": "0"}.items():
            self.send_header(name, value)
        self.end_headers()

    def entry(self, name: str) -> dict[str, object]:
        content = self.server.files[name]
        blob = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
        entry: dict[str, object] = {"type": "file", "path": name, "size": len(content), "oid": blob}
        if name.endswith(".bin"):
            digest = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 134}
        return entry

    def send_json(self, value: object, *, status: int = 200, code: str | None = None) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        self.wfile.write(body)

    def send_file(self, name: str, *, has_body: bool) -> None:
        content = self.server.files[name]
        entry = self.entry(name)
        lfs = entry.get("lfs")
        etag = lfs["oid"] if isinstance(lfs, dict) else entry["oid"]
        if name in self.server.corrupt:
            content = content[:-1] + bytes([content[-1] ^ 1])
        start = 0
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked:
            start = int(asked[1])
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{etag}"')
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if has_body:
            cut = self.server.cut_after.pop(name, None)
            self.wfile.write(content[start:] if cut is None else content[start:cut])
            if cut is not None:
                self.close_connection = True
