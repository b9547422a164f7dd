"""Refusals and failures as the real SDKs of OpenAI and Anthropic show them, those of Python and those of Node."""

import time
from itertools import count

import pytest

from lab.sim.gateway import Gateway
from lab.sim.replicas import Replicas
from tests.gateway.conftest import seen_by
from tests.gateway.sdks import SDKS, Asked, Said, install_node

numbers = count()


@pytest.fixture(params=SDKS)
def language(request: pytest.FixtureRequest) -> str:
    """The language whose SDKs are asked."""
    name: str = request.param
    if name == "node":
        install_node()
    return name


@pytest.fixture(params=["chat", "responses", "messages"])
def api(request: pytest.FixtureRequest) -> str:
    """The API that is asked: Anthropic's SDK speaks `messages`, OpenAI's the others."""
    name: str = request.param
    return name


def prompt() -> str:
    """One that was never asked before."""
    return f"question {next(numbers)} of an SDK"


def arrived(fleet: Replicas, text: str) -> int:
    """How often replicas were sent this prompt."""
    return sum(len(seen_by(sim, text)) for sim in fleet)


def names_its_request(said: Said) -> bool:
    """Whether the error's words have the id that the gateway gave the request, and the SDK knows it by itself."""
    return bool(said.request_id) and f"(request id {said.request_id})" in said.message


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_arrives(gateway: Gateway, language: str, api: str, stream: bool) -> None:
    said = SDKS[language](Asked(api, gateway.url, prompt(), stream=stream))
    assert said.error == ""
    assert len(said.text.split()) == 20


def test_a_comment_that_keeps_the_connection_alive_is_skipped(
    gateway: Gateway, fleet: Replicas, language: str, api: str
) -> None:
    for sim in fleet:
        sim.fault(comment=True)
    said = SDKS[language](Asked(api, gateway.url, prompt(), stream=True))
    assert said.error == ""
    assert len(said.text.split()) == 20


def test_an_unknown_model_is_not_found(gateway: Gateway, language: str, api: str) -> None:
    said = SDKS[language](Asked(api, gateway.url, prompt(), model="gpt-9"))
    assert (said.error, said.status) == ("NotFoundError", 404)
    assert "The model 'gpt-9' does not exist here. There are: sim." in said.message
    assert names_its_request(said)


def test_a_full_fleet_is_a_rate_limit_and_asked_again_when_it_said(
    gateway: Gateway, fleet: Replicas, language: str, api: str
) -> None:
    for sim in fleet:
        sim.fault("status", status=503)
    asked = Asked(api, gateway.url, prompt(), retries=1)
    began = time.monotonic()
    said = SDKS[language](asked)
    assert (said.error, said.status) == ("RateLimitError", 429)
    assert "All replicas are full." in said.message
    assert names_its_request(said)
    # Without Retry-After the SDKs would wait half a second.
    assert time.monotonic() - began >= 1
    assert arrived(fleet, asked.prompt) == 2 * len(list(fleet))


def test_a_fleet_that_is_not_ready_is_a_server_error(
    gateway: Gateway, fleet: Replicas, language: str, api: str
) -> None:
    for sim in fleet:
        gateway.admin("PUT", f"/replicas/{sim.name}/drain")
    said = SDKS[language](Asked(api, gateway.url, prompt()))
    assert said.error == ("ServiceUnavailableError" if api == "messages" else "InternalServerError")
    assert said.status == 503
    assert "No replica can take this request" in said.message
    assert names_its_request(said)


def test_a_stream_that_breaks_off_raises_what_the_api_has_for_it(
    gateway: Gateway, fleet: Replicas, language: str, api: str
) -> None:
    for sim in fleet:
        sim.fault("cut", after_tokens=3)
    said = SDKS[language](Asked(api, gateway.url, prompt(), stream=True, retries=2))
    assert len(said.text.split()) == 3
    assert said.error == ("APIStatusError" if (language, api) == ("python", "messages") else "APIError")
    assert "was lost while it answered. (request id " in said.message
    # OpenAI's SDK for Python does not look at the headers then.
    if (language, api) not in {("python", "chat"), ("python", "responses")}:
        assert names_its_request(said)


@pytest.mark.parametrize(("status", "tries"), [(500, 1), (502, 2)])
def test_what_may_have_broken_an_engine_is_not_repeated(
    gateway: Gateway, fleet: Replicas, language: str, api: str, status: int, tries: int
) -> None:
    """X-Should-Retry, which the SDKs obey: by themselves they repeat both."""
    for sim in fleet:
        sim.fault("status", status=status)
    asked = Asked(api, gateway.url, prompt(), retries=2)
    said = SDKS[language](asked)
    assert (said.error, said.status) == ("InternalServerError", status)
    assert "simulated fault" in said.message
    assert arrived(fleet, asked.prompt) == tries
