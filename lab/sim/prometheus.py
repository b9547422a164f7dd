"""Real Prometheus with the project's rules, over a simulated fleet and its gateway, in quicker time.

Every duration in the rules is divided by `scale`, so that an alert which waits for five minutes fires within seconds.
What the gateway and the replicas do keeps its own time. Prometheus is the stack's image on the host's network or, where
$PROMETHEUS names a binary, that one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlencode

import yaml

from autoscaler import service
from lab.http import get
from lab.sim.gateway import Gateway, end, image
from lab.sim.replicas import Replicas
from lab.waiting import until
from stack.shell import ROOT

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
# rate() needs a few points, and no rule is evaluated more often.
LEAST_S = {"range": 2.0, "interval": 1.0}
SCRAPE = "500ms"


def quicker(duration: str, scale: float, least_s: float = 0.0) -> str:
    """A duration as Prometheus writes it, 5m, in quicker time."""
    seconds = int(duration[:-1]) * UNITS[duration[-1]]
    return f"{max(seconds / scale, least_s) * 1000:.0f}ms"


def quick_rules(text: str, scale: float) -> dict[str, Any]:
    """The rules of a file with every duration in quicker time."""
    rules: dict[str, Any] = yaml.safe_load(text)
    for group in rules["groups"]:
        if "interval" in group:
            group["interval"] = quicker(group["interval"], scale, LEAST_S["interval"])
        for rule in group["rules"]:
            expr = re.sub(
                r"\[(\d+[smhd])\]", lambda found: f"[{quicker(found[1], scale, LEAST_S['range'])}]", rule["expr"]
            )
            rule["expr"] = re.sub(r"\boffset (\d+[smhd])", lambda found: f"offset {quicker(found[1], scale)}", expr)
            for name in {"for", "keep_firing_for"} & rule.keys():
                rule[name] = quicker(rule[name], scale)
    return rules


class Prometheus:
    """One Prometheus: `firing` says which alerts fire. With `autoscaler` it reads the one on the gateway's host too."""

    def __init__(self, gateway: Gateway, fleet: Replicas, scale: float, autoscaler: bool = False) -> None:
        self.url = f"http://{gateway.host}:9090"
        self.folder = Path(tempfile.mkdtemp(prefix="prometheus-"))
        self.folder.chmod(0o755)
        self._binary = os.environ.get("PROMETHEUS")
        self._process: subprocess.Popen[bytes] | None = None
        self._log = self.folder / "log"
        config = {
            "global": {"scrape_interval": SCRAPE, "scrape_timeout": SCRAPE, "evaluation_interval": "1s"},
            "rule_files": ["rules/*.yml"],
            "scrape_configs": [
                self._job("gateway", {f"{gateway.host}:9113": {}}),
                # The simulated one shows its metrics at its one port, and only the gateway's resolver knows its name.
                self._job("replicas", {f"{sim.host}:{sim.port}": {"replica": sim.name} for sim in fleet}),
                *([self._job("autoscaler", {f"{gateway.host}:{service.PORT}": {}})] if autoscaler else []),
            ],
        }
        (self.folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        (self.folder / "rules").mkdir()
        for path in (ROOT / "prometheus" / "rules").glob("*.yml"):
            text = yaml.safe_dump(quick_rules(path.read_text(), scale))
            (self.folder / "rules" / path.name).write_text(text)
        (self.folder / "data").mkdir(mode=0o777)
        (self.folder / "data").chmod(0o777)

    @staticmethod
    def _job(name: str, targets: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
        listed = [{"targets": [address], "labels": dict(labels)} for address, labels in targets.items()]
        return {"job_name": name, "static_configs": listed}

    def __enter__(self) -> Self:
        options = [
            *("--config.file={}/prometheus.yml", "--storage.tsdb.path={}/data"),
            f"--web.listen-address={self.url.removeprefix('http://')}",
        ]
        if self._binary:
            command = [self._binary, *(option.format(self.folder) for option in options)]
        else:
            seen = "/etc/prometheus"
            docker = ["docker", "run", "--rm", "--pull", "never", "--name", self.folder.name, "--network", "host"]
            mount = ["--volume", f"{self.folder}:{seen}:ro", "--volume", f"{self.folder}/data:{seen}/data"]
            command = [*docker, *mount, image("prometheus"), *(option.format(seen) for option in options)]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)

        def up() -> bool:
            assert self._process
            if self._process.poll() is not None:
                raise RuntimeError(f"Prometheus ended:\n{self._log.read_text()[-3000:]}")
            try:
                return len(self.query("up == 1")) > 1
            except OSError:
                return False

        try:
            until(up, f"Prometheus at {self.url} scrapes the gateway and a replica")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process
        end(self._process, "" if self._binary else self.folder.name)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _get(self, path: str) -> Any:
        return json.loads(get(self.url + path))["data"]

    def query(self, expr: str) -> list[dict[str, Any]]:
        """The series that an instant query gives."""
        found: list[dict[str, Any]] = self._get(f"/api/v1/query?{urlencode({'query': expr})}")["result"]
        return found

    def firing(self) -> dict[str, dict[str, Any]]:
        """The alerts that fire: of each name one, with its labels and annotations."""
        return {
            one["labels"]["alertname"]: one for one in self._get("/api/v1/alerts")["alerts"] if one["state"] == "firing"
        }
