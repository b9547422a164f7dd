"""Who is let in, as whom, and to what: keys, roles and tokens, each attack a row."""

import base64
import hashlib
import json
import re
import secrets
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from lab.sim.gateway import Gateway
from lab.sim.replicas import Replicas
from lab.waiting import until
from stack.shell import ROOT
from tests.gateway.conftest import chat
from tests.gateway.test_public import error_of
from tests.gateway.test_targets import send

CHAT = "/v1/chat/completions"
ADAPTER = "sim-adapter-0"


def new_key() -> str:
    return "sk-fleet-" + base64.urlsafe_b64encode(secrets.token_bytes(32)).decode().rstrip("=")


def entry(name: str, *values: str, until_s: float | None = None, **more: Any) -> dict[str, Any]:
    """A key of keys.json; of several values all but the first end at `until_s`."""
    hashes = [{"sha256": hashlib.sha256(value.encode()).hexdigest(), "until": None} for value in values]
    for hash_ in hashes[1:]:
        hash_["until"] = int(until_s or 0)  # type: ignore[assignment]
    plain: dict[str, Any] = {
        "id": name,
        "role": "user",
        "models": None,
        "limits": {},
        "priority": 0,
        "end_users": False,
    }
    return {**plain, "name": name, "hashes": hashes, "expires": None, "created": 0, "note": "", **more}


def keys_file(*keys: dict[str, Any], **more: Any) -> str:
    return json.dumps({"version": 1, "keys": list(keys), "roles": {}, "end_users": {}, **more})


USER, ADMIN, EXPIRED, OLD, NEW, ENDED, NARROW, FRONT = (new_key() for _ in range(8))
KEYS = [
    entry("alice", USER),
    entry("root", ADMIN, role="admin"),
    entry("gone", EXPIRED, expires=1),
    entry("rotated", NEW, OLD, until_s=time.time() + 3600),
    entry("ended", new_key(), ENDED, until_s=1),
    entry("narrow", NARROW, models=[ADAPTER]),
    entry("front", FRONT, end_users=True),
]


@pytest.fixture(scope="module")
def fleet() -> Iterator[Replicas]:
    with Replicas(2, "--adapters", "1") as replicas:
        yield replicas


@pytest.fixture(scope="module")
def keyed(fleet: Replicas) -> Iterator[Gateway]:
    """A gateway that asks for keys; its own is an admin's."""
    with Gateway(fleet, files={"secrets/keys.json": keys_file(*KEYS).encode()}, key=ADMIN) as gateway:
        gateway.wait_ready()
        yield gateway


@pytest.fixture
def client(keyed: Gateway) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=keyed.url, timeout=30) as session:
        yield session


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({}, 401, "missing_api_key"),
        (bearer(USER), 200, ""),
        ({"x-api-key": USER}, 200, ""),
        ({"X-API-KEY": USER}, 200, ""),
        ({"Authorization": f"bearer {USER}"}, 200, ""),
        ({**bearer(USER), "x-api-key": USER}, 200, ""),
        ({**bearer(USER), "x-api-key": ADMIN}, 401, "invalid_api_key"),
        ({**bearer(new_key()), "x-api-key": USER}, 401, "invalid_api_key"),
        ({"Authorization": f"Basic {USER}", "x-api-key": USER}, 401, "invalid_api_key"),
        ({"Authorization": USER}, 401, "invalid_api_key"),
        ({"Authorization": "Bearer"}, 401, "invalid_api_key"),
        ({"Authorization": ""}, 401, "invalid_api_key"),
        ({"x-api-key": ""}, 401, "invalid_api_key"),
        ({"Authorization": f"Bearer {USER} {USER}"}, 401, "invalid_api_key"),
        (bearer(new_key()), 401, "invalid_api_key"),
        (bearer(USER[:-1]), 401, "invalid_api_key"),
        (bearer(USER + "A"), 401, "invalid_api_key"),
        (bearer(USER.swapcase()), 401, "invalid_api_key"),
        (bearer(hashlib.sha256(USER.encode()).hexdigest()), 401, "invalid_api_key"),
        (bearer("alice"), 401, "invalid_api_key"),
        (bearer("state"), 401, "invalid_api_key"),
        (bearer("sk-" + "a" * 4000), 401, "invalid_api_key"),
        (bearer("eyJ" + "a" * 4000), 401, "invalid_api_key"),
        ({"Api-Key": USER}, 401, "missing_api_key"),
        ({"Cookie": f"key={USER}"}, 401, "missing_api_key"),
        (bearer(EXPIRED), 401, "expired_api_key"),
        (bearer(NEW), 200, ""),
        (bearer(OLD), 200, ""),
        (bearer(ENDED), 401, "expired_api_key"),
    ],
)
def test_a_key_opens_and_nothing_else_does(
    client: httpx.Client, headers: dict[str, str], status: int, code: str
) -> None:
    answer = client.post(CHAT, json=chat("hi"), headers=headers)
    assert answer.status_code == status, answer.text
    if code:
        assert error_of(answer)["code"] == code
        assert answer.headers["www-authenticate"] == "Bearer"
        assert "sk-fleet-" not in answer.text.replace("sk-fleet-…", "")


def test_anthropics_clients_get_their_own_words(client: httpx.Client) -> None:
    body = {"model": "sim", "max_tokens": 1, "messages": []}
    answer = client.post("/v1/messages", json=body, headers={"x-api-key": "x"})
    assert (answer.status_code, answer.json()["error"]["type"]) == (401, "authentication_error")


def raw(gateway: Gateway, head: str, body: bytes = b"") -> httpx.Response:
    """The answer to a request that is spelt by hand."""
    return send(gateway, head.replace("\n", "\r\n").encode() + b"\r\n" + body)[1]


@pytest.mark.parametrize(
    ("one", "other"), [("Authorization: Bearer {}", "Authorization: Bearer {}"), ("x-api-key: {}", "x-api-key: {}")]
)
def test_a_header_that_comes_twice_opens_nothing(keyed: Gateway, one: str, other: str) -> None:
    for second in (USER, ADMIN):
        head = (
            f"GET /v1/models HTTP/1.1\nHost: localhost\nConnection: close\n{one.format(USER)}\n{other.format(second)}\n"
        )
        assert raw(keyed, head).status_code in (400, 401)


@pytest.mark.parametrize(
    "path",
    [
        "/v1/models?api_key={}",
        "/v1/models?key={}",
        "/v1/models?limit=1&access_token={}",
        "/v1/models?x={}",
        "/v1/models?KEY={}",
        "/{}",
        "/v1/models/{}",
        "/v1/models?%6bey={}",
        "/v1/models?x=%{:x}",
        "/v1/models?token=eyJhbGciOiJub25lIn0.e30.",
        "/v1/models?a=%2573k-fleet-x",
        "/health?key={}",
        "/status?key={}",
    ],
)
def test_a_key_in_an_address_is_refused_and_never_logged(keyed: Gateway, client: httpx.Client, path: str) -> None:
    hidden = "".join(f"%{ord(letter):02x}" for letter in USER)
    target = path.replace("%{:x}", hidden) if "{:x}" in path else path.format(USER)
    answer = client.get(target, headers=bearer(ADMIN))
    assert (answer.status_code, error_of(answer)["code"]) == (400, "key_in_url")
    until(lambda: answer.headers["x-request-id"] in keyed.log(), "the request is in the log")
    for secret in (USER, hidden, "eyJhbGci"):
        assert secret not in keyed.log()
        assert secret not in answer.text


def test_no_key_is_in_any_log_error_or_metric(keyed: Gateway, client: httpx.Client) -> None:
    """Whatever header or field it was put into by mistake."""
    answers = [client.post(CHAT, json=chat("hi", model=USER), headers=bearer(ADMIN))]
    for header in (
        "X-Request-Id",
        "User-Agent",
        "Referer",
        "Host",
        "X-Session-Id",
        "X-End-User",
        "Origin",
        "Content-Type",
    ):
        answers += [client.post(CHAT, json=chat("hi"), headers={**bearer(USER), header: USER})]
    answers.append(
        client.request("GET", "/nothing", headers={**bearer(USER), "Referer": f"https://a.example/?k={USER}"})
    )
    answers.append(
        client.post(CHAT, content=b" " * (65 << 20), headers={**bearer(USER), "Referer": f"https://a/{USER}"})
    )
    for answer in answers:
        assert USER not in answer.text
        assert USER not in str(answer.headers)
    until(lambda: answers[-2].headers["x-request-id"] in keyed.log(), "the request is in the log")
    metrics = httpx.get(keyed.metrics_url + "/metrics").text
    for secret in (USER, ADMIN, hashlib.sha256(USER.encode()).hexdigest()):
        assert not [line for line in keyed.log().splitlines() if secret in line]
        assert secret not in metrics


def test_the_log_names_the_keys_holder(keyed: Gateway, client: httpx.Client) -> None:
    mine = client.post(CHAT, json=chat("log"), headers=bearer(USER)).headers["x-request-id"]
    refused = client.post(CHAT, json=chat("log"), headers=bearer(new_key())).headers["x-request-id"]
    front = client.post(CHAT, json=chat("log"), headers={**bearer(FRONT), "X-End-User": "bob@a.example"})
    forged = client.post(CHAT, json=chat("log"), headers={**bearer(USER), "X-End-User": "bob"})

    def line(ident: str) -> dict[str, Any]:
        until(lambda: ident in keyed.log(), "the request is in the log")
        return next(
            found
            for text in keyed.log().splitlines()
            if text.startswith("{")
            if (found := json.loads(text))["id"] == ident
        )

    assert (line(mine)["key"], line(mine)["end_user"]) == ("alice", "")
    assert (line(refused)["key"], line(refused)["reason"]) == ("", "refused")
    assert (line(front.headers["x-request-id"])["key"], line(front.headers["x-request-id"])["end_user"]) == (
        "front",
        "bob@a.example",
    )
    assert line(forged.headers["x-request-id"])["end_user"] == ""


@pytest.mark.parametrize(
    "user",
    ["", "a b", "x" * 129, "\xe9", USER, f"me-{USER}", "eyJhbGciOiJFUzI1NiJ9.e30.c2ln"],
    ids=["empty", "two words", "long", "accent", "a key", "with a key", "a token"],
)
def test_an_end_users_name_is_plain(client: httpx.Client, user: str) -> None:
    headers = [(b"Authorization", f"Bearer {FRONT}".encode()), (b"X-End-User", user.encode("latin-1"))]
    answer = client.post(CHAT, json=chat("hi"), headers=headers)
    assert (answer.status_code, error_of(answer)["code"]) == (400, "bad_end_user")


# ---- models


def test_anothers_model_is_not_there(client: httpx.Client) -> None:
    """Not for a request, not for the lists, and not by its words."""
    ours = client.get("/v1/models", headers=bearer(NARROW)).json()
    assert [card["id"] for card in ours["data"]] == [ADAPTER]
    assert len(client.get("/v1/models", headers=bearer(USER)).json()["data"]) == 2
    assert client.post(CHAT, json=chat("hi", model=ADAPTER), headers=bearer(NARROW)).status_code == 200
    assert client.get(f"/v1/models/{ADAPTER}", headers=bearer(NARROW)).status_code == 200
    for ask in (
        lambda model: client.post(CHAT, json=chat("hi", model=model), headers=bearer(NARROW)),
        lambda model: client.get(f"/v1/models/{model}", headers=bearer(NARROW)),
    ):
        answers = {model: ask(model) for model in ("sim", "xyz")}  # type: ignore[no-untyped-call]
        assert {answer.status_code for answer in answers.values()} == {404}
        said = [
            str(error_of(answer)["message"]).split(" (request")[0].replace(f"'{model}'", "M")
            for model, answer in answers.items()
        ]
        assert said[0] == said[1]
        assert "sim" not in said[0].replace(ADAPTER, "")


def test_a_key_for_some_models_has_to_name_one(client: httpx.Client) -> None:
    body = chat("hi")
    del body["model"]
    assert client.post(CHAT, json=body, headers=bearer(USER)).status_code == 200
    answer = client.post(CHAT, json=body, headers=bearer(NARROW))
    assert (answer.status_code, error_of(answer)["code"]) == (400, "model_required")
    assert ADAPTER in answer.text


# ---- roles


DESIGN = (ROOT / "docs/design.md").read_text()
ROWS = re.findall(r"^\| (`/[^|]*) \| ([^|]+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", DESIGN, re.MULTILINE)
BELOW = {"/status/": "/status/status.js", "/v1/models/": "/v1/models/sim", "/replicas/": "/replicas/vllm-0/drain"}
WORDS = {"yes": 200, "those it may use": 200, "its own": 200, "a form": 503}


@pytest.fixture(scope="module")
def unkeyed(fleet: Replicas) -> Iterator[Gateway]:
    with Replicas(2, "--adapters", "1") as replicas, Gateway(replicas) as gateway:
        gateway.wait_ready()
        yield gateway


def test_the_table_of_roles_names_every_path_of_the_gateway() -> None:
    public = (ROOT / "nginx/conf.d/public.conf").read_text()
    status = (ROOT / "nginx/conf.d/status.conf").read_text()
    own = re.findall(
        r"^ *location (?:= )?(/\S+) +\{(?! include conf.d/generate)(?! internal)",
        public + status,
        re.MULTILINE,
    )
    assert sorted(own) == sorted(path for row in ROWS for path in re.findall("`([^`]+)`", row[0]))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_each_role_reaches_what_the_table_says(keyed: Gateway, unkeyed: Gateway, row: tuple[str, ...]) -> None:
    who = [(keyed, {}), (keyed, bearer(USER)), (keyed, bearer(ADMIN)), (unkeyed, {})]
    for path in re.findall("`([^`]+)`", row[0]):
        for (gateway, headers), says in zip(who, row[1:], strict=True):
            method = "DELETE" if path == "/replicas/" else "GET"
            answer = httpx.request(method, gateway.url + BELOW.get(path, path), headers=headers)
            assert answer.status_code == WORDS.get(says) or str(answer.status_code) == says, (path, says)


def test_who_changes_the_fleet_stands_in_a_log_of_its_own(keyed: Gateway) -> None:
    """By the key's name or, from inside the container, as the operator; who only looks is not in it."""
    drain = "/replicas/vllm-0/drain"
    for method, path in (("GET", "/replicas"), ("PUT", drain), ("DELETE", drain)):
        assert httpx.request(method, keyed.url + path, headers=bearer(ADMIN)).status_code == 200
    assert httpx.put(keyed.url + drain, headers=bearer(USER)).status_code == 403
    keyed.admin("PUT", drain)
    keyed.admin("DELETE", drain)
    log = keyed.folder / "state" / "audit.jsonl"

    def lines() -> list[tuple[str, str, int]]:
        read = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        return [(line["who"], line["action"], line["status"]) for line in read if drain in line["action"]][-5:]

    until(
        lambda: (
            lines()
            == [
                ("root", f"PUT {drain}", 200),
                ("root", f"DELETE {drain}", 200),
                ("alice", f"PUT {drain}", 403),
                ("operator", f"PUT {drain}", 200),
                ("operator", f"DELETE {drain}", 200),
            ]
        ),
        "each change is in the log",
    )
    assert '"GET' not in log.read_text()


@pytest.mark.parametrize(
    "path",
    re.findall(r"location = (/\S+) +\{ include conf.d/generate.conf", (ROOT / "nginx/conf.d/public.conf").read_text()),
)
def test_no_model_without_a_key(client: httpx.Client, path: str) -> None:
    """Not on any path that a replica answers, and before the body is read."""
    answer = client.post(path, content=b"{", headers={"Content-Type": "application/json"})
    assert answer.status_code == 401
    assert (
        client.post(path, content=b"{}", headers={"Content-Type": "application/json", **bearer(USER)}).status_code
        != 401
    )


ADMINS = [
    ("GET", "/status.json"),
    ("GET", "/metrics"),
    ("GET", "/replicas"),
    ("PUT", "/replicas/vllm-0/drain"),
    ("DELETE", "/replicas/vllm-0/drain"),
    ("GET", "/canary"),
    ("PUT", "/canary"),
    ("DELETE", "/canary"),
]


@pytest.mark.parametrize(("method", "path"), ADMINS)
def test_what_is_for_admins(keyed: Gateway, client: httpx.Client, method: str, path: str) -> None:
    body = {"replicas": [], "share": 0} if (method, path) == ("PUT", "/canary") else None
    assert error_of(client.request(method, path))["code"] == "missing_api_key"
    denied = client.request(method, path, json=body, headers=bearer(USER))
    assert (denied.status_code, error_of(denied)["code"]) == (403, "forbidden")
    assert "draining" not in keyed.states().values()
    assert client.request(method, path, json=body, headers=bearer(ADMIN)).status_code == 200
    keyed.admin("DELETE", "/replicas/vllm-0/drain")


@pytest.mark.parametrize("path", ["/health", "/ready", "/status", "/status/status.js"])
def test_what_needs_no_key(client: httpx.Client, path: str) -> None:
    assert client.get(path).status_code == 200


@pytest.mark.parametrize("headers", [{}, bearer(USER)])
@pytest.mark.parametrize(
    "target",
    [
        "/v1/chat/completions/../../metrics",
        "//metrics",
        "/metrics/",
        "/%6detrics",
        "/v1/models/%2e%2e/%2e%2e/metrics",
        "/metrics%00",
        "/metrics;x",
        "/METRICS",
        "/status.json/",
        "/./status.json",
        "/v1//models",
        "/replicas/vllm-0/drain/",
        "/replicas%2fvllm-0%2fdrain",
        "http://localhost/metrics",
        "/v1/models/../../replicas",
    ],
)
def test_odd_paths_open_nothing(keyed: Gateway, headers: dict[str, str], target: str) -> None:
    lines = "".join(f"{name}: {value}\n" for name, value in headers.items())
    for method in ("GET", "PUT"):
        head = f"{method} {target} HTTP/1.1\nHost: localhost\nConnection: close\nContent-Length: 0\n{lines}"
        answer = raw(keyed, head)
        # The list of models is a user's; nothing else here is.
        assert answer.status_code in (400, 401, 403, 404, 405) or (
            target == "/v1//models" and headers and method == "GET"
        )


@pytest.mark.parametrize(
    "header", ["X-HTTP-Method-Override", "X-Method-Override", "X-Original-URL", "X-Rewrite-URL", "X-Forwarded-Prefix"]
)
def test_no_header_changes_what_was_asked(keyed: Gateway, client: httpx.Client, header: str) -> None:
    client.post("/v1/models", headers={**bearer(USER), header: "PUT"})
    answer = client.get("/v1/models", headers={**bearer(USER), header: "/replicas/vllm-0/drain"})
    assert (answer.status_code, answer.json()["object"]) == (200, "list")
    assert "draining" not in keyed.states().values()


def test_a_second_request_cannot_hide_in_the_first(keyed: Gateway) -> None:
    hidden = f"PUT /replicas/vllm-0/drain HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {USER}\r\n\r\n".encode()
    for lengths in (
        "Content-Length: 5\nTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked, identity",
        "Content-Length: 5\nContent-Length: 6",
        "Transfer-Encoding:\x0bchunked",
        "Content-Length: +5",
        "Transfer-Encoding: chunked\nTransfer-Encoding: chunked",
    ):
        known = f"Host: localhost\nContent-Type: application/json\nAuthorization: Bearer {USER}"
        head = f"POST {CHAT} HTTP/1.1\n{known}\n{lengths}\n"
        answer = raw(keyed, head, b"0\r\n\r\n" + hidden)
        assert answer.status_code in (400, 501), lengths


def test_ten_thousand_headers_are_refused(keyed: Gateway) -> None:
    lines = "".join(f"X-{n}: y\n" for n in range(10_000))
    head = f"GET /v1/models HTTP/1.1\nHost: localhost\nAuthorization: Bearer {USER}\n{lines}"
    assert raw(keyed, head).status_code in (400, 431)


def test_pages_of_other_names_and_origins_need_a_key_as_everyone(client: httpx.Client) -> None:
    """There is no door to guard where a key is asked for; but no other page may read an answer."""
    headers = {"Host": "llm.example", "Origin": "https://app.example"}
    assert client.post(CHAT, json=chat("hi"), headers=headers).status_code == 401
    answer = client.post(CHAT, json=chat("hi"), headers={**headers, **bearer(USER)})
    assert answer.status_code == 200
    assert "access-control-allow-origin" not in answer.headers
    preflight = client.options(CHAT, headers={**headers, "Access-Control-Request-Method": "POST"})
    assert preflight.status_code == 403


# ---- the file


def status_of(gateway: Gateway, key: str) -> int:
    return httpx.get(gateway.url + "/v1/models", headers=bearer(key)).status_code


def test_keys_come_change_and_go_within_two_seconds_on_all_workers() -> None:
    one, two = new_key(), new_key()
    with Replicas(1) as replicas, Gateway(replicas) as gateway:
        gateway.wait_ready()
        assert httpx.post(gateway.url + CHAT, json=chat("open")).status_code == 200

        def settled(file: str, wanted: dict[str, int]) -> None:
            gateway.write_secret("keys.json", file)

            def in_force() -> bool:
                # Each connection may come to another worker.
                return all(status_of(gateway, key) == status for key, status in wanted.items() for _ in range(8))

            until(in_force, f"{wanted} in force", 2)

        settled(keys_file(entry("a", one)), {one: 200, two: 401})
        settled(keys_file(entry("a", one), entry("b", two)), {one: 200, two: 200})
        settled(keys_file(entry("a", two, one, until_s=time.time() + 1.5)), {two: 200})
        until(lambda: status_of(gateway, one) == 401, "the old key ends by itself", 3)
        settled(keys_file(), {one: 401, two: 401})
        gateway.reload()
        assert status_of(gateway, two) == 401


BAD = [
    "",
    "{",
    "[]",
    "{}",
    '{"version": 2, "keys": []}',
    keys_file(more=1),
    keys_file({**entry("a", USER), "more": 1}),
    keys_file(entry("a", USER), entry("a", NEW)),
    keys_file(entry("a", USER, role="root")),
    keys_file(entry("A b", USER)),
    keys_file(entry("a", USER, limits={"requests": 1})),
    keys_file(entry("a", USER, limits={"n": -1})),
    keys_file(entry("a", USER, models="sim")),
    keys_file(entry("a")),
    keys_file(entry("a", USER, priority="0")),
]


def test_a_file_that_is_wrong_changes_nothing_and_is_loud(keyed: Gateway) -> None:
    def complaints() -> int:
        return keyed.log().count("secrets/keys.json is not taken")

    whole = keys_file(*KEYS)
    for bad in BAD[:2]:
        before = complaints()
        keyed.write_secret("keys.json", bad)
        # One may still be about the file before.
        until(lambda least=before + 2: complaints() >= least, f"a complaint about {bad}", 4)  # type: ignore[misc]
        assert status_of(keyed, USER) == 200
        assert status_of(keyed, new_key()) == 401
    assert 'gateway_secrets_refused_total{file="keys.json"} 0' not in httpx.get(keyed.metrics_url + "/metrics").text
    keyed.write_secret("keys.json", whole)
    until(lambda: status_of(keyed, USER) == 200, "the right file is in force", 3)


@pytest.mark.parametrize("bad", ["{", keys_file(more=1)])
def test_with_nothing_before_a_wrong_file_lets_nobody_in(bad: str) -> None:
    with Replicas(1) as replicas, Gateway(replicas, files={"secrets/keys.json": bad.encode()}) as gateway:
        answer = httpx.post(gateway.url + CHAT, json=chat("hi"), headers=bearer(USER))
        assert (answer.status_code, error_of(answer)["code"]) == (503, "keys_unreadable")
        gateway.write_secret("keys.json", keys_file(entry("a", USER)))
        until(lambda: status_of(gateway, USER) == 200, "the right file is in force", 3)


@pytest.mark.parametrize("kind", ["keys.json", "secrets"])
def test_a_file_of_keys_that_vanishes_opens_nothing(kind: str) -> None:
    """Neither the file alone nor its folder, also not after a restart; the operator has a way back."""
    files = {"secrets/keys.json": keys_file(entry("a", USER, role="admin")).encode()}
    with Replicas(1) as replicas, Gateway(replicas, files=files, key=USER) as gateway:
        gateway.wait_ready()
        # What marks that there were keys is written within a second of the start.
        until(lambda: list((gateway.folder / "state").glob("keyed.json")), "the mark is written", 5)
        folder = gateway.conf / "secrets"
        gone = folder / "keys.json" if kind == "keys.json" else folder
        aside = gateway.folder / "aside"
        gone.rename(aside)
        until(lambda: gateway.log().count("secrets/keys.json is gone") > 1, "the log says so", 5)
        assert httpx.post(gateway.url + CHAT, json=chat("hi")).status_code == 401
        assert status_of(gateway, USER) == 200
        metrics = httpx.get(gateway.metrics_url + "/metrics").text
        assert 'gateway_secrets_refused_total{file="keys.json"} 0' not in metrics
        gateway.reload()
        assert status_of(gateway, USER) == 200
        gateway.restart()
        answer = httpx.post(gateway.url + CHAT, json=chat("hi"))
        assert (answer.status_code, error_of(answer)["code"]) == (503, "keys_gone")
        assert "GATEWAY_AUTH=off" in answer.text
        assert status_of(gateway, USER) == 503
        aside.rename(gone)
        until(lambda: status_of(gateway, USER) == 200, "the key is in force again", 5)
        assert httpx.post(gateway.url + CHAT, json=chat("hi")).status_code == 401


def test_a_damaged_mark_opens_nothing() -> None:
    files = {"secrets/keys.json": keys_file(entry("a", USER)).encode()}
    with Replicas(1) as replicas, Gateway(replicas, files=files) as gateway:
        mark = gateway.folder / "state" / "keyed.json"
        until(mark.exists, "the mark is written", 5)
        (gateway.conf / "secrets" / "keys.json").unlink()
        mark.unlink()
        mark.write_text('{"keys')
        gateway.restart()
        answer = httpx.get(gateway.url + "/v1/models")
        assert (answer.status_code, error_of(answer)["code"]) == (503, "keys_gone")


def test_gateway_auth_off_opens_a_gateway_whose_keys_are_gone() -> None:
    files = {"secrets/keys.json": keys_file(entry("a", USER, role="admin")).encode()}
    with Replicas(1) as replicas, Gateway(replicas, files=files, key=USER) as gateway:
        gateway.wait_ready()
        until(lambda: list((gateway.folder / "state").glob("keyed.json")), "the mark is written", 5)
        (gateway.conf / "secrets" / "keys.json").unlink()
        gateway.env["GATEWAY_AUTH"] = "off"
        gateway.restart()
        until(lambda: httpx.get(gateway.url + "/v1/models").status_code == 200, "it is open", 5)
        until(lambda: "keys.json" not in (gateway.folder / "state" / "keyed.json").read_text(), "the mark is gone", 5)
        del gateway.env["GATEWAY_AUTH"]
        gateway.restart()
        until(lambda: httpx.get(gateway.url + "/v1/models").status_code == 200, "it is open as a fresh one", 5)


def test_a_wrong_file_that_is_taken_away_opens_nothing() -> None:
    with Replicas(1) as replicas, Gateway(replicas, files={"secrets/keys.json": b"{"}) as gateway:
        assert status_of(gateway, USER) == 503
        (gateway.conf / "secrets" / "keys.json").unlink()
        until(lambda: "secrets/keys.json is gone" in gateway.log(), "the log says so", 5)
        answer = httpx.get(gateway.url + "/v1/models")
        assert (answer.status_code, error_of(answer)["code"]) == (503, "keys_gone")


def test_gateway_auth_off_asks_for_no_key() -> None:
    files = {"secrets/keys.json": keys_file().encode()}
    with Replicas(1) as replicas, Gateway(replicas, files=files, env={"GATEWAY_AUTH": "off"}) as gateway:
        gateway.wait_ready()
        assert httpx.post(gateway.url + CHAT, json=chat("hi")).status_code == 200
