"""Open WebUI in its own image, before the real replicas of the running stack, in a real browser.

The first run builds the image, which takes minutes; later ones find it.
"""

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx
import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from access.keys import KeyStore
from access.store import Secrets
from access.tokens import TokenStore, issue
from access.users import UserStore
from lab.stack import Stack, run
from lab.waiting import until
from stack import images
from stack.access import webui_key
from stack.compose import Config
from stack.shell import ROOT
from tests.browser.conftest import look

PROJECT = "vllm-fleet-webui-test"
PASSWORD = "seven quiet otters at noon"
SERVICES = ("gateway", "tokens", "webui")
# A fresh machine fetches and builds the image first.
pytestmark = pytest.mark.timeout(1200)


def compose(env: dict[str, str], *arguments: str, timeout_s: float = 120) -> str:
    files = ["--file=docker-compose.yml", "--file=docker-compose.webui.yml", "--file=tests/fronts/test_webui.yml"]
    command = ["docker", "compose", f"--project-name={PROJECT}", "--profile=webui", "--env-file=/dev/null", *files]
    done = subprocess.run([*command, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@dataclass
class Chat:
    """Open WebUI behind its gateway."""

    env: dict[str, str]
    url: str
    gateway_url: str
    model: str
    admin: str
    tokens: TokenStore

    def token(self, name: str, role: Literal["user", "admin"] = "user", left_s: float = 1800) -> str:
        """A token as the token service gives it, which ends in `left_s` seconds."""
        return issue(self.tokens.signing(), name, role, time.time() - 1800 + left_s)

    def ask(self, method: str, path: str, token: str = "", **rest: Any) -> httpx.Response:
        """One request, with a token in its cookie where one is given."""
        headers = rest.pop("headers", {}) | ({"Cookie": f"fleet_token={token}"} if token else {})
        return httpx.request(method, self.url + path, headers=headers, timeout=60, **rest)

    def signed_in(self, token: str) -> dict[str, Any]:
        """What Open WebUI says of who has this token: the user, and its own token."""
        found: dict[str, Any] = self.ask(
            "POST", "/api/v1/auths/signin", token, json={"email": "", "password": ""}
        ).json()
        return found

    def inside(self, code: str) -> str:
        """What Python in Open WebUI's container says."""
        return compose(self.env, "exec", "-T", "webui", "python3", "-c", code).strip()

    def used(self, user: str) -> float:
        """Tokens of answers that an end user has had, in the gateway's metrics."""
        told = httpx.get(f"{self.gateway_url}/metrics", headers={"Authorization": f"Bearer {self.admin}"}).text
        lines = [line for line in told.splitlines() if line.startswith("gateway_tokens_total{")]
        labels = ('key="open-webui"', f'end_user="{user}"', 'kind="completion"')
        own = [line for line in lines if all(label in line for label in labels)]
        return sum(float(line.rpartition(" ")[2]) for line in own)


@pytest.fixture(scope="module")
def chat(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chat]:
    folder = tmp_path_factory.mktemp("webui") / "secrets"
    store = Secrets(folder)
    admin = KeyStore(store).create("tests", role="admin")
    webui_key(store)
    tokens, users = TokenStore(store), UserStore(store)
    tokens.take(None, 30)
    users.add("alice", PASSWORD, "user")
    users.add("root", PASSWORD, "admin")
    env = {name: os.environ[name] for name in ("PATH", "HOME")} | {"TEST_SECRETS": str(folder)}
    config = Config.model_validate_json(compose(env, "config", "--format=json"))
    config.services = {name: config.services[name] for name in SERVICES}
    images.bring(config, "auto", print)
    try:
        compose(env, "up", "--detach", "--no-build", *SERVICES)
        # the replicas that there are already
        replica = stack.compose("ps", "--quiet", "vllm-0").strip()
        network = run(
            "docker", "inspect", "--format", "{{range $name, $_ := .NetworkSettings.Networks}}{{$name}}{{end}}", replica
        )
        run("docker", "network", "connect", network.strip(), compose(env, "ps", "--quiet", "gateway").strip())
        own, api = ("http://" + compose(env, "port", "gateway", port).strip() for port in ("8090", "80"))
        found = Chat(env, own, api, stack.model, admin, tokens)
        token = found.token("alice")

        def ready() -> bool:
            assert compose(env, "ps", "--quiet", "webui"), compose(env, "logs", "--tail=30", "webui")
            return found.ask("GET", "/health", token).status_code == 200

        until(ready, "Open WebUI answers", 300)
        until(lambda: httpx.get(f"{found.gateway_url}/ready").status_code == 200, "the replicas are ready", 60)
        yield found
    finally:
        compose(env, "down", "--volumes", "--timeout=3")


# Notes how long the last answer is whenever the page changes.
LENGTHS = """
lengths = new Set();
new MutationObserver(() => {
    const answer = [...document.querySelectorAll('.chat-assistant')].pop();
    if (answer?.innerText) lengths.add(answer.innerText.length);
}).observe(document.body, {subtree: true, childList: true, characterData: true});
"""


def sign_in(browser: Chrome, chat: Chat, name: str, password: str = PASSWORD) -> None:
    browser.get(chat.url)
    until(lambda: browser.find_elements(By.ID, "username"), "the form", 20)
    browser.find_element(By.ID, "username").send_keys(name)
    browser.find_element(By.ID, "password").send_keys(password, Keys.ENTER)


def shown(browser: Chrome, selector: str, within_s: float = 60) -> Any:
    """The first element of a selector that shows."""

    def found() -> Any:
        return next((one for one in browser.find_elements(By.CSS_SELECTOR, selector) if one.is_displayed()), None)

    until(lambda: found() is not None, f"{selector} shows", within_s)
    return found()


def test_a_user_signs_in_picks_a_model_asks_and_sees_the_answer_come(
    chat: Chat, browser: Chrome, picture: Callable[[str], Path]
) -> None:
    look(browser, 1120, 700)
    sign_in(browser, chat, "alice", "another one that is long")
    until(lambda: "No such user, or another password." in browser.page_source, "the refusal", 20)
    sign_in(browser, chat, "alice")
    box = shown(browser, "#chat-input")
    assert "fleet_token" not in browser.execute_script("return document.cookie")
    shown(browser, "[id^=model-selector]").click()
    shown(browser, f"[role=option][data-value='{chat.model}'], button[data-value='{chat.model}']").click()
    before = chat.used("user:alice")
    browser.execute_script(LENGTHS)
    box.send_keys("Write three sentences about the sea.", Keys.ENTER)
    until(lambda: chat.used("user:alice") > before, "an answer that is counted as alice's", 120)
    # it came in pieces, and not at its end
    assert len(browser.execute_script("return [...lengths]")) > 3
    assert picture("webui.png").stat().st_size > 10_000


def test_the_models_are_the_fleets_and_a_role_is_that_of_the_token(chat: Chat) -> None:
    fleet = httpx.get(f"{chat.gateway_url}/v1/models", headers={"Authorization": f"Bearer {chat.admin}"}).json()["data"]
    for name, role in (("alice", "user"), ("root", "admin"), ("root", "user")):
        token = chat.token(name, role)  # type: ignore[arg-type]
        found = chat.signed_in(token)
        assert (found["email"], found["name"], found["role"]) == (f"user:{name}", name, role)
        own = {"Authorization": f"Bearer {found['token']}"}
        listed = chat.ask("GET", "/api/models", token, headers=own).json()["data"]
        assert {one["id"] for one in listed} == {one["id"] for one in fleet}
    # Open WebUI's own token of one who was an admin, with a role that the gateway has since taken
    assert chat.ask("GET", "/api/v1/users/", token, headers=own).status_code == 401


def test_each_user_is_counted_apart(chat: Chat) -> None:
    body = {"model": chat.model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "stream": False}
    before = {name: chat.used(f"user:{name}") for name in ("root", "alice")}
    token = chat.token("root", "admin")
    own = {"Authorization": f"Bearer {chat.signed_in(token)['token']}"}
    answer = chat.ask("POST", "/api/chat/completions", token, headers=own, json=body)
    assert answer.status_code == 200, answer.text
    until(lambda: chat.used("user:root") - before["root"] in (3, 4), "the answer counted as root's", 10)
    assert chat.used("user:alice") == before["alice"]


def test_neither_a_forged_header_nor_open_webuis_own_token_lets_in(chat: Chat) -> None:
    own = {"Authorization": f"Bearer {chat.signed_in(chat.token('alice'))['token']}"}
    for headers in ({}, own, {"X-Fleet-User": "user:root", "X-Fleet-Role": "admin", "X-Fleet-Seconds": "99"}):
        signin = chat.ask("POST", "/api/v1/auths/signin", headers=headers, json={"email": "", "password": ""})
        assert signin.status_code == chat.ask("GET", "/api/v1/auths/", headers=headers).status_code == 401
    # alice's gets nobody else in as alice, and forged headers beside a token of root's change nothing
    assert chat.ask("GET", "/api/v1/auths/", chat.token("root"), headers=own).status_code == 401
    forged = {"X-Fleet-User": "user:alice", "X-Fleet-Role": "admin"}
    both = chat.ask(
        "POST", "/api/v1/auths/signin", chat.token("root"), headers=forged, json={"email": "", "password": ""}
    )
    assert (both.json()["email"], both.json()["role"]) == ("user:root", "user")
    # nor is there a way past the gateway
    asked = "import urllib.request as u; u.urlopen('http://127.0.0.1:8080/api/config')"
    assert chat.inside(f"try:\n {asked}\nexcept Exception as e: print(e)") == "HTTP Error 401: Unauthorized"


def test_who_signs_out_or_whose_token_ends_is_out(chat: Chat, browser: Chrome) -> None:
    browser.get(f"{chat.url}/sign-out")
    sign_in(browser, chat, "root")
    shown(browser, "#chat-input")
    browser.get(f"{chat.url}/sign-out")
    until(lambda: browser.current_url == f"{chat.url}/sign-in", "the form after signing out", 20)
    browser.get(chat.url)
    assert browser.current_url == f"{chat.url}/sign-in"
    browser.add_cookie({"name": "fleet_token", "value": chat.token("alice")})
    browser.get(chat.url)
    # in spite of what root left in this browser
    shown(browser, "#chat-input")
    browser.add_cookie({"name": "fleet_token", "value": chat.token("alice", left_s=10)})
    browser.get(chat.url)
    until(lambda: browser.current_url == f"{chat.url}/sign-in", "the form when the token has ended", 40)


def test_it_asks_nobody_outside_and_cannot(chat: Chat) -> None:
    """What it looked up and called since its start, and through all the tests above; and that there is no way out."""
    asked = set(compose(chat.env, "exec", "-T", "webui", "cat", "/tmp/asked").split())  # noqa: S108
    assert "gateway" in asked
    own = {"localhost", "0.0.0.0", "127.0.0.1", "::1", "None"}
    assert [host for host in asked - own - {"gateway"} if not host.startswith(("172.", "192.168.", "10."))] == []
    for address, wanted in (("gateway", "open"), ("1.1.1.1", "closed")):
        call = f"import socket\ntry: socket.create_connection(({address!r}, 80), 3); print('open')"
        code = f"{call}\nexcept OSError: print('closed')"
        assert chat.inside(code) == wanted
