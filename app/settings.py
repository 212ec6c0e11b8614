"""The environment (DIT_*, or a file .env) → Settings. `dit up` needs none of it."""

import ipaddress
import re
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from worker.protocol import MAX_RESULT_TTL_S
from worker.stores import REDIS, ROOM_BYTES, kind


class Settings(BaseSettings):
    """One field per variable; the names are the contract."""

    model_config = SettingsConfigDict(env_prefix="DIT_", env_file=".env", extra="ignore")

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    redis_url: str | None = None  # unset: `dit up` starts an embedded server
    redis_password_file: Path | None = None  # so that the password is in no environment, which whoever sees the process can read
    checkpoints: Path = Path("checkpoints")  # the registry: one folder per model
    model: str | None = None  # several with commas between them; unset: all that the registry has
    device: str = "auto"  # auto, cpu, cuda, cuda:1 …
    dtype: str = "auto"  # auto, bfloat16, float16, float32
    max_rows: int | None = Field(default=None, ge=2)  # rows of one forward pass
    compile: bool = True
    reproducible: bool = False  # every forward in one shape, so that CUDA too gives a picture the same bits in any crowd
    block_cache: bool = False  # requests may ask for the block-output cache
    trace: Path | None = None  # where the worker writes a JSON line per tick
    queue_limit: int = Field(default=1000, ge=1)  # jobs that may wait
    result_ttl: int = Field(default=24 * 3600, ge=1, le=MAX_RESULT_TTL_S)  # seconds that results live
    image_store: str = REDIS  # or a folder, or s3://bucket/prefix; the same for the API and every worker
    image_bytes: int | None = Field(default=None, ge=1)  # that the pictures of all jobs may take there; unset: by the kind of store
    drain_seconds: float = Field(default=10, ge=0, allow_inf_nan=False)  # that running jobs get after SIGTERM; the rest is given back
    hang_seconds: float | None = Field(default=None, gt=0, allow_inf_nan=False)  # that a step may take; unset: by how long steps take
    log_format: Literal["text", "json"] = "text"
    data: Path = Path(".dit")  # state of the embedded server, compile cache, logs
    api_keys_file: Path | None = None  # unset: everybody who reaches the API may everything
    allow_public: bool = False  # an address that others reach, without keys
    cors_origins: str | None = None  # of pages elsewhere that may call, with commas between them; unset: none

    @property
    def models(self) -> list[str] | None:
        """The models that a worker is given; None for all."""
        return None if self.model is None else _listed(self.model)

    @property
    def origins(self) -> list[str]:
        """The origins whose pages may call the API from a browser."""
        return _listed(self.cors_origins)

    @property
    def room_bytes(self) -> int:
        """That the pictures of all jobs may take in their store."""
        return self.image_bytes or ROOM_BYTES[kind(self.image_store)]

    @property
    def redis_password(self) -> str | None:
        """Given to each client of `redis_url` besides it; without the line's end that an editor leaves."""
        return self.redis_password_file.read_text().strip() if self.redis_password_file else None

    @field_validator("redis_password_file")
    @classmethod
    def _one_password_that_can_be_read(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        if value is None:
            return None
        url = info.data.get("redis_url")
        if url is None:
            raise ValueError("it goes with DIT_REDIS_URL, which is not set")
        if urlsplit(url).password is not None:
            raise ValueError("DIT_REDIS_URL has a password too; one of the two must go")
        try:
            if not value.read_text().strip():
                raise ValueError("the file is empty")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"it cannot be read: {getattr(error, 'strerror', None) or 'it is not text'}") from error
        return value

    @field_validator("image_store")
    @classmethod
    def _is_a_store(cls, value: str) -> str:
        kind(value)
        return value

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, value: str | None) -> str | None:
        for origin in _listed(value):
            if origin != "*" and not re.fullmatch(r"https?://[^/?#@\s]+", origin):
                raise ValueError(f"an origin reads https://example.org or http://localhost:3000, without a path; got {origin!r}")
        return value


def _listed(value: str | None) -> list[str]:
    return [part.strip() for part in (value or "").split(",") if part.strip()]


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it; not of a name, since what that stands for may change."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_exposure(settings: Settings) -> None:
    """ValueError if others reach the API and nothing asks who they are."""
    if not is_loopback(settings.host) and settings.api_keys_file is None and not settings.allow_public:
        raise ValueError(
            f"DIT_HOST={settings.host}: others reach this address, and without keys they may everything; "
            "set DIT_API_KEYS_FILE (`dit key create` makes keys), or DIT_ALLOW_PUBLIC=true"
        )


def load_settings() -> Settings:
    """ValueError names the variable that is wrong and what is allowed."""
    try:
        return Settings()
    except ValidationError as error:
        first = error.errors()[0]
        name = "DIT_" + "_".join(str(part) for part in first["loc"]).upper()
        shown = re.sub(r"//[^/@]*@", "//…@", str(first["input"]))  # whoever is named in a URL, and with which password
        raise ValueError(f"{name}={shown}: {first['msg']}") from error
