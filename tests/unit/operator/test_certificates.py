"""The progress endpoint's certificates: trusted by who knows the authority, and renewed in time."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509

from qlora_operator.certificates import AUTHORITY_LIFE, SERVER_LIFE, KeyPair, is_fit, new_authority, new_server
from qlora_operator.endpoint import hosts

NOW = datetime.now(UTC)
HOSTS = hosts("reports", "qlora-system")
AUTHORITY = new_authority("test", NOW)
SERVER = new_server(AUTHORITY, HOSTS, NOW)


def test_the_server_is_named_as_trainers_call_it() -> None:
    names = SERVER.parsed.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert "reports.qlora-system.svc" in names.get_values_for_type(x509.DNSName)
    assert "PRIVATE KEY" not in SERVER.certificate


def test_what_is_fresh_is_kept() -> None:
    assert is_fit(AUTHORITY, NOW)
    assert is_fit(SERVER, NOW, hosts=HOSTS, issuer=AUTHORITY)


@pytest.mark.parametrize(
    ("pair", "life"), [(AUTHORITY, AUTHORITY_LIFE), (SERVER, SERVER_LIFE)], ids=["authority", "server"]
)
def test_a_third_before_its_end_it_is_renewed(pair: KeyPair, life: timedelta) -> None:
    issuer = AUTHORITY if pair is SERVER else None
    assert is_fit(pair, NOW + life * 0.65, hosts=HOSTS, issuer=issuer)
    assert not is_fit(pair, NOW + life * 0.67, hosts=HOSTS, issuer=issuer)


def test_what_cannot_serve_is_made_anew() -> None:
    assert not is_fit(KeyPair("", ""), NOW)
    assert not is_fit(KeyPair("-----BEGIN CERTIFICATE-----\nnone\n", ""), NOW)
    assert not is_fit(SERVER, NOW, hosts=HOSTS, issuer=new_authority("another", NOW)), "signed by another"
    assert not is_fit(SERVER, NOW, hosts=hosts("reports", "elsewhere"), issuer=AUTHORITY), "for other names"
    assert not is_fit(SERVER, NOW - timedelta(days=1), hosts=HOSTS, issuer=AUTHORITY), "not valid yet"


def test_an_authority_signs_no_other_authority() -> None:
    constraints = AUTHORITY.parsed.extensions.get_extension_for_class(x509.BasicConstraints).value
    assert (constraints.ca, constraints.path_length) == (True, 0)
    assert not SERVER.parsed.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
