"""An HTTPS server as the operator's progress endpoint is one: it keeps what it is sent and answers as told."""

from __future__ import annotations

import ipaddress
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from qlora_api.exchange import PROGRESS_CA_ENV, PROGRESS_TOKEN_ENV, PROGRESS_URL_ENV, ProgressDocument
from qlora_trainer.reporting import Server


def until(condition: Callable[[], object], seconds: float = 20) -> None:
    """Wait until `condition` holds; an AssertionError after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.005)


def make_certificate(directory: Path) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "progress")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "ca.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (directory / "tls.key").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return directory / "ca.crt", directory / "tls.key"


@dataclass
class Post:
    token: str
    path: str
    document: ProgressDocument
    received: float


@dataclass
class Endpoint:
    """The server as a trainer sees it; `answers` are given one after another, then 200."""

    directory: Path
    port: int = 0
    answers: list[int] = field(default_factory=list)
    hang: threading.Event = field(default_factory=threading.Event)  # cleared: no answer until it is set
    posts: list[Post] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.hang.set()
        self.ca, self.key = make_certificate(self.directory)
        self.token = self.directory / "token"
        self.token.write_text("first\n")

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}/apis/progress?job=tune"

    @property
    def server(self) -> Server:
        return Server(self.url, self.ca, self.token)

    @property
    def environment(self) -> dict[str, str]:
        return {PROGRESS_URL_ENV: self.url, PROGRESS_CA_ENV: str(self.ca), PROGRESS_TOKEN_ENV: str(self.token)}

    def steps(self) -> list[str]:
        """The step of each post."""
        return [
            metric.value
            for post in self.posts
            for metric in post.document.trainer_status.metrics
            if metric.name == "step"
        ]

    @contextmanager
    def running(self) -> Iterator[None]:
        """Listen on 127.0.0.1, on the port of the last time if there was one."""
        server = ThreadingHTTPServer(("127.0.0.1", self.port), _handler(self))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.ca, self.key)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        self.port = server.server_address[1]
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        try:
            yield
        finally:
            self.hang.set()
            server.shutdown()
            server.server_close()


def _handler(endpoint: Endpoint) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            token = self.headers["Authorization"].removeprefix("Bearer ")
            endpoint.posts.append(Post(token, self.path, ProgressDocument.model_validate_json(body), time.monotonic()))
            endpoint.hang.wait(timeout=60)
            status = endpoint.answers.pop(0) if endpoint.answers else 200
            self.send_response(status)
            if status in range(300, 400):
                self.send_header("Location", f"https://127.0.0.1:{endpoint.port}/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the base class' name
            pass

    return Handler
