"""The keys file: what it may say, and what a change of it does."""

import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from jaxserve.core.errors import ConfigError, Unauthenticated
from jaxserve.server.security.caller import Caller
from jaxserve.server.security.keys import ApiKeys
from jaxserve.server.security.tenants import TenantLimits

ACME = "Bearer acme-key-0123456789"
GLOBEX = "Bearer globex-key-0123456789"
KEYS = 'keys = ["long-enough-0123456"]'


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def replace(path: Path, text: str) -> None:
    """As editors and configuration managers do it: another file of the same name."""
    other = path.with_suffix(".new")
    other.write_text(text)
    other.chmod(0o600)
    os.replace(other, path)


def test_plain_and_hashed_keys_name_their_tenant(keys_file: Callable[..., Path]) -> None:
    keys = ApiKeys(keys_file())
    assert keys.caller(ACME) == Caller("acme", is_authenticated=True)
    assert keys.caller(GLOBEX.replace("Bearer", "bearer")).tenant == "globex"


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer ", "Basic acme-key-0123456789", "acme-key-0123456789",
     "Bearer acme-key-012345678", "Bearer acme-key-01234567890", "Bearer ACME-KEY-0123456789",
     "Bearer \udcff\udcfe", "Bearer \N{SNOWMAN}"],
)  # fmt: skip
def test_others_are_nobody(keys_file: Callable[..., Path], header: str | None) -> None:
    with pytest.raises(Unauthenticated):
        ApiKeys(keys_file()).caller(header)


def test_the_hash_itself_is_no_key(keys_file: Callable[..., Path]) -> None:
    path = keys_file()
    digest = path.read_text().split("sha256:")[1][:64]
    for key in (digest, f"sha256:{digest}"):
        with pytest.raises(Unauthenticated):
            ApiKeys(path).caller(f"Bearer {key}")


def test_keys_are_not_kept_in_memory(keys_file: Callable[..., Path]) -> None:
    keys = ApiKeys(keys_file())
    keys.caller(ACME)
    assert "acme-key" not in repr(vars(keys))


def test_limits_are_the_tables_or_else_the_defaults(keys_file: Callable[..., Path]) -> None:
    path = keys_file(acme="requests_per_minute = 10\nmax_concurrent_requests = 2")
    keys = ApiKeys(path, TenantLimits(requests_per_minute=5, tokens_per_minute=99))
    assert keys.limits_of("acme") == TenantLimits(
        requests_per_minute=10, tokens_per_minute=99, max_concurrent_requests=2
    )
    assert keys.limits_of("globex") == TenantLimits(requests_per_minute=5, tokens_per_minute=99)


def test_a_changed_file_is_read_again(keys_file: Callable[..., Path]) -> None:
    clock = Clock()
    path = keys_file()
    keys = ApiKeys(path, now=clock)
    replace(path, '[tenants.initech]\nkeys = ["initech-key-012345"]')
    assert keys.caller(ACME).tenant == "acme"  # at most once a second
    clock.now = 1.5
    assert keys.caller("Bearer initech-key-012345").tenant == "initech"
    with pytest.raises(Unauthenticated):
        keys.caller(ACME)


@pytest.mark.parametrize("broken", [None, "not TOML [", "[tenants]\n", '[tenants.a]\nkeys = ["x"]'])
def test_a_broken_change_keeps_the_old_keys_and_says_so_once(
    keys_file: Callable[..., Path], caplog: pytest.LogCaptureFixture, broken: str | None
) -> None:
    clock = Clock()
    path = keys_file()
    good = path.read_text()
    keys = ApiKeys(path, now=clock)
    if broken is None:
        path.unlink()
    else:
        replace(path, broken)
    for clock.now in (2.0, 4.0, 6.0):
        assert keys.caller(ACME).tenant == "acme"
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 1 and "keeping the API keys" in errors[0].getMessage()
    replace(path, good.replace("acme-key", "next-key"))
    clock.now = 8.0
    assert keys.caller("Bearer next-key-0123456789").tenant == "acme"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must consist of tables"),
        ("keys = 1", "must consist of tables"),
        ("[tenants]", "must consist of tables"),
        ("tenants = 3", "must consist of tables"),
        (f"[tenants.a]\n{KEYS}\n[other]", "must consist of tables"),
        ("[tenants.a]", "tenant 'a': keys must be a list"),
        ("[tenants]\na = 5", "tenant 'a': there must be a table"),
        (f'[tenants.""]\n{KEYS}', "with a name"),
        (f"[tenants.{'a' * 300}]\n{KEYS}", "at most 256"),
        ("[tenants.a]\nkeys = []", "keys must be a list"),
        ("[tenants.a]\nkeys = [7]", "key 1 must be a string"),
        ('[tenants.a]\nkeys = ["short"]', "key 1 must have at least 16"),
        ('[tenants.a]\nkeys = ["with a space 0123456"]', "key 1 must have .* without spaces"),
        ('[tenants.a]\nkeys = ["sha256:abcd"]', "64 hex digits"),
        (f"[tenants.a]\n{KEYS}\nrate = 3", "rate is not known"),
        (f"[tenants.a]\n{KEYS}\ntokens_per_minute = 0", "must be positive"),
        (f"[tenants.a]\n{KEYS}\ntokens_per_minute = true", "must be a number"),
        (f"[tenants.a]\n{KEYS}\nmax_concurrent_requests = 1.5", "must be a whole number"),
        (f"[tenants.a]\n{KEYS}\n[tenants.b]\n{KEYS}", "also that of tenant 'a'"),
    ],
)
def test_a_wrong_file_says_where_it_is_wrong_and_no_key(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        ApiKeys(path)
    assert "long-enough" not in str(caught.value)


def test_a_missing_file_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the API keys"):
        ApiKeys(tmp_path / "none.toml")


def test_a_file_that_others_can_read_gets_a_warning(
    keys_file: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    path = keys_file()
    ApiKeys(path)
    assert not caplog.records
    path.chmod(0o644)
    ApiKeys(path)
    assert "can be read by other users" in caplog.text
