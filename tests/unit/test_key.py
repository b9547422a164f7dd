"""`make key`, and the store of keys behind it."""

from __future__ import annotations

import collections
import json
import multiprocessing
import os
import re
import shlex
import stat
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule
from typer.testing import CliRunner, Result

import key
from access import keys
from access.keys import Keys, KeyStore, Limits, sha256
from access.store import MAX_BYTES, MAX_NUMBER, Mistake, Secrets
from stack import access, settings
from stack.console import Problem
from stack.gateway import Gateway, Replica

NOW = 1_800_000_000.0


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Secrets:
    """An empty folder of secrets, and no fleet."""
    secrets = Secrets(tmp_path / "secrets")
    monkeypatch.setattr(key, "SECRETS", secrets)
    monkeypatch.setattr(key, "running_files", list)
    monkeypatch.setattr(Gateway, "replicas", nobody)
    monkeypatch.setattr(settings, "ENV_FILE", tmp_path / ".env")
    monkeypatch.setattr(settings, "value_of", lambda _: None)
    return secrets


def nobody(_: Gateway) -> list[Replica]:
    raise Problem("no gateway", "start it")


def make_key(args: str) -> Result:
    """What `make key ARGS='…'` does; the result's `stdout` and `stderr` are told apart."""
    return CliRunner().invoke(key.app, shlex.split(args))


def created(args: str) -> str:
    """The key that a command printed."""
    done = make_key(args)
    assert done.exit_code == 0, done.stderr
    assert re.fullmatch(r"sk-fleet-[\w-]{43}\n", done.stdout)
    return done.stdout.strip()


def test_a_key_is_shown_once_and_kept_as_a_hash(folder: Secrets) -> None:
    secret = created(
        "create alice --models a,b --rpm 60 --tpm 100000 --expires 30d --priority batch --end-users --note 'of us'"
    )
    assert secret not in "".join(path.read_text() for path in folder.folder.rglob("*.json*"))
    (one,) = json.loads(folder.keys.read_text())["keys"]
    assert one["hashes"] == [{"sha256": sha256(secret), "until": None}]
    assert one["models"] == ["a", "b"]
    assert one["limits"] == {"requests_per_minute": 60, "tokens_per_minute": 100_000}
    assert (one["role"], one["priority"], one["end_users"], one["note"]) == ("user", 10, True, "of us")
    assert one["expires"] - one["created"] == pytest.approx(30 * 86400, abs=5)
    assert secret not in make_key("list").output + make_key("show alice").output


def test_a_file_has_every_field_that_the_gateway_reads(folder: Secrets) -> None:
    created("create alice")
    data = json.loads(folder.keys.read_text())
    assert set(data) == {"version", "keys", "roles", "end_users"}
    assert data["roles"] == {"user": {"limits": {}}, "admin": {"limits": {}}}
    assert set(data["keys"][0]) == {
        *("id", "name", "hashes", "role", "models", "limits", "priority", "end_users", "expires", "created", "note")
    }
    assert data["keys"][0]["models"] is data["keys"][0]["expires"] is None


def test_other_users_of_this_host_are_kept_out_and_the_containers_let_in(folder: Secrets) -> None:
    old = os.umask(0o077)
    try:
        created("create alice")
    finally:
        os.umask(old)

    def mode(path: Path) -> int:
        return stat.S_IMODE(path.stat().st_mode)

    assert mode(folder.folder) == 0o700
    assert mode(folder.keys.parent) == 0o755
    assert mode(folder.keys) == 0o644
    assert mode(folder.audit) == 0o600
    folder.folder.chmod(0o755)
    created("create bob")
    assert mode(folder.folder) == 0o700


def test_both_keys_work_through_the_overlap_and_the_old_one_ends_on_time(folder: Secrets) -> None:
    now = NOW
    store = KeyStore(folder, lambda: now)
    first = store.create("alice")
    second = store.rotate("alice", 3600)
    assert [bool(store.read().holder(one, NOW + 3599.9)) for one in (first, second)] == [True, True]
    assert [bool(store.read().holder(one, NOW + 3600)) for one in (first, second)] == [False, True]
    now = NOW + 60
    third = store.rotate("alice", 0)
    assert [bool(store.read().holder(one, now)) for one in (first, second, third)] == [False, False, True]


def test_a_rotation_never_lengthens_an_earlier_overlap(folder: Secrets) -> None:
    store = KeyStore(folder, lambda: NOW)
    first = store.create("alice")
    store.rotate("alice", 60)
    store.rotate("alice", 3600)
    assert store.read().holder(first, NOW + 59)
    assert not store.read().holder(first, NOW + 60)


def test_endless_rotation_is_refused_and_goes_on_once_the_old_keys_have_ended(folder: Secrets) -> None:
    now = NOW
    store = KeyStore(folder, lambda: now)
    store.create("alice")
    for _ in range(keys.MAX_HASHES - 1):
        store.rotate("alice", 60)
    with pytest.raises(Mistake, match="all those keys still work"):
        store.rotate("alice", 60)
    now += 61
    store.rotate("alice", 60)
    assert len(store.read().find("alice").hashes) == 2


def test_a_revoked_key_is_gone_and_the_audit_remembers(folder: Secrets) -> None:
    secret = created("create alice")
    created("rotate alice --overlap 1h")
    assert make_key("revoke alice").exit_code == 0
    assert KeyStore(folder).read().holder(secret, NOW) is None
    assert json.loads(folder.keys.read_text())["keys"] == []
    lines = [json.loads(line) for line in folder.audit.read_text().splitlines()]
    assert [line["action"] for line in lines] == ["key.create", "key.rotate", "key.revoke"]
    assert {line["name"] for line in lines} == {"alice"}
    assert all(line["who"] and re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+Z", line["time"]) for line in lines)
    assert "sha256" not in folder.audit.read_text()


def test_what_changed_stands_in_the_audit(folder: Secrets) -> None:
    created("create alice --rpm 60 --tpm 5")
    assert make_key("set alice --rpm none --max-n 0 --models a").exit_code == 0
    line = json.loads(folder.audit.read_text().splitlines()[-1])
    assert line["before"] == {
        "models": None,
        "limits": {"requests_per_minute": 60, "tokens_per_minute": 5},
    }
    assert line["after"] == {"models": ["a"], "limits": {"tokens_per_minute": 5, "n": 0}}


def test_a_change_that_the_audit_cannot_hold_does_not_happen(folder: Secrets) -> None:
    created("create alice")
    before = folder.keys.read_bytes()
    folder.audit.unlink()
    folder.audit.mkdir()
    done = make_key("create bob")
    assert done.exit_code == 1
    assert "audit.jsonl" in done.stderr
    assert folder.keys.read_bytes() == before


def test_what_is_not_named_stays_as_it_was(folder: Secrets) -> None:
    created("create alice --models a --rpm 60 --note x --expires 30d")
    before = KeyStore(folder).read().find("alice")
    assert make_key("set alice --tpm 7").exit_code == 0
    after = KeyStore(folder).read().find("alice")
    assert after.limits == before.limits.changed({"tokens_per_minute": 7})
    assert after.model_dump(exclude={"limits"}) == before.model_dump(exclude={"limits"})
    assert make_key("set alice --models all --expires never").exit_code == 0
    assert (KeyStore(folder).read().find("alice").models, KeyStore(folder).read().find("alice").expires) == (None, None)


def test_a_keys_own_limit_wins_over_its_roles_and_a_zero_is_a_limit(folder: Secrets) -> None:
    created("create alice --rpm 0")
    assert make_key("limits --role user --rpm 60 --tpm 5").exit_code == 0
    assert make_key("limits --end-users --tpm 3").output == "tpm 3\n"
    data = KeyStore(folder).read()
    assert data.in_force(data.find("alice")) == Limits(requests_per_minute=0, tokens_per_minute=5)
    assert data.end_users.limits == Limits(tokens_per_minute=3)
    assert data.roles.admin.limits == Limits()
    assert make_key("limits --role user --rpm none").output == "tpm 5\n"


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ("create alice", "there is a key alice already.*rotate alice"),
        ("create Bob", "name: it begins with a small letter"),
        ("create sk-fleet-abc", "name: it has sk-fleet- in it"),
        (f"create {'b' * 65}", "name: it begins with a small letter"),
        ("create bob --rpm many", "--rpm many: that is no number"),
        ("create bob --rpm -1", "--rpm -1: that is no number"),
        (f"create bob --tpm {MAX_NUMBER + 1}", "limits.tokens_per_minute: Input should be less than"),
        ("create bob --expires 2001-01-01", "bob would have expired already"),
        ("create bob --expires 0d", "bob would have expired already"),
        ("create bob --expires soon", "'soon' is no time"),
        ("create bob --expires 3y", "'3y' is no span of time"),
        ("create bob --models ,", "--models names none"),
        ("create bob --priority high", "--priority high is no lane"),
        ("create bob --priority 5000", "priority: Input should be less than"),
        ("create bob --note 'sk-fleet-abc'", "note: it has sk-fleet- in it"),
        (f"create bob --note {'x' * 201}", "note: String should have at most 200"),
        ("rotate bob", "there is no key bob.*ARGS=list"),
        ("rotate alice --overlap 1", "'1' is no span of time"),
        ("revoke bob", "there is no key bob"),
        ("show bob", "there is no key bob"),
        ("set bob --rpm 1", "there is no key bob"),
        ("set alice", "nothing to change for alice"),
        ("set alice --expires 2001-01-01", "alice would have expired already"),
        ("limits --rpm 1", "whose limits"),
        ("limits --role user --end-users", "whose limits"),
        ("create bob --models all,foo", "--models names all and others"),
        ("create bob --expires 999999999d", "'999999999d' is after the year 9999"),
        ("create bob --expires 9999-12-31T23:59:59-12:00", "is after the year 9999"),
        ("set alice --expires 999999999w", "is after the year 9999"),
        ("rotate alice --overlap 999999999w", "'999999999w' is after the year 9999"),
        ("create bob --rps 3", "No such option: --rps"),
        ("create bob --role root", "Invalid value for '--role'"),
    ],
)
def test_a_mistake_is_named_and_changes_nothing(folder: Secrets, args: str, says: str) -> None:
    created("create alice")
    before = folder.keys.read_bytes(), folder.audit.read_bytes()
    done = make_key(args)
    assert done.exit_code != 0
    assert re.search(says, done.stderr.replace("\n", " "))
    assert "Traceback" not in done.output
    assert done.stdout == ""
    assert (folder.keys.read_bytes(), folder.audit.read_bytes()) == before


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda data: data | {"version": 2}, "version: Input should be 1"),
        (lambda data: data | {"users": []}, "unknown field users"),
        (lambda data: data["keys"][0].update(rpm=60), r"keys\[0\]: unknown field rpm"),
        (lambda data: data["keys"][0]["limits"].update(rps=60), r"keys\[0\]\.limits: unknown field rps"),
        (lambda data: data["keys"][0]["limits"].update(n="1"), r"keys\[0\]\.limits\.n: Input should be a valid int"),
        (lambda data: data["keys"][0]["limits"].update(n=True), r"keys\[0\]\.limits\.n: Input should be a valid int"),
        (lambda data: data["keys"].append(data["keys"][0]), "two keys have the same name alice"),
        (lambda data: data["keys"].append(data["keys"][0] | {"name": "b"}), "two keys have the same id k"),
        (lambda data: data["keys"][0]["hashes"].append(data["keys"][0]["hashes"][0]), "two keys have the same hash$"),
        (lambda data: data["keys"][0].update(hashes=[]), r"keys\[0\]\.hashes: List should have at least 1"),
        (lambda data: data["keys"][0].update(models=[]), r"keys\[0\]\.models: List should have at least 1"),
    ],
)
def test_a_file_with_a_mistake_is_refused_by_the_place_of_it(
    folder: Secrets, change: Callable[[dict[str, Any]], dict[str, Any] | None], says: str
) -> None:
    created("create alice")
    data = json.loads(folder.keys.read_text())
    text = json.dumps(change(data) or data)
    folder.keys.write_text(text)
    done = make_key("create bob")
    assert done.exit_code == 1
    assert re.search(rf"keys\.json: {says}", done.stderr, re.MULTILINE)
    assert folder.keys.read_text() == text


def test_no_mistake_shows_what_stands_in_the_file(folder: Secrets) -> None:
    """It may be a secret that was put there by mistake."""
    created("create alice")
    planted = "planted-8c1f"
    text = folder.keys.read_text()
    folder.keys.write_text(text.replace(json.loads(text)["keys"][0]["id"], planted))
    assert planted not in make_key("list").output


def test_a_file_too_large_for_the_gateway_is_neither_read_nor_written(folder: Secrets) -> None:
    store = KeyStore(folder)
    models = [f"{n:0>256}" for n in range(256)]
    too_many = MAX_BYTES // (256 * 256) + 1
    with pytest.raises(Mistake, match=f"more than {MAX_BYTES}"):
        collections.deque((store.create(f"k{n}", models=models) for n in range(too_many)), maxlen=0)
    assert 2**20 < folder.keys.stat().st_size <= MAX_BYTES
    folder.keys.write_bytes(b" " * (MAX_BYTES + 1))
    with pytest.raises(Mistake, match=f"more than {MAX_BYTES}"):
        store.read()


def test_more_keys_than_any_hash_table_of_a_test_are_kept_apart(folder: Secrets) -> None:
    """The store holds what a company has, and says so at the end of its room."""
    store = KeyStore(folder)
    secret = store.create("alice")
    data = store.read()
    (one,) = data.keys
    for n in range(keys.MAX_KEYS - 1):
        hashes = [keys.Hash(sha256=f"{n:064x}")]
        data.keys.append(one.model_copy(update={"name": f"k{n}", "id": f"k{n:08x}", "hashes": hashes}))
    new = folder.written(folder.keys, data)
    folder.replace(new, folder.keys)
    holder = store.read().holder(secret, NOW)
    assert holder
    assert holder.name == "alice"
    with pytest.raises(Mistake, match="no room for more"):
        store.create("one-more")


def write(folder: Path, number: int) -> None:
    KeyStore(Secrets(folder)).create(f"k{number}")


def test_commands_at_the_same_time_lose_nothing(folder: Secrets) -> None:
    folder.prepare()
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=write, args=(folder.folder, number)) for number in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert sorted(one.name for one in KeyStore(folder).read().keys) == [f"k{number}" for number in range(8)]
    assert len(folder.audit.read_text().splitlines()) == 8
    assert [path.name for path in folder.keys.parent.iterdir()] == ["keys.json"]


def test_a_reader_sees_the_old_file_or_the_new_one(folder: Secrets) -> None:
    """A file is replaced, never written in place: one that is open stays as it was."""
    created("create alice")
    with folder.keys.open() as file:
        created("create bob")
        assert [one["name"] for one in json.loads(file.read())["keys"]] == ["alice"]


def test_a_model_that_the_running_fleet_lacks_is_named(folder: Secrets, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Gateway, "replicas", lambda _: [Replica(name="vllm-0", state="ready", models=["a"])])
    done = make_key("create alice --models a,b")
    assert done.exit_code == 0
    assert "b: the fleet does not serve that now; it serves a" in done.stderr
    assert "a: the fleet" not in done.stderr


def test_the_first_key_closes_the_gateway_and_the_command_says_so(
    folder: Secrets, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "asks everybody for a key" in make_key("create alice").stderr
    assert "asks everybody" not in make_key("create bob").stderr
    monkeypatch.setattr(settings, "value_of", lambda _: "off")
    assert "GATEWAY_AUTH=off is set" in make_key("create carol").stderr


def test_every_limit_has_an_option() -> None:
    assert set(key.LIMITS.values()) == set(Limits.model_fields)


class TheStore(RuleBasedStateMachine):
    """Whatever is done to a store in whatever order: a key works exactly while it should."""

    holders = Bundle("holders")

    def __init__(self) -> None:
        super().__init__()
        self.now = NOW
        # each key that ever was: its holder, and when it ends
        self.known: dict[str, tuple[str, float]] = {}

        self.temporary = tempfile.TemporaryDirectory()
        self.store = KeyStore(Secrets(Path(self.temporary.name) / "secrets"), lambda: self.now)

    def teardown(self) -> None:
        self.temporary.cleanup()

    @rule(target=holders, name=st.sampled_from("abcdef"), life=st.none() | st.integers(1, 500))
    def create(self, name: str, life: int | None) -> str:
        taken = any(one.name == name for one in self.store.read().keys)
        expires = None if life is None else int(self.now) + life
        try:
            secret = self.store.create(name, expires=expires)
        except Mistake:
            assert taken
        else:
            assert not taken
            self.known[secret] = (name, float("inf") if expires is None else expires)
        return name

    @rule(name=holders, overlap=st.integers(0, 300))
    def rotate(self, name: str, overlap: int) -> None:
        there = next((one for one in self.store.read().keys if one.name == name), None)
        try:
            secret = self.store.rotate(name, overlap)
        except Mistake:
            assert there is None or len(there.hashes) >= keys.MAX_HASHES
            return
        assert there
        end = there.expires or float("inf")
        for old, (holder, until) in self.known.items():
            if holder == name:
                self.known[old] = (name, min(until, int(self.now) + overlap))
        self.known[secret] = (name, end)

    @rule(name=consumes(holders))
    def revoke(self, name: str) -> None:
        try:
            self.store.revoke(name)
        except Mistake:
            assert all(one.name != name for one in self.store.read().keys)
        self.known = {secret: (who, -1 if who == name else until) for secret, (who, until) in self.known.items()}

    @rule(seconds=st.floats(0.5, 200))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(name=holders, rpm=st.none() | st.integers(0, 5))
    def set(self, name: str, rpm: int | None) -> None:
        try:
            after = self.store.set(name, {"requests_per_minute": rpm})
        except Mistake:
            assert all(one.name != name for one in self.store.read().keys)
        else:
            assert after.limits.requests_per_minute == rpm

    @invariant()
    def each_key_works_while_it_should(self) -> None:
        data: Keys = self.store.read()
        for secret, (name, until) in self.known.items():
            holder = data.holder(secret, self.now)
            assert (holder.name if holder else None) == (name if self.now < until else None)


TheStore.TestCase.settings = hypothesis_settings(max_examples=30, stateful_step_count=20)
TestTheStore = TheStore.TestCase


@pytest.fixture
def of_stack(folder: Secrets, monkeypatch: pytest.MonkeyPatch) -> Secrets:
    """The same folder, as `make up` knows it."""
    monkeypatch.setattr(access, "SECRETS", folder)
    return folder


OPEN = settings.check({"BIND_ADDRESS": "0.0.0.0"})
SAID_NO = settings.check({"BIND_ADDRESS": "0.0.0.0", "GATEWAY_AUTH": "off"})
LOOPBACK = settings.check({})


def test_a_gateway_open_to_others_gets_its_first_key_once(of_stack: Secrets) -> None:
    secret = access.first_key(OPEN)
    holder = KeyStore(of_stack).read().holder(secret, time.time())
    assert holder
    assert (holder.name, holder.role) == ("admin", "admin")
    assert access.first_key(OPEN) == ""
    assert len(KeyStore(of_stack).read().keys) == 1


@pytest.mark.parametrize("wanted", [SAID_NO, LOOPBACK])
def test_no_key_is_made_where_nobody_is_asked_for_one(of_stack: Secrets, wanted: settings.Settings) -> None:
    assert access.first_key(wanted) == ""
    assert not of_stack.keys.exists()
    assert not access.asks_for_keys(wanted)
    with access.own_key(wanted, "make-up", 600) as secret:
        assert secret == ""
    assert of_stack.keys.parent.is_dir()  # made before Docker would make it as root


def test_open_webui_has_one_key_that_may_name_users_and_gets_another_where_that_one_is_gone(of_stack: Secrets) -> None:
    def key() -> str:
        return access.WebuiKey.model_validate_json(of_stack.webui.read_bytes()).key

    assert access.webui_key(of_stack)
    assert not access.webui_key(of_stack)
    holder = KeyStore(of_stack).read().holder(key(), time.time())
    assert holder
    assert (holder.name, holder.role, holder.end_users) == ("open-webui", "user", True)
    first = key()
    for lost in ("the file", "the key"):
        if lost == "the file":
            of_stack.webui.unlink()
        else:
            KeyStore(of_stack).revoke("open-webui")
        assert access.webui_key(of_stack)
        assert KeyStore(of_stack).read().holder(key(), time.time())
    assert KeyStore(of_stack).read().holder(first, time.time()) is None
    # Open WebUI reads it as a user of its own, and the folder above is closed
    assert of_stack.webui.stat().st_mode & 0o777 == 0o644
    with pytest.raises(Problem, match="GATEWAY_AUTH=off nobody could sign in"):
        access.check_webui(SAID_NO)
    access.check_webui(LOOPBACK)


def test_a_key_on_loopback_closes_the_gateway_and_off_opens_it(of_stack: Secrets) -> None:
    created("create alice")
    assert access.asks_for_keys(LOOPBACK)
    assert not access.asks_for_keys(SAID_NO)
    assert make_key("revoke alice").exit_code == 0
    assert access.asks_for_keys(LOOPBACK)  # the last key's end opens nothing


def test_a_commands_own_key_ends_with_it(of_stack: Secrets) -> None:
    store = KeyStore(of_stack)

    def fails() -> None:
        with access.own_key(OPEN, "make-up", 600) as secret:
            assert store.read().holder(secret, time.time())
            assert not store.read().holder(secret, time.time() + 600)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert store.read().keys == []


def test_a_key_that_a_killed_command_left_is_replaced(of_stack: Secrets) -> None:
    store = KeyStore(of_stack)
    left = access.own_key(OPEN, "make-up", 600).__enter__()
    with access.own_key(OPEN, "make-up", 600) as secret:
        assert store.read().holder(secret, time.time())
        assert store.read().holder(left, time.time()) is None


def test_a_commands_own_key_takes_nobodys_and_obeys_no_roles_limits(of_stack: Secrets) -> None:
    assert "make-up is what commands call a key of their own" in make_key("create make-up").stderr
    store = KeyStore(of_stack)
    # as one could make it before
    theirs = store.create("make-up")
    with pytest.raises(Problem, match="make key ARGS='revoke make-up'"), access.own_key(OPEN, "make-up", 600):
        raise AssertionError
    assert store.read().holder(theirs, time.time())
    store.revoke("make-up")
    store.set_limits("user", dict.fromkeys(Limits.model_fields, 0))
    with access.own_key(OPEN, "make-up", 600) as secret:
        holder = store.read().holder(secret, time.time())
        assert holder
        limits = store.read().in_force(holder).model_dump()
        assert set(limits) == set(Limits.model_fields)
        assert min(limits.values()) > 10**12


@pytest.mark.parametrize("pipe", [True, False])
def test_what_is_no_file_or_too_large_is_refused_before_it_is_read(folder: Secrets, pipe: bool) -> None:
    folder.prepare()
    if pipe:
        os.mkfifo(folder.keys)
    else:
        with folder.keys.open("wb") as file:
            file.truncate(2**42)  # with no room to read it into
    done = make_key("list")
    assert done.exit_code == 1
    assert ("is no file" if pipe else f"has {2**42} bytes") in done.stderr


def test_a_moment_that_no_calendar_has_is_shown_all_the_same(folder: Secrets) -> None:
    created("create alice --expires 9999-12-31T23:59:59")
    assert "9999-12-31 23:59" in make_key("show alice").stdout
    data = json.loads(folder.keys.read_text())
    data["keys"][0] |= {"expires": MAX_NUMBER, "created": MAX_NUMBER}
    folder.keys.write_text(json.dumps(data))
    for command in ("list", "show alice"):
        done = make_key(command)
        assert done.exit_code == 0
        assert "1970" in done.stdout
