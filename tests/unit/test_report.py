"""`make report` holds what a bug report needs, no secret, no prompt and nobody's name, and never more than it may."""

from __future__ import annotations

import base64
import json
import re
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from access.keys import KeyStore
from access.store import Secrets
from access.tokens import TokenStore
from access.users import UserStore
from diagnosis import pack, scrub
from diagnosis.scrub import REMOVED, Scrubber
from diagnosis.seen import Container, Seen
from stack import settings
from tests.unit.fake_stack import FakeStack, fake_stack

PROMPT = "my grandmother's maiden name is Rumpelstiltskin"
HUB_TOKEN = "hf_planted0123456789abcdef"
JWT_KEY = "planted$key/with+signs" + "=" * 22
PASSWORD = "planted-password-of-whatever"
DATABASE = "postgres://fleet:planted-in-url@db.example/x"


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[FakeStack]:
    with fake_stack(tmp_path) as one:
        yield one


def plant(stack: FakeStack, broken: bool) -> dict[str, str]:
    """Puts secrets wherever they can be, and gives them by what they are; `broken`: in a `.env` that is wrong."""
    secrets = Secrets(stack.folder / "secrets")
    secrets.prepare()
    key = KeyStore(secrets).create("alice-holder")
    KeyStore(secrets, clock=lambda: time.time() - 99).create("erin-expired", expires=int(time.time()) - 9)
    TokenStore(secrets).take(JWT_KEY, 30)
    UserStore(secrets).add("bob-holder", "a long enough password, planted", "user")
    tls = secrets.keys.parent / "tls"
    tls.mkdir()
    (tls / "privkey.pem").write_text(
        "-----BEGIN PRIVATE KEY-----\nMIIplantedLineOfTheKey0123456789\n-----END PRIVATE KEY-----"
    )
    token_file = stack.folder / "hub-token"
    token_file.write_text(f"{HUB_TOKEN}\n")
    signing = json.loads(secrets.signing.read_text())["keys"][0]["jwk"]["k"]
    users = json.loads(secrets.users.read_text())["users"][0]["password"]
    jwt = ".".join(
        base64.urlsafe_b64encode(part).decode().rstrip("=") for part in (b'{"alg":"HS256"}', b'{"sub":"x"}', b"s" * 32)
    )
    refused = f"MY_PASSWORD={PASSWORD}\nDATABASE={DATABASE}\n" if broken else ""
    (stack.folder / ".env").write_text(
        f"JWT_KEY='{JWT_KEY}'\nHF_TOKEN_FILE={token_file}\nMAX_MODEL_LEN=2048\nACME_EMAIL=somebody@example.org\n"
        f"EXTRA_ARGS=--api-key argplanted --max-logprobs 40\n{refused}"
    )
    stack.env["DB_PASSWORD"] = PASSWORD
    (stack.folder / ".env").chmod(0o600)
    config = stack.config()
    config["services"]["prometheus"]["environment"] = {"SOME_TOKEN": "planted-in-compose", "DB": DATABASE,
                                                      "COPY": JWT_KEY.replace("$", "$$")}  # fmt: skip
    stack.docker = {r"config --format json": (json.dumps(config), "", 0, 0.0)}
    stack.status["replicas"][0]["reason"] = f"said {key} and {HUB_TOKEN}"
    broken_connection = (
        "2026/03/01 12:00:00 [error] 7#7: *1 connect() failed (111), client: 203.0.113.9, "
        f'request: "POST /v1/x?api_key={key} HTTP/1.1", upstream: "http://172.18.0.3:8000/v1/x"'
    )
    engine = "(APIServer pid=7) INFO 11-30 05:43:16"
    stack.logs = {
        "gateway": [
            json.dumps({"time": "t", "id": "req-1", "client": "203.0.113.9", "path": "/v1/x", "status": 200,
                        "key": "alice-holder", "end_user": "carol-user", "model": "org/model", "new_field": "dave",
                        "session": "12345678"}),
            broken_connection,
            f"something else entirely: {PROMPT}",
        ],
        "vllm-0": [
            f"launch: vllm serve /models/x --api-key argplanted --hf-token {HUB_TOKEN}",
            f"{engine} [request_logger.py:66] Received request chatcmpl-1: params: SamplingParams(stop=['{PROMPT}'])",
            f"{engine} [request_logger.py:56] Request chatcmpl-1 details: prompt: '{PROMPT}'",
            f"{engine} [request_logger.py:109] Generated response chatcmpl-1: output: '{PROMPT}', finish_reason: stop",
            f"{engine} [x.py:1] body: {{'messages': [{{'role': 'user', 'content': '{PROMPT}'}}]}}",
            f"pydantic_core.ValidationError: 1 error, input_value='{PROMPT}', input_type=str",
            PROMPT,
            f"(EngineCore pid=9) {PROMPT}",
            f"{engine} [x.py:1] Authorization: Bearer {jwt}",
            "(EngineCore pid=9) ERROR 11-30 05:43:17 [core.py:1] ValueError: No available memory for the cache blocks",
        ],
        "vllm-1": [f"{engine} [x.py:1] {users} {signing} {key} {PASSWORD}"],
    }  # fmt: skip
    stack.containers["open-webui"] = json.loads(
        json.dumps(stack.containers["prometheus"]).replace("prometheus", "open-webui")
    )
    stack.logs["open-webui"] = [PROMPT]
    stack.prometheus["alerts"]["alerts"] = [
        {"state": "firing", "labels": {"alertname": "KeyNearQuota", "key": "alice-holder"}, "activeAt": "",
         "annotations": {"summary": "alice-holder has used 95 % of its day, from 198.51.100.7"}}
    ]  # fmt: skip
    stack.prometheus["label/__name__/values"] = ["gateway_requests_total"]
    stack.prometheus["query_range"] = lambda form: {
        "result": [{"metric": {"replica": "vllm-0", "odd": key}, "values": [[1, form["query"][0][:40]]]}]
    }
    hashes = json.loads(secrets.keys.read_text())["keys"][0]["hashes"][0]["sha256"]
    return {
        "key": key, "its hash": hashes, "hub token": HUB_TOKEN, "JWT_KEY": JWT_KEY,
        "as Compose has it": JWT_KEY.replace("$", "$$"),
        "signing key": signing, "password's hash": users, "a setting's value": PASSWORD,
        "in an address": "planted-in-url",
        "argument": "argplanted", "in Compose's files": "planted-in-compose", "token": jwt, "TLS key": "MIIplanted",
        "prompt": PROMPT, "prompt's word": "Rumpelstiltskin", "address": "203.0.113.9", "holder": "alice-holder",
        "end user": "carol-user", "unknown field": "dave", "session": "12345678", "mail": "somebody@example.org",
        "user": "bob-holder", "holder in a finding": "erin-expired", "address in a finding": "198.51.100.7",
    }  # fmt: skip


def packed(stack: FakeStack) -> dict[str, str]:
    """The files of the report, by their names."""
    done = stack.run("report.py")
    assert done.returncode == 0, done.stderr
    (archive,) = (stack.folder / "dist").glob("*.tar.gz")
    assert archive.stat().st_mode & 0o777 == 0o600
    assert str(archive) in done.stdout.replace("\n", "")
    with tarfile.open(archive) as tar:
        files = {entry.name.partition("/")[2]: tar.extractfile(entry) for entry in tar.getmembers()}
        return {name: file.read().decode() for name, file in files.items() if file}


@pytest.mark.parametrize("broken", [False, True])
def test_planted_secrets_and_prompts_are_in_no_file_of_the_report(stack: FakeStack, broken: bool) -> None:
    """Keys, tokens, JWT_KEY, passwords, prompts, and who asked: each planted wherever it can stand."""
    planted = plant(stack, broken)
    files = packed(stack)
    whole = "\n".join(files.values())
    assert {what: value for what, value in planted.items() if value in whole or json.dumps(value)[1:-1] in whole} == {}
    # what is wanted of a report is there
    assert ("SOME_TOKEN" in files["compose.json"]) is not broken
    assert json.loads(files["settings.json"]) | {
        "MAX_MODEL_LEN": "2048",
        "JWT_KEY": REMOVED,
        "ACME_EMAIL": REMOVED,
    } == json.loads(files["settings.json"])
    assert json.loads(files["settings.json"])["EXTRA_ARGS"] == f"--api-key {REMOVED} --max-logprobs 40"
    assert "No available memory for the cache blocks" in files["logs/vllm-0.log"]
    assert "Received request chatcmpl-1" in files["logs/vllm-0.log"]
    line = json.loads(files["logs/gateway.log"].splitlines()[0])
    assert (line["id"], line["status"], line["model"]) == ("req-1", 200, "org/model")
    assert re.fullmatch(r"client-[0-9a-f]{6}", line["client"])
    assert "connect() failed (111)" in files["logs/gateway.log"]
    assert "sum without (key, end_user)" in files["metrics.jsonl"]
    assert re.search(r"KeyNearQuota \(holder-[0-9a-f]{6}\)", files["doctor.json"])
    for name in files:
        assert name == "README.txt" or f"  {name}: " in files["README.txt"]


def test_a_report_can_be_made_while_the_stack_is_down_and_says_what_is_missing(stack: FakeStack) -> None:
    stack.containers.clear()
    stack.docker = {
        r"^(?!version$)": ("", "Cannot connect to the Docker daemon", 1, 0.0),
        "^version": ("", "no", 1, 0.0),
    }
    stack.prometheus, stack.status = {}, None
    files = packed(stack)
    assert json.loads(files["doctor.json"])["verdict"] == "wrong"
    assert "not to be had" in files["compose.json"]
    assert "Prometheus" in files["README.txt"]


def test_the_parts_together_are_bounded_whatever_each_of_them_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit for each, and one for their sum; of a long part the end is kept, in whole lines, and that is said."""
    assert pack.ALL == 20 * pack.MIB
    monkeypatch.setattr(pack, "ALL", 2 * pack.MIB)
    report = pack.Report(Scrubber())
    lines = "".join(f"{number:07} {'x' * 90}\n" for number in range(6_000))
    for number in range(5):
        report.add(f"logs/{number}", "a log", lines, pack.MIB)
    assert report.bytes() <= pack.ALL
    first, last = report.parts[0], report.parts[-1]
    assert first.text.endswith(lines[-99:])
    assert last.text == ""
    assert last.cut == "the last 0.00 of 0.57 MiB"
    report = pack.Report(Scrubber())
    report.add("doctor.json", "", lines)
    assert len(report.parts[0].text) <= pack.PART
    assert re.match(r"\d{7} x", report.parts[0].text)


def test_the_end_of_a_long_log_is_read_without_holding_all_of_it(
    stack: FakeStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack.logs["vllm-0"] = [f"line {number} {'x' * 100}" for number in range(5000)]
    monkeypatch.setenv("PATH", str(stack.install_docker()))
    container = Container.model_validate(stack.containers["vllm-0"])
    lines = list(pack.log_lines(container, 20_000))
    assert lines[-1].startswith("line 4999 ")
    assert all(re.fullmatch(r"line \d+ x{100}", line) for line in lines)
    assert 100 < len(lines) < 400


def test_metrics_end_at_their_limit_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class Many:
        def ask(self, what: str, **_: object) -> object:
            series = [{"metric": {"n": str(n)}, "values": [[1, "0.123456789"]] * 60} for n in range(200)]
            return [f"m{n}" for n in range(1000)] if what.startswith("label") else {"result": series}

    monkeypatch.setattr(Seen, "prometheus", Many())
    began = time.monotonic()
    text, cut = pack.metrics(Seen())
    assert time.monotonic() - began < 20
    assert pack.METRICS < len(text) < pack.METRICS + pack.MIB
    assert re.fullmatch(r"the first \d+ of 1000 metrics", cut)


# ---- the scrubber


@pytest.mark.parametrize(
    "text",
    [
        "sk-fleet-abcdefgh12345", "sk-proj-abcdefgh12345", "hf_abcdefgh12345", "ghp_abcdefghijklmnop1234",
        "AKIAABCDEFGHIJKLMNOP", "$argon2id$v=19$m=65536,t=3,p=4$c2FsdA$aGFzaA",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJ4In0.c2lnbmF0dXJl", "0123456789abcdef" * 4,
    ],
)  # fmt: skip
def test_what_looks_like_a_secret_goes_whoevers_it_is(text: str) -> None:
    for around in ("{}", '"{}"', "a={}, b", "key: {}\n"):
        assert text not in Scrubber().text(around.format(text))


@pytest.mark.parametrize(
    "text",
    [
        "vllm-fleet/gateway:1.30.6", "sha256:" + "0123456789abcdef" * 4, "HuggingFaceTB/SmolLM2-135M-Instruct",
        "Avg prompt throughput: 12.5 tokens/s, Running: 3 reqs", "max_tokens=512", "MAX_NUM_BATCHED_TOKENS=2048",
        "GPU KV cache size: 920,144 tokens", "unknown setting max_tokenz", "ACCESS_TOKEN_EXPIRE_MINUTES=30",
        "12fd25f77366fa6b3b4b768ec3050bf629380bac",
    ],
)  # fmt: skip
def test_what_is_no_secret_stays(text: str) -> None:
    assert Scrubber().text(text) == text


@given(st.text(min_size=scrub.SHORTEST, max_size=60), st.text(max_size=80), st.text(max_size=80))
def test_a_known_secret_is_gone_wherever_it_stands(secret: str, before: str, after: str) -> None:
    secret = secret.strip()
    assume(len(secret) >= scrub.SHORTEST and secret not in REMOVED)
    scrubber = Scrubber([secret])
    for form in scrub.forms(secret):
        assert secret not in scrubber.text(f"{before}{form}{after}").replace(REMOVED, "\0")


def test_thousands_of_hashes_cost_no_search_each() -> None:
    hashes = [f"{number:064x}" for number in range(10_000)] + [f"$argon2id$v=19$m=1$s{n}$h" for n in range(10_000)]
    text = "\n".join([*hashes, *("x" * 60 for _ in range(50_000))])
    began = time.monotonic()
    clean = Scrubber(hashes).text(text)
    assert time.monotonic() - began < 10
    assert not [one for one in hashes[::500] if one in clean]


def test_a_secret_that_is_a_part_of_another_leaves_nothing_of_it() -> None:
    assert Scrubber(["abcdef", "abcdefghij"]).text("abcdefghij") == REMOVED


@given(st.text(alphabet="abcdefghij ", min_size=12, max_size=200))
def test_a_line_of_a_replica_that_could_be_anything_is_left_out(prompt: str) -> None:
    assume(len(prompt.strip()) >= 12)
    assert prompt not in scrub.replica_line(prompt)
    assert prompt not in scrub.replica_line(f"(EngineCore pid=39) {prompt}")


def test_values_with_a_secrets_name_are_removed_from_data() -> None:
    data = {"env": {"HF_TOKEN": "x", "A_KEY": "y", "MAX_TOKENS": "5", "list": [{"password": "z"}]}}
    assert Scrubber().data(data) == {
        "env": {"HF_TOKEN": REMOVED, "A_KEY": REMOVED, "MAX_TOKENS": "5", "list": [{"password": REMOVED}]}
    }


@pytest.mark.parametrize(
    "name", ["JWT_KEY", "ALICE_HASHED_PASSWORD", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "api-key", "apikey"]
)
def test_secrets_are_known_by_their_settings_names(name: str) -> None:
    assert settings.may_be_secret(name)


@pytest.mark.parametrize("name", ["MAX_NUM_BATCHED_TOKENS", "KV_CACHE_DTYPE", "ACCESS_TOKEN_EXPIRE_MINUTES", "MODEL"])
def test_other_settings_are_not_taken_for_secrets(name: str) -> None:
    assert not settings.may_be_secret(name)
