"""What a request costs the gateway in instructions of its worker, which load on this machine changes little.

Nginx runs under valgrind's callgrind, with one worker and one client that asks one request after the other. Once the
replicas are ready the worker does nothing by itself: it looks at them once an hour.
"""

import http.client
import os
import random
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from lab.bench.cost import LIMITS, NO_METERING
from lab.bench.instant import InstantReplicas
from lab.bench.overhead import SIZES, cpus_text, split_cpus
from lab.bench.peers import OURS
from lab.report import table
from lab.sim.gateway import Gateway, image
from lab.sim.keys import keyed
from lab.sim.load import text
from lab.stack import StackError
from stack.shell import ROOT

CONVERSATIONS = 64
WARM = 100
REQUESTS = 400

INTRO = """# Instructions of a request

Written by `make bench ARGS='--parts instructions{against}'`. Thousands of instructions that one request takes of the
gateway's worker, by callgrind, without the kernel's. What else runs on the machine changes them far less than rates,
but up to a tenth where it is so busy that requests take long.
Two replicas that answer at once, {requests} chats of each size, each with one of {conversations} beginnings. In
brackets the difference to the first row.
"""


@dataclass
class Variant:
    """One gateway: its configuration's folder, its environment, further files, and the key that each request brings."""

    source: Path = ROOT / "nginx"
    env: dict[str, str] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)
    key: str = ""
    lab_key: str = ""


class Slow(Gateway):
    """A gateway under callgrind with one worker, which is this user's own: callgrind_control reaches no other."""

    start_seconds = 120.0

    def configure(self) -> None:
        """Writes the configuration for one worker."""
        super().configure()
        self._swap(r"worker_processes \d+;", "worker_processes 1; user root;")
        self._swap(r" worker_affinity=\d+;", ";")

    def rest(self) -> None:
        """From now on the worker does only what requests ask for."""
        self._swap(r" interval=\w+", " interval=1h")
        # The turn that looks for replicas to probe waits between two looks for as long.
        self._swap(r"setTimeout\(resolve, 200\)", "setTimeout(resolve, 3600000)", "njs/health.js")
        self.reload()

    def _swap(self, pattern: str, new: str, name: str = "nginx.conf") -> None:
        conf = self.conf / name
        conf.write_text(re.sub(pattern, new, conf.read_text()))


def variants() -> dict[str, Variant]:
    """This gateway as it is, without its metering, and with what it does only where it is asked for."""
    metering = (ROOT / "nginx" / "njs" / "usage.js").read_bytes()
    without = {"njs/usage.js": NO_METERING, "njs/metering.js": metering}
    found = {OURS: Variant(), "without metering": Variant(files=without)}
    for name, limits in (("with a key", {}), ("with a key and all of its limits", {"limits": LIMITS})):
        keys, files = keyed({"load": limits, "lab": {"role": "admin"}})
        found[name] = Variant(files=files, key=keys["load"], lab_key=keys["lab"])
    found["with traces"] = Variant(env={"TRACE_SAMPLE": "1"})
    return found


@contextmanager
def callgrind() -> Iterator[Path]:
    """Has $NGINX run under callgrind, the image's where it names none; gives the folder of what callgrind writes."""
    if not shutil.which("valgrind"):
        raise StackError("valgrind is missing: apt-get install valgrind")
    before = {name: os.environ.get(name) for name in ("NGINX", "NGINX_MODULES")}
    with tempfile.TemporaryDirectory(prefix="callgrind-") as name:
        folder = Path(name)
        binary = before["NGINX"] or unpacked(folder)
        options = f"--tool=callgrind --trace-children=yes --callgrind-out-file={name}/out.%p --log-file={name}/log.%p"
        command = folder / "nginx"
        # start.sh tries the configuration first, which takes no count.
        command.write_text(f"""#!/bin/sh
case " $* " in *" -t "* | *" -v "*) exec {binary} "$@" ;; esac
exec valgrind {options} {binary} "$@"
""")
        command.chmod(0o755)
        os.environ["NGINX"] = str(command)
        try:
            yield folder
        finally:
            for variable, value in before.items():
                os.environ.pop(variable, None)
                if value is not None:
                    os.environ[variable] = value


def unpacked(folder: Path) -> str:
    """The Nginx of the gateway's image, as a command of this host; its files lie in `folder`."""
    made = subprocess.run(["docker", "create", image()], capture_output=True, text=True, check=True).stdout.strip()
    try:
        with subprocess.Popen(["docker", "export", made], stdout=subprocess.PIPE) as export:
            subprocess.run(["tar", "-x", "-C", str(folder), "usr"], stdin=export.stdout, check=True)
    finally:
        subprocess.run(["docker", "rm", made], capture_output=True)
    os.environ["NGINX_MODULES"] = f"{folder}/usr/lib/nginx/modules"
    (loader,) = folder.glob("usr/lib64/ld-linux-*.so.*")
    (libraries,) = folder.glob("usr/lib/*-linux-gnu")
    return f"{loader} --library-path {libraries} {folder}/usr/sbin/nginx"


def bodies(size: int, seed: int) -> Iterator[bytes]:
    """Chats of so many bytes as post.lua makes them: one of some beginnings, and an end that no other has."""
    rng = random.Random(seed)
    start = '{"model":"sim","messages":[{"role":"system","content":"'
    middle, stop = '"},{"role":"user","content":"', '"}],"max_tokens":1}'
    room = size - len(start + middle + stop)
    tail = room // 8
    heads = [text(rng, room)[: room - tail] for _ in range(CONVERSATIONS)]
    filler = text(rng, tail)
    number = 0
    while True:
        number += 1
        own = f"{number} {rng.getrandbits(30)} "
        yield (start + rng.choice(heads) + middle + own + filler[len(own) : tail] + stop).encode()


def ask(url: str, some: Iterator[bytes], count: int, key: str) -> None:
    """So many requests, one after the other."""
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
    client = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    for _ in range(count):
        client.request("POST", "/v1/chat/completions", next(some), headers)
        answer = client.getresponse()
        answer.read()
        if answer.status != 200:
            raise RuntimeError(f"the gateway answers {answer.status}")
        if (reason := answer.getheader("x-route-reason")) in ("retry", "fallback"):
            raise RuntimeError(f"a replica was lost ({reason}): this machine is too busy to count here")
    client.close()


def instructions(pid: int, folder: Path, work: Callable[[], None]) -> int:
    """How many this process takes while `work` is done."""

    def control(what: str) -> None:
        subprocess.run(["callgrind_control", what, str(pid)], capture_output=True, check=True)

    control("--zero")
    work()
    before = set(folder.glob(f"out.{pid}.*"))
    control("--dump")
    (dump,) = set(folder.glob(f"out.{pid}.*")) - before
    found = re.search(r"^(?:summary|totals): (\d+)", dump.read_text(), re.MULTILINE)
    assert found
    return int(found[1])


def measure(variant: Variant, seed: int) -> dict[str, float]:
    """Instructions of a request by its size."""
    found = {}
    load, _ = split_cpus()
    with (
        InstantReplicas(2, cpus_text(load)) as fleet,
        callgrind() as folder,
        Slow(fleet, env=variant.env, files=variant.files, key=variant.lab_key, source=variant.source) as gateway,
    ):
        gateway.wait_ready(within_s=120)
        gateway.rest()
        (pid,) = gateway.serving_workers()
        for label, size in SIZES.items():
            some = bodies(size, seed)
            ask(gateway.url, some, WARM, variant.key)
            work = partial(ask, gateway.url, some, REQUESTS, variant.key)
            found[label] = instructions(pid, folder, work) / REQUESTS
    return found


def report(found: Mapping[str, Mapping[str, float]]) -> str:
    """The table."""
    rows = []
    for name, by_size in found.items():
        row = [name]
        for label, count in by_size.items():
            more = "" if name == OURS else f" ({count / found[OURS][label] - 1:+.0%})"
            row.append(f"{count / 1000:,.0f}{more}")
        rows.append(row)
    return table(["", *SIZES], rows)
