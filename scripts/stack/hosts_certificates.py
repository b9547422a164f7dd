"""The fleet's own certificate authority: who is a host of this fleet, and who its gateway.

A host's certificate is for its membership, `NAME-ID`, where the id is new each time the host is added. The gateway asks
for that name, so what it no longer asks for is worth nothing: no list of revoked certificates is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

from stack.console import Problem

# Ten years: the fleet must not stop on a day that nobody has noted. `make host` ends or renews one at any time.
LIFE = timedelta(days=3650)
# Another host's clock may be late by so much.
EARLIER = timedelta(days=1)
CLIENT, SERVER = ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH


@dataclass(frozen=True)
class Pair:
    """A certificate and its private key, in PEM."""

    certificate: str
    key: str

    @property
    def ends(self) -> datetime:
        """When the certificate is no longer valid."""
        return x509.load_pem_x509_certificate(self.certificate.encode()).not_valid_after_utc


def domain(membership: str) -> str:
    """The name that a host's replicas are below: REPLICA.MEMBERSHIP.fleet is asked for by SNI."""
    return f"{membership}.fleet"


def authority(life: timedelta = 4 * LIFE) -> Pair:
    """A new authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "vllm-fleet hosts")])
    signs = x509.KeyUsage(*(False,) * 5, key_cert_sign=True, crl_sign=False, encipher_only=False, decipher_only=False)
    made = (
        _dated(life)
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(signs, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return _pem(made, key)


def for_host(of: Pair, membership: str, life: timedelta = LIFE) -> Pair:
    """What a host proves itself with. It opens no other host: it is not for clients."""
    return _signed(of, membership, [SERVER], life)


def for_gateway(of: Pair, membership: str, life: timedelta = LIFE) -> Pair:
    """What the gateway's end of the link to a host proves itself with; it also stands in for that host there."""
    return _signed(of, membership, [CLIENT, SERVER], life)


def _signed(of: Pair, membership: str, usage: list[ObjectIdentifier], life: timedelta) -> Pair:
    try:
        ca = x509.load_pem_x509_certificate(of.certificate.encode())
        signer = serialization.load_pem_private_key(of.key.encode(), None)
    except (ValueError, TypeError):
        raise Problem(
            "secrets/hosts/ca.pem or ca.key is damaged",
            "put back a copy of both; without one, remove secrets/hosts/ and add every host again",
        ) from None
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP256R1())
    made = (
        _dated(life)
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, membership)]))
        .issuer_name(ca.subject)
        .public_key(key.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usage), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(f"*.{domain(membership)}")]), critical=False)
        .sign(signer, hashes.SHA256())
    )
    return _pem(made, key)


def _dated(life: timedelta) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - EARLIER)
        .not_valid_after(now + life)
    )


def _pem(made: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> Pair:
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return Pair(made.public_bytes(pem).decode(), private.decode())


def read(folder: Path) -> Pair | None:
    """The authority that lies in a folder; None where there is none."""
    certificate, key = folder / "ca.pem", folder / "ca.key"
    if not key.exists():
        return None
    return Pair(certificate.read_text(), key.read_text())
