"""Certificates for tests, made on the spot, in the layout that QEMU, nbdkit and libnbd share."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec


class Authority:
    """A certificate authority and its folders."""

    def __init__(self, folder: Path) -> None:
        self._ca = trustme.CA()
        self._folder = folder

    @property
    def ca_file(self) -> Path:
        """Its own certificate."""
        path = self._folder / "ca-cert.pem"
        self._ca.cert_pem.write_to_path(str(path))
        return path

    def server(self, name: str = "server", *identities: str, expired: bool = False) -> Path:
        """Makes a folder for a server; the identities are host names and addresses."""
        now = datetime.now(UTC)
        cert = self._ca.issue_cert(
            *(identities or ("localhost", "127.0.0.1")),
            not_before=now - timedelta(days=3),
            not_after=now + timedelta(days=-1 if expired else 1),
        )
        return self._write(name, "server", cert)

    def client(self, name: str = "client") -> Path:
        """Makes a folder for a client."""
        return self._write(name, "client", self._ca.issue_cert("client.example"))

    def revoke(self, folder: Path, *servers: Path) -> None:
        """Puts a list of revoked certificates into a client's folder, those of `servers` on it."""
        now = datetime.now(UTC)
        issuer = x509.load_pem_x509_certificate(self._ca.cert_pem.bytes()).subject
        revoked = x509.CertificateRevocationListBuilder(issuer, now - timedelta(days=1), now + timedelta(days=1))
        for server in servers:
            serial = x509.load_pem_x509_certificate((server / "server-cert.pem").read_bytes()).serial_number
            entry = x509.RevokedCertificateBuilder(serial, now - timedelta(days=1)).build()
            revoked = revoked.add_revoked_certificate(entry)
        key = serialization.load_pem_private_key(self._ca.private_key_pem.bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        signed = revoked.sign(key, hashes.SHA256())
        (folder / "ca-crl.pem").write_bytes(signed.public_bytes(serialization.Encoding.PEM))

    def _write(self, name: str, role: str, cert: trustme.LeafCert) -> Path:
        folder = self._folder / name
        folder.mkdir(parents=True)
        self._ca.cert_pem.write_to_path(str(folder / "ca-cert.pem"))
        cert.private_key_pem.write_to_path(str(folder / f"{role}-key.pem"))
        for blob in cert.cert_chain_pems:
            blob.write_to_path(str(folder / f"{role}-cert.pem"), append=True)
        return folder
