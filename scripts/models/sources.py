"""Where a model can be brought from: the hub, a folder, or an HTTP or S3 mirror.

Each source lists its files with their size and what it knows of their content, and gives a file's bytes from an offset,
so that a download can be resumed and checked whatever it came from. Where a source does not answer, httpx's errors
come through."""

import hashlib
import hmac
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Protocol
from urllib.parse import quote
from xml.etree import ElementTree

import httpx
from pydantic import BaseModel, Field, ValidationError

from models.hub import client, gated, is_repository, not_the_hub, read_token
from stack.console import Problem

SUMS = "SHA256SUMS"
WRITE_SUMS = f"write it with: find . -type f ! -name {SUMS} -exec sha256sum {{}} + > {SUMS}"
CHUNK = 1 << 20
# What vLLM loads; of weights in both formats, the first.
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
WANTED = (*WEIGHTS, "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py")
TIMEOUT = httpx.Timeout(30, connect=10, read=120)
# compressed on the way, sizes and offsets would mean something else
PLAIN = {"Accept-Encoding": "identity"}
REFUSED = (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN)


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

    def read(self, file: File, offset: int) -> Iterator[bytes]:
        """The file's bytes from `offset`."""


def open_source(text: str, revision: str | None, token_file: Path | None, endpoint: str) -> Source:
    """The source that `text` names: a folder, an http(s):// or s3:// address, or a repository of the hub `endpoint`."""
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
        return Http(text.rstrip("/"), read_token(token_file) if token_file else None)
    if not is_repository(text):
        raise Problem(f"{text} is neither a folder, an address nor a name like owner/model", "correct it")
    return Hub(text, revision or "main", read_token(token_file), endpoint.rstrip("/"))


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


def _client(token: str | None) -> httpx.Client:
    headers = PLAIN | ({"Authorization": f"Bearer {token}"} if token else {})
    return client(headers=headers, timeout=TIMEOUT, follow_redirects=True)


def _stream(
    client: httpx.Client,
    url: str,
    offset: int,
    refused: Callable[[int], Problem],
    headers: dict[str, str] | None = None,
) -> Iterator[bytes]:
    """A file's bytes from `offset`; where the server knows no ranges, the first bytes are skipped."""
    asked = {**(headers or {}), **({"Range": f"bytes={offset}-"} if offset else {})}
    with client.stream("GET", url, headers=asked) as answer:
        if answer.status_code not in (httpx.codes.OK, httpx.codes.PARTIAL_CONTENT):
            raise refused(answer.status_code)
        skip = offset if answer.status_code == httpx.codes.OK else 0
        for chunk in answer.iter_raw(CHUNK):
            if skip >= len(chunk):
                skip -= len(chunk)
            else:
                yield chunk[skip:]
                skip = 0


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

    def read(self, file: File, offset: int) -> Iterator[bytes]:
        with (self.folder / file.path).open("rb") as stream:
            stream.seek(offset)
            while chunk := stream.read(CHUNK):
                yield chunk


@dataclass
class Http:
    """A folder on a web server. Its SHA256SUMS says which files there are."""

    url: str
    token: str | None
    name: str = field(init=False)
    revision: str = field(init=False, default="")

    def __post_init__(self) -> None:
        self.name = httpx.URL(self.url).path.rsplit("/", 1)[-1]
        self._client = _client(self.token)

    def files(self) -> list[File]:
        sums = b"".join(self.read(File(SUMS, 0), 0))
        found = []
        for path, digest in parse_sums(sums, f"{self.url}/{SUMS}").items():
            if wanted(path):
                head = self._client.head(f"{self.url}/{quote(path)}")
                if head.status_code != httpx.codes.OK:
                    raise self._refused(path, head.status_code)
                size = head.headers.get("content-length", "")
                if not size.isdecimal():
                    raise Problem(f"{self.url}/{path}: the server tells no size", "let it answer HEAD with a length")
                found.append(File(path, int(size), digest))
        self.revision = _sum_of(found)
        return found

    def read(self, file: File, offset: int) -> Iterator[bytes]:
        url = f"{self.url}/{quote(file.path)}"
        yield from _stream(self._client, url, offset, lambda status: self._refused(file.path, status))

    def _refused(self, path: str, status: int) -> Problem:
        what = f"{self.url}/{path}: status {status}"
        if status in REFUSED:
            return Problem(what, "name a file with the mirror's token: --token-file FILE")
        return Problem(what, f"put there {SUMS} and each file that it names; {WRITE_SUMS}")


class _Lfs(BaseModel):
    sha256: str


class _Sibling(BaseModel):
    rfilename: str
    size: int
    blobId: str  # noqa: N815 - the hub's name
    lfs: _Lfs | None = None


class _About(BaseModel):
    sha: str = Field(pattern="^[0-9a-f]+$")
    siblings: list[_Sibling]


@dataclass
class Hub:
    """A repository on the Hugging Face hub, or on a mirror that speaks its API."""

    name: str
    revision: str
    token: str | None
    endpoint: str

    def __post_init__(self) -> None:
        self._client = _client(self.token)

    def files(self) -> list[File]:
        asked = f"{self.endpoint}/api/models/{self.name}/revision/{quote(self.revision, safe='')}?blobs=true"
        answer = self._client.get(asked)
        if answer.status_code != httpx.codes.OK:
            raise self._refused(asked, answer.status_code)
        try:
            about = _About.model_validate_json(answer.content)
        except ValidationError as error:
            raise not_the_hub(asked) from error
        # from here on the commit, so that all files are of one
        self.revision = about.sha
        return [
            # git has large files as a pointer, their content has a SHA-256
            File(one.rfilename, one.size, one.lfs.sha256) if one.lfs else File(one.rfilename, one.size, git=one.blobId)
            for one in about.siblings
            if wanted(one.rfilename)
        ]

    def read(self, file: File, offset: int) -> Iterator[bytes]:
        url = f"{self.endpoint}/{self.name}/resolve/{self.revision}/{quote(file.path)}"
        yield from _stream(self._client, url, offset, lambda status: self._refused(url, status))

    def _refused(self, url: str, status: int) -> Problem:
        # of a gated model the hub lists the files for everyone, and refuses them
        if status in REFUSED:
            return gated(self.name)
        return Problem(f"{url}: status {status}", "correct the name or --revision, or try again later")


@dataclass
class S3:
    """A prefix of an S3 bucket, at Amazon or at AWS_ENDPOINT_URL. Keys from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY
    (and AWS_SESSION_TOKEN); without them the bucket has to be public. Its SHA256SUMS is used where there is one."""

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
        self.name = self.prefix.rstrip("/").rsplit("/", 1)[-1]
        self._region = os.environ.get("AWS_REGION", "us-east-1")
        endpoint = os.environ.get("AWS_ENDPOINT_URL")
        # an endpoint of one's own rarely has a name for each bucket
        amazon = f"https://{self.bucket}.s3.{self._region}.amazonaws.com"
        self._base = f"{endpoint.rstrip('/')}/{self.bucket}" if endpoint else amazon
        self._client = client(headers=PLAIN, timeout=TIMEOUT)

    def files(self) -> list[File]:
        found: list[File] = []
        sums = None
        more = ""
        while True:
            query = {"list-type": "2", "prefix": self.prefix}
            if more:
                query["continuation-token"] = more
            text = "&".join(f"{key}={quote(value, safe='')}" for key, value in sorted(query.items()))
            answer = self._client.get(f"{self._base}/?{text}", headers=self._signed("/", text))
            if answer.status_code != httpx.codes.OK:
                raise self._refused("", answer.status_code)
            try:
                page = ElementTree.fromstring(answer.content)  # noqa: S314 - of the user's own storage
                listed = [self._listed(one) for one in page.iterfind("{*}Contents")]
            except (ElementTree.ParseError, ValueError) as error:
                raise Problem(
                    f"{self._base} answers something else than S3 does", "correct AWS_ENDPOINT_URL"
                ) from error
            found += [file for file in listed if wanted(file.path)]
            sums = next((file for file in listed if file.path == SUMS), sums)
            more = page.findtext("{*}NextContinuationToken") or ""
            if not more:
                break
        if sums:
            found = with_sums(found, b"".join(self.read(sums, 0)), f"s3://{self.bucket}/{self.prefix}{SUMS}")
        self.revision = _sum_of(found)
        return found

    def _listed(self, row: ElementTree.Element) -> File:
        path = row.findtext("{*}Key", "").removeprefix(self.prefix)
        return File(path, int(row.findtext("{*}Size", "")), version=row.findtext("{*}ETag", ""))

    def read(self, file: File, offset: int) -> Iterator[bytes]:
        path = "/" + quote(self.prefix + file.path)
        # an object that was replaced since it was listed is refused
        headers = self._signed(path, "") | ({"If-Match": file.version} if file.version else {})
        yield from _stream(
            self._client, self._base + path, offset, lambda status: self._refused(file.path, status), headers
        )

    def _refused(self, path: str, status: int) -> Problem:
        what = f"s3://{self.bucket}/{self.prefix}{path}: status {status}"
        if status == httpx.codes.PRECONDITION_FAILED:
            return Problem(f"{what}, it has changed meanwhile", "run this again: it begins anew")
        return Problem(
            what,
            "check the address, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION and AWS_ENDPOINT_URL",
        )

    def _signed(self, path: str, query: str) -> dict[str, str]:
        key, secret = os.environ.get("AWS_ACCESS_KEY_ID"), os.environ.get("AWS_SECRET_ACCESS_KEY")
        if not key or not secret:
            return {}
        base = httpx.URL(self._base)
        headers = {"host": base.netloc.decode()}
        if token := os.environ.get("AWS_SESSION_TOKEN"):
            headers["x-amz-security-token"] = token
        # at the root of a bucket's own host there is no path
        return sign_s3(base.path.rstrip("/") + path, query, headers, key, secret, self._region, datetime.now(UTC))


EMPTY = hashlib.sha256(b"").hexdigest()


def sign_s3(
    path: str, query: str, headers: dict[str, str], key: str, secret: str, region: str, now: datetime
) -> dict[str, str]:
    """The headers of a GET with those of AWS Signature Version 4. `headers` has lower-case names, `host` among them."""
    stamp, day = f"{now:%Y%m%dT%H%M%SZ}", f"{now:%Y%m%d}"
    every = headers | {"x-amz-content-sha256": EMPTY, "x-amz-date": stamp}
    names = ";".join(sorted(every))
    lines = "".join(f"{name}:{every[name]}\n" for name in sorted(every))
    canonical = f"GET\n{path}\n{query}\n{lines}\n{names}\n{EMPTY}"
    scope = f"{day}/{region}/s3/aws4_request"
    text = f"AWS4-HMAC-SHA256\n{stamp}\n{scope}\n{hashlib.sha256(canonical.encode()).hexdigest()}"
    signing = f"AWS4{secret}".encode()
    for part in (day, region, "s3", "aws4_request"):
        signing = hmac.digest(signing, part.encode(), "sha256")
    signature = hmac.digest(signing, text.encode(), "sha256").hex()
    authorization = f"AWS4-HMAC-SHA256 Credential={key}/{scope},SignedHeaders={names},Signature={signature}"
    return every | {"authorization": authorization}
