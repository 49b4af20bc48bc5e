"""Certificates and keys to begin with: an authority, a server's certificate, and a key pair for every client."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from neurocl.errors import UserError
from neurocl.runs import make_folder

DAYS = 365


def make_keys(folder: Path, num_clients: int, hosts: Sequence[str] = (), *, days: int = DAYS) -> list[Path]:
    """Write ``ca.crt``, ``ca.key``, ``server.crt``, ``server.key`` and, in ``clients``, a key pair for every client.

    Private keys can be read by their owner alone. The server's certificate holds for ``hosts`` and for this machine
    itself (localhost, 127.0.0.1, ::1).

    Returns:
        the files, in that order.

    Raises:
        UserError: the folder holds something already.
        RunError: it cannot be made.
    """
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty; keys are never overwritten")
    make_folder(folder / "clients")
    authority, authority_key = _certificate("neurocl federation", None, days=days)
    names = list(dict.fromkeys([*hosts, "localhost", "127.0.0.1", "::1"]))
    server, server_key = _certificate(names[0], (authority, authority_key), names, days=days)
    written = []
    for name, content in (
        ("ca.crt", authority.public_bytes(Encoding.PEM)),
        ("ca.key", _private(authority_key, PrivateFormat.PKCS8)),
        ("server.crt", server.public_bytes(Encoding.PEM)),
        ("server.key", _private(server_key, PrivateFormat.PKCS8)),
    ):
        written.append(_write(folder / name, content))
    for number in range(num_clients):
        key = ec.generate_private_key(ec.SECP384R1())
        public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
        written.append(_write(folder / "clients" / f"client-{number}.key", _private(key, PrivateFormat.OpenSSH)))
        written.append(_write(folder / "clients" / f"client-{number}.pub", public + b"\n"))
    return written


def _certificate(
    name: str,
    signer: tuple[x509.Certificate, ec.EllipticCurvePrivateKey] | None,
    hosts: Sequence[str] = (),
    *,
    days: int,
) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """A certificate and its key: of an authority without a signer, else of a server."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(signer[0].subject if signer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        # Clocks differ.
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=signer is None, path_length=0 if signer is None else None), True)
        .add_extension(_usage(signer is None), True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key((signer[1] if signer else key).public_key()), False
        )
    )
    if signer is not None:
        builder = builder.add_extension(x509.SubjectAlternativeName([_alternative(host) for host in hosts]), False)
        builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False)
    return builder.sign(signer[1] if signer else key, hashes.SHA256()), key


def _usage(authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        return x509.DNSName(host)
    except ValueError:
        raise UserError(f"--host must be a name or an address, got {host!r}") from None


def _private(key: ec.EllipticCurvePrivateKey, form: PrivateFormat) -> bytes:
    return key.private_bytes(Encoding.PEM, form, NoEncryption())


def _write(path: Path, content: bytes) -> Path:
    """A new file; a private key can be read by its owner alone from its first moment on."""
    mode = 0o600 if path.suffix == ".key" else 0o644
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as stream:
        stream.write(content)
    return path
