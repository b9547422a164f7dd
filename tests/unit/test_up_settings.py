"""The check of `.env`: every name is one that something reads, and a mistake is one line that says where it is."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models import hub
from stack import hours, settings
from stack.console import Problem

EXAMPLE = "# The gateway's port\n#HTTP_PORT=80\nMODEL=\n# BIND_ADDRESS=127.0.0.1\n# a sentence with A=B in it\n"
KNOWN = {"HTTP_PORT", "MODEL", "BIND_ADDRESS"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("08:00-18:00", "'08:00-18:00' is no entry: write it as qwen=Mon-Fri 08:00-18:00"),
        ("qwen=Mo 08:00-18:00", "Mo is no day"),
        ("qwen=Mon 08:00-25:00", "25:00 is no time of a day"),
        ("qwen=Mon 08:00-08:00", "ends when it begins"),
    ],
)
def test_hours_of_models_that_are_none_are_refused(text: str, says: str) -> None:
    with pytest.raises(Problem, match="AWAKE") as refused:
        hours.check(settings.check({"AWAKE": text}).awake)
    assert says in str(refused.value)
    hours.check(settings.check({"AWAKE": "qwen=Mon-Fri 08:00-18:00; llama=Sat,Sun 22:00-06:00"}).awake)
    hours.check(settings.check({}).awake)


def test_seconds_of_rest_are_a_number() -> None:
    assert settings.check({}).sleep_after_seconds == 600
    with pytest.raises(Problem, match="SLEEP_AFTER_SECONDS=0"):
        settings.check({"SLEEP_AFTER_SECONDS": "0"})


def test_the_example_names_the_settings_commented_out_or_not() -> None:
    assert settings.known_names(EXAMPLE) == KNOWN


def test_every_setting_of_make_up_is_in_the_example() -> None:
    known = settings.known_names(settings.EXAMPLE_FILE.read_text())
    assert {field.alias for field in settings.Settings.model_fields.values()} <= known


def test_a_misspelt_name_is_refused_with_the_one_that_was_meant() -> None:
    with pytest.raises(Problem, match=r"\.env, line 2: nothing reads HTTP_PROT: did you mean HTTP_PORT\?"):
        settings.parse_env("MODEL=a\nHTTP_PROT=81\n", KNOWN)


def test_a_line_that_is_no_setting_is_refused() -> None:
    with pytest.raises(Problem, match=r"\.env, line 1: this is not NAME=value"):
        settings.parse_env("HTTP_PORT 81\n", KNOWN)


@pytest.mark.parametrize("line", ["planted secret", f"{'planted' * 6}=", "planted+/=", "planted"])
def test_a_line_that_may_be_of_a_secret_is_not_shown(line: str) -> None:
    with pytest.raises(Problem, match=r"\.env, line 2: this is not NAME=value") as refused:
        settings.parse_env(f"MODEL=a\n{line}\n", KNOWN)
    assert "planted" not in str(refused.value)


@pytest.mark.parametrize("line", ["JWT_KEY=x", "USER_LIST=A\nA_HASHED_PASSWORD=x"])
@pytest.mark.parametrize("mode", [0o640, 0o604])
def test_secrets_in_a_file_that_others_read_are_refused(tmp_path: Path, line: str, mode: int) -> None:
    file = tmp_path / ".env"
    file.write_text(f"{line}\n")
    file.chmod(mode)
    with pytest.raises(Problem, match=r"in \.env, which other users of this host may read: chmod 600 \.env"):
        settings.check_private(file)
    file.chmod(0o600)
    settings.check_private(file)
    file.write_text("MODEL=a\nJWT_KEY=\n")
    file.chmod(mode)
    settings.check_private(file)


def test_a_misspelt_name_of_composes_own_is_refused() -> None:
    with pytest.raises(Problem, match=r"nothing reads COMPOSE_PROFILE: did you mean COMPOSE_PROFILES\?"):
        settings.parse_env("COMPOSE_PROFILE=tokens\n", KNOWN)


def test_a_domain_that_no_authority_reaches_is_refused() -> None:
    domain = {"HTTPS_DOMAIN": "a.example", "HTTPS_PORT": "443", "ACME_EMAIL": "a@a.example"}
    with pytest.raises(Problem, match=r"no authority reaches the gateway at BIND_ADDRESS=127\.0\.0\.1"):
        settings.check(domain)
    settings.check(domain | {"BIND_ADDRESS": "0.0.0.0"})


def test_the_line_of_a_mistake_is_counted_from_the_top() -> None:
    with pytest.raises(Problem, match=r"\.env, line 6: nothing reads HTTP_PROT"):
        settings.parse_env("MODEL='a\nb'\n# comment\n\n\nHTTP_PROT=81\n", KNOWN)


def test_composes_own_names_pass() -> None:
    assert settings.parse_env("COMPOSE_PROJECT_NAME=mine\n", KNOWN) == {"COMPOSE_PROJECT_NAME": "mine"}


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("a # comment", "a"),
        ("a#b", "a#b"),
        ("# no comment", "# no comment"),
        ('"two\nlines" # comment', "two\nlines"),
        (r"'it\'s'", "it's"),
        ('"a # b" # comment', "a # b"),
        ("'{\"x\": 1}'", '{"x": 1}'),
        ("", ""),
    ],
)
def test_values_are_read_as_compose_reads_them(written: str, value: str) -> None:
    assert settings.parse_env(f"MODEL={written}", KNOWN) == {"MODEL": value}


@given(st.dictionaries(st.sampled_from(sorted(KNOWN)), st.text("abz09 #=./-{}:,", max_size=20)))
def test_quoted_values_come_back_whole(values: dict[str, str]) -> None:
    text = "".join(f"{name}='{value}'\n# comment\n\n" for name, value in values.items())
    assert settings.parse_env(text, KNOWN) == values


@given(st.text())
def test_any_text_is_read_or_refused_in_one_line(text: str) -> None:
    problem: Problem | None = None
    try:
        settings.parse_env(text, KNOWN)
    except Problem as raised:
        problem = raised
    assert problem is None or problem.what.startswith(".env, line ")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"HTTP_PORT": "eighty"}, "HTTP_PORT=eighty will not do"),
        ({"GRAFANA_PORT": "70000"}, "GRAFANA_PORT=70000 will not do"),
        ({"BIND_ADDRESS": "everywhere"}, "BIND_ADDRESS=everywhere will not do"),
        ({"BIND_ADDRESS": "::1"}, r"BIND_ADDRESS=::1 will not do: an IPv6 address stands in brackets, \[::1\]"),
        ({"BIND_ADDRESS": "[127.0.0.1]"}, r"BIND_ADDRESS=\[127\.0\.0\.1\] will not do"),
        ({"MODEL": "models/tiny"}, r"MODEL=models/tiny will not do: .* MODEL=tiny: correct MODEL"),
        ({"MODEL": "./models/a/b"}, r"will not do: .* MODEL=a/b: "),
        ({"ROUTE_POLICY": "random"}, "ROUTE_POLICY=random will not do: .*'least_busy', 'round_robin' or 'session'"),
        ({"GATEWAY_BODIES_MB": "63"}, "GATEWAY_BODIES_MB=63 will not do"),
        ({"GATEWAY_HOSTS": "*"}, r"GATEWAY_HOSTS=\* will not do: \* is no name without scheme and port"),
        ({"GATEWAY_HOSTS": "a.example, b.example:80"}, r"b.example:80 is no name"),
        ({"GATEWAY_HOSTS": "https://a.example"}, r"https://a.example is no name"),
        ({"CORS_ORIGINS": "*"}, r"CORS_ORIGINS=\* will not do: \* is no origin"),
        ({"CORS_ORIGINS": "https://a.example/"}, r"https://a.example/ is no origin as browsers write it"),
        ({"CORS_ORIGINS": "http://a.example:80"}, r"http://a.example:80 is no origin"),
        ({"CORS_ORIGINS": "a.example"}, r"a.example is no origin"),
        ({"IMAGES": "docker"}, "IMAGES=docker will not do: .*'auto', 'registry' or 'packages'"),
        ({"ACME_SERVER": "http://a.example/dir"}, "ACME_SERVER=http://a.example/dir will not do: .*https://"),
        ({"ACME_SERVER": "a.example"}, "ACME_SERVER=a.example will not do: .*https://"),
        ({"GPU": "yes"}, "GPU=yes will not do"),
    ],
)
def test_a_value_out_of_range_is_named(values: dict[str, str], message: str) -> None:
    with pytest.raises(Problem, match=message):
        settings.check(values)


def test_names_and_origins_may_be_several_in_any_case() -> None:
    settings.check(
        {"GATEWAY_HOSTS": "LLM.example.com, gpu_box,[::1],", "CORS_ORIGINS": "https://A.example,http://[::1]:5173"}
    )


@pytest.mark.parametrize(
    ("values", "url"),
    [
        ({}, "http://127.0.0.1"),
        ({"HTTP_PORT": "8080"}, "http://127.0.0.1:8080"),
        ({"BIND_ADDRESS": "0.0.0.0"}, "http://127.0.0.1"),
        ({"BIND_ADDRESS": "192.0.2.7"}, "http://192.0.2.7"),
        ({"BIND_ADDRESS": "[::]"}, "http://[::1]"),
        ({"BIND_ADDRESS": "[::1]", "HTTP_PORT": "8080"}, "http://[::1]:8080"),
    ],
)
def test_the_url_is_where_this_host_reaches_the_gateway(values: dict[str, str], url: str) -> None:
    assert settings.check(values).url == url


def test_the_environment_wins_over_the_file_and_unknown_names_in_it_are_not_ours(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text("HTTP_PORT=81\nGRAFANA_PORT=3001\n")
    loaded = settings.load(file, {"HTTP_PORT": "82", "PATH": "/bin"})
    assert (loaded.http_port, loaded.grafana_port) == (82, 3001)


def test_a_file_that_is_not_utf_8_is_refused_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_bytes("HTTP_PORT=81\n# größer\n".encode("latin-1"))
    with pytest.raises(Problem, match=r"\.env, line 2: this is not UTF-8: save"):
        settings.load(file, {})


def test_no_file_means_the_defaults(tmp_path: Path) -> None:
    assert settings.load(tmp_path / ".env", {}).http_port == 80


def test_what_is_said_of_the_hub_is_taken_from_the_environment_or_the_file(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text("HF_ENDPOINT=https://mirror.example\nHF_TOKEN_FILE=\n")
    other = {"HF_ENDPOINT": "https://other.example", "HF_TOKEN_FILE": ""}
    assert settings.value_of("HF_ENDPOINT", file, other) == "https://other.example"
    assert settings.value_of("HF_ENDPOINT", file, {"HF_ENDPOINT": ""}) == "https://mirror.example"
    assert settings.value_of("HF_TOKEN_FILE", file, other) is None
    assert settings.value_of("HF_ENDPOINT", tmp_path / "none", {}) is None


def test_the_hub_and_the_token_are_those_of_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: dict[str, str] = {}
    monkeypatch.setattr(settings, "value_of", said.get)
    assert (hub.endpoint(), hub.read_token()) == (hub.HUB, None)
    said |= {"HF_ENDPOINT": "https://mirror.example/", "HF_TOKEN_FILE": "~/token"}
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "token").write_text("abc\n")
    assert (hub.endpoint(), hub.read_token()) == ("https://mirror.example", "abc")


def test_a_token_itself_is_no_setting() -> None:
    known = settings.known_names(settings.EXAMPLE_FILE.read_text())
    with pytest.raises(Problem, match=r"nothing reads HF_TOKEN: did you mean HF_TOKEN_FILE\?"):
        settings.parse_env("HF_TOKEN=abc\n", known)


def test_the_projects_name_in_env_is_the_one_that_is_looked_for(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text("COMPOSE_PROJECT_NAME=mine\n")
    assert settings.value_of("COMPOSE_PROJECT_NAME", file, {}) == "mine"
    assert settings.value_of("COMPOSE_PROJECT_NAME", file, {"COMPOSE_PROJECT_NAME": "yours"}) == "yours"


def test_the_settings_of_the_users_that_are_listed_are_known_and_no_others(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text("ALICE_USERNAME=alice\nALICE_HASHED_PASSWORD='$argon2id$v=19$m=1'\nUSER_LIST=ALICE, BOB\n")
    values = settings.with_users(file, {"BOB_ROLE": "admin", "CAROL_ROLE": "admin", "JWT_KEY": "x"})
    assert values == {
        "USER_LIST": "ALICE, BOB",
        "ALICE_USERNAME": "alice",
        "ALICE_HASHED_PASSWORD": "$argon2id$v=19$m=1",
        "BOB_ROLE": "admin",
        "JWT_KEY": "x",
    }
    for line in ("CAROL_ROLE=admin", "ALICE_PASSWORD=x"):
        file.write_text(f"USER_LIST=ALICE\n{line}\n")
        with pytest.raises(Problem, match=rf"\.env, line 2: nothing reads {line.partition('=')[0]}"):
            settings.load(file, {})
