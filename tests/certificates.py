"""Certificates for tests, made with OpenSSL: an authority, and what it issues."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")


@dataclass(frozen=True)
class Identity:
    """The files of a certificate and its key."""

    certificate: Path
    key: Path


class Authority:
    """Its certificate is `certificate`; what it issues lies in `folder` too."""

    def __init__(self, folder: Path, name: str = "authority") -> None:
        folder.mkdir(exist_ok=True)
        self._folder = folder
        self.certificate, self._key = folder / f"{name}.pem", folder / f"{name}.key"
        _openssl("-subj", f"/CN={name}", "-keyout", self._key, "-out", self.certificate)

    def issue(self, subject: str, name: str, *extensions: str) -> Identity:
        """A certificate for `subject` (`/O=.../CN=...`), in place of the one of that name if there is one."""
        made = Identity(self._folder / f"{name}.pem.new", self._folder / f"{name}.key.new")
        added = [word for one in ("basicConstraints=CA:FALSE", *extensions) for word in ("-addext", one)]
        signed = ("-CA", self.certificate, "-CAkey", self._key)
        _openssl("-subj", subject, *signed, *added, "-keyout", made.key, "-out", made.certificate)
        made.key.chmod(0o600)
        # As with most tools that renew one, there is a moment in which the two do not belong together.
        return Identity(
            made.certificate.replace(made.certificate.with_suffix("")), made.key.replace(made.key.with_suffix(""))
        )


def _openssl(*words: str | Path) -> None:
    subprocess.run(["openssl", "req", "-x509", *_NEW_KEY, *words], check=True, capture_output=True, timeout=30)
