"""The environment (DIT_*, or a file .env) → Settings. `dit up` needs none of it."""

from pathlib import Path

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from worker.protocol import MAX_RESULT_TTL_S


class Settings(BaseSettings):
    """One field per variable; the names are the contract."""

    model_config = SettingsConfigDict(env_prefix="DIT_", env_file=".env", extra="ignore")

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    redis_url: str | None = None  # unset: `dit up` starts an embedded server
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
    image_bytes: int = Field(default=1 << 30, ge=1)  # that the pictures of all jobs may take
    drain_seconds: float = Field(default=10, ge=0, allow_inf_nan=False)  # that running jobs get after SIGTERM; the rest is given back
    hang_seconds: float | None = Field(default=None, gt=0, allow_inf_nan=False)  # that a step may take; unset: by how long steps take
    data: Path = Path(".dit")  # state of the embedded server, compile cache, logs
    image_store: str = "redis"
    api_keys_file: Path | None = None

    @property
    def models(self) -> list[str] | None:
        """The models that a worker is given; None for all."""
        return [name.strip() for name in self.model.split(",") if name.strip()] if self.model is not None else None

    @field_validator("image_store")
    @classmethod
    def _only_redis_yet(cls, value: str) -> str:
        if value != "redis":
            raise ValueError(f"only 'redis' is supported by this version, got {value!r}")
        return value

    @field_validator("api_keys_file")
    @classmethod
    def _no_keys_yet(cls, value: Path | None) -> Path | None:
        if value is not None:
            raise ValueError("API keys are not supported by this version; nothing would be protected, so it does not start")
        return value


def load_settings() -> Settings:
    """ValueError names the variable that is wrong and what is allowed."""
    try:
        return Settings()
    except ValidationError as error:
        first = error.errors()[0]
        name = "DIT_" + "_".join(str(part) for part in first["loc"]).upper()
        raise ValueError(f"{name}={first['input']!s}: {first['msg']}") from error
