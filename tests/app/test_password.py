"""A Redis that wants a password: the API and every command take it from a file."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from starlette.testclient import TestClient
from typer.testing import CliRunner

from app.cli import app
from app.embedded import EmbeddedServer
from app.main import create_app
from app.settings import Settings
from worker import protocol

CLOSED = "Authentication required"


@pytest.fixture
def locked(mortal_server: EmbeddedServer, serve: Callable[..., Any]) -> EmbeddedServer:
    """Its password is s3cret, and a worker's record is there."""
    with Redis.from_url(mortal_server.url, protocol=2) as client:
        record = serve()
        client.set(protocol.model_key(record.id), record.dump(), ex=60)
        client.sadd(protocol.MODELS_KEY, record.id)
        client.config_set("requirepass", "s3cret")
    return mortal_server


@pytest.fixture
def environment(locked: EmbeddedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What `dit …` needs to reach it; in this process too."""
    (tmp_path / "password").write_text("s3cret\n")
    registry = tmp_path / "registry"
    registry.mkdir()
    values = {
        "DIT_REDIS_URL": locked.url,
        "DIT_REDIS_PASSWORD_FILE": str(tmp_path / "password"),
        "DIT_CHECKPOINTS": str(registry),
        "DIT_DATA": str(tmp_path / "nothing"),
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    return {**os.environ, **values}


def test_the_api_is_let_in(environment: dict[str, str]) -> None:
    password_file = Path(environment["DIT_REDIS_PASSWORD_FILE"])
    settings = Settings(_env_file=None, redis_url=environment["DIT_REDIS_URL"], redis_password_file=password_file)
    with TestClient(create_app(settings)) as client:
        assert client.get("/models").json()["models"][0]["id"] == "tiny"
        assert client.post("/generate", json={"class_label": "cat"}).status_code == 202, "rq's own client is let in too"


def test_the_api_is_not_let_in_without(environment: dict[str, str]) -> None:
    with TestClient(create_app(Settings(_env_file=None, redis_url=environment["DIT_REDIS_URL"], redis_password_file=None))) as client:
        assert client.get("/readyz").status_code == 503


def test_the_commands_are_let_in(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert CliRunner().invoke(app, ["jobs", "dead"]).stdout == "no job was given up\n"
    listed = CliRunner().invoke(app, ["models", "list", "--json"])
    assert (json.loads(listed.stdout), listed.stderr) == ([], ""), "what is served and waited for is known"
    monkeypatch.delenv("DIT_REDIS_PASSWORD_FILE")
    assert CLOSED in CliRunner().invoke(app, ["jobs", "dead"]).stderr
    assert CLOSED in CliRunner().invoke(app, ["models", "list"]).stderr


def test_dit_up_is_let_in(environment: dict[str, str]) -> None:
    """It asks Redis before it starts anything; without a checkpoint it goes no further than that."""
    registry = Path(environment["DIT_CHECKPOINTS"])
    (registry / "broken").mkdir()
    (registry / "broken" / "checkpoint.json").write_text("{}")
    command = [sys.executable, "-m", "app.cli", "up"]
    without = {name: value for name, value in environment.items() if name != "DIT_REDIS_PASSWORD_FILE"}
    refused = subprocess.run(command, env={**without, "DIT_PORT": _free_port()}, capture_output=True, text=True, timeout=120)
    assert refused.returncode == 1 and CLOSED in refused.stderr
    let_in = subprocess.run(command, env={**environment, "DIT_PORT": _free_port()}, capture_output=True, text=True, timeout=120)
    assert let_in.returncode != 0 and CLOSED not in let_in.stdout + let_in.stderr and "checkpoint" in let_in.stderr


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
