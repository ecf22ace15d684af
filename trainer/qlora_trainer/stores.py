"""S3 stores: what a job reads there becomes files on its work volume, and what it publishes is proven by digest.

A store that is away is asked again for a while, then the stage ends as a crash, which the operator retries. What asking
again cannot cure (credentials, buckets, certificates) is bad input. No text of a store gets into a message but the code
of its error: answers to a wrong signature quote parts of the request.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

from obstore.exceptions import BaseError, PreconditionError
from obstore.store import S3Store

from qlora_api.exchange import bucket_of
from qlora_trainer.environment import Pod, log
from qlora_trainer.failures import BadInput, StageError, Unavailable

if TYPE_CHECKING:
    from obstore import Bytes, ObjectMeta
    from obstore.store import ClientConfig, RetryConfig, S3Config, S3Credential

T = TypeVar("T")
B = TypeVar("B")

REGION = "us-east-1"
#: Unit of reading and uploading: memory is this times `AT_ONCE`.
CHUNK_BYTES = 16 << 20
AT_ONCE = 4
#: A multipart upload has at most 10,000 parts.
PARTS_MAX = 9_000
#: Metadata of what publish uploads: the SHA-256 of the bytes that were meant.
DIGEST_ATTRIBUTE = "qlora-sha256"

#: How long a store that is away is asked again, beyond the client's own quick retries.
PATIENCE_SECONDS = 120.0
LONGEST_DELAY_SECONDS = 15.0
#: How long one request waits in all because it is told to: two of the windows in which the hub counts requests.
LONGEST_TOLD_SECONDS = 600.0
_QUICK_RETRIES: RetryConfig = {
    "max_retries": 6,
    "retry_timeout": timedelta(seconds=10),
    "backoff": {"init_backoff": timedelta(milliseconds=200), "max_backoff": timedelta(seconds=3), "base": 2},
}
_SECRET_KEYS = ("endpoint", "region", "accessKey", "secretKey", "sessionToken", "caBundle")
_REQUIRED_KEYS = ("accessKey", "secretKey")
_WRONG_KEYS = {
    "InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken", "XAdminUserNotFound",
}  # fmt: skip
#: What passes although the status says that the request was at fault.
_PASSING = {"NoSuchUpload", "OperationAborted", "RequestTimeout", "RequestTimeTooSkewed", "SlowDown"}


@dataclass(frozen=True)
class Object:
    """One object, in the version that was listed."""

    key: str
    bytes: int
    etag: str | None


@dataclass(frozen=True)
class Store:
    """A bucket as one field of the spec names it, reached with the credentials that go with it."""

    where: str
    uri: str
    bucket: str
    path: str
    place: str
    secret: str | None
    client: S3Store = field(repr=False)
    revision: None = None  # a bucket's files have versions each of their own

    def objects(self) -> dict[str, Object]:
        """What lies right below the path, by name."""
        return self._named(self._patiently(lambda: self.client.list_with_delimiter(self.path))["objects"])

    def all_objects(self) -> dict[str, Object]:
        """What lies below the path at any depth, by relative name."""
        return self._named(self._patiently(lambda: [meta for page in self.client.list(self.path) for meta in page]))

    def object_itself(self) -> Object | None:
        """What lies at the path."""
        try:
            meta = self._patiently(lambda: self.client.head(self.path))
        except FileNotFoundError:
            return None
        return Object(meta["path"], meta["size"], meta["e_tag"])

    def neighbours(self) -> str:
        """What lies where the path should: the quickest way to a typing error."""
        parent = self.path.rpartition("/")[0]
        listed = self._patiently(lambda: self.client.list_with_delimiter(parent or None))
        paths = [*listed["common_prefixes"], *(meta["path"] for meta in listed["objects"])]
        found = sorted(path.rstrip("/").rpartition("/")[2] for path in paths)[:8]
        return f"; beside it: {', '.join(found)}" if found else "; there is nothing beside it"

    def read(self, wanted: Object, start: int, end: int, stopping: threading.Event | None = None) -> Bytes:
        """The bytes from `start` to before `end`, of just the version that was listed.

        Raises Unavailable when that is gone, and as `_patiently`.
        """
        try:
            return self._patiently(
                lambda: self.client.get(wanted.key, options={"range": (start, end), "if_match": wanted.etag}).bytes(),
                stopping,
            )
        except (PreconditionError, FileNotFoundError):
            told = Unavailable(f"{self.where}.uri: s3://{self.bucket}/{wanted.key} was changed while it was read")
        raise told

    def chunks(self, wanted: Object) -> Iterator[Bytes]:
        """All bytes in order, with a few requests on their way at any time."""
        return in_order(self.read, wanted)

    def digest(self, wanted: Object) -> str:
        """`sha256:…` of what the store hands out; all of it is read."""
        digest = hashlib.sha256()
        for chunk in self.chunks(wanted):
            digest.update(chunk)
        return f"sha256:{digest.hexdigest()}"

    def digest_meant(self, name: str) -> str | None:
        """The digest that publish noted on an object below the path when it uploaded it."""
        key = f"{self.path}/{name}"
        return self._patiently(lambda: self.client.get(key, options={"head": True}).attributes.get(DIGEST_ATTRIBUTE))

    def put(self, name: str, content: bytes | Path, digest: str) -> None:
        """Upload a file or bytes to below the path, and prove by reading it back that the store has those bytes.

        The upload is signed over each part's SHA-256, which servers check, but only what comes back proves what is
        stored; S3 knows no digest of a whole multipart object. Raises OSError when it is something else.
        """
        key = f"{self.path}/{name}"
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        part = max(CHUNK_BYTES, -(-size // PARTS_MAX))
        self._patiently(
            # read by a generator in this thread: a SIGTERM is heard between parts, and the client aborts the upload
            lambda: self.client.put(
                key,
                _parts(content, part) if isinstance(content, Path) and size > part else content,
                attributes={DIGEST_ATTRIBUTE: digest},
                chunk_size=part,
                use_multipart=size > part,
                max_concurrency=AT_ONCE,
            )
        )
        meta = self._patiently(lambda: self.client.head(key))
        if self.digest(Object(key, meta["size"], meta["e_tag"])) != digest:
            raise OSError(f"s3://{self.bucket}/{key}: the bytes that arrived are not those that were sent")

    def delete(self, name: str) -> None:
        """Remove an object below the path."""
        self._patiently(lambda: self.client.delete(f"{self.path}/{name}"))

    def _named(self, found: Sequence[ObjectMeta]) -> dict[str, Object]:
        objects = (Object(meta["path"], meta["size"], meta["e_tag"]) for meta in found)
        named = {found.key.removeprefix(f"{self.path}/"): found for found in objects}
        return {name: named[name] for name in sorted(named) if name}

    def _patiently(self, ask: Callable[[], T], stopping: threading.Event | None = None) -> T:
        """What `ask` brings, asked again for a while after the store was first found away.

        Raises BadInput or Unavailable, and FileNotFoundError and PreconditionError for an object as they are.
        """

        def attempt() -> T | StageError:
            try:
                return ask()
            except (BaseError, FileNotFoundError) as error:
                text = str(error)
                if isinstance(error, PreconditionError):
                    raise
                if isinstance(error, FileNotFoundError) and _code(text) in (None, "NoSuchKey"):
                    raise FileNotFoundError(f"s3://{self.bucket}") from None
            return self._explained(text)  # outside of `except`: the store's own words are not chained to ours

        return ask_again(attempt, stopping)

    def _explained(self, text: str) -> BadInput | Unavailable:
        """What an error of the client means, in words for the user."""
        status, code = re.search(r"status code: (\d{3})", text), _code(text)
        number = int(status[1]) if status else None
        said = " ".join(filter(None, (status and status[1], code)))
        at = f"{self.where}.uri: {self.place}"
        if "InvalidCertificate" in text:
            why = re.search(r"InvalidCertificate\(\s*(\w+)", text)
            return BadInput(
                f"{at} has a certificate that is not trusted ({why[1] if why else 'unknown'}): put the certificate of "
                f"its authority into the key caBundle of {self._secret}"
            )
        unavailable = Unavailable(
            f"{at} cannot be reached or used now ({said or _connection(text)}; bucket {self.bucket})"
        )
        if code in _PASSING:
            return unavailable
        if "169.254.169.254" in text:
            return BadInput(
                f"{self.where}.credentialsSecretRef: names no Secret, and the pod's environment gives no credentials "
                f"for {self.place} either"
            )
        if code == "NoSuchBucket":
            return BadInput(f"{at} has no bucket {self.bucket}: check its name, or create it")
        if code in _WRONG_KEYS or number == 401:
            return BadInput(
                f"{at} does not know {self._credentials} ({said}; bucket {self.bucket}): check accessKey and secretKey "
                f"of {self._secret}"
            )
        if number == 403:
            return BadInput(
                f"{at} does not let {self._credentials} do this in bucket {self.bucket} ({said}): give them the right "
                f"to list and read it, and for the output to write and delete, or correct {self._secret}"
            )
        if number and 300 <= number < 500 and number not in (408, 409, 429):
            return BadInput(
                f"{at} refuses the request for bucket {self.bucket} ({said}): check endpoint and region of "
                f"{self._secret}"
            )
        return unavailable

    @property
    def _credentials(self) -> str:
        return f"the credentials of Secret {self.secret}" if self.secret else "the pod's own credentials"

    @property
    def _secret(self) -> str:
        return f"Secret {self.secret}" if self.secret else f"a Secret named in {self.where}.credentialsSecretRef"


def open_store(where: str, uri: str, secret: str | None, pod: Pod) -> Store:
    """The bucket of `uri`, which the field `where` of the spec names; nothing is asked yet.

    Raises BadInput when the address or the Secret's content cannot work, Unavailable when there is no Secret (yet).
    """
    try:
        bucket, path = bucket_of(uri)
    except ValueError as error:
        raise BadInput(f"{where}.uri: {error}") from error
    keys = read_secret(where, secret, pod, _SECRET_KEYS, _REQUIRED_KEYS) if secret else {}
    if (found := keys.get("endpoint")) and not is_address(found):
        raise BadInput(
            f"{where}.credentialsSecretRef: the key endpoint of Secret {secret} must be https://host or http://host, "
            "with a port where needed"
        )
    endpoint = _endpoint(keys)
    options: ClientConfig = {"connect_timeout": "5s", "timeout": "120s"}  # the latter for a chunk, up or down
    config: S3Config = {"disable_bulk_delete": True}  # not every server has it
    if endpoint:
        config["endpoint"] = endpoint
        options["allow_http"] = endpoint.startswith("http://")
    if "caBundle" in keys:
        options["root_certificate"] = keys["caBundle"]
    if keys:
        config["region"] = keys.get("region", REGION)
    credential: S3Credential = {
        "access_key_id": keys.get("accessKey", ""),
        "secret_access_key": keys.get("secretKey", ""),
        "token": keys.get("sessionToken"),
        "expires_at": None,
    }
    try:
        client = S3Store(
            bucket,
            config=config,
            client_options=options,
            retry_config=_QUICK_RETRIES,
            # through a provider: nothing of the environment is mixed in, and the client's repr shows no key
            credential_provider=(lambda: credential) if keys else None,
        )
    except BaseError:
        told = BadInput(f"{where}.credentialsSecretRef: the key caBundle of Secret {secret} holds no certificate (PEM)")
        raise told from None
    return Store(
        where=where,
        uri=uri,
        bucket=bucket,
        path=path,
        place=endpoint or "AWS",
        secret=secret,
        client=client,
    )


def _endpoint(keys: Mapping[str, str]) -> str | None:
    """Where to go: as the Secret says, or to AWS; without a Secret as the pod's environment says."""
    if keys:
        return keys.get("endpoint") or f"https://s3.{keys.get('region', REGION)}.amazonaws.com"
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


def read_secret(where: str, name: str, pod: Pod, known: Sequence[str], required: Sequence[str] = ()) -> dict[str, str]:
    """Key to value of the Secret that the field `where` names, as the pod has it mounted: those of `known` that it has.

    Raises BadInput when it has not all of `required`, or nothing of use; Unavailable when there is no Secret (yet).
    White space around values is dropped: `kubectl create secret --from-file` keeps the line's end.
    """
    directory = Path(pod.credentials) / name
    found = {path.name: path for path in sorted(directory.glob("*")) if path.is_file() and path.name[0] != "."}
    if not found:
        raise Unavailable(
            f"{where}.credentialsSecretRef: there is no Secret {name} in the job's namespace, or it is empty: create "
            f"it, with {' and '.join(required or known[:1])}"
        )
    keys = {key: found[key].read_text(encoding="utf-8").strip() for key in known if key in found}
    keys = {key: value for key, value in keys.items() if value}
    missing = [key for key in required if key not in keys]
    if missing or not keys:
        raise BadInput(
            f"{where}.credentialsSecretRef: Secret {name} lacks {' and '.join(missing or known[:1])}; it has "
            f"{', '.join(found)}, and what is read is {', '.join(known)}"
        )
    if "caBundle" in keys and "-----BEGIN CERTIFICATE-----" not in keys["caBundle"]:
        raise BadInput(f"{where}.credentialsSecretRef: the key caBundle of Secret {name} holds no certificate (PEM)")
    return keys


def is_address(text: str) -> bool:
    """Whether `text` is https://host or http://host, perhaps with a port and a path, and nothing secret in it."""
    parts = urlsplit(text)
    return parts.scheme in ("http", "https") and bool(parts.hostname) and not parts.username


def ask_again(attempt: Callable[[], T | StageError], stopping: threading.Event | None = None) -> T:
    """What `attempt` brings; while it brings Unavailable it is tried again, for a while after that came first.

    A time that the other side itself asks for is waited, and does not count. Raises what it brings last otherwise.
    """
    delay, deadline, asked_for = 1.0, None, 0.0
    while True:
        found = attempt()
        if not isinstance(found, StageError):
            return found
        deadline = deadline or time.monotonic() + PATIENCE_SECONDS
        told = found.after_seconds if isinstance(found, Unavailable) else 0.0
        if told and asked_for + told <= LONGEST_TOLD_SECONDS:
            asked_for += told
            deadline += told
        wait = max(delay, told)
        if not isinstance(found, Unavailable) or time.monotonic() + wait > deadline:
            raise found
        log.info("%s; asking again in %.0f s", found, wait)
        if (stopping or threading.Event()).wait(wait):
            raise found
        delay = min(2 * delay, LONGEST_DELAY_SECONDS)


def in_order(read: Callable[[Object, int, int, threading.Event], B], wanted: Object) -> Iterator[B]:
    """All bytes of `wanted` in chunks, with a few requests on their way at any time."""
    pool, stopping = ThreadPoolExecutor(AT_ONCE), threading.Event()
    underway: deque[Future[B]] = deque()
    try:
        for start in range(0, wanted.bytes, CHUNK_BYTES):
            end = min(start + CHUNK_BYTES, wanted.bytes)
            underway.append(pool.submit(read, wanted, start, end, stopping))
            if len(underway) == AT_ONCE:
                yield underway.popleft().result()
        while underway:
            yield underway.popleft().result()
    finally:
        stopping.set()
        pool.shutdown(wait=False, cancel_futures=True)


def require_space(directory: Path, need_bytes: int, what: str) -> None:
    """Raise BadInput unless `directory`'s file system has room for `need_bytes`."""
    free = shutil.disk_usage(directory).free
    if need_bytes > free:
        raise BadInput(
            f"{what} takes {need_bytes / 2**30:.2f} GiB and the work volume has {free / 2**30:.2f} GiB free: "
            "leave out storage.size, or make it or the claim larger"
        )


def _parts(path: Path, size: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        while part := file.read(size):
            yield part


def _code(text: str) -> str | None:
    """The error code in a store's answer; `<Message>` beside it may quote what was sent."""
    code = re.search(r"<Code>(\w{1,64})</Code>", text)
    return code[1] if code else None


def _connection(text: str) -> str:
    """Why there was no answer at all."""
    for sign, meaning in (
        ("dns error", "its name is not known"),
        ("ConnectionRefused", "connection refused"),
        ("TimedOut", "no answer in time"),
        ("timed out", "no answer in time"),
        ("IncompleteMessage", "the connection was closed; http:// where it speaks https://?"),
    ):
        if sign in text:
            return meaning
    return "the connection failed"
