"""TLS and mutual TLS, from the same files for gRPC and HTTP."""

import dataclasses
import datetime
import logging
import ssl
from pathlib import Path
from typing import NamedTuple

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from jaxserve.core.errors import ConfigError
from jaxserve.files.private_files import is_readable_by_others
from jaxserve.files.watched_files import WatchedFiles

log = logging.getLogger(__name__)

_PUBLIC = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


class _Loaded(NamedTuple):
    """What the files of a `Tls` said when they were read, in gRPC's terms and in asyncio's."""

    for_grpc: grpc.ServerCertificateConfiguration
    context: ssl.SSLContext


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tls:
    """A server's certificate and what it asks of its clients. TLS 1.2 or newer is spoken.

    The files are read again when they change, for connections made from then on; those that are
    open go on. Files that are wrong then change nothing but the log. Whether clients need
    certificates is settled at the start.

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
    _files: WatchedFiles[_Loaded] = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        paths = [self.cert, self.key] + ([self.client_ca] if self.client_ca else [])
        object.__setattr__(
            self, "_files", WatchedFiles(paths, self._load, "the TLS certificate and key")
        )

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """For `grpc.aio.Server.add_secure_port`; gRPC speaks TLS 1.2 and 1.3."""
        latest = self._files.get().for_grpc

        def changed() -> grpc.ServerCertificateConfiguration | None:
            """Asked by gRPC for each connection."""
            nonlocal latest
            before, latest = latest, self._files.get().for_grpc
            return None if latest is before else latest

        return grpc.dynamic_ssl_server_credentials(
            latest,
            changed,  # type: ignore[arg-type] - None is fine: nothing has changed
            require_client_authentication=self.client_ca is not None,
        )

    def ssl_context(self) -> ssl.SSLContext:
        """For a server of HTTP/1.1, asyncio's or another."""
        context = self._make_context()

        def take_latest(connection: ssl.SSLObject, name: str | None, own: ssl.SSLContext) -> None:
            """Called at the beginning of each handshake, with or without a name."""
            del name, own
            connection.context = self._files.get().context

        context.sni_callback = take_latest  # type: ignore[assignment] - also of an SSLObject
        return context

    def _load(self) -> _Loaded:
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
        authorities = None
        if self.client_ca is not None:
            _certificates(self.client_ca, "--tls-client-ca")
            authorities = _read(self.client_ca, "--tls-client-ca")
        pair = (_read(self.key, "--tls-key"), _read(self.cert, "--tls-cert"))
        try:
            context = self._make_context()
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"--tls-cert {self.cert}: OpenSSL refuses it: {error}") from error
        return _Loaded(grpc.ssl_server_certificate_configuration([pair], authorities), context)

    def _make_context(self) -> ssl.SSLContext:
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
