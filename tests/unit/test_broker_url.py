"""The broker's address: the files of TLS in it, who logs in, and what is wrong with the files."""

from __future__ import annotations

import shutil
import ssl
from collections.abc import Mapping
from pathlib import Path

import pytest
from yarl import URL

from tests.certificates import Authority
from worker.broker_url import connect_failure, files_of, login_of, tls_failure, with_tls
from worker.settings import Loaded, SettingsError, load_settings

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")


def test_an_address_without_files_stays_as_it_is() -> None:
    assert with_tls("amqp://a:b@host/v?heartbeat=5") == "amqp://a:b@host/v?heartbeat=5"


def test_the_files_are_in_the_address_and_come_out_again() -> None:
    files = (Path("/etc/the ca & co.pem"), Path("/run/me.pem"), Path("/run/me.key"))
    url = with_tls("amqps://me@host/v", ca_file=files[0], certificate_file=files[1], key_file=files[2])
    assert files_of(url) == files
    assert URL(url).query["cafile"] == "/etc/the ca & co.pem"


@pytest.mark.parametrize(
    ("url", "login"),
    [
        ("amqp://host/", "guest"),
        ("amqp://me:secret@host/", "me"),
        ("amqps://host/?auth=external", None),
        ("amqps://me@host/?auth=external", "me"),
    ],
)
def test_the_login_is_the_user_of_the_address(url: str, login: str | None) -> None:
    assert login_of(url) == login


@pytest.mark.parametrize(("url", "external"), [("amqps://me@host/", True), ("amqps://me:secret@host/", False)])
def test_a_certificate_is_the_login_unless_there_is_a_password(url: str, external: bool) -> None:
    found = with_tls(url, certificate_file=Path("me.pem"), key_file=Path("me.key"))
    assert (URL(found).query.get("auth") == "EXTERNAL") is external


def test_a_failure_whose_causes_form_a_ring_is_looked_at_once() -> None:
    first, second = OSError("first"), OSError("second")
    first.__cause__, second.__cause__ = second, first
    assert tls_failure(first) is None


def test_a_reset_is_a_hint_at_tls_only_where_there_is_tls() -> None:
    assert "client certificate" in (connect_failure("amqps://host/", ConnectionResetError()) or "")
    assert connect_failure("amqp://host/", ConnectionResetError()) is None


def test_a_failure_of_tls_names_no_path() -> None:
    with pytest.raises(OSError, match="No such file") as caught:
        ssl.create_default_context(cafile="/secret/place/ca.pem")
    assert tls_failure(caught.value) == "a file for TLS with the broker cannot be read"


# --- settings ---


def loaded(**amqp: str) -> Loaded:
    environment = {f"MODEL_MANAGER_AMQP__{name.upper()}": value for name, value in amqp.items()}
    return load_settings(environment={"MODEL_MANAGER_AMQP__URL": "amqps://me@host/v", **environment})


def problems(**amqp: str) -> str:
    with pytest.raises(SettingsError) as caught:
        loaded(**amqp)
    return str(caught.value)


@pytest.fixture
def usable(tmp_path: Path) -> Mapping[str, str]:
    authority = Authority(tmp_path)
    me = authority.issue("/CN=me", "me")
    return {"ca_file": str(authority.certificate), "certificate_file": str(me.certificate), "key_file": str(me.key)}


@needs_openssl
def test_settings_with_usable_files_make_the_address(usable: Mapping[str, str]) -> None:
    found = loaded(**usable)
    assert [str(path) for path in files_of(found.amqp_url)] == list(usable.values())
    assert [str(path) for path in found.amqp_files] == list(usable.values())


@needs_openssl
def test_the_address_is_read_anew_from_its_file(usable: Mapping[str, str], tmp_path: Path) -> None:
    address = tmp_path / "address"
    address.touch(0o600)
    address.write_text("amqps://me:one@host/v")
    found = loaded(url_file=str(address), **usable)
    assert URL(found.amqp_url).password == "one"
    address.write_text("amqps://me:two@host/v")
    assert URL(found.amqp_url).password == "two"
    assert address in found.amqp_files


@needs_openssl
def test_files_that_cannot_work_stop_the_boot_with_their_key(usable: Mapping[str, str], tmp_path: Path) -> None:
    other = Authority(tmp_path / "other").issue("/CN=me", "me")
    assert "amqp.caFile" in problems(**{**usable, "ca_file": str(tmp_path / "none.pem")})
    assert "amqp.certificateFile" in problems(**{**usable, "key_file": str(other.key)})
    assert "go together" in problems(certificate_file=usable["certificate_file"])
    assert "not amqps://" in problems(**usable, url="amqp://me@host/")
    Path(usable["key_file"]).chmod(0o644)
    assert "readable by everyone" in problems(**usable)
