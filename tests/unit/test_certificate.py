"""A certificate that will not do is told before the gateway has it."""

import datetime as dt
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from stack import certificate
from stack.console import Problem

NOW = dt.datetime(2026, 6, 1, tzinfo=dt.UTC)


def write(folder: Path, *, key: ec.EllipticCurvePrivateKey | None = None, password: bytes | None = None) -> None:
    """A certificate of the 30 days around NOW for two names, and a key."""
    own = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "llm.example")])
    for_names = x509.SubjectAlternativeName([x509.DNSName("llm.example"), x509.DNSName("gpu-box")])
    made = (
        x509.CertificateBuilder(name, name, own.public_key(), x509.random_serial_number())
        .not_valid_before(NOW - dt.timedelta(15)).not_valid_after(NOW + dt.timedelta(15))
        .add_extension(for_names, critical=False)
        .sign(own, hashes.SHA256())
    )  # fmt: skip
    (folder / "fullchain.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    lock = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    pem = (key or own).private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, lock)
    (folder / "privkey.pem").write_bytes(pem)


def test_whom_it_is_for_and_until_when_is_told(tmp_path: Path) -> None:
    write(tmp_path)
    assert certificate.check(tmp_path, NOW) == "for llm.example, gpu-box, until 2026-06-16"


@pytest.mark.parametrize("missing", ["fullchain.pem", "privkey.pem"])
def test_a_missing_file_is_named(tmp_path: Path, missing: str) -> None:
    write(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(Problem, match=rf"HTTPS_PORT is set, but .*{missing} is not there"):
        certificate.check(tmp_path, NOW)


def test_a_file_that_is_no_certificate_is_named(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "fullchain.pem").write_bytes(b"\x30\x82 not PEM")
    with pytest.raises(Problem, match=r"fullchain.pem holds no certificate in PEM"):
        certificate.check(tmp_path, NOW)


def test_anothers_key_and_a_locked_one_are_refused(tmp_path: Path) -> None:
    for more in ({"key": ec.generate_private_key(ec.SECP256R1())}, {"password": b"secret"}):
        write(tmp_path, **more)
        with pytest.raises(Problem, match=r"is not the key of fullchain.pem, or has a password"):
            certificate.check(tmp_path, NOW)


def test_one_that_has_ended_or_not_begun_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(Problem, match=r"ended on 2026-06-16: renew it"):
        certificate.check(tmp_path, NOW + dt.timedelta(15))
    with pytest.raises(Problem, match=r"begins on 2026-05-17 00:00 UTC: is this host's clock right"):
        certificate.check(tmp_path, NOW - dt.timedelta(16))


def test_a_link_that_the_container_cannot_follow_is_refused(tmp_path: Path) -> None:
    live, folder = tmp_path / "live", tmp_path / "tls"
    live.mkdir()
    folder.mkdir()
    write(live)
    write(folder)
    for target in (live / "privkey.pem", Path("../live/privkey.pem"), Path("/nowhere"), folder / "own.pem"):
        (folder / "privkey.pem").unlink()
        (folder / "privkey.pem").symlink_to(target)
        with pytest.raises(Problem, match=r"privkey\.pem is a link out of its folder, .* cp --remove-destination"):
            certificate.check(folder, NOW)
    write(live)
    for name in ("fullchain.pem", "privkey.pem"):
        (folder / f"own-{name}").write_bytes((live / name).read_bytes())
        (folder / name).unlink()
        (folder / name).symlink_to(f"own-{name}")
    assert certificate.check(folder, NOW).startswith("for llm.example")
