"""Models arrive whole or not at all, from each kind of source; servers on loopback stand for the hub and mirrors."""

import hashlib
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from planner.sources import sign_s3

ROOT = Path(__file__).resolve().parents[2]
CONFIG = (ROOT / "tests" / "models" / "SmolLM2-135M-Instruct" / "config.json").read_bytes()
FILES = {"config.json": CONFIG, "model.safetensors": bytes(range(256)) * 20_000, "tokenizer.json": b"{}"}
SUMS = "".join(f"{hashlib.sha256(data).hexdigest()}  {path}\n" for path, data in FILES.items()).encode()
KEY, SECRET = "AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"


class Server:
    """A web server on loopback with the files of `content`. `cut` ends the next answer after so many bytes."""

    def __init__(self) -> None:
        self.content: dict[str, bytes] = {}
        self.cut: int | None = None
        self.token: str | None = None
        self.ranges: list[str] = []
        self.s3 = False
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def answer(self, body: bool) -> None:
                path = unquote(urlsplit(self.path).path)
                if server.token and self.headers["authorization"] != f"Bearer {server.token}":
                    self.send_response(401)
                    self.end_headers()
                    return
                if server.s3 and not self.signed():
                    self.send_response(403)
                    self.end_headers()
                    return
                data = server.listing(self.path) if server.s3 and "list-type" in self.path else server.content.get(path)
                if data is None:
                    self.send_response(404)
                    self.end_headers()
                    return
                status = 200
                if asked := self.headers["range"]:
                    server.ranges.append(asked)
                    data, status = data[int(asked.removeprefix("bytes=").rstrip("-")) :], 206
                self.send_response(status)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                if body and server.cut is not None and len(data) > server.cut:
                    self.wfile.write(data[: server.cut])
                    server.cut = None
                    self.close_connection = True
                elif body:
                    self.wfile.write(data)

            def signed(self) -> bool:
                """Whether the signature is that of the request as it arrived."""
                given = self.headers["authorization"] or ""
                names = given.partition("SignedHeaders=")[2].partition(",")[0].split(";")
                parts = urlsplit(self.path)
                named = {name: self.headers[name] for name in names if not name.startswith("x-amz-")}
                when = datetime.strptime(self.headers["x-amz-date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
                right = sign_s3(parts.path, parts.query, named, KEY, SECRET, "us-east-1", when)
                return right["authorization"] == given

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def listing(self, target: str) -> bytes:
        """Two keys a page, as S3's ListObjectsV2 tells them."""
        query = parse_qs(urlsplit(target).query)
        keys = [key for key in sorted(self.content) if key.startswith("/bucket/" + query["prefix"][0])]
        start = int(query.get("continuation-token", ["0"])[0])
        more = f"<NextContinuationToken>{start + 2}</NextContinuationToken>" if start + 2 < len(keys) else ""
        rows = "".join(
            f"<Contents><Key>{key.removeprefix('/bucket/')}</Key><Size>{len(self.content[key])}</Size></Contents>"
            for key in keys[start : start + 2]
        )
        space = "http://s3.amazonaws.com/doc/2006-03-01/"
        return f'<ListBucketResult xmlns="{space}">{rows}{more}</ListBucketResult>'.encode()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.close()


def download(*args: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "download_model.py"), *map(str, args)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, env={"PATH": "/usr/bin:/bin", "COLUMNS": "200", **env}
    )


def arrived(place: Path) -> bool:
    return all((place / path).read_bytes() == data for path, data in FILES.items())


def publish_on_hub(server: Server, commit: str = "c0ffee") -> None:
    siblings = [
        {"rfilename": path, "size": len(data), "lfs": {"sha256": hashlib.sha256(data).hexdigest()}}
        for path, data in FILES.items()
    ]
    siblings += [{"rfilename": "pytorch_model.bin", "size": 1 << 50}, {"rfilename": "../../evil.json", "size": 1}]
    about = json.dumps({"sha": commit, "siblings": siblings}).encode()
    server.content |= {"/api/models/me/tiny/revision/main": about, "/api/models/me/tiny/revision/v1": about}
    server.content |= {f"/me/tiny/resolve/{commit}/{path}": data for path, data in FILES.items()}


def test_from_the_hub_by_commit_and_without_other_formats(server: Server, tmp_path: Path) -> None:
    publish_on_hub(server)
    run = download("me/tiny", "--revision", "v1", "--endpoint", server.url, "--models", tmp_path)
    assert not run.returncode, run.stdout + run.stderr
    assert arrived(tmp_path / "me" / "tiny")
    assert json.loads((tmp_path / "me" / "tiny" / ".source.json").read_text())["revision"] == "c0ffee"
    assert not list(tmp_path.rglob("*.bin"))
    assert not list(tmp_path.parent.rglob("evil.json"))
    again = download("me/tiny", "--endpoint", server.url, "--models", tmp_path)
    assert "is there already" in again.stdout
    checked = subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=tmp_path / "me" / "tiny")
    assert not checked.returncode


def test_a_gated_model_needs_the_token_from_a_file(server: Server, tmp_path: Path) -> None:
    publish_on_hub(server)
    server.token = "hf_secret"
    refused = download("me/tiny", "--endpoint", server.url, "--models", tmp_path)
    assert refused.returncode == 1
    assert "--token-file" in refused.stdout
    (tmp_path / "token").write_text("hf_secret\n")
    args = ("me/tiny", "--endpoint", server.url, "--models", tmp_path)
    assert not download(*args, HF_TOKEN_FILE=str(tmp_path / "token")).returncode
    assert arrived(tmp_path / "me" / "tiny")


def test_a_cut_download_goes_on_where_it_ended(server: Server, tmp_path: Path) -> None:
    publish_on_hub(server)
    server.cut = 2_000_000
    cut = download("me/tiny", "--endpoint", server.url, "--models", tmp_path)
    assert cut.returncode == 1
    assert "goes on" in cut.stdout
    assert not (tmp_path / "me" / "tiny").exists(), "half a model must not be seen by a replica"
    assert not download("me/tiny", "--endpoint", server.url, "--models", tmp_path).returncode
    assert arrived(tmp_path / "me" / "tiny")
    assert any(int(asked.removeprefix("bytes=").rstrip("-")) > 100_000 for asked in server.ranges)


def test_damaged_bytes_are_thrown_away(server: Server, tmp_path: Path) -> None:
    publish_on_hub(server)
    whole = server.content["/me/tiny/resolve/c0ffee/model.safetensors"]
    server.content["/me/tiny/resolve/c0ffee/model.safetensors"] = b"x" + whole[1:]
    run = download("me/tiny", "--endpoint", server.url, "--models", tmp_path)
    assert run.returncode == 1
    assert "damaged" in run.stdout
    assert not (tmp_path / "me" / "tiny").exists()
    server.content["/me/tiny/resolve/c0ffee/model.safetensors"] = whole
    assert not download("me/tiny", "--endpoint", server.url, "--models", tmp_path).returncode


def test_too_little_disk_is_told_before_anything_is_fetched(server: Server, tmp_path: Path) -> None:
    publish_on_hub(server)
    about = json.loads(server.content["/api/models/me/tiny/revision/main"])
    about["siblings"][1]["size"] = 1 << 50
    server.content["/api/models/me/tiny/revision/main"] = json.dumps(about).encode()
    run = download("me/tiny", "--endpoint", server.url, "--models", tmp_path)
    assert run.returncode == 1
    assert "GiB are needed" in run.stdout
    assert not list(tmp_path.rglob("*.safetensors"))


def test_from_a_web_mirror(server: Server, tmp_path: Path) -> None:
    server.content = {f"/mirror/tiny/{path}": data for path, data in FILES.items()}
    refused = download(f"{server.url}/mirror/tiny", "--models", tmp_path)
    assert "sha256sum * > SHA256SUMS" in refused.stdout
    server.content["/mirror/tiny/SHA256SUMS"] = SUMS
    assert not download(f"{server.url}/mirror/tiny", "--name", "me/tiny", "--models", tmp_path).returncode
    assert arrived(tmp_path / "me" / "tiny")


def test_from_s3(server: Server, tmp_path: Path) -> None:
    server.s3 = True
    server.content = {f"/bucket/models/tiny/{path}": data for path, data in {**FILES, "SHA256SUMS": SUMS}.items()}
    keys = {"AWS_ENDPOINT_URL": server.url, "AWS_ACCESS_KEY_ID": KEY}
    wrong = download("s3://bucket/models/tiny", "--models", tmp_path, AWS_SECRET_ACCESS_KEY="wrong", **keys)
    assert "status 403" in wrong.stdout
    run = download("s3://bucket/models/tiny", "--models", tmp_path, AWS_SECRET_ACCESS_KEY=SECRET, **keys)
    assert not run.returncode, run.stdout + run.stderr
    assert arrived(tmp_path / "tiny")


def test_the_signature_is_that_of_amazons_own_example() -> None:
    """From "Signature Calculations for the Authorization Header" in the Amazon S3 API reference: GET Object."""
    signed = sign_s3(
        "/test.txt",
        "",
        {"host": "examplebucket.s3.amazonaws.com", "range": "bytes=0-9"},
        KEY,
        SECRET,
        "us-east-1",
        datetime(2013, 5, 24, tzinfo=UTC),
    )
    right = "f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41"
    assert signed["authorization"].endswith(f"Signature={right}")


def test_from_a_folder_as_on_a_host_without_a_network(tmp_path: Path) -> None:
    stick = tmp_path / "stick" / "tiny"
    stick.mkdir(parents=True)
    for path, data in FILES.items():
        (stick / path).write_bytes(data)
    (stick / "SHA256SUMS").write_bytes(SUMS)
    assert not download(stick, "--models", tmp_path / "models").returncode
    assert arrived(tmp_path / "models" / "tiny")
    shutil.rmtree(tmp_path / "models")
    (stick / "tokenizer.json").write_text("{ }")
    assert "damaged" in download(stick, "--models", tmp_path / "models").stdout


@pytest.mark.parametrize(
    ("source", "words"),
    [("nothing", "neither a folder"), ("s3://bucket", "names no bucket"), ("http://127.0.0.1:1/x", "does not answer")],
)
def test_mistakes_are_told_in_two_lines(source: str, words: str, tmp_path: Path) -> None:
    run = download(source, "--models", tmp_path)
    assert run.returncode == 1
    assert words in run.stdout
    assert "Traceback" not in run.stderr


def test_the_planner_asks_the_hub_for_the_config_alone(server: Server) -> None:
    server.content["/me/tiny/resolve/main/config.json"] = CONFIG
    machine = ROOT / "tests" / "machines" / "one-24gb.json"
    command = [sys.executable, str(ROOT / "scripts" / "plan.py"), "me/tiny", "--machine", str(machine), "--json"]
    env = {"PATH": "/usr/bin:/bin", "HF_ENDPOINT": server.url}
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env)
    assert not run.returncode, run.stdout + run.stderr
    assert json.loads(run.stdout)["models"][0]["layout"] == "1 × tp 1"
    server.token = "hf_secret"
    refused = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env)
    assert "HF_TOKEN_FILE" in refused.stdout
