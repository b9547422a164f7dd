"""`make logs ARGS=REQUEST-ID`: one request through the gateway and the replicas, from what their containers logged."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from stack.compose import Compose, running_files
from stack.console import Problem, console, one_line_for_mistakes
from stack.docker import docker_version
from stack.shell import ROOT

# As the gateway takes an id from a client, else it makes one; a trace's has the same letters.
ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
# why a try failed, as nginx/njs/route.js says it
CAUSES = {
    "connect": "no connection",
    "reset": "the connection broke",
    "timeout": "no answer in time",
    "failed": "its engine failed",
    "refused": "it was full",
    "draining": "it was being stopped",
}
# characters of a line that is shown as it stands
LONGEST = 300


@dataclass(frozen=True)
class Row:
    """One thing that happened: who says so, when it was over (UTC), and what it was."""

    who: str
    when: str
    what: str


def as_json(line: str) -> dict[str, Any]:
    """A line that is a JSON object; empty where it is something else."""
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def seconds(value: object) -> str:
    """A time in seconds, as it is told."""
    return f"{value} s" if value not in (None, "") else "–"


def of_gateway(line: Mapping[str, Any]) -> Iterator[str]:
    """What a line of the gateway tells, in the order in which it happened."""
    by = ", ".join(f"{name} {line[key]}" for name, key in (("key", "key"), ("end user", "end_user")) if line.get(key))
    yield f"{line['method']} {line['path']} from {line['client']}{f', {by}' if by else ''}"
    for entry in str(line.get("tried") or "").split():
        name, _, cause = entry.partition("=")
        yield f"{name} failed: {CAUSES.get(cause, cause)}"
    if line.get("replica"):
        model = f", model {line['model']}" if line.get("model") else ""
        yield f"sent to {line['replica']} ({line['reason']}){model}"
    if line.get("ttft") is not None:
        yield f"first token to the client after {seconds(line['ttft'])}"
    end = ", broken off: its replica was lost" if line.get("cut") else ""
    end = ", the client hung up" if line["status"] == 499 else end
    yield f"{line['status']} after {seconds(line['seconds'])}{end}"
    if line.get("prompt_tokens") is not None:
        cached, made = line["cached_tokens"], line["completion_tokens"]
        yield f"{line['prompt_tokens']} tokens of prompt ({cached} cached), {made} of answer"
    if line.get("trace"):
        yield f"trace {line['trace']}"


def of_replica(line: Mapping[str, Any]) -> str:
    """What a line of vllm/lines.py or vllm/engine_lines.py tells."""
    if "engine_id" in line:
        times = ", ".join(f"{name} {seconds(line[name])}" for name in ("queued", "prefill", "decode"))
        again = f", preempted {line['preemptions']} times" if line.get("preemptions") else ""
        return f"engine: {times}, {line['completion_tokens']} tokens, finished by {line['finished']}{again}"
    status = line["status"] or "no answer"
    end = "" if line["whole"] else ", not to its end"
    return f"{status}: first byte after {seconds(line['first_byte'])}, over after {seconds(line['seconds'])}{end}"


def story(asked: str, gateway: Iterable[str], replicas: Mapping[str, Iterable[str]]) -> list[Row]:
    """The rows of a request, or of a trace's requests, from the log lines of the gateway and of each replica."""
    rows, ids = [], {asked}
    for text in gateway:
        line = as_json(text) if asked in text else {}
        if "method" in line and asked in (line["id"], line.get("trace")):
            ids.add(line["id"])
            rows += [Row("gateway", str(line["time"])[:19], what) for what in of_gateway(line)]
    # an engine's id has the request's in it
    within = re.compile(rf"(?<![A-Za-z0-9])(?:{'|'.join(map(re.escape, sorted(ids)))})(?![A-Za-z0-9])")
    for name, lines in replicas.items():
        for text in filter(within.search, lines):
            line = as_json(text)
            known = "engine_id" in line or "first_byte" in line
            rows.append(Row(name, str(line.get("time", ""))[:23], of_replica(line) if known else text[:LONGEST]))
    return rows


def lines_of(compose: Compose, service: str) -> Iterator[str]:
    """All that a service's container logged and Docker still has."""
    command = compose.command("logs", "--no-log-prefix", "--no-color", service)
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, errors="replace"
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            yield line.rstrip("\n")


def main(
    request_id: Annotated[str, typer.Argument(help="The answer's X-Request-Id, or a trace's id.")],
) -> None:
    """Follow one request through the gateway and the replicas, by its id."""
    with one_line_for_mistakes():
        if not ID.fullmatch(request_id):
            raise Problem(
                "this is no request's id", "give what the answer's header X-Request-Id has, or its error names"
            )
        if not docker_version()[0]:
            raise Problem("the Docker engine does not answer", "`make up` starts it")
        compose = Compose(*running_files())
        replicas = {name: lines_of(compose, name) for name in compose.config().replicas}
        rows = story(request_id, lines_of(compose, "gateway"), replicas)
        if not rows:
            raise Problem(
                f"no line of the gateway or of a replica has the id {request_id}",
                "compare it with the answer's header X-Request-Id; Docker keeps the last 100 MB of each container, "
                "and none of one that was replaced",
            )
        table = Table("who", "when (UTC)", "what", box=SIMPLE_HEAD, pad_edge=False)
        last = ("", "")
        for row in rows:
            this = (row.who, row.when)
            table.add_row(*(("", "") if this == last else map(escape, this)), escape(row.what))
            last = this
        console.print(table)


if __name__ == "__main__":
    typer.run(main)
