"""A server of Google Cloud Storage's JSON API for tests, in a process of its own, and how tests talk to it.

`python -m tests.gcs` serves one bucket from memory over HTTP/1.1 and prints its port; it ends when its standard input does.
It knows what object readers and writers use: metadata, listings with prefixes, delimiters and pages, downloads with
ranges, multipart and resumable uploads, `ifGenerationMatch`, deletions and rewrites. Anything else is answered 501.
Requests can be made to fail on demand, and every request is on record.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import google_crc32c

ROOT = Path(__file__).resolve().parents[1]
BUCKET = "lehr"
ENVIRONMENT = {"GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false", "NO_GCE_CHECK": "true"}
"""What a client needs beside `STORAGE_EMULATOR_HOST`; the first before gcsfs is imported."""
PAGE = 7
"""Entries a page of a listing holds at most, however many are asked for: the real service may return fewer too."""


class Refused(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclasses.dataclass
class Stored:
    """One generation of an object."""

    data: bytes
    generation: int
    content_type: str


class Bucket:
    """Objects by name; every method is atomic."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._objects: dict[str, Stored] = {}
        self._generation = 1_000_000

    def put(self, name: str, data: bytes, if_generation: str | None, content_type: str) -> Stored:
        with self._lock:
            standing = self._objects.get(name)
            if if_generation is not None and int(if_generation) != (standing.generation if standing else 0):
                raise Refused(412, "At least one of the pre-conditions you specified did not hold.")
            self._generation += 1
            self._objects[name] = Stored(data, self._generation, content_type)
            return self._objects[name]

    def get(self, name: str) -> Stored:
        with self._lock:
            if name not in self._objects:
                raise Refused(404, f"No such object: {BUCKET}/{name}")
            return self._objects[name]

    def delete(self, name: str) -> None:
        with self._lock:
            if self._objects.pop(name, None) is None:
                raise Refused(404, f"No such object: {BUCKET}/{name}")

    def names(self) -> list[str]:
        with self._lock:
            return sorted(self._objects, key=lambda name: name.encode())


def described(name: str, stored: Stored) -> dict[str, Any]:
    """Metadata as the JSON API returns it; numbers of 64 bits are strings there."""
    return {
        "kind": "storage#object",
        "id": f"{BUCKET}/{name}/{stored.generation}",
        "name": name,
        "bucket": BUCKET,
        "generation": str(stored.generation),
        "metageneration": "1",
        "contentType": stored.content_type,
        "storageClass": "STANDARD",
        "size": str(len(stored.data)),
        "md5Hash": base64.b64encode(hashlib.md5(stored.data).digest()).decode(),
        "crc32c": base64.b64encode(google_crc32c.Checksum(stored.data).digest()).decode(),
        "etag": str(stored.generation),
        "timeCreated": "2026-01-01T00:00:00.000Z",
        "updated": "2026-01-01T00:00:00.000Z",
    }


def split_multipart(body: bytes, content_type: str) -> tuple[dict[str, Any], str, bytes]:
    """Metadata, content type and content of a multipart/related upload; ends at the first closing line, as RFC 2046 says."""
    found = re.search(r'boundary="?([^";]+)"?', content_type)
    if not found:
        raise Refused(400, "no boundary")
    parts = re.split(rb"\r?\n--" + re.escape(found[1].encode()), b"\n" + body)
    if len(parts) < 4 or not parts[3].startswith(b"--"):
        raise Refused(400, "not two parts")
    heads, contents = [], []
    for part in parts[1:3]:
        head, content = re.split(rb"\r?\n\r?\n", part, maxsplit=1)
        heads.append(head.decode().lower())
        contents.append(content)
    kind = re.search(r"content-type: *([^\r\n]+)", heads[1])
    return json.loads(contents[0]), kind[1] if kind else "application/octet-stream", contents[1]


class Service:
    """The state that all connections share."""

    def __init__(self) -> None:
        self.bucket = Bucket()
        self.uploads: dict[str, tuple[str, str | None, str, bytearray]] = {}
        self.faults: list[dict[str, Any]] = []
        self.log: list[dict[str, Any]] = []
        self.lock = threading.Lock()

    def fault(self, line: str) -> dict[str, Any]:
        """The fault that this request meets, used up by one; empty where there is none."""
        with self.lock:
            for fault in self.faults:
                if fault["count"] > 0 and re.search(fault["match"], line):
                    fault["met"] += 1
                    if fault["met"] % fault["every"]:
                        continue
                    fault["count"] -= 1
                    return fault
        return {}


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    service: Service

    def log_message(self, format: str, *args: Any) -> None:
        """Not on the terminal: `Service.log` is the record."""

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None, cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body if cut is None else body[:cut])
        if cut is not None:
            self.close_connection = True

    def _handle(self) -> None:
        url = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if url.path.startswith("/_test/"):
            self._control(url.path, body)
            return
        line = f"{self.command} {unquote(url.path)}?{unquote(url.query)} {self.headers.get('Range', '')}".strip()
        fault = self.service.fault(line)
        with self.service.lock:
            self.service.log.append({"line": line, "fault": bool(fault), "bytes": len(body)})
        time.sleep(fault.get("sleep", 0.0))
        if fault.get("status") and not fault["late"]:
            self._error(fault["status"], "injected")
            return
        if "drop" in fault and not fault["late"]:
            self.close_connection = True
            return
        try:
            status, answer, headers = self._route(url.path, parse_qs(url.query), body)
        except Refused as refusal:
            self._error(refusal.status, str(refusal))
            return
        if "drop" in fault:
            self.close_connection = True
        elif fault.get("status"):
            self._error(fault["status"], "injected")
        else:
            self._answer(status, answer, headers, fault.get("cut"))

    do_GET = do_POST = do_PUT = do_DELETE = _handle

    def _error(self, status: int, message: str) -> None:
        error = {"error": {"code": status, "message": message, "errors": [{"message": message}]}}
        self._answer(status, json.dumps(error).encode(), {"Content-Type": "application/json"})

    def _control(self, path: str, body: bytes) -> None:
        with self.service.lock:
            if path == "/_test/faults":
                self.service.faults.append(json.loads(body))
            answer = self.service.log
            if path == "/_test/clear":
                self.service.faults, self.service.log = [], []
        if path.removeprefix("/_test/") in ("load", "copy", "save", "remove"):
            answer = self._move(path.removeprefix("/_test/"), **json.loads(body))
        self._answer(200, json.dumps(answer).encode())

    def _move(self, what: str, source: str, target: str = "") -> list[Any]:
        """Many objects at once, between a folder of this machine and places in the bucket; no request of a client's."""
        objects, kind = self.service.bucket, "application/octet-stream"
        if what == "load":
            for path in Path(source).rglob("*"):
                if path.is_file():
                    objects.put(f"{target}/{path.relative_to(source)}", path.read_bytes(), None, kind)
            return []
        for name in [name for name in objects.names() if name.startswith(f"{source}/")]:
            relative = name.removeprefix(f"{source}/")
            if what == "copy":
                objects.put(f"{target}/{relative}", objects.get(name).data, None, kind)
            elif what == "save":
                Path(target, relative).parent.mkdir(parents=True, exist_ok=True)
                Path(target, relative).write_bytes(objects.get(name).data)
            else:
                objects.delete(name)
        return []

    def _route(self, path: str, query: dict[str, list[str]], body: bytes) -> tuple[int, bytes, dict[str, str]]:
        def json_answer(record: Any) -> tuple[int, bytes, dict[str, str]]:
            return 200, json.dumps(record).encode(), {"Content-Type": "application/json"}

        asked = {name: values[0] for name, values in query.items()}
        found = re.fullmatch(
            r"(/upload|/download)?/storage/v1/b/([^/]+)(?:/o(?:/([^/]+))?)?(?:/rewriteTo/b/[^/]+/o/([^/]+))?", path
        )
        if not found or self.command == "PATCH":
            raise Refused(501, f"this server does not know {self.command} {path}")
        prefix, bucket, name, copy = found[1], found[2], unquote(found[3] or ""), unquote(found[4] or "")
        if bucket != BUCKET:
            raise Refused(404, "The specified bucket does not exist.")
        objects = self.service.bucket
        condition = asked.get("ifGenerationMatch")
        if prefix == "/upload" and self.command == "DELETE":
            if self.service.uploads.pop(asked.get("upload_id", ""), None) is None:
                raise Refused(404, "no such upload")
            return 499, b"", {}
        if prefix == "/upload" and self.command in ("POST", "PUT"):
            return self._upload(asked, condition, body)
        if copy and self.command == "POST":
            source = objects.get(name)
            made = described(copy, objects.put(copy, source.data, condition, source.content_type))
            return json_answer({"kind": "storage#rewriteResponse", "done": True, "resource": made})
        if name and self.command == "DELETE":
            objects.delete(name)
            return 204, b"", {}
        if self.command != "GET":
            raise Refused(501, f"this server does not know {self.command} {path}")
        if name and asked.get("alt") == "media":
            return self._download(objects.get(name))
        if name:
            return json_answer(described(name, objects.get(name)))
        if path.endswith("/o"):
            return json_answer(self._listing(asked))
        return json_answer({"kind": "storage#bucket", "id": BUCKET, "name": BUCKET, "storageClass": "STANDARD"})

    def _listing(self, asked: dict[str, str]) -> dict[str, Any]:
        prefix, delimiter = asked.get("prefix", ""), asked.get("delimiter", "")
        entries: dict[str, bool] = {}
        for name in self.service.bucket.names():
            if name.startswith(prefix):
                head, cut, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
                entries[prefix + head + cut if cut else name] = bool(cut)
        after = base64.b64decode(asked.get("pageToken", "")).decode()
        left = [entry for entry in entries if entry.encode() > after.encode()]
        page = left[: min(PAGE, int(asked.get("maxResults", PAGE)))]
        listing: dict[str, Any] = {"kind": "storage#objects"}
        prefixes = [entry for entry in page if entries[entry]]
        items = []
        for entry in page:
            if not entries[entry]:
                with contextlib.suppress(Refused):
                    items.append(described(entry, self.service.bucket.get(entry)))
        if prefixes:
            listing["prefixes"] = prefixes
        if items:
            listing["items"] = items
        if len(left) > len(page):
            listing["nextPageToken"] = base64.b64encode(page[-1].encode()).decode()
        return listing

    def _download(self, stored: Stored) -> tuple[int, bytes, dict[str, str]]:
        record = described("", stored)
        headers = {
            "Content-Type": stored.content_type,
            "X-Goog-Generation": record["generation"],
            "X-Goog-Hash": f"crc32c={record['crc32c']},md5={record['md5Hash']}",
        }
        wanted = self.headers.get("Range")
        if not wanted:
            return 200, stored.data, headers
        found = re.fullmatch(r"bytes=(\d*)-(\d*)", wanted)
        if not found or not (found[1] or found[2]):
            raise Refused(400, f"Range: {wanted}")
        size = len(stored.data)
        start = int(found[1]) if found[1] else max(0, size - int(found[2]))
        end = min(size, int(found[2]) + 1) if found[1] and found[2] else size
        if start >= size:
            raise Refused(416, "The requested range cannot be satisfied.")
        return 206, stored.data[start:end], {**headers, "Content-Range": f"bytes {start}-{end - 1}/{size}"}

    def _upload(self, asked: dict[str, str], condition: str | None, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        objects = self.service.bucket
        kind = "application/octet-stream"
        if "upload_id" in asked:
            return self._chunk(asked["upload_id"], body)
        if asked.get("uploadType") == "resumable":
            record = json.loads(body) if body else {}
            name = asked.get("name") or record["name"]
            identity = hashlib.sha256(os.urandom(16)).hexdigest()
            kind = self.headers.get("X-Upload-Content-Type", kind)
            self.service.uploads[identity] = (name, condition, kind, bytearray())
            return 200, b"", {"Location": f"http://{self.headers['Host']}{self.path}&upload_id={identity}"}
        if asked.get("uploadType") == "multipart":
            record, kind, data = split_multipart(body, self.headers.get("Content-Type", ""))
            name = asked.get("name") or record["name"]
        else:
            name, data = asked["name"], body
        stored = objects.put(name, data, condition, kind)
        return 200, json.dumps(described(name, stored)).encode(), {"Content-Type": "application/json"}

    def _chunk(self, identity: str, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        if identity not in self.service.uploads:
            raise Refused(404, "no such upload")
        name, condition, kind, data = self.service.uploads[identity]
        found = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)", self.headers.get("Content-Range", "bytes 0-0/*"))
        if not found:
            raise Refused(400, "Content-Range")
        if found[1] is not None:
            start = int(found[1])
            if start > len(data):
                raise Refused(400, "a gap in the upload")
            last = found[3] != "*" and start + len(body) == int(found[3])
            if not last and len(body) % (256 << 10):
                raise Refused(400, "chunks are multiples of 256 KiB")
            data[start:] = body
        if found[3] == "*" or len(data) < int(found[3]):
            return 308, b"", {"Range": f"bytes=0-{len(data) - 1}"} if data else {}
        stored = self.service.bucket.put(name, bytes(data), condition, kind)
        del self.service.uploads[identity]
        return 200, json.dumps(described(name, stored)).encode(), {"Content-Type": "application/json"}


class Server(ThreadingHTTPServer):
    """Many connections at once, as many as a client opens."""

    request_queue_size = 128
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed in the middle of a request is no error of the server's."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class Gcs:
    """A running server as tests see it."""

    def __init__(self, host: str) -> None:
        self.host = host

    @property
    def environment(self) -> dict[str, str]:
        """Environment of a process that is to use this server."""
        return {**os.environ, **ENVIRONMENT, "STORAGE_EMULATOR_HOST": self.host, "OMP_NUM_THREADS": "1"}

    def _call(self, what: str, record: Any = None) -> Any:
        request = urllib.request.Request(f"{self.host}/_test/{what}", json.dumps(record).encode(), method="POST")
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def fail(self, match: str, *, count: int = 1, every: int = 1, late: bool = False, **how: Any) -> None:
        """Let `count` requests, every so many, whose `METHOD path?query range` matches a pattern fail; adds to earlier ones.

        `status=503` answers so, `drop=True` closes the connection without an answer, `cut=100` after that many bytes of
        the body, `sleep=0.5` waits so many seconds first. `late` carries the request out first.
        """
        self._call("faults", {"match": match, "count": count, "every": every, "late": late, "met": 0, **how})

    def clear(self) -> None:
        """No more faults; an empty record."""
        self._call("clear")

    def load(self, folder: str, target: str) -> None:
        """Put the files of a folder into the bucket at `target`, past the faults and the record; so do the next three."""
        self._call("load", {"source": folder, "target": target})

    def copy(self, source: str, target: str) -> None:
        """Copy every object below a place to another."""
        self._call("copy", {"source": source, "target": target})

    def save(self, source: str, folder: str) -> None:
        """Write every object below a place into a folder."""
        self._call("save", {"source": source, "target": folder})

    def remove(self, source: str) -> None:
        """Delete every object below a place."""
        self._call("remove", {"source": source})

    def requests(self, match: str = "") -> list[dict[str, Any]]:
        """The requests since `clear` whose line matches a pattern: `line`, whether it met a `fault`, `bytes` sent."""
        return [request for request in self._call("log") if re.search(match, request["line"])]


@contextlib.contextmanager
def serve() -> Iterator[Gcs]:
    """A server in another process, for as long as the context lasts."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.gcs"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        yield Gcs(f"http://127.0.0.1:{int(process.stdout.readline())}")
    finally:
        process.stdin.close()
        process.wait(30)
        process.stdout.close()


def main() -> None:
    """Serve until standard input ends."""
    Handler.service = Service()
    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdout.write(f"{server.server_address[1]}\n")
    sys.stdout.flush()
    sys.stdin.read()


if __name__ == "__main__":
    main()
