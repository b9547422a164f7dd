"""Where a model can be brought from: the hub, a folder, or an HTTP or S3 mirror.

Each source lists its files with their size and SHA-256 and gives a file's bytes from an offset, so that a download can
be resumed and checked whatever it came from."""

import hashlib
import hmac
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import Protocol
from urllib.parse import quote, urlsplit
from xml.etree import ElementTree

import httpx

from stack.console import Problem

SUMS = "SHA256SUMS"
CHUNK = 1 << 20
# What vLLM loads; a repository's other formats of the same weights stay where they are.
WANTED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py", SUMS)
TIMEOUT = httpx.Timeout(30, read=120)


@dataclass(frozen=True)
class File:
    """One file of a model: its path below the model's folder, bytes, and SHA-256 where the source knows it."""

    path: str
    size: int
    sha256: str | None = None


class Source(Protocol):
    """A place that has a model."""

    name: str  # OWNER/NAME, the folder under models/
    revision: str  # what exactly was taken: a commit, or the sum of all sums

    def files(self) -> list[File]:
        """What there is of WANTED."""

    def read(self, file: File, offset: int) -> Iterator[bytes]:
        """The file's bytes from `offset`."""


def open_source(text: str, revision: str | None, token: str | None, endpoint: str) -> Source:
    """The source that `text` names: a folder, an http(s):// or s3:// address, or a repository of the hub `endpoint`."""
    if Path(text).is_dir():
        return Folder(Path(text).resolve())
    if text.startswith(("http://", "https://")):
        return Http(text.rstrip("/"), token)
    if text.startswith("s3://"):
        return S3.from_address(text)
    if text.count("/") != 1 or text.startswith((".", "/")):
        raise Problem(f"{text} is neither a folder, an address nor a name like owner/model", "correct it")
    return Hub(text, revision or "main", token, endpoint.rstrip("/"))


def wanted(path: str) -> bool:
    """Whether vLLM needs the file. A path that leads out of the model's folder is never wanted."""
    inside = not path.startswith("/") and ".." not in Path(path).parts
    return inside and any(fnmatch(Path(path).name, pattern) for pattern in WANTED)


def parse_sums(text: str, where: str) -> dict[str, str]:
    """The lines of `sha256sum`: SHA-256 by path."""
    sums = {}
    for line in text.splitlines():
        digest, _, path = line.partition(" ")
        if len(digest) != 64 or not path.strip(" *"):
            raise Problem(f"{where} is not what sha256sum writes: {line[:60]}", f"write it with: sha256sum * > {SUMS}")
        sums[path.strip(" *").removeprefix("./")] = digest
    return sums


def _sum_of(files: list[File]) -> str:
    text = "".join(f"{file.sha256 or file.size} {file.path}\n" for file in sorted(files, key=lambda one: one.path))
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass
class Folder:
    """A folder on this host, a USB disk say. Its SHA256SUMS is used where there is one."""

    folder: Path
    name: str = field(init=False)
    revision: str = field(init=False, default="")

    def __post_init__(self) -> None:
        self.name = self.folder.name

    def files(self) -> list[File]:
        sums_file = self.folder / SUMS
        sums = parse_sums(sums_file.read_text(), str(sums_file)) if sums_file.is_file() else {}
        paths = {str(path.relative_to(self.folder)): path for path in self.folder.rglob("*") if path.is_file()}
        found = [File(path, file.stat().st_size, sums.get(path)) for path, file in paths.items() if wanted(path)]
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
        self.name = urlsplit(self.url).path.rsplit("/", 1)[-1]
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        self._client = httpx.Client(headers=headers, timeout=TIMEOUT, follow_redirects=True)

    def files(self) -> list[File]:
        try:
            answer = self._client.get(f"{self.url}/{SUMS}")
        except httpx.HTTPError as error:
            raise Problem(f"{self.url} does not answer: {error}", "check the address and the network") from error
        if answer.status_code != httpx.codes.OK:
            raise Problem(
                f"{self.url}/{SUMS}: status {answer.status_code}",
                f"the mirror's folder needs one, written with: sha256sum * > {SUMS}",
            )
        found = []
        for path, digest in parse_sums(answer.text, f"{self.url}/{SUMS}").items():
            if wanted(path):
                head = self._client.head(f"{self.url}/{quote(path)}")
                if head.status_code != httpx.codes.OK:
                    raise Problem(f"{self.url}/{path}: status {head.status_code}", f"{SUMS} names it: put it there")
                found.append(File(path, int(head.headers["content-length"]), digest))
        self.revision = _sum_of(found)
        return found

    def read(self, file: File, offset: int) -> Iterator[bytes]:
        yield from _stream(self._client, f"{self.url}/{quote(file.path)}", offset, {})


@dataclass
class Hub:
    """A repository on the Hugging Face hub, or on a mirror that speaks its API."""

    name: str
    revision: str
    token: str | None
    endpoint: str

    def __post_init__(self) -> None:
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        self._client = httpx.Client(headers=headers, timeout=TIMEOUT, follow_redirects=True)

    def files(self) -> list[File]:
        asked = f"{self.endpoint}/api/models/{self.name}/revision/{quote(self.revision, safe='')}?blobs=true"
        try:
            answer = self._client.get(asked)
        except httpx.HTTPError as error:
            raise Problem(
                f"{self.endpoint} does not answer: {error}", "name a mirror with --endpoint, or give a folder"
            ) from error
        if answer.status_code in (401, 403):
            raise Problem(
                f"{self.name} is gated or private",
                "accept its terms on the hub and give --token-file FILE with your token in it",
            )
        if answer.status_code != httpx.codes.OK:
            raise Problem(f"{self.name} at revision {self.revision}: status {answer.status_code}", "correct the name")
        about = answer.json()
        # from here on the commit, so that all files are of one
        self.revision = about["sha"]
        files = [
            File(one["rfilename"], one.get("size") or 0, (one.get("lfs") or {}).get("sha256"))
            for one in about["siblings"]
            if wanted(one["rfilename"])
        ]
        if any(file.path.endswith(".safetensors") for file in files):
            return files
        raise Problem(f"{self.name} has no safetensors weights", "choose a repository that has")

    def read(self, file: File, offset: int) -> Iterator[bytes]:
        url = f"{self.endpoint}/{self.name}/resolve/{self.revision}/{quote(file.path)}"
        yield from _stream(self._client, url, offset, {})


def _stream(client: httpx.Client, url: str, offset: int, headers: dict[str, str]) -> Iterator[bytes]:
    """A file's bytes from `offset`; where the server knows no ranges, the first bytes are skipped."""
    if offset:
        headers = headers | {"Range": f"bytes={offset}-"}
    # compressed on the way, offsets would mean something else
    with client.stream("GET", url, headers={"Accept-Encoding": "identity", **headers}) as answer:
        if answer.status_code not in (200, 206):
            raise Problem(f"{url}: status {answer.status_code}", "check the address, then run this again: it goes on")
        skip = offset if answer.status_code == httpx.codes.OK else 0
        for chunk in answer.iter_raw(CHUNK):
            if skip >= len(chunk):
                skip -= len(chunk)
            else:
                yield chunk[skip:]
                skip = 0


@dataclass
class S3:
    """A prefix of an S3 bucket, at Amazon or at AWS_ENDPOINT_URL. Keys from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY
    (and AWS_SESSION_TOKEN); without them the bucket has to be public."""

    bucket: str
    prefix: str
    name: str = field(init=False)
    revision: str = field(init=False, default="")

    @staticmethod
    def from_address(text: str) -> "S3":
        parts = urlsplit(text)
        if not parts.netloc or not parts.path.strip("/"):
            raise Problem(f"{text} names no bucket with a folder", "write it as s3://BUCKET/FOLDER")
        return S3(parts.netloc, parts.path.strip("/") + "/")

    def __post_init__(self) -> None:
        self.name = self.prefix.rstrip("/").rsplit("/", 1)[-1]
        self._region = os.environ.get("AWS_REGION", "us-east-1")
        endpoint = os.environ.get("AWS_ENDPOINT_URL")
        # an endpoint of one's own rarely has a name for each bucket
        amazon = f"https://{self.bucket}.s3.{self._region}.amazonaws.com"
        self._base = f"{endpoint.rstrip('/')}/{self.bucket}" if endpoint else amazon
        self._client = httpx.Client(timeout=TIMEOUT)

    def files(self) -> list[File]:
        sums: dict[str, str] = {}
        found: list[File] = []
        more = ""
        while True:
            query = {"list-type": "2", "prefix": self.prefix}
            if more:
                query["continuation-token"] = more
            text = "&".join(f"{key}={quote(value, safe='')}" for key, value in sorted(query.items()))
            try:
                answer = self._client.get(f"{self._base}/?{text}", headers=self._signed("/", text))
            except httpx.HTTPError as error:
                raise Problem(
                    f"{self._base} does not answer: {error}", "check AWS_ENDPOINT_URL and AWS_REGION"
                ) from error
            if answer.status_code != httpx.codes.OK:
                raise Problem(
                    f"s3://{self.bucket}/{self.prefix}: status {answer.status_code}",
                    "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_REGION",
                )
            page = ElementTree.fromstring(answer.content)  # noqa: S314 - of the user's own storage
            space = page.tag.partition("}")[0] + "}" if page.tag.startswith("{") else ""
            for one in page.iter(f"{space}Contents"):
                path = (one.findtext(f"{space}Key") or "").removeprefix(self.prefix)
                if wanted(path):
                    found.append(File(path, int(one.findtext(f"{space}Size") or 0)))
            more = page.findtext(f"{space}NextContinuationToken") or ""
            if not more:
                break
        if any(file.path == SUMS for file in found):
            content = b"".join(self.read(File(SUMS, 0), 0)).decode()
            sums = parse_sums(content, f"s3://{self.bucket}/{self.prefix}{SUMS}")
        found = [File(file.path, file.size, sums.get(file.path)) for file in found]
        self.revision = _sum_of(found)
        return found

    def read(self, file: File, offset: int) -> Iterator[bytes]:
        path = "/" + quote(self.prefix + file.path)
        extra = {"range": f"bytes={offset}-"} if offset else {}
        yield from _stream(self._client, self._base + path, 0, self._signed(path, "", extra))

    def _signed(self, path: str, query: str, extra: dict[str, str] | None = None) -> dict[str, str]:
        key, secret = os.environ.get("AWS_ACCESS_KEY_ID"), os.environ.get("AWS_SECRET_ACCESS_KEY")
        if not key or not secret:
            return extra or {}
        base = urlsplit(self._base)
        headers = {"host": base.netloc, **(extra or {})}
        if token := os.environ.get("AWS_SESSION_TOKEN"):
            headers["x-amz-security-token"] = token
        return sign_s3(base.path + path, query, headers, key, secret, self._region, datetime.now(UTC))


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
