"""Looks at who gets in: keys, tokens, the files of secrets/, and the certificate."""

from __future__ import annotations

import socket
import ssl
import stat
import time
from datetime import datetime, timedelta
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

import psutil
from cryptography import x509

from access.keys import KeyStore
from access.tokens import TokenStore, own
from access.users import UserStore
from diagnosis.findings import Found, now
from diagnosis.seen import Seen
from stack import certificate, settings
from stack.access import SECRETS, asks_for_keys

# A certificate that ends sooner is named, and is wrong when that is near. An authority's is renewed a month before.
NAMED, NEAR, RENEWED = timedelta(days=30), timedelta(days=7), timedelta(days=21)
HANDSHAKE_S = 5
OTHERS = stat.S_IRWXG | stat.S_IRWXO


def look_at_keys(seen: Seen, found: Found) -> str:
    """Who is asked for a key, which have ended, and who may read the files."""
    wanted = seen.wanted
    if wanted.gateway_auth == "off" and not wanted.bind_address.is_loopback:
        reach = public_addresses(wanted.bind_address)
        what = f"it asks nobody for a key (GATEWAY_AUTH=off) at {wanted.bind_address}"
        if reach:
            found.wrong("gateway", f"{what}, which the internet reaches as {reach[0]}: anybody may use the models",
                        "take GATEWAY_AUTH=off out of .env, then `make up`")  # fmt: skip
        else:
            fix = "right where you trust all of that network; else take GATEWAY_AUTH=off out of .env, then `make up`"
            found.note("gateway", f"{what}, so whoever reaches it may use the models", fix)
    keys = found.check("keys", KeyStore(SECRETS).read)
    look_at_files(found)
    asked = "asked of everybody" if asks_for_keys(wanted) else "asked of nobody"
    if keys is None:
        return ""
    if asks_for_keys(wanted) and not keys.keys and not SECRETS.issuers.exists():
        found.wrong("keys", "the gateway asks for a key, and there is none", "make key ARGS='create NAME --role admin'")
    ended = [key for key in keys.keys if key.ended(time.time())]
    for key in ended:
        since = datetime.fromtimestamp(key.expires or 0, now().tzinfo)
        fix = f"make key ARGS='revoke {key.name}', or give it a later end: make key ARGS='set {key.name} --expires 30d'"
        found.note(key.name, "this key has expired", fix, since)
    return f"{asked}; {len(keys.keys)} keys, {len(ended)} expired"


def public_addresses(bound: IPv4Address | IPv6Address) -> list[str]:
    """Those addresses of this host, among those that are bound, that are not of a private network."""
    if not bound.is_unspecified:
        return [str(bound)] if bound.is_global else []
    own_addresses = [one.address.partition("%")[0] for each in psutil.net_if_addrs().values() for one in each
                     if one.family in (socket.AF_INET, socket.AF_INET6)]  # fmt: skip
    return [one for one in own_addresses if ip_address(one).is_global]


def look_at_files(found: Found) -> None:
    """Notes files with secrets that others may read, and those that the containers may not."""
    folder = SECRETS.folder
    inside = [path for path in (SECRETS.keys, SECRETS.issuers, SECRETS.users, SECRETS.signing) if path.exists()]
    if inside and folder.stat().st_mode & OTHERS:
        found.wrong("secrets/", "other users of this host may look into it", f"chmod 700 {folder.name}")
    if SECRETS.audit.exists() and SECRETS.audit.stat().st_mode & OTHERS:
        found.wrong("secrets/audit.jsonl", "other users of this host may read it", "chmod 600 secrets/audit.jsonl")
    for path in inside:
        if not path.stat().st_mode & stat.S_IROTH or not path.parent.stat().st_mode & stat.S_IXOTH:
            name = path.relative_to(folder.parent)
            found.wrong(str(name), "the container that needs it may not read it", f"chmod a+rX {name.parent} {name}")
    if named := settings.value_of("HF_TOKEN_FILE"):
        token = Path(named).expanduser()
        if not token.is_file():
            found.note(
                "HF_TOKEN_FILE", f"{named} is not there", "correct HF_TOKEN_FILE in .env, or put the token there"
            )
        elif token.stat().st_mode & OTHERS:
            found.wrong("HF_TOKEN_FILE", f"other users of this host may read {named}", f"chmod 600 {named}")


def look_at_tokens(seen: Seen, found: Found) -> str:
    """Whether users can sign in at the token service, and the gateway takes what it signs."""
    if "tokens" not in seen.config.services:
        return "the token service is not started (COMPOSE_PROFILES=tokens)"
    users = found.check("users", UserStore(SECRETS).read)
    signing = found.check("tokens", TokenStore(SECRETS).signing)
    issuers = found.check("tokens", TokenStore(SECRETS).issuers)
    if users is None or signing is None or issuers is None:
        return ""
    if not signing.keys:
        found.wrong("tokens", "nothing signs them, so nobody can sign in", "`make up` makes what signs")
    elif own(signing) not in issuers.issuers:
        found.wrong("tokens", "the gateway would refuse what the service signs", "`make up` mends it")
    return f"{len(users.users)} users may sign in"


def look_at_certificate(seen: Seen, found: Found) -> str:
    """Until when the certificate is that clients get, and whether the files will do."""
    wanted = seen.wanted
    if not wanted.https_port:
        return "no HTTPS: HTTPS_PORT is not set"
    by_authority = wanted.https_domain is not None
    words = "" if by_authority else found.check("certificate", certificate.check)
    served = handshake(seen)
    if served is None:
        return words or "the gateway serves none now"
    left = served.not_valid_after_utc - now()
    ends = f"it ends on {served.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
    renewing = f"{seen.compose.line('logs', 'acme')} says why it is not renewed"
    fix = renewing if by_authority else certificate.RENEW
    if left <= (RENEWED if by_authority else NEAR):
        found.wrong("certificate", ends if left > timedelta() else ends.replace("ends", "ended"), fix)
    elif left <= NAMED and not by_authority:
        found.note("certificate", ends, fix)
    return f"for {', '.join(certificate.names(served))}, until {served.not_valid_after_utc:%Y-%m-%d}"


def handshake(seen: Seen) -> x509.Certificate | None:
    """The certificate that the gateway gives to clients; None where it gives none."""
    wanted = seen.wanted
    context = ssl.create_default_context()
    # it is read, not trusted
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    host = wanted.url.removeprefix("https://").removesuffix(f":{wanted.https_port}").strip("[]")
    try:
        with (
            socket.create_connection((host, wanted.https_port or 443), HANDSHAKE_S) as plain,
            context.wrap_socket(plain, server_hostname=wanted.https_domain or host) as secure,
        ):
            given = secure.getpeercert(binary_form=True)
    except OSError:
        return None
    return x509.load_der_x509_certificate(given) if given else None
