"""Users: their passwords, where they come from, and that nobody learns who there is."""

from __future__ import annotations

import json
import re
import statistics
import time
from pathlib import Path

import argon2
import pytest

from access.store import Mistake, Secrets
from access.users import HASHER, Doorman, User, Users, UserStore, from_environment, hashed

PASSWORD = "four words that fit together"
# as cheap as is allowed, so that tests are quick
CHEAP = argon2.PasswordHasher(time_cost=2, memory_cost=19 * 1024, parallelism=1)
HASH = CHEAP.hash(PASSWORD)
ALICE = {"USER_LIST": "ALICE", "ALICE_USERNAME": "alice", "ALICE_HASHED_PASSWORD": HASH}


@pytest.fixture
def secrets(tmp_path: Path) -> Secrets:
    return Secrets(tmp_path / "secrets")


def test_a_password_lets_its_user_in_and_nobody_else() -> None:
    door = Doorman(Users(users=[User(name="alice", password=HASH, role="admin")]))
    user = door.lets_in("alice", PASSWORD)
    assert user
    assert (user.name, user.role) == ("alice", "admin")
    assert door.lets_in("alice", PASSWORD + " ") is None
    assert door.lets_in("Alice", PASSWORD) is None
    assert door.lets_in("bob", PASSWORD) is None
    assert door.lets_in("alice", "\ud800") is None
    assert Doorman(Users()).lets_in("alice", PASSWORD) is None


def test_an_unknown_name_takes_as_long_as_a_known_one() -> None:
    """Also with hashes that cost more than ours."""
    dear = argon2.PasswordHasher(time_cost=6, memory_cost=19 * 1024, parallelism=1).hash(PASSWORD)
    door = Doorman(Users(users=[User(name="alice", password=dear)]))

    def took(name: str) -> float:
        began = time.process_time()
        assert door.lets_in(name, "wrong") is None
        return time.process_time() - began

    known = statistics.median(took("alice") for _ in range(7))
    unknown = statistics.median(took(f"nobody{number}") for number in range(7))
    assert 0.5 < unknown / known < 2


def test_each_hash_has_a_salt_of_its_own_and_is_argon2id() -> None:
    first, second = hashed(PASSWORD), hashed(PASSWORD)
    assert first != second
    assert first.startswith("$argon2id$")
    assert HASHER.verify(second, PASSWORD)


@pytest.mark.parametrize(
    ("password", "says"),
    [
        ("short", "has 5 characters: take one of at least 15"),
        ("a" * 40, "easy to guess"),
        ("abababababababababab", "easy to guess"),
        ("alice-is-my-name", "easy to guess"),
        ("ab cdefg" * 200, "too long"),
    ],
)
def test_a_weak_password_is_refused_without_being_shown(password: str, says: str) -> None:
    with pytest.raises(Mistake, match=says) as refused:
        hashed(password, "alice")
    assert password not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (PASSWORD, "it is no argon2 hash"),
        ("$2b$12$abcdefghijklmnopqrstuv", "it is no argon2 hash"),
        (argon2.PasswordHasher(type=argon2.Type.I).hash("x"), "argon2, but not argon2id"),
        (argon2.PasswordHasher(memory_cost=1024).hash("x"), "KiB of memory are 1024, not 19456 to 131072"),
        (HASH.replace("m=19456", "m=4194304"), "KiB of memory are 4194304"),
        (HASH.replace("t=2", "t=1"), "rounds are 1, not 2 to 10"),
        (HASH.replace("p=1", "p=64"), "threads are 64"),
        (argon2.PasswordHasher(salt_len=8).hash("x"), "salt has less than 16 bytes"),
        (argon2.PasswordHasher(hash_len=16).hash("x"), "hash less than 32"),
    ],
    # salts differ from run to run
    ids=range(9),
)
def test_a_hash_that_is_weak_or_dear_is_refused_by_its_variable(text: str, says: str) -> None:
    with pytest.raises(Mistake, match=rf"^ALICE_HASHED_PASSWORD: .*{says}") as refused:
        from_environment(ALICE | {"ALICE_HASHED_PASSWORD": text})
    assert text not in str(refused.value)


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"USER_LIST": "alice"}, "USER_LIST: 'alice' is no alias"),
        ({"USER_LIST": "ALICE"}, "USER_LIST has ALICE, but ALICE_USERNAME is not set"),
        ({"USER_LIST": "ALICE", "ALICE_USERNAME": "a"}, "but ALICE_HASHED_PASSWORD is not set"),
        (ALICE | {"ALICE_ROLE": "root"}, "^ALICE_ROLE: Input should be 'user' or 'admin'"),
        (ALICE | {"ALICE_USERNAME": "Alice A"}, "^ALICE_USERNAME: it begins with a small letter"),
        (
            ALICE | {"USER_LIST": "ALICE,BOB", "BOB_USERNAME": "alice", "BOB_HASHED_PASSWORD": HASH},
            "two users have the name alice",
        ),
    ],
)
def test_a_mistake_in_the_environment_is_named_by_its_variable(environment: dict[str, str], says: str) -> None:
    with pytest.raises(Mistake, match=says):
        from_environment(environment)


def test_users_of_the_environment_come_and_go_with_it(secrets: Secrets) -> None:
    store = UserStore(secrets)
    store.take({})
    assert not secrets.users.exists()
    store.take(ALICE)
    store.add("bob", PASSWORD, "user")
    store.take(ALICE | {"ALICE_ROLE": "admin"})
    roles = {user.name: user.role for user in store.read().users}
    assert roles == {"alice": "admin", "bob": "user"}
    before = secrets.users.read_bytes()
    store.take(ALICE | {"ALICE_ROLE": "admin"})
    assert secrets.users.read_bytes() == before
    store.take({})
    assert [user.name for user in store.read().users] == ["bob"]
    actions = [json.loads(line)["action"] for line in secrets.audit.read_text().splitlines()]
    assert actions == ["user.add", "user.add", "user.set", "user.remove"]


def test_one_name_is_one_user_wherever_it_comes_from(secrets: Secrets) -> None:
    store = UserStore(secrets)
    store.add("alice", PASSWORD, "user")
    with pytest.raises(Mistake, match="USER_LIST names alice"):
        store.take(ALICE)
    with pytest.raises(Mistake, match=r"there is a user alice already.*password alice"):
        store.add("alice", PASSWORD, "user")
    store.remove("alice")
    store.take(ALICE)
    with pytest.raises(Mistake, match="alice comes from USER_LIST: change it in"):
        store.set("alice", role="admin")


def test_another_password_ends_the_old_one_and_stands_nowhere(secrets: Secrets) -> None:
    store = UserStore(secrets)
    store.add("alice", PASSWORD, "user")
    store.set("alice", password="entirely other words now", role="admin")
    door = Doorman(store.read())
    assert door.lets_in("alice", PASSWORD) is None
    assert door.lets_in("alice", "entirely other words now")
    written = "".join(path.read_text() for path in secrets.folder.rglob("*") if path.is_file())
    assert PASSWORD not in written
    assert "argon2id" not in secrets.audit.read_text()
    with pytest.raises(Mistake, match="there is no user bob"):
        store.remove("bob")


def test_a_file_with_a_mistake_shows_no_hash(secrets: Secrets) -> None:
    store = UserStore(secrets)
    store.add("alice", PASSWORD, "user")
    text = secrets.users.read_text()
    secrets.users.write_text(re.sub(r"argon2id", "argon2planted", text))
    with pytest.raises(Mistake, match=r"users\.json: users\[0\]\.password: it is no argon2 hash") as refused:
        store.read()
    assert "planted" not in str(refused.value)
