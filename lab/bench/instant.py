"""Replicas that answer at once, to measure what a gateway itself costs: one Nginx that gives the same bytes always."""

import json
from typing import Self

from lab.bench.plain import write_plain
from lab.sim.gateway import Nginx
from lab.sim.replicas import Replicas

ANSWER = json.dumps(
    {
        "id": "chatcmpl-0",
        "object": "chat.completion",
        "created": 0,
        "model": "sim",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "ok"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
    },
    separators=(",", ":"),  # as vLLM writes it, so that its usage is found
)
MODELS = json.dumps({"object": "list", "data": [{"id": "sim", "object": "model", "created": 0, "owned_by": "vllm"}]})
METRICS = (
    r"vllm:num_requests_running{engine=\"0\"} 0\nvllm:num_requests_waiting{engine=\"0\"} 0\n"
    r"vllm:kv_cache_usage_perc{engine=\"0\"} 0\nvllm:generation_tokens_total{engine=\"0\"} 0\n"
)


class InstantReplicas(Replicas):
    """A fleet whose replicas are one Nginx's addresses; `cpus` pins it."""

    def __init__(self, count: int, cpus: str) -> None:
        super().__init__(count)
        self._server = InstantNginx([sim.host for sim in self.all], self.port, cpus)

    def __enter__(self) -> Self:
        self._server.__enter__()
        for sim in self.all:
            self.dns.names[sim.name] = sim.host
        return self

    def __exit__(self, *_: object) -> None:
        self._server.__exit__()
        self.dns.close()


class InstantNginx(Nginx):
    """The Nginx behind them."""

    def __init__(self, hosts: list[str], port: int, cpus: str) -> None:
        super().__init__(f"http://{hosts[0]}:{port}", cpus=cpus)
        self._hosts = hosts
        self._port = port

    def configure(self) -> None:
        """Writes one server on all addresses of the replicas."""
        listen = "\n".join(f"    listen {host}:{self._port} backlog=4096;" for host in self._hosts)
        write_plain(
            self,
            f"""
  default_type application/json;
  server {{
{listen}
    location = /health {{ return 200; }}
    location = /v1/models {{ return 200 '{MODELS}'; }}
    location = /metrics {{ default_type text/plain; return 200 "{METRICS}"; }}
    location / {{ return 200 '{ANSWER}'; }}
  }}
""",
        )
