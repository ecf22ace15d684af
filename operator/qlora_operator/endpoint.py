"""The certificates of the progress endpoint, kept in a Secret that all replicas share, and its address."""

from __future__ import annotations

import base64
import logging
import os
import ssl
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qlora_operator.certificates import KeyPair, is_fit, new_authority, new_server
from qlora_operator.cluster import Cluster
from qlora_operator.leadership import Replica
from qlora_operator.manifests.reporting import AUTHORITY_KEY, Endpoint
from qlora_operator.settings import Settings

log = logging.getLogger(__name__)

AUTHORITY_KEYS = (AUTHORITY_KEY, "ca.key")
SERVER_KEYS = ("tls.crt", "tls.key")


@dataclass(frozen=True)
class Certificates:
    """The authority that trainers trust, and what the server shows."""

    authority: KeyPair
    server: KeyPair

    def load_into(self, context: ssl.SSLContext) -> None:
        """Have new connections see the server's certificate. (The standard library reads it from files only.)"""
        with tempfile.TemporaryDirectory() as folder:
            certificate, key = Path(folder, "tls.crt"), Path(folder, "tls.key")
            certificate.write_text(self.server.certificate)
            os.close(os.open(key, os.O_CREAT | os.O_WRONLY, 0o600))
            key.write_text(self.server.key)
            context.load_cert_chain(certificate, key)


def hosts(service: str, namespace: str) -> tuple[str, ...]:
    """The names under which a Service is reached."""
    return tuple(f"{service}.{namespace}{suffix}" for suffix in (".svc", ".svc.cluster.local", ""))


def endpoint(settings: Settings, replica: Replica, authority: str) -> Endpoint:
    """The endpoint that stands behind the installation's Service."""
    host = hosts(settings.report_service, replica.namespace)[0]
    return Endpoint(f"https://{host}:{settings.report_port}", authority)


async def certificates(cluster: Cluster, settings: Settings, replica: Replica) -> Certificates:
    """Those in the Secret; what is missing, broken or near its end is made anew and kept there.

    Raises `ApiError`; also (409) when another replica wrote at the same moment: ask again.
    """
    now = datetime.now(UTC)
    name = f"{settings.report_service}-tls"
    there = await cluster.secret(replica.namespace, name)
    data = (there or {}).get("data") or {}
    authority, server = _pair(data, AUTHORITY_KEYS), _pair(data, SERVER_KEYS)
    names = hosts(settings.report_service, replica.namespace)
    if not is_fit(authority, now):
        log.info("making the authority of the progress endpoint")
        authority = new_authority(f"{names[0]} authority", now)
    if not is_fit(server, now, hosts=names, issuer=authority):
        log.info("making the certificate of the progress endpoint, for %s", names[0])
        server = new_server(authority, names, now)
        await cluster.put_secret(_secret(there, name, replica.namespace, authority, server))
    return Certificates(authority, server)


def _pair(data: dict[str, str], keys: Sequence[str]) -> KeyPair:
    certificate, key = (base64.b64decode(data.get(name, "")).decode(errors="replace") for name in keys)
    return KeyPair(certificate, key)


def _secret(there: Any, name: str, namespace: str, authority: KeyPair, server: KeyPair) -> dict[str, Any]:
    version = {"resourceVersion": there["metadata"]["resourceVersion"]} if there else {}
    labels = {"app.kubernetes.io/managed-by": "qlora-operator"}
    values = (authority.certificate, authority.key, server.certificate, server.key)
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "type": "Opaque",
        "metadata": {"name": name, "namespace": namespace, "labels": labels, **version},
        "data": {
            key: base64.b64encode(value.encode()).decode()
            for key, value in zip((*AUTHORITY_KEYS, *SERVER_KEYS), values, strict=True)
        },
    }
