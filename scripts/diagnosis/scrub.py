"""Takes secrets and prompts out of text that leaves this host: by the names of settings, by the secrets' own values, by
how secrets look, and of logs all that might hold what somebody asked."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets as random
from collections.abc import Iterable, Iterator, Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import quote

from models.hub import without_password
from stack import settings
from stack.access import SECRETS
from stack.compose import is_replica
from stack.settings import may_be_secret
from stack.shell import ROOT

REMOVED = "[removed]"
# A shorter value would be found in words that have nothing to do with it; its setting's name keeps it out.
SHORTEST = 6
# Members of the files in secrets/ that are no secrets, and may stand elsewhere.
PLAIN = {
    *("name", "id", "note", "models", "role", "source", "issuer", "audience", "algorithms", "jwks_uri", "name_claim"),
    *("role_claim", "kid", "kty", "crv", "alg", "use", "family", "team", "project"),
}
# How secrets look, whoever's they are.
LOOKS = [
    re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL),
    re.compile(r"\bsk-[A-Za-z0-9_-]{8,}"),
    re.compile(r"\bhf_[A-Za-z0-9]{8,}"),
    re.compile(r"\bgh[pousr]_[A-Za-z0-9]{16,}|\bglpat-[\w-]{16,}|\bxox[abprs]-[\w-]{8,}|\bAKIA[0-9A-Z]{16}"),
    re.compile(r"\beyJ[\w-]{8,}(?:\.[\w-]*){0,4}"),
    re.compile(r"\$argon2\w*\$\S+|\$2[aby]\$\d\d\$\S+"),
    # a key's hash; images and containers are named by such digits too, after a word that says so
    re.compile(r"(?<![0-9a-f:])[0-9a-f]{64}(?![0-9a-f])"),
    re.compile(r"(?i)(?<=bearer )[^\s\"',]+|(?<=basic )[A-Za-z0-9+/=]{8,}"),
]
# An argument, and a word with digits after a word that says what it is; but no pseudonym.
NAMED = (
    re.compile(r"(?i)(--[\w-]*(?:token|key|secret|password)[\w-]*[\"']?[=,\s]+[\"']?)[^\s\"',\]]+"),
    re.compile(
        r"(?i)((?:key|token|secret|password|passwd)(?:[\"']?\s*[=:]\s*|\s+)[\"']?)"
        r"(?!holder-|\d+\b)(?=[^\s\"',;]*\d)[^\s\"',;\[(]{8,}"
    ),
)
# The rest of a line from where what was asked or answered may begin.
ASKED = re.compile(
    r"(?:\bprompt\w*|\bmessages?|\bcontent|\binput\w*|\boutputs?|\btext|\bJSON body|\bparams|\bquery|\bdocuments)"
    r"[\"']?\s*[:=]\s*[\"'\[({].*"
    r"|\b(?:details|JSON body|params|output): .*"
    r"|\binput_value=.*"
)
REQUESTS = re.compile(r"\[(?:request_logger|logger)\.py:\d+\] ((?:Received request|Generated response|Request) \S+).*")
# Lines of a replica's log that are the engine's own words.
ENGINE = re.compile(
    r"^(?:\([A-Za-z]\S* pid=\d+\) )?(?:(?:INFO|WARNING|ERROR|DEBUG|CRITICAL) \d\d-\d\d \d\d:\d\d:\d\d \[|[WIEF]\d{4} "
    r"|INFO:|WARNING:|ERROR:|Traceback \(|  File \"|[\w.]+(?:Error|Exception|Warning|Interrupt)\b)|^launch: |^health: "
)
# What stands in a line of the gateway's log, besides numbers.
OPEN_FIELDS = {
    *(
        "time",
        "id",
        "method",
        "path",
        "model",
        "replica",
        "reason",
        "tried",
        "tries",
        "upstream_status",
        "ttfb",
        "ttft",
    ),
    *("action", "trace", "cause", "family", "state", "level", "message"),
}
# Who it was: a number too is a name there.
WHO = {"client", "key", "end_user", "user", "who", "session"}
NGINX = re.compile(r"^\d{4}/\d\d/\d\d \d\d:\d\d:\d\d \[\w+\] |^start\.sh: |^nginx: |^INFO: ")
NUMBER = re.compile(r"(?:(?:-|\d+(?:\.\d+)?)(?:[,: ]+|$))*")
ADDRESS = re.compile(r"(?<![\w.])(?:\d{1,3}(?:\.\d{1,3}){3}|[0-9a-f]{0,4}(?::[0-9a-f]{0,4}){3,7})(?![\w.])")
# Services whose logs hold no prompts; what others log nobody here knows.
KNOWN = ("gateway", "prometheus", "grafana", "acme", "tokens")


class Scrubber:
    """Takes out what is secret. `values` are secrets that it knows; the same name gets the same pseudonym."""

    def __init__(self, values: Iterable[str] = ()) -> None:
        # what goes by its looks is not searched for as well: of hashes there may be thousands
        searched = {value.strip() for value in values if not any(look.fullmatch(value.strip()) for look in LOOKS)}
        known = {form for value in searched if len(value) >= SHORTEST for form in forms(value)}
        # the longest first: one may be a part of another
        self._known = sorted(known, key=len, reverse=True)
        self._salt = random.token_bytes(16)
        places = {str(ROOT): ".", str(Path.home()): "~"}
        self._places = {place: short for place, short in places.items() if len(place) > 1}

    def text(self, text: str) -> str:
        """The text without secrets, and without where this checkout lies."""
        for value in self._known:
            text = text.replace(value, REMOVED)
        for look in LOOKS:
            text = look.sub(REMOVED, text)
        text = without_password(text)
        for named in NAMED:
            text = named.sub(rf"\1{REMOVED}", text)
        for place, short in self._places.items():
            text = text.replace(place, short)
        return text

    def data(self, value: Any, name: str = "") -> Any:
        """Data of JSON without the values of secret names; `text` does the rest when it is written."""
        if isinstance(value, dict):
            return {key: self.data(one, str(key)) for key, one in value.items()}
        if isinstance(value, list):
            return [self.data(one, name) for one in value]
        return REMOVED if isinstance(value, str) and value and may_be_secret(name) else value

    def pseudonym(self, kind: str, name: str) -> str:
        """A name that tells nobody whose it is, the same for the same name."""
        return f"{kind}-{hashlib.sha256(self._salt + name.encode()).hexdigest()[:6]}" if name else ""

    def names(self, text: str, names: Iterable[str]) -> str:
        """The text with other names for the holders of keys, and other addresses than this host's own."""
        for name in sorted(names, key=len, reverse=True):
            text = re.sub(rf"(?<![\w.-]){re.escape(name)}(?![\w-])", self.pseudonym("holder", name), text)
        return ADDRESS.sub(lambda found: found[0] if is_own(found[0]) else self.pseudonym("address", found[0]), text)

    def log_line(self, service: str, line: str) -> str:
        """A line of a service's log without what somebody asked."""
        if is_replica(service):
            return replica_line(line)
        if service in ("gateway", "tokens"):
            return self._line_about_somebody(line)
        return line if service in KNOWN else left_out(line)

    def _line_about_somebody(self, line: str) -> str:
        if NGINX.match(line):
            plain = re.sub(r"(request|upstream|referrer): \"(\S+ )?([^\s?\"]*)[^\"]*\"", r'\1: "\2\3"', line)
            return ADDRESS.sub(lambda found: self.pseudonym("client", found[0]), plain)
        try:
            said = json.loads(line)
        except ValueError:
            return left_out(line)
        if not isinstance(said, dict):
            return left_out(line)
        return json.dumps({name: self._field(name, value) for name, value in said.items()})

    def _field(self, name: str, value: Any) -> Any:
        if name not in WHO and (isinstance(value, (int, float)) or value is None or name in OPEN_FIELDS):
            return value
        number = name not in WHO and isinstance(value, str) and NUMBER.fullmatch(value)
        return value if number else self.pseudonym("holder" if name == "key" else name, str(value))


def is_own(address: str) -> bool:
    """Whether an address says nothing of where this host is."""
    try:
        found = ip_address(address)
    except ValueError:
        return True
    return found.is_loopback or found.is_unspecified


def left_out(line: str) -> str:
    """What stands in place of a line that might be anything."""
    return f"(a line of {len(line)} characters is left out)"


def replica_line(line: str) -> str:
    """A line of a replica's log: the engine's own words up to where a prompt may begin, and nothing else."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", line)
    if plain.startswith("launch: vllm serve"):
        return plain
    if not ENGINE.match(plain):
        return left_out(line)
    if asked := REQUESTS.search(plain):
        return plain[: asked.end(1)] + " " + REMOVED
    return ASKED.sub(REMOVED, plain)


def forms(value: str) -> set[str]:
    """A secret as it may be written: plain, in JSON, in Compose's files, in an address."""
    return {value, json.dumps(value)[1:-1], value.replace("$", "$$"), quote(value, safe="")}


def leaves(value: Any, name: str = "") -> Iterator[str]:
    """The texts in data of JSON, but those of members that are no secrets."""
    if isinstance(value, dict):
        for key, one in value.items():
            yield from leaves(one, str(key))
    elif isinstance(value, list):
        for one in value:
            yield from leaves(one, name)
    elif isinstance(value, str) and name not in PLAIN:
        yield value


def known_secrets(environments: Iterable[Mapping[str, str | None]] = ()) -> set[str]:
    """The secrets that this host has: in secrets/, in `.env` and the environment by their names, the hub's token, and
    those of `environments`, which are the containers'."""
    found = set(_in_files(SECRETS.folder))
    pairs = [*settings.written(), *os.environ.items(), *(pair for one in environments for pair in one.items())]
    found |= {value for name, value in pairs if value and may_be_secret(name)}
    tokens = [Path(value).expanduser() for name, value in pairs if name == "HF_TOKEN_FILE" and value]
    for file in (*tokens, Path.home() / ".cache/huggingface/token"):
        if file.is_file():
            found.add(file.read_text(errors="replace").strip())
    return found


def _in_files(folder: Path) -> Iterator[str]:
    """The values in the files of secrets/; names of the audit log are none."""
    for file in sorted(folder.rglob("*")):
        if not file.is_file() or file.suffix == ".jsonl" or file.name == ".gitignore":
            continue
        text = file.read_text(errors="replace")
        try:
            yield from leaves(json.loads(text))
        except ValueError:
            if "BEGIN CERTIFICATE" not in text or "PRIVATE KEY" in text:
                yield from (line for line in text.splitlines() if "-----" not in line)
