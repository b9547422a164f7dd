"""The gateway as the operator commands see it: its files, its configuration, and the replicas behind it."""

from __future__ import annotations

import json
import re
import ssl
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from pydantic import AliasChoices, BaseModel, Field, TypeAdapter, ValidationError

from stack import certificate
from stack.compose import Compose, Config
from stack.console import Problem
from stack.shell import CACHE, ask, wait_for

# its time is when the gateway was last told to read its files again
RELOADED = CACHE / "gateway-reloaded"
NGINX = ("exec", "-T", "gateway", "nginx", "-p", "/etc/nginx/")
# the admin interface, which only the gateway's own container reaches
ADMIN = "http://127.0.0.1:8081"
# A first answer on a busy machine without a GPU.
ANSWER_SECONDS = 120
# The gateway reads its keys once a second.
NEW_KEY_SECONDS = 10
# It reads a certificate that is new within ten.
NEW_CERTIFICATE_SECONDS = 12
# States in which requests go to a replica: at once, or it wakes for them.
SERVING = ("ready", "asleep")
# What vLLM says to a request that a model cannot answer: an embedding model to a chat, one without a chat template too.
NOT_THIS_WAY = {httpx.codes.BAD_REQUEST, httpx.codes.NOT_FOUND, httpx.codes.NOT_IMPLEMENTED}


class Way(NamedTuple):
    """A way to put a question to a model."""

    path: str
    body: Callable[[str], dict[str, Any]]
    said: Callable[[Any, str], str]  # of the answer and the model's name


WAYS = (
    Way(
        "/v1/chat/completions",
        lambda question: {"messages": [{"role": "user", "content": question}], "max_tokens": 32, "temperature": 0},
        lambda answer, _: str(answer["choices"][0]["message"]["content"]).strip(),
    ),
    Way(
        "/v1/completions",
        lambda question: {"prompt": question, "max_tokens": 32, "temperature": 0},
        lambda answer, _: str(answer["choices"][0]["text"]).strip(),
    ),
    Way(
        "/v1/embeddings",
        lambda question: {"input": question},
        lambda answer, model: f"a vector of {len(answer['data'][0]['embedding'])} numbers from {model}",
    ),
    Way(
        "/v1/rerank",
        lambda question: {"query": question, "documents": [question]},
        lambda answer, model: f"a score of {answer['results'][0]['relevance_score']:.2f} from {model}",
    ),
)


def fleet_line(name: str, port: int = 8000, weight: int | None = None, at: str = "") -> str:
    """A replica's line in the gateway's fleet file, without its end; `name` is its host too, if `at` is not, `weight`
    its share."""
    share = f" weight={weight}" if weight is not None else ""
    return f"upstream {name} {{ zone {name} 64k; server {at or name}:{port} resolve{share}; keepalive 64; }}"


def mounted(config: Config) -> dict[str, Path]:
    """The folders of this host that the gateway reads, by where it sees them."""
    return {volume.target: Path(volume.source) for volume in config.services["gateway"].volumes}


def fleet_folder(config: Config) -> Path:
    """Where the gateway's fleet files are on this host."""
    folders = mounted(config)
    return folders.get("/etc/nginx/fleet", folders["/etc/nginx"] / "fleet")


def named(files: Iterable[Path]) -> set[str]:
    """The replicas that some of the gateway's fleet files name."""
    lines = "".join(file.read_text() for file in files)
    return set(re.findall(r"^\s*upstream\s+(\S+)", lines, re.MULTILINE))


def check_named(config: Config) -> None:
    """A Problem where the gateway's fleet files do not name a replica: it would start and get no request."""
    folder = fleet_folder(config)
    for name in sorted(set(config.replicas) - named(folder.glob("*.conf"))):
        raise Problem(
            f"{folder}/ does not name {name}, so it would get no request",
            f"add this line there, or plan the fleet again (`make plan`): {fleet_line(name)}",
        )


def certificate_error(error: BaseException | None) -> ssl.SSLCertVerificationError | None:
    """What is wrong with a certificate, if that is why a request failed."""
    while error:
        if isinstance(error, ssl.SSLCertVerificationError):
            return error
        error = error.__cause__ or error.__context__
    return None


class Replica(BaseModel):
    """A replica as the gateway sees it now. Counts are requests, `kv_usage` is the share of its KV cache in use. `on`
    is the other host that it is on, '' for this one."""

    name: str
    # the admin interface calls an address its host
    on: str = Field(default="", validation_alias=AliasChoices("on", "host"))
    state: str
    reason: str | None = None
    models: list[str] = []
    weight: float | None = None
    in_flight: int | None = None
    running: float | None = None
    waiting: float | None = None
    kv_usage: float | None = None

    @property
    def serves(self) -> bool:
        """Whether requests go to it."""
        return self.state in SERVING

    @property
    def well(self) -> bool:
        """Whether it is as it should be: it serves, or the autoscaler has stopped it."""
        return self.serves or self.state == "stopped"


class Gateway:
    """The gateway of a stack, asked as users do at its `url`, and through its container where only that may.

    `domain` is the name in its certificate, where that is not in secrets/. `differences` are sentences of its last
    `published`: what differs between its replicas and should not.
    """

    differences: list[str]

    def __init__(self, compose: Compose, url: str = "", domain: str | None = None) -> None:
        self._compose = compose
        self._url = url
        self._domain = domain
        self.differences = []

    def published(self) -> list[Replica] | None:
        """All replicas, as the gateway tells at its port; None where it does not answer there.

        A certificate that cannot be verified is a Problem: waiting would not help.
        """
        said = self.status()
        try:
            replicas = TypeAdapter(list[Replica]).validate_python(said["replicas"])
            self.differences = TypeAdapter(list[str]).validate_python(said.get("differences", []))
            return replicas  # noqa: TRY300 - all that may fail is above
        # or something else answers at that port
        except (ValueError, LookupError, TypeError):
            return None

    def status(self) -> Any:
        """What /status.json says at its port; None where it does not answer there. Refuses a certificate as
        `published` does."""
        try:
            answer = self._http("GET", "/status.json", timeout_s=5)
            if answer.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.SERVICE_UNAVAILABLE):
                # It asks for keys, or lets nobody in as their file is gone. Whoever may enter its container needs none.
                return self._admin("GET", "/status.json")
            return answer.raise_for_status().json()
        except certificate.Untrusted:
            raise
        except (httpx.HTTPError, ValueError, Problem):
            return None

    def answers(self) -> bool:
        """Whether it answers at its port. A certificate that cannot be verified is a Problem."""
        try:
            self._http("GET", "/health", timeout_s=5)
        except httpx.HTTPError:
            return False
        return True

    def replicas(self) -> list[Replica]:
        """All replicas, in the order of the fleet's file, whatever port is published; a Problem without an answer."""
        answer = self._admin("GET", "/replicas")
        try:
            return TypeAdapter(list[Replica]).validate_python(answer)
        except ValidationError:
            raise Problem(
                f"the gateway says {answer} where its replicas were asked for", "is it of this version? `make up`"
            ) from None

    def replica(self, name: str) -> Replica:
        """One replica by name."""
        return next(replica for replica in self.replicas() if replica.name == name)

    def stopped(self) -> list[str]:
        """The replicas that the autoscaler has stopped; none where the gateway does not answer."""
        return [replica.name for replica in self.published() or () if replica.state == "stopped"]

    def ask_replica(self, name: str, path: str, *options: str) -> str | None:
        """What a replica itself answers, which only the gateway's container reaches; None where it does not answer.

        `options` are further ones of curl.
        """
        curl = ("curl", "--silent", "--show-error", "--fail", "--max-time", "10", *options, f"http://{name}:8000{path}")
        done = ask(*self._compose.command("exec", "-T", "gateway", *curl))
        return done.stdout if done.returncode == 0 else None

    def drain(self, name: str) -> None:
        """Takes a replica out of the route; it finishes what it has."""
        self._admin("PUT", f"/replicas/{name}/drain")

    def undrain(self, name: str) -> None:
        """Puts a replica back into the route."""
        self._admin("DELETE", f"/replicas/{name}/drain")

    def reload_if_changed(self, config: Config) -> str:
        """Makes the gateway read its files again if one is newer than what it last read; says in words what was done.

        A mistake in them is a Problem; the gateway then goes on as it was.
        """
        container = self._compose.containers()["gateway"].id
        began = ask("docker", "inspect", "--format", "{{.State.StartedAt}}", container).stdout.strip()
        read = max(datetime.fromisoformat(began).timestamp(), RELOADED.stat().st_mtime if RELOADED.exists() else 0)
        # a folder's own time tells of files that went
        folders = [folder for target, folder in mounted(config).items() if Path(target).is_relative_to("/etc/nginx")]
        files = [path for folder in folders for path in (folder, *folder.rglob("*"))]
        if max(path.lstat().st_mtime for path in files) <= read:
            return "unchanged"
        self.check_files()
        self._compose.ask(*NGINX, "-s", "reload")
        RELOADED.touch()
        return "read again, as its files changed"

    def check_files(self) -> None:
        """A Problem where Nginx would refuse the gateway's files, asked in its container. What runs stays as it is."""
        check = ask(*self._compose.command(*NGINX, "-t"))
        if error := next((line for line in check.stderr.splitlines() if "[emerg]" in line), ""):
            raise Problem(
                f"the gateway's files have a mistake, so it keeps its old configuration: {error}",
                "correct it and run `make up` again",
            )
        if check.returncode:
            said = check.stderr.strip() or "no reason given"
            raise Problem(f"Nginx in the gateway's container cannot be asked: {said}", "see `docker compose ps --all`")

    def first_answer(self, question: str, key: str = "") -> str:
        """What the fleet says to a question that is put as users do: a chat where a model chats. None is a Problem.

        `key`: where the gateway asks for keys, one that may be too new for it to know.
        """
        fix = "see `make status` and `docker compose logs gateway`"
        said = f"{self._url}/v1/models lists no model"

        def listed() -> httpx.Response | None:
            answer = self._http("GET", "/v1/models", key=key, timeout_s=10)
            return None if key and answer.status_code == httpx.codes.UNAUTHORIZED else answer

        try:
            answer = wait_for(listed, within_s=NEW_KEY_SECONDS)
            if answer is None:
                raise Problem(f"{self._url} does not know a key that was made for it", fix)
            if answer.is_error:
                raise Problem(f"{self._url}/v1/models answered {answer.status_code}: {answer.text.strip()[:300]}", fix)
            models = answer.json()["data"]
            for way in WAYS:
                for model in models:
                    asked = {"model": model["id"], **way.body(question)}
                    answer = self._http("POST", way.path, asked, key=key, timeout_s=ANSWER_SECONDS)
                    if answer.status_code == httpx.codes.OK:
                        return way.said(answer.json(), model["id"])
                    said = f"{self._url}{way.path} answered {answer.status_code}: {answer.text.strip()[:300]}"
                    if answer.status_code not in NOT_THIS_WAY:
                        raise Problem(said, fix)
        except (httpx.HTTPError, LookupError) as error:
            raise Problem(f"{self._url} does not answer: {error}", fix) from None
        raise Problem(said, fix)

    def _http(self, method: str, path: str, body: object = None, *, key: str = "", timeout_s: float) -> httpx.Response:
        """The answer. A certificate that cannot be verified is a Problem, once each worker has had the time to read
        one that is new."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        name = self._domain
        headers |= {"Host": name} if name else {}
        why = ""

        def answer() -> httpx.Response | None:
            nonlocal why
            verify = certificate.trusted(name) if self._url.startswith("https:") else False
            # The gateway is on this host: the proxy that the environment may name is for others.
            with httpx.Client(base_url=self._url, timeout=timeout_s, trust_env=False, verify=verify) as client:
                try:
                    return client.request(
                        method, path, json=body,
                        headers=headers,
                        extensions={"sni_hostname": name} if name else None,
                    )  # fmt: skip
                except httpx.HTTPError as error:
                    refused = certificate_error(error)
                    if not refused:
                        raise
                    why = refused.verify_message
                    return None

        if found := wait_for(answer, within_s=NEW_CERTIFICATE_SECONDS):
            return found
        raise certificate.Untrusted(f"the certificate at {self._url} cannot be verified: {why}", self._mend())

    def _mend(self) -> str:
        if self._domain:
            return (
                "clients would refuse it too: take ACME_SERVER out of .env if it names a staging authority;"
                " an authority of your own has to be one that this host trusts (update-ca-certificates)"
            )
        return f"the gateway serves another than {certificate.FOLDER / 'fullchain.pem'}: docker compose logs gateway"

    def _admin(self, method: str, path: str) -> Any:
        curl = ("curl", "--silent", "--show-error", "--max-time", "5", "--request", method, ADMIN + path)
        return json.loads(self._compose.ask("exec", "-T", "gateway", *curl))
