"""What becomes of a client's headers is what the table in docs/design.md says."""

import re

import pytest

from lab.sim.gateway import Gateway
from lab.sim.replicas import Replicas
from stack.shell import ROOT
from tests.gateway.conftest import seen_by
from tests.gateway.test_public import error_of
from tests.gateway.test_targets import send

DESIGN = (ROOT / "docs/design.md").read_text()
TABLE = re.findall(r"^\| `([A-Za-z0-9-]+)` \| client \| (dropped|passed on|replaced): ", DESIGN, re.MULTILINE)
# Some headers mean something to Nginx itself; any other gets "mine".
VALUES = {"Host": "localhost", "Transfer-Encoding": "chunked", "Expect": "100-continue", "Connection": "close"}


def test_the_table_is_there() -> None:
    assert len(TABLE) > 20
    assert {fate for _, fate in TABLE} == {"dropped", "passed on", "replaced"}


@pytest.mark.parametrize("named", ["X-Secret", "close, X-Secret", "keep-alive ,x-secret,", "Traceparent"])
def test_a_header_that_the_client_keeps_to_its_connection_goes_no_further(gateway: Gateway, named: str) -> None:
    """Nginx would pass it on: such a request is refused."""
    lines = f"Host: localhost\r\nConnection: {named}\r\nX-Secret: 1\r\nContent-Length: 2\r\n"
    status, answer = send(gateway, f"POST /v1/chat/completions HTTP/1.1\r\n{lines}\r\n{{}}".encode())
    assert status == 400
    assert error_of(answer)["code"] == "connection_header"


def test_what_clients_say_of_a_connection_itself_is_fine(gateway: Gateway) -> None:
    """curl asks for HTTP/2 like that."""
    lines = (
        "Host: localhost\r\nConnection: Upgrade, HTTP2-Settings, close\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
    )
    assert send(gateway, f"GET /v1/models HTTP/1.1\r\n{lines}\r\n".encode())[0] == 200


@pytest.mark.parametrize(("header", "fate"), TABLE)
@pytest.mark.parametrize("spelling", [str, str.lower])
def test_a_header_fares_as_the_table_says(
    gateway: Gateway, fleet: Replicas, header: str, fate: str, spelling: type[str]
) -> None:
    """Each row, in either case; the request itself always works."""
    text = f"<{header} {spelling('A')}>"
    value = VALUES.get(header, "mine")
    head = {"Host": "localhost", "Connection": "close", "Content-Type": "application/json", header: value}
    body = f'{{"model":"sim","max_tokens":1,"messages":[{{"role":"user","content":"{text}"}}]}}'.encode()
    if header == "Transfer-Encoding":
        body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    else:
        head["Content-Length"] = str(len(body))
    lines = "".join(f"{spelling(name)}: {value}\r\n" for name, value in head.items())
    if header == "Origin":
        lines = lines.replace("mine", gateway.url.replace(gateway.host, "localhost").replace(":8080", ""))
        value = "http"
    status, answer = send(gateway, f"POST /v1/chat/completions HTTP/1.1\r\n{lines}\r\n".encode() + body)
    assert status == 200, answer.text
    (request,) = (request for sim in fleet for request in seen_by(sim, text))
    found = re.search(rf"^{header}: (.*)\r$", request["head"] + "\r", re.MULTILINE | re.IGNORECASE)
    match fate:
        case "dropped":
            assert found is None or (header, found[1]) == ("Connection", "keep-alive")
        case "passed on":
            assert found
            assert found[1].startswith(value)
        case "replaced":
            assert found
            assert value not in found[1]
