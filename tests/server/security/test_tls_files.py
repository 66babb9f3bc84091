"""Wrong certificate files are named, with what to do."""

from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from jaxserve.core.errors import ConfigError
from jaxserve.server.security.tls import Tls, tls_from_options


def write_key(path: Path, password: bytes | None = None) -> Path:
    encryption = (
        serialization.BestAvailableEncryption(password)
        if password
        else serialization.NoEncryption()
    )
    path.write_bytes(
        ec.generate_private_key(ec.SECP256R1()).private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption
        )
    )
    path.chmod(0o600)
    return path


def test_wrong_files(certificates, tmp_path: Path) -> None:
    good = certificates.tls
    empty = tmp_path / "empty.pem"
    empty.touch()
    missing = tmp_path / "missing.pem"
    for fields, message in [
        ({"cert": missing}, f"--tls-cert: cannot read {missing}: No such file"),
        ({"key": missing}, f"--tls-key: cannot read {missing}: No such file"),
        ({"client_ca": missing}, f"--tls-client-ca: cannot read {missing}: No such file"),
        ({"cert": empty}, "--tls-cert .* is not a PEM file of certificates"),
        ({"cert": good.key}, "--tls-cert .* is not a PEM file of certificates"),
        ({"key": empty}, "--tls-key .* is not a PEM file of a private key"),
        ({"key": good.cert}, "--tls-key .* is not a PEM file of a private key"),
        ({"client_ca": empty}, "--tls-client-ca .* is not a PEM file of certificates"),
        ({"key": write_key(tmp_path / "other.pem")}, "is not the key of the first certificate"),
        ({"key": write_key(tmp_path / "locked.pem", b"secret")}, "has a password"),
    ]:
        with pytest.raises(ConfigError, match=message):
            Tls(**{"cert": good.cert, "key": good.key, **fields})


def test_half_of_the_options(certificates) -> None:
    tls = certificates.tls
    assert tls_from_options(None, None, None) is None
    assert tls_from_options(tls.cert, tls.key, None) == tls
    with pytest.raises(ConfigError, match="--tls-key is missing"):
        tls_from_options(tls.cert, None, None)
    with pytest.raises(ConfigError, match="--tls-cert is missing"):
        tls_from_options(None, tls.key, None)
    with pytest.raises(ConfigError, match="--tls-cert is missing"):
        tls_from_options(None, None, certificates.ca)


def test_a_key_that_others_can_read_gets_a_warning(
    certificates, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    key = tmp_path / "key.pem"
    key.write_bytes(certificates.tls.key.read_bytes())
    key.chmod(0o644)
    Tls(cert=certificates.tls.cert, key=key)
    assert f"run chmod 600 {key}" in caplog.text
