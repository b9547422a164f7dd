"""What becomes of a client's headers is what the table in docs/design.md says."""

import re

import pytest

from lab.sim.gateway import Gateway
from lab.sim.replicas import Replicas
from stack.shell import ROOT
from tests.gateway.conftest import seen_by
from tests.gateway.test_targets import send

DESIGN = (ROOT / "docs/design.md").read_text()
TABLE = re.findall(r"^\| `([A-Za-z-]+)` \| client \| (dropped|passed on|replaced): ", DESIGN, re.MULTILINE)
# Some headers mean something to Nginx itself; any other gets "mine".
VALUES = {"Host": "localhost", "Transfer-Encoding": "chunked", "Expect": "100-continue", "Connection": "close"}


def test_the_table_is_there() -> None:
    assert len(TABLE) > 20
    assert {fate for _, fate in TABLE} == {"dropped", "passed on", "replaced"}


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
