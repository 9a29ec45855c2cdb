"""The settings: read once, validated, and echoed with secrets masked.

Layers, lowest to highest: built-in, `config/common.json` (or the file `MODEL_MANAGER_CONFIG` names),
`config/racks/<rack>.json` beside it, environment `MODEL_MANAGER_*` (upper snake case, nested with `__`), flags. Keys
are camelCase. Of a secret and its `...File` twin the one in the higher layer holds. Whatever is wrong is told with its
key and the layer it came from.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, TypeAdapter, ValidationError
from pydantic.alias_generators import to_camel, to_snake

from schemas.errors import ModelManagerError
from schemas.ids import ModelType, Rack
from schemas.wire import parse_object
from worker.broker_url import is_address, unusable_tls, with_tls
from worker.http_address import flaw_for_s3, flaw_of

_UNITS = (
    {"": 1, "B": 1}
    | {f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)}
    | {f"{p}iB": 1024**i for i, p in enumerate("KMGT", 1)}
)
_ENV_PREFIX = "MODEL_MANAGER_"
_ENV_OF_OTHERS = frozenset(
    {"MODEL_MANAGER_CONFIG", "MODEL_MANAGER_URL", "MODEL_MANAGER_TOKEN_FILE", "MODEL_MANAGER_REVISION"}
)
# A value, and the file that has it.
_TWINS = {"amqp.url": "amqp.urlFile", "amqp.urlFile": "amqp.url"}


class SettingsError(Exception):
    """The settings cannot be used; `problems` has a line for each reason, with its key and origin."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("; ".join(problems))


def parse_size(value: Any) -> Any:
    """Bytes from `"100GB"` (powers of 1000), `"64MiB"` (powers of 1024) or a number."""
    if isinstance(value, str) and (match := re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([KMGT]?i?B?)", value.strip())):
        unit = _UNITS.get(match[2])
        if unit is not None:
            return int(Decimal(match[1]) * unit)
    if isinstance(value, str):
        raise ValueError("must be a number with B, KB, MB, GB, TB, KiB, MiB, GiB or TiB")
    return value


Bytes = Annotated[int, BeforeValidator(parse_size, json_schema_input_type=int | str), Field(ge=0, le=2**53 - 1)]
Seconds = Annotated[float, Field(gt=0, le=86_400)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, alias_generator=to_camel, validate_by_alias=True)


class HttpSettings(_Section):
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65_535)] = 8002
    public_url: str | None = None
    token_file: Path | None = None


class AmqpSettings(_Section):
    url: SecretStr = SecretStr("amqp://guest:guest@127.0.0.1:5672/")
    url_file: Path | None = None
    ca_file: Path | None = None
    certificate_file: Path | None = None
    key_file: Path | None = None
    provision: bool = True

    @property
    def tls(self) -> dict[str, Path | None]:
        return {"ca_file": self.ca_file, "certificate_file": self.certificate_file, "key_file": self.key_file}


class S3Settings(_Section):
    endpoint_url: str | None = None
    bucket: str | None = None
    prefix: str | None = None
    region: str | None = None
    public_endpoint_url: str | None = None
    clean_up_profile: str | None = None


class StorageSettings(_Section):
    backend: Literal["disk", "s3"] = "disk"
    path: Path = Path("data/models")
    s3: S3Settings = S3Settings()


class RegistrySettings(_Section):
    path: Path = Path("data/registry")


class ArchiveSettings(_Section):
    enabled: bool = True
    period_seconds: Seconds = 5.0
    keep_seconds: Annotated[float, Field(gt=0)] = 30 * 86_400


class ReplicationSettings(_Section):
    peers: tuple[Rack, ...] = ()


class CacheSettings(_Section):
    max_entries: Annotated[int, Field(ge=0)] = 256
    max_bytes: Bytes = 64 * 1024**2


class TimeoutSettings(_Section):
    drain: Seconds = 30.0
    http_header: Seconds = 15.0
    http_idle: Seconds = 60.0
    storage: Seconds = 30.0
    loop_stall: Seconds = 60.0


class LimitSettings(_Section):
    """`lookups`, `writes` and `transfers` are places in lanes, each with a waiting room four times as large."""

    lookups: Annotated[int, Field(ge=1, le=10_000)] = 64
    writes: Annotated[int, Field(ge=1, le=10_000)] = 16
    transfers: Annotated[int, Field(ge=1, le=10_000)] = 64
    jobs: Annotated[int, Field(ge=1, le=1000)] = 4
    pulls: Annotated[int, Field(ge=1, le=1000)] = 2
    prefetch: Annotated[int, Field(ge=1, le=65_535)] = 64
    undo_seconds: Annotated[float, Field(ge=0)] = 7 * 86_400
    upload_seconds: Seconds = 86_400
    url_seconds: Annotated[int, Field(ge=1, le=7 * 86_400)] = 900
    clean_up_seconds: Seconds = 600.0
    scrub_seconds: Annotated[float, Field(ge=0)] = 30 * 86_400


class LogSettings(_Section):
    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "json", "console"] = "auto"


class Settings(_Section):
    """Everything that can be set; the README's table explains each key."""

    rack: Rack = "rack-1"
    http: HttpSettings = HttpSettings()
    amqp: AmqpSettings = AmqpSettings()
    storage: StorageSettings = StorageSettings()
    registry: RegistrySettings = RegistrySettings()
    archive: ArchiveSettings = ArchiveSettings()
    max_model_size: Bytes = 100 * 1000**3
    max_inline_size: Bytes = 1000**2
    supported_formats: tuple[ModelType, ...] | None = None
    allow_pickle: bool = False
    model_validation_enabled: bool = True
    checksum_validation: bool = True
    replication_factor: Annotated[int, Field(ge=1, le=256)] = 1
    replication: ReplicationSettings = ReplicationSettings()
    cache: CacheSettings = CacheSettings()
    timeouts: TimeoutSettings = TimeoutSettings()
    limits: LimitSettings = LimitSettings()
    log: LogSettings = LogSettings()


@dataclass(frozen=True, slots=True)
class Loaded:
    """The settings, the layer each key came from (built-in ones are not listed), and what to warn about."""

    settings: Settings
    origins: dict[str, str]
    warnings: tuple[str, ...] = ()

    @property
    def token(self) -> str | None:
        """The bearer token of the HTTP service, if one is set."""
        path = self.settings.http.token_file
        return None if path is None else read_secret(path, "http.tokenFile")

    @property
    def amqp_url(self) -> str:
        """The broker's address, with the files of TLS as its parameters; a file is read anew each time.

        Raises SettingsError when the file cannot be read.
        """
        return with_tls(_plain_amqp_url(self.settings.amqp), **self.settings.amqp.tls)

    @property
    def amqp_files(self) -> tuple[Path, ...]:
        """The files that a connection to the broker depends on."""
        amqp = self.settings.amqp
        return tuple(path for path in (amqp.url_file, *amqp.tls.values()) if path is not None)


def _plain_amqp_url(amqp: AmqpSettings) -> str:
    return amqp.url.get_secret_value() if amqp.url_file is None else read_secret(amqp.url_file, "amqp.urlFile")


@dataclass(slots=True)
class _Layers:
    """Key paths to values, each with the origin of the topmost layer that sets it."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def add(self, layer: Iterable[tuple[str, Any, str]]) -> None:
        """Put a layer, key paths with value and origin, upon the others; of a secret and its file one holds.

        That of the higher layer, or the file within one.
        """
        entries = list(layer)
        for path, value, _ in entries:
            if value is not None and (twin := _TWINS.get(path)) is not None:
                self.values.pop(twin, None)
                self.origins.pop(twin, None)
        for path, value, origin in entries:
            self.values[path] = value
            self.origins[path] = origin

    def nested(self) -> dict[str, Any]:
        tree: dict[str, Any] = {}
        for path, value in self.values.items():
            *parents, last = path.split(".")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = value
        return tree


def known_keys(section: type[BaseModel] = Settings, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key path with the type of its value."""
    for name, info in section.model_fields.items():
        path = prefix + (info.alias or name)
        annotation = info.annotation
        if isinstance(annotation, type) and issubclass(annotation, _Section):
            yield from known_keys(annotation, path + ".")
        else:
            bare: Any = annotation
            yield path, TypeAdapter(Annotated[bare, *info.metadata] if info.metadata else bare)


def environment_name(path: str) -> str:
    """`storage.s3.endpointUrl` as `MODEL_MANAGER_STORAGE__S3__ENDPOINT_URL`."""
    # to_snake would make `s_3` of `s3`
    return _ENV_PREFIX + "__".join(part if part == "s3" else to_snake(part) for part in path.split(".")).upper()


def load_settings(
    overrides: Mapping[str, Any] | None = None, *, environment: Mapping[str, str] | None = None
) -> Loaded:
    """Merge the layers and check them. `overrides` are flags, by key path. Raises SettingsError with every problem."""
    environment = os.environ if environment is None else environment
    overrides = {path: value for path, value in (overrides or {}).items() if value is not None}
    layers = _Layers()
    keys = dict(known_keys())
    named = environment.get("MODEL_MANAGER_CONFIG")
    common = Path(named or "config/common.json")
    _add_file(layers, common, required=named is not None)
    rack = overrides.get("rack") or environment.get(environment_name("rack")) or layers.values.get("rack", "rack-1")
    if isinstance(rack, str) and re.fullmatch(r"[a-z0-9-]+", rack):
        _add_file(layers, common.parent / "racks" / f"{rack}.json", required=False)
    _add_environment(layers, environment, keys)
    layers.add((path, value, "flag") for path, value in overrides.items())
    for path in [path for path in layers.values if path not in keys]:
        layers.problems.append(f"{path} ({layers.origins[path]}): no such setting")
        del layers.values[path]
    settings = _validate(layers)
    if settings is None or layers.problems:
        raise SettingsError(layers.problems)
    return Loaded(settings, dict(layers.origins), tuple(layers.warnings))


def _add_file(layers: _Layers, path: Path, *, required: bool) -> None:
    try:
        body = path.read_bytes()
    except FileNotFoundError:
        if required:
            layers.problems.append(f"{path}: no such file (named by MODEL_MANAGER_CONFIG)")
        return
    except OSError as error:
        layers.problems.append(f"{path}: cannot be read: {error.strerror}")
        return
    try:
        tree = parse_object(body)
    except ModelManagerError as error:
        layers.problems.append(f"{path}: {error.message}")
        return
    layers.add((key, value, str(path)) for key, value in _flatten(tree, Settings))


def _flatten(tree: dict[str, Any], section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    sections = {
        info.alias: info.annotation
        for info in section.model_fields.values()
        if isinstance(info.annotation, type) and issubclass(info.annotation, _Section)
    }
    for key, value in tree.items():
        inner = sections.get(key)
        if inner is not None and isinstance(value, dict):
            yield from _flatten(value, inner, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _add_environment(layers: _Layers, environment: Mapping[str, str], keys: Mapping[str, TypeAdapter[Any]]) -> None:
    by_name = {environment_name(path): path for path in keys}
    layer = []
    for name, text in environment.items():
        if not name.startswith(_ENV_PREFIX) or name in _ENV_OF_OTHERS:
            continue
        path = by_name.get(name)
        if path is None:
            layers.warnings.append(f"{name} is not a setting; it is ignored")
        else:
            layer.append((path, _from_text(text, keys[path]), f"environment {name}"))
    layers.add(layer)


def _from_text(text: str, adapter: TypeAdapter[Any]) -> Any:
    """The value `text` stands for: itself where a string fits, else the JSON it is, else itself (to be refused)."""
    try:
        adapter.validate_python(text, strict=True)
    except ValidationError:
        try:
            return TypeAdapter(Any).validate_json(text)
        except ValidationError:
            return text
    return text


def _validate(layers: _Layers) -> Settings | None:
    try:
        # JSON mode is strict about types and still makes a Path of a string
        settings = Settings.model_validate_json(_json(layers.nested()), strict=True)
    except ValidationError as error:
        for problem in error.errors(include_url=False, include_context=False, include_input=False):
            path = ".".join(str(part) for part in problem["loc"])
            origin = _origin(layers, path)
            layers.problems.append(f"{path} ({origin}): {problem['msg'].removeprefix('Value error, ')}")
        return None
    unusable = [*_unusable(settings), *_unusable_broker(settings.amqp)]
    layers.problems += [f"{path} ({_origin(layers, path)}): {why}" for path, why in unusable]
    return settings


def _json(tree: dict[str, Any]) -> bytes:
    return TypeAdapter(dict[str, Any]).dump_json(tree)


def _origin(layers: _Layers, path: str) -> str:
    while path not in layers.origins and "." in path:
        path = path.rpartition(".")[0]
    return layers.origins.get(path, "built-in")


def _unusable(settings: Settings) -> Iterator[tuple[str, str]]:
    """What is right by its type and still cannot work."""
    loopback = settings.http.host in ("127.0.0.1", "::1", "localhost")
    if not loopback and settings.http.token_file is None:
        yield "http.host", "an address other than loopback needs http.tokenFile"
    if settings.storage.backend == "s3" and not settings.storage.s3.bucket:
        yield "storage.s3.bucket", "the s3 backend needs a bucket"
    s3 = settings.storage.s3
    for key, url, flaw in (
        ("http.publicUrl", settings.http.public_url, flaw_of),
        ("storage.s3.endpointUrl", s3.endpoint_url, flaw_for_s3),
        ("storage.s3.publicEndpointUrl", s3.public_endpoint_url, flaw_for_s3),
    ):
        if url is not None and (why := flaw(url)) is not None:
            yield key, why
    if settings.rack in settings.replication.peers:
        yield "replication.peers", "must not name this rack itself"
    if settings.max_inline_size > 1_400_000:
        yield "maxInlineSize", "must be at most 1400000 bytes: a message is at most 2 MB, and base64 adds a third"
    if settings.http.token_file is not None:
        try:
            read_secret(settings.http.token_file, "http.tokenFile")
        except SettingsError as error:
            yield "http.tokenFile", error.problems[0]


def _unusable_broker(amqp: AmqpSettings) -> Iterator[tuple[str, str]]:
    try:
        url = _plain_amqp_url(amqp)
    except SettingsError as error:
        yield "amqp.urlFile", error.problems[0]
        return
    if not is_address(url):
        key = "amqp.url" if amqp.url_file is None else "amqp.urlFile"
        yield key, "is not an AMQP URL: amqp://USER:PASSWORD@HOST/VHOST, each part quoted"
        return
    problem = unusable_tls(url, **amqp.tls)
    if problem is not None:
        name, why = problem
        yield f"amqp.{to_camel(name)}", why


def read_secret(path: Path, key: str) -> str:
    """The secret in a file, without the line end; SettingsError if there is none or everyone can read it."""
    try:
        if stat.S_IMODE(path.stat().st_mode) & stat.S_IROTH:
            raise SettingsError([f"{path} is readable by everyone: chmod 600 it"])
        secret = path.read_text("utf-8").strip()
    except OSError as error:
        raise SettingsError([f"{path} cannot be read: {error.strerror}"]) from None
    except UnicodeDecodeError:
        raise SettingsError([f"{path} is not UTF-8 text"]) from None
    if not secret:
        raise SettingsError([f"{path} is empty ({key})"])
    return secret
