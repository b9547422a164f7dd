"""What `make report` packs: each part as text, bounded, and without secrets before it is written."""

from __future__ import annotations

import gzip
import io
import json
import os
import platform
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from subprocess import DEVNULL, PIPE, STDOUT, Popen
from typing import Any

from access.keys import KeyStore
from access.store import Mistake
from access.users import UserStore
from diagnosis.findings import Diagnosis
from diagnosis.scrub import REMOVED, Scrubber
from diagnosis.seen import DOCKER_S, Container, Seen
from stack import settings
from stack.access import SECRETS
from stack.compose import OVERRIDE, REPLICAS_FILE
from stack.console import Problem
from stack.shell import ROOT, ask

MIB = 2**20
# Bytes before they are packed: of one part, of all logs together, of the metrics, and of the whole.
PART, LOGS, METRICS, ALL = MIB // 4, 11 * MIB, 5 * MIB, 20 * MIB
HOUR_S = 3600
STEP_S, BUCKET_STEP_S = 60, 300
LOG_S, METRICS_S = 20, 60
# Settings that tell who somebody is.
PERSONAL = {"ACME_EMAIL", "USER_LIST", "HF_TOKEN_FILE"}
# Looks that name holders of keys, and what of a finding is text.
ABOUT_HOLDERS = {"keys", "alerts", "tokens"}
FINDING_TEXTS = ("subject", "what", "fix")
README = """\
A report of vllm-fleet, made by `make report` at {at} UTC for a bug report. Look into it before you send it.

What it holds:
{parts}
What is not in it: keys, tokens, passwords and their hashes; anything that stands in secrets/; values of settings with a
secret's name; prompts and answers; who sent a request: keys, users and addresses have other names here, the same for
the same one. Lines of a log that could be anything are left out, and so is the log of a service that is not the stack's
own. Not taken out: names of models and settings, and this host's name and address where settings have them.
"""


@dataclass
class Part:
    """A file of the report: its name, what it is, its text, and what was left out of it."""

    name: str
    what: str
    text: str
    cut: str = ""


@dataclass
class Report:
    """Gathers the parts."""

    scrubber: Scrubber
    parts: list[Part] = field(default_factory=list)

    def add(self, name: str, what: str, text: str, limit: int = PART) -> None:
        """Adds a part, without secrets, and of more than `limit` bytes only its end."""
        clean = self.scrubber.text(text).encode(errors="replace")
        limit = min(limit, ALL - self.bytes())
        cut = f"the last {limit / MIB:.2f} of {len(clean) / MIB:.2f} MiB" if len(clean) > limit else ""
        kept = clean[-limit:].partition(b"\n")[2] if cut and limit else clean[:limit]
        self.parts.append(Part(name, what, kept.decode(errors="replace"), cut))

    def add_data(self, name: str, what: str, data: Any) -> None:
        """Adds data as JSON."""
        self.add(name, what, json.dumps(self.scrubber.data(data), indent=1, default=str) + "\n")

    def bytes(self) -> int:
        """Bytes of all parts so far."""
        return sum(len(part.text.encode()) for part in self.parts)


def gather(seen: Seen, diagnosis: Diagnosis, scrubber: Scrubber, say: Callable[[str], None]) -> Report:
    """All parts that can be had. What cannot says so in its place."""
    report = Report(scrubber)
    report.add("doctor.json", "what `make doctor` says", without_names(diagnosis, scrubber).model_dump_json(indent=1))
    for name, what, part in (
        ("versions.json", "versions of this checkout, Docker, the driver and the images", versions),
        ("settings.json", "settings by their names; a secret's value is left out", setting_values),
        ("compose.json", "the Compose files, filled in", compose_config),
        ("containers.json", "how each container is, and its last health checks", container_states),
        ("status.json", "the replicas as the gateway sees them", lambda seen: seen.gateway.status()),
    ):
        say(name)
        report.add_data(name, what, had(part, seen))
    for name in ("vllm/engine.yaml", "vllm/engine.gpu.yaml", OVERRIDE.name, REPLICAS_FILE, "nginx/fleet/default.conf"):
        if (ROOT / name).is_file():
            report.add(f"files/{name}", "a file of this checkout", (ROOT / name).read_text(errors="replace"))
    for container in seen.containers.values():
        say(f"log of {container.service}")
        share = LOGS // len(seen.containers)
        lines = (scrubber.log_line(container.service, line) for line in log_lines(container, share))
        report.add(f"logs/{container.service}.log", "the last hour", "\n".join(lines) + "\n", share)
    say("metrics")
    text, cut = metrics(seen)
    report.add("metrics.jsonl", "the last hour of every metric, a series a line", text, METRICS)
    report.parts[-1].cut = report.parts[-1].cut or cut
    return report


def without_names(diagnosis: Diagnosis, scrubber: Scrubber) -> Diagnosis:
    """The diagnosis without who holds keys, and where this host is."""
    try:
        names = {key.name for key in KeyStore(SECRETS).read().keys}
        names |= {user.name for user in UserStore(SECRETS).read().users}
    except Mistake:  # it is among what was found
        names = set()

    def clean(text: str, look: str) -> str:
        # elsewhere a name may be a word
        return scrubber.names(text, names if look in ABOUT_HOLDERS else ())

    looks = [
        look.model_copy(
            update={
                "result": clean(look.result, look.name),
                "findings": [
                    one.model_copy(update={part: clean(getattr(one, part), look.name) for part in FINDING_TEXTS})
                    for one in look.findings
                ],
            }
        )
        for look in diagnosis.looks
    ]
    return diagnosis.model_copy(update={"looks": looks})


def had(part: Callable[[Seen], Any], seen: Seen) -> Any:
    """What a part is, or why it is not to be had."""
    try:
        return part(seen)
    except (Problem, OSError, ValueError, LookupError) as why:
        return {"not to be had": str(why)}


def versions(seen: Seen) -> dict[str, Any]:
    """Versions of all that runs or is asked."""

    def said(*command: str) -> str:
        done = ask(*command, timeout=DOCKER_S)
        return (done.stdout or done.stderr).strip()

    gpus = "--query-gpu=name,driver_version,memory.total,vbios_version"
    images = {container.image_name for container in seen.containers.values()}
    shown = "{{json .RepoTags}} {{.Id}} {{.Created}} {{json .Config.Labels}}"
    return {
        "checkout": said("git", "describe", "--always", "--dirty", "--long"),
        "changed files": said("git", "status", "--short").splitlines()[:200],
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "distribution": platform.freedesktop_os_release().get("PRETTY_NAME", ""),
        "python": sys.version,
        "docker": said("docker", "version", "--format", "{{.Client.Version}} client, {{.Server.Version}} engine"),
        "compose": said("docker", "compose", "version"),
        "gpus": said("nvidia-smi", gpus, "--format=csv,noheader").splitlines(),
        "pins": seen.config.pins,
        "images": [said("docker", "image", "inspect", "--format", shown, image) for image in sorted(images)],
    }


def setting_values(_: Seen) -> dict[str, str]:
    """The settings of `.env` and of the environment, by their names."""
    known = settings.known_names(settings.EXAMPLE_FILE.read_text())
    values = dict(settings.written()) | {name: value for name, value in os.environ.items() if name in known}
    return {name: shown_value(name, value, known) for name, value in sorted(values.items())}


def shown_value(name: str, value: str, known: set[str]) -> str:
    """A setting's value, where it is one of the stack's and tells nothing of anybody."""
    if not value:
        return ""
    if name not in known | settings.OF_COMPOSE:
        return f"{REMOVED}: no setting of the stack"
    return REMOVED if name in PERSONAL or settings.may_be_secret(name) else value


def compose_config(seen: Seen) -> Any:
    """What `docker compose config` makes of files and settings."""
    if "files" not in seen.has:
        raise Problem("the Compose files cannot be read", "see doctor.json")
    return json.loads(seen.compose.ask("config", "--format", "json", timeout_s=DOCKER_S))


def container_states(seen: Seen) -> dict[str, Any]:
    """State and image of each container."""
    return {
        name: {
            "image": container.image_name,
            "restarts": container.restarts,
            "created": container.created,
            **container.state.model_dump(),
        }
        for name, container in seen.containers.items()
    }


def log_lines(container: Container, limit: int) -> Iterator[str]:
    """What a container logged in the last hour, in lines: of more than `limit` bytes the end."""
    command = ["docker", "logs", "--since", "1h", "--timestamps", container.id]
    kept = b""
    with Popen(command, stdin=DEVNULL, stdout=PIPE, stderr=STDOUT) as process:
        assert process.stdout
        late = threading.Timer(LOG_S, process.kill)
        late.start()
        try:
            while chunk := process.stdout.read(MIB):
                kept = (kept + chunk)[-2 * limit :]
        finally:
            late.cancel()
    lines = kept.decode(errors="replace").splitlines()
    for line in lines[len(kept) >= 2 * limit :]:
        yield line.partition(" ")[2]


def metrics(seen: Seen) -> tuple[str, str]:
    """Every metric over the last hour, without whose requests they were: a series a line, and what was left out."""
    end = int(time.time())
    out, size, stop = io.StringIO(), 0, time.monotonic() + METRICS_S
    try:
        names: list[str] = seen.prometheus.ask("label/__name__/values")
        for count, name in enumerate(names):
            if size > METRICS or time.monotonic() > stop:
                return out.getvalue(), f"the first {count} of {len(names)} metrics"
            step = BUCKET_STEP_S if name.endswith("_bucket") else STEP_S
            query = f'sum without (key, end_user) ({{__name__="{name}"}})'
            found = seen.prometheus.ask("query_range", query=query, start=end - HOUR_S, end=end, step=step)["result"]
            for series in found:
                values = [[int(moment), value] for moment, value in series["values"]]
                line = json.dumps({"name": name, "labels": series["metric"], "values": values}, separators=(",", ":"))
                size += out.write(line + "\n")
    except Problem as problem:
        return out.getvalue(), problem.what
    return out.getvalue(), ""


def write(report: Report, archive: Path, at: datetime) -> None:
    """Writes the archive, for its owner alone, with a README that says what it holds."""
    folder = archive.name.removesuffix(".tar.gz")
    readme = README.format(at=f"{at:%Y-%m-%d %H:%M}", parts="".join(map(line_of, report.parts)))
    archive.parent.mkdir(parents=True, exist_ok=True)
    archive.unlink(missing_ok=True)
    archive.touch(0o600)
    with gzip.open(archive, "wb") as packed, tarfile.open(fileobj=packed, mode="w") as tar:
        for name, text in {"README.txt": readme, **{part.name: part.text for part in report.parts}}.items():
            entry = tarfile.TarInfo(f"{folder}/{name}")
            content = text.encode()
            entry.size, entry.mtime, entry.mode = len(content), int(at.timestamp()), 0o644
            tar.addfile(entry, io.BytesIO(content))


def line_of(part: Part) -> str:
    """A part in the README."""
    cut = f" ({part.cut})" if part.cut else ""
    return f"  {part.name}: {part.what}{cut}\n"
