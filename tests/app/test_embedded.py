"""The embedded Valkey: what it is told survives it, and nothing a killed one leaves is in the way of the next."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis

from app.embedded import EmbeddedServer, socket_path


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedServer]:
    server = EmbeddedServer(tmp_path)
    yield server
    server.stop()


def put(server: EmbeddedServer, value: str) -> None:
    with Redis.from_url(server.url, protocol=2) as client:
        client.set("key", value)


def got(server: EmbeddedServer) -> str:
    with Redis.from_url(server.url, protocol=2) as client:
        return str(client.get("key").decode())


def test_what_was_written_is_there_after_a_stop(server: EmbeddedServer) -> None:
    server.start()
    put(server, "first")
    server.stop()
    assert not server.socket.exists()
    server.start()
    assert got(server) == "first"


def test_what_was_written_is_there_after_kill_9(server: EmbeddedServer) -> None:
    """A write is in the file at once; only fsync, for the machine's own death, comes each second."""
    server.start()
    assert server.process
    put(server, "second")
    server.process.kill()
    server.process.wait()
    assert server.socket.exists()
    server.start()
    assert got(server) == "second"


def test_a_server_that_outlived_its_supervisor_is_stopped_first(server: EmbeddedServer, tmp_path: Path) -> None:
    orphan = EmbeddedServer(tmp_path)
    orphan.start()
    assert orphan.process
    put(orphan, "third")
    server.start()
    assert orphan.process.wait(10) is not None and got(server) == "third"


@pytest.mark.parametrize("what", ["file", "socket"])
def test_a_stale_socket_is_no_obstacle(server: EmbeddedServer, what: str) -> None:
    if what == "file":
        server.socket.touch()
    else:
        with socket.socket(socket.AF_UNIX) as nobody:
            nobody.bind(str(server.socket))
    server.start()
    put(server, "fourth")


def test_a_server_that_cannot_start_says_why(server: EmbeddedServer) -> None:
    folder = server.folder / "appendonlydir"
    folder.mkdir(parents=True)
    (folder / "appendonly.aof.manifest").write_text("nonsense\n")
    with pytest.raises(RuntimeError, match="the embedded server did not start") as told:
        server.start()
    assert "\n" not in str(told.value) and "manifest" in str(told.value)


def test_a_long_path_moves_the_socket_to_the_temporary_folder(tmp_path: Path) -> None:
    long = tmp_path / ("d" * 100)
    assert socket_path(tmp_path).parent == tmp_path
    assert len(os.fsencode(socket_path(long))) <= 100 and socket_path(long) != socket_path(tmp_path / ("e" * 100))
    server = EmbeddedServer(long)
    server.start()
    put(server, "fifth")
    server.stop()


def test_ctrl_c_does_not_reach_the_server(server: EmbeddedServer) -> None:
    server.start()
    assert server.process and os.getpgid(server.process.pid) != os.getpgid(0)
    assert os.getsid(server.process.pid) == os.getsid(0)


def test_only_its_owner_may_speak_to_it(server: EmbeddedServer) -> None:
    server.start()
    assert server.socket.stat().st_mode & 0o077 == 0
    with Redis.from_url(server.url, protocol=2) as client:
        assert client.config_get("port") in ({"port": "0"}, {b"port": b"0"})
