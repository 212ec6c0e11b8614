"""`dit key`: keys are made, listed and revoked; and no port is opened to others without them."""

import json
import os
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from app import keys, local
from app.auth import KeyFile, digest, read_keys
from app.cli import app
from app.commands.common import CONFIGURATION_ERROR
from app.embedded import EmbeddedServer
from app.keys import create_key


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("DIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIT_API_KEYS_FILE", str(tmp_path / "keys.json"))


def dit(*arguments: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, result.output
    return result


def refused(*arguments: str, code: int = 1) -> str:
    """The one line that it says."""
    line = dit(*arguments, code=code).stderr
    assert line.startswith("dit: ") and line.count("\n") == 1, line
    return str(line)


def create(name: str = "alice", scope: str = "generate", *more: str) -> str:
    return str(dit("key", "create", "--name", name, "--scope", scope, *more).stdout.strip())


def listed() -> list[dict[str, Any]]:
    return json.loads(dit("key", "list", "--json").stdout)


def test_a_key_is_printed_once_and_kept_as_a_hash(key_file: Path) -> None:
    key = create()
    prefix, identity, secret = key.split("_")
    assert prefix == "dit" and len(bytes.fromhex(identity)) == 4 and len(bytes.fromhex(secret)) == 32
    text = key_file.read_text()
    assert secret not in text and digest(key.encode()) in text
    shown = dit("key", "list").output + dit("key", "list", "--json").output
    assert secret not in shown and digest(key.encode()) not in shown
    assert create("bob").split("_")[2] != secret


def test_a_key_has_what_it_was_made_with(key_file: Path) -> None:
    create("alice", "admin")
    bob = create("bob", "generate", "--per-minute", "60", "--in-flight", "4")
    first, second = listed()
    assert (first["name"], first["scope"], first["per_minute"], first["in_flight"]) == ("alice", "admin", None, None)
    assert (second["per_minute"], second["in_flight"], second["disabled"]) == (60, 4, False)
    found = KeyFile(key_file).find(bob.encode())
    assert found and (found.id, found.caller.per_minute, found.caller.in_flight) == (second["id"], 60, 4)
    assert "alice" in dit("key", "list").stdout and "?" not in dit("key", "list").stdout


def test_a_revoked_key_is_refused_and_stays_in_the_list(key_file: Path) -> None:
    alice, bob = create("alice"), create("bob")
    identity = listed()[0]["id"]
    assert f"revoked key {identity} of alice" in dit("key", "revoke", identity).stdout
    keys = KeyFile(key_file)
    assert keys.find(alice.encode()) is None and keys.find(bob.encode())
    assert [row["disabled"] for row in listed()] == [True, False]
    assert "already" in refused("key", "revoke", identity)
    assert KeyFile(key_file).find(create("alice").encode())  # the name is free again


def test_a_key_that_is_not_there_is_told_with_those_that_are() -> None:
    create()
    assert "there is no key 'ffffffff'" in (line := refused("key", "revoke", "ffffffff")) and listed()[0]["id"] in line


def test_what_a_key_cannot_have_is_told(key_file: Path) -> None:
    create()
    before = key_file.read_bytes()
    assert "the name alice belongs to key" in refused("key", "create", "--name", "alice", "--scope", "admin")
    assert "name must be" in refused("key", "create", "--name", "a b", "--scope", "admin")
    assert "per_minute must be" in refused("key", "create", "--name", "bob", "--scope", "admin", "--per-minute", "9999999")
    for wrong in (["--scope", "root"], ["--scope", "admin", "--per-minute", "0"], []):
        dit("key", "create", "--name", "bob", *wrong, code=2)
    assert key_file.read_bytes() == before


def test_a_file_that_is_not_there_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "No such file" in refused("key", "list")
    monkeypatch.setenv("DIT_API_KEYS_FILE", str(tmp_path / "nowhere" / "keys.json"))
    assert "nowhere" in refused("key", "create", "--name", "alice", "--scope", "admin")
    monkeypatch.delenv("DIT_API_KEYS_FILE")
    for arguments in (["list"], ["revoke", "00000000"], ["create", "--name", "alice", "--scope", "admin"]):
        assert "DIT_API_KEYS_FILE" in refused("key", *arguments, code=CONFIGURATION_ERROR)


def test_a_broken_file_is_left_as_it_is(key_file: Path) -> None:
    key_file.write_text("{")
    assert "must be JSON" in refused("key", "create", "--name", "alice", "--scope", "admin")
    assert key_file.read_text() == "{"


# --- how it is written -------------------------------------------------------------------------------------------------


def test_the_file_is_readable_by_its_owner_alone_whatever_the_umask(key_file: Path) -> None:
    before = os.umask(0)
    try:
        create()
        key_file.chmod(0o644)
        create("bob")
    finally:
        os.umask(before)
    assert stat.S_IMODE(key_file.stat().st_mode) == 0o600


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(key_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create()
    before = key_file.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(keys.os, "fsync", full)
    assert "No space left" in refused("key", "create", "--name", "bob", "--scope", "admin")
    assert key_file.read_bytes() == before and [path.name for path in key_file.parent.iterdir()] == ["keys.json"]


def test_a_link_stays_and_what_it_names_is_replaced(tmp_path: Path, key_file: Path) -> None:
    (tmp_path / "secrets").mkdir()
    key_file.symlink_to(tmp_path / "secrets" / "real.json")
    create()
    create("bob")
    assert key_file.is_symlink() and len(read_keys(tmp_path / "secrets" / "real.json")) == 2


def test_of_keys_that_are_made_at_once_none_is_lost(key_file: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda i: create_key(key_file, f"user{i}", "generate")[0], range(24)))
    assert {key.id for key in read_keys(key_file)} == {key.id for key in made}


# --- no open door ------------------------------------------------------------------------------------------------------


@pytest.fixture
def opened(server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The hosts on which `dit api` and `dit up` would have listened."""
    hosts: list[str] = []
    monkeypatch.setenv("DIT_REDIS_URL", server.url)
    monkeypatch.setattr("uvicorn.run", lambda application, host, **_: hosts.append(host))
    monkeypatch.setattr(local, "up", lambda settings, model: hosts.append(settings.host))
    return hosts


@pytest.mark.parametrize("command", ["api", "up"])
@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "api.example.org"])
def test_an_address_that_others_reach_is_refused_without_keys(
    opened: list[str], monkeypatch: pytest.MonkeyPatch, command: str, host: str
) -> None:
    monkeypatch.delenv("DIT_API_KEYS_FILE")
    monkeypatch.setenv("DIT_HOST", host)
    line = refused(command, code=CONFIGURATION_ERROR)
    assert f"DIT_HOST={host}" in line and "DIT_API_KEYS_FILE" in line and "DIT_ALLOW_PUBLIC" in line
    assert opened == []


@pytest.mark.parametrize("command", ["api", "up"])
def test_it_is_opened_with_keys_or_when_told_so(
    opened: list[str], monkeypatch: pytest.MonkeyPatch, bearer: Callable[..., dict[str, str]], command: str
) -> None:
    monkeypatch.setenv("DIT_HOST", "0.0.0.0")
    bearer()
    dit(command)
    monkeypatch.delenv("DIT_API_KEYS_FILE")
    monkeypatch.setenv("DIT_ALLOW_PUBLIC", "true")
    dit(command)
    monkeypatch.delenv("DIT_ALLOW_PUBLIC")
    monkeypatch.delenv("DIT_HOST")
    dit(command)
    assert opened == ["0.0.0.0", "0.0.0.0", "127.0.0.1"]


@pytest.mark.parametrize("command", ["api", "up"])
def test_nothing_is_opened_with_a_key_file_that_protects_nothing(opened: list[str], key_file: Path, command: str) -> None:
    assert f"DIT_API_KEYS_FILE={key_file}: No such file" in refused(command, code=CONFIGURATION_ERROR)
    key_file.write_text("[]")
    assert f"DIT_API_KEYS_FILE={key_file}: must be an object" in refused(command, code=CONFIGURATION_ERROR)
    assert opened == []
