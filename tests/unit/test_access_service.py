"""The token service: who gets a token, who does not, and how guessing is slowed."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import argon2
import httpx
import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st

from access import guessing, service
from access.guessing import FORGOTTEN_S, LONGEST_S, Guessing, network
from access.store import Secrets
from access.tokens import TokenStore, verify
from access.users import User, Users, UserStore
from lab.waiting import until

PASSWORD = "four words that fit together"
HASH = argon2.PasswordHasher(time_cost=2, memory_cost=19 * 1024, parallelism=1).hash(PASSWORD)


@dataclass
class Service:
    """The service over a folder of its own, without a network, with a clock that tests set."""

    secrets: Secrets
    now: float = 0.0
    app: Any = field(init=False)

    def __post_init__(self) -> None:
        self.app = service.build(self.secrets.users.parent, lambda: self.now)

    def ask(self, *requests: dict[str, Any], path: str = "/token", method: str = "POST") -> list[httpx.Response]:
        """The answers to requests that are sent at once."""

        async def send() -> list[httpx.Response]:
            transport = httpx.ASGITransport(self.app, client=("192.0.2.1", 9))
            async with httpx.AsyncClient(transport=transport, base_url="http://tokens") as client:
                return await asyncio.gather(*(client.request(method, path, **request) for request in requests))

        return asyncio.run(send())

    def sign_in(self, name: str, password: str, address: str = "203.0.113.5", **fields: str) -> httpx.Response:
        """The answer to one form, as the gateway passes it on."""
        return self.ask(form(name, password, address, **fields))[0]


def form(name: str, password: str, address: str = "203.0.113.5", **fields: str) -> dict[str, Any]:
    data = {"grant_type": "password", "username": name, "password": password, **fields}
    return {"data": data, "headers": {"X-Forwarded-For": f"10.9.9.9, {address}"}}


@pytest.fixture
def tokens(tmp_path: Path) -> Service:
    secrets = Secrets(tmp_path / "secrets")
    with secrets.locked():
        users = Users(users=[User(name=name, password=HASH) for name in ("alice", "bob")])
        secrets.replace(secrets.written(secrets.users, users), secrets.users)
    TokenStore(secrets).take(None, 30)
    return Service(secrets)


def test_a_password_gives_a_token_that_verifies(tokens: Service) -> None:
    answer = tokens.sign_in("alice", PASSWORD)
    assert answer.status_code == 200
    given_ = answer.json()
    assert (given_["token_type"], given_["expires_in"]) == ("bearer", 1800)
    assert answer.headers["cache-control"] == "no-store"
    claims = verify(TokenStore(tokens.secrets).signing(), given_["access_token"])
    assert (claims.name, claims.role) == ("alice", "user")


def test_a_wrong_password_and_an_unknown_user_get_the_same_answer(tokens: Service) -> None:
    wrong, unknown = tokens.sign_in("alice", "x"), tokens.sign_in("nobody", "x")
    assert wrong.status_code == unknown.status_code == 400
    assert wrong.content == unknown.content
    assert wrong.json()["error"] == "invalid_grant"
    assert wrong.headers == unknown.headers


@pytest.mark.parametrize(
    ("request_", "status", "says"),
    [
        ({"json": {"username": "alice", "password": PASSWORD}}, 400, "send a form"),
        (form("", PASSWORD), 400, "username is missing"),
        (form("alice", ""), 400, "password is missing"),
        (form("alice", PASSWORD, grant_type="refresh_token"), 400, "the only grant_type"),
        (form("alice", "x" * 1025), 400, "the password has more than 1024 bytes"),
        (form("alice", PASSWORD, scope="x" * 9000), 413, "more than 8192 bytes"),
        (form("alice", PASSWORD, **{f"f{n}": "x" for n in range(20)}), 400, "cannot be read"),
        ({"data": {"username": ["alice", "bob"], "password": PASSWORD}}, 400, "a field comes twice"),
        (
            {"content": b"username=%ff&password=x", "headers": {"content-type": "application/x-www-form-urlencoded"}},
            400,
            "cannot be read",
        ),
    ],
)
def test_what_is_no_sign_in_is_said_so(tokens: Service, request_: dict[str, Any], status: int, says: str) -> None:
    (answer,) = tokens.ask(request_)
    assert answer.status_code == status
    assert says in answer.json()["error_description"]


def test_guessing_at_an_account_is_slowed_from_wherever_it_comes(tokens: Service) -> None:
    for number in range(service.WRONG_BY_ACCOUNT):
        assert tokens.sign_in("alice", "x", f"203.0.113.{number}").status_code == 400
    waits = []
    for number in range(20, 30):
        slowed = tokens.sign_in("alice", PASSWORD, f"203.0.113.{number}")
        assert (slowed.status_code, slowed.json()["error"]) == (429, "slow_down")
        waits.append(int(slowed.headers["retry-after"]))
        tokens.now += waits[-1]
        assert tokens.sign_in("alice", "x", f"203.0.113.{number}").status_code == 400
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60, 60]
    # the others are not
    assert tokens.sign_in("bob", PASSWORD).status_code == 200
    tokens.now += LONGEST_S
    assert tokens.sign_in("alice", PASSWORD).status_code == 200
    assert tokens.sign_in("alice", "x").status_code == 400


def test_the_waiting_does_not_tell_who_there_is(tokens: Service) -> None:
    def statuses(name: str, network_: str) -> list[int]:
        return [tokens.sign_in(name, "x", f"{network_}.{number}").status_code for number in range(8)]

    assert statuses("alice", "203.0.113") == statuses("nobody", "198.51.100")


def test_guessing_from_an_address_is_slowed_at_whatever_account(tokens: Service) -> None:
    for number in range(service.WRONG_BY_ADDRESS):
        assert tokens.sign_in(f"user{number}", "x").status_code == 400
    assert tokens.sign_in("alice", PASSWORD).status_code == 429
    assert tokens.sign_in("alice", PASSWORD, "203.0.113.6").status_code == 200
    # an account of one's own does not pay for guesses at others
    tokens.now += 1
    assert tokens.sign_in("bob", PASSWORD).status_code == 200
    assert tokens.sign_in("user", "x").status_code == 429


def test_many_at_once_are_no_way_round(tokens: Service) -> None:
    answers = tokens.ask(*(form("alice", f"guess {number}", f"203.0.113.{number}") for number in range(25)))
    statuses = [answer.status_code for answer in answers]
    assert statuses.count(400) == service.WRONG_BY_ACCOUNT
    assert statuses.count(429) == 25 - service.WRONG_BY_ACCOUNT


def test_a_forged_address_is_not_believed(tokens: Service) -> None:
    """Only the last one is the gateway's; what a client wrote before it is the client's word."""
    for number in range(service.WRONG_BY_ADDRESS):
        request_ = form(f"user{number}", "x")
        request_["headers"]["X-Forwarded-For"] = f"203.0.113.{number}, 198.51.100.1"
        assert tokens.ask(request_)[0].status_code == 400
    assert tokens.sign_in("alice", PASSWORD, "198.51.100.1").status_code == 429


def test_few_passwords_are_hashed_at_once_and_the_line_has_an_end(
    tokens: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, most = 0, 0
    lock, together = threading.Lock(), threading.Event()

    def slow(*_: object) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
            if running == service.AT_ONCE:
                together.set()
        together.wait(10)
        with lock:
            running -= 1

    monkeypatch.setattr("access.users.Doorman.lets_in", slow)
    count = service.AT_ONCE + service.LINE + 10
    answers = tokens.ask(*(form(f"user{number}", "x", f"203.0.113.{number}") for number in range(count)))
    refused = [answer for answer in answers if answer.status_code == 503]
    assert most == service.AT_ONCE
    assert len(refused) == 10
    assert {answer.headers["retry-after"] for answer in refused} == {"1"}


def test_nothing_secret_is_logged(tokens: Service, capsys: pytest.CaptureFixture[str]) -> None:
    """Who types a password into the field of the name does not find it in the log either."""
    token = tokens.sign_in("alice", PASSWORD).json()["access_token"]
    tokens.sign_in("alice", "planted-one")
    tokens.sign_in("planted-two", "x")
    for _ in range(9):
        tokens.sign_in("planted-two", "planted-three")
    out = "".join(capsys.readouterr())
    events = [json.loads(line) for line in out.splitlines()]
    assert [(one["event"], one.get("name")) for one in events[:3]] == [
        ("token.issued", "alice"),
        ("token.refused", "alice"),
        ("token.refused", None),
    ]
    assert events[-1]["event"] == "token.slowed"
    assert {one["address"] for one in events} == {"203.0.113.5"}
    assert not any(secret in out for secret in ("planted", PASSWORD, token))


def test_a_change_of_the_files_is_in_force_at_the_next_request(tokens: Service) -> None:
    assert tokens.sign_in("alice", PASSWORD).status_code == 200
    store = UserStore(tokens.secrets)
    store.set("alice", password="entirely other words now", role="admin")
    assert tokens.sign_in("alice", PASSWORD).status_code == 400
    answer = tokens.sign_in("alice", "entirely other words now")
    assert verify(TokenStore(tokens.secrets).signing(), answer.json()["access_token"]).role == "admin"
    store.remove("alice")
    assert tokens.sign_in("alice", "entirely other words now").status_code == 400


def test_a_broken_file_keeps_what_was_and_says_so(tokens: Service, capsys: pytest.CaptureFixture[str]) -> None:
    assert tokens.sign_in("alice", PASSWORD).status_code == 200
    for file in (tokens.secrets.users, tokens.secrets.signing):
        file.write_text("{")
    assert tokens.sign_in("alice", PASSWORD).status_code == 200
    out = capsys.readouterr().out
    assert '"event": "file.refused", "file": "users.json"' in out
    assert '"event": "file.refused", "file": "signing.json"' in out


def test_before_there_are_users_nobody_signs_in(tmp_path: Path) -> None:
    empty = Service(Secrets(tmp_path / "secrets"))
    answer = empty.sign_in("alice", PASSWORD)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    (health,) = empty.ask({}, path="/health", method="GET")
    assert (health.status_code, health.json()) == (503, {"missing": ["users", "signing keys"]})


def test_a_file_that_is_taken_away_takes_its_users_along(tokens: Service) -> None:
    assert tokens.sign_in("alice", PASSWORD).status_code == 200
    kept = tokens.secrets.users.read_bytes()
    tokens.secrets.users.unlink()
    assert tokens.sign_in("alice", PASSWORD).status_code == 503
    (health,) = tokens.ask({}, path="/health", method="GET")
    assert (health.status_code, health.json()) == (503, {"missing": ["users"]})
    tokens.secrets.users.write_bytes(kept)
    assert tokens.sign_in("alice", PASSWORD).status_code == 200


@pytest.mark.parametrize("path", ["/docs", "/openapi.json", "/redoc", "/metrics", "/"])
def test_there_is_nothing_else(tokens: Service, path: str) -> None:
    assert tokens.ask({}, path=path, method="GET")[0].status_code == 404


@pytest.fixture
def served(tokens: Service) -> Iterator[str]:
    """The address of the service behind a real server."""
    server = uvicorn.Server(uvicorn.Config(tokens.app, port=0, log_level="warning", access_log=False))
    thread = threading.Thread(target=server.run)
    thread.start()
    until(lambda: server.started, "the server to start", 30)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(30)


def test_it_answers_over_http(served: str) -> None:
    with httpx.Client(base_url=served, trust_env=False) as client:
        assert client.get("/health").json() == {"missing": []}
        answer = client.post("/token", data={"username": "alice", "password": PASSWORD})
        assert answer.status_code == 200
        assert client.post("/token", content=b"x" * 10_000_000).status_code == 400


def test_what_is_counted_fits_into_a_fixed_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guessing, "PLACES", 1024)
    counts = Guessing(5, lambda: 0.0)
    for number in range(20_000):
        counts.begin(str(number))
    assert len(counts._counts) <= 1024


@given(st.lists(st.tuples(st.sampled_from("ab"), st.floats(0, 120), st.booleans()), max_size=60))
def test_a_wait_is_never_longer_than_its_bound_and_always_ends(tries: list[tuple[str, float, bool]]) -> None:
    now = 0.0
    counts = Guessing(3, lambda: now)
    for who, pause, right in tries:
        now += pause
        wait = counts.wait(who)
        assert 0 <= wait <= LONGEST_S
        if wait == 0:
            counts.begin(who)
            if right:
                counts.right(who, forgive=True)
                assert counts.wait(who) == 0
    now += LONGEST_S
    assert counts.wait("a") == counts.wait("b") == 0
    now += FORGOTTEN_S
    for _ in range(3):
        assert counts.wait("a") == 0
        counts.begin("a")
    assert counts.wait("a") == pytest.approx(1)


@pytest.mark.parametrize(
    ("address", "whose"),
    [
        ("203.0.113.5", "203.0.113.5"),
        (" 203.0.113.5 ", "203.0.113.5"),
        ("::ffff:203.0.113.5", "203.0.113.5"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::9", "2001:db8:1:2::/64"),
        ("unix:", "unknown"),
        ("", "unknown"),
        ("203.0.113.5, 1", "unknown"),
    ],
)
def test_an_address_stands_for_one_customer(address: str, whose: str) -> None:
    assert network(address) == whose
