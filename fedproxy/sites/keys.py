"""Keys and certificates: a small authority of the hub's own, the hub's certificate, and a key for each site."""

import datetime as dt
import ipaddress
from collections.abc import Sequence
from pathlib import Path

from fedproxy.errors import ConfigError
from fedproxy.files import private_folder, write_bytes

try:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID
except ImportError:
    raise ConfigError("keys need the package cryptography; pip install 'fedproxy[flower]'") from None

_CA_DAYS, _HUB_DAYS = 3650, 825
"""Days that the authority and the hub's certificate hold; 825 is the most that some programs take."""
_SKEW = dt.timedelta(minutes=5)
_PEM, _PLAIN = serialization.Encoding.PEM, serialization.NoEncryption()


def make_authority(folder: Path) -> None:
    """Make the hub's own certificate authority, unless there is one."""
    if (folder / "ca.key").exists():
        return
    key, name = ec.generate_private_key(ec.SECP256R1()), _name("FedProxy hub")
    built = (
        _builder(name, name, key, _CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    _write(folder, "ca", key, built.sign(key, hashes.SHA256()))


def make_certificate(folder: Path, hosts: Sequence[str], *, days: float = _HUB_DAYS) -> None:
    """Make the certificate of the hub's front door and of Flower's SuperLink behind it, in place of one that is there.

    Args:
        folder: Folder with the authority.
        hosts: Names and addresses that the hub is reached by; this machine's own are added.
        days: Days that it holds.

    Raises:
        ConfigError: If the authority cannot be read.
    """
    try:
        authority = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
        signing = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
        if not isinstance(signing, ec.EllipticCurvePrivateKey):
            raise ValueError("ca.key is a key of another kind")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder}: ca.crt and ca.key cannot be read; put them back, or begin a new hub") from error
    key = ec.generate_private_key(ec.SECP256R1())
    names = [_host(host) for host in dict.fromkeys([*hosts, "localhost", "127.0.0.1"])]
    built = (
        _builder(_name(hosts[0]), authority.subject, key, days)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signing.public_key()), critical=False)
    )
    _write(folder, "hub", key, built.sign(signing, hashes.SHA256()))


def make_site_key(path: Path) -> None:
    """Make a site's private key and, beside it, ``.pub`` for the hub's owner; a key that is there stays."""
    if path.exists():
        return
    key = ec.generate_private_key(ec.SECP384R1())
    private_folder(path.parent)
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    write_bytes(path.with_name(f"{path.name}.pub"), public + b"\n")  # before what says that both are there
    write_bytes(path, key.private_bytes(_PEM, serialization.PrivateFormat.OpenSSH, _PLAIN), private=True)


def expires(certificate: Path) -> dt.datetime:
    """Return when a certificate ends.

    Raises:
        ConfigError: If it cannot be read.
    """
    try:
        end: dt.datetime = x509.load_pem_x509_certificate(certificate.read_bytes()).not_valid_after_utc
        return end
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no certificate"
        raise ConfigError(f"{certificate} cannot be read ({reason}); ask the hub's owner for it") from error


def check_public_key(path: Path) -> bytes:
    """Return a site's public key if it is one.

    Raises:
        ConfigError: If it is none, or a private one.
    """
    try:
        data = path.read_bytes()[: 1 << 14]
        if b"PRIVATE" in data:
            raise ConfigError(f"{path} is a private key, which never leaves its site; ask for the .pub beside it")
        key = serialization.load_ssh_public_key(data)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is not a site's public key; ask for the .pub that site init made") from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ConfigError(f"{path} is not an elliptic-curve key; ask for the .pub that site init made")
    return data


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, common[:64])])


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: float
) -> x509.CertificateBuilder:
    now = dt.datetime.now(dt.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now - _SKEW, now + dt.timedelta(days=days) - _SKEW))
        .not_valid_after(now + dt.timedelta(days=days))
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )


def _write(folder: Path, stem: str, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
    private_folder(folder)
    write_bytes(folder / f"{stem}.crt", certificate.public_bytes(_PEM))  # before what says that both are there
    write_bytes(
        folder / f"{stem}.key", key.private_bytes(_PEM, serialization.PrivateFormat.PKCS8, _PLAIN), private=True
    )
