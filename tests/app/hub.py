"""A hub on this machine: tiny repos over HTTP as the real one serves them, and as its cache lies on a disk."""

import hashlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def etag(content: bytes) -> str:
    """Small files are named by git, large ones by SHA-256."""
    return git_hash(content) if len(content) < 1000 else hashlib.sha256(content).hexdigest()


def cached(hub: Path, repo: str, files: dict[str, bytes]) -> Path:
    """The repo as it lies in the hub's cache; returns its folder."""
    folder = hub / f"models--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text(COMMIT)
    (folder / "blobs").mkdir(exist_ok=True)
    for name, content in files.items():
        blob, link = folder / "blobs" / etag(content), folder / "snapshots" / COMMIT / name
        blob.write_bytes(content)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    return folder


@contextmanager
def serving(
    repos: dict[str, dict[str, bytes]],
    *,
    breaks_off: bool = False,
    gated: bool = False,
    asked: list[tuple[str, str]] | None = None,
    sent: list[int] | None = None,
    halfway: Callable[[], None] = lambda: None,
    wrong: frozenset[str] = frozenset(),
) -> Iterator[str]:
    """The address of a hub with these repos. breaks_off: each file's first answer ends in its middle.

    wrong: files whose bytes are not those that they are named by.

    asked: is told each file that is fetched, and from where on, as the Range header has it; sent: how many bytes of it
    were. halfway: is called in the middle of each.
    """
    answered: set[str] = set()

    class Hub(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            parts = unquote(urlsplit(self.path).path).strip("/").split("/")
            api = parts[:2] == ["api", "models"]
            repo = "/".join(parts[2:4] if api else parts[:2])
            files = repos.get(repo)
            if files is None:
                self._say(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            elif gated:
                self._say(403, b"{}", {"X-Error-Code": "GatedRepo"})
            elif api and "tree" in parts:
                listed = []
                for name, content in files.items():
                    entry = {"type": "file", "path": name, "size": len(content), "oid": git_hash(content)}
                    if len(content) >= 1000:
                        digest = hashlib.sha256(content).hexdigest()
                        entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 130}
                    listed.append(entry)
                self._say(200, json.dumps(listed).encode(), {"Content-Type": "application/json"})
            elif api:
                siblings = [{"rfilename": name, "size": len(content)} for name, content in files.items()]
                told = {"id": repo, "sha": COMMIT, "siblings": siblings}
                self._say(200, json.dumps(told).encode(), {"Content-Type": "application/json"})
            else:
                self._file("/".join(parts[4:]), files)

        def _file(self, name: str, files: dict[str, bytes]) -> None:
            content = files[name]
            start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{etag(content)}"', "Accept-Ranges": "bytes"}
            if start:
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            if asked is not None and self.command == "GET":
                asked.append((name, self.headers.get("Range", "")))
            torn = breaks_off and self.command == "GET" and name not in answered
            answered.add(name if self.command == "GET" else "")
            content = content[::-1] if name in wrong else content
            self._say(206 if start else 200, content[start:], headers, torn=torn, halfway=halfway)

        def _say(
            self,
            status: int,
            body: bytes,
            headers: dict[str, str],
            *,
            torn: bool = False,
            halfway: Callable[[], None] = lambda: None,
        ) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "GET":
                return
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            halfway()
            if torn:
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
            else:
                with suppress(ConnectionError):  # whoever asked may have gone
                    self.wfile.write(body[len(body) // 2 :])
            if sent is not None and "ETag" in headers:
                sent.append(len(body) // 2 if torn else len(body))

        def log_message(self, *words: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
