"""A hub for tests: repositories at commits, served as Hugging Face's hub serves them, with its ways to say no.

No real one runs on a bare machine: the hub is not published, and mirrors only hand on what it says. What clients see of
it is in huggingface_hub, and tests ask this server through that library too.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import secrets
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar, Literal
from urllib.parse import parse_qs, quote, unquote, urlsplit

from tests.cluster.s3 import write_certificate

Kind = Literal["model", "dataset"]

MAIN = "main"
#: As the hub does, files from this size on lie in LFS, whose bytes come from somewhere else.
LFS_BYTES = 4096
_ROUTE = re.compile(
    r"/api/(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)"
    r"(/(?P<what>revision|tree|paths-info)/(?P<revision>[^/]+)(/(?P<path>.*))?)?"
)
_RESOLVE = re.compile(r"/(?P<data>datasets/)?(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
_OPEN_IN_GATED = ("README.md", ".gitattributes")


@dataclass
class Repository:
    """Commits, oldest first, and what is called after which of them."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False
    disabled: bool = False
    #: Tokens of accounts that may read it where not everybody may.
    readers: set[str] = field(default_factory=set)
    moved_to: str | None = None

    def commit(self, files: Mapping[str, bytes], branch: str = MAIN) -> str:
        """A commit with just these files, which the branch then is; its name."""
        content = repr((len(self.commits), sorted((name, git_digest(data)) for name, data in files.items())))
        sha = hashlib.sha1(content.encode(), usedforsecurity=False).hexdigest()
        self.commits[sha] = dict(files)
        self.names[branch] = sha
        return sha

    def find(self, revision: str) -> str | None:
        """The commit that a branch, tag or commit's name means."""
        return self.names.get(revision) or (revision if revision in self.commits else None)


@dataclass(frozen=True)
class Request:
    """One request that came."""

    method: str
    path: str
    range: str | None
    authorized: bool
    at_cdn: bool


@dataclass
class Fault:
    """What happens instead of an answer, or to it, on the next `times` requests whose path has `path` in it."""

    path: str
    times: int = 1
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b"{}"
    cut: bool = False
    damaged: bool = False
    without_ranges: bool = False


class Hub:
    """A server on `host`, and a second one that large files come from, as the hub's do."""

    def __init__(
        self, root: Path, host: str = "127.0.0.1", port: int = 0, *, tls: bool = False, page: int = 1000
    ) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self.host, self.page = host, page
        self.repositories: dict[tuple[Kind, str], Repository] = {}
        self.tokens: set[str] = set()
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.tickets: dict[str, bytes] = {}
        self.scheme = "https" if tls else "http"
        self.ca = write_certificate(root, host) if tls else ""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER) if tls else None
        if context:
            context.load_cert_chain(root / "tls.crt", root / "tls.key")
        self.context = context
        self.port, self.cdn_port = port, 0
        self._servers: list[_Server] = []

    @property
    def endpoint(self) -> str:
        return f"{self.scheme}://{self.host}:{self.port}"

    def start(self) -> None:
        """Serve, at the same address as before."""
        for role, port in ((_HubHandler, self.port), (_CdnHandler, self.cdn_port)):
            server = _Server((self.host, port), role)
            server.hub, server.context = self, self.context
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
            self._servers.append(server)
        self.port, self.cdn_port = (server.server_address[1] for server in self._servers)

    def stop(self) -> None:
        """Take no more connections."""
        while self._servers:
            server = self._servers.pop()
            server.shutdown()
            server.server_close()

    def token(self) -> str:
        """A token of a new account."""
        token = f"hf_{secrets.token_hex(17)}"
        self.tokens.add(token)
        return token

    def create(self, kind: Kind, name: str, files: Mapping[str, bytes], **rules: Any) -> Repository:
        """A repository with one commit."""
        repository = self.repositories[kind, name] = Repository(**rules)
        repository.commit(files)
        return repository

    def head(self, kind: Kind, name: str) -> str:
        """The commit that the main branch is."""
        return self.repositories[kind, name].names[MAIN]

    def fault(self, path: str) -> Fault | None:
        """What is to go wrong with a request for `path`."""
        for fault in self.faults:
            if fault.times and fault.path in path:
                fault.times -= 1
                return fault
        return None


def directory_files(directory: Path) -> dict[str, bytes]:
    """Every file of a directory, as a commit has it."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}


def git_digest(content: bytes) -> str:
    """What git calls a blob."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def in_lfs(content: bytes) -> bool:
    """Whether the hub would keep a file of this content outside of git."""
    return len(content) >= LFS_BYTES


@contextlib.contextmanager
def serving(
    root: Path, host: str = "127.0.0.1", port: int = 0, *, tls: bool = False, page: int = 1000
) -> Iterator[Hub]:
    """A hub that runs while the block does."""
    hub = Hub(root, host, port, tls=tls, page=page)
    hub.start()
    try:
        yield hub
    finally:
        hub.stop()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: Hub
    context: ssl.SSLContext | None

    def finish_request(self, request: Any, client_address: Any) -> None:
        """The handshake is the connection's own thread's: one that never speaks holds up nobody."""
        with contextlib.suppress(OSError):
            wrapped = self.context.wrap_socket(request, server_side=True) if self.context else request
            super().finish_request(wrapped, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server  # pyright: ignore[reportIncompatibleVariableOverride]
    at_cdn: ClassVar[bool] = False

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Nobody reads it."""

    def handle_one(self) -> None:
        self.hub = self.server.hub
        self.url = urlsplit(self.path)
        self.request_body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        authorized = "Authorization" in self.headers
        seen = Request(self.command, self.path, self.headers.get("Range"), authorized, self.at_cdn)
        self.hub.requests.append(seen)
        self.trouble = self.hub.fault(self.path)
        if self.trouble and self.trouble.status:
            self.reply(self.trouble.status, self.trouble.body, self.trouble.headers)
        else:
            self.answer()

    do_GET = do_HEAD = do_POST = handle_one  # noqa: N815

    def answer(self) -> None:
        raise NotImplementedError

    def reply(self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.trouble and self.trouble.cut:
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
        else:
            self.wfile.write(body)

    def reply_json(self, value: Any, headers: Mapping[str, str] | None = None) -> None:
        self.reply(200, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def refuse(self, status: int, code: str | None, message: str) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.reply(status, json.dumps({"error": message}).encode(), headers)

    def reply_bytes(self, content: bytes, headers: Mapping[str, str]) -> None:
        """A file, or the part of it that is asked for."""
        if self.trouble and self.trouble.damaged:
            content = content[:-1] + bytes([content[-1] ^ 1])
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        headers = {"Accept-Ranges": "bytes", **headers}
        if asked is None or (self.trouble and self.trouble.without_ranges):
            return self.reply(200, content, headers)
        first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
        if first > last:
            return self.reply(416, b"", {"Content-Range": f"bytes */{len(content)}"})
        part = {"Content-Range": f"bytes {first}-{last}/{len(content)}"}
        return self.reply(206, content[first : last + 1], headers | part)


class _CdnHandler(_Handler):
    """Where large files are: whoever has a way there may read, until it is taken away."""

    at_cdn = True

    def answer(self) -> None:
        content = self.hub.tickets.get(self.url.path.strip("/"))
        if content is None:
            return self.reply(403, b"<Error><Code>AccessDenied</Code></Error>")
        return self.reply_bytes(content, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"'})


class _HubHandler(_Handler):
    """The hub: its API, and its files by name."""

    def answer(self) -> None:
        path = self.url.path
        if found := _ROUTE.fullmatch(path):
            kind: Kind = "model" if found["kind"] == "models" else "dataset"
            what = {"tree": self._tree, "paths-info": self._paths_info}.get(found["what"] or "", self._info)
        elif found := _RESOLVE.fullmatch(path):
            kind, what = "dataset" if found["data"] else "model", self._resolve
        else:
            return self.refuse(404, None, "Sorry, we can't find the page you are looking for.")
        revision = unquote(found["revision"]) if found["revision"] else MAIN
        return self._about(kind, unquote(found["repo"]), revision, unquote(found["path"] or ""), what)

    @property
    def _token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def _about(
        self, kind: Kind, name: str, revision: str, path: str, what: Callable[[Repository, str, str, str], None]
    ) -> None:
        """What the hub looks at before it looks at what was asked."""
        repository = self.hub.repositories.get((kind, name))
        if self._token and self._token not in self.hub.tokens:
            return self.refuse(401, None, "Invalid credentials in Authorization header")
        if repository is None or (repository.private and self._token not in repository.readers):
            if self._token is None:
                return self.refuse(401, "RepoNotFound", "Invalid username or password.")
            return self.refuse(404, "RepoNotFound", "Repository not found")
        if repository.moved_to:
            here = self.path.replace(name, repository.moved_to, 1)
            return self.reply(307, b"Temporary Redirect", {"Location": here})
        if repository.disabled:
            return self.refuse(403, None, "Access to this resource is disabled.")
        guarded = repository.gated and what == self._resolve and path not in _OPEN_IN_GATED
        if guarded and self._token not in repository.readers:
            told = f"Access to model {name} is restricted"
            return self.refuse(403 if self._token else 401, "GatedRepo", told)
        sha = repository.find(revision)
        if sha is None:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return what(repository, name, sha, path)

    def _info(self, repository: Repository, name: str, sha: str, path: str) -> None:
        siblings = [{"rfilename": each} for each in sorted(repository.commits[sha])]
        gated = "auto" if repository.gated else False
        self.reply_json({"id": name, "sha": sha, "private": repository.private, "gated": gated, "siblings": siblings})

    def _tree(self, repository: Repository, name: str, sha: str, path: str) -> None:
        files, query = repository.commits[sha], parse_qs(self.url.query)
        below = {each: each.removeprefix(f"{path}/" if path else "") for each in files}
        below = {each: rest for each, rest in below.items() if not path or each.startswith(f"{path}/")}
        if not below:
            return self.refuse(404, "EntryNotFound", f"{path} does not exist on {sha}")
        recursive = query.get("recursive", ["false"])[0].lower() in ("true", "1")
        folders = {
            "/".join([*filter(None, [path]), *rest.split("/")[:depth]])
            for rest in below.values()
            for depth in range(1, rest.count("/") + 1)
            if recursive or depth == 1
        }
        entries = [{"type": "directory", "oid": git_digest(each.encode()), "size": 0, "path": each} for each in folders]
        entries += [entry(each, files[each]) for each, rest in below.items() if recursive or "/" not in rest]
        entries.sort(key=lambda each: str(each["path"]))
        first = int(query.get("cursor", ["0"])[0])
        link = {}
        if first + self.hub.page < len(entries):  # with the hub's own name, as a mirror may hand it on
            further = (
                f"https://hub.invalid{self.url.path}?recursive={str(recursive).lower()}&cursor={first + self.hub.page}"
            )
            link = {"Link": f'<{further}>; rel="next"'}
        return self.reply_json(entries[first : first + self.hub.page], link)

    def _paths_info(self, repository: Repository, name: str, sha: str, path: str) -> None:
        body = self.request_body.decode()
        is_json = "json" in (self.headers.get("Content-Type") or "")
        paths = json.loads(body)["paths"] if is_json else parse_qs(body).get("paths", [])
        files = repository.commits[sha]
        self.reply_json([entry(each, files[each]) for each in paths if each in files])

    def _resolve(self, repository: Repository, name: str, sha: str, path: str) -> None:
        content = repository.commits[sha].get(path)
        headers = {"X-Repo-Commit": sha}
        if content is None:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        if not in_lfs(content):
            return self.reply_bytes(content, headers | {"ETag": f'"{git_digest(content)}"'})
        ticket = secrets.token_hex(8)
        self.hub.tickets[ticket] = content
        digest = hashlib.sha256(content).hexdigest()
        linked = {"X-Linked-Size": str(len(content)), "X-Linked-ETag": f'"{digest}"', "ETag": f'"{digest}"'}
        place = f"{self.hub.scheme}://{self.hub.host}:{self.hub.cdn_port}/{ticket}?name={quote(path, safe='')}"
        return self.reply(302, b"Found", headers | linked | {"Location": place})


def entry(path: str, content: bytes) -> dict[str, Any]:
    """A file as the hub lists it."""
    found: dict[str, Any] = {"type": "file", "oid": git_digest(content), "size": len(content), "path": path}
    if in_lfs(content):
        digest = hashlib.sha256(content).hexdigest()
        found |= {"lfs": {"oid": digest, "size": len(content), "pointerSize": 134}}
    return found
