"""The broker's address, with all that a connection needs in one URL: the login, and the files of TLS as parameters.

The AMQP library reads the files when it connects, so each connection uses what they hold by then.
"""

from __future__ import annotations

import ssl
import stat
from collections.abc import Iterator
from pathlib import Path

from yarl import URL

EXTERNAL = "EXTERNAL"
NO_ADDRESS = "the broker's address is not an AMQP URL"
_LONGEST_CHAIN = 8
_FILES = ("cafile", "certfile", "keyfile")


def with_tls(
    url: str, *, ca_file: Path | None = None, certificate_file: Path | None = None, key_file: Path | None = None
) -> str:
    """The address with these files. With a certificate and without a password, the certificate is the login."""
    named = dict(zip(_FILES, (ca_file, certificate_file, key_file), strict=True))
    given = {name: str(path) for name, path in named.items() if path is not None}
    if not given:
        return url
    parts = URL(url)
    if certificate_file is not None and parts.password is None:
        given["auth"] = EXTERNAL
    return str(parts.update_query(given))


def files_of(url: str) -> tuple[Path, ...]:
    """The files that a connection to this address reads."""
    query = URL(url).query
    return tuple(Path(query[name]) for name in _FILES if name in query)


def login_of(url: str) -> str | None:
    """The user an address logs in as; None where a certificate says so and the address does not."""
    parts = URL(url)
    if parts.query.get("auth", "").upper() == EXTERNAL:
        return parts.user
    return parts.user or "guest"


def is_address(url: str) -> bool:
    """Whether it names a broker and how to talk to it."""
    try:
        parts = URL(url)
        return parts.scheme in ("amqp", "amqps") and bool(parts.host)
    except ValueError:
        return False


def unusable_tls(
    url: str, *, ca_file: Path | None, certificate_file: Path | None, key_file: Path | None
) -> tuple[str, str] | None:
    """What keeps a connection from using these files, as the name of one of them and the reason."""
    if ca_file is None and certificate_file is None and key_file is None:
        return None
    if URL(url).scheme != "amqps":
        return "ca_file" if ca_file else "certificate_file", "the broker's address is not amqps://, so nothing uses it"
    if (certificate_file is None) != (key_file is None):
        return "key_file" if key_file else "certificate_file", "a certificate and its key go together"
    try:
        ssl.create_default_context(cafile=ca_file)
    except (OSError, ssl.SSLError) as error:
        return "ca_file", _reason(error)
    if certificate_file is not None and key_file is not None:
        try:
            if stat.S_IMODE(key_file.stat().st_mode) & stat.S_IROTH:
                return "key_file", "is readable by everyone: chmod 600 it"
            ssl.create_default_context().load_cert_chain(certificate_file, key_file, password=_no_password)
        except (OSError, ssl.SSLError) as error:
            return "certificate_file", f"with its key: {_reason(error)}"
    return None


def tls_failure(error: BaseException) -> str | None:
    """Why TLS with the broker failed, if that is what `error` comes from; in words that hold no path."""
    for seen in _causes(error):
        if isinstance(seen, ssl.SSLCertVerificationError):
            return f"the broker's certificate is not trusted: {seen.verify_message}"
        if isinstance(seen, ssl.SSLError) and seen.reason:
            return f"TLS with the broker failed: {seen.reason.lower().replace('_', ' ')}"
        if isinstance(seen, FileNotFoundError | PermissionError):
            return "a file for TLS with the broker cannot be read"
    return None


def connect_failure(url: str, error: BaseException) -> str | None:
    """`tls_failure`, and a guess where the broker gave no reason."""
    if failure := tls_failure(error):
        return failure
    if URL(url).scheme == "amqps" and any(isinstance(cause, ConnectionResetError) for cause in _causes(error)):
        return "the broker ended the connection during TLS; does it ask for a client certificate?"
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was raised from. The chain of one that was raised again may be a ring."""
    cause: BaseException | None = error
    for _ in range(_LONGEST_CHAIN):
        if cause is None:
            return
        yield cause
        cause = cause.__cause__


def _no_password() -> str:
    # Else OpenSSL would ask on the terminal.
    raise ssl.SSLError("the key has a password, and nobody is here to type it")


def _reason(error: OSError) -> str:
    if isinstance(error, ssl.SSLError):
        return (error.reason or str(error)).lower().replace("_", " ")
    return error.strerror or str(error)
