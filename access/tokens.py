"""JSON web tokens: what signs them, who takes them, and both done here for fronts in Python.

secrets/tokens/signing.json holds the keys that sign, for the token service alone. secrets/gateway/tokens.json says
whose tokens the gateway takes: this fleet's, by the public half of those keys (HS256 has no such half), and those of
identity providers elsewhere. Each key is for one algorithm, and a token only names its key: nothing in it chooses how
it is checked.
"""

from __future__ import annotations

import base64
import math
import re
import secrets as random
import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm
from pydantic import AfterValidator, Field, StringConstraints, model_validator

from access import audit
from access.keys import Role, Seconds
from access.store import Mistake, Secrets, Strict, made, read

ISSUER = AUDIENCE = "vllm-fleet"
Algorithm = Literal["HS256", "RS256", "ES256", "EdDSA"]
KINDS: dict[str, Algorithm] = {"oct": "HS256", "RSA": "RS256", "EC": "ES256", "OKP": "EdDSA"}
CURVES = {"EC": "P-256", "OKP": "Ed25519"}
# The members of a JSON web key (RFC 7517, 7518, 8037) by its kind: what everybody may know, and what only the signer.
PUBLIC = {"oct": set[str](), "RSA": {"n", "e"}, "EC": {"crv", "x", "y"}, "OKP": {"crv", "x"}}
PRIVATE = {"oct": {"k"}, "RSA": {"d", "p", "q", "dp", "dq", "qi"}, "EC": {"d"}, "OKP": {"d"}}
COMMON = {"kty", "kid", "alg", "use", "key_ops", "until", "x5c", "x5t", "x5t#S256", "x5u"}
# The gateway learns of a new key within two seconds; the service signs with it a little later.
SETTLED_S = 3
SHORTEST_KEY_BYTES = 32
SMALLEST_RSA_BITS = 2048
# A rotation keeps the old key in force for a while; these are the most at once.
MAX_KEYS = 8

Jwk = dict[str, Any]


def checked_jwk(jwk: Jwk) -> Jwk:
    """A key that some algorithm here can use, for that alone. A ValueError says what is wrong with it."""
    kind = str(jwk.get("kty"))
    if kind not in KINDS:
        raise ValueError(f"kty is {', '.join(KINDS)}")
    if unknown := sorted(jwk.keys() - COMMON - PUBLIC[kind] - PRIVATE[kind]):
        raise ValueError(f"unknown field {unknown[0]}")
    if jwk.get("alg", KINDS[kind]) != KINDS[kind]:
        raise ValueError(f"a key of kind {kind} is for {KINDS[kind]}")
    if jwk.get("crv") != CURVES.get(kind):
        raise ValueError(f"crv of {kind} is {CURVES.get(kind)}")
    if type(jwk.get("until", 0)) is not int:
        raise ValueError("until is a number of seconds")
    if type(jwk.get("kid", "")) is not str:
        raise ValueError("kid is a text")
    try:
        key = jwt.PyJWK(jwk, algorithm=KINDS[kind]).key
    except (jwt.PyJWTError, LookupError, ValueError, TypeError):
        raise ValueError(f"it is no key of kind {kind}") from None
    if kind == "RSA" and key.key_size < SMALLEST_RSA_BITS:
        raise ValueError(f"it has {key.key_size} bits, less than {SMALLEST_RSA_BITS}")
    if kind == "oct" and len(key) < SHORTEST_KEY_BYTES:
        raise ValueError(f"it has {len(key)} bytes, less than {SHORTEST_KEY_BYTES}")
    return jwk


def without_private(jwk: Jwk) -> Jwk:
    """A key that others may see, which one of kind oct is not."""
    if jwk.get("kty") != "oct" and (private := sorted(jwk.keys() & PRIVATE.get(str(jwk.get("kty")), set()))):
        raise ValueError(f"{private[0]} is of a private key; the gateway needs the public one")
    return jwk


Text = Annotated[str, StringConstraints(min_length=1, max_length=2000)]


def secure_address(address: str) -> str:
    """An address whose answer nobody on the way can change: by https, or of this host or a container beside."""
    parts = urlsplit(address)
    near = re.fullmatch(r"localhost|127\.[\d.]+|::1|[a-z0-9_-]+", parts.hostname or "")
    right = parts.scheme == "https" or (parts.scheme == "http" and near)
    if not right or not parts.hostname or not parts.path or parts.username or parts.fragment:
        raise ValueError("it has to be https://HOST/PATH")
    return address


def usable_keys(jwks: list[Any], algorithms: list[str]) -> list[Jwk]:
    """Those keys of a provider's JWKS that check signatures by these algorithms, without what is not needed for it."""
    kept = []
    for jwk in jwks:
        kind = str(jwk.get("kty")) if isinstance(jwk, dict) else ""
        algorithm = KINDS.get(kind)
        if algorithm not in algorithms or jwk.get("use", "sig") != "sig" or jwk.get("alg", algorithm) != algorithm:
            continue
        if kind not in CURVES or jwk.get("crv") == CURVES[kind]:
            kept.append({name: jwk[name] for name in ("kty", "kid", "alg", "use", *PUBLIC[kind]) if name in jwk})
    return kept


class Issuer(Strict):
    """Whose tokens the gateway takes, and how it checks them."""

    issuer: Text
    audience: Text
    algorithms: Annotated[list[Algorithm], Field(min_length=1, max_length=4)]
    keys: Annotated[
        list[Annotated[Jwk, AfterValidator(checked_jwk), AfterValidator(without_private)]], Field(max_length=32)
    ] = Field(default_factory=list)
    jwks_uri: Annotated[str, StringConstraints(max_length=2000), AfterValidator(secure_address)] | None = None
    name_claim: Text = "sub"
    role_claim: Text = "role"

    @model_validator(mode="after")
    def _can_check(self) -> Issuer:
        if not self.keys and self.jwks_uri is None:
            raise ValueError(f"{self.issuer} has neither keys nor an address of keys")
        if self.jwks_uri is not None and "HS256" in self.algorithms:
            raise ValueError(f"{self.issuer}: HS256 has no public key that an address could give")
        for key in self.keys:
            if KINDS[key["kty"]] not in self.algorithms:
                raise ValueError(
                    f"{self.issuer}: there is a key for {KINDS[key['kty']]}, which is not among algorithms"
                )
        return self


class Issuers(Strict):
    """The whole of tokens.json."""

    version: Literal[1] = 1
    issuers: Annotated[list[Issuer], Field(max_length=16)] = Field(default_factory=list)

    @model_validator(mode="after")
    def _told_apart(self) -> Issuers:
        if len({one.issuer for one in self.issuers}) < len(self.issuers):
            raise ValueError("two issuers have the same name")
        return self


class SigningKey(Strict):
    """A key that signs, and until when what it signed is taken."""

    jwk: Annotated[Jwk, AfterValidator(checked_jwk)]
    created: Seconds
    until: Seconds | None = None
    source: Literal["command", "environment"] = "command"

    @property
    def algorithm(self) -> Algorithm:
        """What it is for."""
        return KINDS[self.jwk["kty"]]

    def in_force(self, now: float) -> bool:
        """Whether tokens that it signed are taken."""
        return self.until is None or now < self.until

    def public(self) -> Jwk:
        """The key for whoever checks tokens."""
        kind = self.jwk["kty"]
        hidden = set() if kind == "oct" else PRIVATE[kind]
        shown = {name: value for name, value in self.jwk.items() if name not in hidden}
        return shown if self.until is None else shown | {"until": self.until}


class Signing(Strict):
    """The whole of signing.json. The newest key comes first."""

    version: Literal[1] = 1
    # how long a token works
    minutes: Annotated[int, Field(ge=1, le=1440)] = 30
    keys: Annotated[list[SigningKey], Field(max_length=MAX_KEYS)] = Field(default_factory=list)


class Claims(Strict):
    """Whom a token is for."""

    name: str
    role: Role
    id: str


class Refused(Exception):
    """A token that is not taken; `expired` where it once was. The reason holds nothing of the token."""

    def __init__(self, reason: str, *, expired: bool = False) -> None:
        super().__init__(reason)
        self.expired = expired


def issue(signing: Signing, name: str, role: Role, now: float) -> str:
    """A token for a user, by the newest key that the gateway has had time to learn. LookupError where there is none."""
    usable = [key for key in signing.keys if key.in_force(now)]
    settled = [key for key in usable if key.created + SETTLED_S <= now]
    # where it can know none of them, the oldest
    key = settled[0] if settled else usable[-1]
    begin = int(now)
    claims: dict[str, Any] = {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "sub": name,
        "role": role,
        "jti": random.token_urlsafe(12),
    }
    claims |= {"iat": begin, "nbf": begin, "exp": begin + 60 * signing.minutes}
    secret = jwt.PyJWK(key.jwk, algorithm=key.algorithm).key
    return jwt.encode(claims, secret, algorithm=key.algorithm, headers={"kid": key.jwk["kid"]})


def verify(signing: Signing, token: str) -> Claims:
    """Whom a token of this fleet is for. Refused where it is not to be taken."""
    now = time.time()
    try:
        named = jwt.get_unverified_header(token).get("kid")
    except jwt.PyJWTError:
        raise Refused("it is no token") from None
    key = next((key for key in signing.keys if key.jwk["kid"] == named and key.in_force(now)), None)
    if key is None:
        raise Refused("no key in force signed it")
    try:
        claims = jwt.decode(
            token,
            jwt.PyJWK(key.public(), algorithm=key.algorithm),
            algorithms=[key.algorithm],
            audience=AUDIENCE,
            issuer=ISSUER,
            options={"require": ["exp", "nbf", "iat", "aud", "iss", "sub"]},
        )
        return Claims(name=claims["sub"], role=claims["role"], id=claims["jti"])
    except jwt.ExpiredSignatureError:
        raise Refused("it has expired", expired=True) from None
    except (jwt.PyJWTError, KeyError, ValueError) as error:
        raise Refused(type(error).__name__) from None


# Keys that stand in tutorials, or parts of them. The number is that of FastAPI's.
KNOWN = (
    *("secret", "password", "changeme", "change-me", "change_me", "change-this", "example", "default", "insecure"),
    *("your-256-bit", "your_256_bit", "jwt_key", "jwt-key", "09d25e094faa6ca2556c818166b7a956"),
)
LEAST_BITS = 128


def bits(text: str) -> float:
    """An upper bound of a text's entropy: by how often each character comes, and each step from one to the next."""

    def of(parts: list[Any]) -> float:
        counts = Counter(parts).values()
        return -sum(count * math.log2(count / len(parts)) for count in counts)

    steps = [ord(b) - ord(a) for a, b in pairwise(text)]
    return min(of(list(text)), of(steps)) if steps else 0.0


def strong(key: str) -> str:
    """A signing key that nobody can guess. A Mistake says why it is weak, without showing it."""
    fix = "make one: openssl rand -base64 32"
    if len(key.encode()) < SHORTEST_KEY_BYTES:
        raise Mistake(f"JWT_KEY has {len(key.encode())} bytes, less than {SHORTEST_KEY_BYTES}", fix)
    if any(known in key.lower() for known in KNOWN):
        raise Mistake("JWT_KEY stands in examples that everybody knows", fix)
    if bits(key) < LEAST_BITS:
        raise Mistake(f"JWT_KEY has less than {LEAST_BITS} bits of chance in it", fix)
    return key


def new_jwk(algorithm: Algorithm) -> Jwk:
    """A new key for an algorithm, with its private half."""
    match algorithm:
        case "HS256":
            return from_text(random.token_urlsafe(32))
        case "RS256":
            made_jwk = RSAAlgorithm.to_jwk(rsa.generate_private_key(65537, 3072), as_dict=True)
        case "ES256":
            made_jwk = ECAlgorithm.to_jwk(ec.generate_private_key(ec.SECP256R1()), as_dict=True)
        case "EdDSA":
            made_jwk = OKPAlgorithm.to_jwk(ed25519.Ed25519PrivateKey.generate(), as_dict=True)
    return named(made_jwk, algorithm)


def from_text(key: str) -> Jwk:
    """The key of HS256 that a text is."""
    encoded = base64.urlsafe_b64encode(key.encode()).rstrip(b"=").decode()
    return named({"kty": "oct", "k": encoded}, "HS256")


def named(jwk: Jwk, algorithm: Algorithm) -> Jwk:
    """A key with a name of its own, for signatures by one algorithm."""
    rest = {name: value for name, value in jwk.items() if name != "key_ops"}
    return rest | {"kid": random.token_hex(8), "alg": algorithm, "use": "sig"}


class TokenStore:
    """What signs, and whose tokens the gateway takes, in the folder `secrets`."""

    def __init__(self, secrets: Secrets, clock: Callable[[], float] = time.time) -> None:
        self._secrets = secrets
        self._clock = clock

    def signing(self) -> Signing:
        """What signs; nothing where there is no file yet."""
        return read(self._secrets.signing, Signing) or Signing()

    def issuers(self) -> Issuers:
        """Whose tokens the gateway takes; nobody's where there is no file yet."""
        return read(self._secrets.issuers, Issuers) or Issuers()

    def take(self, key: str | None, minutes: int) -> None:
        """Signs with the text `key` (JWT_KEY), or with a key of its own where there is none, tokens of `minutes`.

        Another key is a rotation: what the old one signed is taken until it expires. A Mistake where `key` is weak.
        """
        with self._secrets.locked():
            signing = self.signing()
            first = next((one for one in signing.keys if one.in_force(self._clock())), None)
            wanted = from_text(strong(key)) if key else None
            if wanted:
                right = first is not None and first.jwk.get("k") == wanted["k"]
            else:
                right = first is not None and first.source == "command"
            if not right:
                source: Literal["command", "environment"] = "environment" if wanted else "command"
                self._put_first(signing, wanted or new_jwk("ES256"), source, 60 * max(minutes, signing.minutes))
            if signing.minutes != minutes:
                before, signing.minutes = signing.minutes, minutes
                self._commit(signing, "tokens.minutes", before=before, after=minutes)
            if own(signing) not in self.issuers().issuers:
                # the machine stopped between the two files, or one was put back
                self._commit(signing, "tokens.mend")

    def rotate(self, algorithm: Algorithm, overlap_s: int | None = None) -> None:
        """Signs with a new key. What the old ones signed is taken for `overlap_s` seconds, or as long as it works."""
        with self._secrets.locked():
            signing = self.signing()
            if any(key.source == "environment" and key.until is None for key in signing.keys):
                raise Mistake("JWT_KEY is what signs", "set another JWT_KEY, or take it out, and run `make up`")
            self._put_first(signing, new_jwk(algorithm), "command", overlap_s)

    def trust(self, issuer: Issuer) -> None:
        """Takes an identity provider's tokens as well."""
        if issuer.issuer == ISSUER:
            raise Mistake(f"{ISSUER} is this fleet itself", "name the identity provider's issuer, an https address")
        with self._secrets.locked():
            issuers = self.issuers()
            issuers.issuers = [*(one for one in issuers.issuers if one.issuer != issuer.issuer), issuer]
            shown = issuer.model_dump(exclude={"keys", "issuer"})
            audit.commit(self._secrets, {self._secrets.issuers: issuers}, "issuer.trust", issuer.issuer, **shown)

    def distrust(self, name: str) -> None:
        """Takes an issuer's tokens no longer."""
        with self._secrets.locked():
            issuers = self.issuers()
            if all(one.issuer != name for one in issuers.issuers):
                known = ", ".join(one.issuer for one in issuers.issuers) or "nobody's"
                raise Mistake(f"the gateway takes no tokens of {name}", f"name one of these: {known}")
            issuers.issuers = [one for one in issuers.issuers if one.issuer != name]
            audit.commit(self._secrets, {self._secrets.issuers: issuers}, "issuer.distrust", name)

    def _put_first(
        self, signing: Signing, jwk: Jwk, source: Literal["command", "environment"], overlap_s: int | None
    ) -> None:
        now = int(self._clock())
        end = now + SETTLED_S + (60 * signing.minutes if overlap_s is None else overlap_s)
        kept = [key for key in signing.keys if key.in_force(now)][: MAX_KEYS - 1]
        for key in kept:
            key.until = min(key.until or end, end)
        signing.keys = [made(SigningKey, {"jwk": jwk, "created": now, "source": source}), *kept]
        self._commit(
            signing, "tokens.rotate", algorithm=KINDS[jwk["kty"]], kid=jwk["kid"], source=source, old_until=end
        )

    def _commit(self, signing: Signing, action: str, **details: object) -> None:
        """The gateway's file first: it has to know a key before something is signed with it."""
        issuers = self.issuers()
        issuers.issuers = [own(signing), *(one for one in issuers.issuers if one.issuer != ISSUER)]
        files: dict[Path, Strict] = {self._secrets.issuers: issuers, self._secrets.signing: signing}
        audit.commit(self._secrets, files, action, ISSUER, **details)


def own(signing: Signing) -> Issuer:
    """What the gateway has to know of this fleet's own keys."""
    keys = [key.public() for key in signing.keys]
    algorithms = sorted({key.algorithm for key in signing.keys})
    return made(Issuer, {"issuer": ISSUER, "audience": AUDIENCE, "algorithms": algorithms, "keys": keys})
