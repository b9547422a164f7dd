"""The certificate that the gateway serves HTTPS with."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509

from stack.console import Problem
from stack.shell import ROOT

FOLDER = ROOT / "secrets" / "gateway" / "tls"
RENEW = "renew it, and put the new one there: the gateway reads it within ten seconds"


class Untrusted(Problem):
    """The gateway's certificate cannot be verified."""


def check(folder: Path = FOLDER, now: datetime | None = None) -> str:
    """For whom and until when the certificate is, in words. A Problem where it, its key or its time will not do."""
    chain, key = folder / "fullchain.pem", folder / "privkey.pem"
    for file in (chain, key):
        if file.is_symlink() and (file.readlink().is_absolute() or not within(file, folder)):
            raise Problem(
                f"{file} is a link out of its folder, where the gateway's container cannot follow it",
                f"put the file itself there: cp --remove-destination {file.readlink()} {file}",
            )
        if not file.is_file():
            raise Problem(
                f"HTTPS_PORT is set, but {file} is not there",
                "put the certificate with its chain, and its key, there; or take HTTPS_PORT out of .env",
            )
    try:
        (first, *_) = x509.load_pem_x509_certificates(chain.read_bytes())
    except ValueError:
        raise Problem(
            f"{chain} holds no certificate in PEM", "that file begins with -----BEGIN CERTIFICATE-----"
        ) from None
    try:
        # without a password it would ask at the terminal, and the gateway could ask nobody
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(chain, key, password="")
    except (ssl.SSLError, ValueError):
        raise Problem(
            f"{key} is not the key of {chain.name}, or has a password",
            "put the two there that belong together; `openssl pkey -in OLD -out privkey.pem` takes a password off",
        ) from None
    now, ends = now or datetime.now(UTC), first.not_valid_after_utc
    if now >= ends:
        raise Problem(f"the certificate in {chain} ended on {ends:%Y-%m-%d}", RENEW)
    if now < first.not_valid_before_utc:
        raise Problem(
            f"the certificate in {chain} begins on {first.not_valid_before_utc:%Y-%m-%d %H:%M} UTC",
            "is this host's clock right? If it is, wait until then",
        )
    return f"for {', '.join(names(first))}, until {ends:%Y-%m-%d}"


def within(file: Path, folder: Path) -> bool:
    """Whether what a path leads to lies in a folder."""
    return file.resolve().is_relative_to(folder.resolve())


def names(certificate: x509.Certificate) -> list[str]:
    """The names and addresses that a certificate is for; clients look at nothing else."""
    try:
        listed = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ["no name that clients accept"]
    return [str(name.value) for name in listed]


def trusted(domain: str | None) -> ssl.SSLContext:
    """Trusts the authorities that this host knows, for a domain; without one the certificate in FOLDER alone, under
    whatever name this host reaches the gateway."""
    if domain:
        return ssl.create_default_context()
    chain = FOLDER / "fullchain.pem"
    try:
        context = ssl.create_default_context(cafile=str(chain))
    except OSError:  # an ssl.SSLError too
        raise Untrusted(
            f"HTTPS_PORT is set, but {chain} cannot be read", "put the certificate there; docs/https.md says how"
        ) from None
    context.check_hostname = False
    # the first certificate of the chain is enough: its authority need not be known here
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context
