"""The settings: layers, where each value comes from, and what stops the boot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from botocore.utils import is_valid_endpoint_url, is_valid_ipv6_endpoint_url
from hypothesis import given
from hypothesis import strategies as st

from worker.settings import Loaded, SettingsError, environment_name, known_keys, load_settings, parse_size


class Folder:
    """A configuration folder, and a boot from it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.common = path / "common.json"
        self.write({})

    def write(self, values: Any, *, rack: str | None = None) -> None:
        file = self.common if rack is None else self.path / "racks" / f"{rack}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(values if isinstance(values, str) else json.dumps(values))

    def load(self, flags: dict[str, Any] | None = None, **environment: str) -> Loaded:
        named = {f"MODEL_MANAGER_{name}": value for name, value in environment.items()}
        return load_settings(flags, environment={"MODEL_MANAGER_CONFIG": str(self.common), **named})

    def problems(self, flags: dict[str, Any] | None = None, **environment: str) -> list[str]:
        with pytest.raises(SettingsError) as error:
            self.load(flags, **environment)
        return error.value.problems

    def secret(self, text: str, mode: int = 0o600) -> Path:
        file = self.path / "secret"
        file.write_text(text)
        file.chmod(mode)
        return file


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


# --- layers ---


def test_without_any_layer_the_built_in_values_hold() -> None:
    settings = load_settings(environment={}).settings
    assert (settings.rack, settings.http.host, settings.http.port) == ("rack-1", "127.0.0.1", 8002)
    assert (settings.max_model_size, settings.max_inline_size) == (100 * 10**9, 10**6)


def test_each_layer_covers_the_one_below_it_and_is_told_as_the_origin(folder: Folder) -> None:
    folder.write({"rack": "r", "http": {"port": 1}, "limits": {"jobs": 1, "lookups": 1, "writes": 1}})
    folder.write({"limits": {"jobs": 2, "lookups": 2, "writes": 2}}, rack="r")
    loaded = folder.load({"limits.writes": 4}, LIMITS__LOOKUPS="3", LIMITS__WRITES="3")
    limits = loaded.settings.limits
    assert (loaded.settings.http.port, limits.jobs, limits.lookups, limits.writes) == (1, 2, 3, 4)
    assert loaded.origins == {
        "rack": str(folder.common),
        "http.port": str(folder.common),
        "limits.jobs": str(folder.path / "racks" / "r.json"),
        "limits.lookups": "environment MODEL_MANAGER_LIMITS__LOOKUPS",
        "limits.writes": "flag",
    }


@pytest.mark.parametrize(("flags", "environment"), [({"rack": "r"}, {}), ({}, {"RACK": "r"})])
def test_the_file_of_a_rack_is_read_whoever_names_the_rack(
    folder: Folder, flags: dict[str, Any], environment: dict[str, str]
) -> None:
    folder.write({"http": {"port": 9}}, rack="r")
    assert folder.load(flags, **environment).settings.http.port == 9
    assert folder.load().settings.http.port == 8002


def test_a_flag_that_was_not_given_covers_nothing(folder: Folder) -> None:
    folder.write({"http": {"port": 9}})
    assert folder.load({"http.port": None}).settings.http.port == 9


# --- the environment ---


def test_every_key_has_an_environment_name_of_its_own() -> None:
    names = [environment_name(path) for path, _ in known_keys()]
    assert len(set(names)) == len(names)
    assert environment_name("storage.s3.endpointUrl") == "MODEL_MANAGER_STORAGE__S3__ENDPOINT_URL"
    assert environment_name("maxModelSize") == "MODEL_MANAGER_MAX_MODEL_SIZE"


@pytest.mark.parametrize(
    ("name", "text", "key", "value"),
    [
        ("HTTP__PORT", "0", "http.port", 0),
        ("ALLOW_PICKLE", "true", "allow_pickle", True),
        ("MAX_MODEL_SIZE", "2GiB", "max_model_size", 2 * 1024**3),
        ("TIMEOUTS__DRAIN", "1.5", "timeouts.drain", 1.5),
        ("REPLICATION__PEERS", '["rack-2"]', "replication.peers", ("rack-2",)),
        ("STORAGE__S3__PREFIX", "5", "storage.s3.prefix", "5"),
        ("STORAGE__S3__BUCKET", "true", "storage.s3.bucket", "true"),
        ("STORAGE__PATH", "/var/models", "storage.path", Path("/var/models")),
        ("LOG__LEVEL", "debug", "log.level", "debug"),
    ],
)
def test_a_variable_is_read_by_the_type_of_its_key(
    folder: Folder, name: str, text: str, key: str, value: object
) -> None:
    found: Any = folder.load(None, **{name: text}).settings
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value


def test_an_unknown_variable_only_warns(folder: Folder) -> None:
    loaded = folder.load(SERVICE_PORT="tcp://10.0.0.1:80")
    assert loaded.warnings == ("MODEL_MANAGER_SERVICE_PORT is not a setting; it is ignored",)


def test_the_variables_of_the_client_are_none_of_ours(folder: Folder) -> None:
    assert folder.load(URL="http://127.0.0.1:1", TOKEN_FILE="/none").warnings == ()


# --- what stops the boot ---


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"colour": "red"}, "colour"),
        ({"http": {"prot": 1}}, "http.prot"),
        ({"storage": {"s3": {"secret": "x"}}}, "storage.s3.secret"),
        ({"http.port": 1, "http": {"port.x": 1}}, "http.port.x"),
        ({"http": {"port": "8002"}}, "http.port"),
        ({"http": {"port": 8002.5}}, "http.port"),
        ({"http": {"port": True}}, "http.port"),
        ({"http": {"port": 65_536}}, "http.port"),
        ({"http": []}, "http"),
        ({"http": None}, "http"),
        ({"rack": "Rack 1"}, "rack"),
        ({"rack": "../../etc"}, "rack"),
        ({"rack": 5}, "rack"),
        ({"storage": {"backend": "tape"}}, "storage.backend"),
        ({"storage": {"backend": "s3"}}, "storage.s3.bucket"),
        ({"maxModelSize": "100 GBit"}, "maxModelSize"),
        ({"maxModelSize": "9" * 400 + "B"}, "maxModelSize"),
        ({"maxModelSize": -1}, "maxModelSize"),
        ({"maxModelSize": "9000000TB"}, "maxModelSize"),
        ({"maxInlineSize": "2MB"}, "maxInlineSize"),
        ({"supportedFormats": ["ONNX"]}, "supportedFormats"),
        ({"supportedFormats": "onnx"}, "supportedFormats"),
        ({"replication": {"peers": ["rack-1"]}}, "replication.peers"),
        ({"replicationFactor": 0}, "replicationFactor"),
        ({"timeouts": {"drain": 0}}, "timeouts.drain"),
        ({"timeouts": {"drain": "30s"}}, "timeouts.drain"),
        ({"limits": {"jobs": 0}}, "limits.jobs"),
        ({"log": {"level": "loud"}}, "log.level"),
        ({"http": {"host": "0.0.0.0"}}, "http.host"),
        ({"http": {"tokenFile": "/no/such/file"}}, "http.tokenFile"),
    ],
)
def test_what_cannot_be_used_stops_the_boot_with_its_key_and_origin(
    folder: Folder, values: dict[str, Any], key: str
) -> None:
    folder.write(values)
    problems = folder.problems()
    assert problems
    assert all(problem.startswith(key) for problem in problems if "built-in" not in problem)
    assert any(str(folder.common) in problem or "built-in" in problem for problem in problems)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "JSON"),
        ("[]", "not an object"),
        ('{"rack": "a", "rack": "b"}', "twice"),
        ('{"a": NaN}', "NaN"),
        ("{", "JSON"),
    ],
)
def test_a_file_that_is_no_json_object_stops_the_boot(folder: Folder, text: str, why: str) -> None:
    folder.write(text)
    problem, *others = folder.problems()
    assert problem.startswith(str(folder.common))
    assert why in problem
    assert others == []


def test_every_problem_of_every_layer_is_told_at_once(folder: Folder) -> None:
    folder.write({"colour": "red", "http": {"port": -1}})
    folder.write({"log": {"level": "loud"}}, rack="rack-1")
    problems = "\n".join(folder.problems({"limits.jobs": 0}, LIMITS__WRITES="many"))
    for key in ("colour", "http.port", "log.level", "limits.jobs (flag)", "MODEL_MANAGER_LIMITS__WRITES"):
        assert key in problems


def test_a_named_file_must_be_there_and_the_usual_one_need_not(folder: Folder) -> None:
    folder.common.unlink()
    assert "no such file" in folder.problems()[0]


def test_a_folder_in_place_of_a_file_is_told(folder: Folder) -> None:
    folder.common.unlink()
    folder.common.mkdir()
    assert "cannot be read" in folder.problems()[0]


# --- addresses ---

ADDRESSES = ("http.publicUrl", "storage.s3.endpointUrl", "storage.s3.publicEndpointUrl")


@pytest.mark.parametrize("key", ADDRESSES)
@pytest.mark.parametrize(
    "address",
    [
        "",
        "minio:9000",
        "minio",
        "ftp://minio/",
        "http://",
        "http://:9000",
        "http://h:99999",
        "http://[::1",
        "http://h\n",
    ],
)
def test_what_is_no_address_of_a_service_stops_the_boot(folder: Folder, key: str, address: str) -> None:
    problem, *others = folder.problems({key: address})
    assert problem.startswith(f"{key} (flag): ")
    assert others == []


@pytest.mark.parametrize("address", ["http://a_b:9000", "http://-a", "http://a..b", "http://a.", "http://[::1]:9000/"])
def test_an_object_store_is_where_its_client_finds_it_or_stops_the_boot(folder: Folder, address: str) -> None:
    if is_valid_endpoint_url(address) or is_valid_ipv6_endpoint_url(address):
        assert folder.load({"storage.s3.endpointUrl": address})
    else:
        assert "no DNS name" in folder.problems({"storage.s3.endpointUrl": address})[0]
    assert folder.load({"http.publicUrl": "https://worker_1:8002/models"})


# --- secrets ---


def test_a_secret_comes_from_its_file_without_the_line_end(folder: Folder) -> None:
    assert folder.load({"http.tokenFile": str(folder.secret("s3cret\n"))}).token == "s3cret"
    assert folder.load({"amqp.urlFile": str(folder.secret("amqp://broker/\n"))}).amqp_url == "amqp://broker/"


def test_of_the_brokers_address_and_its_file_the_one_in_the_higher_layer_holds(folder: Folder) -> None:
    file = str(folder.secret("amqp://file.example/"))
    folder.write({"amqp": {"urlFile": file}})
    assert folder.load().amqp_url == "amqp://file.example/"
    for higher in (
        folder.load(AMQP__URL="amqp://other.example/"),
        folder.load({"amqp.url": "amqp://other.example/"}),
        folder.load({"amqp.url": "amqp://other.example/"}, AMQP__URL_FILE=file),
    ):
        assert higher.amqp_url == "amqp://other.example/"
        assert higher.amqp_files == ()
        assert "amqp.urlFile" not in higher.origins
    folder.write({"amqp": {"url": "amqp://other.example/"}})
    for higher in (folder.load(AMQP__URL_FILE=file), folder.load({"amqp.urlFile": file})):
        assert higher.amqp_url == "amqp://file.example/"
    assert folder.load({"amqp.urlFile": file}, AMQP__URL="amqp://other.example/").amqp_url == "amqp://file.example/"


def test_within_one_layer_the_file_of_the_brokers_address_holds(folder: Folder) -> None:
    file = str(folder.secret("amqp://file.example/"))
    folder.write({"amqp": {"urlFile": file, "url": "amqp://other.example/"}})
    assert folder.load().amqp_url == "amqp://file.example/"
    assert folder.load(AMQP__URL="amqp://other.example/", AMQP__URL_FILE=file).amqp_url == "amqp://file.example/"
    folder.write({"amqp": {"urlFile": None}}, rack="rack-1")
    assert folder.load().amqp_url == "amqp://other.example/", "null says that there is no file, and nothing else"


@pytest.mark.parametrize("address", ["broker", "http://broker/", "amqp:///vhost", "amqp://user:cut/short@broker/"])
def test_what_is_no_address_of_a_broker_stops_the_boot(folder: Folder, address: str) -> None:
    given = folder.problems({"amqp.url": address})
    read = folder.problems({"amqp.urlFile": str(folder.secret(address))})
    why = "(flag): is not an AMQP URL: amqp://USER:PASSWORD@HOST/VHOST, each part quoted"
    assert (given, read) == ([f"amqp.url {why}"], [f"amqp.urlFile {why}"])


@pytest.mark.parametrize(
    ("text", "mode", "why"), [("x", 0o604, "chmod 600"), ("", 0o600, "empty"), (" \n", 0o600, "empty")]
)
def test_a_secret_file_that_is_empty_or_open_to_everyone_stops_the_boot(
    folder: Folder, text: str, mode: int, why: str
) -> None:
    problem, *others = folder.problems({"http.tokenFile": str(folder.secret(text, mode))})
    assert problem.startswith("http.tokenFile (flag): ")
    assert why in problem
    assert others == []


def test_a_secret_file_that_is_not_text_stops_the_boot(folder: Folder) -> None:
    file = folder.secret("")
    file.write_bytes(b"\xff\xfe")
    assert folder.problems({"http.tokenFile": str(file)})[0].startswith("http.tokenFile (flag): ")


def test_the_password_of_the_broker_is_in_no_echo(folder: Folder) -> None:
    folder.write({"amqp": {"url": "amqp://user:s3cret@broker/"}})
    loaded = folder.load()
    assert loaded.amqp_url == "amqp://user:s3cret@broker/"
    assert "s3cret" not in f"{loaded.settings!r} {loaded.settings.model_dump_json()} {loaded}"


def test_the_value_of_a_refused_key_is_not_told(folder: Folder) -> None:
    folder.write({"amqp": {"url": ["amqp://user:s3cret@broker/"], "password": "s3cret"}})
    assert "s3cret" not in "\n".join(folder.problems())


# --- sizes ---


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("5B", 5), ("100GB", 10**11), ("64MiB", 2**26), ("1.5KB", 1500), ("2 TiB", 2**41), (" 1KB ", 1000)],
)
def test_a_size_has_a_unit_of_1000_or_of_1024(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "B", "1K", "1kb", "1PB", "-1", "1e3", "1,5GB", "1.GB", "1 G B", "0x10", "１MB", "1iB"]
)
def test_other_texts_are_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="must be a number with"):
        parse_size(text)


@given(st.text() | st.from_regex(r"[0-9]{1,500}(\.[0-9]{1,9})? ?[KMGT]?i?B?"))
def test_any_text_is_a_size_or_refused_with_a_value_error(text: str) -> None:
    try:
        assert parse_size(text) >= 0
    except ValueError as error:
        assert "must be" in str(error)
