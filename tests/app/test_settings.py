"""The environment → Settings; what is wrong is told by the name of its variable."""

import os
from pathlib import Path

import pytest

from app.main import create_app
from app.settings import Settings, check_exposure, load_settings


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No DIT_* of the shell, no .env of the checkout."""
    for name in [name for name in os.environ if name.startswith("DIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def test_nothing_needs_to_be_set() -> None:
    settings = load_settings()
    assert (settings.host, settings.port, settings.redis_url, settings.device) == ("127.0.0.1", 8000, None, "auto")
    assert (settings.queue_limit, settings.result_ttl, settings.compile) == (1000, 24 * 3600, True)
    assert (settings.checkpoints, settings.data) == (Path("checkpoints"), Path(".dit"))
    assert (settings.drain_seconds, settings.hang_seconds) == (10, None)


def test_each_field_has_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "HOST": "0.0.0.0",
        "PORT": "9000",
        "REDIS_URL": "redis://elsewhere:6379/1",
        "CHECKPOINTS": "/models",
        "MODEL": "birds",
        "DEVICE": "cuda:1",
        "DTYPE": "bfloat16",
        "MAX_ROWS": "64",
        "COMPILE": "false",
        "REPRODUCIBLE": "true",
        "BLOCK_CACHE": "true",
        "TRACE": "/trace.jsonl",
        "DRAIN_SECONDS": "3.5",
        "HANG_SECONDS": "90.0",
        "QUEUE_LIMIT": "5",
        "RESULT_TTL": "60",
        "IMAGE_BYTES": "1000",
        "DATA": "/state",
        "IMAGE_STORE": "s3://bucket/pictures",
        "LOG_FORMAT": "json",
        "API_KEYS_FILE": "/keys.json",
        "ALLOW_PUBLIC": "true",
        "CORS_ORIGINS": "https://example.org, http://localhost:3000",
    }
    for name, value in values.items():
        monkeypatch.setenv(f"DIT_{name}", value)
    read, switches = load_settings(), {"COMPILE": "False", "REPRODUCIBLE": "True", "BLOCK_CACHE": "True", "ALLOW_PUBLIC": "True"}
    assert {name: str(getattr(read, name.lower())) for name in values} == {**values, **switches}
    assert {name.upper() for name in Settings.model_fields} == {*values, "REDIS_PASSWORD_FILE"}
    assert read.origins == ["https://example.org", "http://localhost:3000"]


def test_a_file_env_is_read_and_the_environment_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".env").write_text("DIT_PORT=8100\nDIT_MODEL=birds\nOTHER_PROGRAM=1\n")
    monkeypatch.setenv("DIT_PORT", "8200")
    settings = load_settings()
    assert (settings.port, settings.model) == (8200, "birds")


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("DIT_PORT", "70000", "65535"),
        ("DIT_PORT", "http", "integer"),
        ("DIT_MAX_ROWS", "1", "greater than or equal to 2"),
        ("DIT_QUEUE_LIMIT", "0", "greater than or equal to 1"),
        ("DIT_RESULT_TTL", "0", "greater than or equal to 1"),
        ("DIT_DRAIN_SECONDS", "-1", "greater than or equal to 0"),
        ("DIT_DRAIN_SECONDS", "inf", "finite number"),
        ("DIT_HANG_SECONDS", "0", "greater than 0"),
        ("DIT_COMPILE", "maybe", "boolean"),
        ("DIT_LOG_FORMAT", "xml", "'text' or 'json'"),
        (
            "DIT_IMAGE_STORE",
            "gs://bucket",
            "must be 'redis', a folder by its whole path (/pictures or file:///pictures), or s3://bucket/prefix",
        ),
        ("DIT_IMAGE_BYTES", "0", "greater than or equal to 1"),
        ("DIT_ALLOW_PUBLIC", "perhaps", "boolean"),
        ("DIT_CORS_ORIGINS", "example.org", "without a path"),
        ("DIT_CORS_ORIGINS", "https://example.org/page", "without a path"),
        ("DIT_CORS_ORIGINS", "https://example.org, null", "got 'null'"),
    ],
)
def test_a_wrong_value_is_told_with_its_variable_and_what_is_allowed(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, allowed: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError) as told:
        load_settings()
    assert str(told.value).startswith(f"{name}={value}: ") and allowed in str(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_an_address_of_this_machine_alone_needs_no_keys(host: str) -> None:
    check_exposure(Settings(host=host))


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "", "192.168.1.7", "10.0.0.1", "fe80::1%eth0", "api.example.org", "localhost.example.org", "127.1"]
)
def test_an_address_that_others_reach_needs_keys_or_a_word(host: str) -> None:
    with pytest.raises(ValueError, match="DIT_API_KEYS_FILE") as told:
        check_exposure(Settings(host=host))
    assert str(told.value).startswith(f"DIT_HOST={host}: ") and "DIT_ALLOW_PUBLIC=true" in str(told.value)
    check_exposure(Settings(host=host, allow_public=True))
    check_exposure(Settings(host=host, api_keys_file=Path("keys.json")))


@pytest.mark.parametrize(("text", "password"), [("s3cret", "s3cret"), ("s3cret\n", "s3cret"), ("  two words \r\n", "two words")])
def test_the_password_of_redis_is_read_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, password: str) -> None:
    assert load_settings().redis_password is None
    (tmp_path / "password").write_text(text, newline="")
    monkeypatch.setenv("DIT_REDIS_URL", "redis://elsewhere:6379/0")
    monkeypatch.setenv("DIT_REDIS_PASSWORD_FILE", "password")
    settings = load_settings()
    assert settings.redis_password == password and password not in repr(settings)


@pytest.mark.parametrize(
    ("url", "content", "message"),
    [
        (None, b"s3cret", "it goes with DIT_REDIS_URL, which is not set"),
        ("redis://:other@elsewhere", b"s3cret", "DIT_REDIS_URL has a password too"),
        ("redis://elsewhere", b" \n", "the file is empty"),
        ("redis://elsewhere", b"\xff\xfe", "it cannot be read: it is not text"),
        ("redis://elsewhere", None, "it cannot be read: No such file or directory"),
    ],
)
def test_a_password_file_that_does_not_serve_is_refused_and_not_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str | None, content: bytes | None, message: str
) -> None:
    if url:
        monkeypatch.setenv("DIT_REDIS_URL", url)
    if content is not None:
        (tmp_path / "password").write_bytes(content)
    monkeypatch.setenv("DIT_REDIS_PASSWORD_FILE", "password")
    with pytest.raises(ValueError) as told:
        load_settings()
    assert message in str(told.value) and "s3cret" not in str(told.value) and "other" not in str(told.value)


def test_the_api_alone_needs_a_redis() -> None:
    with pytest.raises(ValueError, match="DIT_REDIS_URL"):
        create_app(load_settings())
