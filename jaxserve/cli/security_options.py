"""The options of `jaxserve serve` about who may call, and how much they may ask for."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from jaxserve.cli.options import GroupedOption
from jaxserve.server.limits import RequestLimits
from jaxserve.server.security.tenants import TenantLimits

_FILE = click.Path(dir_okay=False, path_type=Path)
_TENANT = {
    "tenant_requests_per_minute": (float, "requests_per_minute", "Generations started per minute"),
    "tenant_tokens_per_minute": (float, "tokens_per_minute", "Tokens in and out per minute"),
    "tenant_max_concurrent": (int, "max_concurrent_requests", "Generations at the same time"),
}


def security_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options, and its function a ready `security` and `tls`."""

    @functools.wraps(function)
    def with_security(*args: Any, **values: Any) -> Any:
        # With gRPC and cryptography: only when the command runs.
        from jaxserve.server.security.options import SecurityOptions
        from jaxserve.server.security.tls import tls_from_options

        limits = {field.name: values.pop(field.name) for field in _limits()}
        tenant = {name: values.pop(option) for option, (_, name, _) in _TENANT.items()}
        tls = tls_from_options(
            values.pop("tls_cert"), values.pop("tls_key"), values.pop("tls_client_ca")
        )
        security = SecurityOptions(
            limits=RequestLimits(**limits),
            api_keys=values.pop("api_keys"),
            tenant_limits=TenantLimits(**tenant),
            admin_port=values.pop("admin_port"),
        )
        return function(*args, security=security, tls=tls, **values)

    for option in reversed(_options()):
        with_security = option(with_security)
    return with_security


def _options() -> list[Callable[..., Any]]:
    options = [
        _option("--tls-cert", _FILE, "Certificate chain of gRPC and HTTP, in PEM: turns TLS on."),
        _option("--tls-key", _FILE, "Its private key, a PEM file without a password."),
        _option("--tls-client-ca", _FILE, "Mutual TLS: only clients with a certificate of the "
                "authorities in this PEM file are let in."),
        _option("--api-keys", _FILE, "TOML file of tenants and their API keys, read again when it "
                "changes: every call but health needs one (default: none is needed)."),
    ]  # fmt: skip
    for name, (kind, _, text) in _TENANT.items():
        text = f"{text}, of a tenant whose table in --api-keys does not say (default: no limit)."
        options.append(_option(_flag(name), kind, text))
    for field in _limits():
        text = f"Limit on {field.metadata['help']}."
        options.append(_option(_flag(field.name), int, text, field.default))
    options.append(
        _option("--admin-port", int, "Serve the admin surface over HTTP on this port of the "
                "loopback interface (default: off).")
    )  # fmt: skip
    return options


def _option(flag: str, kind: Any, text: str, default: Any = None) -> Callable[..., Any]:
    return click.option(
        flag, type=kind, default=default, show_default=default is not None, help=text,
        cls=GroupedOption, group="security",
    )  # fmt: skip


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _limits() -> tuple[dataclasses.Field, ...]:
    return dataclasses.fields(RequestLimits)
