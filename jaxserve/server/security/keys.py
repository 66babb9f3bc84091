"""API keys from a file that is read again when it changes."""

import dataclasses
import hashlib
import hmac
import logging
import string
import time
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxserve.core.errors import ConfigError, InvalidRequest, Unauthenticated
from jaxserve.core.service_params import ServiceParams
from jaxserve.files.private_files import is_readable_by_others
from jaxserve.files.watched_files import WatchedFiles
from jaxserve.server.security.caller import Caller
from jaxserve.server.security.tenants import TenantLimits

log = logging.getLogger(__name__)

MIN_KEY_CHARS = 16
_HASH_PREFIX = "sha256:"
_LIMITS = tuple(field.name for field in dataclasses.fields(TenantLimits))
_KEY_CHARS = frozenset(string.ascii_letters + string.digits + string.punctuation)


@dataclasses.dataclass(frozen=True)
class _Book:
    """What a keys file says: the SHA-256 of every key with its tenant, and tenants' limits."""

    digests: tuple[tuple[bytes, str], ...]
    limits: Mapping[str, TenantLimits]


class ApiKeys:
    """Who may call, by a TOML file with a table per tenant:

        [tenants.acme]
        keys = ["a-key-of-16-characters-or-more", "sha256:<64 hex digits: the SHA-256 of a key>"]
        requests_per_minute = 600        # optional, as the others
        tokens_per_minute = 100_000
        max_concurrent_requests = 32

    The file is looked at again at most once a second; one that is missing or broken then changes
    nothing but the log. In memory are only hashes of the keys.

    Args:
        path: the file.
        defaults: limits of tenants whose table does not say.
        now: seconds, on any monotonic clock.

    Raises:
        ConfigError: the file cannot be read, or is wrong; the message says where.
    """  # noqa: D415 - the first line introduces the example

    def __init__(
        self,
        path: Path,
        defaults: TenantLimits | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._defaults = defaults or TenantLimits()
        self._books = WatchedFiles([path], lambda: _read(path), "the API keys", now)
        if is_readable_by_others(path):
            log.warning("%s can be read by other users; run chmod 600 %s", path, path)

    def caller(self, authorization: str | None) -> Caller:
        """Who sends an `Authorization` header.

        Raises:
            Unauthenticated: nobody that is known.
        """
        scheme, _, key = (authorization or "").strip().partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise Unauthenticated("an API key is needed: send `Authorization: Bearer KEY`")
        tenant = self._tenant_of(key.strip())
        if tenant is None:
            raise Unauthenticated("the API key is not known here")
        return Caller(tenant, is_authenticated=True)

    def limits_of(self, tenant: str) -> TenantLimits:
        """What a tenant may ask for; the defaults for one that has no table any more."""
        return self._books.get().limits.get(tenant, TenantLimits()).or_else(self._defaults)

    def _tenant_of(self, key: str) -> str | None:
        digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
        found = None
        # All of them, each in constant time: how long it takes tells nothing about any key.
        for known, tenant in self._books.get().digests:
            if hmac.compare_digest(known, digest):
                found = tenant
        return found


def _read(path: Path) -> _Book:
    try:
        data = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the API keys: {error}") from error
    except ValueError as error:  # TOML's and Unicode's; neither quotes a key
        raise ConfigError(f"{path} is not a TOML file: {error}") from error
    tenants = data.pop("tenants", None)
    if data or not isinstance(tenants, dict) or not tenants:
        raise ConfigError(f"{path} must consist of tables [tenants.NAME]")
    digests: dict[bytes, str] = {}
    limits = {}
    for tenant, table in tenants.items():
        try:
            limits[tenant] = _read_tenant(tenant, table, digests)
        except (ConfigError, InvalidRequest) as error:
            raise ConfigError(f"{path}: tenant {tenant!r}: {error}") from error
    return _Book(tuple(digests.items()), limits)


def _read_tenant(tenant: str, table: Any, digests: dict[bytes, str]) -> TenantLimits:
    """A tenant's limits; its keys' digests are added to `digests`."""
    ServiceParams(tenant=tenant)  # refuses impossible names
    if not tenant or not isinstance(table, dict):
        raise ConfigError("there must be a table [tenants.NAME] with a name")
    if unknown := set(table) - {"keys", *_LIMITS}:
        raise ConfigError(
            f"{sorted(unknown)[0]} is not known; there are keys, {', '.join(_LIMITS)}"
        )
    keys = table.get("keys")
    if not isinstance(keys, list) or not keys:
        raise ConfigError("keys must be a list of keys")
    for number, key in enumerate(keys, 1):
        digest = _digest(key, number)
        if digests.setdefault(digest, tenant) != tenant:
            raise ConfigError(f"key {number} is also that of tenant {digests[digest]!r}")
    given = {name: table[name] for name in _LIMITS if name in table}
    for name, value in given.items():
        whole = name == "max_concurrent_requests"
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
            raise ConfigError(f"{name} must be a {'whole ' if whole else ''}number")
    return TenantLimits(**given)


def _digest(key: Any, number: int) -> bytes:
    """The SHA-256 of a key as the file has it. Errors do not quote it."""
    if not isinstance(key, str):
        raise ConfigError(f"key {number} must be a string")
    if key.startswith(_HASH_PREFIX):
        try:
            digest = bytes.fromhex(key.removeprefix(_HASH_PREFIX))
        except ValueError:
            digest = b""
        if len(digest) != hashlib.sha256().digest_size:
            raise ConfigError(f"key {number}: sha256: must be followed by 64 hex digits")
        return digest
    if len(key) < MIN_KEY_CHARS or not _KEY_CHARS.issuperset(key):
        raise ConfigError(
            f"key {number} must have at least {MIN_KEY_CHARS} characters, ASCII without spaces"
        )
    return hashlib.sha256(key.encode()).digest()
