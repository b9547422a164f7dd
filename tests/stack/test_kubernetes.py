"""The gateway's pod of deploy/kubernetes, run as a container beside the stack's replicas.

What Kubernetes would do, Docker does here: ConfigMaps and the Secret are folders, and the replicas' names there are
aliases in a network. A cluster's own part (scheduling, probes, policies) is not run.
"""

import re
import subprocess
from collections.abc import Iterator

import httpx
import pytest

from access.keys import KeyStore
from access.store import Secrets
from deploy.kubernetes import check
from lab.stack import Stack, run
from lab.waiting import until

NAME = "vllm-fleet-pod"
# Made of the image that the manifest names; that one may be out of reach here.
IMAGE = "vllm-fleet/gateway:1.30.6"


@pytest.fixture(scope="module")
def pod(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """The pod's URL, and a key that it takes."""
    folder = tmp_path_factory.mktemp("pod")
    folder.chmod(0o755)
    items = {(it["kind"], it["metadata"]["name"]): it for it in check.built(check.HERE / "base")}
    spec = items["Deployment", "gateway"]["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    store = Secrets(folder / "keys")
    key = KeyStore(store).create("alice")
    options = [f"--sysctl={it['name']}={it['value']}" for it in spec["securityContext"]["sysctls"]]
    user = spec["securityContext"]
    options += [f"--user={user['runAsUser']}:{user['runAsGroup']}"]
    options += ["--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges"]
    for source in container["envFrom"]:
        data = items["ConfigMap", source["configMapRef"]["name"]]["data"]
        options += [f"--env={name}={value}" for name, value in data.items()]
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    for mount in container["volumeMounts"]:
        volume, place = volumes[mount["name"]], mount["mountPath"]
        if "configMap" in volume:
            files = folder / mount["name"]
            files.mkdir(exist_ok=True)
            for name, text in items["ConfigMap", volume["configMap"]["name"]]["data"].items():
                (files / name).write_text(text)
            options.append(f"--volume={files / mount.get('subPath', '')}:{place}:ro")
        elif "secret" in volume:
            options.append(f"--volume={store.keys.parent}:{place}:ro")
        else:
            # fsGroup makes such a volume writable for the pod's group
            options.append(f"--tmpfs={place}:mode=1777,uid={user['runAsUser']},gid={user['fsGroup']}")
    fleet = items["ConfigMap", volumes["fleet"]["configMap"]["name"]]["data"]["fleet.conf"]
    hosts = dict(re.findall(r"^upstream (\S+) .* server (\S+):8000", fleet, re.MULTILINE))
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    started = []
    try:
        run("docker", "network", "create", NAME)
        for name, host in hosts.items():
            run(
                "docker",
                "network",
                "connect",
                f"--alias={host}",
                NAME,
                run("docker", "compose", "ps", "-q", name).strip(),
            )
            started.append(name)
        words = [*container["command"], *container["args"]]
        run(
            "docker",
            "run",
            "--detach",
            f"--name={NAME}",
            f"--network={NAME}",
            *options,
            "--entrypoint",
            words[0],
            IMAGE,
            *words[1:],
        )
        address = run(
            "docker", "inspect", "--format={{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", NAME
        ).strip()
        yield f"http://{address}", key
    finally:
        subprocess.run(["docker", "rm", "--force", NAME], capture_output=True)
        for name in started:
            run("docker", "network", "disconnect", NAME, run("docker", "compose", "ps", "-q", name).strip())
        subprocess.run(["docker", "network", "rm", NAME], capture_output=True)


def test_it_answers_from_the_replicas_to_whoever_has_a_key(pod: tuple[str, str], stack: Stack) -> None:
    url, key = pod
    path, body = f"{url}/v1/completions", {"model": stack.model, "prompt": "One, two,", "max_tokens": 2}
    held = {"Authorization": f"Bearer {key}"}
    said = ""

    def answers() -> bool:
        nonlocal said
        said = subprocess.run(["docker", "logs", NAME], capture_output=True, text=True).stderr[-2000:]
        try:
            return httpx.post(path, json=body, headers=held, timeout=10).status_code == httpx.codes.OK
        except httpx.TransportError:
            return False

    try:
        until(answers, "the gateway's pod answers", 30)
    except TimeoutError:
        pytest.fail(f"the gateway's pod does not answer: {said}")
    assert httpx.post(path, json=body).status_code == httpx.codes.UNAUTHORIZED
    admin = ["docker", "exec", NAME, "curl", "--silent", "http://127.0.0.1:8081/status.json"]
    until(lambda: re.findall(r'"state":"(\w+)"', run(*admin)) == ["ready", "ready"], "both replicas are ready", 20)


def test_its_probe_and_its_metrics_answer(pod: tuple[str, str]) -> None:
    url, _ = pod
    # as the kubelet and Prometheus ask: by the pod's address, without a key
    assert httpx.get(f"{url}/health").status_code == httpx.codes.OK
    assert "gateway_requests_total" in httpx.get(f"{url}:9113/metrics").text
