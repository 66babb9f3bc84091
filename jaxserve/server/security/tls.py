"""TLS and mutual TLS, from the same files for gRPC and HTTP."""

import dataclasses
import datetime
import logging
import ssl
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from jaxserve.core.errors import ConfigError
from jaxserve.files.private_files import is_readable_by_others

log = logging.getLogger(__name__)

_PUBLIC = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tls:
    """A server's certificate and what it asks of its clients. TLS 1.2 or newer is spoken.

    Attributes:
        cert: PEM file of the certificate, followed by those of its intermediate authorities.
        key: PEM file of its private key, without a password.
        client_ca: PEM file of the authorities whose clients are let in; None lets in anybody.

    Raises:
        ConfigError: a file is missing or wrong, or key and certificate do not belong together.
    """

    cert: Path
    key: Path
    client_ca: Path | None = None

    def __post_init__(self) -> None:
        certificate = _certificates(self.cert, "--tls-cert")[0]
        private = _private_key(self.key)
        if private.public_key().public_bytes(*_PUBLIC) != certificate.public_key().public_bytes(
            *_PUBLIC
        ):
            raise ConfigError(
                f"--tls-key {self.key} is not the key of the first certificate in {self.cert} "
                "(the server's own has to come before its authorities')"
            )
        until = certificate.not_valid_after_utc
        if until < datetime.datetime.now(datetime.UTC):
            log.warning("the certificate %s expired on %s", self.cert, until.date())
        if is_readable_by_others(self.key):
            log.warning("%s can be read by other users; run chmod 600 %s", self.key, self.key)
        if self.client_ca is not None:
            _certificates(self.client_ca, "--tls-client-ca")

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """For `grpc.aio.Server.add_secure_port`; gRPC speaks TLS 1.2 and 1.3."""
        authorities = None if self.client_ca is None else self.client_ca.read_bytes()
        return grpc.ssl_server_credentials(
            [(self.key.read_bytes(), self.cert.read_bytes())],
            root_certificates=authorities,
            require_client_auth=authorities is not None,
        )

    def ssl_context(self) -> ssl.SSLContext:
        """For an asyncio server of HTTP/1.1."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= ssl.OP_NO_RENEGOTIATION
        context.set_alpn_protocols(["http/1.1"])
        context.load_cert_chain(self.cert, self.key)
        if self.client_ca is not None:
            context.load_verify_locations(self.client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
        return context


def tls_from_options(cert: Path | None, key: Path | None, client_ca: Path | None) -> Tls | None:
    """TLS as the command line asks for it; None for none.

    Raises:
        ConfigError: an option is missing beside another, or a file is wrong.
    """
    if cert is None and key is None and client_ca is None:
        return None
    if cert is None or key is None:
        missing = "--tls-cert" if cert is None else "--tls-key"
        raise ConfigError(f"TLS needs a certificate and its key: {missing} is missing")
    return Tls(cert=cert, key=key, client_ca=client_ca)


def _certificates(path: Path, option: str) -> list[x509.Certificate]:
    try:
        certificates = x509.load_pem_x509_certificates(_read(path, option))
    except ValueError as error:
        raise ConfigError(f"{option} {path} is not a PEM file of certificates: {error}") from error
    if not certificates:
        raise ConfigError(f"{option} {path} holds no certificate")
    return certificates


def _private_key(path: Path):
    data = _read(path, "--tls-key")
    try:
        return serialization.load_pem_private_key(data, password=None)
    except TypeError as error:
        raise ConfigError(f"--tls-key {path} has a password; it must have none") from error
    except ValueError as error:
        raise ConfigError(f"--tls-key {path} is not a PEM file of a private key") from error


def _read(path: Path, option: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{option}: cannot read {path}: {error.strerror}") from error
