"""Repositories of Hugging Face's hub or of a mirror: what a job reads there, at one commit, proven by its digests.

Three routes of the hub's API are used: which commit a revision is, what lies in a directory, and a file's bytes. The
client is our own, so that the libraries of the stages stay offline: nothing is read here that the order does not name.
No text of an answer gets into a message, and a token goes to the hub alone, never to where it sends us for the bytes.
"""

from __future__ import annotations

import hashlib
import os
import re
import ssl
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal
from urllib.parse import quote, urlsplit

import httpx2
from huggingface_hub.utils import parse_ratelimit_headers

from qlora_api.exchange import hub_repo_of
from qlora_trainer.environment import Pod, log
from qlora_trainer.failures import BadInput, StageError, Unavailable
from qlora_trainer.stores import Object, ask_again, in_order, is_address, read_secret

Kind = Literal["model", "dataset"]

#: The hub itself; an installation names a mirror in the environment of its pods.
HUB, MIRROR_ENV = "https://huggingface.co", "HF_ENDPOINT"
DEFAULT_REVISION = "main"
_SECRET_KEYS = ("token", "caBundle")
_TIMEOUT = httpx2.Timeout(60, connect=5)
#: Answers of where the bytes are, which mean that the way there was good for a while only.
_EXPIRED = (400, 401, 403, 404, 410)
_PASSING = (408, 409, 425)
_DISABLED = "Access to this resource is disabled."


def open_hub(where: str, uri: str, kind: Kind, revision: str | None, secret: str | None, pod: Pod) -> Hub:
    """The repository of `uri`, which the field `where` of the spec names, at the commit that `revision` is now.

    Raises BadInput when address, Secret, revision or rights cannot work, Unavailable when the hub is away.
    """
    try:
        repo, path = hub_repo_of(uri, kind)
    except ValueError as error:
        raise BadInput(f"{where}.uri: {error}") from error
    place = os.environ.get(MIRROR_ENV, "").rstrip("/") or HUB
    if not is_address(place):
        raise BadInput(f"{where}.uri: {MIRROR_ENV} of the installation must be https://host or http://host")
    keys = read_secret(where, secret, pod, _SECRET_KEYS) if secret else {}
    token = keys.get("token")
    if token and not re.fullmatch(r"[!-~]+", token):
        raise BadInput(f"{where}.credentialsSecretRef: the key token of Secret {secret} holds no token: one word")
    authority = httpx2.create_ssl_context()
    if "caBundle" in keys:
        try:
            authority.load_verify_locations(cadata=keys["caBundle"])
        except (ssl.SSLError, ValueError):
            told = f"{where}.credentialsSecretRef: the key caBundle of Secret {secret} holds no certificate (PEM)"
            raise BadInput(told) from None
    client = httpx2.Client(
        verify=authority,
        headers={"User-Agent": "qlora-trainer", "Accept-Encoding": "identity"},
        timeout=_TIMEOUT,
        follow_redirects=True,
    )
    hub = Hub(where, uri, repo, path, kind, place, secret, revision or DEFAULT_REVISION, token, client)
    hub = replace(hub, revision=hub.commit())
    log.info("%s is read at commit %s (%s) from %s", uri, hub.revision, revision or DEFAULT_REVISION, place)
    return hub


class NoSuchPath(Exception):
    """The repository has nothing at a path."""


@dataclass(frozen=True)
class Hub:
    """A repository at one commit, as one field of the spec names it, read with the token that goes with it."""

    where: str
    uri: str
    repo: str
    path: str
    kind: Kind
    place: str
    secret: str | None
    revision: str
    token: str | None = field(repr=False)
    client: httpx2.Client = field(repr=False)
    #: Where the hub sends us for a file's bytes, by path: asked once per file, for the hub counts requests.
    _ways: dict[str, httpx2.URL] = field(default_factory=dict, repr=False)

    def commit(self) -> str:
        """The commit that the revision is now."""
        answer, _ = self._ask(f"{self._api}/revision/{quote(self.revision, safe='')}")
        sha = answer.get("sha") if isinstance(answer, dict) else None
        if not isinstance(sha, str) or not re.fullmatch(r"[0-9a-f]{40,64}", sha):
            raise self._no_hub()
        return sha

    def objects(self) -> dict[str, Object]:
        """What lies right below the path, by name."""
        return {name: found for name, found in self._files(self.path).items() if "/" not in name}

    def all_objects(self) -> dict[str, Object]:
        """What lies below the path at any depth, by relative name."""
        return self._files(self.path, recursive=True)

    def object_itself(self) -> Object | None:
        """What lies at the path."""
        parent, _, name = self.path.rpartition("/")
        return self._files(parent).get(name)

    def neighbours(self) -> str:
        """What lies where the path should: the quickest way to a typing error."""
        entries = self._tree(self.path.rpartition("/")[0])
        found = sorted(str(entry.get("path")).rpartition("/")[2] for entry in entries)[:8]
        return f"; beside it: {', '.join(found)}" if found else "; there is nothing beside it"

    def read(self, wanted: Object, start: int, end: int, stopping: threading.Event | None = None) -> bytes:
        """The bytes from `start` to before `end`. Raises as `ask_again`."""
        try:
            return ask_again(lambda: self._read(wanted, start, end), stopping)
        except NoSuchPath:
            told = Unavailable(f"{self._at} lists {wanted.key} at commit {self.revision[:12]} and does not have it")
        raise told

    def chunks(self, wanted: Object) -> Iterator[bytes]:
        """All bytes in order, with a few requests on their way at any time.

        Raises Unavailable after the last one when they are not those that the commit has: files in LFS are known by
        their SHA-256, others by git's digest of the blob.
        """
        in_lfs = len(wanted.etag or "") == 64
        digest = hashlib.sha256() if in_lfs else hashlib.sha1(b"blob %d\0" % wanted.bytes, usedforsecurity=False)
        for chunk in in_order(self.read, wanted):
            digest.update(chunk)
            yield chunk
        if digest.hexdigest() != wanted.etag:
            raise Unavailable(f"{self._at} sent other bytes of {wanted.key} than commit {self.revision[:12]} has")

    def _read(self, wanted: Object, start: int, end: int) -> bytes | StageError:
        """One try; what went wrong is returned."""
        at_hub = httpx2.URL(f"{self._repository}/resolve/{self.revision}/{quote(wanted.key)}")
        way = self._ways.get(wanted.key, at_hub)
        headers = {"Range": f"bytes={start}-{end - 1}"} | (self._authorization if way == at_hub else {})
        received = bytearray()
        try:
            with self.client.stream("GET", way, headers=headers) as answer:
                elsewhere = answer.url.origin != at_hub.origin
                if elsewhere and answer.status_code in _EXPIRED:
                    self._ways.pop(wanted.key, None)
                    status = f"{answer.url.host}, {answer.status_code}"
                    return Unavailable(f"{self._at} has to be asked anew where {wanted.key} is ({status})")
                if not answer.is_success:
                    return self._explained(answer)
                if answer.status_code != 206 and start:
                    return BadInput(
                        f"{self._at} sends whole files where a part is asked for: name a mirror in {MIRROR_ENV} that "
                        "knows Range"
                    )
                for part in answer.iter_bytes():
                    received += part
                    if len(received) >= end - start:
                        break
                if elsewhere:
                    self._ways[wanted.key] = answer.url
        except httpx2.RequestError as error:
            problem = error
        else:
            if len(received) >= end - start:
                return bytes(received[: end - start])
            return Unavailable(f"{self._at} sent less of {wanted.key} than there is")
        return self._unreachable(problem)

    def _files(self, path: str, *, recursive: bool = False) -> dict[str, Object]:
        found: dict[str, Object] = {}
        try:
            for entry in self._tree(path, recursive=recursive):
                if entry["type"] == "file":
                    key, lfs = str(entry["path"]), entry.get("lfs")
                    etag = str((lfs or entry)["oid"])
                    found[key.removeprefix(f"{path}/" if path else "")] = Object(key, int(entry["size"]), etag)
        except (KeyError, TypeError, ValueError):
            raise self._no_hub() from None
        return {name: found[name] for name in sorted(found)}

    def _tree(self, path: str, *, recursive: bool = False) -> list[Mapping[str, Any]]:
        """The entries of a directory at the commit; none where there is no such directory."""
        at = f"{self._api}/tree/{self.revision}/{quote(path, safe='')}".rstrip("/")
        entries: list[Mapping[str, Any]] = []
        page: str | None = f"{at}?recursive={str(recursive).lower()}&expand=false"
        while page:
            try:
                answer, page = self._ask(page)
            except NoSuchPath:
                return []
            if not isinstance(answer, list):
                raise self._no_hub()
            entries += answer
        return entries

    def _ask(self, url: str) -> tuple[Any, str | None]:
        """The JSON that is there, and where it goes on."""

        def attempt() -> tuple[Any, str | None] | StageError:
            try:
                answer = self.client.get(url, headers=self._authorization)
            except httpx2.RequestError as error:
                problem = error
            else:
                if not answer.is_success:
                    return self._explained(answer)
                try:
                    return answer.json(), self._next_page(answer)
                except ValueError:
                    return self._no_hub()
            return self._unreachable(problem)

        return ask_again(attempt)

    def _next_page(self, answer: httpx2.Response) -> str | None:
        """Mirrors may hand on the hub's own address: what goes on, goes on where it began."""
        url = answer.links.get("next", {}).get("url")
        if url is None:
            return None
        here = urlsplit(self.place)
        return urlsplit(url)._replace(scheme=here.scheme, netloc=here.netloc).geturl()

    def _explained(self, answer: httpx2.Response) -> StageError:
        """What an answer that is no success means, in words for the user. Raises NoSuchPath for that."""
        status, code = answer.status_code, answer.headers.get("X-Error-Code")
        if status == 429:
            return self._too_many(answer)
        if status >= 500 or status in _PASSING:
            return Unavailable(f"{self._at} cannot be used now ({status})")
        if code == "EntryNotFound" or (status == 404 and code is None and "/tree/" in answer.request.url.path):
            raise NoSuchPath
        if code == "RevisionNotFound":
            return BadInput(
                f"{self.where}.revision: {self.kind} {self.repo} at {self.place} has no branch, tag or commit "
                f"{self.revision}: correct it, or leave it out for the default branch"
            )
        if answer.headers.get("X-Error-Message") == _DISABLED:
            return BadInput(f"{self._at}: {self.kind} {self.repo} has been disabled on the hub: use another one")
        field = f"{self.where}.credentialsSecretRef"
        if code == "GatedRepo":
            licence = f"accept its terms at {self.place}/{self._path_of_repo}"
            if self.token:
                return BadInput(
                    f"{self._at}: {self.kind} {self.repo} is gated, and the account of the token in Secret "
                    f"{self.secret} has not been let in ({status}): {licence} with that account, or give the token of "
                    "one that was"
                )
            return BadInput(
                f"{self._at}: {self.kind} {self.repo} is gated ({status}): {licence}, and name in {field} a Secret "
                "with the key token"
            )
        if status == 401 and self.token:
            return BadInput(
                f"{field}: {self.place} does not accept the token of Secret {self.secret} (401): it is mistyped, "
                "expired or revoked; put a valid one into the key token"
            )
        if status in (401, 404):
            who = f" that the token of Secret {self.secret} may read" if self.token else " that anybody may read"
            cure = "give a token that may" if self.token else f"name in {field} a Secret with the key token"
            return BadInput(
                f"{self._at} has no {self.kind} {self.repo}{who} ({status}): check the name; if it is private or "
                f"gated, {cure}"
            )
        if status == 403 and self.token:
            return BadInput(
                f"{field}: the token of Secret {self.secret} may not read {self.kind} {self.repo} at {self.place} "
                "(403): give it the right to read that repository, and gated ones where it is one"
            )
        return BadInput(
            f"{self._at} refuses to hand out {self.kind} {self.repo} ({status}): check {MIRROR_ENV} of the "
            "installation and the repository's settings"
        )

    def _too_many(self, answer: httpx2.Response) -> Unavailable:
        limit = parse_ratelimit_headers(answer.headers)
        told = answer.headers.get("Retry-After", "")
        seconds = int(told) if told.isdigit() else limit.reset_in_seconds if limit and not limit.remaining else 0
        cure = "" if self.token else f"; with a token ({self.where}.credentialsSecretRef) more is allowed"
        when = f", again in {seconds} s" if seconds else ""
        return Unavailable(f"{self._at} takes no more requests for now (429{when}){cure}", after_seconds=seconds)

    def _unreachable(self, problem: httpx2.RequestError) -> BadInput | Unavailable:
        """What it means that there was no answer."""
        text, host = str(problem), problem.request.url.host
        at = self._at if host == urlsplit(self.place).hostname else f"{self._at} sends to {host}, which"
        if "CERTIFICATE_VERIFY_FAILED" in text:
            why = re.search(r"CERTIFICATE_VERIFY_FAILED\] certificate verify failed: ([\w ,'.-]+)", text)
            secret = f"Secret {self.secret}" if self.secret else f"a Secret named in {self.where}.credentialsSecretRef"
            return BadInput(
                f"{at} has a certificate that is not trusted ({why[1].strip() if why else 'unknown'}): put the "
                f"certificate of its authority into the key caBundle of {secret}"
            )
        why = next((meaning for sign, meaning in _NO_ANSWER if sign in text), None)
        if why is None:
            why = "no answer in time" if isinstance(problem, httpx2.TimeoutException) else "the connection failed"
        return Unavailable(f"{at} cannot be reached now ({why})")

    def _no_hub(self) -> BadInput:
        return BadInput(f"{self._at} does not answer as the hub does: check {MIRROR_ENV} of the installation")

    @property
    def _at(self) -> str:
        return f"{self.where}.uri: {self.place}"

    @property
    def _path_of_repo(self) -> str:
        return f"datasets/{self.repo}" if self.kind == "dataset" else self.repo

    @property
    def _repository(self) -> str:
        return f"{self.place}/{self._path_of_repo}"

    @property
    def _api(self) -> str:
        return f"{self.place}/api/{self.kind}s/{self.repo}"

    @property
    def _authorization(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"} if self.token else {}


_NO_ANSWER = (
    ("Name or service not known", "its name is not known"),
    ("No address associated", "its name is not known"),
    ("name resolution", "its name is not known"),
    ("refused", "connection refused"),
    ("unreachable", "no network leads there"),
    ("disconnected", "the connection was closed"),
    ("closed connection", "the connection was closed"),
    ("reset by peer", "the connection was closed"),
    ("WRONG_VERSION_NUMBER", "it does not speak https://"),
)
