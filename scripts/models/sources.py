"""Where a model can be brought from: the hub, a folder, or an HTTP or S3 mirror.

Each source lists its files with their size and what it knows of their content, and goes on with a file where it ended,
so that a download can be resumed and checked whatever it came from."""

import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from io import BytesIO
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol, cast
from urllib.parse import quote, urlsplit
from urllib.request import getproxies, proxy_bypass

import huggingface_hub

from models.hub import (
    CHECK,
    REFUSED,
    endpoint,
    gated,
    headers,
    is_repository,
    not_the_hub,
    reaching,
    read_token,
    unusable_proxy,
)
from stack.console import Problem

if TYPE_CHECKING:
    import httpx2

SUMS = "SHA256SUMS"
WRITE_SUMS = f"write it with: find . -type f ! -name {SUMS} -exec sha256sum {{}} + > {SUMS}"
CHUNK = 1 << 20
# What vLLM loads; of weights in both formats, the first.
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
WANTED = (*WEIGHTS, "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py")
TIMEOUT = 30  # seconds without an answer
AGAIN = "run this again: it goes on where it ended"
CHECK_ADDRESS = f"check the address and the network, then {AGAIN}"
CHECK_S3 = (
    "check the address, the network, AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, then "
    + AGAIN
)
Advance = Callable[[int], object]  # takes the bytes that have arrived since it was called


@dataclass(frozen=True)
class File:
    """One file of a model: its path below the model's folder, its bytes, and what the source knows of its content."""

    path: str
    size: int
    sha256: str | None = None
    git: str | None = None  # the SHA-1 of git's blob
    version: str = ""  # where there is no sum: changes when the file does


class Source(Protocol):
    """A place that has a model."""

    name: str  # OWNER/NAME, the folder under models/
    revision: str  # what exactly was taken: a commit, or the sum of all sums

    def files(self) -> list[File]:
        """What there is of WANTED."""

    def fetch(self, file: File, stream: BinaryIO, advance: Advance) -> None:
        """Appends to `stream`, which stands at its end, what it lacks of the file. A Problem where that breaks off."""


def open_source(text: str, revision: str | None, token_file: Path | None, at: str | None) -> Source:
    """The source that `text` names: a folder, an address (http, https, s3), or a repository of the hub, or of `at`."""
    folder = Path(text)
    is_address = text.startswith(("http://", "https://", "s3://"))
    if revision and (is_address or folder.is_dir()):
        raise Problem(f"{text} has no revisions: --revision is the hub's", "leave --revision out")
    if folder.is_dir():
        return Folder(folder.resolve())
    if text.startswith("s3://"):
        return S3.from_address(text)
    if is_address:
        # HF_TOKEN_FILE's token is for the hub alone
        return Web(text.rstrip("/"), read_token(token_file) if token_file else None)
    if not is_repository(text):
        raise Problem(f"{text} is neither a folder, an address nor a name like owner/model", "correct it")
    return Hub(text, revision or "main", read_token(token_file), endpoint(at))


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


def _sum_of(files: list[File]) -> str:
    lines = sorted(f"{file.sha256 or file.version} {file.size} {file.path}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _fetch(
    url: str, token: str | None, stream: BinaryIO, advance: Advance, refused: Callable[[int], Problem], fix: str
) -> None:
    """Appends to `stream` what it lacks of a file on the web; a connection that breaks is tried again a few times.

    Not by hf_hub_download: what arrived before a run ended it throws away.
    """
    with reaching(url, fix):
        from huggingface_hub.file_download import http_get  # noqa: PLC0415 - ends where HF_ENDPOINT is no address

        # it warns of each new try, with the whole address
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        try:
            bar = cast(Any, lambda **_: nullcontext(SimpleNamespace(update=advance)))
            http_get(url, stream, resume_size=stream.tell(), headers=headers(token), tqdm_class=bar)
        except huggingface_hub.errors.HfHubHTTPError as error:
            raise refused(error.response.status_code) from error


@dataclass
class Folder:
    """A folder on this host, a USB disk say. Its SHA256SUMS is used where there is one."""

    folder: Path
    name: str = field(init=False)
    revision: str = field(init=False, default="")

    def __post_init__(self) -> None:
        self.name = self.folder.name

    def files(self) -> list[File]:
        found = []
        for path in self.folder.rglob("*"):
            inside = str(path.relative_to(self.folder))
            if wanted(inside) and path.is_file():
                about = path.stat()
                found.append(File(inside, about.st_size, version=str(about.st_mtime_ns)))
        sums = self.folder / SUMS
        if sums.is_file():
            found = with_sums(found, sums.read_bytes(), str(sums))
        self.revision = _sum_of(found)
        return found

    def fetch(self, file: File, stream: BinaryIO, advance: Advance) -> None:
        with (self.folder / file.path).open("rb") as source:
            source.seek(stream.tell())
            while chunk := source.read(CHUNK):
                advance(stream.write(chunk))


@dataclass
class Web:
    """A folder on a web server. Its SHA256SUMS says which files there are."""

    url: str
    token: str | None
    name: str = field(init=False)
    revision: str = field(init=False, default="")

    def __post_init__(self) -> None:
        self.name = self.url.partition("://")[2].partition("/")[2].rsplit("/", 1)[-1]

    def files(self) -> list[File]:
        found = []
        for path, digest in parse_sums(self._ask("GET", SUMS).content, f"{self.url}/{SUMS}").items():
            if wanted(path):
                size = self._ask("HEAD", path).headers.get("content-length", "")
                if not size.isdecimal():
                    raise Problem(f"{self.url}/{path}: the server tells no size", "let it answer HEAD with a length")
                found.append(File(path, int(size), digest))
        self.revision = _sum_of(found)
        return found

    def _ask(self, method: str, path: str) -> "httpx2.Response":
        url = f"{self.url}/{quote(path)}"
        with reaching(url, CHECK_ADDRESS) as client:
            answer = client.request(method, url, headers=headers(self.token), timeout=TIMEOUT)
        if answer.status_code != 200:
            raise self._refused(path, answer.status_code)
        return answer

    def fetch(self, file: File, stream: BinaryIO, advance: Advance) -> None:
        def refused(status: int) -> Problem:
            return self._refused(file.path, status)

        _fetch(f"{self.url}/{quote(file.path)}", self.token, stream, advance, refused, CHECK_ADDRESS)

    def _refused(self, path: str, status: int) -> Problem:
        what = f"{self.url}/{path}: status {status}"
        if status in REFUSED:
            return Problem(what, "name a file with the mirror's token: --token-file FILE")
        return Problem(what, f"put there {SUMS} and each file that it names; {WRITE_SUMS}")


@dataclass
class Hub:
    """A repository on the Hugging Face hub, or on a mirror that speaks its API."""

    name: str
    revision: str
    token: str | None
    endpoint: str

    def files(self) -> list[File]:
        asked = f"{self.endpoint}/api/models/{self.name}/revision/{quote(self.revision, safe='')}"
        with reaching(asked):
            hub = huggingface_hub.HfApi(self.endpoint, token=self.token or False)
            try:
                about: Any = hub.model_info(self.name, revision=self.revision, files_metadata=True, timeout=TIMEOUT)
                # git has large files as a pointer, their content has a SHA-256
                found = [
                    File(one.rfilename, one.size, one.lfs and one.lfs.sha256, None if one.lfs else one.blob_id)
                    for one in about.siblings
                    if wanted(one.rfilename)
                ]
            except huggingface_hub.errors.HfHubHTTPError as error:
                raise self._refused(asked, error.response.status_code) from error
            except huggingface_hub.errors.HFValidationError as error:
                raise Problem(f"{self.name} is no name of a model on the hub: {error}", "correct it") from error
            except (ValueError, TypeError, LookupError, AttributeError) as error:
                raise not_the_hub(asked) from error
        whole = all(isinstance(file.size, int) and (file.sha256 or file.git) for file in found)
        if not whole or not re.fullmatch("[0-9a-f]+", str(about.sha)):
            raise not_the_hub(asked)
        # from here on the commit, so that all files are of one
        self.revision = about.sha
        return found

    def fetch(self, file: File, stream: BinaryIO, advance: Advance) -> None:
        url = f"{self.endpoint}/{self.name}/resolve/{self.revision}/{quote(file.path)}"
        _fetch(url, self.token, stream, advance, lambda status: self._refused(url, status), f"{CHECK}; {AGAIN}")

    def _refused(self, url: str, status: int) -> Problem:
        # of a gated model the hub lists the files for everyone, and refuses them
        if status in REFUSED:
            return gated(self.name)
        return Problem(f"{url}: status {status}", f"correct the name or --revision, or {AGAIN}")


@dataclass
class S3:
    """A prefix of an S3 bucket, at Amazon or at AWS_ENDPOINT_URL, with the keys that boto3 finds. Without any the
    bucket has to be public. Its SHA256SUMS is used where there is one."""

    bucket: str
    prefix: str
    name: str = field(init=False)
    revision: str = field(init=False, default="")

    @staticmethod
    def from_address(text: str) -> "S3":
        bucket, _, folder = text.removeprefix("s3://").partition("/")
        if not bucket or not folder.strip("/"):
            raise Problem(f"{text} names no bucket with a folder", "write it as s3://BUCKET/FOLDER")
        return S3(bucket, folder.strip("/") + "/")

    def __post_init__(self) -> None:
        # takes half a second that other sources need not wait for
        import boto3  # noqa: PLC0415
        from botocore import UNSIGNED, config  # noqa: PLC0415

        self.name = self.prefix.rstrip("/").rsplit("/", 1)[-1]
        with self._reaching(""):
            session = boto3.Session()
            region = os.environ.get("AWS_REGION") or session.region_name or "us-east-1"
            endpoint = os.environ.get("AWS_ENDPOINT_URL")
            options: dict[str, Any] = {"retries": {"mode": "standard"}, "connect_timeout": 10, "read_timeout": 120}
            if not session.get_credentials():
                options["signature_version"] = UNSIGNED
            # an endpoint of one's own rarely has a name for each bucket
            if endpoint:
                options["s3"] = {"addressing_style": "path"}
            host = urlsplit(endpoint).hostname if endpoint else f"{self.bucket}.s3.{region}.amazonaws.com"
            proxies = {} if proxy_bypass(host or "") else getproxies()
            # boto3 does not look at ALL_PROXY
            if proxy := proxies.pop("all", None):
                options["proxies"] = {"http": proxy, "https": proxy} | proxies
            if other := next((one for one in {proxy or "", *proxies.values()} if one.startswith("socks")), None):
                raise unusable_proxy(f"S3 is reached through http:// proxies, not through {other}")
            self._client = session.client("s3", region_name=region, config=config.Config(**options))

    def files(self) -> list[File]:
        with self._reaching(""):
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self.prefix)
            listed = [
                File(row["Key"].removeprefix(self.prefix), row["Size"], version=row["ETag"])
                for page in pages
                for row in page.get("Contents", ())
            ]
        if not listed:
            raise Problem(f"s3://{self.bucket}/{self.prefix} is empty, or no S3 answers", CHECK_S3)
        found = [file for file in listed if wanted(file.path)]
        if sums := next((file for file in listed if file.path == SUMS), None):
            content = BytesIO()
            self.fetch(sums, content, lambda _: None)
            found = with_sums(found, content.getvalue(), f"s3://{self.bucket}/{self.prefix}{SUMS}")
        self.revision = _sum_of(found)
        return found

    def fetch(self, file: File, stream: BinaryIO, advance: Advance) -> None:
        with self._reaching(file.path):
            # an object that was replaced since it was listed is refused
            answer = self._client.get_object(
                Bucket=self.bucket,
                Key=self.prefix + file.path,
                IfMatch=file.version,
                **({"Range": f"bytes={stream.tell()}-"} if stream.tell() else {}),
            )
            for chunk in answer["Body"].iter_chunks(CHUNK):
                advance(stream.write(chunk))

    @contextmanager
    def _reaching(self, path: str) -> Iterator[None]:
        """Turns boto3's errors on the way to an object into Problems."""
        from botocore import exceptions  # noqa: PLC0415 - as above

        where = f"s3://{self.bucket}/{self.prefix}{path}"
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
