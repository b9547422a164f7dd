"""`make user`: users, signing keys and identity providers, as commands."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm
from typer.testing import CliRunner, Result

import user
from access.store import Secrets
from access.tokens import TokenStore, new_jwk
from access.users import Doorman, UserStore, from_environment
from stack import access, settings
from stack.console import Problem

PASSWORD = "four words that fit together"


@pytest.fixture
def secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Secrets:
    folder = Secrets(tmp_path / "secrets")
    monkeypatch.setattr(user, "SECRETS", folder)
    monkeypatch.setattr(access, "SECRETS", folder)
    monkeypatch.setattr(settings, "with_users", dict[str, str])
    return folder


def make_user(args: str, stdin: str | bytes = f"{PASSWORD}\n") -> Result:
    """What `make user ARGS='…'` does with this in its standard input."""
    return CliRunner().invoke(user.app, shlex.split(args), stdin)


def test_a_user_is_added_with_a_password_from_the_standard_input(secrets: Secrets) -> None:
    done = make_user("add alice --role admin")
    assert done.exit_code == 0
    assert PASSWORD not in done.output
    found = Doorman(UserStore(secrets).read()).lets_in("alice", PASSWORD)
    assert found
    assert found.role == "admin"
    # with the first user comes what signs, so that the gateway can check tokens
    (own,) = json.loads(secrets.issuers.read_text())["issuers"]
    assert own["algorithms"] == ["ES256"]
    before = secrets.signing.read_bytes()
    assert make_user("add bob").exit_code == 0
    assert secrets.signing.read_bytes() == before
    listed = make_user("list").output
    assert re.search(r"alice\s+admin\s+make user", listed)
    assert re.search(r"bob\s+user\s+make user", listed)


def test_a_user_can_be_changed_and_taken_out(secrets: Secrets) -> None:
    make_user("add alice")
    assert make_user("role alice admin").exit_code == 0
    assert make_user("password alice", "entirely other words now\n").exit_code == 0
    door = Doorman(UserStore(secrets).read())
    assert door.lets_in("alice", PASSWORD) is None
    assert door.lets_in("alice", "entirely other words now")
    assert "end within 30 minutes" in make_user("remove alice").output
    assert UserStore(secrets).read().users == []


def test_a_hash_is_what_the_environment_takes(secrets: Secrets) -> None:
    text = make_user("hash").stdout.strip()
    (found,) = from_environment({"USER_LIST": "A", "A_USERNAME": "alice", "A_HASHED_PASSWORD": text})
    assert found.password == text
    assert not secrets.folder.exists()


def test_the_environments_users_and_key_are_taken_once(secrets: Secrets, monkeypatch: pytest.MonkeyPatch) -> None:
    text = make_user("hash").stdout.strip()
    values = {"USER_LIST": "A", "A_USERNAME": "alice", "A_HASHED_PASSWORD": text}
    values |= {"JWT_KEY": "gN3k0VhJ7y2Qm9LxTz5RbWc8EfUaPs1DoIi4", "ACCESS_TOKEN_EXPIRE_MINUTES": "5"}
    monkeypatch.setattr(settings, "with_users", lambda: values)
    access.take_environment()
    signing = TokenStore(secrets).signing()
    assert (signing.minutes, [key.algorithm for key in signing.keys]) == (5, ["HS256"])
    files = {path: path.read_bytes() for path in (secrets.users, secrets.signing, secrets.issuers, secrets.audit)}
    access.take_environment()
    assert {path: path.read_bytes() for path in files} == files
    monkeypatch.setattr(settings, "with_users", lambda: values | {"JWT_KEY": "weak"})
    for look in (access.check_environment, access.take_environment):
        with pytest.raises(Problem, match="JWT_KEY has 4 bytes"):
            look()
    access.check_users()


def test_without_users_nothing_is_made_and_the_service_has_nothing_to_do(secrets: Secrets) -> None:
    access.take_environment()
    assert not secrets.folder.exists()
    with pytest.raises(Problem, match="no user who could sign in: make user"):
        access.check_users()


def test_signing_keys_and_identity_providers_come_and_go(secrets: Secrets, tmp_path: Path) -> None:
    make_user("add alice")
    assert make_user("signing-key --algorithm RS256 --overlap 0s").exit_code == 0
    file = tmp_path / "jwks.json"
    # as providers publish them: with members of their own, and keys for something else
    key = new_jwk("RS256") | {"x5c": ["MII"], "issuer": "https://id.example"}
    others = [new_jwk("ES256"), new_jwk("RS256") | {"use": "enc"}, {"kty": "RSA", "alg": "RS512"}, {"kty": "other"}, 7]
    file.write_text(json.dumps({"keys": [*others, key]}))
    trust = "trust https://id.example --audience fleet --algorithm RS256"
    assert make_user(f"{trust} --keys {file}").exit_code == 0
    assert "https://id.example" in make_user("issuers").output
    (_, provider) = TokenStore(secrets).issuers().issuers
    assert provider.keys == [{name: key[name] for name in ("kty", "kid", "alg", "use", "n", "e")}]
    assert make_user(f"{trust} --keys https://id.example/keys --name-claim email").exit_code == 0
    (_, other) = TokenStore(secrets).issuers().issuers
    assert (other.keys, other.jwks_uri, other.name_claim) == ([], "https://id.example/keys", "email")
    assert make_user("distrust https://id.example").exit_code == 0
    assert [one.issuer for one in TokenStore(secrets).issuers().issuers] == ["vllm-fleet"]


def test_a_providers_keys_of_other_curves_are_passed_over(secrets: Secrets, tmp_path: Path) -> None:
    file = tmp_path / "jwks.json"
    key = new_jwk("ES256")
    larger = ECAlgorithm.to_jwk(ec.generate_private_key(ec.SECP384R1()).public_key(), as_dict=True)
    file.write_text(json.dumps({"keys": [larger, {"kty": "EC", "kid": "no curve"}, key]}))
    assert make_user(f"trust https://id.example --audience fleet --algorithm ES256 --keys {file}").exit_code == 0
    (provider,) = TokenStore(secrets).issuers().issuers
    assert [one["kid"] for one in provider.keys] == [key["kid"]]


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff",
        b'{"keys": 5}',
        b'{"keys": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"keys": [{"kty": ["RSA"]}]}',
        b'{"keys": [{"kty": "RSA"}]}',
        b'{"keys": [{"kty": "RSA", "n": [], "e": {}}]}',
    ],
)
def test_a_file_that_is_no_jwks_is_said_to_be_none(secrets: Secrets, tmp_path: Path, text: bytes) -> None:
    file = tmp_path / "jwks.json"
    file.write_bytes(text)
    done = make_user(f"trust x --audience a --algorithm RS256 --keys {file}")
    assert done.exit_code == 1
    assert isinstance(done.exception, SystemExit)
    assert re.search("is no JWKS|has no key for RS256|is no key of kind RSA", done.stderr.replace("\n", " "))
    assert not secrets.issuers.exists()


@pytest.mark.parametrize("command", ["add bob", "hash", "password alice"])
def test_a_password_that_is_no_utf8_is_said_to_be_none(secrets: Secrets, command: str) -> None:
    make_user("add alice")
    done = make_user(command, b"four words that f\xe4llt together\n")
    assert isinstance(done.exception, SystemExit)
    assert "the password is not UTF-8" in done.stderr
    assert Doorman(UserStore(secrets).read()).lets_in("alice", PASSWORD)


@pytest.mark.parametrize(
    ("args", "stdin", "says"),
    [
        ("add bob", "", "no password came"),
        ("add bob", "short\n", "the password has 5 characters"),
        ("add Bob", f"{PASSWORD}\n", "name: it begins with a small letter"),
        ("add alice", f"{PASSWORD}\n", "there is a user alice already"),
        ("password bob", f"{PASSWORD}\n", "there is no user bob"),
        ("role bob admin", "", "there is no user bob"),
        ("remove bob", "", "there is no user bob"),
        ("signing-key --algorithm none", "", "Invalid value for '--algorithm'"),
        ("signing-key --overlap long", "", "'long' is no span of time"),
        ("signing-key --overlap 999999999w", "", "'999999999w' is after the year 9999"),
        ("trust x --audience a --algorithm RS256 --keys /dev/null", "", "/dev/null is no file"),
        ("trust x --audience a --algorithm HS256 --keys /dev/null", "", "HS256 has no public key"),
        ("trust x --audience a --algorithm HS256 --keys https://x/y", "", "HS256 has no public key"),
        ("trust x --audience a --algorithm rs256 --keys https://x/y", "", "algorithms[0]: Input should be 'HS256'"),
        ("trust x --audience a --algorithm RS256 --keys /nowhere/x", "", "/nowhere/x: No such file"),
        ("trust x --audience a --algorithm RS256 --keys http://x.example/y", "", "jwks_uri: it has to be https"),
        ("distrust x", "", "takes no tokens of x"),
    ],
)
def test_a_mistake_is_named_and_changes_nothing(secrets: Secrets, args: str, stdin: str, says: str) -> None:
    make_user("add alice")
    files = {path: path.read_bytes() for path in (secrets.users, secrets.signing, secrets.issuers, secrets.audit)}
    done = make_user(args, stdin)
    assert done.exit_code != 0
    assert says in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.output
    assert {path: path.read_bytes() for path in files} == files
