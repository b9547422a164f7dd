"""A page in somebody's browser gets nothing from the gateway, unless a setting names its origin."""

from collections.abc import Iterator

import httpx
import pytest

from lab.sim.gateway import Gateway
from lab.sim.replicas import Replicas
from lab.waiting import until
from tests.gateway.conftest import chat
from tests.gateway.test_public import error_of
from tests.gateway.test_routing import counted

CHAT = "/v1/chat/completions"
APP = "https://app.example"
SETTINGS = {"GATEWAY_HOSTS": "llm.example, GPU-box", "CORS_ORIGINS": f"{APP},http://localhost:5173"}


@pytest.fixture(scope="module")
def open_client() -> Iterator[httpx.Client]:
    """A client of a gateway that has names and origins in its settings."""
    with Replicas(1) as replicas, Gateway(replicas, env=SETTINGS) as gateway:
        gateway.wait_ready()
        with httpx.Client(base_url=gateway.url, timeout=30) as session:
            yield session


@pytest.mark.parametrize("path", [CHAT, "/v1/models", "/status", "/status.json", "/health", "/nothing"])
@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "localhost.evil.example", "127.0.0.1.evil.example"]
)
def test_a_name_that_is_not_ours_is_refused(client: httpx.Client, path: str, host: str) -> None:
    """DNS that points a foreign name at this host gives its pages nothing."""
    answer = client.request("POST" if path == CHAT else "GET", path, headers={"Host": host})
    assert answer.status_code == 421
    assert "GATEWAY_HOSTS" in str(error_of(answer)["message"])


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:8080", "127.0.0.1", "[::1]:80", "192.168.1.7:8000", "gateway"]
)
def test_local_names_and_addresses_are_served(client: httpx.Client, host: str) -> None:
    assert client.post(CHAT, json=chat("local"), headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", ["llm.example", "llm.example:8443", "gpu-box"])
def test_listed_names_are_served(open_client: httpx.Client, host: str) -> None:
    assert open_client.post(CHAT, json=chat("listed"), headers={"Host": host}).status_code == 200
    assert open_client.post(CHAT, json=chat("not"), headers={"Host": f"x{host}"}).status_code == 421


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://localhost", "file://", "http://localhost:8080.evil"]
)
@pytest.mark.parametrize("method", ["POST", "GET", "OPTIONS"])
def test_a_page_of_another_origin_is_refused(client: httpx.Client, origin: str, method: str) -> None:
    headers = {"Origin": origin, "Host": "localhost:8080"}
    for path in (CHAT, "/v1/models"):
        answer = client.request(method, path, headers=headers)
        assert answer.status_code == 403
        assert "CORS_ORIGINS" in str(error_of(answer)["message"])
        assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("origin", ["http://localhost:8080", "https://localhost:8080"])
def test_the_gateways_own_page_may_ask(client: httpx.Client, origin: str) -> None:
    headers = {"Origin": origin, "Host": "localhost:8080"}
    assert client.get("/status.json", headers=headers).status_code == 200
    assert client.post(CHAT, json=chat("own"), headers=headers).status_code == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "application/jsonx", "\xff"])
def test_a_body_that_is_no_json_is_refused_with_what_to_send(client: httpx.Client, kind: str) -> None:
    """Among them is what curl -d sends by itself."""
    answer = client.post(CHAT, content=b"{}", headers={b"Content-Type": kind.encode("latin-1")})
    assert answer.status_code == 415
    assert "'Content-Type: application/json'" in str(error_of(answer)["message"])


@pytest.mark.parametrize(
    "kind", ["application/json", "Application/JSON; charset=utf-8", "multipart/form-data; boundary=x"]
)
def test_json_and_uploads_are_read(client: httpx.Client, kind: str) -> None:
    body = httpx.Request("POST", "http://a", json=chat("kinds")).content
    assert client.post(CHAT, content=body, headers={"Content-Type": kind}).status_code == 200


def test_a_listed_origin_gets_what_a_browser_needs(open_client: httpx.Client) -> None:
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type,authorization"}
    preflight = open_client.options(CHAT, headers={"Origin": APP, **asked})
    assert preflight.status_code == 204
    assert preflight.headers["access-control-allow-origin"] == APP
    assert "POST" in preflight.headers["access-control-allow-methods"]
    assert preflight.headers["access-control-allow-headers"] == "content-type,authorization"
    answers = [
        open_client.post(CHAT, json=chat("cors"), headers={"Origin": APP}),
        open_client.post(CHAT, json=chat("cors", stream=True), headers={"Origin": APP}),
        open_client.post(CHAT, json=chat("cors", model="none"), headers={"Origin": APP}),
        open_client.post(CHAT, content=b"a", headers={"Origin": APP, "Content-Type": "text/plain"}),
        open_client.get("/v1/models", headers={"Origin": APP}),
    ]
    assert [answer.status_code for answer in answers] == [200, 200, 404, 415, 200]
    for answer in answers:
        assert answer.headers.get_list("access-control-allow-origin") == [APP]
        assert "X-Request-Id" in answer.headers["access-control-expose-headers"]
        assert "Origin" in answer.headers["vary"]


def test_whom_the_door_refuses_is_counted(client: httpx.Client, gateway: Gateway) -> None:
    refused: dict[str, dict[str, str]] = {
        "host": {"Host": "evil.example"},
        "origin": {"Origin": "https://evil.example"},
        "media": {"Content-Type": "text/plain"},
        "connection": {"Connection": "X-Secret"},
    }
    for cause, headers in refused.items():
        before = counted(gateway, f'gateway_refusals_total{{cause="{cause}"}}')
        assert client.post(CHAT, content=b"a", headers=headers).status_code >= 400
        assert counted(gateway, f'gateway_refusals_total{{cause="{cause}"}}') == before + 1


def test_names_and_origins_that_can_never_match_are_named_in_the_log_and_left_out() -> None:
    wrong = {
        "GATEWAY_HOSTS": "*, llm.example, b:80, http://c",
        "CORS_ORIGINS": f"*,{APP}, {APP}/, a.example, https://b:443",
    }
    with Replicas(1) as replicas, Gateway(replicas, env=wrong) as gateway:
        gateway.wait_ready()
        until(lambda: "GATEWAY_HOSTS" in gateway.log(), "it is in the log")
        assert "GATEWAY_HOSTS: *, b:80, http://c is no name without scheme and port" in gateway.log()
        assert f"CORS_ORIGINS: *, {APP}/, a.example, https://b:443 is no origin" in gateway.log()
        with httpx.Client(base_url=gateway.url) as client:
            assert client.get("/v1/models", headers={"Host": "llm.example", "Origin": APP}).status_code == 200
            assert client.get("/v1/models", headers={"Host": "evil.example"}).status_code == 421
            assert client.get("/v1/models", headers={"Origin": "https://evil.example"}).status_code == 403


def test_no_other_origin_gets_it(open_client: httpx.Client) -> None:
    assert open_client.post(CHAT, json=chat("cors"), headers={"Origin": f"{APP}.evil"}).status_code == 403
    assert "access-control-allow-origin" not in open_client.post(CHAT, json=chat("no page")).headers
