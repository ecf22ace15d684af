"""A real S3 server for tests: versitygw, that keeps a bucket as a directory; started, stopped and started again."""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import secrets
import signal
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from obstore.store import S3Store

from tests.cluster import build, prerequisites, process, settings

MODULE = Path(__file__).resolve().parent / "versitygw"
SOURCES = (MODULE / "go.mod", MODULE / "go.sum")
FLAGS = ("-trimpath", "-ldflags", "-s -w")
REGION = "us-east-1"


def program() -> Path:
    """The compiled server, from the cache; compiled (a minute or two) if its module has changed."""
    settings.cache().mkdir(parents=True, exist_ok=True)
    with (settings.cache() / "versitygw.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        generation = build.kept("versitygw", build.digest(" ".join(FLAGS), *SOURCES), _compile)
        build.keep_only(generation)
    return generation / "versitygw"


def _compile(target: Path) -> None:
    prerequisites.require_space(target, 2, "compiling versitygw")
    build.compile_packages(prerequisites.go(), MODULE, "tool", FLAGS, target, title="versitygw")


@dataclass
class S3:
    """A server on `host`, with a certificate of an authority of its own, that only who has `ca` trusts.

    `root` holds `buckets/<bucket>/<key>` as plain files: what tests put there is what the server serves.
    """

    root: Path
    host: str = "127.0.0.1"
    tls: bool = True
    access_key: str = "tester"
    secret_key: str = field(default_factory=lambda: secrets.token_urlsafe(24), repr=False)
    port: int = 0
    _running: process.Running | None = None

    def __post_init__(self) -> None:
        self.buckets = self.root / "buckets"
        self.buckets.mkdir(parents=True)
        self.port = self.port or free_port(self.host)
        self.ca = ""
        if self.tls:
            self.ca = write_certificate(self.root, self.host)

    @property
    def endpoint(self) -> str:
        return f"{'https' if self.tls else 'http'}://{self.host}:{self.port}"

    @property
    def server(self) -> process.Server:
        certificate = ["--cert", str(self.root / "tls.crt"), "--key", str(self.root / "tls.key")] if self.tls else []
        return process.Server(
            f"s3-{self.port}",
            [str(program()), "--port", f"{self.host}:{self.port}", *certificate, "posix", str(self.buckets)],
            self._answers,
            signal.SIGKILL,
            {"ROOT_ACCESS_KEY": self.access_key, "ROOT_SECRET_KEY": self.secret_key},
        )

    def start(self) -> None:
        """Serve; returns once it answers."""
        server = self.server
        self._running = process.launch(server, self.root / "log", self.root)
        process.wait_ready(server, self._running, self.root / "log")

    def stop(self) -> None:
        """End it as a crash would; `start` serves the same buckets again at the same address."""
        if self._running:
            process.stop(self._running, signal.SIGKILL)
            self._running = None

    def secret(self, **changes: str | None) -> dict[str, str]:
        """The content of a Secret for this server, with `changes` (None takes a key out)."""
        keys = {"endpoint": self.endpoint, "accessKey": self.access_key, "secretKey": self.secret_key}
        keys |= {"caBundle": self.ca} if self.tls else {}
        return {key: value for key, value in (keys | changes).items() if value is not None}

    def create_bucket(self, name: str) -> Path:
        """A bucket is a directory; the one that is returned."""
        directory = self.buckets / name
        directory.mkdir()
        return directory

    def store(self, bucket: str) -> S3Store:
        """A client of `bucket`, as the server's owner."""
        return S3Store(
            bucket,
            endpoint=self.endpoint,
            region=REGION,
            access_key_id=self.access_key,
            secret_access_key=self.secret_key,
            client_options={"root_certificate": self.ca} if self.tls else {"allow_http": True},
        )

    def put_directory(self, directory: Path, bucket: str, prefix: str) -> None:
        """Upload every file of `directory` below `prefix`."""
        store = self.store(bucket)
        for path in sorted(path for path in directory.rglob("*") if path.is_file()):
            store.put(f"{prefix}/{path.relative_to(directory).as_posix()}", path)

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection((self.host, self.port), timeout=1):
            return True
        return False


@contextlib.contextmanager
def serving(root: Path, host: str = "127.0.0.1", *, tls: bool = True) -> Iterator[S3]:
    """A server that runs while the block does."""
    server = S3(root, host, tls)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def free_port(host: str) -> int:
    with socket.socket() as listener:
        listener.bind((host, 0))
        return listener.getsockname()[1]


def write_certificate(directory: Path, host: str) -> str:
    """`tls.crt` and `tls.key` for `host`, signed by an authority whose own certificate is returned."""
    authority_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tests' own authority")])
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)])
    authority = (
        _certificate(issuer, issuer, authority_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(authority_key, hashes.SHA256())
    )
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(host))])
    own = (
        _certificate(subject, issuer, key.public_key())
        .add_extension(names, critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    (directory / "tls.crt").write_bytes(own.public_bytes(serialization.Encoding.PEM))
    (directory / "tls.key").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return authority.public_bytes(serialization.Encoding.PEM).decode()


def _certificate(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=30))
    )
