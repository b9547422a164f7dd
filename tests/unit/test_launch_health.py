"""The replica's health check, against a small HTTP server."""

import json
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from stack.shell import ROOT
from vllm import health


class Engine(ThreadingHTTPServer):
    """Answers as vLLM does; what it has been asked, and how it answers, are fields."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.steps = 5.0
        self.running = 0
        self.asked: list[str] = []
        self.status = {"/v1/completions": 200}
        self.wedged = threading.Event()
        self.takes_s = 0.0  # for each answer
        self.sleep: dict[str, object] = {}  # what it says of its sleep, if it has sleep mode


class Answer(BaseHTTPRequestHandler):
    server: Engine

    def log_message(self, *_: object) -> None:
        """Stays quiet."""

    def do_GET(self) -> None:
        if self.path == "/metrics":
            self.reply(
                200,
                "# HELP vllm:iteration_tokens_total_count x\n"
                f'vllm:iteration_tokens_total_count{{engine="0"}} {self.server.steps}\n'
                f'vllm:num_requests_running{{engine="0"}} {self.server.running}\n'
                'vllm:num_requests_waiting{engine="0"} 0\n'
                'vllm:num_requests_waiting_by_reason{engine="0"} 99\n',
            )
        elif self.path == "/is_sleeping":
            self.reply(200 if self.server.sleep else 404, json.dumps(self.server.sleep))
        else:
            self.reply(200, json.dumps({"data": [{"id": "m"}]}))

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append(self.path)
        if self.server.wedged.is_set():
            return
        self.reply(self.server.status.get(self.path, 404), "{}")

    def reply(self, status: int, body: str) -> None:
        threading.Event().wait(self.server.takes_s)
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """A running engine, and a health check that asks it."""
    with Engine() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(health, "PORT", server.server_address[1])
        monkeypatch.setattr(health, "SEEN", tmp_path / "seen.json")
        monkeypatch.setattr(health, "PROC", tmp_path)
        yield server
        server.shutdown()


def test_the_first_check_asks_for_one_token_and_later_ones_leave_an_idle_replica_alone(engine: Engine) -> None:
    assert [health.main() for _ in range(3)] == [0, 0, 0]
    assert engine.asked == ["/v1/completions"]


def test_an_idle_replica_is_asked_again_after_a_minute(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    health.main()
    monkeypatch.setattr(health, "IDLE_PROBE_EVERY_S", 0)
    assert health.main() == 0
    assert len(engine.asked) == 2


def test_a_replica_that_makes_steps_is_healthy_however_slow_and_is_not_asked(engine: Engine) -> None:
    health.main()
    engine.running = 3
    engine.wedged.set()
    for _ in range(3):
        engine.steps += 1
        assert health.main() == 0
    assert len(engine.asked) == 1


def test_a_replica_that_stands_still_with_requests_must_answer(
    engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    health.main()
    engine.running = 1
    assert health.main() == 0
    assert len(engine.asked) == 2
    engine.wedged.set()
    assert health.main() == 1
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_a_replica_that_refuses_is_not_healthy(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    engine.status["/v1/completions"] = 500
    assert health.main() == 1
    assert "/v1/completions answered 500" in capsys.readouterr().out


def test_a_model_that_makes_no_text_is_asked_for_an_embedding(engine: Engine) -> None:
    engine.status = {"/v1/embeddings": 200}
    assert health.main() == 0
    assert engine.asked == ["/v1/completions", "/v1/embeddings"]


def test_a_check_ends_before_docker_ends_it_though_each_answer_is_in_time(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Docker ends is not counted as a failure, so a wedged replica would never be found."""
    timeout = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["x-replica"]["healthcheck"]["timeout"]
    assert max(health.FIRST_TIMEOUT_S, health.TIMEOUT_S) <= health.LIMIT_S < int(timeout.removesuffix("s"))
    engine.status = {"/pooling": 200}
    engine.takes_s = 0.2
    monkeypatch.setattr(health, "LIMIT_S", 0.5)
    assert health.main() == 1
    assert "/pooling" not in engine.asked
    monkeypatch.setattr(health, "LIMIT_S", 25)
    assert health.main() == 0
    # a single request has no longer than what is left
    engine.takes_s = 10
    monkeypatch.setattr(health, "LIMIT_S", 0.2)
    began = time.monotonic()
    assert health.main() == 1
    assert time.monotonic() - began < 5


def test_a_sleeper_is_healthy_and_nothing_wakes_it(engine: Engine, replica: subprocess.Popen[bytes]) -> None:
    engine.sleep = {"is_sleeping": True, "state": "asleep", "seconds": 9000.0}
    engine.wedged.set()
    assert [health.main() for _ in range(4)] == [0] * 4
    engine.sleep = {"is_sleeping": True, "state": "waking", "seconds": 30.0}
    assert health.main() == 0
    assert engine.asked == []
    engine.sleep = {"is_sleeping": False, "state": "closing", "seconds": 30.0}
    engine.running = 1
    assert health.main() == 0  # the step since then
    assert health.main() == 1
    assert replica.poll() is None


def test_a_replica_that_does_not_wake_within_ten_minutes_is_ended(
    engine: Engine, replica: subprocess.Popen[bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    engine.sleep = {"is_sleeping": True, "state": "asleep", "seconds": 1.0}
    assert health.main() == 0
    engine.sleep = {"is_sleeping": True, "state": "waking", "seconds": 601.0}
    assert [health.main() for _ in range(3)] == [1] * 3
    assert "it has been waking for 601 s" in capsys.readouterr().out
    assert replica.wait(5) == -signal.SIGKILL


def test_a_restarted_engine_is_asked_again(engine: Engine) -> None:
    health.main()
    engine.steps = 0
    assert health.main() == 0
    assert len(engine.asked) == 2


@pytest.fixture
def replica(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[bytes]]:
    """A process that stands for vLLM."""
    with subprocess.Popen(["sleep", "60"]) as process:
        pid_file = tmp_path / "pid"
        pid_file.write_text(str(process.pid))
        monkeypatch.setattr(health, "PID", pid_file)
        yield process
        process.kill()


def test_a_wedged_replica_is_ended_at_the_third_failure(engine: Engine, replica: subprocess.Popen[bytes]) -> None:
    health.main()
    engine.running = 1
    engine.wedged.set()
    assert [health.main() for _ in range(2)] == [1, 1]
    assert replica.poll() is None
    assert health.main() == 1
    assert replica.wait(5) == -signal.SIGKILL


def test_a_replica_that_computes_gets_time(
    engine: Engine, replica: subprocess.Popen[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    health.main()
    engine.running = 1
    engine.wedged.set()
    (tmp_path / "77").mkdir()
    for ticks in range(0, 60000, 10000):
        (tmp_path / "77" / "stat").write_text(f"77 (a) b) R {'0 ' * 10}{ticks} {ticks} 0")
        assert health.main() == 1
    assert replica.poll() is None
    monkeypatch.setattr(health, "BUSY_MAY_FAIL_S", 0)
    assert health.main() == 1
    assert replica.wait(5) == -signal.SIGKILL


def test_a_replica_that_comes_back_starts_from_no_failures(engine: Engine, replica: subprocess.Popen[bytes]) -> None:
    health.main()
    engine.running = 1
    for _ in range(3):
        engine.wedged.set()
        assert [health.main() for _ in range(2)] == [1, 1]
        engine.wedged.clear()
        assert health.main() == 0
    assert replica.poll() is None


def test_a_step_ends_the_failures_though_the_replica_refuses_what_is_new(
    engine: Engine, replica: subprocess.Popen[bytes]
) -> None:
    health.main()
    engine.running = 1
    engine.status["/v1/completions"] = 503  # it drains, or its queue is full
    for _ in range(3):
        assert [health.main() for _ in range(2)] == [1, 1]
        engine.steps += 1
        assert health.main() == 0
    assert replica.poll() is None


def test_a_replica_that_is_still_loading_is_left_alone(engine: Engine, replica: subprocess.Popen[bytes]) -> None:
    engine.wedged.set()
    assert [health.main() for _ in range(4)] == [1] * 4
    assert replica.poll() is None


def test_no_server_is_not_healthy(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    engine.shutdown()
    engine.server_close()
    assert health.main() == 1
    assert len(capsys.readouterr().out.splitlines()) == 1
