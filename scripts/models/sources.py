"""Where a model can be brought from: the hub, a folder, or an HTTP or S3 mirror.

Each source lists its files with their size and what it knows of their content, and goes on with a file where it ended,
so that a download can be resumed and checked whatever it came from."""

import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from io import BytesIO
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any, BinaryIO, cast
from urllib.parse import quote, urlsplit
from urllib.request import getproxies, proxy_bypass

import huggingface_hub

from models import hub
from stack.console import Problem

SUMS = "SHA256SUMS"
WRITE_SUMS = f"write it with: find . -type f ! -name {SUMS} -exec sha256sum {{}} + > {SUMS}"
CHUNK = 1 << 20
# What vLLM loads; of weights in both formats, the first.
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
WANTED = (*WEIGHTS, "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py")
AGAIN = "run this again: it goes on where it ended"
CHECK_ADDRESS = f"check the address and the network, then {AGAIN}"
CHECK_S3 = (
    "check the address, the network (proxies have to be http:// ones), AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID"
    f" and AWS_SECRET_ACCESS_KEY, then {AGAIN}"
)


@dataclass(frozen=True)
class File:
    """One file of a model: its path below the model's folder, its bytes, and what the source knows of its content."""

    path: str
    size: int
    sha256: str | None = None
    git: str | None = None  # the SHA-1 of git's blob
    version: str = ""  # where there is no sum: changes when the file does


# Appends to the stream, which stands at its end, what it lacks of the file, and tells each time how many bytes came.
# A Problem where that breaks off.
Fetch = Callable[[File, BinaryIO, Callable[[int], object]], None]


@dataclass(frozen=True)
class Source:
    """A place that has a model: what there is of WANTED, how to get it, and at the hub of which commit it is."""

    files: list[File]
    fetch: Fetch
    commit: str = ""

    @property
    def revision(self) -> str:
        """What exactly is there: the commit, or the sum of all sums."""
        lines = sorted(f"{file.sha256 or file.version} {file.size} {file.path}\n" for file in self.files)
        return self.commit or hashlib.sha256("".join(lines).encode()).hexdigest()


def name_of(text: str) -> str:
    """What the model at the source `text` is called under models/, if the user gives it no other name."""
    return text if hub.is_repository(text) and not Path(text).is_dir() else PurePosixPath(Path(text).resolve()).name


def open_source(text: str, revision: str | None, token_file: Path | None, at: str | None) -> Source:
    """The source that `text` names: a folder, an address (http, https, s3), or a repository of the hub, or of `at`."""
    folder = Path(text)
    is_address = text.startswith(("http://", "https://", "s3://"))
    if revision and (is_address or folder.is_dir()):
        raise Problem(f"{text} has no revisions: --revision is the hub's", "leave --revision out")
    if folder.is_dir():
        return _folder(folder)
    if text.startswith("s3://"):
        return _s3(text)
    if is_address:
        # HF_TOKEN_FILE's token is for the hub alone
        return _web(text.rstrip("/"), hub.read_token(token_file) if token_file else None)
    if not hub.is_repository(text):
        raise Problem(
            f"{text} is neither a folder, an address nor a name like owner/model",
            "write a folder's path, an address with https:// or s3://, or OWNER/NAME as the hub shows it",
        )
    return _hub(text, revision or "main", hub.read_token(token_file), hub.endpoint(at))


def wanted(path: str) -> bool:
    """Whether vLLM may need the file. Hidden ones and paths that lead out of the model's folder are never wanted."""
    parts = PurePosixPath(path).parts
    inside = path.isprintable() and not any(part.startswith((".", "/")) for part in parts)
    return inside and any(fnmatch(parts[-1], pattern) for pattern in WANTED)


def for_vllm(files: list[File], source: str) -> list[File]:
    """The files without the same weights a second time: in PyTorch's format, or as their maker has them (original/ of
    Llama and gpt-oss, consolidated* of Mistral). A Problem where they are no model that vLLM can load."""
    at_top = {file.path for file in files if "/" not in file.path}
    if "config.json" not in at_top:
        raise Problem(f"{source} has no config.json", "is it a model's folder?")
    if not any(fnmatch(path, pattern) for path in at_top for pattern in WEIGHTS):
        raise Problem(f"{source} has no weights that vLLM loads ({', '.join(WEIGHTS)})", "choose a model that has")
    safe = {PurePosixPath(file.path).parent for file in files if file.path.endswith(".safetensors")}
    twice = ["original/*"]
    # vLLM takes Mistral's format where it is there; some models have no tokenizer in another
    if at_top & {"tokenizer.json", "tokenizer.model"}:
        twice += ["consolidated*.safetensors", "consolidated*.json"]
    if not any(path.endswith(".safetensors") and not fnmatch(path, "consolidated*") for path in at_top):
        twice = []
    return [
        file
        for file in files
        if not (file.path.endswith(".bin") and PurePosixPath(file.path).parent in safe)
        and not any(fnmatch(file.path, pattern) for pattern in twice)
    ]


def parse_sums(content: bytes, where: str) -> dict[str, str]:
    """The lines of `sha256sum`: SHA-256 by path."""
    sums = {}
    for line in content.decode(errors="replace").splitlines():
        row = re.fullmatch(r"([0-9a-fA-F]{64}) [ *](?:\./)?(.+)", line)
        if not row:
            raise Problem(f"{where} is not what sha256sum writes: {line[:60]}", WRITE_SUMS)
        sums[row[2]] = row[1].lower()
    return sums


def with_sums(found: list[File], content: bytes, where: str) -> list[File]:
    """The files with the SHA-256 that `content` has for them. A Problem where it names one that is not there."""
    sums = parse_sums(content, where)
    if missing := {path for path in sums if wanted(path)} - {file.path for file in found}:
        raise Problem(f"{where} names {min(missing)}, which is not there", f"put it there, or {WRITE_SUMS}")
    return [replace(file, sha256=sums.get(file.path)) for file in found]


def _folder(folder: Path) -> Source:
    """A folder on this host, a USB disk say. Its SHA256SUMS is used where there is one."""

    def fetch(file: File, stream: BinaryIO, advance: Callable[[int], object]) -> None:
        with (folder / file.path).open("rb") as source:
            source.seek(stream.tell())
            while chunk := source.read(CHUNK):
                advance(stream.write(chunk))

    found = []
    for path in folder.rglob("*"):
        inside = str(path.relative_to(folder))
        if wanted(inside) and path.is_file():
            about = path.stat()
            found.append(File(inside, about.st_size, version=str(about.st_mtime_ns)))
    sums = folder / SUMS
    return Source(with_sums(found, sums.read_bytes(), str(sums)) if sums.is_file() else found, fetch)


def _fetch_from(base: str, token: str | None, refused: Callable[[str, int], Problem], fix: str) -> Fetch:
    """How to get files below the address `base`. A connection that breaks is tried again a few times.

    Not by hf_hub_download: what arrived before a run ended it throws away.
    """

    def fetch(file: File, stream: BinaryIO, advance: Callable[[int], object]) -> None:
        url = f"{base}/{quote(file.path)}"
        with hub.reaching(url, fix):
            from huggingface_hub.file_download import http_get  # noqa: PLC0415 - it does not load in every environment

            # it warns of each new try, with the whole address
            logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
            bar = cast(Any, lambda **_: nullcontext(SimpleNamespace(update=advance)))
            try:
                http_get(url, stream, resume_size=stream.tell(), headers=hub.headers(token), tqdm_class=bar)
            except huggingface_hub.errors.HfHubHTTPError as error:
                raise refused(file.path, error.response.status_code) from error

    return fetch


def _web(url: str, token: str | None) -> Source:
    """A folder on a web server. Its SHA256SUMS says which files there are."""

    def refused(path: str, status: int) -> Problem:
        what = f"{url}/{path}: status {status}"
        if status in hub.REFUSED:
            return Problem(what, "name a file with the mirror's token: --token-file FILE")
        return Problem(what, f"put there {SUMS} and each file that it names; {WRITE_SUMS}")

    def ask(method: str, path: str) -> Any:
        answer = hub.ask(f"{url}/{quote(path)}", token, CHECK_ADDRESS, method)
        if answer.status_code != 200:
            raise refused(path, answer.status_code)
        return answer

    found = []
    for path, digest in parse_sums(ask("GET", SUMS).content, f"{url}/{SUMS}").items():
        if wanted(path):
            size = ask("HEAD", path).headers.get("content-length", "")
            if not size.isdecimal():
                raise Problem(f"{url}/{path}: the server tells no size", "let it answer HEAD with a length")
            found.append(File(path, int(size), digest))
    return Source(found, _fetch_from(url, token, refused, CHECK_ADDRESS))


def _hub(name: str, revision: str, token: str | None, endpoint: str) -> Source:
    """A repository on the Hugging Face hub, or on a mirror that speaks its API."""

    def refused(path: str, status: int) -> Problem:
        # of a gated model the hub lists the files for everyone, and refuses them
        if status in hub.REFUSED:
            return hub.gated(name)
        wrong = "the name" if revision == "main" else "--revision"
        return Problem(f"{path} of {name} at {endpoint}: status {status}", f"correct {wrong}, or {AGAIN}")

    with hub.reaching(endpoint):
        try:
            api = huggingface_hub.HfApi(endpoint, token=token or False)
            about: Any = api.model_info(name, revision=revision, files_metadata=True, timeout=hub.TIMEOUT)
            # git has large files as a pointer, their content has a SHA-256
            found = [
                File(one.rfilename, one.size, one.lfs and one.lfs.sha256, None if one.lfs else one.blob_id)
                for one in about.siblings
                if wanted(one.rfilename)
            ]
        except huggingface_hub.errors.HfHubHTTPError as error:
            raise refused(f"revision {revision}", error.response.status_code) from error
        except huggingface_hub.errors.HFValidationError as error:
            raise Problem(
                f"{name} is no name of a model on the hub: {error}", "write OWNER/NAME as the hub shows it"
            ) from error
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise hub.not_the_hub(endpoint) from error
    whole = all(isinstance(file.size, int) and (file.sha256 or file.git) for file in found)
    if not whole or not re.fullmatch("[0-9a-f]+", str(about.sha)):
        raise hub.not_the_hub(endpoint)
    # by the commit, so that all files are of one
    address = f"{endpoint}/{name}/resolve/{about.sha}"
    return Source(found, _fetch_from(address, token, refused, f"{hub.CHECK}; then {AGAIN}"), about.sha)


@contextmanager
def _reaching_s3(where: str) -> Iterator[None]:
    """Turns boto3's errors on the way to an object into Problems."""
    from botocore import exceptions  # noqa: PLC0415 - half a second that other sources need not wait for

    try:
        yield
    except exceptions.ClientError as error:
        status = error.response["ResponseMetadata"]["HTTPStatusCode"]
        if status == 412:
            raise Problem(f"{where} has changed meanwhile", "run this again: it begins anew") from error
        raise Problem(f"{where}: status {status}, {error}", CHECK_S3) from error
    # a ValueError where AWS_ENDPOINT_URL is no address
    except (exceptions.BotoCoreError, ValueError) as error:
        raise Problem(f"cannot reach {where}, it does not answer or broke off: {error}", CHECK_S3) from error


def _s3_client(bucket: str) -> Any:
    """With the keys that boto3 finds; without any the bucket has to be public."""
    import boto3  # noqa: PLC0415 - as above
    from botocore import UNSIGNED, config  # noqa: PLC0415

    session = boto3.Session()
    region = os.environ.get("AWS_REGION") or session.region_name or "us-east-1"
    endpoint = os.environ.get("AWS_ENDPOINT_URL") or f"https://{bucket}.s3.{region}.amazonaws.com"
    options: dict[str, Any] = {"connect_timeout": 10}
    if not session.get_credentials():
        options["signature_version"] = UNSIGNED
    # boto3 does not look at ALL_PROXY
    if (proxy := getproxies().get("all")) and not proxy_bypass(urlsplit(endpoint).hostname or ""):
        options["proxies"] = {"http": proxy, "https": proxy} | getproxies()
    return session.client("s3", region_name=region, config=config.Config(**options))


def _s3(text: str) -> Source:
    """A folder in an S3 bucket, at Amazon or at AWS_ENDPOINT_URL. Its SHA256SUMS is used where there is one."""
    bucket, _, folder = text.removeprefix("s3://").partition("/")
    folder = folder.strip("/")
    if not bucket or not folder:
        raise Problem(f"{text} names no bucket with a folder", "write it as s3://BUCKET/FOLDER")

    def fetch(file: File, stream: BinaryIO, advance: Callable[[int], object]) -> None:
        # an object that was replaced since it was listed is refused
        asked = {"Bucket": bucket, "Key": f"{folder}/{file.path}", "IfMatch": file.version}
        if have := stream.tell():
            asked["Range"] = f"bytes={have}-"
        with _reaching_s3(f"s3://{bucket}/{folder}/{file.path}"):
            for chunk in client.get_object(**asked)["Body"].iter_chunks(CHUNK):
                advance(stream.write(chunk))

    with _reaching_s3(text):
        client = _s3_client(bucket)
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{folder}/")
        rows = [row for page in pages for row in page.get("Contents", ())]
    if not rows:
        raise Problem(f"{text} is empty, or no S3 answers", CHECK_S3)
    listed = {
        path: File(path, row["Size"], version=row["ETag"])
        for row in rows
        if (path := row["Key"].removeprefix(f"{folder}/"))
    }
    found = [file for path, file in listed.items() if wanted(path)]
    if SUMS in listed:
        sums = BytesIO()
        fetch(listed[SUMS], sums, int)
        found = with_sums(found, sums.getvalue(), f"s3://{bucket}/{folder}/{SUMS}")
    return Source(found, fetch)
