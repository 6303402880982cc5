"""One model repository, served on 127.0.0.1 as the Hugging Face Hub serves it: as far as downloads go."""

import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit


class HubServer:
    """Serves the files of `folder` as `repo_id`, every revision the same; use as a context manager.

    `endpoint` is what HF_ENDPOINT takes; `requests` lists (method, path, status) of what was asked.
    """

    def __init__(self, folder: Path, repo_id: str):
        self.folder, self.repo_id = folder, repo_id
        self.requests: list[tuple[str, str, int]] = []
        self.files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        self.etags = {name: hashlib.sha1(path.read_bytes()).hexdigest() for name, path in self.files.items()}
        self.commit = hashlib.sha1(json.dumps(self.etags, sort_keys=True).encode()).hexdigest()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "HubServer":
        Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self._server.shutdown()
        self._server.server_close()

    def info(self) -> dict:
        """What /api/models/REPO answers."""
        siblings = [{"rfilename": name} for name in sorted(self.files)]
        return {"_id": "0", "id": self.repo_id, "sha": self.commit, "private": False, "tags": [], "siblings": siblings}

    def tree(self, under: str) -> list[dict] | None:
        """What /api/models/REPO/tree/REVISION answers; None where no such folder is."""
        names = [name for name in sorted(self.files) if name.startswith(under)]
        if not names and under:
            return None
        sizes = {name: self.files[name].stat().st_size for name in names}
        return [{"type": "file", "path": name, "size": sizes[name], "oid": self.etags[name]} for name in names]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:  # noqa: N802
        hub = self.server.hub
        path = unquote(urlsplit(self.path).path)
        repo = re.escape(hub.repo_id)
        if file := re.fullmatch(rf"/{repo}/resolve/[^/]+/(.+)", path):
            self._file(file[1])
        elif tree := re.fullmatch(rf"/api/models/{repo}/tree/[^/]+/?(.*)", path):
            listing = hub.tree(tree[1] and tree[1].rstrip("/") + "/")
            self._missing("EntryNotFound") if listing is None else self._json(listing)
        elif re.fullmatch(rf"/api/models/{repo}(/revision/[^/]+)?", path):
            self._json(hub.info())
        else:
            self._missing("RepoNotFound")

    do_HEAD = do_GET  # noqa: N815

    def _file(self, name: str) -> None:
        hub = self.server.hub
        if name not in hub.files:
            self._missing("EntryNotFound")
            return
        content, status = hub.files[name].read_bytes(), 200
        headers = {"ETag": f'"{hub.etags[name]}"', "Accept-Ranges": "bytes"}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            total, first = len(content), int(wanted[1])
            content, status = content[first : int(wanted[2]) + 1 if wanted[2] else None], 206
            headers["Content-Range"] = f"bytes {first}-{first + len(content) - 1}/{total}"
        self._reply(status, content, headers)

    def _json(self, answer) -> None:
        self._reply(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _missing(self, code: str) -> None:
        self._reply(404, b"", {"X-Error-Code": code, "X-Error-Message": code})

    def _reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        hub = self.server.hub
        hub.requests.append((self.command, self.path, status))
        self.send_response(status)
        for name, value in {"X-Repo-Commit": hub.commit, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args) -> None:
        """Requests are listed in `HubServer.requests`, not on the screen."""
